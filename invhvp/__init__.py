"""Certified inverse-Hessian-vector products on any array library.

Solve (A + λI)x = b where A is a Hessian, Gauss–Newton or Fisher matrix known only through its
products, on NumPy, CuPy, PyTorch and JAX arrays.
"""

import logging as _logging

from ._memory_pool import share_memory_pool as share_memory_pool
from .estimate import FactorAccumulator as FactorAccumulator
from .gradients import DenseGradients as DenseGradients
from .gradients import EmbeddingGradients as EmbeddingGradients
from .gradients import OuterProductGradients as OuterProductGradients
from .gradients import StackedGradients as StackedGradients
from .gradients import StreamedGradients as StreamedGradients
from .influence import Influence as Influence
from .layout import Block as Block
from .layout import Layout as Layout
from .methods import CG as CG
from .methods import Arnoldi as Arnoldi
from .methods import BlockCG as BlockCG
from .methods import Blockwise as Blockwise
from .methods import Direct as Direct
from .methods import Fixed as Fixed
from .methods import InverseHarmonicMean as InverseHarmonicMean
from .methods import Jacobi as Jacobi
from .methods import LiSSA as LiSSA
from .methods import Minres as Minres
from .methods import NystroemPreconditioner as NystroemPreconditioner
from .methods import NystroemSketch as NystroemSketch
from .methods import PivotedCholesky as PivotedCholesky
from .methods import SampleSpace as SampleSpace
from .methods import Surrogate as Surrogate
from .methods import method_from_dict as method_from_dict
from .methods import method_to_dict as method_to_dict
from .methods import plan as plan
from .methods import solve as solve
from .methods import solve_path as solve_path
from .operators import BlockDiagonal as BlockDiagonal
from .operators import Callback as Callback
from .operators import Damped as Damped
from .operators import DataParallel as DataParallel
from .operators import Dense as Dense
from .operators import Diagonal as Diagonal
from .operators import EigenKronecker as EigenKronecker
from .operators import Identity as Identity
from .operators import Kronecker as Kronecker
from .operators import LinearOperator as LinearOperator
from .operators import LowRank as LowRank
from .operators import RankOneMean as RankOneMean
from .operators import as_cupyx as as_cupyx
from .operators import as_operator as as_operator
from .operators import as_scipy as as_scipy
from .solution import ConvergenceError as ConvergenceError
from .solution import ConvergenceWarning as ConvergenceWarning
from .solution import IndefiniteError as IndefiniteError
from .solution import InvhvpWarning as InvhvpWarning
from .solution import SingularError as SingularError
from .solution import Solution as Solution
from .solution import Status as Status
from .storage import StateError as StateError
from .storage import load as load
from .storage import save as save

__version__ = "0.1.0.dev0"

_logging.getLogger("invhvp").addHandler(_logging.NullHandler())

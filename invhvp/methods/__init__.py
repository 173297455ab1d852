"""One method a file: this folder is the menu."""

from ._fixed_map import MapInverse as MapInverse
from ._inverse import PreparedInverse as PreparedInverse
from ._json import method_from_dict as method_from_dict
from ._json import method_to_dict as method_to_dict
from .arnoldi import Arnoldi as Arnoldi
from .block_cg import BlockCG as BlockCG
from .blockwise import Blockwise as Blockwise
from .cg import CG as CG
from .direct import Direct as Direct
from .harmonic_mean import InverseHarmonicMean as InverseHarmonicMean
from .jacobi import Jacobi as Jacobi
from .lissa import LiSSA as LiSSA
from .minres import Minres as Minres
from .nystroem_preconditioner import NystroemPreconditioner as NystroemPreconditioner
from .nystroem_sketch import NystroemSketch as NystroemSketch
from .path import Path as Path
from .path import solve_path as solve_path
from .pivoted_cholesky import PivotedCholesky as PivotedCholesky
from .plan import Plan as Plan
from .plan import plan as plan
from .sample_space import SampleSpace as SampleSpace
from .solve import solve as solve
from .surrogate import Fixed as Fixed
from .surrogate import Surrogate as Surrogate

"""Symmetric linear operators."""

from .base import LinearOperator as LinearOperator
from .block_diagonal import BlockDiagonal as BlockDiagonal
from .callback import Callback as Callback
from .convert import as_operator as as_operator
from .curvature_blocks import CurvatureBlocks as CurvatureBlocks
from .damping import Damped as Damped
from .data_parallel import DataParallel as DataParallel
from .dense import Dense as Dense
from .diagonal import Diagonal as Diagonal
from .diagonal import Identity as Identity
from .eigen_kronecker import EigenKronecker as EigenKronecker
from .export import as_cupyx as as_cupyx
from .export import as_scipy as as_scipy
from .kronecker import Kronecker as Kronecker
from .low_rank import LowRank as LowRank
from .pseudo_inverse import PseudoInverse as PseudoInverse
from .pseudo_inverse import Truncation as Truncation
from .pseudo_inverse import pseudo_inverse as pseudo_inverse
from .rank_one_mean import RankOneMean as RankOneMean

"""Symmetric linear operators."""

from .base import LinearOperator as LinearOperator
from .block_diagonal import BlockDiagonal as BlockDiagonal
from .callback import Callback as Callback
from .convert import as_operator as as_operator
from .damping import Damped as Damped
from .dense import Dense as Dense
from .diagonal import Diagonal as Diagonal
from .diagonal import Identity as Identity
from .low_rank import LowRank as LowRank
from .rank_one_mean import RankOneMean as RankOneMean

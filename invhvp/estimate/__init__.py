"""Estimates of norms, spectra and diagonals from operator products."""

from ._diagonal import diagonal as diagonal
from ._diagonal import trace as trace
from ._estimates import DiagonalEstimate as DiagonalEstimate
from ._estimates import TraceEstimate as TraceEstimate
from .block_errors import block_errors as block_errors
from .block_sums import BlockAccumulator as BlockAccumulator
from .factors import FactorAccumulator as FactorAccumulator
from .factors import MomentAccumulator as MomentAccumulator
from .lanczos import Eigenpairs as Eigenpairs
from .lanczos import eigenpairs as eigenpairs
from .least_damping import least_damping as least_damping
from .logdet import logdet as logdet
from .norm import operator_norm as operator_norm
from .nystroem import Sketch as Sketch
from .pivots import Pivots as Pivots
from .pivots import pivots as pivots
from .spectrum import Spectrum as Spectrum
from .spectrum import spectrum as spectrum

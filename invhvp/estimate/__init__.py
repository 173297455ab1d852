"""Estimates of norms, spectra and diagonals from operator products."""

from ._diagonal import diagonal as diagonal
from ._diagonal import trace as trace
from ._estimates import DiagonalEstimate as DiagonalEstimate
from ._estimates import TraceEstimate as TraceEstimate
from .lanczos import Eigenpairs as Eigenpairs
from .lanczos import eigenpairs as eigenpairs
from .logdet import logdet as logdet
from .norm import operator_norm as operator_norm
from .nystroem import Sketch as Sketch
from .spectrum import Spectrum as Spectrum
from .spectrum import spectrum as spectrum

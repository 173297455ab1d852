"""One method a file: this folder is the menu."""

from .block_cg import BlockCG as BlockCG
from .cg import CG as CG
from .direct import Direct as Direct
from .sample_space import SampleSpace as SampleSpace
from .solve import solve as solve
from .surrogate import Fixed as Fixed
from .surrogate import Surrogate as Surrogate

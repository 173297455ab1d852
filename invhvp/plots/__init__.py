"""Pictures of what this library computes; each takes `ax=` and returns the Axes (matplotlib)."""

from ._axes import BAD as BAD
from ._axes import GOOD as GOOD
from ._axes import NEUTRAL as NEUTRAL
from ._axes import PALETTE as PALETTE
from .evaluation import detection as detection
from .evaluation import influence_by_label as influence_by_label
from .evaluation import lds as lds
from .evaluation import leave_one_out as leave_one_out
from .pictures import influence_gallery as influence_gallery
from .pictures import suspects as suspects
from .solves import convergence as convergence

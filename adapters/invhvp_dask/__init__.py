"""Influences of collections on a Dask cluster: the user's own, or a local one."""

try:
    import dask.array as _dask  # noqa: F401
    import distributed as _distributed  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "invhvp_dask needs Dask, which is not installed: pip install 'invhvp[dask]'",
        name=error.name,
    ) from error

from .calculator import DaskInfluenceCalculator as DaskInfluenceCalculator
from .checks import DisableClientSingleThreadCheck as DisableClientSingleThreadCheck
from .checks import InvalidDimensionChunksError as InvalidDimensionChunksError
from .checks import ThreadSafetyViolationError as ThreadSafetyViolationError
from .checks import UnalignedChunksError as UnalignedChunksError
from .collections import torch_dataset_to_dask_array as torch_dataset_to_dask_array

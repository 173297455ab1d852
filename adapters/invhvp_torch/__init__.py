"""Curvature operators and per-sample gradients of PyTorch models, on torch tensors."""

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "invhvp_torch needs PyTorch, which is not installed: pip install 'invhvp[torch]'",
        name="torch",
    ) from error

from .curvature import Hessian as Hessian
from .curvature import hessian as hessian
from .distributed import AllReduce as AllReduce
from .gauss_newton import empirical_fisher as empirical_fisher
from .gauss_newton import fisher as fisher
from .gauss_newton import gauss_newton as gauss_newton
from .gradients import per_sample_gradients as per_sample_gradients
from .kronecker import ekfac as ekfac
from .kronecker import kfac as kfac
from .mixed import mixed_gradients as mixed_gradients
from .parameters import from_array as from_array
from .parameters import to_array as to_array
from .streamed import streamed_gradients as streamed_gradients

"""Curvature operators and per-sample gradients of functions of a pytree, on JAX arrays."""

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "invhvp_jax needs JAX, which is not installed: pip install 'invhvp[jax]'",
        name="jax",
    ) from error

from .gauss_newton import empirical_fisher as empirical_fisher
from .gauss_newton import gauss_newton as gauss_newton
from .gradients import per_sample_gradients as per_sample_gradients
from .hessian import hessian as hessian
from .parameters import from_array as from_array
from .parameters import to_array as to_array

"""Values that cannot be looked at, and derivatives of solves: `jax.jit`, `jax.grad`, autograd.

With `_backend` and `_random`, the only file that names a framework. Nothing here imports one:
where a framework has not been imported, none of its arrays can have come.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any

import array_api_compat as compat

from . import _backend
from .protocols import Array

_REGISTERED: set[type] = set()


def _jax() -> Any:
    return sys.modules.get("jax")


# ------------------------------------------------------------------------------------- tracing


def staged(*arrays: Any) -> bool:
    """Whether what is computed from these is recorded rather than done: by `jit` or `grad`.

    Inside of `jit` that is so for concrete arrays too. Cost with JAX arrays: one tiny operation.
    """
    arrays = tuple(x for x in arrays if _backend.is_array(x))
    if any(_backend.is_tracing(x) for x in arrays):
        return True
    for x in arrays:
        if compat.is_jax_array(x):
            return _backend.is_tracing(_backend.namespace(x).zeros(()))
    return False


def eagerly(*arrays: Any) -> AbstractContextManager[Any]:
    """Compute at once, even inside of `jit`, what follows from concrete arrays alone."""
    if _jax() is None or any(_backend.is_tracing(x) for x in arrays if _backend.is_array(x)):
        return nullcontext()
    return _jax().ensure_compile_time_eval()


def while_loop(go_on: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    """`while go_on(state): state = step(state)`; one `lax.while_loop` where values are traced.

    A state is any pytree. What in it is no array must stay what it is.
    """
    jax = _jax()
    if jax is None:
        return _python_loop(go_on, step, state)
    leaves, tree = jax.tree_util.tree_flatten(state)
    moves = [_backend.is_array(leaf) for leaf in leaves]
    if not staged(*leaves):
        return _python_loop(go_on, step, state)

    def whole(moving: list[Any]) -> Any:
        rest = iter(moving)
        found = [next(rest) if m else leaf for m, leaf in zip(moves, leaves, strict=True)]
        return jax.tree_util.tree_unflatten(tree, found)

    def arrays(new: Any) -> list[Any]:
        found, shape = jax.tree_util.tree_flatten(new)
        if shape != tree:
            msg = f"the state of a loop must keep its structure: {tree} became {shape}"
            raise TypeError(msg)
        return [leaf for m, leaf in zip(moves, found, strict=True) if m]

    ended = jax.lax.while_loop(
        lambda moving: go_on(whole(moving)),
        lambda moving: arrays(step(whole(moving))),
        arrays(state),
    )
    return whole(ended)


def _python_loop(go_on: Callable[[Any], Any], step: Callable[[Any], Any], state: Any) -> Any:
    while bool(go_on(state)):
        state = step(state)
    return state


def register_pytree(cls: type, static: Sequence[str] = ()) -> None:
    """Make a dataclass a pytree of its fields, once, where JAX has been imported."""
    tree_util = getattr(_jax(), "tree_util", None)
    if cls in _REGISTERED or tree_util is None:
        return
    _REGISTERED.add(cls)
    children = [field.name for field in fields(cls) if field.name not in static]
    tree_util.register_dataclass(cls, data_fields=children, meta_fields=list(static))


# ---------------------------------------------------------------------------------- derivatives


def linear_solve(
    product: Callable[[Array], Array],
    B: Array,
    solve: Callable[[Array], tuple[Array, Any]],
) -> tuple[Array, Any]:
    """X and whatever else `solve(B)` returns, with the derivatives of X = M⁻¹B in JAX.

    `solve` is never differentiated: tangents and cotangents are solved for by it as well, and
    derivatives in what the symmetric `product` is made of go through `product` alone.
    """
    return _jax().lax.custom_linear_solve(
        product, B, lambda _, rhs: solve(rhs), symmetric=True, has_aux=True
    )


def recording(X: Array) -> bool:
    """Whether X is a PyTorch tensor at a time when gradients are recorded."""
    return compat.is_torch_array(X) and sys.modules["torch"].is_grad_enabled()


def wants_gradient(x: Any) -> bool:
    """Whether x is a PyTorch tensor that what follows from it is recorded for."""
    return compat.is_torch_array(x) and x.requires_grad


def unrecorded(Y: Array, X: Array) -> Array:
    """A product Y of X without what PyTorch has recorded for it, unless X is recorded itself."""
    return Y.detach() if wants_gradient(Y) and not wants_gradient(X) else Y


def without_record(X: Array) -> AbstractContextManager[Any]:
    """A context in which PyTorch notes nothing down; nothing for other libraries."""
    return sys.modules["torch"].no_grad() if compat.is_torch_array(X) else nullcontext()


def with_residual(X: Array, R: Array, solve: Callable[[Array], Array], *, once: bool) -> Array:
    """X, with the derivatives of X + M⁻¹R for a symmetric M: its inverse map is `solve`.

    R is the residual at the solution X, recorded by PyTorch: zero in value, and all of the
    dependence of X on right-hand side, damping and operator in its derivatives: in the first,
    where R was computed at a fixed X. `once` lets a second derivative raise.
    """
    Function = sys.modules["torch"].autograd.Function

    class Implicit(Function):
        @staticmethod
        def forward(ctx: Any, R: Array) -> Array:  # noqa: ARG004
            return X.detach().clone()

        @staticmethod
        def backward(ctx: Any, *G: Array) -> Array:  # noqa: ARG004
            return Last.apply(solve(G[0]), R) if once else solve(G[0])

    class Last(Function):  # R leads to λ and to A: whoever differentiates in them comes here
        @staticmethod
        def forward(ctx: Any, V: Array, R: Array) -> Array:  # noqa: ARG004
            return V.clone()

        @staticmethod
        def backward(ctx: Any, *G: Array) -> Array:  # noqa: ARG004
            raise RuntimeError(
                "solutions have first derivatives in the damping and in the operator with "
                "PyTorch; for higher ones use JAX, or differentiate in the right-hand side alone"
            )

    return Implicit.apply(R)

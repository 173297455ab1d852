"""A pytree of parameters as one vector."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from invhvp import Layout, _backend

Tree = Any


class Parameters:
    """The leaves of a pytree in the order of JAX, each flattened row-major.

    Attributes:
        layout: names of the leaves by their paths, such as "layers.0.weight".
        vector: the values (n,).

    Raises TypeError for leaves that are no floating arrays or of several dtypes, ValueError where
    there are none.
    """

    def __init__(self, tree: Tree) -> None:
        named, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        if not named:
            raise ValueError(
                "params has no arrays: pass the pytree that the model is a function of"
            )
        names = [_name(path) for path, _ in named]
        leaves = [_checked(name, leaf) for name, (_, leaf) in zip(names, named, strict=True)]
        dtypes = {leaf.dtype.name: name for name, leaf in zip(names, leaves, strict=True)}
        if len(dtypes) > 1:
            found = ", ".join(f"{dtype} ({name!r})" for dtype, name in dtypes.items())
            msg = f"the parameters must have one dtype, found {found}; convert them first"
            raise TypeError(msg)
        self._shapes = [leaf.shape for leaf in leaves]
        self.layout = Layout.from_shapes(dict(zip(names, self._shapes, strict=True)))
        self.vector = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])

    @property
    def n(self) -> int:
        """Length of the parameter vector."""
        return self.layout.n

    def tree(self, vector: jax.Array) -> Tree:
        """A vector (n,) as a pytree of the parameters' structure."""
        leaves, start = [], 0
        for shape in self._shapes:
            stop = start + math.prod(shape)
            leaves.append(vector[start:stop].reshape(shape))
            start = stop
        return jax.tree_util.tree_unflatten(self._structure, leaves)


def to_array(params: Tree) -> jax.Array:
    """Copy a pytree of parameters into one vector (n,), in the order of every operator here.

    Example:
        >>> import jax.numpy as jnp, invhvp_jax as ij
        >>> ij.to_array({"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}).shape
        (8,)
    """
    return Parameters(params).vector


def from_array(params: Tree, x: jax.Array) -> Tree:
    """View a vector (n,) as a pytree like `params`: `to_array` backwards.

    Raises ValueError where `x` has another length.

    Example:
        >>> import jax.numpy as jnp, invhvp_jax as ij
        >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}
        >>> ij.from_array(params, jnp.arange(8.0))["b"]
        Array([0., 1.], dtype=float32)
    """
    found = Parameters(params)
    if tuple(x.shape) != (found.n,):
        msg = f"x must have shape ({found.n},), one number a parameter, got {tuple(x.shape)}"
        raise ValueError(msg)
    return found.tree(x)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".") or "parameters"


def _checked(name: str, leaf: Any) -> jax.Array:
    if not _backend.is_array(leaf) or not _backend.is_real_floating(leaf.dtype):
        kind = _backend.dtype_name(leaf.dtype) if _backend.is_array(leaf) else type(leaf).__name__
        msg = (
            f"every leaf of params must be a floating array, {name!r} is {kind}; split off the "
            "rest, as equinox.partition(model, equinox.is_inexact_array) does"
        )
        raise TypeError(msg)
    return jnp.asarray(leaf)

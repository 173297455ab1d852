"""Scores taken apart: by parameter block, and by the positions at which a layer was applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import _backend, _linalg
from ..gradients import (
    DenseGradients,
    EmbeddingGradients,
    GradientMatrix,
    OuterProductGradients,
    StackedGradients,
    StreamedGradients,
    concatenate,
)
from ..layout import Layout
from ..protocols import Array

Scores = dict[str, Array]

_NATURAL = 1 << 62  # bytes: batches of a stream as they come, no dense rows are formed


def by_block(train: GradientMatrix, solutions: Iterable[Array]) -> Scores:
    """x_bᵀ(g_i)_b for the columns x of all solutions: for each named block b an (n, N) array.

    Raises TypeError where the blocks have no names, before anything is solved.
    """
    layout = named(train)
    found = []
    for X in solutions:
        parts = [_products(part, layout, X) for part in _parts(train)]
        found.append({name: _joined([part[name] for part in parts], axis=1) for name in layout})
    return {name: _joined([part[name] for part in found], axis=0) for name in layout}


def by_position(
    train: GradientMatrix, solutions: Iterable[Array], blocks: str | Sequence[str] | None
) -> Scores:
    """The terms of x_bᵀ(g_i)_b by position t: for each chosen block b an (n, N, T) array.

    Raises TypeError where a chosen block keeps no positions, ValueError where there is none of
    its name, both before anything is solved.

    Example:
        >>> import numpy as np, invhvp as ih
        >>> d, a = np.ones((2, 3, 1)), np.arange(6.0).reshape(2, 3, 1)  # two texts of 3 tokens
        >>> weight = ih.OuterProductGradients(output_grads=d, inputs=a)
        >>> G = ih.StackedGradients({"weight": weight, "bias": ih.DenseGradients(d.sum(axis=1))})
        >>> inverse = ih.Direct().prepare(ih.Identity(2, like=np.ones(0)), damping=0.0)
        >>> influence = ih.Influence(inverse, G)
        >>> parts = influence.scores_by_block(G[:1])
        >>> parts["weight"], parts["bias"], influence.scores(G[:1])
        (array([[ 9., 36.]]), array([[9., 9.]]), array([[18., 45.]]))
        >>> influence.scores_by_position(G[:1])["weight"]
        array([[[ 0.,  3.,  6.],
                [ 9., 12., 15.]]])
    """
    layout = named(train)
    first = next(iter(_parts(train)))
    names = list(_positioned(first, layout)) if blocks is None else _names(blocks)
    _terms_of(first, layout, names)
    found = []
    for X in solutions:
        parts = []
        for part in _parts(train):
            chosen = _terms_of(part, layout, names)
            parts.append(
                {
                    name: _at_positions(terms, len(part), layout.take(X, name))
                    for name, terms in chosen.items()
                }
            )
        found.append({name: _joined([part[name] for part in parts], axis=1) for name in names})
    return {name: _joined([part[name] for part in found], axis=0) for name in names}


def own_by_block(train: GradientMatrix, solved: Iterable[tuple[GradientMatrix, Array]]) -> Scores:
    """x_iᵀg_i by block, (N,) each, from rows and their solutions. Cost: dense rows of a block."""
    layout = named(train)
    xp, found = _backend.namespace(train.like), []
    for rows, X in solved:
        own: Scores = {}
        for name, block in _blocks(rows, layout).items():
            dense = xp.matrix_transpose(block.to_dense())
            own[name] = _backend.lift(_linalg.column_dot(dense, layout.take(X, name)), dense)
        found.append(own)
    return {name: _joined([part[name] for part in found], axis=0) for name in layout}


def named(gradients: GradientMatrix) -> Layout:
    """The layout of a gradient matrix; TypeError where it has none."""
    if gradients.layout is None:
        msg = (
            f"{type(gradients).__name__} has no named blocks: stack the gradients of all "
            'parameters, StackedGradients({"layer.weight": ...}), or pass layout='
        )
        raise TypeError(msg)
    return gradients.layout


# ----------------------------------------------------------------------- blocks of one matrix


def _parts(G: GradientMatrix) -> Iterable[GradientMatrix]:
    return G.parts(_NATURAL) if isinstance(G, StreamedGradients) else [G]


def _products(G: GradientMatrix, layout: Layout, X: Array) -> Scores:
    xp = _backend.namespace(X)
    return {
        name: xp.matrix_transpose(block @ layout.take(X, name))
        for name, block in _blocks(G, layout).items()
    }


def _blocks(G: GradientMatrix, layout: Layout) -> Mapping[str, GradientMatrix]:
    """The blocks of `layout` as matrices of their own."""
    if isinstance(G, StackedGradients) and set(G.blocks) == set(layout):
        return G.blocks
    if len(layout) == 1:
        return dict.fromkeys(layout, G)
    xp = _backend.namespace(G.like)
    if isinstance(G, StreamedGradients):  # rows of a stream, chosen by a slice
        parts = [_blocks(part, layout) for part in G.parts()]
        return {name: concatenate([part[name] for part in parts]) for name in layout}
    columns = xp.matrix_transpose(G.to_dense())  # blocks in name only: their columns
    return {
        name: DenseGradients(xp.matrix_transpose(layout.take(columns, name))) for name in layout
    }


# -------------------------------------------------------------------------------- positions


def _names(blocks: str | Sequence[str]) -> list[str]:
    return [blocks] if isinstance(blocks, str) else list(blocks)


def _positioned(G: GradientMatrix, layout: Layout) -> dict[str, GradientMatrix]:
    """The blocks that are sums over positions, which are still apart."""
    if not isinstance(G, StackedGradients) and len(layout) > 1:
        return {}
    return {
        name: block
        for name, block in _blocks(G, layout).items()
        if isinstance(block, OuterProductGradients | EmbeddingGradients)
    }


def _terms_of(G: GradientMatrix, layout: Layout, names: Sequence[str]) -> dict[str, GradientMatrix]:
    """For every chosen block its N T terms, a row each."""
    unknown = [name for name in names if name not in layout]
    if unknown:
        msg = f"there are no blocks {unknown}; the gradients have {list(layout)}"
        raise ValueError(msg)
    kept = _positioned(G, layout)
    lost = [name for name in names if name not in kept]
    if lost or not names:
        msg = (
            f"{lost or list(layout)} keep no positions: their gradients are sums already. Blocks "
            f"with positions, which are outer products and embeddings: {list(kept) or 'none'}"
        )
        raise TypeError(msg)
    return {name: _terms(kept[name]) for name in names}


def _terms(G: Any) -> GradientMatrix:
    xp = _backend.namespace(G.like)

    def flat(x: Array) -> Array:
        return xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))

    d = flat(G.output_grads)
    if isinstance(G, EmbeddingGradients):
        n_rows = G.block_shape[0]
        return EmbeddingGradients(output_grads=d, indices=flat(G.indices), n_rows=n_rows)
    return OuterProductGradients(output_grads=d, inputs=flat(G.inputs))


def _at_positions(terms: GradientMatrix, N: int, X: Array) -> Array:
    """(k, N, T) from N T terms."""
    xp = _backend.namespace(X)
    found = xp.reshape(terms @ X, (N, len(terms) // N, X.shape[1]))
    return xp.permute_dims(found, (2, 0, 1))


def _joined(parts: list[Array], *, axis: int) -> Array:
    """Parts one after the other; those with fewer positions get zeros."""
    if len(parts) == 1:
        return parts[0]
    xp = _backend.namespace(*parts)
    length = max(part.shape[-1] for part in parts)
    if parts[0].ndim == 3 and any(part.shape[-1] < length for part in parts):
        parts = [_padded(part, length) for part in parts]
    return xp.concat(parts, axis=axis)


def _padded(x: Array, length: int) -> Array:
    xp = _backend.namespace(x)
    shape = (*x.shape[:-1], length - x.shape[-1])
    return xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=_backend.device(x))], axis=-1)

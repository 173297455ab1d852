"""Gradient matrices of every class beside their dense float64 rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from invhvp.gradients import (
    DenseGradients,
    EmbeddingGradients,
    GradientMatrix,
    OuterProductGradients,
    StackedGradients,
    StreamedGradients,
)
from invhvp.layout import Block, Layout
from tests.backends import Backend

Made = tuple[GradientMatrix, np.ndarray]


def rounded(backend: Backend, a: np.ndarray) -> np.ndarray:
    """What the backend's dtype keeps of `a`, in float64."""
    return a.astype(backend.np_dtype).astype(np.float64)


def dense(backend: Backend, rng: np.random.Generator, N: int, p: int = 7) -> Made:
    rows = rounded(backend, rng.standard_normal((N, p)))
    return DenseGradients(backend.asarray(rows), layout=Layout.from_shapes({"all": (p,)})), rows


def outer(T: int | None, o: int, i: int) -> Callable[..., Made]:
    def make(backend: Backend, rng: np.random.Generator, N: int) -> Made:
        axes = () if T is None else (T,)
        d = rounded(backend, rng.standard_normal((N, *axes, o)))
        a = rounded(backend, rng.standard_normal((N, *axes, i)))
        layout = Layout.from_shapes({"all": (o, i)})
        G = OuterProductGradients(
            output_grads=backend.asarray(d), inputs=backend.asarray(a), layout=layout
        )
        shape = (N, T or 1)
        return G, np.einsum("nto,nti->noi", d.reshape(*shape, o), a.reshape(*shape, i)).reshape(
            N, o * i
        )

    return make


def shared(T: int | None, o: int, i: int) -> Callable[..., Made]:
    """Two rows for each of the inputs where N is even, N rows for one of them where it is odd."""

    def make(backend: Backend, rng: np.random.Generator, N: int) -> Made:
        axes, distinct = () if T is None else (T,), N // 2 if N % 2 == 0 else 1
        d = rounded(backend, rng.standard_normal((N, *axes, o)))
        a = rounded(backend, rng.standard_normal((distinct, *axes, i)))
        G = OuterProductGradients(
            output_grads=backend.asarray(d),
            inputs=backend.asarray(a),
            layout=Layout.from_shapes({"all": (o, i)}),
        )
        d, a = d.reshape(N, T or 1, o), np.repeat(a, N // distinct, 0).reshape(N, T or 1, i)
        return G, np.einsum("nto,nti->noi", d, a).reshape(N, o * i)

    return make


def embedding(T: int | None, n_rows: int, size: int) -> Callable[..., Made]:
    """Few rows for many positions: most of them are looked up again and again."""

    def make(backend: Backend, rng: np.random.Generator, N: int) -> Made:
        shape = (N,) if T is None else (N, T)
        d = rounded(backend, rng.standard_normal((*shape, size)))
        indices = rng.integers(0, n_rows, shape)
        indices[0] = n_rows - 1
        rows = np.zeros((N, n_rows, size))
        sample = np.arange(N).reshape((N,) + (1,) * (len(shape) - 1))
        np.add.at(rows, (sample, indices), d)
        G = EmbeddingGradients(
            output_grads=backend.asarray(d),
            indices=backend.integers(indices),
            n_rows=n_rows,
            layout=Layout.from_shapes({"all": (n_rows, size)}),
        )
        return G, rows.reshape(N, -1)

    return make


def permuted_layout() -> Layout:
    """[W | b] of shape (3, 5) row by row, then a block whose positions are shuffled."""
    table = np.arange(15).reshape(3, 5)
    blocks = {
        "weight": Block((3, 4), table[:, :4].ravel()),
        "bias": Block((3,), table[:, 4]),
        "free": Block((6,), 15 + np.random.default_rng(0).permutation(6)),
    }
    return Layout(blocks)


def stacked(layout: Layout | None) -> Callable[..., Made]:
    def make(backend: Backend, rng: np.random.Generator, N: int) -> Made:
        weight, weight_rows = outer(5, 3, 4)(backend, rng, N)
        bias, bias_rows = dense(backend, rng, N, 3)
        free, free_rows = dense(backend, rng, N, 6)
        G = StackedGradients({"weight": weight, "bias": bias, "free": free}, layout=layout)
        parts = {"weight": weight_rows, "bias": bias_rows, "free": free_rows}
        rows = np.empty((N, 21))
        for name, part in parts.items():
            rows[:, G.layout[name].indices] = part
        return G, rows

    return make


def streamed(whole: Callable[..., Made]) -> Callable[..., Made]:
    def make(backend: Backend, rng: np.random.Generator, N: int) -> Made:
        G, rows = whole(backend, rng, N)
        cuts = sorted({0, 1, N // 2, N})
        batches = [G[i:j] for i, j in pairwise(cuts)]
        return StreamedGradients(batches), rows

    return make


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[..., Made]

    def __repr__(self) -> str:
        return self.name


CASES = [
    Case("dense", dense),
    Case("outer-flat", outer(None, 3, 11)),
    Case("outer-T1-tall", outer(1, 11, 3)),
    Case("outer-T5-wide", outer(5, 3, 40)),
    Case("outer-T5-tall", outer(5, 40, 3)),
    Case("shared-flat", shared(None, 3, 11)),
    Case("shared-T5-tall", shared(5, 11, 3)),
    Case("embedding-flat", embedding(None, 5, 3)),
    Case("embedding-T6", embedding(6, 9, 4)),
    Case("stacked", stacked(None)),
    Case("stacked-permuted", stacked(permuted_layout())),
    Case("streamed", streamed(stacked(permuted_layout()))),
]
# What differs in nothing that depends on the array library.
NUMPY_CASES = [
    *CASES,
    Case("outer-T5-small", outer(5, 3, 4)),
    Case("streamed-shared", streamed(shared(None, 3, 4))),
    Case("streamed-dense", streamed(dense)),
    Case("embedding-T9", embedding(9, 3, 2)),
    Case("streamed-embedding", streamed(embedding(6, 9, 4))),
    Case("streamed-outer", streamed(outer(5, 3, 4))),
]

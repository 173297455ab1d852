"""What is doubled: each quantity with its setup, what it needs at least, and how that grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import invhvp as ih

from .engine_operators import Clocked
from .floor import block
from .gpu_libraries import Library

CLASSES = 10
DAMPING = 1e-2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """N samples of T positions, k vectors; layers[l] × layers[l + 1] are the weights of layer l."""

    N: int
    k: int
    T: int
    layers: tuple[int, ...]

    @classmethod
    def square(cls, *, N: int, k: int, T: int, width: int, depth: int = 2) -> Sizes:
        """`depth` square layers and one to the classes."""
        return cls(N=N, k=k, T=T, layers=(width,) * (depth + 1) + (CLASSES,))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs + 1) of each layer: the bias is a column."""
        return [(o, i + 1) for i, o in zip(self.layers[:-1], self.layers[1:], strict=True)]

    @property
    def p(self) -> int:
        return sum(o * i for o, i in self.shapes)

    def over_layers(self, power: Callable[[int, int], float]) -> float:
        return sum(power(o, i) for o, i in self.shapes)


@dataclass(frozen=True)
class Quantity:
    """What is timed; `words` and `flops` are the least it needs, `expected` their growth in words.

    Attributes:
        prepare: sizes → a function that runs it once and returns the seconds, or None to be timed.
        expected: what the leading term says of each size that is doubled.
    """

    name: str
    prepare: Callable[[Sizes], Callable[[], float | None]]
    words: Callable[[Sizes], float]
    flops: Callable[[Sizes], float]
    expected: dict[str, str]


def network(s: Sizes) -> tuple[Any, Any, tuple[Any, Any]]:
    """Model, loss and data: layers applied at every position, their outputs averaged."""
    import torch

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[Any] = []
            for i, o in zip(s.layers[:-1], s.layers[1:], strict=True):
                layers += [torch.nn.Linear(i, o), torch.nn.Tanh()]
            self.layers = torch.nn.Sequential(*layers[:-1])

        def forward(self, x: Any) -> Any:
            return self.layers(x).mean(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mean()
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((s.N, s.T, s.layers[0]), dtype=np.float32))
    y = torch.from_numpy(rng.integers(CLASSES, size=s.N))
    return model, torch.nn.functional.cross_entropy, (x, y)


def _columns(s: Sizes) -> Any:
    import torch

    drawn = np.random.default_rng(2).standard_normal((s.p, s.k), dtype=np.float32)
    return torch.from_numpy(drawn)


def _gradients(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    model, loss, data = network(s)
    return lambda: _no(it.per_sample_gradients(model, loss, data))


def _no(_: Any) -> None:
    """The result is not kept."""


def _gram(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    G = it.per_sample_gradients(*network(s))
    return lambda: _no(G.gram())


def _hessian(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    H, V = it.hessian(*network(s)), _columns(s)
    _no(H @ V[:, :1])  # what is kept from the first product on is made here
    return lambda: _no(H @ V)


def _sample_space(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    F, B = ih.RankOneMean(it.per_sample_gradients(*network(s))), _columns(s)
    return lambda: _no(ih.SampleSpace().prepare(F, damping=DAMPING).solve(B))


def _block_cg(s: Sizes) -> Callable[[], float]:
    library, iterations = Library(), 5
    spread = library.place(np.geomspace(1.0, 1e-4, s.p), "float32")
    A, B = Clocked(ih.Diagonal(spread, psd=True)), block(library, s.p, s.k, "float32")
    inverse = ih.BlockCG(rtol=1e-12, maxiter=iterations).prepare(A, damping=1e-4)

    def run() -> float:
        A.marks.clear()
        inverse.solve(B)
        pairs = A.iterations(s.k, iterations - 1)
        return float(np.median([after.began - before.ended for before, after in pairs]))

    return run


def _ekfac_fit(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    given = network(s)
    return lambda: _no(it.ekfac(*given))


def _ekfac_solve(s: Sizes) -> Callable[[], None]:
    import invhvp_torch as it

    few = Sizes(N=32, k=s.k, T=s.T, layers=s.layers)
    inverse, B = ih.Direct().prepare(it.ekfac(*network(few)), damping=DAMPING), _columns(s)
    return lambda: _no(inverse @ B)


# ------------------------------------------------------------------------------- words and flops


def gradient_flops(s: Sizes) -> float:
    """Forward, and backward to the outputs of every layer: no gradient is multiplied out."""
    return 4 * s.p * s.N * s.T


def gram_flops(s: Sizes) -> float:
    """By pairs of positions, or by rows multiplied out, whichever is less in each layer."""
    N, T = s.N, s.T

    def layer(o: int, i: int) -> float:
        return min(2 * N * N * T * T * (o + i), 2 * N * T * o * i + 2 * N * N * o * i)

    return s.over_layers(layer)


def hessian_flops(s: Sizes) -> float:
    """Forward-over-reverse; what does not depend on the vector is small beside it."""
    return 12 * s.p * s.N * s.T * s.k


def sample_space_flops(s: Sizes) -> float:
    """Gram matrix, Cholesky, two applications of G and one product for the residual."""
    return gram_flops(s) + s.N**3 / 3 + 6 * s.p * s.N * s.T * s.k


def ekfac_fit_flops(s: Sizes, seeds: int = CLASSES) -> float:
    """Two passes, each forward and a backward for each seed; factors, eigenvectors, moments."""
    passes = 2 * (2 + 2 * seeds) * s.p * s.N * s.T
    factors = 2 * s.N * s.T * s.over_layers(lambda o, i: seeds * o * o + i * i)
    moments = 2 * s.N * s.T * seeds * s.over_layers(lambda o, i: o * o + o * i + i * i / seeds)
    return passes + factors + moments + 9 * s.over_layers(lambda o, i: o**3 + i**3)


def ekfac_solve_flops(s: Sizes) -> float:
    return 4 * s.k * s.over_layers(lambda o, i: o * i * (o + i))


def _nothing(s: Sizes) -> float:
    return 0.0


def _blocks(count: int, s: Sizes) -> float:
    return count * s.p * s.k


QUANTITIES = (
    Quantity("per-sample gradients", _gradients, _nothing, gradient_flops,
             {"N": "1", "p": "1", "T": "1"}),
    Quantity("Gram matrix", _gram, _nothing, gram_flops,
             {"N": "2", "p": "½ (by pairs) to 1", "T": "2 (by pairs) to 1"}),
    Quantity("Hessian product", _hessian, _nothing, hessian_flops,
             {"N": "1", "p": "1", "k": "1", "T": "1"}),
    Quantity("SampleSpace, prepare and solve", _sample_space, _nothing, sample_space_flops,
             {"N": "1 to 3", "p": "½ to 1", "k": "to 1"}),
    Quantity("BlockCG iteration", _block_cg, partial(_blocks, 17),
             lambda s: 16 * s.p * s.k**2, {"p": "1", "k": "1 (bytes) to 2 (flops)"}),
    Quantity("EKFAC fit", _ekfac_fit, _nothing, ekfac_fit_flops,
             {"N": "1", "p": "1 to 1½", "T": "1"}),
    Quantity("EKFAC solve", _ekfac_solve, partial(_blocks, 8), ekfac_solve_flops,
             {"p": "1½", "k": "1"}),
)  # fmt: skip

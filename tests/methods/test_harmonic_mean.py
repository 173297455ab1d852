"""InverseHarmonicMean against the dense mean of inverses, and between its two bounds."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from invhvp.gradients import (
    DenseGradients,
    OuterProductGradients,
    StackedGradients,
    StreamedGradients,
)
from invhvp.influence import Influence
from invhvp.methods import BlockCG, InverseHarmonicMean
from invhvp.operators import Dense, RankOneMean
from tests.backends import Backend
from tests.cases import LAYOUT, PERMUTED, N, rows

SHIFT = {"weight": 0.25, "bias": 2.0}
seeds = st.integers(0, 2**16)


def dense_mean(G: np.ndarray, shift: np.ndarray, count: float | None = None) -> np.ndarray:
    weight = 1.0 if count is None else len(G) / count
    return np.mean([np.linalg.inv(weight * np.outer(g, g) + np.diag(shift)) for g in G], axis=0)


def by_layer(G: np.ndarray, shift: np.ndarray, layout=LAYOUT) -> np.ndarray:
    out = np.zeros((N, N))
    for block in layout.values():
        index = np.arange(N)[block.indices]
        out[np.ix_(index, index)] = dense_mean(G[:, index], shift[index])
    return out


def rounded(backend: Backend, a: np.ndarray) -> np.ndarray:
    return a.astype(backend.np_dtype).astype(np.float64)


def dense(backend: Backend, inverse) -> np.ndarray:
    return backend.to_numpy(inverse @ backend.asarray(np.eye(N)))


def close(found: np.ndarray, expected: np.ndarray, backend: Backend) -> bool:
    return np.linalg.norm(found - expected) <= 200 * backend.eps * np.linalg.norm(expected)


@pytest.mark.backends("numpy", "strict", "torch-cpu")  # each shape is compiled anew on JAX
@given(seed=seeds, n_samples=st.integers(1, 30), log_damping=st.floats(-3, 3))
def test_between_the_inverse_and_the_identity(
    backend: Backend, seed: int, n_samples: int, log_damping: float
):
    """(A + λ)⁻¹ ⪯ R ⪯ I/λ, with equality on the left for one sample."""
    G, damping = rounded(backend, rows(n_samples, seed=seed)), 10.0**log_damping
    A = RankOneMean(DenseGradients(backend.asarray(G)))
    R = dense(backend, InverseHarmonicMean().prepare(A, damping=damping))
    exact = np.linalg.inv(G.T @ G / n_samples + damping * np.eye(N))
    # The reference is a float64 inverse: it has an error of its own.
    condition = 1 + np.linalg.norm(G, 2) ** 2 / damping
    slack = (50 * backend.eps + 10 * np.finfo(float).eps * condition) / damping
    assert np.linalg.eigvalsh((R + R.T) / 2 - exact)[0] >= -slack
    assert np.linalg.eigvalsh((R + R.T) / 2)[-1] <= 1 / damping + slack
    if n_samples == 1:
        assert np.linalg.norm(R - exact) <= slack


@pytest.mark.backends("numpy", "strict", "torch-cpu")
@given(seed=seeds, n_samples=st.integers(2, 20))
def test_order_duplicates_and_batches_change_nothing(backend: Backend, seed: int, n_samples: int):
    rng = np.random.default_rng(seed)
    G = rounded(backend, rows(n_samples, seed=seed))
    cuts = np.sort(rng.integers(0, n_samples + 1, 3))
    batches = [backend.asarray(part) for part in np.split(G, cuts) if len(part)]
    variants = {
        "plain": DenseGradients(backend.asarray(G)),
        "order": DenseGradients(backend.asarray(G[rng.permutation(n_samples)])),
        "twice": DenseGradients(backend.asarray(np.concatenate([G, G]))),
        "stream": StreamedGradients(batches),
    }
    found = {
        name: dense(backend, InverseHarmonicMean().prepare(RankOneMean(rows_), damping=0.3))
        for name, rows_ in variants.items()
    }
    for name, R in found.items():
        assert close(R, found["plain"], backend), name


@pytest.mark.parametrize("layout", [LAYOUT, PERMUTED])
@pytest.mark.parametrize("kind", ["dense", "stacked", "streamed"])
def test_blocks_against_the_closed_form(backend: Backend, layout, kind: str):
    rng = np.random.default_rng(0)
    d, a = (
        rounded(backend, rng.standard_normal((9, 2))),
        rounded(backend, rng.standard_normal((9, 4))),
    )
    bias = rounded(backend, rng.standard_normal((9, 4)))
    G = np.zeros((9, N))
    G[:, np.arange(N)[layout["weight"].indices]] = (d[:, :, None] * a[:, None, :]).reshape(9, 8)
    G[:, np.arange(N)[layout["bias"].indices]] = bias

    def stacked(part: slice):
        return StackedGradients(
            {
                "weight": OuterProductGradients(
                    output_grads=backend.asarray(d[part]), inputs=backend.asarray(a[part])
                ),
                "bias": DenseGradients(backend.asarray(bias[part])),
            },
            layout=layout,
        )

    gradients = {
        "dense": lambda: DenseGradients(backend.asarray(G), layout=layout),
        "stacked": lambda: stacked(slice(0, 9)),
        "streamed": lambda: StreamedGradients([stacked(slice(0, 4)), stacked(slice(4, 9))]),
    }[kind]()
    A = RankOneMean(gradients)
    shifts = layout.shifts(SHIFT)
    for damping, shift in ((0.5, np.full(N, 0.5)), (SHIFT, shifts)):
        full = InverseHarmonicMean().prepare(A, damping=damping)
        assert close(dense(backend, full), dense_mean(G, shift), backend)
        layer = InverseHarmonicMean(block="layer").prepare(A, damping=damping)
        assert close(dense(backend, layer), by_layer(G, shift, layout), backend)
        for inverse in (full, layer):
            assert inverse.fixed_spd
            moved = inverse.with_damping(0.125)
            again = inverse.method.prepare(A, damping=0.125)
            assert close(dense(backend, moved), dense(backend, again), backend)


@pytest.mark.parametrize("kind", ["dense", "stacked", "streamed"])
def test_scores_need_no_vector_of_length_p(backend: Backend, kind: str):
    d = rounded(backend, np.random.default_rng(0).standard_normal((9, 4)))
    a = rounded(backend, np.random.default_rng(1).standard_normal((9, 2)))
    rows_ = np.concatenate([(a[:, :, None] * d[:, None, :]).reshape(9, 8), d], axis=1)

    def stacked(part: slice):
        outputs, inputs = backend.asarray(a[part]), backend.asarray(d[part])
        weight = OuterProductGradients(output_grads=outputs, inputs=inputs)
        blocks = {"weight": weight, "bias": DenseGradients(inputs)}
        return StackedGradients(blocks, layout=LAYOUT)

    G = {
        "dense": lambda: DenseGradients(backend.asarray(rows_), layout=LAYOUT),
        "stacked": lambda: stacked(slice(0, 9)),
        "streamed": lambda: StreamedGradients([stacked(slice(0, 4)), stacked(slice(4, 9))]),
    }[kind]()
    shift = np.full(N, 0.5)
    for method, R in (
        (InverseHarmonicMean(), dense_mean(rows_, shift)),
        (InverseHarmonicMean(block="layer"), by_layer(rows_, shift)),
    ):
        inverse = method.prepare(RankOneMean(G), damping=0.5)
        for few in (slice(0, 2), slice(0, 9)):
            got = backend.to_numpy(Influence(inverse, G).scores(G[few]))
            expected = rows_[few] @ R @ rows_.T
            size = np.linalg.norm(rows_) ** 2 / 0.5
            assert np.linalg.norm(got - expected) <= 50 * backend.eps * size
        exact = np.linalg.norm(rows_, 2) ** 2 / 9 + 0.5
        assert exact <= inverse.map.damped_norm() <= N * exact


def test_count_is_the_weight_of_the_terms(backend: Backend):
    G = rounded(backend, rows(6))
    A = RankOneMean(DenseGradients(backend.asarray(G)), count=2.0)
    R = dense(backend, InverseHarmonicMean().prepare(A, damping=0.5))
    assert close(R, dense_mean(G, np.full(N, 0.5), 2.0), backend)


def test_solution_is_approximate_with_its_residual(backend: Backend):
    G = rounded(backend, rows(30))
    A = RankOneMean(DenseGradients(backend.asarray(G)))
    b = rows(2, seed=9).T
    solution = InverseHarmonicMean().prepare(A, damping=0.1).solve(backend.asarray(b))
    assert {status.name for status in solution.status} == {"APPROXIMATE"}
    x, M = backend.to_numpy(solution.x), G.T @ G / 30 + 0.1 * np.eye(N)
    true = np.linalg.norm(b - M @ x, axis=0)
    assert np.allclose(backend.to_numpy(solution.residual_norms), true, rtol=1e-3)
    error = x - np.linalg.solve(M, b)
    assert np.all(
        np.sqrt(np.sum(error * (M @ error), axis=0)) <= backend.to_numpy(solution.error_bounds)
    )


def test_preconditions_legally(backend: Backend):
    A = RankOneMean(DenseGradients(backend.asarray(rows(30))))
    method = BlockCG(rtol=1e-4, preconditioner=InverseHarmonicMean())
    solution = method.prepare(A, damping=0.1).solve(backend.asarray(np.ones(N)))
    assert solution.status.name == "CONVERGED"


@pytest.mark.backends("numpy-f64")
def test_door(backend: Backend):
    A = RankOneMean(DenseGradients(backend.asarray(rows(5)), layout=LAYOUT))
    with pytest.raises(ValueError, match="damping > 0"):
        InverseHarmonicMean().prepare(A, damping=0.0)
    with pytest.raises(ValueError, match="damping > 0"):
        InverseHarmonicMean(block="layer").prepare(A, damping={"weight": 1.0, "bias": 0.0})
    with pytest.raises(ValueError, match="damping > 0"):
        InverseHarmonicMean().prepare(A, damping=1.0).with_damping(0.0)
    with pytest.raises(TypeError, match="gradients"):
        InverseHarmonicMean().prepare(Dense(backend.asarray(np.eye(N))), damping=1.0)
    nameless = RankOneMean(DenseGradients(backend.asarray(rows(5))))
    with pytest.raises(ValueError, match="named blocks"):
        InverseHarmonicMean(block="layer").prepare(nameless, damping=1.0)
    with pytest.raises(ValueError, match="block"):
        InverseHarmonicMean(block="diagonal")

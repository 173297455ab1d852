"""The closed forms of the logistic regression against finite differences and dense algebra."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp.testing import check_gradients, check_operator
from invhvp_demo import data, model, retrain
from invhvp_demo.model import Samples

L2 = 1e-2


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    labels = np.eye(4)[rng.integers(4, size=30)]
    return Samples(rng.standard_normal((30, 5)), labels)


@pytest.fixture(scope="module")
def w(samples: Samples) -> np.ndarray:
    return 0.5 * np.random.default_rng(1).standard_normal(samples.layout.n)


def differences(f, w: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """Central differences of f along every coordinate, in the last axis."""
    steps = h * np.eye(len(w))
    return np.stack([(f(w + e) - f(w - e)) / (2 * h) for e in steps], axis=-1)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_and_hessian_are_derivatives(samples: Samples, w: np.ndarray, weighted: bool):
    weights = np.linspace(0.0, 2.0, len(samples)) if weighted else None
    slope = model.gradient(w, samples, L2, weights)
    numeric = differences(lambda v: model.objective(v, samples, L2, weights), w)
    np.testing.assert_allclose(slope, numeric, atol=1e-9)
    H = model.Hessian(w, samples, weights)
    numeric = differences(lambda v: model.gradient(v, samples, 0.0, weights), w)
    np.testing.assert_allclose(H.to_dense(), numeric, atol=1e-9)
    np.testing.assert_allclose(H.diagonal(), np.diag(H.to_dense()), atol=1e-15)


def test_per_sample_gradients_are_derivatives(samples: Samples, w: np.ndarray):
    G = model.gradients(w, samples)
    numeric = differences(lambda v: model.losses(v, samples), w)
    np.testing.assert_allclose(G.to_dense(), numeric, atol=1e-9)
    mean = G.T @ np.full(len(samples), 1 / len(samples))
    np.testing.assert_allclose(mean, model.gradient(w, samples, 0.0), atol=1e-15)


def test_hessian_is_a_mean_over_its_terms(samples: Samples, w: np.ndarray):
    H = model.Hessian(w, samples)
    parts = [H.subset(np.asarray([i])).to_dense() for i in range(H.n_terms)]
    np.testing.assert_allclose(np.mean(parts, axis=0), H.to_dense(), atol=1e-15)


def test_conformance(samples: Samples, w: np.ndarray):
    check_operator(model.Hessian(w, samples))
    check_gradients(model.gradients(w, samples))


def test_blocks_of_columns_do_not_matter(samples: Samples, w: np.ndarray):
    H = model.Hessian(w, samples)
    V = np.random.default_rng(2).standard_normal((H.shape[0], 37))
    np.testing.assert_allclose(H @ V, H.to_dense() @ V, atol=1e-13)


def test_training_ends_at_the_optimum(samples: Samples):
    w = retrain.train(samples, L2)
    assert np.linalg.norm(model.gradient(w, samples, L2)) <= 1e-11


def test_leaving_out_is_training_on_the_others(samples: Samples):
    """The warm start changes nothing: on N − 1 samples the same minimum has L2 N/(N − 1)."""
    w = retrain.train(samples, L2)
    exact = ih.Direct().prepare(model.Hessian(w, samples), damping=L2)
    chosen = [3, 17]
    again = retrain.on_subsets(w, samples, L2, exact)
    for i in chosen:
        rest = np.delete(np.arange(len(samples)), i)
        found = again(rest)
        others = Samples(samples.images[rest], samples.labels[rest])
        alone = retrain.train(others, L2 * len(samples) / len(others))
        np.testing.assert_allclose(found, alone, atol=1e-9)


def test_torch_agrees_with_numpy(samples: Samples, w: np.ndarray):
    torch = pytest.importorskip("torch")
    place = data.place_on("torch", None)
    there, v = Samples(place(samples.images), place(samples.labels)), place(w)
    assert v.dtype == torch.float64
    mine, theirs = model.Hessian(w, samples), model.Hessian(v, there)
    np.testing.assert_allclose(theirs.to_dense().numpy(), mine.to_dense(), atol=1e-14)
    np.testing.assert_allclose(theirs.diagonal().numpy(), mine.diagonal(), atol=1e-14)
    np.testing.assert_allclose(
        retrain.train(there, L2).numpy(), retrain.train(samples, L2), atol=1e-10
    )

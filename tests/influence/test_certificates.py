"""Certified influence: no bound is ever violated, whatever the vectors are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invhvp as ih
from invhvp.influence.certificates import Certificate
from invhvp.methods._fixed_map import MapInverse
from invhvp.methods.direct import Direct


class Scramble(ih.LinearOperator):
    """A linear map that has nothing to do with any inverse."""

    def __init__(self, M, like):
        super().__init__(M.shape[0], like=like)
        self._M = M

    def _matmat(self, X, /):
        return self._M @ X


def gradients(seed, samples, n, scale=1.0):
    rows = np.random.default_rng(seed).standard_normal((samples, n)) * scale
    rows[0] *= 1e-3
    return rows


class Damped:
    """rowsᵀrows/N + λ in extended precision: float64 alone rounds as much as what is tested."""

    def __init__(self, rows, damping):
        self.rows, self.damping = rows.astype(np.longdouble), damping
        _, s, Vt = np.linalg.svd(rows / np.sqrt(len(rows)), full_matrices=True)
        self.values = np.pad(s**2, (0, rows.shape[1] - len(s))) + damping
        self.vectors = Vt.T

    def bilinear(self, left, right):
        """left K⁻¹ rightᵀ, refined."""
        B = right.T.astype(np.longdouble)
        X, R = np.zeros_like(B), B
        for _ in range(8):
            step = (self.vectors / self.values) @ (self.vectors.T @ R.astype(np.float64))
            X = X + step
            R = B - self.rows.T @ (self.rows @ X) / len(self.rows) - self.damping * X
        return left.astype(np.longdouble) @ X


def check_scores(certified, truth, to_numpy):
    error = np.abs(to_numpy(certified.scores) - truth)
    bounds = to_numpy(certified.error_bounds)
    assert np.all(error <= bounds), (error / bounds).max()
    return error, bounds


def check_bounds(bounds, truth, to_numpy):
    lower, upper = to_numpy(bounds.lower), to_numpy(bounds.upper)
    assert np.all(lower <= truth), (truth - lower).min()
    assert np.all(truth <= upper), (upper - truth).min()
    return lower, upper


problems_ = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "n": st.integers(1, 30),
        "rank": st.integers(1, 40),
        "damping": st.floats(-6.0, 1.0).map(lambda e: 10.0**e),
        "decay": st.floats(0.0, 3.0),
        "scale": st.floats(-3.0, 3.0).map(lambda e: 10.0**e),
        "noise": st.sampled_from([None, 1e-8, 1e-3, 1.0, 1e3]),
    }
)


def build(seed, n, rank, damping, decay, scale, noise, dtype=np.float64):
    """An operator Σ g gᵀ/c with a decaying spectrum, and an inverse that is wrong by `noise`."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((rank, n)) * np.arange(1, n + 1) ** -decay
    train = ih.DenseGradients((rows * scale).astype(dtype))
    test = ih.DenseGradients(rng.standard_normal((3, n)).astype(dtype))
    A = ih.RankOneMean(train) if seed % 2 else ih.RankOneMean(ih.DenseGradients(rows.astype(dtype)))
    held = A.gradients.to_dense().astype(np.float64)
    K = Damped(held, damping)
    if noise is None:
        inverse = ih.BlockCG(rtol=10.0 ** -(seed % 8), maxiter=1 + seed % 7).prepare(A, damping)
    else:
        M = (K.vectors / K.values) @ K.vectors.T + noise * rng.standard_normal((n, n)) / damping
        inverse = MapInverse(
            Direct(), A, damping, Scramble(M.astype(dtype), A.like), exact=False, definite=False
        )
    return inverse, train, test, K


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
@settings(max_examples=1000)
@given(problems_, st.booleans())
def test_no_certificate_is_violated(parameters, correct):
    inverse, train, test, K = build(**parameters)
    influence = ih.Influence(inverse, train)
    left, right = test.to_dense(), train.to_dense()
    check_scores(
        influence.certified_scores(test, correct=correct), K.bilinear(left, right), np.array
    )
    truth = np.diagonal(K.bilinear(right, right))
    check_bounds(influence.self_influence_bounds(), truth, np.array)


@pytest.mark.filterwarnings("ignore::invhvp.ConvergenceWarning")
@settings(max_examples=1000)
@given(problems_, st.booleans())
def test_no_certificate_is_violated_in_float32(parameters, correct):
    inverse, train, test, K = build(**parameters, dtype=np.float32)
    influence = ih.Influence(inverse, train)
    left, right = (G.to_dense().astype(np.float64) for G in (test, train))
    check_scores(
        influence.certified_scores(test, correct=correct), K.bilinear(left, right), np.array
    )
    truth = np.diagonal(K.bilinear(right, right))
    check_bounds(influence.self_influence_bounds(), truth, np.array)


def test_the_identity_behind_the_correction_holds_for_garbage():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((20, 12))
    damping = 1e-2
    A, K = ih.RankOneMean(ih.DenseGradients(rows)), Damped(rows, damping)
    garbage = Scramble(rng.standard_normal((12, 12)), A.like)
    inverse = MapInverse(Direct(), A, damping, garbage, exact=False, definite=False)
    certificate = Certificate(inverse, A.gradients)
    side = certificate.solve(A.gradients, residual=True)
    X, R = side.X, side.R
    left = K.bilinear(rows, rows) - (X.T @ rows.T + R.T @ X).T
    right = K.bilinear(R.T, R.T)
    sizes = np.linalg.norm(rows, axis=1)
    unit = 1e-13 * max(sizes.max(), np.linalg.norm(R, axis=0).max()) ** 2 / damping
    np.testing.assert_allclose(left, right, rtol=0, atol=unit)


METHODS = [ih.SampleSpace(), ih.BlockCG(rtol=1e-2), ih.NystroemSketch(rank=4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("correct", [False, True])
def test_scores_and_bounds_on_every_backend(backend, method, correct):
    n, damping = 12, 1e-2
    rows = gradients(1, 9, n) * np.arange(1, n + 1) ** -1.0
    G, T = backend.asarray(rows), backend.asarray(gradients(2, 5, n))
    held, query = backend.to_numpy(G), backend.to_numpy(T)
    A = ih.RankOneMean(ih.DenseGradients(G))
    K = Damped(held, damping)
    influence = ih.Influence(method.prepare(A, damping), A.gradients)
    certified = influence.certified_scores(ih.DenseGradients(T), correct=correct)
    truth = K.bilinear(query, held)
    _, bounds = check_scores(certified, truth, backend.to_numpy)
    for array in (certified.scores, certified.error_bounds):
        backend.assert_like(array)
    assert certified.corrected.dtype == backend.xp.bool
    assert certified.note is None
    sandwich = influence.self_influence_bounds()
    own = np.diagonal(K.bilinear(held, held))
    lower, upper = check_bounds(sandwich, own, backend.to_numpy)
    backend.assert_like(sandwich.lower)
    if isinstance(method, ih.SampleSpace):
        # The smallest eigenvalue of A + λI is λ: what is left is rounding of size κ·ε.
        assert np.all(bounds <= 1e4 * backend.eps * np.abs(truth).max() / damping)
        assert np.all(upper - lower <= 1e4 * backend.eps * own.max() / damping)
    assert np.all(upper <= 9 + 1e-3)  # A contains g gᵀ/9: no sample can exceed it


def test_the_correction_squares_the_error():
    """Solves to 1e-4 give scores to some 1e-8, and the bounds know it."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((60, 40)) * np.arange(1, 41) ** -1.5
    A = ih.RankOneMean(ih.DenseGradients(rows))
    query = rng.standard_normal((4, 60)) @ rows / 60
    damping = 1e-2
    K = Damped(rows, damping)
    inverse = ih.BlockCG(rtol=1e-4).prepare(A, damping)
    influence = ih.Influence(inverse, A.gradients)
    truth = K.bilinear(query, rows)
    plain = influence.certified_scores(ih.DenseGradients(query))
    better = influence.certified_scores(ih.DenseGradients(query), correct=True)
    plain_error, plain_bounds = check_scores(plain, truth, np.array)
    error, bounds = check_scores(better, truth, np.array)
    assert bool(np.all(better.corrected))
    assert np.max(error) < 1e-2 * np.max(plain_error)
    assert np.max(bounds) < 1e-2 * np.max(plain_bounds)
    assert better.products > plain.products


def test_white_noise_keeps_the_plain_score():
    """Noise of 10 % on x costs ‖noise‖·‖A‖ in r: the correction would be worse, and is not used."""
    rng = np.random.default_rng(3)
    d = np.geomspace(1e3, 1e-5, 50)
    A, damping = ih.Diagonal(d), 1e-3
    M = np.diag(1 / (d + damping))
    noisy = Scramble(M * (1 + 0.1 * rng.standard_normal(50)), A.like)
    inverse = MapInverse(Direct(), A, damping, noisy, exact=False, definite=False)
    rows = np.diag(np.sqrt(d)) @ rng.standard_normal((50, 6))
    G = ih.DenseGradients(rows.T)
    certified = ih.Influence(inverse, G).certified_scores(G, correct=True)
    truth = (rows.T / (d + damping)) @ rows
    check_scores(certified, truth, np.array)
    plain = ih.Influence(inverse, G).certified_scores(G)
    assert np.all(certified.error_bounds <= plain.error_bounds)


def test_products_are_counted():
    class Counted:
        columns = 0

        def __call__(self, X):
            self.columns += X.shape[1]
            return (np.arange(1.0, 9.0) * X.T).T

    product = Counted()
    A = ih.Callback(product, 8, like=np.ones(1), psd=True)
    G = ih.DenseGradients(gradients(0, 5, 8))
    influence = ih.Influence(ih.BlockCG().prepare(A, damping=0.1), G)
    for certify in (
        lambda: influence.certified_scores(G),
        lambda: influence.certified_scores(G, correct=True),
        influence.self_influence_bounds,
    ):
        before = product.columns
        assert certify().products == product.columns - before


@pytest.mark.parametrize(
    ("operator", "damping", "why"),
    [
        (ih.Diagonal(np.array([1.0, 2.0]), psd=False), 0.5, "psd=True"),
        (ih.Diagonal(np.array([1.0, 2.0])), 0.0, "λ = 0"),
    ],
)
def test_without_a_bound_it_says_so(operator, damping, why):
    G = ih.DenseGradients(np.ones((3, 2)))
    influence = ih.Influence(ih.Direct().prepare(operator, damping), G)
    for correct in (False, True):
        certified = influence.certified_scores(G, correct=correct)
        np.testing.assert_allclose(certified.scores, np.sum(1 / (np.arange(1, 3) + damping)))
        assert np.all(np.isinf(certified.error_bounds))
        assert not np.any(certified.corrected)
        assert why in certified.note
    bounds = influence.self_influence_bounds()
    assert np.all(bounds.lower == -np.inf)
    assert np.all(bounds.upper == np.inf)
    assert why in bounds.note


def test_zero_gradients_have_zero_scores_and_no_error():
    G = ih.DenseGradients(np.array([[0.0, 0.0], [1.0, 2.0]]))
    influence = ih.Influence(ih.BlockCG().prepare(ih.RankOneMean(G), damping=0.5), G)
    certified = influence.certified_scores(G, correct=True)
    assert np.all(np.array(certified.error_bounds)[0, :] == 0)
    assert np.all(np.array(certified.scores)[:, 0] == 0)
    bounds = influence.self_influence_bounds()
    assert (bounds.lower[0], bounds.upper[0]) == (0, 0)


def test_meaningless_answers_and_foreign_inverses_are_refused():
    G = ih.DenseGradients(np.ones((1, 2)))
    inverse = ih.BlockCG().prepare(ih.Diagonal(np.array([1.0, -2.0])), damping=0.1)
    with pytest.warns(ih.ConvergenceWarning), pytest.raises(ih.IndefiniteError):
        ih.Influence(inverse, G).certified_scores(G)
    with pytest.raises(TypeError, match="what method"):
        ih.Influence(ih.Diagonal(np.ones(2)), G).self_influence_bounds()
    with pytest.raises(ValueError, match="3 columns"):
        ih.Influence(inverse, G).certified_scores(ih.DenseGradients(np.ones((1, 3))))

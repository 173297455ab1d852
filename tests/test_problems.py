"""The known answers are known: every problem is checked against float64, and its constants."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from invhvp import problems
from invhvp.testing import check_operator
from tests.backends import Backend

PROBLEMS: dict[str, Callable[..., problems.Problem]] = {
    "poisson-1d": problems.poisson_1d,
    "poisson-1d-ends": lambda like=None: problems.poisson_1d(51, rhs="ends", like=like),
    "poisson-2d": lambda like=None: problems.poisson_2d(8, like=like),
    "wishart": lambda like=None: problems.wishart(40, m=160, like=like),
    "strakos": problems.strakos,
    "hilbert": lambda like=None: problems.hilbert(4, like=like),
    "wilkinson": problems.wilkinson,
    "distinct": lambda like=None: problems.distinct_eigenvalues(3, n=30, like=like),
    "network": lambda like=None: problems.nn_spectrum(40, damping=0.1, like=like),
    "krylov-dependent": problems.ji_li_breakdown,
    "gauss-newton": lambda like=None: problems.rank_deficient_gauss_newton(damping=0.1, like=like),
    "regression": problems.linear_regression,
    "spectrum": lambda like=None: problems.from_spectrum(
        problems.spectrum_clustered(30), damping=1.0, like=like
    ),
}


def matrices(problem: problems.Problem) -> tuple[np.ndarray, ...]:
    M = np.asarray(problem.operator.to_dense(), dtype=np.float64)
    return M, M + problem.damping * np.eye(M.shape[0])


@pytest.mark.parametrize("name", PROBLEMS)
def test_solution_and_spectrum(name: str):
    problem = PROBLEMS[name]()
    M, damped = matrices(problem)
    check_operator(problem.operator, dense=M)
    eps = 2.0**-52
    x = np.linalg.solve(damped, problem.rhs)
    allowed = 30 * eps * np.linalg.cond(damped) * np.linalg.norm(x)
    assert np.linalg.norm(problem.solution - x) <= allowed
    if problem.spectrum is not None:
        values = np.linalg.eigvalsh(M)
        np.testing.assert_allclose(problem.spectrum, values, rtol=0, atol=200 * eps * values[-1])
        assert problem.condition == pytest.approx(np.linalg.cond(damped), rel=1e-6)
        assert problem.operator.psd == (values[0] > -1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_live_where_they_are_asked_to(backend: Backend, name: str):
    problem, host = PROBLEMS[name](like=backend.asarray([])), PROBLEMS[name]()
    for field in ("rhs", "solution"):
        backend.assert_like(getattr(problem, field))
        expected = getattr(host, field).astype(backend.np_dtype)
        np.testing.assert_array_equal(backend.to_numpy(getattr(problem, field)), expected)
    assert problem.operator.dtype == backend.dtype
    assert problem.operator.psd == host.operator.psd
    X = backend.to_numpy(problem.operator @ problem.rhs)
    M, _ = matrices(host)
    allowed = 60 * backend.eps * np.linalg.norm(M, 2) * np.linalg.norm(host.rhs)
    assert np.linalg.norm(X - M @ host.rhs) <= allowed


def test_poisson_2d():
    problem = problems.poisson_2d()
    assert problem.condition == pytest.approx(440.6886, abs=5e-5)
    assert problem.constants["condition"] == pytest.approx(problem.condition, rel=1e-12)
    rhs = np.random.default_rng(0).standard_normal((1024, 3))
    several = problems.poisson_2d(rhs=rhs)
    residual = rhs - several.operator @ several.solution
    size = 8 * np.linalg.norm(several.solution)
    assert np.linalg.norm(residual) <= 30 * 2.0**-52 * size
    assert "cg_1e-8" not in several.constants


@pytest.mark.parametrize("n", [6, 8, 10])
def test_hilbert_has_an_integer_inverse(n: int):
    problem = problems.hilbert(n)
    numerators = [int(x) for x in problem.solution]
    for i in range(n):
        row = sum(Fraction(x, i + j + 1) for j, x in enumerate(numerators))
        assert row == (1 if i == 0 else 0)
    condition = np.linalg.cond(problem.operator.to_dense())
    assert problem.constants["condition"] == pytest.approx(condition, rel=1e-3)


def test_wilkinson_pair():
    problem = problems.wilkinson()
    assert problem.spectrum is not None
    assert problem.spectrum[-1] == pytest.approx(problem.constants["largest"], abs=1e-14)
    gap = problem.spectrum[-1] - problem.spectrum[-2]
    assert gap == pytest.approx(problem.constants["gap"], abs=2e-14)


def test_network_spectrum():
    problem = problems.nn_spectrum(800, n_rhs=1)
    assert problem.constants["effective_dimension"] == pytest.approx(57.9, abs=0.05)
    assert problem.spectrum is not None
    assert problem.spectrum[-1] == 1e3


def test_wishart_edges():
    problem = problems.wishart()
    assert problem.spectrum is not None
    assert problem.constants["lower_edge"] == 0.25
    assert problem.constants["upper_edge"] == 2.25
    assert problem.spectrum[0] == pytest.approx(0.25, abs=0.02)
    assert problem.spectrum[-1] == pytest.approx(2.25, abs=0.05)


def textbook_cg(problem: problems.Problem, rtol: float, dtype: type = np.float64) -> int:
    """Passes until the recurrence's residual is below rtol·‖b‖."""
    b = np.asarray(problem.rhs, dtype=dtype)
    r, p, g = b, b, b @ b
    for passes in range(1, 1000):
        q = problem.operator @ p
        alpha = g / (p @ q)
        r = r - alpha * q
        new = r @ r
        if np.sqrt(new) <= rtol * np.linalg.norm(b):
            return passes
        p, g = r + new / g * p, new
    return -1


@pytest.mark.parametrize(
    ("problem", "key", "rtol"),
    [
        (problems.poisson_2d(), "cg_1e-8", 1e-8),
        (problems.poisson_2d(), "cg_1e-10", 1e-10),
        (problems.wishart(), "cg_1e-8", 1e-8),
        (problems.wishart(m=6400), "cg_1e-8", 1e-8),
        (problems.poisson_1d(50), "passes", 1e-12),
        (problems.poisson_1d(51), "passes", 1e-12),
        (problems.poisson_1d(50, rhs="ones"), "passes", 1e-12),
        (problems.poisson_1d(51, rhs="ones"), "passes", 1e-12),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_documented_passes_of_cg(problem: problems.Problem, key: str, rtol: float):
    assert textbook_cg(problem, rtol) == problem.constants[key]


def test_documented_passes_of_cg_in_float32():
    problem = problems.poisson_2d(like=np.zeros(0, dtype=np.float32))
    assert textbook_cg(problem, 1e-5, np.float32) == problem.constants["cg_1e-5_float32"]


def test_regression_leaves_one_out_exactly():
    problem = problems.linear_regression(3, samples=9, n_test=2, damping=0.1, rng=4)
    rng = np.random.default_rng(4)
    X = rng.standard_normal((11, 3))
    y = X @ rng.standard_normal(3) + 0.5 * rng.standard_normal(11)
    full = np.linalg.solve(X[:9].T @ X[:9] + 0.9 * np.eye(3), X[:9].T @ y[:9])

    def loss(w):
        return (X[9:] @ w - y[9:]) ** 2 / 2

    for i in range(9):
        x, z = np.delete(X[:9], i, axis=0), np.delete(y[:9], i)
        w = np.linalg.solve(x.T @ x + 0.9 * np.eye(3), x.T @ z)
        np.testing.assert_allclose(problem.leave_one_out[i], w, rtol=1e-12)
        np.testing.assert_allclose(problem.loss_changes[:, i], loss(w) - loss(full), atol=1e-13)
    # Positive scores are helpful: without them the test loss rises, by about score / N.
    clear = np.abs(problem.loss_changes) > 1e-2 * np.max(np.abs(problem.loss_changes))
    assert np.mean((np.sign(problem.scores) == np.sign(problem.loss_changes))[clear]) > 0.9
    scores = problem.test.to_dense() @ np.linalg.solve(
        matrices(problem)[1], problem.train.to_dense().T
    )
    np.testing.assert_allclose(problem.scores, scores, rtol=1e-12)


def test_spectra():
    assert problems.spectrum_decay(3).tolist() == [1.0, 0.25, 1 / 9]
    assert problems.spectrum_step(4, rank=2, floor=0.5).tolist() == [1.0, 1.0, 0.5, 0.5]
    assert problems.spectrum_network(30)[[0, 9, 10]].tolist() == [1e3, 10.0, 1.0]
    assert np.sum(problems.spectrum_indefinite(20, negative=3) < 0) == 3
    clusters = problems.spectrum_clustered(30)
    assert np.sum(np.abs(clusters / 1e3 - 1) <= 1e-3) == 10
    assert problems.spectrum_geometric(5)[-1] == pytest.approx(1e-6)


def test_distinct_eigenvalues_are_distinct():
    problem = problems.distinct_eigenvalues(7)
    assert problem.spectrum is not None
    assert np.unique(problem.spectrum).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert problem.constants["passes"] == 7


def test_right_hand_sides(backend: Backend):
    like = backend.asarray([])
    for kind in ("gaussian", "dependent", "near_duplicate", "scaled"):
        B = problems.right_hand_sides(20, 8, kind=kind, like=like)
        backend.assert_like(B)
        assert B.shape == (20, 8)
    B = problems.right_hand_sides(20, 8, kind="dependent")
    assert np.linalg.matrix_rank(B) == 5
    assert np.any(np.linalg.norm(B, axis=0) == 0)
    norms = np.linalg.norm(problems.right_hand_sides(20, 8, kind="scaled"), axis=0)
    assert norms[0] < 1e-10
    assert norms[-1] > 1e10
    B = problems.right_hand_sides(20, 8, kind="near_duplicate")
    assert 0 < np.linalg.norm(B[:, 1:] - B[:, :1]) < 1e-3 * np.linalg.norm(B)


def test_gradients_have_the_covariance_of_their_matrix(backend: Backend):
    M = np.diag([4.0, 1.0, 0.0])
    B = problems.right_hand_sides(
        3, 2000, kind="gradient", matrix=backend.asarray(M), like=backend.asarray([])
    )
    b = backend.to_numpy(B)
    np.testing.assert_allclose(b @ b.T / 2000, M, atol=0.3)
    assert np.all(np.abs(b[2]) <= 1e-6)


def test_wrong_kinds_are_named():
    with pytest.raises(ValueError, match="near_duplicate"):
        problems.right_hand_sides(3, 2, kind="odd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrix="):
        problems.right_hand_sides(3, 2, kind="gradient")

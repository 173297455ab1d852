"""CG and BlockCG: values, verdicts, certificates, counts and synchronisations."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import invhvp as ih
from invhvp import _backend, _lapack, problems

KRYLOV = [ih.BlockCG, ih.CG]
IDS = ["BlockCG", "CG"]
N = 40


def spd(n=N, low=1e-2, high=1e2, seed=0):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return (Q * np.geomspace(low, high, n)) @ Q.T, Q


def symmetric(M):
    return (M + M.T) / 2


class Counted:
    """A product that counts what reaches it."""

    def __init__(self, M):
        self.M, self.columns, self.passes = M, 0, 0

    def __call__(self, X):
        self.columns += X.shape[1]
        self.passes += 1
        return self.M @ X


@pytest.fixture(params=KRYLOV, ids=IDS)
def method(request):
    return request.param


def test_true_residuals_solutions_and_bounds_on_every_backend(backend, method):
    H = symmetric(spd()[0])
    B = np.random.default_rng(1).standard_normal((N, 4))
    placed, rhs = backend.asarray(H), backend.asarray(B)
    exact = np.linalg.solve(backend.to_numpy(placed) + 1e-2 * np.eye(N), backend.to_numpy(rhs))
    rtol = 1e-8 if backend.eps < 1e-10 else 1e-3
    sol = ih.solve(ih.Dense(placed, psd=True), rhs, method(rtol=rtol), damping=1e-2)
    backend.assert_like(sol.x)
    A = backend.to_numpy(placed) + 1e-2 * np.eye(N)
    X = backend.to_numpy(sol.x)
    residual = np.linalg.norm(backend.to_numpy(rhs) - A @ X, axis=0)
    slack = 20 * backend.eps * np.linalg.norm(A, 2) * np.linalg.norm(X, axis=0)
    assert sol.status == (ih.Status.CONVERGED,) * 4
    assert np.all(residual <= rtol * np.linalg.norm(B, axis=0) * 1.001 + slack)
    error = X - exact
    energy = np.sqrt(np.maximum(np.sum(error * (A @ error), axis=0), 0))
    assert np.all(backend.to_numpy(sol.error_bounds) >= energy)
    assert np.all(energy <= (residual + slack) / math.sqrt(1e-2))


def test_float32_at_condition_1e6_reaches_its_floor_and_says_so(method):
    problem = problems.nn_spectrum(n=400)
    rng = np.random.default_rng(2)
    M = np.asarray(problem.operator.to_dense())
    B = rng.standard_normal((400, 16))
    B[:, 3], B[:, 8] = B[:, 0], B[:, 0] + B[:, 1]
    A = ih.Dense(symmetric(M).astype(np.float32), psd=True)
    damping = problem.damping if problem.damping else 1e-3
    with pytest.warns(ih.ConvergenceWarning, match="FLOOR"):
        sol = ih.solve(A, B.astype(np.float32), method(rtol=1e-7), damping=damping)
    assert set(sol.status) == {ih.Status.FLOOR}
    assert float(np.max(sol.relative_residuals)) < 0.1
    if method is ih.BlockCG:
        assert sol.passes <= 60


def test_residual_operator_passes_the_float32_floor(method):
    H = symmetric(spd(low=1e-3)[0]).astype(np.float32)
    B = np.random.default_rng(1).standard_normal((N, 3))
    accurate = ih.Dense(H.astype(np.float64), psd=True)
    refined = method(rtol=1e-10, residual_operator=accurate, maxiter=4000)
    inverse = refined.prepare(ih.Dense(H, psd=True), damping=1e-2)
    sol = inverse.solve(B)
    assert sol.x.dtype == np.float64
    assert set(sol.status) == {ih.Status.CONVERGED}
    exact = np.linalg.solve(H.astype(np.float64) + 1e-2 * np.eye(N), B)
    np.testing.assert_allclose(sol.x, exact, rtol=0, atol=1e-7 * np.abs(exact).max())


def test_counts_equal_an_instrumented_operator(method):
    product = Counted(symmetric(spd()[0]))
    A = ih.Callback(product, N, like=np.ones(1), psd=True)
    sol = ih.solve(A, np.random.default_rng(0).standard_normal((N, 3)), method(), damping=0.1)
    assert (sol.products, sol.passes) == (product.columns, product.passes)
    product = Counted(symmetric(spd()[0]) - 5 * np.eye(N))
    A = ih.Callback(product, N, like=np.ones(1))
    with pytest.warns(ih.ConvergenceWarning):
        sol = ih.solve(A, np.ones(N), method(), damping=0.1)
    assert (sol.products, sol.passes) == (product.columns, product.passes)


def test_synchronisations_are_planned_and_counted(backend, host_transfers, method):
    H, B = symmetric(spd(n=20)[0]), np.random.default_rng(0).standard_normal((20, 3))
    A = ih.Dense(backend.asarray(H), psd=True)
    rhs = backend.asarray(B)
    inverse = method(maxiter=12, rtol=0.0, atol=0.0, check_every=4).prepare(A, damping=1.0)
    host_transfers.reset()
    with pytest.warns(ih.ConvergenceWarning):
        sol = inverse.solve(rhs)
    if not _backend.has_float64(rhs):
        return  # k × k algebra has to move to the host at every step: planned, but not constant
    looks = sol.iterations // 4
    # One at the door, one per look, one for the true residual, and at most the norm estimate,
    # the decoded status (code and residual for the warning) and the final bound.
    assert host_transfers.transfers <= looks + 8
    unwatched = method(maxiter=12, check_every=None).prepare(A, damping=1.0)
    host_transfers.reset()
    result = unwatched._solve(rhs)
    assert host_transfers.calls == 1
    assert result.iterations == 12


def test_no_look_means_no_torch_synchronisation(method, torch_syncs):
    torch = pytest.importorskip("torch")
    H = torch.from_numpy(symmetric(spd(n=20)[0]))
    A = ih.Dense(H, psd=True)
    B = torch.ones((20, 3), dtype=torch.float64) + torch.eye(20, dtype=torch.float64)[:, :3]
    inverse = method(maxiter=10, check_every=None).prepare(A, damping=1.0)
    with torch_syncs() as syncs:
        inverse._solve(B)
    assert syncs.total == 0, syncs


@pytest.mark.parametrize("columns", [0, 1, 3, 50])
def test_any_number_of_columns(backend, method, columns):
    H = symmetric(spd(n=20, low=0.1, high=10)[0])
    B = np.random.default_rng(0).standard_normal((20, columns))
    A = ih.Dense(backend.asarray(H), psd=True)
    rtol = 1e-7 if backend.eps < 1e-10 else 1e-3
    sol = ih.solve(A, backend.asarray(B), method(rtol=rtol), damping=0.5)
    assert sol.x.shape == (20, columns)
    exact = np.linalg.solve(H + 0.5 * np.eye(20), B)
    scale = max(1.0, np.abs(exact).max(initial=0))
    np.testing.assert_allclose(backend.to_numpy(sol.x), exact, atol=20 * rtol * scale, rtol=0)
    one = ih.solve(A, backend.asarray(np.ones(20)), method(rtol=rtol), damping=0.5)
    assert one.x.shape == (20,)
    assert one.residual_norms.ndim == one.status_codes.ndim == one.error_bounds.ndim == 0
    assert one.status is ih.Status.CONVERGED


def test_a_single_parameter(backend, method):
    A = ih.Dense(backend.asarray(np.array([[2.0]])), psd=True)
    sol = ih.solve(A, backend.asarray(np.array([[1.0, -3.0]])), method(), damping=2.0)
    np.testing.assert_allclose(backend.to_numpy(sol.x), [[0.25, -0.75]], rtol=4 * backend.eps)


def test_zero_and_repeated_columns_cost_nothing(backend, method):
    H = symmetric(spd(n=20, low=0.5, high=5.0)[0])
    b = np.random.default_rng(0).standard_normal(20)
    single = ih.solve(
        ih.Dense(backend.asarray(H), psd=True), backend.asarray(b), method(), damping=1.0
    )
    B = np.stack([b, 0 * b, 2.0 * b, -b, b], axis=1)
    sol = ih.solve(
        ih.Dense(backend.asarray(H), psd=True), backend.asarray(B), method(), damping=1.0
    )
    assert sol.products == single.products
    assert sol.status[1] is ih.Status.ZERO
    X = backend.to_numpy(sol.x)
    np.testing.assert_array_equal(X[:, 1], 0.0)
    np.testing.assert_allclose(X[:, 2], 2 * X[:, 0], rtol=8 * backend.eps)
    np.testing.assert_allclose(X[:, 3], -X[:, 0], rtol=8 * backend.eps)
    zero = ih.solve(
        ih.Dense(backend.asarray(H), psd=True), backend.asarray(0 * b), method(), damping=1.0
    )
    assert (zero.status, zero.products) == (ih.Status.ZERO, 0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12])
def test_tolerances_are_relative_to_each_column(method, scale):
    H = symmetric(spd(low=0.1)[0]).astype(np.float32)
    b = np.random.default_rng(0).standard_normal((N, 1)).astype(np.float32)
    B = np.concatenate([b, (np.roll(b, 3) * np.float32(scale)).astype(np.float32)], axis=1)
    sol = ih.solve(ih.Dense(H, psd=True), B, method(rtol=1e-3), damping=0.1)
    A = H.astype(float) + 0.1 * np.eye(N)
    residual = np.linalg.norm(B.astype(float) - A @ sol.x.astype(float), axis=0)
    assert np.all(residual <= 1.1e-3 * np.linalg.norm(B.astype(float), axis=0))


def test_negative_curvature_is_proved(backend, method):
    M, Q = spd(low=1.0, high=10.0)
    M = symmetric(M - 3.0 * np.outer(Q[:, 5], Q[:, 5]))
    A = ih.Dense(backend.asarray(M))
    rhs = backend.asarray(np.random.default_rng(0).standard_normal((N, 2)))
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        sol = ih.solve(A, rhs, method(), damping=1e-3)
    assert set(sol.status) == {ih.Status.NEGATIVE_CURVATURE}
    v = backend.to_numpy(sol.curvature.vector)
    assert abs(np.linalg.norm(v) - 1) < 1e-5
    assert v @ M @ v + 1e-3 < 0
    assert v @ M @ v == pytest.approx(sol.curvature.value, rel=1e-3)
    with pytest.raises(ih.IndefiniteError) as caught:
        method().prepare(A, damping=1e-3) @ rhs
    assert caught.value.minimum_damping > 1e-3
    with pytest.raises(ih.IndefiniteError):
        sol.raise_if_failed()


def test_indefinite_shift_raises_the_damping_and_says_so(method):
    M, Q = spd(low=1.0, high=10.0)
    M = symmetric(M - 3.0 * np.outer(Q[:, 5], Q[:, 5]))
    least = np.linalg.eigvalsh(M)[0]
    product = Counted(M)
    A = ih.Callback(product, N, like=M)
    shifting = method(indefinite="shift")
    with pytest.warns(ih.InvhvpWarning, match="damping was raised"):
        inverse = shifting.prepare(A, damping=1e-3)
    assert -least < inverse.damping < -2 * least
    assert inverse.products == product.columns
    sol = inverse.solve(np.ones(N))
    assert sol.status is ih.Status.CONVERGED
    exact = np.linalg.solve(M + inverse.damping * np.eye(N), np.ones(N))
    np.testing.assert_allclose(sol.x, exact, atol=1e-3 * np.abs(exact).max())
    assert shifting.prepare(A, damping=10.0).damping == 10.0
    by_block = ih.Layout.from_shapes({"a": (10,), "b": (30,)})
    B = ih.Callback(product, N, like=M, layout=by_block)
    with pytest.warns(ih.InvhvpWarning, match="damping was raised"):
        raised = shifting.prepare(B, damping={"a": 1e-3, "b": 0.5}).damping
    assert raised["b"] - raised["a"] == pytest.approx(0.499)
    with pytest.raises(ValueError, match="'raise' or 'shift'"):
        method(indefinite="ignore")


def test_an_operator_that_returns_nan(backend, method):
    xp = backend.xp
    A = ih.Callback(
        lambda X: X * xp.asarray(math.nan, dtype=X.dtype, device=backend.device),
        5,
        like=backend.asarray([]),
    )
    rhs = backend.asarray(np.ones((5, 2)) + np.eye(5)[:, :2])
    with pytest.warns(ih.ConvergenceWarning, match="NONFINITE"):
        sol = ih.solve(A, rhs, method(), damping=1.0)
    assert set(sol.status) == {ih.Status.NONFINITE}
    with pytest.raises(ih.ConvergenceError, match="NaN"):
        method().prepare(A, damping=1.0) @ rhs


def test_an_asymmetric_operator_is_named(backend, method):
    M = spd()[0] + 0.3 * np.triu(np.random.default_rng(0).standard_normal((N, N)))
    placed = backend.asarray(M)
    A = ih.Callback(lambda X: placed @ X, N, like=placed)
    rhs = backend.asarray(np.random.default_rng(1).standard_normal((N, 3)))
    with pytest.warns(ih.ConvergenceWarning, match="NOT_SYMMETRIC"):
        sol = ih.solve(A, rhs, method(), damping=10.0)
    assert set(sol.status) == {ih.Status.NOT_SYMMETRIC}


def test_an_operator_less_precise_than_it_claims_is_named(method):
    M = symmetric(spd()[0]).astype(np.float32)
    A = ih.Callback(lambda X: (M @ X.astype(np.float32)).astype(float), N, like=np.ones(1))
    with pytest.warns(ih.ConvergenceWarning, match="less precise"):
        sol = ih.solve(A, np.random.default_rng(1).standard_normal((N, 3)), method(), damping=0.1)
    assert set(sol.status) == {ih.Status.NOT_SYMMETRIC}


def test_limits_end_with_the_best_iterate(method):
    H = symmetric(spd()[0])
    B = np.random.default_rng(1).standard_normal((N, 3))
    A = ih.Dense(H, psd=True)
    exact = np.linalg.solve(H + 0.1 * np.eye(N), B)

    def a_norm(X):
        E = X - exact
        return np.sum(E * ((H + 0.1 * np.eye(N)) @ E), axis=0)

    for options in ({"maxiter": 4}, {"max_products": 15}, {"max_seconds": 0.0}):
        with pytest.warns(ih.ConvergenceWarning, match="limit"):
            sol = ih.solve(A, B, method(rtol=1e-12, **options), damping=0.1)
        assert set(sol.status) == {ih.Status.MAXITER}
        assert np.all(a_norm(sol.x) <= a_norm(np.zeros_like(B)) * (1 + 1e-12))
        if "max_products" in options:
            assert sol.products <= 15


@pytest.mark.parametrize("every", [1, 3, None])
def test_check_every_changes_no_value(backend, method, every):
    H = symmetric(spd(n=16, low=0.1, high=10)[0])
    B = np.random.default_rng(1).standard_normal((16, 2))
    maxiter = 60 if every is None else None
    rtol = 1e-7 if backend.eps < 1e-10 else 1e-3
    sol = ih.solve(
        ih.Dense(backend.asarray(H), psd=True),
        backend.asarray(B),
        method(check_every=every, maxiter=maxiter, rtol=rtol),
        damping=0.1,
    )
    assert set(sol.status) == {ih.Status.CONVERGED}
    exact = np.linalg.solve(H + 0.1 * np.eye(16), B)
    np.testing.assert_allclose(backend.to_numpy(sol.x), exact, atol=20 * rtol * np.abs(exact).max())
    if every:
        assert sol.iterations % every == 0


def test_unwatched_runs_refuse_nan_and_survive_zero_and_equal_columns(backend, method):
    H = symmetric(spd(n=16, low=0.1, high=10)[0])
    A = ih.Dense(backend.asarray(H), psd=True)
    B = np.random.default_rng(1).standard_normal((16, 2))
    wide = np.concatenate([B, 0 * B[:, :1], B], axis=1)
    fixed = method(check_every=None, maxiter=25, rtol=1e-3)
    sol = ih.solve(A, backend.asarray(wide), fixed, damping=0.1)
    S = ih.Status
    assert sol.status == (S.CONVERGED, S.CONVERGED, S.ZERO, S.CONVERGED, S.CONVERGED)
    bad = B.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"columns \[1\]"):
        ih.solve(A, backend.asarray(bad), fixed, damping=0.1)


def test_the_certified_error_can_be_the_goal(method):
    H = symmetric(spd()[0])
    B = np.random.default_rng(1).standard_normal((N, 3))
    A = ih.Dense(H, psd=True)
    exact = np.linalg.solve(H + 0.1 * np.eye(N), B)
    sol = ih.solve(A, B, method(etol=1e-3), damping=0.1)
    M = H + 0.1 * np.eye(N)
    error = np.sqrt(np.sum((sol.x - exact) * (M @ (sol.x - exact)), axis=0))
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert np.all(error <= 1e-3 * np.sqrt(np.sum(exact * (M @ exact), axis=0)))
    with pytest.raises(ValueError, match="etol needs"):
        method(etol=1e-3).prepare(ih.Dense(H), damping=0.1)


def test_warm_start(backend, method):
    H = symmetric(spd(n=16, low=0.1, high=10)[0])
    B = np.random.default_rng(1).standard_normal((16, 2))
    exact = np.linalg.solve(H + 0.1 * np.eye(16), B)
    A, rhs = ih.Dense(backend.asarray(H), psd=True), backend.asarray(B)
    inverse = method(rtol=1e-3).prepare(A, damping=0.1)
    sol = inverse.solve(rhs, x0=backend.asarray(exact))
    # Two products for the residual, six for ‖A‖: the bound must carry the rounding of A x0.
    assert (sol.iterations, sol.products) == (0, 8)
    assert set(sol.status) == {ih.Status.CONVERGED}
    with pytest.raises(ValueError, match="x0 must have the shape"):
        inverse.solve(rhs, x0=backend.asarray(exact[:, 0]))


def test_preconditioned_solutions_meet_the_true_residual(backend, method):
    d = np.geomspace(1.0, 1e4, N)
    rng = np.random.default_rng(0)
    E = symmetric(rng.standard_normal((N, N))) * 0.02
    H = np.diag(d) + E @ E.T * d[:, None] ** 0.5 * d[None, :] ** 0.5
    H = symmetric(H)
    A = ih.Dense(backend.asarray(H), psd=True)
    K = ih.Diagonal(backend.asarray(d))
    rhs = backend.asarray(rng.standard_normal((N, 3)))
    plain = ih.solve(A, rhs, method(rtol=1e-4), damping=1e-2)
    helped = ih.solve(A, rhs, method(rtol=1e-4, preconditioner=ih.Surrogate(K)), damping=1e-2)
    assert set(helped.status) == {ih.Status.CONVERGED}
    assert helped.products < plain.products
    A64 = backend.to_numpy(A.to_dense()) + 1e-2 * np.eye(N)
    true = np.linalg.norm(backend.to_numpy(rhs) - A64 @ backend.to_numpy(helped.x), axis=0)
    allowed = 1e-4 * np.linalg.norm(backend.to_numpy(rhs), axis=0)
    slack = (
        10
        * backend.eps
        * np.linalg.norm(A64, 2)
        * np.linalg.norm(backend.to_numpy(helped.x), axis=0)
    )
    assert np.all(true <= allowed + slack)


def test_what_cannot_precondition_is_refused_by_name(method):
    A = ih.Dense(symmetric(spd()[0]), psd=True)
    for bad, name in ((ih.CG(), "CG"), (ih.Surrogate(ih.Dense(-np.eye(N))), "Surrogate")):
        with pytest.raises(ValueError, match=f"{name} cannot precondition"):
            method(preconditioner=bad).prepare(A, damping=0.1)
    with pytest.raises(TypeError, match="takes a Method"):
        method(preconditioner=ih.Direct().prepare(A, damping=0.1).map)


def test_another_damping_does_not_smuggle_in_an_indefinite_preconditioner(method):
    A = ih.Dense(symmetric(spd()[0]), psd=True)
    K = ih.Diagonal(np.linspace(-0.5, 5.0, N))
    inverse = method(preconditioner=ih.Surrogate(K)).prepare(A, damping=1.0)
    with pytest.raises(ValueError, match="Surrogate cannot precondition"):
        inverse.with_damping(0.1)


def test_an_out_of_memory_product_is_halved_once(caplog, method):
    M, widest = symmetric(spd()[0]), []

    def product(X):
        widest.append(X.shape[1])
        if X.shape[1] > 4:
            raise MemoryError
        return M @ X

    A = ih.Callback(product, N, like=np.ones(1), psd=True)
    B = np.random.default_rng(0).standard_normal((N, 8))
    with caplog.at_level("WARNING", logger="invhvp"):
        sol = ih.solve(A, B, method(), damping=0.1)
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert widest.count(8) == 1
    assert [r.message for r in caplog.records if "halves" in r.message] != []


def test_wide_right_hand_sides_go_in_blocks():
    H = symmetric(spd()[0])
    B = np.random.default_rng(0).standard_normal((N, 10))
    sol = ih.solve(ih.Dense(H, psd=True), B, ih.BlockCG(rtol=1e-9, block_width=4), damping=0.1)
    np.testing.assert_allclose(sol.x, np.linalg.solve(H + 0.1 * np.eye(N), B), atol=1e-6)


def test_callback_and_history(method):
    seen = []
    H = symmetric(spd()[0])
    sol = (
        method().prepare(ih.Dense(H, psd=True), damping=0.1).solve(np.ones(N), callback=seen.append)
    )
    assert len(seen) == len(sol.history) == sol.iterations
    assert seen[-1].products == sol.products - 1
    assert np.all(np.diff([record.seconds for record in seen]) >= 0)
    assert sol.to_dict()["status"] == "CONVERGED"


def test_block_damping(backend, method):
    layout = ih.Layout.from_shapes({"a": (2, 3), "b": (4,)})
    H = symmetric(spd(n=10, low=0.1, high=2.0)[0])
    A = ih.Dense(backend.asarray(H), psd=True, layout=layout)
    b = np.arange(1.0, 11.0)
    sol = ih.solve(A, backend.asarray(b), method(rtol=1e-4), damping={"a": 0.5, "b": 2.0})
    exact = np.linalg.solve(H + np.diag([0.5] * 6 + [2.0] * 4), b)
    np.testing.assert_allclose(backend.to_numpy(sol.x), exact, atol=2e-3)


def test_factorisations_that_return_nan_do_not_pass(monkeypatch):
    monkeypatch.setattr(_lapack, "cholesky", lambda M: np.full_like(M, np.nan))
    with pytest.warns(ih.ConvergenceWarning):
        sol = ih.solve(ih.Dense(np.eye(5), psd=True), np.ones(5), ih.BlockCG(), damping=1.0)
    assert sol.status not in (ih.Status.CONVERGED, ih.Status.ZERO)


@pytest.mark.parametrize(
    "options",
    [
        {"rtol": -1.0},
        {"rtol": math.nan},
        {"maxiter": 0},
        {"check_every": 0},
        {"max_seconds": -1.0},
    ],
)
def test_options_are_checked(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        method(**options)


def test_the_door(backend, method):
    A = ih.Dense(backend.asarray(np.eye(4)), psd=True)
    inverse = method().prepare(A, damping=1.0)
    with pytest.raises(ValueError, match="pass the transpose"):
        inverse.solve(backend.asarray(np.ones((2, 4))))
    with pytest.raises(ValueError, match=r"columns \[0\]"):
        inverse.solve(backend.asarray(np.array([1.0, np.inf, 0, 0])))
    with pytest.raises(TypeError, match="list"):
        inverse.solve([1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="not negative"):
        method().prepare(A, damping=-1.0)
    with pytest.raises(TypeError, match="damping must be"):
        method().prepare(A, damping="strong")


# ------------------------------------------------- what a sceptical reader found, and stays fixed


@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 3), (5, 8), (20, 30)])
def test_more_columns_than_parameters_without_a_look(backend, method, n, k):
    rng = np.random.default_rng(0)
    Q = rng.standard_normal((n, n))
    A = ih.Dense(backend.asarray(Q @ Q.T / n), psd=True)
    rhs = backend.asarray(rng.standard_normal((n, k)))
    fixed = method(check_every=None, maxiter=120, rtol=1e-3)
    sol = ih.solve(A, rhs, fixed, damping=0.1)
    assert set(sol.status) == {ih.Status.CONVERGED}


@pytest.mark.parametrize("seed", range(10))
def test_exact_convergence_between_two_looks(method, seed):
    rng = np.random.default_rng(seed)
    a, b = np.abs(rng.standard_normal((1, 1))), rng.standard_normal(1)
    sol = ih.solve(ih.Dense(a, psd=True), b, method(check_every=2), damping=0.1)
    assert sol.status is ih.Status.CONVERGED
    np.testing.assert_allclose(sol.x, b / (a[0] + 0.1), rtol=1e-12)


def test_refinement_uses_the_exact_damping_of_each_block(method):
    rng = np.random.default_rng(0)
    G = rng.standard_normal((50, 10)).astype(np.float32)
    accurate, b = G.astype(np.float64), rng.standard_normal(10)
    layout = ih.Layout.from_shapes({"a": (5,), "b": (5,)})
    A = ih.Callback(lambda X: G.T @ (G @ X) / 50, 10, like=G, psd=True, layout=layout)
    A64 = ih.Callback(lambda X: accurate.T @ (accurate @ X) / 50, 10, like=b, psd=True)
    damping = {"a": 0.1, "b": 0.3}
    sol = method(rtol=1e-11, residual_operator=A64).prepare(A, damping=damping).solve(b)
    M = accurate.T @ accurate / 50 + np.diag([0.1] * 5 + [0.3] * 5)
    assert sol.status is ih.Status.CONVERGED
    assert np.linalg.norm(b - M @ sol.x) <= 1.1e-11 * np.linalg.norm(b)


@pytest.mark.parametrize("seed", range(5))
def test_a_large_warm_start_does_not_break_the_bound(method, seed):
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((10, 30))
    A = ih.RankOneMean(ih.DenseGradients(G))
    x0 = rng.standard_normal(30)
    x0 = 100 * (x0 - np.linalg.pinv(G) @ (G @ x0))
    b = A @ x0 + 1e-4 * x0
    sol = method().prepare(A, damping=1e-4).solve(b, x0=x0)
    wide = G.astype(np.longdouble)
    x = sol.x.astype(np.longdouble)
    r = b - (wide.T @ (wide @ x) / 10 + np.longdouble(1e-4) * x)
    e = np.linalg.solve(G.T @ G / 10 + 1e-4 * np.eye(30), r.astype(np.float64))
    assert np.sqrt(max(float(e @ r), 0.0)) <= sol.error_bounds
    with pytest.raises(ValueError, match="x0 contains NaN"):
        method().prepare(A, damping=1e-4).solve(b, x0=np.full(30, np.nan))


def test_curvature_is_that_of_the_operator_for_damping_by_block(method):
    layout = ih.Layout.from_shapes({"a": (3,), "b": (3,)})
    A = ih.Diagonal(np.full(6, -5.0), layout=layout)
    with pytest.warns(ih.ConvergenceWarning, match="NEGATIVE_CURVATURE"):
        sol = ih.solve(A, np.arange(1.0, 7.0), method(), damping={"a": 1.0, "b": 0.1})
    assert sol.curvature.value == pytest.approx(-5.0)


def test_a_budget_below_one_iteration_spends_nothing(method):
    A = ih.Dense(symmetric(spd()[0]), psd=True)
    B = np.random.default_rng(0).standard_normal((N, 2))
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        sol = ih.solve(A, B, method(max_products=3), damping=0.1)
    assert sol.products == 0


# ------------------------------------------------------------------------------- known answers


def test_poisson_needs_its_known_iterations():
    problem = problems.poisson_2d(32)
    for rtol, count in ((1e-8, 59), (1e-10, 66)):
        sol = ih.solve(problem.operator, problem.rhs, ih.BlockCG(rtol=rtol), damping=0.0)
        assert abs(sol.iterations - count) <= 2
    block = np.random.default_rng(0).standard_normal((1024, 8))
    sol = ih.solve(problem.operator, block, ih.BlockCG(rtol=1e-8), damping=0.0)
    assert abs(sol.iterations - 53) <= 3


def test_distinct_eigenvalues_are_passes(method):
    for m in (3, 7):
        d = np.repeat(np.linspace(1.0, 4.0, m), 10)
        sol = ih.solve(
            ih.Diagonal(d),
            np.random.default_rng(0).standard_normal(10 * m),
            method(rtol=1e-10),
            damping=0.0,
        )
        assert sol.iterations == m


def test_block_krylov_terminates_on_low_rank():
    U, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 20)))
    A = ih.LowRank(U, np.linspace(1.0, 50.0, 20))
    B = np.random.default_rng(1).standard_normal((100, 10))
    assert ih.solve(A, B, ih.BlockCG(rtol=1e-9), damping=1e-2).iterations <= 3


def test_the_ji_li_example_does_not_break_down():
    d = np.arange(1.0, 201.0)
    b = np.ones(200) / math.sqrt(200)
    B = np.stack([b, d * b / 200, (d / 200) ** 2 * b, (d / 200) ** 3 * b], axis=1)
    sol = ih.solve(ih.Diagonal(d), B, ih.BlockCG(rtol=1e-8), damping=0.0)
    assert set(sol.status) == {ih.Status.CONVERGED}
    assert sol.iterations <= 60


def test_strakos_is_delayed_but_certified():
    problem = problems.strakos()
    sol = ih.solve(problem.operator, problem.rhs, ih.BlockCG(rtol=1e-10), damping=problem.damping)
    assert sol.status is ih.Status.CONVERGED
    assert 60 < sol.iterations < 200


# --------------------------------------------------------------------------- properties


PROBLEMS = {
    "seed": st.integers(0, 2**31),
    "n": st.integers(2, 40),
    "k": st.integers(1, 6),
    "decades": st.floats(0, 6),
    "kind": st.sampled_from([*KRYLOV, ih.Minres]),
}


@settings(deadline=None, max_examples=1000)
@given(**PROBLEMS)
def test_certificates_hold(seed, n, k, decades, kind):
    check_certificates(seed, n, k, decades, kind)


@pytest.mark.slow
@settings(deadline=None, max_examples=10_000, derandomize=False)
@given(**PROBLEMS)
def test_certificates_hold_in_ten_thousand_instances(seed, n, k, decades, kind):
    check_certificates(seed, n, k, decades, kind)


@settings(deadline=None, max_examples=250)
@given(**PROBLEMS)
def test_certificates_hold_in_float32(seed, n, k, decades, kind):
    check_certificates(seed, n, k, decades, kind, np.float32)


def check_certificates(seed, n, k, decades, kind, dtype=np.float64):
    """Never CONVERGED above the tolerance, never an error above its bound."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    w = 10.0 ** rng.uniform(-decades, 0, n) * (rng.random(n) < 0.8)
    H = symmetric((Q * w) @ Q.T).astype(dtype)
    damping = 10.0 ** rng.uniform(-5, 0)
    B = rng.standard_normal((n, k)).astype(dtype)
    maxiter = int(rng.integers(1, 4 * n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ih.ConvergenceWarning)
        sol = ih.solve(ih.Dense(H, psd=True), B, kind(rtol=1e-6, maxiter=maxiter), damping=damping)
    # What the operator is: its entries as they are held, its eigenvalues not below zero.
    M = H.astype(np.float64) + damping * np.eye(n)
    B, X = B.astype(np.float64), sol.x.astype(np.float64)
    exact = np.linalg.solve(M, B)
    true = np.linalg.norm(B - M @ X, axis=0)
    rounding = 4 * np.finfo(dtype).eps * np.linalg.norm(M, 2) * np.linalg.norm(X, axis=0)
    for j, status in enumerate(sol.status):
        if status is ih.Status.CONVERGED:
            assert true[j] <= 1.0001e-6 * np.linalg.norm(B[:, j]) + rounding[j]
    E = X - exact
    error = np.sqrt(np.maximum(np.sum(E * (M @ E), axis=0), 0))
    # Rounding the entries of a singular H may have moved its spectrum below zero by ε‖H‖.
    slack = 1 + 1e-9 if dtype is np.float64 else 1 + 1e-6 * np.linalg.norm(H, 2) / damping
    assert np.all(error <= sol.error_bounds * slack + 1e-14)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(KRYLOV))
def test_equivariance(seed, kind):
    """Order of columns, scale of b and scale of A change nothing but what they must."""
    rng = np.random.default_rng(seed)
    n, k = 25, 4
    Q, _ = np.linalg.qr(rng.standard_normal((n, n)))
    H = symmetric((Q * 10.0 ** rng.uniform(-2, 1, n)) @ Q.T)
    B = rng.standard_normal((n, k))
    method = kind(rtol=1e-10)
    X = ih.solve(ih.Dense(H, psd=True), B, method, damping=0.1).x
    tolerance = 1e-7 * np.abs(X).max()
    order = rng.permutation(k)
    permuted = ih.solve(ih.Dense(H, psd=True), B[:, order], method, damping=0.1).x
    np.testing.assert_allclose(permuted, X[:, order], atol=tolerance)
    scaled = ih.solve(ih.Dense(H, psd=True), 1e8 * B, method, damping=0.1).x
    np.testing.assert_allclose(scaled / 1e8, X, atol=tolerance)
    operator = ih.solve(7.0 * ih.Dense(H, psd=True), B, method, damping=0.7).x
    np.testing.assert_allclose(7 * operator, X, atol=tolerance)

"""The conformance kit: it passes what is right, and every check fails on a planted defect."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest

from invhvp.gradients import DenseGradients
from invhvp.methods import BlockCG, Direct
from invhvp.methods._fixed_map import MapInverse
from invhvp.operators import Callback, Dense, Diagonal, LinearOperator, RankOneMean, as_operator
from invhvp.solution import ConvergenceWarning, Status
from invhvp.testing import check_gradients, check_method, check_operator
from tests.backends import Backend
from tests.cases import METHODS, N, matrix, rows

M = matrix(*np.geomspace(2.0, 0.1, N))
SKEW = np.triu(np.ones((N, N)), 1) - np.tril(np.ones((N, N)), -1)


@pytest.mark.parametrize("name", METHODS)
def test_methods_conform(backend: Backend, name: str):
    check_method(METHODS[name](), like=backend.asarray([]))


# ------------------------------------------------------------------------------------ operators


class Planted(LinearOperator):
    """A right operator whose parts can be replaced by wrong ones."""

    def __init__(self, *, psd: bool = True, **parts):
        super().__init__(N, like=np.zeros(0), psd=psd)
        self._parts = parts

    def _matmat(self, X):
        return self._parts.get("product", lambda X: M @ X)(X)

    def to_dense(self):
        return self._parts.get("dense", M)

    def diagonal(self):
        return self._parts.get("diagonal", np.diag(M).copy())

    def inverse(self, damping):
        if "inverse" in self._parts:
            return self._parts["inverse"](damping)
        return Dense(M).inverse(damping)


class Left(Planted):
    def __rmatmul__(self, Y):
        return 2.0 * super().__rmatmul__(Y)


def mutating(X):
    Y = M @ X
    X *= 2.0
    return Y


def drifting():
    calls = iter(range(10_000))
    return lambda X: M @ X * (1 + 1e-15 * (next(calls) % 3))


def finite_difference(X):
    step = 1e-6
    return (np.sinh(step * (M @ X)) - np.sinh(-step * (M @ X))) / (2 * step)


def by_strides(X):
    """Reads the memory as if it were in C order."""
    return M @ X.ravel(order="K").reshape(X.shape)


def nan_somewhere(X):
    Y = M @ X
    Y[0, 0] = np.nan
    return Y


OPERATOR_DEFECTS = {
    "changed its argument": Planted(product=mutating),
    "second A @ X differs": Planted(product=drifting()),
    "has NaN or Inf": Planted(product=nan_somewhere),
    "has dtype float32": Planted(product=lambda X: (M @ X).astype(np.float32)),
    "has shape": Planted(product=lambda X: (M @ X)[:-1]),
    "raised ZeroDivisionError": Planted(product=lambda X: 1 / 0),
    "is a list": Planted(product=lambda X: (M @ X).tolist()),
    r"not column 0|not column 1": Planted(product=lambda X: M @ X * X.shape[1]),
    "memory order": Planted(product=by_strides),
    "is not \\(A @ X\\)ᵀ": Left(),
    "A @ 0 is not 0": Planted(product=lambda X: M @ X + 1e-9),
    "not linear": Planted(product=finite_difference),
    "as precisely as float64 claims": Planted(
        product=lambda X: (M.astype(np.float32) @ X.astype(np.float32)).astype(np.float64)
    ),
    "not symmetric": Planted(product=lambda X: (M + 1e-9 * SKEW) @ X),
    "claims psd=True": Planted(product=lambda X: (M - np.eye(N)) @ X, dense=M - np.eye(N)),
    "to_dense\\(\\) @ X": Planted(dense=M + 1e-9 * np.eye(N)),
    "A.diagonal\\(\\) is not": Planted(diagonal=np.diag(M) * (1 + 1e-9)),
    "A.diagonal\\(\\) has shape": Planted(diagonal=M),
    "X is not X": Planted(inverse=lambda damping: Dense(M).inverse(2 * damping)),
    "raised LinAlgError": Planted(inverse=lambda damping: np.linalg.inv(np.zeros((2, 2)))),
    "A.inverse\\(-1.0\\) was accepted": Planted(inverse=lambda d: Dense(M).inverse(abs(d))),
}


def test_a_right_operator_passes():
    check_operator(Planted(), dense=M, psd=True)


@pytest.mark.parametrize("message", OPERATOR_DEFECTS)
def test_operator_defects_are_found(message: str):
    with pytest.raises(AssertionError, match=message):
        check_operator(OPERATOR_DEFECTS[message])


def test_an_asymmetric_product_of_lower_precision_is_named():
    noisy = (M + 1e-8 * SKEW).astype(np.float64)
    with pytest.raises(AssertionError, match="as precise as float64 claims"):
        check_operator(Callback(lambda X: noisy @ X, N, like=np.zeros(0)))


def test_expectations_are_compared():
    with pytest.raises(AssertionError, match="psd is True, expected False"):
        check_operator(Planted(), psd=False)
    with pytest.raises(AssertionError, match="psd is False, expected True"):
        check_operator(Planted(psd=False), psd=True)
    with pytest.raises(AssertionError, match="not dense @ X"):
        check_operator(Planted(), dense=M * (1 + 1e-9))
    with pytest.raises(AssertionError, match="as_operator"):
        check_operator(3.0)


def test_wrong_gradients_and_terms_are_found():
    class OtherGradients(RankOneMean):
        @property
        def gradients(self):
            return DenseGradients(rows(5, seed=9))

    class PlainSums(RankOneMean):
        def subset(self, indices, /):
            return RankOneMean(self._gradients[indices], count=self.count)

    G = DenseGradients(rows(5))
    check_operator(RankOneMean(G))
    with pytest.raises(AssertionError, match="multiple of GᵀG"):
        check_operator(OtherGradients(G))
    with pytest.raises(AssertionError, match="mean over subsets"):
        check_operator(PlainSums(G))


def test_an_open_door_is_found():
    class Open(Planted):
        def check_operand(self, X, what):
            pass

    with pytest.raises(AssertionError, match="A @ "):
        check_operator(Open())


# ------------------------------------------------------------------------------------ gradients


def planted_gradients(**methods) -> DenseGradients:
    return type("Planted", (DenseGradients,), methods)(rows(6))


GRADIENT_DEFECTS = {
    r"G @ V is not": planted_gradients(_matmat=lambda self, V: 2.0 * (self._rows @ V)),
    r"G\.T @ U is not": planted_gradients(_rmatmat=lambda self, U: self._rows.T @ U[::-1, :]),
    r"G @ V has dtype": planted_gradients(
        _matmat=lambda self, V: (self._rows @ V).astype(np.float32)
    ),
    r"gram\(\) is not": planted_gradients(gram=lambda self, other=None: np.eye(6)),
    r"row_norms\(\) are not": planted_gradients(
        row_norms=lambda self: np.sum(self._rows**2, axis=1)
    ),
    r"other rows": planted_gradients(__getitem__=lambda self, rows: self),
    r"len\(G\)": planted_gradients(__len__=lambda self: 5),
    r"is not GGᵀ": planted_gradients(
        gram=lambda self, other=None: (
            self._rows @ (self if other is None else other)._rows.T * (1 + 1e-9)
        )
    ),
}


def test_right_gradients_pass(backend: Backend):
    G = rows(6).astype(backend.np_dtype)
    check_gradients(DenseGradients(backend.asarray(G)), dense=G.astype(np.float64))


@pytest.mark.parametrize("message", GRADIENT_DEFECTS)
def test_gradient_defects_are_found(message: str):
    with pytest.raises(AssertionError, match=message):
        check_gradients(GRADIENT_DEFECTS[message])


def test_dense_gradients_are_compared():
    with pytest.raises(AssertionError, match="not `dense`"):
        check_gradients(DenseGradients(rows(6)), dense=rows(6) * (1 + 1e-9))


# -------------------------------------------------------------------------------------- methods


class PlantedInverse(MapInverse):
    """An exact inverse whose solution passes through the defect of its method."""

    def solve(self, B, /, **options):
        with warnings.catch_warnings():
            if self.method.silent:
                warnings.simplefilter("ignore", ConvergenceWarning)
            return self.method.defect(super().solve(B, **options), B)


@dataclass(frozen=True, kw_only=True)
class PlantedMethod(Direct):
    defect: object = lambda solution, B: solution
    silent: bool = False
    factor: float = 1.0
    accepts_negative: bool = False

    def prepare(self, A, /, damping):
        if self.accepts_negative:
            damping = abs(damping)
        inverse = super().prepare(A, damping=damping)
        mapping = inverse.map if self.factor == 1.0 else self.factor * inverse.map
        return PlantedInverse(
            self,
            inverse.operator,
            damping,
            mapping,
            exact=True,
            definite=True,
            products=inverse.products,
        )


def changed(**fields):
    return PlantedMethod(
        defect=lambda solution, B: replace(
            solution, **{name: change(solution, B) for name, change in fields.items()}
        )
    )


def adds_to_b(solution, B):
    B += 1.0
    return solution


def all_converged(solution, B):
    return np.zeros_like(solution.status_codes)


def forgetful():
    """Each solve gives a slightly different answer."""
    calls = iter(range(10_000))
    return lambda solution, B: solution.x * (1 + 1e-14 * next(calls))


METHOD_DEFECTS = {
    "reports the residual": changed(residual_norms=lambda s, B: s.residual_norms + 1e-9),
    "is not residual_norms": changed(relative_residuals=lambda s, B: s.residual_norms),
    "has the error": changed(error_bounds=lambda s, B: 0.0 * s.error_bounds),
    "error_bounds has NaN": changed(error_bounds=lambda s, B: np.nan * s.error_bounds),
    "Solution.x has shape": changed(x=lambda s, B: s.x[..., None]),
    "Solution.x has dtype": changed(x=lambda s, B: s.x.astype(np.float32)),
    "error_norm": changed(error_norm=lambda s, B: "max"),
    "status_codes": changed(status_codes=lambda s, B: s.status_codes.astype(np.int64)),
    "products is": changed(products=lambda s, B: 1.5),
    "the operator multiplied": changed(products=lambda s, B: s.products + 1),
    "differs from the first": changed(x=forgetful()),
    "changed its right-hand side": PlantedMethod(defect=adds_to_b),
    "b = 0 has status CONVERGED": changed(status_codes=all_converged),
    "damping=-1.0 was accepted": PlantedMethod(accepts_negative=True),
}


def test_a_right_method_passes():
    check_method(PlantedMethod())


@pytest.mark.parametrize("message", METHOD_DEFECTS)
def test_method_defects_are_found(message: str):
    with pytest.raises(AssertionError, match=message):
        check_method(METHOD_DEFECTS[message])


def test_untrue_convergence_is_found():
    """A map that is 1 % off, judged CONVERGED, with the residual of another answer."""

    def lie(solution, B):
        return replace(solution, x=1.01 * solution.x, status_codes=all_converged(solution, B))

    with pytest.raises(AssertionError, match="reports the residual"):
        check_method(PlantedMethod(defect=lie))

    def bigger_lie(solution, B):
        found = lie(solution, B)
        off = 0.01 * np.linalg.norm(B, axis=0)
        norms = np.linalg.norm(B, axis=0)
        relative = off / np.where(norms > 0, norms, 1.0)
        return replace(
            found,
            residual_norms=off,
            relative_residuals=relative,
            error_bounds=np.inf * np.ones_like(off),
        )

    with pytest.raises(AssertionError, match="is CONVERGED with the residual"):
        check_method(PlantedMethod(defect=bigger_lie))


def test_silence_about_failure_is_found():
    with pytest.raises(AssertionError, match="warned 0 times"):
        check_method(PlantedMethod(factor=0.5, silent=True))


def test_options_that_can_change_are_found():
    @dataclasses.dataclass
    class Loose:
        def prepare(self, A, /, damping):
            return Direct().prepare(A, damping=damping)

    with pytest.raises(AssertionError, match="not a frozen dataclass"):
        check_method(Loose())


def test_a_false_claim_to_be_linear_is_found():
    class Clipping(Diagonal):
        def _matmat(self, X):
            return np.clip(super()._matmat(X), -0.5, 0.5)

    @dataclass(frozen=True, kw_only=True)
    class Clipped(Direct):
        def prepare(self, A, /, damping):
            A = as_operator(A)
            inverse = super().prepare(A, damping=damping)
            d = np.ones(A.shape[0])
            return MapInverse(
                self, A, damping, Clipping(d), exact=False, definite=True, products=inverse.products
            )

    with pytest.raises(AssertionError, match="not linear"):
        check_method(Clipped())


def test_nan_taken_for_convergence_is_found():
    @dataclass(frozen=True, kw_only=True)
    class Optimist(BlockCG):
        def prepare(self, A, /, damping):
            inverse = super().prepare(A, damping=damping)
            original = inverse.solve

            def solve(B, /, **options):
                with warnings.catch_warnings(record=True):
                    warnings.simplefilter("always")
                    solution = original(B, **options)
                if np.any(solution.status_codes == Status.NONFINITE.code):
                    codes = np.zeros_like(solution.status_codes)
                    return replace(solution, status_codes=codes)
                return solution

            inverse.solve = solve
            return inverse

    with pytest.raises(AssertionError, match="a NaN operator gives"):
        check_method(Optimist(rtol=1e-8))

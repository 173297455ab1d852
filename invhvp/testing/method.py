"""The checks of a method and of the inverses and solutions it gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import _backend, _random
from ..operators import Callback, LinearOperator
from ..problems import Problem, rank_deficient_gauss_newton
from ..protocols import Array
from ..solution import ConvergenceError, ConvergenceWarning, Solution, Status
from ._measure import attempt, close, host, like, norm, raises, require, roundoff, same_bits
from ._solution import check_fields, check_honesty, statuses

_REFUSALS = (ValueError, TypeError, ConvergenceError)  # IndefiniteError, SingularError are values


def check_method(
    method: Any, /, *, like: Array | None = None, rng: int = 0, problem: Problem | None = None
) -> None:
    """Check that `method` solves, measures and reports honestly.

    On a small system with a known answer: options, `prepare`, every field of the `Solution`,
    vectors and columns, zero, tiny and huge right-hand sides, true residuals and error bounds
    (recomputed in float64), counts of products, warnings, `with_damping`, linearity of what is
    declared fixed, same bits twice, arguments left alone, and errors at the door. Then systems
    that nobody can solve: a NaN, an asymmetric and an indefinite operator are never CONVERGED
    unless the residual says so.

    Args:
        method: an instance with its options; its tolerance must be reachable in the dtype.
        like: any array of the library, dtype and device to check on; NumPy float64 by default.
        rng: seed of the system and of the right-hand sides.
        problem: the system, for a method that only takes certain operators; n ≤ 200.

    Raises AssertionError naming the first property that fails. Cost: some 30 solves.

    Example:
        >>> from invhvp.methods import Direct
        >>> from invhvp.testing import check_method
        >>> check_method(Direct())
    """
    if problem is None:
        problem = rank_deficient_gauss_newton(24, samples=12, damping=0.1, rng=rng, like=like)
    case = _Case(method, problem, _random.generator(rng, problem.rhs))
    case.check_prepare()
    case.check_columns()
    case.check_one_vector()
    case.check_unusual_columns()
    case.check_fixed_map()
    case.check_damping()
    case.check_counts()
    case.check_door()
    case.check_unsolvable()


class _Case:
    """One method on one system; the matrix is known on the host in float64."""

    def __init__(self, method: Any, problem: Problem, random: _random.Random) -> None:
        self.method = method
        self.problem = problem
        self.A = problem.operator
        self.n = self.A.shape[0]
        self.B = random.normal((self.n, 3))
        self.matrix = host(self.A.to_dense())
        self.inverse = attempt(lambda: self.prepare(problem.damping), "method.prepare")
        self.unit = roundoff(self.A.dtype, self.n)

    def prepare(self, damping: float, A: Any = None) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return self.method.prepare(self.A if A is None else A, damping=damping)

    def solve(self, B: Array, inverse: Any = None, **options: Any) -> Solution:
        """Solve, and compare the warnings with the statuses."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            solution = (self.inverse if inverse is None else inverse).solve(B, **options)
        count = sum(issubclass(w.category, ConvergenceWarning) for w in caught)
        expected = int(not all(status.ok for status in statuses(solution)))
        require(
            count == expected,
            f"solve warned {count} times with status {_names(solution)}, expected {expected}",
            "One ConvergenceWarning per solve with an unfinished column, none otherwise.",
        )
        return solution

    # ------------------------------------------------------------------------------ checks

    def check_prepare(self) -> None:
        method, inverse, A = self.method, self.inverse, self.A
        frozen = getattr(getattr(method, "__dataclass_params__", None), "frozen", False)
        require(frozen, f"{type(method).__name__} is not a frozen dataclass", "Options are values.")
        raises(TypeError, lambda: method.prepare(A), "prepare without damping")
        for damping in (-1.0, float("nan"), float("inf")):
            raises(ValueError, lambda d=damping: method.prepare(A, damping=d), f"damping={damping}")
        raises(TypeError, lambda: method.prepare(A, damping="0.1"), "damping='0.1'")
        require(tuple(inverse.shape) == A.shape, f"the inverse has shape {inverse.shape}", "As A.")
        require(inverse.dtype == A.dtype, f"the inverse has dtype {inverse.dtype}", "As A.")
        require(inverse.device == A.device, f"the inverse is on {inverse.device}", "As A.")
        require(isinstance(inverse.fixed_spd, bool), "fixed_spd is not a bool", "True or False.")
        require(inverse.products >= 0, f"products is {inverse.products}", "It is a count.")
        require(inverse.damping == self.problem.damping, f"damping is {inverse.damping}", "λ!")

    def check_columns(self) -> None:
        before = host(self.B)
        solution = self.solve(self.B)
        close(host(self.B), before, 0.0, "solve changed its right-hand side", "Look for +=.")
        self.check_solution(solution, self.B)
        same_bits(
            self.solve(self.B).x,
            solution.x,
            "a second solve differs from the first",
            "State kept between solves, or a random stream that goes on.",
        )
        fresh = self.prepare(self.problem.damping)
        same_bits(
            self.solve(self.B, fresh).x,
            solution.x,
            "a second prepare gives another answer",
            "The same rng must give the same bits.",
        )
        self.check_solution(self.solve(self.B, x0=self.B), self.B)
        close(host(self.B), before, 0.0, "solve changed x0", "Look for +=.")

    def check_solution(
        self, solution: Solution, B: Array, damping: Any = None, matrix: Any = None
    ) -> None:
        """Every field, and what the solution says of itself, against float64."""
        shift = self.problem.damping if damping is None else damping
        M = (self.matrix if matrix is None else matrix) + shift * np.eye(self.n)
        check_fields(solution, B)
        check_honesty(solution, B, M, self.method, self.unit)

    def check_one_vector(self) -> None:
        one, block = self.solve(self.B[:, 0]), self.solve(self.B[:, :1])
        self.check_solution(one, self.B[:, 0])
        same_bits(
            one.x,
            block.x[:, 0],
            "b of shape (n,) and (n, 1) give different answers",
            "One code path for both.",
        )

    def check_unusual_columns(self) -> None:
        xp = _backend.namespace(self.B)
        B = xp.concat([self.B[:, :1], xp.zeros_like(self.B[:, :1]), self.B[:, :1]], axis=1)
        solution = self.solve(B)
        self.check_solution(solution, B)
        second = statuses(solution)[1]
        require(second is Status.ZERO, f"b = 0 has status {second.name}", "It is ZERO.")
        zero = host(solution.x)[:, 1]
        close(zero, np.zeros_like(zero), 0.0, "b = 0 has a solution that is not 0", "Mask it.")
        usual = statuses(solution)[0]
        for exponent in (-60, 60):
            scaled = B[:, :1] * 2.0**exponent
            answer = self.solve(scaled)
            self.check_solution(answer, scaled)
            status = statuses(answer)[0]
            require(
                status is usual or getattr(self.method, "atol", 0.0),
                f"b scaled by 2^{exponent} has status {status.name}, was {usual.name}",
                "Tolerances are relative to ‖b‖; look for an absolute constant.",
            )

    def check_fixed_map(self) -> None:
        B, inverse = self.B, self.inverse
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            X = attempt(lambda: inverse @ B, "inverse @ B")
            x = attempt(lambda: inverse @ B[:, 0], "inverse @ b")
            combined = inverse @ (2.0 * B - 3.0 * B[:, :1])
        like(X, B, tuple(B.shape), "inverse @ B")
        like(x, B, (self.n,), "inverse @ b")
        if not inverse.fixed_spd:
            return
        condition = np.linalg.cond(self.matrix + self.problem.damping * np.eye(self.n))
        allowed = self.unit * condition * 5 * norm(host(X))
        close(
            host(combined),
            2 * host(X) - 3 * host(X)[:, :1],
            allowed,
            "fixed_spd is True and inverse @ is not linear",
            "Declare fixed_spd=False.",
        )
        inner = host(B).T @ host(X)
        close(
            inner,
            inner.T,
            self.unit * condition * norm(host(B)) * norm(host(X)),
            "fixed_spd is True and the inverse is not symmetric",
            "Declare fixed_spd=False.",
        )
        require(
            np.linalg.eigvalsh(inner + inner.T)[0] > 0,
            "fixed_spd is True and xᵀ(inverse @ x) ≤ 0",
            "Declare fixed_spd=False.",
        )

    def check_damping(self) -> None:
        other = 3.0 * self.problem.damping + 0.5
        before = self.solve(self.B).x
        moved = attempt(lambda: self.inverse.with_damping(other), "inverse.with_damping")
        require(moved.damping == other, f"with_damping({other}).damping is {moved.damping}", "λ!")
        self.check_solution(self.solve(self.B, moved), self.B, other)
        same_bits(
            self.solve(self.B).x,
            before,
            "with_damping changed the inverse it came from",
            "It returns a new one.",
        )
        raises(ValueError, lambda: self.inverse.with_damping(-1.0), "with_damping(-1.0)")

    def check_counts(self) -> None:
        counted = _Counted(self.A)
        operator = Callback(counted, self.n, like=self.A.like, psd=self.A.psd)
        inverse = self.unless_refused(lambda: self.prepare(self.problem.damping, operator))
        if inverse is None:
            return
        solution = self.solve(self.B, inverse)
        claimed = inverse.products + solution.products
        require(
            claimed == counted.columns,
            f"inverse.products + solution.products is {claimed}, "
            f"the operator multiplied {counted.columns} columns",
            "Count every product.",
        )

    def check_door(self) -> None:
        xp, B, solve = _backend.namespace(self.B), self.B, self.inverse.solve
        long = xp.concat([B, B[:1, :]], axis=0)
        raises(ValueError, lambda: solve(long), "a right-hand side with n + 1 rows")
        raises(ValueError, lambda: solve(B, x0=B[:, 0]), "x0 of another shape")
        raises(TypeError, lambda: solve(xp.astype(B, xp.int32)), "integers as right-hand side")
        raises(TypeError, lambda: solve([0.0] * self.n), "a list as right-hand side")
        raises(TypeError, lambda: solve(B, damping=1.0), "solve(B, damping=1.0)")
        for value in ("nan", "inf"):
            first = xp.full_like(B[:1, :], float(value))
            spoilt = xp.concat([first, B[1:, :]], axis=0)
            with np.errstate(all="ignore"):
                raises(ValueError, lambda b=spoilt: solve(b), f"a right-hand side with {value}")

    def check_unsolvable(self) -> None:
        """NaN, asymmetric, indefinite: refuse, raise, or say so; never CONVERGED untruly."""
        size, eye = np.linalg.norm(self.matrix, 2), np.eye(self.n)
        skew = np.triu(np.ones((self.n, self.n)), 1)
        hard = {
            "a NaN": self.matrix + np.where(eye[:, ::-1] > 0, np.nan, 0.0),
            "an asymmetric": self.matrix + size * (skew - skew.T) / self.n,
            "an indefinite": self.matrix - 0.5 * size * eye,
        }
        for what, matrix in hard.items():
            placed = _backend.from_host(matrix, self.A.like)
            operator = Callback(lambda X, M=placed: M @ X, self.n, like=self.A.like)
            what = f"{what} operator"
            inverse = self.unless_refused(
                lambda A=operator: self.prepare(self.problem.damping, A), what
            )
            if inverse is None:
                continue
            solution = self.unless_refused(lambda K=inverse: self.solve(self.B, K), what)
            if solution is None:
                continue
            if what.startswith("a NaN"):
                ok = [status.name for status in statuses(solution) if status.ok]
                require(not ok, f"{what} gives {ok}", "Compare `not (r <= tol)`: NaN fails it.")
            else:
                self.check_solution(solution, self.B, matrix=host(placed))

    def unless_refused(self, action: Callable[[], Any], what: str = "a Callback") -> Any:
        """The result, or None where the input is refused with one of the library's errors."""
        try:
            return action()
        except np.linalg.LinAlgError as error:
            msg = f"{what} raised a bare LinAlgError: {error}. Raise SingularError with a remedy."
            raise AssertionError(msg) from error
        except _REFUSALS:
            return None


class _Counted:
    """Products with an operator, counted in columns."""

    def __init__(self, A: LinearOperator) -> None:
        self.A = A
        self.columns = 0

    def __call__(self, X: Array) -> Array:
        self.columns += X.shape[1]
        return self.A @ X


def _names(solution: Solution) -> str:
    return ", ".join(status.name for status in statuses(solution))

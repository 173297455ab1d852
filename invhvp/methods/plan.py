"""Which method, and at what price: from at most 20 products."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from .. import _backend
from ..estimate import spectrum
from ..operators import LinearOperator, as_operator
from ..operators.damping import as_shift, scalar
from ..protocols import Array
from ._plan_model import ModelSpectrum
from ._plan_options import PlanOption, plan_options
from .block_cg import BlockCG

_PRODUCTS = 20
_SMALL = 256  # parameters up to which a factorisation needs no argument


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What was measured, what follows, and the method that it speaks for.

    Attributes:
        method: the choice; nothing uses it unless you do.
        reason: why.
        warnings: what may go wrong.
        options: every method considered, with its predicted cost (`PlanOption`).
        largest: λmax of A, from below.
        smallest: λmin of A, from above.
        trace: of A, from one probe.
        effective_dimension: Σ θ/(θ + λ) over the spectrum, from one probe.
        products: spent on this plan.
        seconds_per_product: measured, of a single column.
        n, n_rhs, damping, rtol, budget: what was asked for.
    """

    method: Any
    reason: str
    warnings: tuple[str, ...]
    options: tuple[PlanOption, ...]
    largest: float
    smallest: float
    trace: float
    effective_dimension: float
    products: int
    seconds_per_product: float
    n: int
    n_rhs: int
    damping: float
    rtol: float
    budget: int | None
    operator: str = ""

    def __str__(self) -> str:
        """A table of the options, the choice marked, and what to know about it."""
        titles = ("method", "passes", "products", "seconds", "memory", "")
        rows = [
            (
                ("> " if option.label == self._chosen else "  ") + option.label,
                _count(option.passes),
                _count(option.products),
                _seconds(option.seconds),
                _bytes(option.bytes),
                option.note,
            )
            for option in self.options
        ]
        table = [("  " + titles[0], *titles[1:]), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(titles))]
        lines = [
            f"{self.operator}: {self.n_rhs} right-hand sides, damping {self.damping:g}, "
            f"rtol {self.rtol:g}",
            f"spectrum: λmax ≥ {self.largest:.3g}, λmin ≤ {self.smallest:.3g}, trace "
            f"{self.trace:.3g}, effective dimension {self.effective_dimension:.0f} "
            f"(from {self.products} products)",
            "",
        ]
        for row in table:
            cells = [row[0].ljust(widths[0])]
            cells += [row[i].rjust(widths[i]) for i in range(1, 5)]
            lines.append("  ".join([*cells, row[5]]).rstrip())
        lines += ["", f"choice: {_short(self.method)}", f"because {self.reason}"]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)

    @property
    def _chosen(self) -> str:
        kind = type(self.method).__name__
        sketched = getattr(self.method, "preconditioner", None) is not None
        return kind + (" + Nystroem" if sketched else "")

    def __repr__(self) -> str:
        return f"Plan({self.method!r}, {len(self.options)} options, {self.products} products)"


def plan(
    A: Any,
    /,
    *,
    n_rhs: int,
    damping: float,
    rtol: float = 1e-5,
    budget: int | None = None,
    rng: Any = 0,
) -> Plan:
    """Measure the spectrum of A with at most 20 products, and predict what each method would cost.

    One Lanczos recurrence gives the spectral density. Every Krylov method is then tried on a
    small diagonal problem with that density, in the precision of A: on spectra of networks,
    polynomial, geometric, flat and clustered ones the passes came out within a factor of 2 of
    those on A itself, most within 20 %. Nothing is chosen behind your back: use `plan.method`.

    Args:
        A: a symmetric operator, or anything `as_operator` takes.
        n_rhs: right-hand sides that will be solved together.
        damping: λ ≥ 0, one value.
        rtol: what they will be solved to.
        budget: products that may be spent at most. Where the choice needs more, it becomes
            BlockCG(max_products=budget), which ends with its best iterate.
        rng: seed of the Lanczos vector.

    Raises ValueError for n_rhs or budget < 1, rtol < 0, damping by block; ConvergenceError where
    A returns NaN.
    Cost: min(20, n) products of one column and as many vectors; under a second on the host.

    Source: the density is that of stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017).

    Example:
        >>> import numpy as np, invhvp as ih
        >>> A = ih.Callback(lambda X: np.arange(1.0, 1001.0)[:, None] ** -2 * X, 1000,
        ...     like=np.ones(1), psd=True)
        >>> plan = ih.plan(A, n_rhs=4, damping=1e-3)
        >>> plan.method
        BlockCG(...)
        >>> ih.solve(A, np.ones((1000, 4)), plan.method, damping=1e-3).status[0].name
        'CONVERGED'
    """
    A = as_operator(A)
    value = scalar(as_shift(damping, A), "plan")
    _check(n_rhs, rtol, budget)
    timed = _Timed(A)
    density = spectrum(timed, steps=min(_PRODUCTS, A.shape[0]), probes=1, rng=rng)
    lowest = max(density.smallest, 0.0) if A.psd else density.smallest
    model = ModelSpectrum.of(density, value, psd=A.psd)
    effective = _effective(density, value)
    options = plan_options(A, n_rhs, rtol, model, effective, lowest)
    options = [replace(option, seconds=option.work * timed.seconds) for option in options]
    chosen, reason = _choose(options, A, lowest, value)
    method, notes = chosen.method, _notes(A, density, lowest, value, rtol, model.floor)
    if budget is not None and chosen.products > budget:
        method = BlockCG(rtol=rtol, max_products=budget)
        reason = f"no method meets the budget of {budget} products; this one ends with it"
        notes.append(f"the tolerance needs about {chosen.products} products ({chosen.label})")
    return Plan(
        method=method,
        reason=reason,
        warnings=tuple(notes),
        options=tuple(options),
        largest=density.largest,
        smallest=lowest,
        trace=density.trace.value,
        effective_dimension=effective,
        products=density.products,
        seconds_per_product=timed.seconds,
        n=A.shape[0],
        n_rhs=n_rhs,
        damping=value,
        rtol=rtol,
        budget=budget,
        operator=repr(A),
    )


def _choose(
    options: list[PlanOption], A: LinearOperator, lowest: float, damping: float
) -> tuple[PlanOption, str]:
    n = A.shape[0]
    if lowest + damping <= 0:
        (chosen,) = [option for option in options if option.label == "Minres"]
        return chosen, "A + λI is not positive definite"
    usable = [option for option in options if option.usable and option.label != "Minres"]
    exact = [option for option in usable if option.exact]
    if exact and n <= _SMALL:
        return exact[0], f"{n} parameters are few: factorise"
    if not usable:
        (chosen,) = [option for option in options if option.label == "BlockCG"]
        return chosen, "no method gets there; this one says how far it came"
    # A factorisation serves every later right-hand side: half of its work is an investment.
    chosen = min(usable, key=lambda o: (o.work / 2 if o.exact else o.work, o.passes))
    others = sorted(o.work for o in usable if o is not chosen)
    text = f"with its arithmetic it costs about {chosen.work:,.0f} products"
    if others:
        text += f" and the next best {others[0]:,.0f}"
    if chosen.exact:
        text += "; later right-hand sides are nearly free"
    return chosen, text


def _notes(
    A: LinearOperator, density: Any, lowest: float, damping: float, rtol: float, floor: float
) -> list[str]:
    notes = []
    if lowest + damping <= 0:
        notes.append(
            f"A + λI is indefinite: A has curvature down to {lowest:.3g} or below. Minres finds a "
            f"stationary point of the quadratic model, not a minimum, and has no error bounds; "
            f"raise the damping above {-lowest:.3g} or use a Gauss-Newton operator"
        )
    elif not A.psd and lowest < -10 * density.eps * density.largest:
        notes.append(
            f"A has negative curvature down to {lowest:.3g} or below; 20 products cannot exclude "
            "more, and BlockCG would stop there and name it"
        )
    if floor > rtol:
        notes.append(
            f"{_backend.dtype_name(A.dtype)} cannot reach rtol = {rtol:g} here, but about "
            f"{floor:.0e}; pass a more accurate residual_operator, or raise the damping"
        )
    return notes


def _effective(density: Any, damping: float) -> float:
    if damping > 0:
        return density.effective_dimension(damping).value
    noise = 10 * density.eps * density.largest
    return density.integrate(lambda theta: np.where(theta > noise, 1.0, 0.0)).value


class _Timed(LinearOperator):
    """A with the seconds of its fastest product of one column."""

    def __init__(self, A: LinearOperator) -> None:
        super().__init__(A.shape[0], like=A.like, psd=A.psd, layout=A.layout)
        self.operator = A
        self.seconds = math.inf

    def _matmat(self, X: Array, /) -> Array:
        started = time.perf_counter()
        Y = self.operator._matmat(X)
        _backend.to_host(Y[:1, :1])  # devices work asynchronously: wait for the result
        self.seconds = min(self.seconds, time.perf_counter() - started)
        return Y


def _check(n_rhs: int, rtol: float, budget: int | None) -> None:
    for name, value in (("n_rhs", n_rhs), ("budget", budget)):
        if value is not None and value < 1:
            msg = f"{name} must be at least 1, got {value}"
            raise ValueError(msg)
    if not (rtol >= 0 and math.isfinite(rtol)):
        msg = f"rtol must be finite and not negative, got {rtol}"
        raise ValueError(msg)


def _short(method: Any) -> str:
    """The method with the options that are not its defaults."""
    shown = [
        f"{f.name}={_short(value) if is_dataclass(value) else repr(value)}"
        for f in fields(method)
        if (value := getattr(method, f.name)) != f.default
    ]
    return f"{type(method).__name__}({', '.join(shown)})"


def _count(value: int) -> str:
    return f"{value:,}" if value < 1_000_000 else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.2g} s"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"

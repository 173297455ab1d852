"""The plan: what 20 products say, how well the predictions hold, what is chosen."""

from __future__ import annotations

import numpy as np
import pytest

import invhvp as ih
from invhvp import problems

SPECTRA = {
    "network": (problems.spectrum_network(800), 1e-3),
    "network-large": (problems.spectrum_network(2000), 1e-2),
    "decay": (problems.spectrum_decay(800), 1e-3),
    "slow-decay": (problems.spectrum_decay(800, exponent=1.0), 1e-3),
    "geometric": (problems.spectrum_geometric(600), 1e-3),
    "step": (problems.spectrum_step(800, rank=30), 1e-3),
    "clustered": (problems.spectrum_clustered(800), 1e-1),
    "flat": (np.linspace(1.0, 100.0, 800), 1e-2),
}
LABELS = {
    "BlockCG": ih.BlockCG(),
    "CG": ih.CG(),
    "Minres": ih.Minres(),
}


class Counted:
    def __init__(self, d):
        self.d, self.columns, self.passes = d, 0, 0

    def __call__(self, X):
        self.columns += X.shape[1]
        self.passes += 1
        return self.d[:, None] * X


def diagonal(backend_or_none, d, *, psd=True):
    placed = d if backend_or_none is None else backend_or_none.asarray(d)
    product = Counted(placed)
    return ih.Callback(product, len(d), like=placed[:0], psd=psd), product


@pytest.mark.parametrize("columns", [1, 4, 16])
@pytest.mark.parametrize("name", SPECTRA)
def test_predicted_passes_are_within_a_factor_of_two(name, columns):
    d, damping = SPECTRA[name]
    A, _ = diagonal(None, d)
    plan = ih.plan(A, n_rhs=columns, damping=damping)
    B = np.random.default_rng(9).standard_normal((len(d), columns))
    for option in plan.options:
        if option.label not in LABELS or (columns == 16 and option.label != "BlockCG"):
            continue
        measured = ih.solve(A, B, option.method, damping=damping)
        assert measured.passes / 2 - 1 <= option.passes <= 2 * measured.passes + 1, option.label
        assert measured.products / 2 - columns <= option.products


@pytest.mark.parametrize("name", ["network", "decay", "slow-decay"])
def test_the_sketched_prediction_holds_too(name):
    d, damping = SPECTRA[name]
    A, _ = diagonal(None, d)
    plan = ih.plan(A, n_rhs=4, damping=damping)
    (option,) = [o for o in plan.options if o.label == "BlockCG + Nystroem"] or [None]
    if option is None:
        assert plan.effective_dimension > len(d) / 4
        return
    inverse = option.method.prepare(A, damping=damping)
    measured = inverse.solve(np.random.default_rng(9).standard_normal((len(d), 4)))
    passes = measured.passes + 1
    assert passes / 2 - 1 <= option.passes <= 2 * passes + 1
    assert inverse.products + measured.products <= 2 * option.products


def test_float32_is_predicted_in_float32():
    d, damping = SPECTRA["network"]
    A, _ = diagonal(None, d.astype(np.float32))
    plan = ih.plan(A, n_rhs=4, damping=damping)
    B = np.random.default_rng(9).standard_normal((800, 4)).astype(np.float32)
    (option,) = [o for o in plan.options if o.label == "BlockCG"]
    with pytest.warns(ih.ConvergenceWarning, match="FLOOR"):
        measured = ih.solve(A, B, option.method, damping=damping)
    assert measured.passes / 2 <= option.passes <= 2 * measured.passes
    assert any("float32 cannot reach" in text for text in plan.warnings)
    quiet = ih.plan(A, n_rhs=4, damping=damping, rtol=0.1)
    assert not quiet.warnings


def test_every_backend_spends_twenty_products_and_gets_a_method_that_works(backend):
    d = 2.0 * np.arange(1, 301) ** -2.0
    A, product = diagonal(backend, d)
    rtol = 1e-5 if backend.eps < 1e-10 else 1e-3
    plan = ih.plan(A, n_rhs=3, damping=1e-2, rtol=rtol)
    assert (product.columns, plan.products) == (20, 20)
    assert plan.largest == pytest.approx(2.0, rel=1e-3)
    assert 0 <= plan.smallest < 1e-3
    assert plan.trace == pytest.approx(d.sum(), rel=1e-4)
    assert plan.effective_dimension == pytest.approx(np.sum(d / (d + 1e-2)), rel=0.1)
    assert isinstance(plan.method, ih.BlockCG)
    B = backend.asarray(np.random.default_rng(0).standard_normal((300, 3)))
    solution = ih.solve(A, B, plan.method, damping=1e-2)
    assert set(solution.status) == {ih.Status.CONVERGED}
    assert plan.seconds_per_product > 0


def test_tiny_operators_spend_no_more_products_than_they_have_parameters(backend):
    A, product = diagonal(backend, np.array([3.0, 2.0, 1.0]))
    plan = ih.plan(A, n_rhs=1, damping=0.1, rtol=1e-3)
    assert product.columns == plan.products == 3
    assert isinstance(plan.method, ih.Direct)
    one, _ = diagonal(backend, np.array([3.0]))
    assert isinstance(ih.plan(one, n_rhs=5, damping=0.0, rtol=1e-3).method, ih.Direct)


def test_operators_with_gradients_go_through_their_samples(backend):
    rows = np.random.default_rng(5).standard_normal((20, 900))
    A = ih.RankOneMean(ih.DenseGradients(backend.asarray(rows)))
    plan = ih.plan(A, n_rhs=10, damping=1e-2, rtol=1e-3)
    assert isinstance(plan.method, ih.SampleSpace)
    (option,) = [o for o in plan.options if o.label == "SampleSpace"]
    inverse = plan.method.prepare(A, damping=1e-2)
    solution = inverse.solve(backend.asarray(np.ones((900, 10))))
    assert (option.products, option.passes) == (solution.products, solution.passes)


def test_an_operator_with_an_inverse_of_its_own_uses_it():
    plan = ih.plan(ih.Diagonal(np.geomspace(1e-6, 1.0, 2000)), n_rhs=4, damping=1e-6)
    assert isinstance(plan.method, ih.Direct)
    assert "nearly free" in plan.reason


def test_an_indefinite_operator_gets_minres_and_a_warning(backend):
    d = np.concatenate([np.arange(1, 399) ** -2.0, [-0.1, -0.2]])
    A, product = diagonal(backend, d, psd=False)
    plan = ih.plan(A, n_rhs=2, damping=1e-2, rtol=1e-3)
    assert product.columns <= 20
    assert isinstance(plan.method, ih.Minres)
    assert "indefinite" in plan.warnings[0]
    assert "0.2" in plan.warnings[0]
    assert {o.label for o in plan.options} == {"Direct", "Minres"}
    B = backend.asarray(np.random.default_rng(0).standard_normal((400, 2)))
    solution = ih.solve(A, B, plan.method, damping=1e-2)
    assert set(solution.status) == {ih.Status.CONVERGED}
    enough = ih.plan(A, n_rhs=2, damping=0.5, rtol=1e-3)
    assert isinstance(enough.method, ih.BlockCG)
    assert "negative curvature" in enough.warnings[0]


def test_a_budget_is_kept():
    d, damping = SPECTRA["network"]
    A, _ = diagonal(None, d)
    free = ih.plan(A, n_rhs=16, damping=damping)
    (cost,) = [o.products for o in free.options if o.method == free.method]
    assert ih.plan(A, n_rhs=16, damping=damping, budget=2 * cost).method == free.method
    tight = ih.plan(A, n_rhs=16, damping=damping, budget=100)
    assert tight.method == ih.BlockCG(max_products=100)
    assert any(str(cost) in text for text in tight.warnings)
    B = np.random.default_rng(0).standard_normal((len(d), 16))
    with pytest.warns(ih.ConvergenceWarning, match="MAXITER"):
        assert ih.solve(A, B, tight.method, damping=damping).products <= 100


def test_the_same_seed_gives_the_same_plan_but_for_the_seconds():
    d, damping = SPECTRA["decay"]
    A, _ = diagonal(None, d)
    left, right = (ih.plan(A, n_rhs=4, damping=damping, rng=3) for _ in range(2))
    assert left.method == right.method
    assert [(o.label, o.passes, o.products, o.bytes) for o in left.options] == [
        (o.label, o.passes, o.products, o.bytes) for o in right.options
    ]


def test_it_prints_an_aligned_table():
    d, damping = SPECTRA["network"]
    text = str(ih.plan(diagonal(None, d)[0], n_rhs=16, damping=damping))
    lines = text.splitlines()
    assert "16 right-hand sides" in lines[0]
    assert "from 20 products" in lines[1]
    table = lines[3 : lines.index("", 3)]
    marked = [line for line in table if line.startswith("> ")]
    assert len(marked) == 1
    ends = {line.index(unit) + len(unit) for line, unit in ((table[0], "seconds"),)}
    assert all(line[end - 2 : end] == " s" for line in table[1:] for end in ends)
    assert any(line.startswith("choice: BlockCG(") for line in lines)
    assert any(line.startswith("because ") for line in lines)
    assert max(map(len, lines)) < 160


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"n_rhs": 0}, "n_rhs"),
        ({"budget": 0}, "budget"),
        ({"rtol": -1.0}, "rtol"),
        ({"damping": -1.0}, "damping"),
    ],
)
def test_the_door(options, what):
    with pytest.raises(ValueError, match=what):
        ih.plan(ih.Diagonal(np.ones(3)), **{"n_rhs": 1, "damping": 0.1, **options})


def test_nan_is_named():
    A = ih.Callback(lambda X: X * np.nan, 30, like=np.ones(1))
    with pytest.raises(ih.ConvergenceError, match="NaN"):
        ih.plan(A, n_rhs=1, damping=0.1)

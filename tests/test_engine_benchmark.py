"""The suites about the engine itself: what they write, and that their bookkeeping is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import invhvp as ih

pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks import cases, engine, floor, growth, growth_plan, report, spectrum
from benchmarks.engine_methods import CONTENDERS
from benchmarks.engine_operators import Case, Clocked, operator
from benchmarks.gpu_libraries import Library
from benchmarks.growth_costs import Sizes


def run(suite: str, folder: Path) -> list[dict]:
    assert command.main([suite, "--quick", "--out", str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{suite}.json", f"{suite}.md"]
    content = json.loads((folder / f"{suite}.json").read_text())
    assert content["schema"] == f"{report.SCHEMA}/{suite}"
    assert content["rows"]
    return content["rows"]


def test_floor_writes_its_schema(tmp_path: Path):
    rows = run("floor", tmp_path)
    assert {row["kernel"] for row in rows} == {"limits", *(k.name for k in floor.KERNELS)}
    for row in rows:
        if row["kernel"] == "limits":
            assert min(row["copy"], row["gemm"], row["call"]) > 0
        else:
            assert row["fraction"] == pytest.approx(row["floor_seconds"] / row["seconds"])


def test_engine_writes_its_schema(tmp_path: Path):
    rows = run("engine", tmp_path)
    assert {row["method"] for row in rows} == {contender.name for contender in CONTENDERS}
    for row in rows:
        assert row["own_seconds"] > 0
        assert row["floor_seconds"] > 0
        assert row["transfers"] >= 0
        if row["unit"] != "application":
            assert row["overhead"] == pytest.approx(row["own_seconds"] / row["operator_seconds"])
        if row["library"] == "numpy":  # at least the solution, or the sketch
            assert 1 <= row["temporaries"] < 100
    watched = {"CG", "BlockCG", "Minres"}
    assert {row["transfers"] for row in rows if row["method"] in watched} == {1}  # the look


def test_growth_writes_its_schema(tmp_path: Path):
    pytest.importorskip("torch")
    rows = run("growth", tmp_path)
    fits = [row for row in rows if row["section"] == "fit"]
    points = [row for row in rows if row["section"] == "measured"]
    assert len(points) == 2 * len(fits)
    for row in fits:
        assert math.isfinite(row["exponent"])
    assert any(row["section"] == "paper" for row in rows)


def test_spectrum_writes_its_schema_and_recomputes(tmp_path: Path):
    rows = run("spectrum", tmp_path)
    (case,) = spectrum.QUICK.cases
    values = np.linalg.eigvalsh(case().matrix)
    exact = {row["quantity"]: row["exact"] for row in rows if row["section"] == "estimate"}
    assert exact["λmax"] == pytest.approx(values[-1])
    assert exact["trace"] == pytest.approx(np.trace(case().matrix))
    assert exact["log det, λ = 1e-01"] == pytest.approx(np.sum(np.log(values + 0.1)))
    (plan,) = [row for row in rows if row["section"] == "plan"]
    assert plan["passes"] >= 1
    assert plan["true_residual"] <= 1.01e-5


def test_what_lies_between_two_products_is_the_methods_own():
    A = Clocked(ih.Diagonal(np.geomspace(1.0, 1e-3, 200), psd=True))
    B = np.random.default_rng(0).standard_normal((200, 3))
    with pytest.warns(ih.ConvergenceWarning):
        ih.solve(A, B, ih.CG(rtol=1e-14, maxiter=6), damping=1e-3)
    assert [mark.columns for mark in A.marks[:6]] == [3] * 6
    pairs = A.iterations(3, 5)  # products 2 to 6: four gaps
    assert len(pairs) == 4
    assert all(before.ended <= after.began for before, after in pairs)
    assert [before for before, _ in pairs] == A.marks[1:5]


@pytest.mark.parametrize("kind", ["dense", "synthetic", "network"])
def test_operators_are_positive_semidefinite_with_a_known_size(kind: str):
    A = operator(Library(), Case(kind=kind, n=144, terms=8))
    M = np.asarray(A @ np.eye(144, dtype=np.float32), dtype=np.float64)
    np.testing.assert_allclose(M, M.T, atol=1e-5)
    values = np.linalg.eigvalsh(M)
    assert values[0] >= -1e-5
    assert 0.5 < values[-1] < 20


@pytest.mark.parametrize("row", CONTENDERS, ids=lambda contender: contender.name)
def test_a_floor_grows_with_the_block(row):
    from benchmarks.engine_methods import Sizes as Block

    small = Block(n=1000, k=4, rank=16, columns=64, side=32)
    large = Block(n=2000, k=4, rank=16, columns=64, side=32)
    for less, more in zip(row.floor(small), row.floor(large), strict=True):
        assert more == pytest.approx(2 * less)


def test_memory_is_counted_in_blocks():
    """CG holds at least X, R and P; a method that answers with zeros holds one block."""
    library = Library()
    case = Case(kind="synthetic", n=50_000, k=4, terms=2, rank=8)
    B = library.place(np.ones((50_000, 4)), "float32")
    (cg,) = [contender for contender in CONTENDERS if contender.name == "CG"]
    with pytest.warns(ih.ConvergenceWarning):  # few iterations
        held = engine.temporaries(cg, engine.QUICK, case, library, B)
    assert held is not None
    assert 3 < held < 30
    nothing = type(cg)("nothing", "application", lambda *_: lambda: 0 * B, cg.floor)
    assert engine.temporaries(nothing, engine.QUICK, case, library, B) == pytest.approx(1, abs=0.1)


def test_the_plan_on_paper_is_arithmetic():
    limits = floor.Machine(copy=1e10, gemm=1e11, call=1e-6, itemsize=4)
    assumed = growth_plan.Assumed(width=100, depth=2, N=1000, T=3, k=5, passes=7, subset=10)
    assert assumed.sizes.p == 2 * 100 * 101
    rows = {row["method"]: row for row in growth_plan.on_paper(limits, {}, assumed)}
    hessian = rows["one Hessian pass, all samples"]
    assert hessian["seconds"] == pytest.approx(12 * 20_200 * 1000 * 3 * 5 / 1e11)
    halved = {
        row["method"]: row
        for row in growth_plan.on_paper(limits, {"Hessian product": 0.5}, assumed)
    }
    assert halved["one Hessian pass, all samples"]["seconds"] == pytest.approx(
        2 * hessian["seconds"]
    )
    assert rows["gradients of all samples, as rows"]["memory_bytes"] == 4 * 20_200 * 1000
    assert rows["gradients of all samples, as rows"]["seconds"] is None


def test_fits_find_the_exponent():
    points = [(n, 3e-6 * n**1.5, 1e-6 * n**1.5) for n in (10, 20, 40)]
    fit = growth._fit("made up", "p", "1½", points)
    assert fit["exponent"] == pytest.approx(1.5)
    assert fit["last"] == pytest.approx(1.5)
    assert fit["predicted_over_measured"] == pytest.approx(1.0)


def test_sizes_count_the_parameters_of_the_network():
    torch = pytest.importorskip("torch")
    from benchmarks.growth_costs import network

    sizes = Sizes.square(N=3, k=1, T=2, width=5)
    model, loss, (x, y) = network(sizes)
    assert isinstance(model, torch.nn.Module)
    assert sum(w.numel() for w in model.parameters()) == sizes.p
    assert torch.isfinite(loss(model(x), y))


def test_an_estimate_is_judged_by_the_eigenvalues():
    curvature = cases.network_spectrum(60, k=2)
    exact = spectrum.Exact.of(curvature)
    grid = spectrum.Grid(cases=(), quadratures=((60, 1),), samples=(), dampings=(1e-2,), seeds=1)
    rows = {row["quantity"]: row for row in spectrum._estimates(curvature, exact, grid)}
    assert rows["λmax"]["relative_error"] < 1e-10
    assert rows["λmax"]["products"] == 60
    assert rows["largest |λ|"]["products"] == 6

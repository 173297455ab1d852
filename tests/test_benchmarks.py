"""The benchmark suite: what it writes, and that it believes nobody about accuracy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import invhvp as ih

pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks import cases, forms, methods, network, published, report


@pytest.fixture(autouse=True)
def few_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {dtype: bases[2:5] for dtype, bases in forms.BASES.items()}
    monkeypatch.setattr(forms, "BASES", few)


@pytest.mark.parametrize("suite", ["forms", "methods"])
def test_quick_run_writes_its_schema(
    suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recomputed = []
    original = cases.true_residuals

    def watched(matrix, B, X, damping):
        residuals = original(matrix, B, X, damping)
        recomputed.append(float(np.max(residuals)))
        return residuals

    monkeypatch.setattr(cases, "true_residuals", watched)
    assert command.main([suite, "--quick", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{suite}.json", f"{suite}.md"]
    content = json.loads((tmp_path / f"{suite}.json").read_text())
    assert content["schema"] == f"{report.SCHEMA}/{suite}"
    assert {"date", "machine", "versions", "settings", "rows"} <= set(content)
    assert content["versions"]["numpy"] == np.__version__
    measured = [row for row in content["rows"] if row["true_residual"] is not None]
    assert len(measured) >= 16
    assert {row["true_residual"] for row in measured} <= set(recomputed)
    for row in measured:
        assert row["seconds"] > 0
        assert row["passes"] >= 1
        assert row["said"]
    text = (tmp_path / f"{suite}.md").read_text()
    assert "| BlockCG |" in text
    assert text.strip() == capsys.readouterr().out.strip()


class Liar:
    """Says that zero is the answer, and that it has converged."""

    def prepare(self, A, *, damping):
        return self

    products = 0

    def solve(self, B):
        zeros = np.zeros(B.shape[1])
        codes = np.full(B.shape[1], ih.Status.CONVERGED.code, dtype=np.int8)
        return ih.Solution(
            x=0 * B, status_codes=codes, residual_norms=zeros, relative_residuals=zeros,
            error_bounds=zeros, error_norm="2", iterations=1, products=0, passes=0,
        )  # fmt: skip


def test_a_method_is_not_believed():
    curvature = cases.network_spectrum(30, k=2)
    exact = cases.exact_solution(curvature.matrix, curvature.gradients, 0.1)
    row = methods.measure(Liar(), methods.System(curvature, 0.1, exact))
    assert row["said"] == "CONVERGED"
    assert row["true_residual"] == pytest.approx(1.0)
    assert row["relative_error"] == pytest.approx(1.0)


def test_products_are_counted_at_the_operator():
    curvature = cases.network_spectrum(40, k=3)
    exact = cases.exact_solution(curvature.matrix, curvature.gradients, 0.1)
    row = methods.measure(ih.BlockCG(), methods.System(curvature, 0.1, exact))
    assert row["products"] == row["counted_products"]
    assert "_matmat" not in vars(curvature.operator)


def test_an_error_is_a_row():
    curvature = replace(cases.network_spectrum(20, k=1), operator=ih.Dense(-np.eye(20)))
    row = methods.measure(ih.NystroemSketch(rank=5), methods.System(curvature, 0.1, None))
    assert row["true_residual"] is None
    assert "IndefiniteError" in row["said"]


@pytest.mark.parametrize("form", ["oleary", "breakdown_free"])
def test_published_forms_solve(form: str):
    rng = np.random.default_rng(0)
    A, B = np.diag(np.arange(1.0, 41.0)), rng.standard_normal((40, 3))
    step = published.oleary
    if form == "breakdown_free":
        B[:, 2] = B[:, 0] - B[:, 1]  # what O'Leary's form breaks down on
        basis = published.Basis("svd", 1e-10)

        def step(product, R):
            return published.breakdown_free(product, R, basis=basis)

    outcome = published.drive(
        step, A, B, 0.5, rtol=1e-9, size=40.5, max_passes=100, max_seconds=60.0
    )
    assert outcome.status == "CONVERGED"
    np.testing.assert_allclose(outcome.X, B / (np.diag(A) + 0.5)[:, None], rtol=1e-7, atol=1e-9)


def test_network_curvature_is_the_derivative_of_its_gradient():
    rng = np.random.default_rng(0)
    images, labels = rng.random((12, 5)), np.eye(4)[rng.integers(4, size=12)]
    p = 3 * 6 + 4 * 4
    w, v = rng.standard_normal(p), rng.standard_normal(p)

    def gradient(w):
        return network.unpack(w, 3, images, labels).gradient()

    net = network.unpack(w, 3, images, labels)
    slope = (gradient(w + 1e-5 * v) - gradient(w - 1e-5 * v)) / 2e-5
    np.testing.assert_allclose(net.curvature() @ v, slope, rtol=1e-6, atol=1e-9)
    gauss_newton = net.curvature(gauss_newton=True)
    np.testing.assert_allclose(net.gauss_newton().to_dense(), gauss_newton, atol=1e-13)
    mean = net.gradients().to_dense().mean(axis=0)
    np.testing.assert_allclose(mean, net.gradient(), atol=1e-13)

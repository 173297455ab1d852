"""`python -m benchmarks gauss-newton` believes nobody about accuracy, itself included."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")

from benchmarks import __main__ as command


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.delenv("INVHVP_PYDVL_PYTHON", raising=False)
    assert command.main(["gauss-newton", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gauss-newton.json").read_text())["rows"]
    found = {row["method"]: row for row in rows}
    assert found["SampleSpace, factors kept"]["true_residual"] < 1e-4
    assert found["BlockCG, factors kept"]["true_residual"] < 2e-4
    assert "INVHVP_PYDVL_PYTHON" in found["pyDVL block CG"]["said"]
    assert found["pyDVL block CG"]["seconds"] is None
    assert "÷ fastest" in (tmp_path / "gauss-newton.md").read_text()

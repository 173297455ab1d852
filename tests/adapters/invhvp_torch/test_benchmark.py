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
    assert found["InverseHarmonicMean, factors kept"]["true_residual"] > 0.1
    assert found["scores, SampleSpace"]["scores_error"] < 1e-4
    assert found["scores, InverseHarmonicMean"]["scores_error"] > 0.1
    theirs = [row for name, row in found.items() if "pyDVL" in name]
    assert len(theirs) == 4
    for row in theirs:
        assert "INVHVP_PYDVL_PYTHON" in row["said"]
        assert row["seconds"] is None
    assert "÷ fastest" in (tmp_path / "gauss-newton.md").read_text()

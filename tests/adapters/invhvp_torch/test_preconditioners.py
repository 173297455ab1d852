"""`python -m benchmarks preconditioners` judges residuals itself."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")

from benchmarks import __main__ as command


def test_quick_run(tmp_path):
    assert command.main(["preconditioners", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "preconditioners.json").read_text())["rows"]
    labels = {row["preconditioner"] for row in rows}
    assert labels >= {"none", "Nyström 50", "K-FAC", "EKFAC", "Gauss–Newton"}
    for row in rows:
        assert row["reached"] == (row["true_residual"] <= 1.01 * row["rtol"])
        assert row["passes"] >= 1
        if row["curvature"] == "Gauss–Newton":
            assert row["reached"]
    text = (tmp_path / "preconditioners.md").read_text()
    assert "| EKFAC |" in text

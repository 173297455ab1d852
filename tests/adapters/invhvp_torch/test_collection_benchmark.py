"""`python -m benchmarks collection` judges every contender by the exact scores."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("zarr")

from benchmarks import __main__ as command


def test_quick_run(tmp_path, monkeypatch):
    monkeypatch.delenv("INVHVP_PYDVL_PYTHON", raising=False)
    assert command.main(["collection", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "collection.json").read_text())["rows"]
    found = {row["method"]: row for row in rows}
    assert found["Influence.write, SampleSpace"]["error"] < 1e-4
    assert found["Influence.write, BlockCG"]["error"] < 1e-3
    assert found["SequentialInfluenceCalculator, CG"]["memory"] >= 0
    assert "INVHVP_PYDVL_PYTHON" in found["pyDVL, SequentialInfluenceCalculator, CG"]["said"]
    assert "÷ fastest" in (tmp_path / "collection.md").read_text()

"""The command line itself, and what the doctor says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from invhvp import __main__
from invhvp.__main__ import main
from invhvp_demo import doctor


def test_help_without_a_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "doctor" in printed


def test_doctor_reports_numpy_and_never_fails(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("  numpy   cpu"))
    assert "float32 ok, float64 ok" in line
    assert "TF32" in printed


def test_everything_missing_is_told_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.setattr(doctor, "_version", lambda names: "2.0" if "numpy" in names else None)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for remedy in ("'invhvp[torch]'", "'invhvp[jax]'", "'invhvp[cuda12]' or 'invhvp[cuda13]'"):
        assert f"missing: pip install {remedy}" in printed


def test_broken_backend_is_told(monkeypatch: Any):
    def broken() -> Any:
        msg = "no driver\nand a long story"
        raise RuntimeError(msg)

    monkeypatch.setitem(doctor._DEVICES, "cupy", broken)
    assert list(doctor.backend("cupy")) == ["installed, but unusable: no driver"]


def test_tiny_solve_tells_failures():
    assert doctor.tiny_solve(np.asarray, "float64") == "ok"
    assert "arrays become float32" in doctor.tiny_solve(np.float32, "float64")
    assert doctor.tiny_solve(lambda _: 1 / 0, "float64") == "failed (division by zero)"


def test_missing_demo_package_gives_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    def hidden(name: str) -> Any:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr(__main__.importlib, "import_module", hidden)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 2
    assert "pip install -e" in capsys.readouterr().err

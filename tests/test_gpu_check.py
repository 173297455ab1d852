"""The check for machines with a GPU, on one that has none: it judges, and says what is missing."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.__main__
import invhvp as ih
from benchmarks import gpu_check, gpu_libraries, gpu_measures, report


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("gpu-check")
    code = gpu_check.main(["--device", "cpu", "--quick", "--out", str(folder)])
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["gpu-check-cpu.json", "gpu-check-cpu.md"]
    content = json.loads((folder / names[0]).read_text())
    return code, content, (folder / names[1]).read_text()


def chosen(content: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [row for row in content["rows"] if row["section"] == section]


def test_quick_run_on_the_cpu(result: tuple[int, dict[str, Any], str]):
    code, content, text = result
    assert code == 0
    assert content["schema"] == f"{report.SCHEMA}/gpu-check-cpu"
    assert content["settings"]["gpu"] is None
    assert "nothing here was run on one" in text
    judged = [row for row in content["rows"] if "ok" in row]
    assert all(row["ok"] for row in judged)
    assert f"**0 wrong of {len(judged)} answers.**" in text
    for library in ("numpy", "torch") if ih_torch() else ("numpy",):
        for dtype in ("float32", "float64"):
            rows = [
                row
                for row in chosen(content, "methods")
                if (row["library"], row["dtype"]) == (library, dtype)
            ]
            assert len(rows) == len(gpu_measures.methods(gpu_measures.QUICK, dtype))
            assert all(row["seconds"] > 0 and row["passes"] >= 1 for row in rows)


def ih_torch() -> bool:
    return any(x.name == "torch" for x in gpu_libraries.libraries("cpu")[0])


def test_what_is_missing_is_said_aloud(result: tuple[int, dict[str, Any], str]):
    _, content, text = result
    said = {row["what"]: row["why"] for row in chosen(content, "skipped")}
    assert "cupy" in said
    assert "one memory pool for both" in said
    assert all(f"| {what} |" in text for what in said)


def test_looks_are_counted(result: tuple[int, dict[str, Any], str]):
    _, content, _ = result
    looks = {
        row["method"]: row["transfers_per_iteration"]
        for row in chosen(content, "methods")
        if (row["library"], row["dtype"]) == ("numpy", "float64")
    }
    assert looks["BlockCG"] >= 1
    assert looks["BlockCG, a look every 10"] < 0.6
    assert looks["BlockCG, never a look"] < 0.1


def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Off:
        """Says that everything is well, and is off by a tenth of a percent."""

        def prepare(self, A: Any, *, damping: float) -> Any:
            inverse = ih.SampleSpace().prepare(A, damping=damping)
            true = inverse._solve

            def scaled(B: Any, **options: Any) -> ih.Solution:
                solution = true(B, **options)
                object.__setattr__(solution, "x", solution.x * 1.001)
                return solution

            inverse._solve = scaled
            return inverse

    monkeypatch.setattr(gpu_measures, "methods", lambda size, dtype: {"Off": (Off(), 1e-6)})
    monkeypatch.setattr(gpu_check, "libraries", lambda device: ([gpu_libraries.Library()], []))
    code = gpu_check.main(["--device", "cpu", "--quick", "--out", str(tmp_path)])
    assert code == 1
    text = (tmp_path / "gpu-check-cpu.md").read_text()
    assert "**2 wrong of" in text
    assert "1.0e-3 WRONG" in text


def test_the_expected_answers_are_right():
    library, size = gpu_libraries.Library(), gpu_measures.QUICK
    found = gpu_measures.system(library, size, "float64")
    A = found.G.T @ found.G / size.N
    damping = gpu_measures.DAMPING
    np.testing.assert_allclose(
        found.exact, np.linalg.solve(A + damping * np.eye(size.p), found.B), rtol=1e-8, atol=1e-8
    )
    mean = np.zeros_like(found.B)
    for g in found.G:
        mean += (found.B - np.outer(g, g @ found.B) / (damping + g @ g)) / damping / size.N
    np.testing.assert_allclose(found.harmonic, mean, rtol=1e-9, atol=1e-9)


def test_an_empty_budget_skips_aloud(monkeypatch: pytest.MonkeyPatch):
    rows = list(gpu_check.rows("cpu", gpu_measures.QUICK, budget=0.0))
    skipped = [row for row in rows if row["section"] == "skipped"]
    assert any("float64" in row["what"] and row["why"] == "out of time" for row in skipped)
    assert {row["section"] for row in rows} == {"ceilings", "skipped"}


def fake(available: bool) -> Any:
    module: Any = types.ModuleType("fake")
    module.cuda = types.SimpleNamespace(is_available=lambda: available)
    module.__version__ = "0"
    return module


@pytest.mark.parametrize(
    ("cupy", "torch", "device", "expected"),
    [
        (True, None, "cuda", ["numpy", "cupy"]),
        (True, True, "cuda", ["numpy", "cupy", "torch"]),
        (None, True, "cuda", ["numpy", "torch"]),
        (False, False, "cuda", ["numpy"]),
        (None, None, "cpu", ["numpy"]),
        (True, False, "cpu", ["numpy", "torch"]),
    ],
)
def test_environments(
    cupy: bool | None, torch: bool | None, device: str, expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    for name, available in (("cupy", cupy), ("torch", torch)):
        module = None if available is None else fake(available)
        monkeypatch.setitem(sys.modules, name, module)
    found, missing = gpu_libraries.libraries(device)
    assert [library.name for library in found] == expected
    assert {name for name, _ in missing} == {"cupy", "torch"} - set(expected)
    assert all(why for _, why in missing)


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "torch", fake(available=False))
    assert gpu_check.main(["--quick"]) == 2
    assert benchmarks.__main__.main(["gpu", "--quick"]) == 2  # the same by the suites' door
    said = capsys.readouterr().err
    assert "cupy: not installed" in said
    assert "torch: sees no CUDA device" in said
    assert "--device cpu" in said


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path: Path):
    if not any(library.on_gpu for library in gpu_libraries.libraries("cuda")[0]):
        pytest.skip("no CUDA device for CuPy or PyTorch")
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "gpu-check-cuda.json").read_text())["rows"]
    assert any(row["section"] == "methods" and row["library"] != "numpy" for row in rows)

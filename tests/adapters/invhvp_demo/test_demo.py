"""The main job from the command line, and the files that it leaves."""

from __future__ import annotations

import csv
import html.parser
import json
import math
from pathlib import Path
from typing import Any

import pytest

from invhvp.__main__ import main
from invhvp_demo import data, demo, files, methods, network

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

TABLES = ("methods", "training_images", "test_images", "leave_one_out", "convergence")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "report"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    text = (out / "results.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def test_answers_are_right(results: dict[str, Any]):
    assert results["passed"]
    assert results["leave_one_out"]["pearson"] >= 0.99
    assert abs(results["leave_one_out"]["slope"] - 1) < 0.1
    assert 0.5 < results["lds"]["interval"][0] <= results["lds"]["score"] <= 1
    assert results["model"]["test_accuracy"] > 0.85
    assert results["model"]["gradient_norm"] <= 1e-11
    exact = results["methods"][0]
    assert exact["label"] == "Direct"
    assert exact["residual"] < 1e-13
    assert exact["mislabel_auc"] > 0.95


def test_every_method_is_in_the_table(results: dict[str, Any]):
    labels = [row["label"] for row in results["methods"]]
    assert labels == [row.label for row in methods.available()]
    assert {"Direct", "CG", "BlockCG", "SampleSpace"} <= set(labels)
    iterative = [m for m in results["methods"] if m["label"] in ("CG", "BlockCG")]
    assert all(m["residual"] <= methods.RTOL and m["error"] < 0.02 for m in iterative)
    assert all(m["products"] > 0 and math.isfinite(m["mislabel_auc"]) for m in results["methods"])


def test_schema(results: dict[str, Any]):
    assert results["schema"] == "invhvp-demo/1"
    assert results["network"] == {"missing": "left out by --quick"}
    n = results["settings"]["n_train"]
    assert len(results["training_images"]) == n
    assert sum(row["flipped"] for row in results["training_images"]) == n // 10
    assert len(results["leave_one_out"]["points"]) == 20
    assert [t["index"] for t in results["test_images"]]
    assert all(len(t["helpful"]) == len(t["harmful_scores"]) for t in results["test_images"])


def test_files_are_complete(out: Path, results: dict[str, Any]):
    names = {path.name for path in out.iterdir()}
    assert {"index.html", "results.json", *(f"{name}.csv" for name in TABLES)} <= names
    assert not [name for name in names if name.startswith(".")]
    for name in TABLES:
        with (out / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) > 1
    pictures = [name for name in names if name.endswith(".png")]
    assert len(pictures) >= 5
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_page_needs_nothing_else(out: Path):
    class Page(html.parser.HTMLParser):
        images, open_tags = 0, []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "img":
                Page.images += 1
                assert (dict(attrs)["src"] or "").startswith("data:image/png;base64,")
                assert dict(attrs)["alt"]
            if tag not in ("img", "meta"):
                Page.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert Page.open_tags.pop() == tag

    text = (out / "index.html").read_text(encoding="utf-8")
    Page().feed(text.replace("<!doctype html>", ""))
    assert Page.images >= 5
    assert not Page.open_tags
    assert "http" not in text


def test_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    pytest.importorskip("torch")
    monkeypatch.setattr(demo, "_QUICK", {**demo._QUICK, "n_train": 300, "retrainings": 10})
    monkeypatch.setattr(methods, "ROWS", methods.ROWS[:1])
    code = main(["demo", "--quick", "--backend", "torch", "--out", str(tmp_path / "torch")])
    printed = capsys.readouterr().out
    assert code == 0
    for heading in ("fit s", "solve s", "products", "true residual", "mislabel AUC", "precision@"):
        assert heading in printed
    assert "Pearson r = 0.99" in printed
    assert "logistic regression on torch" in printed


def test_contradicted_by_retraining_is_exit_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    from invhvp_demo import report

    monkeypatch.setattr(demo, "_QUICK", {**demo._QUICK, "n_train": 300, "retrainings": 10})
    monkeypatch.setattr(methods, "ROWS", methods.ROWS[:1])
    monkeypatch.setattr(report, "PASSING_R", 1.1)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    assert "below 1.1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sklearn.datasets", "matplotlib", "tqdm"])
def test_missing_package_gives_the_remedy(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    found = data.importlib.import_module

    def hidden(wanted: str, *rest: Any) -> Any:
        if wanted == name:
            raise ModuleNotFoundError(name=name)
        return found(wanted, *rest)

    monkeypatch.setattr(data.importlib, "import_module", hidden)
    assert main(["demo", "--out", str(tmp_path / "nothing")]) == 2
    assert "pip install 'invhvp[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "cuda:0"), "NumPy computes on the cpu"),
        (("--backend", "torch", "--device", "nowhere"), "torch cannot use the device 'nowhere'"),
    ],
)
def test_impossible_device_is_named(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
):
    if "torch" in options:
        pytest.importorskip("torch")
    assert main(["demo", *options]) == 2
    assert words in capsys.readouterr().err


def test_network_finds_wrong_labels():
    pytest.importorskip("torch")
    net = network.study(data.load(400))
    assert net.auc > 0.95
    assert net.test_auc > 0.9
    assert net.status == "CONVERGED"
    assert net.damping >= network.L2


def test_data_are_the_same_every_time():
    first, second = data.load(200), data.load(200)
    assert (first.given == second.given).all()
    assert first.wrong.sum() == 20
    assert set(first.given) == set(range(10))


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "file.txt"
    files.write(path, "old")

    def broken(*_: Any) -> None:
        raise OSError

    monkeypatch.setattr(files.os, "replace", broken)
    with pytest.raises(OSError):
        files.write(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]

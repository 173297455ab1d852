"""The benchmark suite: what it writes, and that it believes nobody about accuracy."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import invhvp as ih

pytest.importorskip("sklearn")

from benchmarks import __main__ as command
from benchmarks import (
    cases,
    damping_path,
    forms,
    gauss_newton,
    hessian_products,
    keeping,
    methods,
    network,
    peers,
    preconditioners,
    published,
    readme,
    report,
)


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


FAKES = ("one", "two", "three")


def fake(monkeypatch: pytest.MonkeyPatch, rows) -> None:
    """A suite `methods` of three cases, whose rows these are."""

    @dataclass(frozen=True)
    class Grid:
        cases: tuple[str, ...] = FAKES
        max_seconds: float = 60.0
        rounds: int = 2

    def measured(grid: Grid):
        for case in grid.cases:
            yield from rows(case)

    suite = SimpleNamespace(
        QUICK=Grid(), FULL=Grid(), rows=measured,
        markdown=lambda rows: "cases: " + ", ".join(row["case"] for row in rows),
    )  # fmt: skip
    monkeypatch.setitem(command.SUITES, "methods", suite)


def saved(folder: Path) -> dict:
    return json.loads((folder / "methods.json").read_text(encoding="utf-8"))


def test_every_case_is_saved_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = []

    def rows(case: str):
        if case != "one":
            there.append([row["case"] for row in saved(tmp_path)["rows"]])
        yield {"case": case, "value": 1}

    fake(monkeypatch, rows)
    assert command.main(["methods", "--quick", "--out", str(tmp_path)]) == 0
    assert there == [["one"], ["one", "two"]]
    assert [row["case"] for row in saved(tmp_path)["rows"]] == list(FAKES)


def test_a_case_that_fails_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def rows(case: str):
        yield {"case": case, "value": 2}
        if case == "two":
            raise ValueError("an indefinite matrix")
        yield {"case": case, "value": 3}

    fake(monkeypatch, rows)
    assert command.main(["methods", "--quick", "--out", str(tmp_path)]) == 1
    assert "'two' failed: ValueError: an indefinite matrix" in capsys.readouterr().err
    found = [(row["case"], row["value"]) for row in saved(tmp_path)["rows"]]
    assert found == [("one", 2), ("one", 3), ("three", 2), ("three", 3), ("two", 2)]


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_saves_what_there_is(
    signal_: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
):  # fmt: skip
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []
    # A shell lets what it starts in the background ignore SIGINT, and Python keeps to that.
    at_first = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, at_first))

    def rows(case: str, stop: str = ""):
        try:
            yield {"case": case, "stop": stop}
            if case == stop:
                os.kill(os.getpid(), signal_)
                time.sleep(5)
            yield {"case": case, "stop": stop}
        finally:
            cleaned.append(case)

    fake(monkeypatch, partial(rows, stop="two"))
    arguments = ["methods", "--quick", "--out", str(tmp_path)]
    assert command.main(arguments) == code
    assert cleaned == ["one", "two"]
    error = capsys.readouterr().err
    assert error == f"benchmarks: interrupted; measured: 3 rows, saved in {tmp_path}\n"
    assert [row["case"] for row in saved(tmp_path)["rows"]] == ["one", "one", "two"]
    assert signal.getsignal(signal.SIGTERM) == before
    fake(monkeypatch, rows)
    assert command.main(arguments) == 0
    fake(monkeypatch, partial(rows, stop="three"))
    assert command.main(arguments) == code  # half a case does not replace a whole one
    found = [(row["case"], row["stop"]) for row in saved(tmp_path)["rows"]]
    assert found == [("three", "")] * 2 + [("one", "three")] * 2 + [("two", "three")] * 2


def test_rows_keep_their_circumstances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake(monkeypatch, lambda case: [{"case": case}])
    arguments = ["methods", "--quick", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    content = saved(tmp_path)
    own = content["rows"][0]["circumstances"]
    assert own["max_seconds"] == 60.0
    assert own["rounds"] == 2
    assert own["versions"]["numpy"] == np.__version__
    assert own["processor"] == content["machine"]["processor"]
    for row in content["rows"]:  # an older file has what it says at its head alone
        del row["circumstances"]
    content["date"], content["versions"]["numpy"] = "2020-02-03", "1.26.0"
    content["machine"]["threads"] = {"OMP_NUM_THREADS": "77"}
    (tmp_path / "methods.json").write_text(json.dumps(content))
    assert command.main([*arguments, "--case", "two", "--cap", "5"]) == 0
    content = saved(tmp_path)
    found = {row["case"]: row["circumstances"] for row in content["rows"]}
    assert list(found) == ["one", "three", "two"]
    assert found["one"]["date"] == found["three"]["date"] == "2020-02-03"
    assert found["one"]["versions"]["numpy"] == "1.26.0"
    assert found["one"]["max_seconds"] == 60.0
    assert found["two"]["max_seconds"] == 5.0
    assert found["two"]["versions"]["numpy"] == np.__version__
    assert content["settings"] == {"quick": True, "max_seconds": None, "rounds": 2}
    assert content["versions"]["numpy"] is None
    assert content["machine"]["threads"] is None
    text = (tmp_path / "methods.md").read_text()
    assert f"2020-02-03 to {found['two']['date']}, " in text
    assert "several settings of threads" in text
    assert "- one: 2020-02-03, cap 60 s, numpy 1.26.0" in text
    assert f"- two: {found['two']['date']}, cap 5 s, numpy {np.__version__}" in text
    assert command.main(arguments) == 0
    assert "Not all cases" not in (tmp_path / "methods.md").read_text()


def test_published_rows_take_the_circumstances_of_their_file():
    content = keeping.earlier(report.RESULTS, "methods")
    assert content is not None
    row = content["rows"][0]["circumstances"]
    assert row["versions"]["numpy"]
    assert row["max_seconds"] > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ('{"schema": "invhvp-benchmarks/0/methods", "rows": []}', "invhvp-benchmarks/0/methods"),
        ("[]", "has the schema None"),
    ],
)
def test_results_are_checked_before_measuring(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    fake(monkeypatch, lambda case: pytest.fail("measured"))
    (tmp_path / "methods.json").write_text(text)
    for out in (tmp_path, tmp_path / "methods.json"):
        with pytest.raises(SystemExit) as stopped:
            command.main(["methods", "--quick", "--out", str(out)])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert (said if out == tmp_path else "is not a folder that can be written to") in error
        assert "--out" in error
    assert (tmp_path / "methods.json").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "0"], "--k: '0' is given; an integer of at least 1"),
        (["--k", "2", "1.5"], "--k: '1.5' is given"),
        (["--damping", "-1"], "--damping: '-1' is given; a finite number of at least 0"),
        (["--damping", "nan"], "--damping: 'nan' is given"),
        (["--cap", "0"], "--cap: '0' is given; a finite number of seconds above 0"),
        (["--cap", "inf"], "--cap: 'inf' is given"),
        (["--cap", "long"], "--cap: 'long' is given"),
    ],
)
def test_numbers_are_checked_at_the_door(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--quick", *arguments])  # of the peers, where no suite is named
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def rows(case: str):
        raise ModuleNotFoundError("No module named 'torch'")
        yield

    fake(monkeypatch, rows)
    assert command.main(["methods", "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No module named 'torch'; the benchmarks need more" in error
    assert 'pip install -e ".[bench]"' in error


def test_the_readme_is_not_written_when_help_is_asked(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("invhvp.plots")
    from benchmarks import plots, readme

    before = readme.README.stat().st_mtime_ns
    for module in (readme, plots):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0
        assert "usage" in capsys.readouterr().out
    assert readme.README.stat().st_mtime_ns == before


def test_an_interpreter_that_is_not_there_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("INVHVP_PYDVL_PYTHON", "/no/such/python")
    case = peers.Case(network="logreg", n_train=50, damping=0.1, k=1)
    (row,) = peers.rows(peers.Grid(cases=(case,), peers=("pyDVL",)))
    assert row["library"] == "pyDVL"
    assert "/no/such/python cannot be started: No such file" in row["failed"]
    assert "INVHVP_PYDVL_PYTHON" in row["failed"]
    assert row["case"].startswith("logreg, p = 650, N = 50")


def test_a_case_that_cannot_be_judged_is_a_row(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    from benchmarks.peers import judge

    def singular(*_):
        raise np.linalg.LinAlgError("matrix is singular")

    monkeypatch.setattr(judge, "Judge", singular)
    cases = [peers.Case(network="logreg", n_train=50, k=k) for k in (1, 10**6)]
    one, two = peers.rows(peers.Grid(cases=tuple(cases), peers=()))
    assert one["failed"] == "matrix is singular"
    assert "1000000 right-hand sides are asked of 1" in two["failed"]
    assert "matrix is singular" in peers.markdown([one, two])


def worker() -> Any:
    """peers/worker.py as its interpreter has it."""
    return importlib.import_module("benchmarks.peers.worker")


def contend(contender, tmp_path: Path, cap: float) -> dict:
    side = SimpleNamespace(CONTENDERS={"m": contender}, __name__="fake_side")
    problem = SimpleNamespace(tiny=lambda: None, n_parameters=10**9)
    return worker().forked(side, problem, "m", tmp_path, cap)


def busy(seconds: float) -> int:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return 0


def test_the_cap_is_of_fit_and_solve_alone(tmp_path: Path):
    pytest.importorskip("torch")
    slow = contend(lambda p: lambda: busy(60.0 if p else 0.0), tmp_path, 0.2)
    assert slow == {"name": "m", "failed": "over the cap of 0.2 s"}
    over = contend(lambda p: lambda: busy(0.3 if p else 0.0), tmp_path, 0.2)
    assert over["failed"] == "over the cap of 0.2 s"  # in the kernel's whole seconds it is not
    within = contend(lambda p: lambda: busy(0.0 if p else 1.5), tmp_path, 1.0)
    assert within["fit"] + within["solve"] <= 1.0  # warming up took longer, and does not count


def test_what_kills_is_told_apart(tmp_path: Path):
    pytest.importorskip("torch")
    killed = contend(lambda p: lambda: p and os.kill(os.getpid(), signal.SIGKILL), tmp_path, 5.0)
    assert killed["failed"] == "killed (out of memory?)"
    crashed = contend(lambda p: lambda: p and os.kill(os.getpid(), signal.SIGUSR1), tmp_path, 5.0)
    assert crashed["failed"] == f"died of signal {signal.SIGUSR1.value}"
    assert worker().how_it_ended(signal.SIGKILL, 2.0, waited=True).startswith("did not end in 80 s")


def test_versions_are_those_of_the_interpreter_of_a_row():
    torch = pytest.importorskip("torch")
    found = worker().versions("torch_side")
    assert found == {"torch": torch.__version__}
    assert list(worker().versions("ours_side")) == ["invhvp", "torch"]
    timed = {"fit": 1.0, "solve": 2.0, "wall": 3.0, "peak_mib": 4.0, "with": found}
    assert peers._merged([timed])["with"] == found
    assert peers._merged([{"failed": "no", "with": found}]) == {"failed": "no", "with": found}
    rows = [
        {"library": "pyDVL", "with": {"pydvl": "0.10.0", "torch": "2.6"}},
        {"library": "pyDVL", "with": {"pydvl": "0.10.0", "torch": "2.7"}},
        {"library": "torch", "with": {"torch": "2.9"}},
        {"library": "dattri", "failed": "no"},
    ]
    assert keeping._libraries(rows) == (
        "Ran: pyDVL 0.10.0 with torch 2.6 or 0.10.0 with torch 2.7; torch 2.9."
    )


def test_workers_end_with_the_run(tmp_path: Path):
    """An interrupt ends the worker and what it has forked."""
    forks = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    written = tmp_path / "pid"

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            peers._output([sys.executable, "-c", forks, str(written)], dict(os.environ), tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pid = int(written.read_text())
    for _ in range(100):  # init may take a moment to reap it
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the forked child is still there")


def test_the_readme_says_which_products_were_lost():
    def row(k, method, seconds):
        return {"case": "cnn, p = 9, float32", "k": k, "method": method, "seconds": seconds}

    won = [row(1, "invhvp", 1.0), row(1, "curvlinops", 2.0), row(1, "pyDVL", None)]
    assert hessian_products.sentence(won).endswith("(1 networks; 1 vector) none was lost")
    said = hessian_products.sentence([*won, row(16, "invhvp", 2.0), row(16, "pyDVL", 1.0)])
    assert "Of 2 comparisons with pyDVL and curvlinops (1 networks; 1 and 16 vectors)" in said
    assert said.endswith("1 was lost (cnn, 16 at once, to pyDVL: 0.5 ×)")


def test_the_readme_says_what_solutions_cost():
    def row(method, seconds, residual=None):
        return {
            "case": "net, p = 3", "damping": 0.01, "method": method, "said": "CONVERGED",
            "seconds": seconds, "processor_seconds": seconds, "true_residual": residual,
        }  # fmt: skip

    found = [
        row("SampleSpace, factors kept", 0.5, 5e-6), row("pyDVL block CG", 29.0, 2.8),
        row("scores, SampleSpace", 0.125), row("scores, pyDVL block CG", 31.0),
    ]  # fmt: skip
    said = gauss_newton.paragraph(found)
    assert "took 0.5 s, to a true residual of 5e-06; pyDVL's block CG took 29 s" in said
    assert said.endswith("took 0.12 s, against 31 s")
    with pytest.raises(ValueError, match="no row of pyDVL to compare with"):
        gauss_newton.paragraph([found[0], row("pyDVL block CG", None), *found[2:]])


def test_the_readme_says_which_preconditioner_has_the_fewest_passes():
    def row(name, rtol, passes, reached=True):
        where = {"case": "net", "curvature": "Hessian", "damping": 0.01, "preconditioner": name}
        return {**where, "rtol": rtol, "passes": passes, "reached": reached}

    found = [
        row("none", 1e-3, 8), row("none", 1e-6, 12), row("EKFAC", 1e-3, 5),
        row("EKFAC", 1e-6, 6), row("K-FAC", 1e-3, 3), row("K-FAC", 1e-6, 99, reached=False),
        {**row("none", 1e-3, 1), "damping": 0.1},
    ]  # fmt: skip
    assert preconditioners.summary(found).splitlines() == [
        "|  | none | EKFAC | K-FAC |",
        "| --- | --- | --- | --- |",
        "| Hessian, net | 8 / 12 | **5 / 6** | 3 / – |",
    ]


def test_the_readme_says_what_many_dampings_took():
    rows = [{"dampings": [1.0, 0.1, 0.01], "ratio": ratio} for ratio in (1.26, 1.04, 1.1)]
    said = damping_path.sentence(rows)
    assert said == "3 λ took 1 to 1.3 times as long as the smallest one alone"
    assert "took 1.3 times" in damping_path.sentence(rows[:1])


def test_the_readme_compares_forms_where_both_solve():
    def row(case, dtype, form, passes, seconds, outcome="reached"):
        return {
            "case": case, "dtype": dtype, "form": form, "rhs": "gradients", "damping": 0.1,
            "passes": passes, "seconds": seconds, "outcome": outcome,
        }  # fmt: skip

    found = []
    for dtype, passes in (("float64", 5), ("float32", 10)):
        found += [
            row("net", dtype, "BlockCG", passes, 0.2),
            row("net", dtype, "Ji & Li (best)", 15, 0.1, "floor"),
            row("net", dtype, "O'Leary", 1, 0.1, "reached" if passes == 5 else "missed"),
            row("net", dtype, "CG", 20, 0.3),
        ]
    head, _, *lines = readme.forms_table(found).splitlines()
    assert head.startswith("| 16 right-hand sides, 2 systems ¹ | `BlockCG` | Ji & Li (2017)")
    assert [line.split(" | ")[1:] for line in lines[:3]] == [
        ["2", "2", "1", "2 |"],
        ["1 / 1", "3 / 1.5", "0.2 / –", "4 / 2 |"],
        ["1", "0.5", "0.5", "1.5 |"],
    ]

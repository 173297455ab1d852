"""The migration table, row by row; and pyDVL itself, where there is an interpreter with it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess

import pytest
import torch

from tests.test_readme import ROOT, python_blocks

PAGE = ROOT / "docs" / "migrating-from-pydvl.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$")
INTERPRETER = os.environ.get("INVHVP_PYDVL_PYTHON")
NEEDS_PYDVL = pytest.mark.skipif(
    not INTERPRETER, reason="INVHVP_PYDVL_PYTHON names no interpreter with pyDVL 0.10"
)


def table() -> list[tuple[str, str, str]]:
    """Module, name and what stands for it, of every row."""
    module, rows = "", []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            module = line.removeprefix("## ")
        elif (found := ROW.match(line)) is not None:
            rows.append((module, *found.groups()))
    return rows


TABLE = table()


@pytest.fixture(scope="module")
def session():
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _, source in python_blocks(PAGE):
            exec(source, names)
    return names


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}.{row[1]}")
def test_every_row_runs(row, session):
    _, _, here = row
    if here.startswith("not needed, because "):
        return
    code = here.removeprefix("`").removesuffix("`")
    if "invhvp_dask" in code:
        if importlib.util.find_spec("dask") is None:
            pytest.skip("dask is not installed")
        session["invhvp_dask"] = importlib.import_module("invhvp_dask")
    assert eval(code, session) is not None


def test_what_stands_for_a_function_has_its_values(session):
    """The rows that compute something, against autograd on the one-layer model of the page."""
    rows = {(module.rpartition(".")[2], name): here for module, name, here in TABLE}

    def value(module, name):
        return eval(rows[module, name].strip("`"), session)

    model, x, y, v = (session[name] for name in ("model", "x", "y", "v"))
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def losses(t):
        out = x @ t[:6].reshape(2, 3).T + t[6:]
        return torch.nn.functional.cross_entropy(out, y, reduction="none")

    H = torch.autograd.functional.hessian(lambda t: losses(t).mean(), theta)
    G = torch.autograd.functional.jacobian(losses, theta)
    expected = {
        ("functional", "hvp"): H @ v,
        ("functional", "hessian"): H,
        ("functional", "gauss_newton"): G.T @ G / 20,
        ("functional", "create_per_sample_gradient_function"): G,
        ("functional", "create_matrix_jacobian_product_function"): G @ v,
        ("functional", "create_per_sample_loss_function"): losses(theta),
        ("util", "get_model_parameters"): theta,
        ("operator", "HessianOperator"): H @ v,
        ("operator", "GaussNewtonOperator"): G.T @ G @ v / 20,
        ("operator", "DirectSolveOperator"): v / 1.1,
        ("operator", "CgOperator"): torch.linalg.solve(G.T @ G / 20 + 0.1 * torch.eye(8), v),
    }
    for key, right in expected.items():
        torch.testing.assert_close(value(*key), right, atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------- against pyDVL

_NAMES = """
import importlib, inspect, json, warnings
warnings.simplefilter("ignore")
parts = ("functional", "util", "operator", "preconditioner")
modules = ["pydvl.influence", "pydvl.influence.torch"]
modules += [f"pydvl.influence.torch.{part}" for part in parts]
found = {}
for name in modules:
    module = importlib.import_module(name)
    own = set(getattr(module, "__all__", ()))
    package = hasattr(module, "__path__")
    for key, value in vars(module).items():
        home = getattr(value, "__module__", "") or ""
        inside = home.startswith("pydvl.influence") if package else home == name
        if inside and not key.startswith("_") and not inspect.ismodule(value):
            own.add(key)
    found[name] = sorted(own)
print(json.dumps(found))
"""
_TYPES = {"PreconditionerType", "OperatorType"}  # type variables


@NEEDS_PYDVL
def test_the_table_has_every_public_name():
    assert INTERPRETER
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [INTERPRETER, "-c", _NAMES], capture_output=True, text=True, env=environment, check=True
    )
    there = json.loads(done.stdout.strip().splitlines()[-1])
    mine = {(module, name) for module, name, _ in TABLE}
    missing = [
        f"{module}.{name}"
        for module, names in there.items()
        for name in names
        if (module, name) not in mine and name not in _TYPES
    ]
    assert not missing


@NEEDS_PYDVL
def test_numbers_agree_where_pydvl_is_right_and_are_nearer_where_it_is_not():
    from benchmarks import pydvl_differences

    for row in pydvl_differences.measure():
        assert row["ours"] < 1e-2, row
        if row["why"]:
            assert row["pydvl"] is None or row["pydvl"] > 20 * row["ours"], row
        else:
            assert row["pydvl"] < 1e-3, row


def test_our_side_of_the_comparison_is_near_the_exact_answer(monkeypatch):
    from benchmarks import pydvl_differences

    monkeypatch.delenv("INVHVP_PYDVL_PYTHON", raising=False)
    chosen = [row for row in pydvl_differences.ROWS if "LiSSA" not in row.what]
    monkeypatch.setattr(pydvl_differences, "ROWS", chosen)
    for row in pydvl_differences.measure():
        assert row["ours"] < 1e-5, row
        assert "INVHVP_PYDVL_PYTHON" in row["said"]

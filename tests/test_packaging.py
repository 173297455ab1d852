"""What an installed `invhvp` promises before anything is computed."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import invhvp

FRAMEWORKS = ("torch", "jax", "cupy", "cupyx", "dask", "zarr", "matplotlib", "sklearn", "tqdm")


def test_import_loads_no_framework():
    code = f"import sys, invhvp; print(*(m for m in {FRAMEWORKS!r} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def public_names() -> list[str]:
    """`__all__`, or else what the package binds for its users: everything but submodules."""
    named = [n for n, x in vars(invhvp).items() if n[0] != "_" and not inspect.ismodule(x)]
    return list(getattr(invhvp, "__all__", named))


def test_public_names_resolve():
    assert {"solve", "BlockCG", "Solution", "as_operator"} <= set(public_names())
    missing = [name for name in public_names() if not hasattr(invhvp, name)]
    assert missing == []
    assert len(set(public_names())) == len(public_names())
    assert isinstance(invhvp.__version__, str)


def test_public_names_are_documented():
    public = [getattr(invhvp, name) for name in public_names()]
    bare = [x.__name__ for x in public if callable(x) and not (x.__doc__ or "").strip()]
    assert bare == []


@pytest.mark.parametrize(
    "package", ["invhvp", "invhvp_torch", "invhvp_jax", "invhvp_dask", "invhvp_demo"]
)
def test_types_are_shipped(package: str):
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    assert any((folder / "py.typed").is_file() for folder in folders)

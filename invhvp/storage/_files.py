"""A folder of two files that is either complete or not there, and is believed only if whole."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "invhvp-state/1"
DESCRIPTION, TENSORS = "state.json", "state.safetensors"
_BLOCK = 1 << 22


class StateError(ValueError):
    """A saved state that is damaged, incomplete, or not the one that was asked for."""


def write(path: Path, state: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the folder under a temporary name, flush it to the disk, then rename it.

    Raises FileExistsError where `path` is something else than such a folder.
    """
    save_file = _safetensors("save_file")
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fresh.mkdir()
    try:
        save_file(dict(tensors), fresh / TENSORS)
        size, checksum = _measure(fresh / TENSORS)
        content = {
            "schema": SCHEMA,
            **state,
            "tensors": {"file": TENSORS, "bytes": size, "sha256": checksum},
        }
        content["checksum"] = _checksum(content)
        text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
        (fresh / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        for name in (TENSORS, DESCRIPTION, "."):
            _flush(fresh / name)
        _replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The description and the tensors, after every check of their integrity.

    Raises FileNotFoundError where there is none, StateError where it is damaged.
    """
    load_file = _safetensors("load_file")
    state = _description(path)
    stated = state["tensors"]
    file = path / TENSORS
    if not file.is_file():
        raise StateError(f"{path} has no {TENSORS}: it is incomplete")
    size = file.stat().st_size
    if size != stated["bytes"]:
        msg = f"{file} has {size} bytes, {DESCRIPTION} says {stated['bytes']}: it is truncated"
        raise StateError(msg)
    if _measure(file)[1] != stated["sha256"]:
        msg = f"{file} does not have the checksum that {DESCRIPTION} says: it was changed"
        raise StateError(msg)
    return state, load_file(file)


def _description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not file.is_file():
        hint = ""
        if _previous(path).is_dir():
            hint = (
                f"; a save was interrupted: what was there before it is {_previous(path)}, "
                "rename it back"
            )
        msg = f"there is no saved inverse at {path}: {DESCRIPTION} is missing{hint}"
        raise FileNotFoundError(msg)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StateError(f"{file} is not whole JSON, it is damaged: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        msg = (
            f"{file} has the schema {found!r}, this version of invhvp reads {SCHEMA!r}: load it "
            "with the version that wrote it"
        )
        raise StateError(msg)
    if content.pop("checksum", None) != _checksum(content):
        raise StateError(f"{file} does not have the checksum that it says: it was changed")
    return content


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _measure(file: Path) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    # An empty folder may have been made for the purpose; anything else is somebody's work.
    ours = path.is_dir() and {x.name for x in path.iterdir()} <= {DESCRIPTION, TENSORS}
    if not ours:
        msg = f"{path} exists and is not a saved inverse: choose another path"
        raise FileExistsError(msg)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _replace(fresh: Path, path: Path) -> None:
    """Rename `fresh` to `path`; what was there is kept aside until the new one is."""
    old = _previous(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _safetensors(name: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        msg = 'saved state needs the package safetensors: pip install "invhvp[io]"'
        raise ImportError(msg) from error
    return getattr(safetensors.numpy, name)

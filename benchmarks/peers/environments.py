"""One interpreter for each peer: named by an environment variable, or made with pip once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "invhvp-benchmarks"


@dataclass(frozen=True)
class Peer:
    """A library of the comparison.

    Args:
        name: for tables and for INVHVP_<NAME>_PYTHON.
        side: the module with its contenders.
        requires: what pip installs; None for the interpreter of the harness.
    """

    name: str
    side: str
    requires: tuple[str, ...] | None = None


OURS = Peer("invhvp", "ours_side")
PEERS = (
    OURS,
    Peer("torch", "torch_side"),
    Peer("lineax", "lineax_side"),
    Peer("pyDVL", "pydvl_side", ("pydvl[influence]==0.10.0", "numpy<2", "torch")),
    Peer("curvlinops", "curvlinops_side", ("curvlinops-for-pytorch==3.0.1", "torch")),
    Peer("dattri", "dattri_side", ("dattri==0.3.0", "torch")),
    Peer("kronfluence", "kronfluence_side", ("kronfluence==1.0.1", "torch")),
)


class UnavailableError(Exception):
    """A peer that cannot be had here, with the reason."""


def interpreter(peer: Peer) -> str:
    """The Python that has the peer; raises UnavailableError where none can be made."""
    if peer.requires is None:
        return sys.executable
    named = os.environ.get(f"INVHVP_{peer.name.upper()}_PYTHON")
    if named:
        return named
    folder = CACHE / peer.name
    python = folder / "bin" / "python"
    done = folder / "complete"
    # The same PyTorch as the harness has: its speed is not what is compared.
    wanted = [_pinned(item) for item in peer.requires]
    asked = "".join(f"{item}\n" for item in wanted)
    made_for = done.read_text(encoding="utf-8") if done.exists() else None
    if made_for == asked and python.exists():
        return str(python)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    # Markers were empty once: such an environment is kept if pip finds nothing to add.
    if made_for != "" or not _succeeds([*install, "--dry-run", "--no-index", *wanted]):
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            subprocess.run([*install, *wanted], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr or str(error)).strip().splitlines()[-1]
            msg = f"pip could not install {peer.name}: {reason}"
            raise UnavailableError(msg) from None
    done.write_text(asked, encoding="utf-8")
    return str(python)


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # no such interpreter any more
        return False


def _pinned(requirement: str) -> str:
    if requirement != "torch":
        return requirement
    import torch

    return f"torch=={torch.__version__.split('+')[0]}"

"""Named tensors in a file that is there complete, or not at all."""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import samples

_FORMAT = "invhvp-checkpoint/1"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file that is written after every `every` batches.

    Args:
        path: of the file.
        every: batches.
        owner: a checksum of everything that the sums depend on.
        process: which one of several this is, or "". They end a stage together, but may be
            killed before all of them have saved the next: each keeps a file for every stage.
    """

    path: Path
    every: int
    owner: int
    process: str = ""

    def _file(self, stage: int) -> Path:
        if not self.process:
            return self.path
        return self.path.with_name(f"{self.path.name}.{self.process}.stage-{stage}")

    def last_stage(self) -> int:
        """The last stage that was saved, or -1."""
        if not self.process:
            return 0 if self.path.exists() else -1
        stage = -1
        while self._file(stage + 1).exists():
            stage += 1
        return stage

    def save(self, tensors: Mapping[str, torch.Tensor], said: Mapping[str, Any]) -> None:
        """Replace the file in one step: a kill leaves the old one, whole."""
        save_file = _safetensors().save_file
        clean = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        content = {**said, "format": _FORMAT, "owner": self.owner}
        path = self._file(said["stage"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(clean, temporary, metadata={"invhvp": json.dumps(content)})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(self.path.parent)

    def load(
        self, device: torch.device, stage: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """What was saved last (of several processes: in this stage); None for stage -1.

        Raises ValueError for a file of another model, other data or other options.
        """
        if stage < 0:
            return None
        path = self._file(stage)
        with _opened(path, device) as file:
            said = json.loads((file.metadata() or {}).get("invhvp", "{}"))
            if said.get("format") != _FORMAT or said.get("owner") != self.owner:
                msg = (
                    f"the checkpoint {path.name} belongs to another model, other options or "
                    "another program; delete it, or pass another path"
                )
                raise ValueError(msg)
            # Copies, aligned as all other tensors: products of others round differently.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, said  # noqa: SIM118


def checkpoint_at(path: Any, every: int, owner: int, process: str = "") -> Checkpoint | None:
    """The checkpoint that `checkpoint=` and `checkpoint_every=` ask for."""
    if path is None:
        return None
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        msg = f"checkpoint_every must be a number of batches, at least 1, got {every!r}"
        raise ValueError(msg)
    path = Path(path)
    if not path.parent.is_dir():
        msg = f"the folder of checkpoint={str(path)!r} does not exist"
        raise ValueError(msg)
    _safetensors()
    return Checkpoint(path=path, every=every, owner=owner, process=process)


def check_data(same: bool) -> None:
    """ValueError where the data are not those that were saved."""
    if not same:
        raise ValueError(
            "the data differ from those that the checkpoint was made of; delete it, or "
            "pass the same batches in the same order"
        )


def owner_of(said: Any, loss: Any, parameters: Sequence[torch.Tensor]) -> int:
    """A checksum of options, of the loss as far as it can be told, and of parameters."""
    options = vars(loss) if isinstance(loss, torch.nn.Module) else {}
    if isinstance(loss, functools.partial):
        loss, options = loss.func, loss.keywords
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    plain = {k: v for k, v in options.items() if isinstance(v, str | int | float | None)}
    values = samples.fingerprint([p.detach() for p in parameters])
    text = f"{said!r} {name} {sorted(plain.items())} {parameters[0].dtype} {values}"
    return zlib.crc32(text.encode())


def _opened(path: Path, device: torch.device) -> Any:
    library = _safetensors()
    try:
        return library.safe_open(path, framework="pt", device=str(device))
    except library.error as error:
        msg = f"the checkpoint {path.name} is damaged ({error}); delete it"
        raise ValueError(msg) from error


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        msg = "checkpoint= needs safetensors; install it with: pip install 'invhvp[io]'"
        raise ModuleNotFoundError(msg, name="safetensors") from error

    class _Both:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)
        error = safetensors.SafetensorError

    return _Both


def _sync_folder(folder: Path) -> None:
    """Make the new name last; where folders cannot be opened (Windows) renaming is enough."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

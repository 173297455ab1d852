"""A fitted model on its way to other processes: what was computed, and not the data."""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import invhvp as ih


class Stored:
    """A prepared inverse as the bytes of its files; loaded where and when it is first used."""

    def __init__(self, inverse: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            ih.save(inverse, Path(folder) / "inverse")
            files = sorted(Path(folder, "inverse").iterdir())
            self._files = {file.name: file.read_bytes() for file in files}
        self._device = str(inverse.device)
        self._inverse: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_inverse": None}

    def solve(self, G: Any, **_: Any) -> Any:
        """Apply the map: certificates need the operator, which stayed with the data."""
        if self._inverse is None:
            with tempfile.TemporaryDirectory() as folder:
                for name, content in self._files.items():
                    Path(folder, name).write_bytes(content)
                self._inverse = ih.load(folder, like=torch.empty(0, device=self._device))
        return SimpleNamespace(x=self._inverse @ G.to_dense().mT)


class Refitted:
    """An inverse without a state of its own: prepared again from the data, once a process."""

    def __init__(self, model: Any, data: Any) -> None:
        self._model, self.data, self._inverse = model, data, None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_inverse": None}

    def solve(self, G: Any, **options: Any) -> Any:
        """As the inverse itself."""
        if self._inverse is None:
            self._inverse = self._model.fit(self.data).inverse_
        return self._inverse.solve(G, **options)


class Shippable:
    """What an influence model does to be sent: mixed into it."""

    __slots__ = ()

    def for_workers(self) -> Any:
        """A copy to be pickled, without the training data where the inverse can do without.

        Factored, low-rank and sketched inverses go as what was computed; `influence_factors` then
        applies them and measures no residual. Iterative ones are prepared again, once in each
        process, from the data as they were given to `fit`: let them be a handle.
        """
        model: Any = self
        inverse, data = model.inverse_, model._data
        sent = copy.copy(model)
        sent._data = sent._operator = sent._solution = sent._inverse = None
        try:
            sent._inverse = Stored(inverse)
        except TypeError:  # it keeps nothing that could be stored
            sent._inverse = Refitted(copy.copy(sent), data)
        return sent

    @property
    def data_bytes(self) -> int:
        """Bytes of the training data that are pickled along with a copy for workers."""
        model: Any = self
        sent = isinstance(model._inverse, Refitted)
        return len(pickle.dumps(model._inverse.data)) if sent else 0

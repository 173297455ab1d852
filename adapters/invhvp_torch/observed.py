"""What a model gave out while somebody else called it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class Observed:
    """Within `with`, notes the outputs of a model."""

    def __init__(self, model: torch.nn.Module, *, active: bool) -> None:
        self._model = model
        self._active = active
        self._outputs: list[Any] = []
        self._handle: Any = None

    def __enter__(self) -> Observed:
        if self._active:
            self._handle = self._model.register_forward_hook(
                lambda _module, _inputs, output: self._outputs.append(output)
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def output(self) -> Any:
        """The output of the only call; ValueError where there were others, or none."""
        if len(self._outputs) != 1:
            msg = (
                "the Gauss–Newton matrix needs the outputs between model and loss: batch_loss "
                f"must call the model exactly once, but called it {len(self._outputs)} times"
            )
            raise ValueError(msg)
        return self._outputs[0]

"""Progress bars, only when asked for."""

from __future__ import annotations

from typing import Any


class _Silent:
    def update(self, steps: int) -> None:
        """Show nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def progress_bar(show: bool, total: int, label: str) -> Any:
    """A tqdm bar, or a silent stand-in; ModuleNotFoundError with the remedy without tqdm."""
    if not show:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        msg = "progress=True needs tqdm; install it with: pip install tqdm"
        raise ModuleNotFoundError(msg, name="tqdm") from error
    return tqdm(total=total, desc=label)

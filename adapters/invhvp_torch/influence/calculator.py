"""Influences of whole collections, batch by batch: lazy until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler

from .modes import InfluenceMode

Chunks = Callable[[], Iterable[Any]]


class TorchCatAggregator:
    """Joins chunks along the samples."""

    def __call__(self, chunks: Iterable[torch.Tensor]) -> torch.Tensor:
        """One tensor (N, ...) of all chunks."""
        return torch.cat(list(chunks), dim=0)


class NestedTorchCatAggregator:
    """Joins rows of chunks: test samples along the first axis, training samples the second."""

    def __call__(self, rows: Iterable[Iterable[torch.Tensor]]) -> torch.Tensor:
        """One tensor (n_test, n_train, ...) of all chunks."""
        return torch.cat([torch.cat(list(row), dim=1) for row in rows], dim=0)


class TorchNumpyConverter:
    """Tensors to NumPy arrays and back.

    Args:
        device: where tensors made of arrays go; the CPU by default.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        """The values on the host; bfloat16, which NumPy lacks, becomes float32."""
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()

    def from_numpy(self, x: np.ndarray) -> torch.Tensor:
        """A tensor with a copy of the values where the array is read-only."""
        return torch.from_numpy(x if x.flags.writeable else x.copy()).to(self.device or "cpu")


class LazyChunks:
    """Chunks (n, ...) of consecutive samples, computed when they are asked for.

    Args:
        chunks: returns them anew at each call.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[Any]:
        return iter(self._chunks())

    def compute(self, aggregator: Callable[[Iterable[Any]], Any] | None = None) -> Any:
        """What the aggregator makes of the chunks; by default their list."""
        return list(self) if aggregator is None else aggregator(self)

    def to_zarr(
        self,
        store: Any,
        converter: Any = None,
        *,
        overwrite: bool = False,
        return_stored: bool = False,
    ) -> Any:
        """Write a Zarr v3 array chunk by chunk; one chunk is held at a time.

        Args:
            store: a path, or any store that Zarr takes.
            converter: has `to_numpy`; by default a `TorchNumpyConverter`.
            overwrite: whether to replace what is there.
            return_stored: whether to return the array.

        Raises FileExistsError where something is there and `overwrite` is False.
        """
        stored = _write(self._placed(), store, converter, overwrite, ("sample",))
        return stored if return_stored else None

    def _placed(self) -> Iterator[tuple[int, int, Any]]:
        top = 0
        for chunk in self:
            yield top, 0, chunk
            top += chunk.shape[0]


class NestedLazyChunks:
    """Rows of chunks (n_test, n_train, ...), each row for some test samples.

    Args:
        rows: returns them anew at each call.
    """

    def __init__(self, rows: Callable[[], Iterable[Iterable[Any]]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[Iterable[Any]]:
        return iter(self._rows())

    def compute(self, aggregator: Callable[[Iterable[Iterable[Any]]], Any] | None = None) -> Any:
        """What the aggregator makes of the rows; by default a list of lists of chunks."""
        return [list(row) for row in self] if aggregator is None else aggregator(self)

    def to_zarr(
        self,
        store: Any,
        converter: Any = None,
        *,
        overwrite: bool = False,
        return_stored: bool = False,
    ) -> Any:
        """Write a Zarr v3 array (n_test, n_train, ...); as `LazyChunks.to_zarr`."""
        stored = _write(self._placed(), store, converter, overwrite, ("test", "train"))
        return stored if return_stored else None

    def _placed(self) -> Iterator[tuple[int, int, Any]]:
        top, width = 0, None
        for row in self:
            height = left = 0
            for chunk in row:
                yield top, left, chunk
                height, left = chunk.shape[0], left + chunk.shape[1]
            if width not in (None, left):
                msg = f"rows of scores for {width} and {left} training samples: the data changed"
                raise ValueError(msg)
            top, width = top + height, left


class SequentialInfluenceCalculator:
    """Influences between two collections on this machine, one pair of batches at a time.

    Test samples are solved for once, whatever the number of training batches. For scores that
    survive a kill and for top-k without the matrix, use `invhvp.Influence.write` and `top_k`.

    Args:
        influence_function_model: a fitted influence model.

    Example:
        >>> import torch, invhvp as ih
        >>> from invhvp_torch.influence import (
        ...     InfluenceModel, NestedTorchCatAggregator, SequentialInfluenceCalculator)
        >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 0])
        >>> loss = torch.nn.functional.cross_entropy
        >>> fitted = InfluenceModel(model, loss, ih.BlockCG(), regularization=0.1).fit([(x, y)])
        >>> batches = [(x[:2], y[:2]), (x[2:], y[2:])]
        >>> lazy = SequentialInfluenceCalculator(fitted).influences(batches, batches)
        >>> lazy.compute(NestedTorchCatAggregator()).shape
        torch.Size([3, 3])
    """

    def __init__(self, influence_function_model: Any) -> None:
        self.influence_function_model = influence_function_model

    def influence_factors(self, data_iterable: Iterable[Any]) -> LazyChunks:
        """Factors (A + λI)⁻¹∇ℓ of the samples of each batch, lazily.

        Raises ValueError for a loader that shuffles.
        """
        _check_order(data_iterable, "data_iterable")
        return LazyChunks(partial(self._factors, data_iterable))

    def influences(
        self,
        test_data_iterable: Iterable[Any],
        train_data_iterable: Iterable[Any],
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> NestedLazyChunks:
        """Influences of the training on the test samples, lazily.

        Args:
            test_data_iterable: batches (x, y) that can be read again.
            train_data_iterable: likewise; it is read once for each test batch.
            mode: an `InfluenceMode`.

        Raises ValueError for a loader that shuffles: each pass would give another order.
        """
        _check_order(test_data_iterable, "test_data_iterable")
        return self.influences_from_factors(
            LazyChunks(partial(self._factors, test_data_iterable)), train_data_iterable, mode
        )

    def influences_from_factors(
        self,
        z_test_factors: Iterable[Any],
        train_data_iterable: Iterable[Any],
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> NestedLazyChunks:
        """As `influences`, for chunks of factors that are there already."""
        _check_order(train_data_iterable, "train_data_iterable")
        return NestedLazyChunks(partial(self._rows, z_test_factors, train_data_iterable, mode))

    def _factors(self, loader: Iterable[Any]) -> Iterator[torch.Tensor]:
        for x, y in loader:
            yield self.influence_function_model.influence_factors(x, y)

    def _rows(
        self, factors: Iterable[Any], train: Iterable[Any], mode: Any
    ) -> Iterator[Iterable[torch.Tensor]]:
        for chunk in factors:
            # Bound here: a row that is read late must not meet the factors of a later one.
            yield LazyChunks(partial(self._row, chunk, train, mode))

    def _row(self, factors: Any, train: Iterable[Any], mode: Any) -> Iterator[torch.Tensor]:
        for x, y in train:
            yield self.influence_function_model.influences_from_factors(factors, x, y, mode=mode)


def _check_order(loader: Any, name: str) -> None:
    if isinstance(loader, Iterator):
        msg = f"{name} is read several times, but an iterator can be read only once; pass a list"
        raise TypeError(msg)
    shuffles = isinstance(getattr(loader, "sampler", None), RandomSampler)
    if shuffles:
        msg = f"{name} shuffles: its scores would have no order; pass shuffle=False"
        raise ValueError(msg)


def _write(
    placed: Iterable[tuple[int, int, Any]],
    store: Any,
    converter: Any,
    overwrite: bool,
    names: tuple[str, ...],
) -> Any:
    """The Zarr array of chunks that come with their first row and column."""
    import zarr

    to_numpy = (TorchNumpyConverter() if converter is None else converter).to_numpy
    stored: Any = None
    for top, left, chunk in placed:
        values = np.asarray(to_numpy(chunk))
        places = tuple(
            slice(start, start + n)
            for start, n in zip((top, left)[: len(names)], values.shape, strict=False)
        ) + (slice(None),) * (values.ndim - len(names))
        ends = [place.stop or n for place, n in zip(places, values.shape, strict=True)]
        if stored is None:
            stored = _create(zarr, store, values, overwrite, names)
        elif any(end > size for end, size in zip(ends, stored.shape, strict=True)):
            stored.resize([max(*both) for both in zip(ends, stored.shape, strict=True)])
        stored[places] = values
    if stored is None:
        msg = "there is nothing to write: the loader has no batches"
        raise ValueError(msg)
    return stored


def _create(
    zarr: Any, store: Any, values: np.ndarray, overwrite: bool, names: tuple[str, ...]
) -> Any:
    features = [f"feature_{i}" for i in range(values.ndim - len(names))]
    try:
        return zarr.create_array(
            store,
            shape=values.shape,
            chunks=values.shape,
            dtype=values.dtype,
            overwrite=overwrite,
            dimension_names=[*names, *features],
        )
    except (zarr.errors.ContainsArrayError, zarr.errors.ContainsGroupError) as error:
        msg = f"{store} holds an array or a group already; pass overwrite=True to replace it"
        raise FileExistsError(msg) from error

"""Scores in a Zarr v3 store, written block by block so that a killed run can be continued."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import _backend
from ..gradients import GradientMatrix
from ..methods._progress import progress_bar
from ..protocols import Array
from . import fingerprint
from .blocks import Against, factors_for, joined, spans, train_blocks

FORMAT = "invhvp-scores/1"
_KEY = "invhvp"  # of the attributes
_PRINT = "fingerprint_"
_CHUNK_BYTES = 64 << 20  # of the factors: codecs end at 2 GiB
_CERTIFICATES = {"relative_residuals": "float64", "error_bounds": "float64", "status_codes": "int8"}


def write(
    inverse: Any,
    train: GradientMatrix,
    test: GradientMatrix,
    out: Any,
    block_shape: tuple[int, int] | None,
    progress: bool,
) -> Any:
    """See `Influence.write`."""
    system = factors_for(inverse, train)
    identity = {
        "format": FORMAT,
        **fingerprint.describe(inverse),
        "shape": [test.shape[0], train.shape[0]],
        "parameters": train.shape[1],
        "dtype": _backend.dtype_name(train.dtype),
        "factors": system.space,
    }
    found = {
        "operator": fingerprint.of_operator(inverse),
        "train": fingerprint.of_rows(train),
        "test": fingerprint.of_rows(test),
    }
    about = {"operator": repr(getattr(inverse, "operator", None)), "versions": _versions()}
    shapes = _checked_shape(block_shape), system.block_shape
    store = _Store.open(out, identity, about, found, _backend.eps(train.dtype), *shapes)
    store.create(system)
    _solve(store, system, test, progress)
    _score(store, system, train, test, progress)
    return store.group["scores"]


def read_blocks(out: Any) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Yield (test slice, train slice, scores) of a complete store, on the host.

    Args:
        out: what `Influence.write` wrote to.

    Raises ValueError for a store of something else, or one that is not complete.

    Example:
        >>> import numpy as np, tempfile, invhvp as ih
        >>> from invhvp.influence import read_blocks, top_k
        >>> G = ih.DenseGradients(np.diag([1.0, 2.0, 3.0]))
        >>> inverse = ih.Direct().prepare(ih.RankOneMean(G), damping=1.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = ih.Influence(inverse, G).write(G[2:], folder, progress=False)
        ...     top_k(read_blocks(folder), 1).helpful
        array([[2]])
    """
    group = _zarr().open_group(store=out, mode="r", zarr_format=3)
    told: Any = group.attrs.get(_KEY)
    if told is None or told.get("format") != FORMAT:
        msg = f"{out} does not hold scores that Influence.write wrote"
        raise ValueError(msg)
    written = group["scores_written"][...] if "scores_written" in group else np.zeros(1)
    if not np.all(written):
        msg = (
            f"{out} is not complete: {int(np.sum(written))} of {np.size(written)} blocks are "
            "written; call Influence.write again to continue"
        )
        raise ValueError(msg)
    return _read(group["scores"], *told["block_shape"])


def _read(scores: Any, height: int, width: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    for rows in spans(scores.shape[0], height):
        for columns in spans(scores.shape[1], width):
            yield rows, columns, scores[rows, columns]


# ------------------------------------------------------------------------------------- passes


def _solve(store: _Store, system: Any, test: GradientMatrix, progress: bool) -> None:
    """Pass 1: the factors that are not there yet."""
    written = store.group["factors_written"]
    done = written[...]
    missing = [i for i in range(len(store.rows)) if not done[i]]
    with progress_bar(progress, len(store.rows), "factors") as bar:
        bar.update(len(store.rows) - len(missing))
        for i in missing:
            rows = store.rows[i]
            factors, solution = system.solve(test[rows])
            store.group["factors"][rows, :] = _on_host(factors)
            if solution is not None:
                for name in _CERTIFICATES:
                    store.group[name][rows] = _on_host(getattr(solution, name))
            written[i] = 1  # last: what it says is there
            bar.update(1)


def _score(
    store: _Store, system: Any, train: GradientMatrix, test: GradientMatrix, progress: bool
) -> None:
    """Pass 2: the scores that are not there yet, each training gradient formed once."""
    group = store.group
    scores, factors, written = group["scores"], group["factors"], group["scores_written"]
    done = written[...]
    todo = np.flatnonzero(~np.all(done, axis=0))
    with progress_bar(progress, done.size, "scores") as bar:
        bar.update(int(np.sum(done)))
        if not todo.size:
            return
        width = store.block_shape[1]
        first, last = int(todo[0]) * width, min(int(todo[-1] + 1) * width, train.shape[0])
        left = train if (first, last) == (0, train.shape[0]) else train[first:last]
        for offset, pieces in train_blocks(left, width):
            columns = slice(first + offset.start, first + offset.stop)
            j = columns.start // width
            rows_left = [i for i in range(len(store.rows)) if not done[i, j]]
            against: list[Against] = [system.against(piece) for piece in pieces if rows_left]
            for i in rows_left:
                rows = store.rows[i]
                solved = _backend.from_host(factors[rows, :], system.like)
                scores[rows, columns] = _on_host(joined(against, test[rows], solved))
                written[i, j] = 1
                bar.update(1)


def _on_host(x: Array) -> np.ndarray:
    return np.asarray(_backend.to_host(x))


# -------------------------------------------------------------------------------------- store


class _Store:
    """The group, and the blocks that it is written in."""

    def __init__(self, group: Any, block_shape: tuple[int, int]) -> None:
        self.group = group
        self.shape: tuple[int, int] = tuple(group.attrs[_KEY]["shape"])
        self.block_shape = block_shape
        self.rows = spans(self.shape[0], block_shape[0])

    @classmethod
    def open(
        cls,
        out: Any,
        identity: dict[str, Any],
        about: dict[str, Any],
        found: dict[str, np.ndarray],
        eps: float,
        asked: tuple[int, int] | None,
        default: tuple[int, int],
    ) -> _Store:
        """Begin a store, or go on with the one that is there if it belongs to this call."""
        zarr = _zarr()
        try:
            group = zarr.open_group(store=out, mode="a", zarr_format=3)
        except zarr.errors.ContainsArrayError as error:
            msg = f"{out} holds something else than scores; choose another place for them"
            raise ValueError(msg) from error
        told: Any = group.attrs.get(_KEY)
        if told is None:
            _begin(group, out, found)
            # The attributes come last and in one piece: with them, a store has begun.
            told = group.attrs[_KEY] = {
                **identity,
                "block_shape": list(asked or default),
                "fingerprints": {k: fingerprint.digest(v) for k, v in found.items()},
                **about,
            }
        differences = [key for key, value in identity.items() if told.get(key) != value]
        if differences:
            _refuse(
                out, [f"{key} was {told.get(key)!r}, is {identity[key]!r}" for key in differences]
            )
        shape = tuple(told["block_shape"])
        if asked is not None and asked != shape:
            _refuse(out, [f"block_shape was {shape}, is {asked}"])
        changed = [
            f"the {_WORDS[name]} other values"
            for name, values in found.items()
            if not fingerprint.agree(group[_PRINT + name][...], values, eps)
        ]
        if changed:
            _refuse(out, changed)
        return cls(group, shape)

    def create(self, system: Any) -> None:
        """The arrays that are not there yet."""
        (n, m), (height, width) = self.shape, self.block_shape
        lines, columns = len(self.rows), len(spans(m, width))
        dtype = np.dtype(_storable(self.group.attrs[_KEY]["dtype"]))
        kept = np.dtype(_storable(_backend.dtype_name(system.like.dtype)))
        wide = min(system.width, max(1, _CHUNK_BYTES // (height * kept.itemsize)))
        self._array("factors", (n, system.width), (height, wide), kept, ("test", system.space))
        if system.space == "parameters":
            for name, kind in _CERTIFICATES.items():
                self._array(name, (n,), (height,), np.dtype(kind), ("test",))
        self._array("factors_written", (lines,), (lines,), np.dtype("uint8"), ("test_block",))
        self._array("scores", (n, m), (height, width), dtype, ("test", "train"))
        names = ("test_block", "train_block")
        self._array("scores_written", (lines, columns), (lines, 1), np.dtype("uint8"), names)

    def _array(
        self,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype,
        dimensions: tuple[str, ...],
    ) -> None:
        if name in self.group:
            return
        self.group.create_array(
            name,
            shape=shape,
            chunks=tuple(min(c, s) for c, s in zip(chunks, shape, strict=True)),
            dtype=dtype,
            fill_value=0 if dtype.kind in "iu" else np.nan,
            compressors=None,  # the digits of computed numbers hardly compress
            dimension_names=dimensions,
        )


def _begin(group: Any, out: Any, found: dict[str, np.ndarray]) -> None:
    """Store the fingerprints; ValueError where the place is taken."""
    if len(group.attrs) or any(not name.startswith(_PRINT) for name in group):
        msg = f"{out} holds something else than scores; choose another place for them"
        raise ValueError(msg)
    for name, values in found.items():
        group.create_array(_PRINT + name, data=values, overwrite=True)


_WORDS = {
    "operator": "operator has",
    "train": "training gradients have",
    "test": "test gradients have",
}


def _refuse(out: Any, reasons: list[str]) -> None:
    msg = (
        f"{out} holds scores of another model, other options or other data: {'; '.join(reasons)}. "
        "Choose another place, or delete what is there"
    )
    raise ValueError(msg)


def _checked_shape(block_shape: Any) -> tuple[int, int] | None:
    if block_shape is None:
        return None
    shape = tuple(block_shape)
    if len(shape) != 2 or not all(isinstance(n, int) and n >= 1 for n in shape):
        msg = f"block_shape must be two numbers of samples (test, train), got {block_shape!r}"
        raise ValueError(msg)
    return shape


def _storable(dtype: str) -> str:
    """Half precision is stored in single: Zarr has no bfloat16."""
    return dtype if dtype in ("float64", "float32") else "float32"


def _versions() -> dict[str, str]:
    package = sys.modules[__name__.partition(".")[0]]  # it imports this module: found when called
    return {
        "invhvp": package.__version__,
        "zarr": _zarr().__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _zarr() -> Any:
    try:
        import zarr
    except ModuleNotFoundError as error:
        msg = "stored scores need zarr, which is not installed: pip install 'invhvp[io]'"
        raise ModuleNotFoundError(msg, name=error.name) from error
    return zarr

"""Influences between Dask collections: two passes, each test sample solved for once."""

from __future__ import annotations

import importlib
import logging
import math
import threading
import warnings
from typing import Any, Self

import cloudpickle
import dask.array as da
import numpy as np
from dask import delayed
from distributed import Client, LocalCluster, get_client

from invhvp import InvhvpWarning

from .checks import (
    DisableClientSingleThreadCheck,
    InvalidDimensionChunksError,
    check_aligned,
    check_mode,
    check_rows,
    check_threads,
)

_LOG = logging.getLogger("invhvp")
_LOCK = threading.Lock()  # of this process: evaluating a PyTorch model is not thread-safe


class DaskInfluenceCalculator:
    """Influences between Dask arrays, on the user's client.

    The model goes to every worker once, without its training data where it knows how
    (`for_workers`); the arrays are read by the workers. Nothing is computed before the result is
    asked for, except where the dtype of the factors has to be found out.

    Args:
        influence_function_model: a fitted influence model.
        converter: tensors to NumPy and back, such as a `TorchNumpyConverter`.
        client: of a cluster whose workers have one thread each; by default the current client,
            or else one of a new local cluster, which `close` (or `with`) ends. The class
            `DisableClientSingleThreadCheck` in its place uses the active scheduler unchecked.

    Attributes:
        client: the client, or None for the active scheduler.
        state_bytes: the size of the pickled model, which every worker gets once.

    Raises ThreadSafetyViolationError for workers with several threads, TypeError for what is no
    client.
    """

    def __init__(self, influence_function_model: Any, converter: Any, client: Any = None) -> None:
        self.influence_function_model = influence_function_model
        self.converter = converter
        self._own: Client | None = None
        self.client = self._client(client)
        if self.client is not None:
            check_threads(influence_function_model, self.client)
        sent = getattr(influence_function_model, "for_workers", lambda: influence_function_model)()
        self.state_bytes = len(cloudpickle.dumps(sent))
        _LOG.info("the model goes to each worker once, %d bytes", self.state_bytes)
        self._warn_about_data(sent)
        if self.client is not None:
            sent = self.client.scatter(sent, broadcast=True, hash=False)
        self._model = delayed(sent, pure=False, traverse=False)

    def _client(self, client: Any) -> Client | None:
        if client is DisableClientSingleThreadCheck:
            return None
        if client is None:
            try:
                return get_client()
            except ValueError:
                # Any free port: another cluster may have the one that Dask would take.
                cluster = LocalCluster(threads_per_worker=1, dashboard_address="127.0.0.1:0")
                self._own = Client(cluster)
                return self._own
        if not isinstance(client, Client):
            msg = (
                "client must be a distributed.Client, None, or the class "
                f"DisableClientSingleThreadCheck, got {client!r:.80}"
            )
            raise TypeError(msg)
        return client

    def _warn_about_data(self, sent: Any) -> None:
        size = getattr(sent, "data_bytes", 0)
        if size > 1 << 20:
            msg = (
                f"this model is fitted anew on each worker, and its training data, {size >> 20} "
                "MiB, go along; fit it on a data set that opens its files, or use a method that "
                "keeps what it computed (Direct, Arnoldi, NystroemSketch, ...)"
            )
            warnings.warn(msg, InvhvpWarning, stacklevel=3)

    def close(self) -> None:
        """End the local cluster, if this calculator started one."""
        if self._own is not None:
            self._own.close()
            if self._own.cluster is not None:
                self._own.cluster.close()
            self._own = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -------------------------------------------------------------------------------- influences

    def influence_factors(self, x: da.Array, y: da.Array) -> da.Array:
        """(A + λI)⁻¹∇ℓ of every sample, rows (N, p) in the chunks of x.

        Raises UnalignedChunksError and InvalidDimensionChunksError for chunks that do not fit.
        """
        check_aligned(x, y, ("x", "y"))
        dtype, p = self._dtype(x, y), int(self.influence_function_model.n_parameters)
        # One task a chunk, and not a blockwise layer: Dask would merge such a layer into the
        # scores, and solve again for every block of training samples.
        solve: Any = delayed(_factors, pure=False)
        chunks = zip(_delayed_chunks(x), _delayed_chunks(y), x.chunks[0], strict=True)
        rows = [
            da.from_delayed(solve(a, b, self._model, self.converter), shape=(n, p), dtype=dtype)
            for a, b, n in chunks
        ]
        return da.concatenate(rows, axis=0)

    def influences(
        self,
        x_test: da.Array,
        y_test: da.Array,
        x: da.Array | None = None,
        y: da.Array | None = None,
        mode: Any = "up",
    ) -> da.Array:
        """Influences (n_test, n_train), or (n_test, n_train, *x.shape[1:]) for Perturbation.

        Without x and y the test samples meet themselves. Raises as `influence_factors`, and
        ValueError for x without y or the reverse, or an unknown mode.
        """
        if (x is None) != (y is None):
            msg = "x and y belong together: pass both, or neither for the test samples"
            raise ValueError(msg)
        if x is None or y is None:
            x, y = x_test, y_test
        return self.influences_from_factors(self.influence_factors(x_test, y_test), x, y, mode)

    def influences_from_factors(
        self, z_test_factors: da.Array, x: da.Array, y: da.Array, mode: Any = "up"
    ) -> da.Array:
        """As `influences`, for factors (n_test, p) that are there already: a Zarr array, say."""
        check_rows(z_test_factors, "z_test_factors")
        check_aligned(x, y, ("x", "y"))
        check_mode(mode)
        p = int(self.influence_function_model.n_parameters)
        if z_test_factors.ndim != 2 or z_test_factors.shape[1] != p:
            msg = f"z_test_factors must have shape (N, {p}), got {z_test_factors.shape}"
            raise ValueError(msg)
        moved = str(mode) == "perturbation"
        features = tuple(f"x{i}" for i in range(1, x.ndim))
        out = ("test", "train", *(features if moved else ()))
        return da.blockwise(
            _scores,
            out,
            z_test_factors,
            ("test", "parameter"),
            x,
            ("train", *features),
            y,
            ("train", *(f"y{i}" for i in range(1, y.ndim))),
            model=self._model,
            converter=self.converter,
            mode=str(mode),
            concatenate=True,
            dtype=z_test_factors.dtype,  # of the factors: x may be integers
            meta=np.empty((0,) * len(out), dtype=z_test_factors.dtype),
        )

    def to_zarr(self, array: da.Array, store: Any, *, overwrite: bool = False) -> Any:
        """Compute a result into a Zarr v3 array, each chunk by the one task that owns it.

        Chunks of different sizes are made equal first: Zarr has one size, and two tasks that
        write parts of one Zarr chunk lose data without a word.

        Args:
            array: what this calculator returned.
            store: a path, or a store that all workers reach.
            overwrite: whether to replace what is there.

        Returns the Zarr array. Raises FileExistsError where something is there.
        """
        zarr: Any = importlib.import_module("zarr")
        if any(math.isnan(n) for n in array.shape):
            msg = "an array of unknown size cannot be stored; call compute_chunk_sizes() first"
            raise InvalidDimensionChunksError(msg)
        sizes: Any = tuple(max(lengths) for lengths in array.chunks)
        regular = array.rechunk(sizes)
        factors = array.ndim == 2 and array.shape[1] == self.influence_function_model.n_parameters
        names = ["test", "parameter" if factors else "train"]
        names += [f"feature_{i}" for i in range(array.ndim - 2)]
        try:
            stored = zarr.create_array(
                store,
                shape=regular.shape,
                chunks=sizes,
                dtype=regular.dtype,
                overwrite=overwrite,
                dimension_names=names,
                attributes={"invhvp": {"model": repr(self.influence_function_model)}},
            )
        except (zarr.errors.ContainsArrayError, zarr.errors.ContainsGroupError) as error:
            msg = f"{store} holds an array or a group already; pass overwrite=True to replace it"
            raise FileExistsError(msg) from error
        da.store(regular, stored, lock=False)  # aligned: the chunks of both are the same
        return stored

    def _dtype(self, x: da.Array, y: da.Array) -> np.dtype:
        """The dtype of the factors: the model's own, or that of the first sample's."""
        own = getattr(self.influence_function_model, "dtype", None)
        if own is not None:
            name = str(own).rpartition(".")[2]
            return np.dtype("float32" if name == "bfloat16" else name)
        x_first, y_first = (np.asarray(array[:1].compute()) for array in (x, y))
        return _factors(x_first, y_first, self.influence_function_model, self.converter).dtype


def _delayed_chunks(array: Any) -> list[Any]:
    return list(array.to_delayed().ravel())


def _factors(x: np.ndarray, y: np.ndarray, model: Any, converter: Any) -> np.ndarray:
    with _LOCK:
        found = model.influence_factors(converter.from_numpy(x), converter.from_numpy(y))
        return np.asarray(converter.to_numpy(found))


def _scores(
    factors: np.ndarray, x: np.ndarray, y: np.ndarray, model: Any, converter: Any, mode: str
) -> np.ndarray:
    with _LOCK:
        sides = (converter.from_numpy(np.asarray(array)) for array in (factors, x, y))
        found = model.influences_from_factors(*sides, mode=mode)
        return np.asarray(converter.to_numpy(found))

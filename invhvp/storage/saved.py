"""Saving a prepared inverse, and getting it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import _backend
from ..methods import PreparedInverse
from ..operators import LinearOperator, as_operator
from ..protocols import Array
from . import _files, _fingerprint, _inverses
from ._codec import Decoder, Encoder
from ._files import StateError


def save(inverse: Any, path: Any, *, fingerprint: Any = None) -> None:
    """Write a prepared inverse to a folder, from which `load` restores it on any backend.

    Stored are the class, this library's version, the options of the method, the damping and
    what was computed: factors, eigenpairs, a sketch, a Gram matrix. Operators made of arrays are
    stored with an exact inverse; gradients only where `@` needs them; functions and streams never.
    The folder `path` is replaced as a whole or not at all. Of the processes of a `DataParallel`
    operator every one calls this, and the first writes.

    Args:
        inverse: what `Direct`, `SampleSpace`, `InverseHarmonicMean`, `Arnoldi`, `NystroemSketch`,
            `NystroemPreconditioner`, `Jacobi` or `Blockwise` of these prepared, or `load` gave.
        path: the folder; its parents are made.
        fingerprint: what the inverse belongs to: an array, a gradient matrix, a string or a
            number, or lists and mappings of them, such as
            `{"model": model.state_dict(), "data": (x, y)}`. Arrays are stored as SHA-256.

    Raises TypeError for what cannot be stored, with what to store instead; FileExistsError where
    `path` is something else; ImportError without the package safetensors.
    Cost: the size of the factors on disk and once in host memory; one product with the operator,
    by which `load` recognises it. A generator as `rng=` is stored as seed 0.

    Example:
        >>> import numpy as np, invhvp as ih, tempfile
        >>> inverse = ih.Arnoldi(rank=2).prepare(ih.Diagonal(np.arange(4.0)), damping=1.0)
        >>> folder = tempfile.mkdtemp()
        >>> ih.save(inverse, folder, fingerprint={"model": "small", "data": np.ones(3)})
        >>> again = ih.load(folder, fingerprint={"model": "small", "data": np.ones(3)})
        >>> (again @ np.ones(4)).round(3)
        array([1.   , 1.   , 0.333, 0.25 ])
    """
    about = None if fingerprint is None else _fingerprint.described(fingerprint)
    A = getattr(inverse, "operator", None)
    encoder = Encoder({"gradients": getattr(A, "gradients", None)})
    packed = _inverses.pack(inverse, encoder, "")
    probe = _fingerprint.probe(inverse.operator)
    if getattr(getattr(A, "processes", None), "rank", 0) != 0:
        return
    state = {
        "version": _version(),
        "class": packed["kind"],
        "fingerprint": {"given": about, "operator": probe},
        "inverse": packed,
    }
    _files.write(Path(path), state, encoder.tensors)


def load(
    path: Any, like: Array | None = None, *, operator: Any = None, fingerprint: Any = None
) -> PreparedInverse:
    """The inverse that `save` wrote, beside the array `like`.

    `inverse @ B` works, and `with_damping` where it cost no product before. `solve` measures the
    true residual and so needs the operator: one that was stored, or `operator=`; else it raises.

    Args:
        path: the folder.
        like: any array of the library and device to load on; by default those of `operator`,
            else NumPy. The dtype is that which was saved.
        operator: the A that the inverse was prepared from, or its like on another library.
        fingerprint: what `save` was given; anything else is refused.

    Raises FileNotFoundError where there is nothing; StateError (a ValueError) for a damaged file,
    another fingerprint, an operator that multiplies differently, or a dtype that `like` lacks.
    Cost: one pass over the file to check it; one product where `operator` is given.

    Example:
        >>> import numpy as np, invhvp as ih, tempfile
        >>> A = ih.Callback(lambda X: 2 * X, 3, like=np.ones(1), psd=True)
        >>> ih.save(ih.Direct().prepare(A, damping=1.0), folder := tempfile.mkdtemp())
        >>> ih.load(folder, like=np.ones(1)) @ np.ones(3)
        array([0.33333333, 0.33333333, 0.33333333])
        >>> ih.load(folder, operator=A).solve(np.ones(3)).status.name
        'CONVERGED'
    """
    path = Path(path)
    wanted = None if fingerprint is None else _fingerprint.described(fingerprint)
    content, tensors = _files.read(path)
    try:
        if wanted is not None:
            _fingerprint.check_given(content["fingerprint"]["given"], wanted)
        return _restored(content, tensors, like, operator)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    except (KeyError, AttributeError) as error:
        msg = (
            f"{path} was written by invhvp {content.get('version')} and does not fit this "
            f"version, {_version()}: {error!r}"
        )
        raise StateError(msg) from error


def _restored(
    content: Mapping[str, Any], tensors: Any, like: Array | None, operator: Any
) -> PreparedInverse:
    probe, packed = content["fingerprint"]["operator"], content["inverse"]
    A = None
    if operator is not None:
        A = as_operator(operator, like=like)
        mine, theirs = (None if x is None else _backend.library_name(x) for x in (like, A.like))
        if mine not in (None, theirs):
            raise StateError(f"like= is an array of {mine}, operator= works on {theirs}")
        _check_operator(A, packed["operator"], probe)
        like = A.like
    like = np.zeros(0) if like is None else like
    decoder = Decoder(tensors, like, {"gradients": getattr(A, "gradients", None)})
    return _inverses.unpack(packed, decoder, like, A, probe)


def _check_operator(A: LinearOperator, about: Mapping[str, Any], probe: Any) -> None:
    found = {"n": A.shape[0], "dtype": _backend.dtype_name(A.dtype), "psd": A.psd}
    wrong = [f"{k} = {about[k]}, not {value}" for k, value in found.items() if about[k] != value]
    if wrong:
        raise StateError(f"the operator that it was prepared from had {', '.join(wrong)}")
    _fingerprint.check_operator(probe, A)


def _version() -> str:
    from .. import __version__  # the package imports this module

    return __version__

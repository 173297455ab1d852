"""Methods as plain values and back: what a stored result says about how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from .arnoldi import Arnoldi
from .block_cg import BlockCG
from .blockwise import Blockwise
from .cg import CG
from .direct import Direct
from .harmonic_mean import InverseHarmonicMean
from .jacobi import Jacobi
from .lissa import LiSSA
from .minres import Minres
from .nystroem_preconditioner import NystroemPreconditioner
from .nystroem_sketch import NystroemSketch
from .pivoted_cholesky import PivotedCholesky
from .sample_space import SampleSpace

_CLASSES = {
    kind.__name__: kind
    for kind in (
        Arnoldi,
        BlockCG,
        Blockwise,
        CG,
        Direct,
        InverseHarmonicMean,
        Jacobi,
        LiSSA,
        Minres,
        NystroemPreconditioner,
        NystroemSketch,
        PivotedCholesky,
        SampleSpace,
    )
}
_KEY = "method"


def method_to_dict(method: Any) -> dict[str, Any]:
    """The class and all options of a method, ready for `json.dumps`.

    A preconditioner becomes a dictionary within. Raises TypeError for options that are not plain
    values: operators and inverses (`Surrogate`, `Fixed`, `residual_operator=`), generators as
    `rng=` (pass an int), functions (`reduce=`); and for methods that this library does not have.

    Example:
        >>> import invhvp as ih
        >>> stored = ih.method_to_dict(ih.CG(preconditioner=ih.Jacobi(samples=8)))
        >>> stored["method"], stored["preconditioner"]
        ('CG', {'method': 'Jacobi', 'samples': 8, 'rng': 0, 'kind': 'auto'})
        >>> ih.method_from_dict(stored) == ih.CG(preconditioner=ih.Jacobi(samples=8))
        True
    """
    name = type(method).__name__
    if _CLASSES.get(name) is not type(method):
        hint = ": it holds an operator or an inverse" if name in ("Surrogate", "Fixed") else ""
        msg = f"{name} cannot be stored as plain values{hint}; store what it was made from"
        raise TypeError(msg)
    options = {f.name: _plain(getattr(method, f.name), name, f.name) for f in fields(method)}
    return {_KEY: name, **options}


def _plain(value: Any, owner: str, option: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.integer | np.floating | np.bool_):
        return value.item()
    if hasattr(value, "prepare") and is_dataclass(value):
        return method_to_dict(value)
    hint = "; pass an int as rng" if option == "rng" else ""
    msg = (
        f"{owner}({option}=...) is a {type(value).__name__}, which is not a plain value and cannot "
        f"be stored{hint}"
    )
    raise TypeError(msg)


def method_from_dict(stored: Mapping[str, Any]) -> Any:
    """The method that `method_to_dict` stored; options that are missing have their defaults.

    Raises TypeError for what is not a mapping, ValueError for a class or an option that this
    version does not have, and what the method raises for its values.
    """
    if not isinstance(stored, Mapping) or _KEY not in stored:
        msg = f'a stored method is a mapping with the key "{_KEY}", got {stored!r:.80}'
        raise TypeError(msg)
    kind = _CLASSES.get(stored[_KEY])
    if kind is None:
        msg = f"there is no method {stored[_KEY]!r}; known are {', '.join(_CLASSES)}"
        raise ValueError(msg)
    options = {name: value for name, value in stored.items() if name != _KEY}
    unknown = sorted(set(options) - {f.name for f in fields(kind)})
    if unknown:
        msg = (
            f"{kind.__name__} has no option {', '.join(unknown)}; it was stored by another version"
        )
        raise ValueError(msg)
    nested = {
        name: method_from_dict(value) if isinstance(value, Mapping) else value
        for name, value in options.items()
    }
    return kind(**nested)

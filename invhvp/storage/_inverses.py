"""Prepared inverses as JSON values and tensors: method, damping, and what was computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from .. import _backend
from ..methods import (
    Blockwise,
    MapInverse,
    PreparedInverse,
    method_from_dict,
    method_to_dict,
)
from ..methods._spectral_inverse import SpectralInverse
from ..methods.blockwise import BlockwiseInverse
from ..methods.jacobi import JacobiInverse
from ..operators import BlockDiagonal, LinearOperator
from ..operators.dense import DenseInverse
from ..protocols import Array, Damping, HasGradients
from . import _classes as _classes  # registers them
from ._codec import Decoder, Encoder, storable
from ._files import StateError


class AbsentOperator(LinearOperator):
    """Stands for an operator that was not stored: its size, but no product.

    Attributes:
        described: what it was.
        probe: what it is recognised by; see `_fingerprint`.
    """

    def __init__(self, n: int, *, described: str, probe: Any, **base: Any) -> None:
        super().__init__(n, **base)
        self.described = described
        self.probe = probe

    def _matmat(self, X: Array, /) -> Array:
        raise self._missing()

    def inverse(self, damping: Damping, /) -> LinearOperator:
        """Raises ValueError, as a product does: there is nothing to invert again."""
        raise self._missing()

    def _missing(self) -> ValueError:
        msg = (
            f"this inverse was loaded without its operator, {self.described}: `@` applies it, but "
            "a true residual or another preparation needs products with A; pass operator= to "
            "ih.load"
        )
        return ValueError(msg)

    def __repr__(self) -> str:
        return f"AbsentOperator({self.described})"


class AbsentBlocks(BlockDiagonal):
    """A block-diagonal operator of which some blocks were not stored; see `AbsentOperator`."""

    described: str
    probe: Any


# ------------------------------------------------------------------------------------- packing


def pack(inverse: Any, encoder: Encoder, path: str) -> dict[str, Any]:
    """The JSON values of an inverse. Raises TypeError where it keeps nothing to be stored."""
    if not isinstance(inverse, MapInverse | BlockwiseInverse):
        raise _nothing_to_store(inverse)
    A = inverse.operator
    state = _pack_state(inverse, encoder, f"{path}state")
    goes_along = isinstance(inverse, MapInverse) and _goes_along(inverse)
    stored = encoder.attempt(A, f"{path}operator") if goes_along else None
    return {
        "kind": type(inverse).__name__,
        "method": _options(inverse.method),
        "damping": _damping(inverse),
        "products": inverse.products,
        "operator": {
            "class": getattr(A, "described", repr(A)),
            "n": A.shape[0],
            "dtype": _backend.dtype_name(A.dtype),
            "psd": A.psd,
            "layout": encoder.encode(A.layout, f"{path}layout"),
            "stored": stored,
        },
        "state": state,
    }


def _pack_state(inverse: Any, encoder: Encoder, path: str) -> dict[str, Any]:
    if isinstance(inverse, BlockwiseInverse):
        names = inverse.blocks
        return {"blocks": [[n, pack(names[n], encoder, f"{path}.{n}.")] for n in names]}
    if isinstance(inverse, SpectralInverse):
        return {"spectrum": encoder.encode(inverse.state, path)}
    if isinstance(inverse, JacobiInverse):
        return {"estimate": encoder.encode(inverse.estimate, path)}
    known = inverse.known if inverse.known is not inverse.operator else None
    return {
        "map": encoder.encode(inverse.map, f"{path}.map"),
        "known": None if known is None else encoder.encode(known, f"{path}.known"),
        "own": inverse.known is inverse.operator,
        "exact": inverse.exact,
        "definite": bool(inverse.fixed_spd),
        "relative_floor": inverse.relative_floor,
    }


def _goes_along(inverse: MapInverse) -> bool:
    """Whether the operator is stored: exact inverses take theirs, but no gradients for nothing."""
    A = inverse.operator
    if isinstance(inverse, SpectralInverse | JacobiInverse) or not storable(A):
        return False
    if not isinstance(A, HasGradients):
        return True
    return storable(A.gradients) and not isinstance(inverse.map, DenseInverse)


def _options(method: Any) -> dict[str, Any]:
    try:
        return method_to_dict(method)
    except TypeError:
        return method_to_dict(_with_plain_seeds(method))


def _with_plain_seeds(method: Any) -> Any:
    """A generator is no plain value, and has no meaning for what has been drawn already."""
    plain = {}
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "rng":
            plain["rng"] = value if isinstance(value, int) else 0
        elif is_dataclass(value) and hasattr(value, "prepare"):
            plain[field.name] = _with_plain_seeds(value)
    return replace(method, **plain)


def _damping(inverse: PreparedInverse) -> float | dict[str, float]:
    if isinstance(inverse.damping, Mapping):
        return {name: float(value) for name, value in inverse.damping.items()}
    shift: Any = inverse.shift
    return float(shift)


def _nothing_to_store(inverse: Any) -> TypeError:
    if not isinstance(inverse, PreparedInverse):
        return TypeError(f"save takes a prepared inverse, got {type(inverse).__name__}")
    msg = (
        f"{type(inverse.method).__name__} prepares nothing that could be saved: keep its options "
        "with method_to_dict, and save inverse.preconditioner if it has one; "
        "preconditioner=Fixed(ih.load(path)) brings that back"
    )
    return TypeError(msg)


# ------------------------------------------------------------------------------------ unpacking


def unpack(
    packed: Mapping[str, Any], decoder: Decoder, like: Array, operator: Any, probe: Any = None
) -> PreparedInverse:
    """The inverse of such values, with `operator`, the stored one, or an absent one."""
    about, method = packed["operator"], method_from_dict(packed["method"])
    kind, state = packed["kind"], packed["state"]
    if kind == "BlockwiseInverse":
        return _unpack_blockwise(packed, method, decoder, like, operator, probe)
    state = {name: decoder.decode(value) for name, value in state.items()}
    stored = decoder.decode(about["stored"])
    A = stored if operator is None else operator
    if A is None:
        A = _absent(about, probe, decoder, like)
    damping, products = packed["damping"], packed["products"]
    if kind == "SpectralInverse":
        spectrum = state["spectrum"]
        if hasattr(spectrum, "grow"):
            spectrum.operator = A
        inverse = method._invert(A, damping, spectrum)
    elif kind == "JacobiInverse":
        inverse = JacobiInverse(method, A, damping, state["estimate"], products=0)
    elif kind == "MapInverse":
        known, own = state.pop("known"), state.pop("own")
        inverse = MapInverse(method, A, damping, state.pop("map"), **state)
        inverse.known = A if own else known
    else:
        raise StateError(f"it holds a {kind}, which this version of invhvp does not know")
    inverse.products = products
    return inverse


def _unpack_blockwise(
    packed: Mapping[str, Any],
    method: Blockwise,
    decoder: Decoder,
    like: Array,
    operator: Any,
    probe: Any,
) -> BlockwiseInverse:
    if operator is not None and not isinstance(operator, BlockDiagonal):
        msg = f"operator= must be the BlockDiagonal that was inverted, got {operator!r}"
        raise StateError(msg)
    blocks = {}
    for name, inner in packed["state"]["blocks"]:
        A = None if operator is None else operator.blocks[name]
        blocks[name] = unpack(inner, decoder, like, A)
    if operator is None:
        operator = _together(blocks, packed["operator"], decoder, probe)
    inverse = BlockwiseInverse(method, operator, packed["damping"], blocks)
    inverse.products = packed["products"]
    return inverse


def _together(
    blocks: Mapping[str, Any], about: Mapping[str, Any], decoder: Decoder, probe: Any
) -> BlockDiagonal:
    """The operator of the blocks' own operators."""
    layout = decoder.decode(about["layout"])
    operators = {name: inverse.operator for name, inverse in blocks.items()}
    if not any(isinstance(A, AbsentOperator) for A in operators.values()):
        return BlockDiagonal(operators, layout)
    absent = AbsentBlocks(operators, layout)
    absent.described, absent.probe = about["class"], probe
    return absent


def _absent(about: Mapping[str, Any], probe: Any, decoder: Decoder, like: Array) -> AbsentOperator:
    xp = _backend.namespace(like)
    empty = xp.zeros((0,), dtype=getattr(xp, about["dtype"]), device=_backend.device(like))
    return AbsentOperator(
        about["n"],
        described=about["class"],
        probe=probe,
        like=empty,
        psd=about["psd"],
        layout=decoder.decode(about["layout"]),
    )

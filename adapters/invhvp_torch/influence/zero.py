"""What regularization 0 comes to, in one warning and in the repr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invhvp.estimate import least_damping


def blocks_of(inverse: Any) -> Mapping[str, Any]:
    """The inverse of every block; of a single one under the name ''."""
    return getattr(inverse, "blocks", {"": inverse})


def cuts(inverse: Any) -> list[str]:
    """What the pseudo-inverses among the blocks leave out."""
    found = {name: getattr(i, "truncation", None) for name, i in blocks_of(inverse).items()}
    return [f"{name}: {t}" if name else str(t) for name, t in found.items() if t is not None]


def message(inverse: Any, damping: Mapping[str, float]) -> str | None:
    """What to warn of where λ = 0 leaves a block without a positive definite matrix.

    Cost: the products of `least_damping` for each such block.
    """
    values = list(damping.values())
    unsafe = {}
    for (name, block), value in zip(blocks_of(inverse).items(), values, strict=True):
        if value == 0 and not getattr(block, "exact", False):
            least = least_damping(block.operator)
            if least > 0:
                unsafe[name] = least
    if not unsafe:
        return None
    where = f" in {', '.join(unsafe)}" if any(unsafe) else ""
    how = f" ({'; '.join(cuts(inverse))})" if cuts(inverse) else ""
    return (
        f"regularization is 0{where}{how}; the smallest usable value is {max(unsafe.values()):.3g}"
    )

"""The projections of `nn.MultiheadAttention`, found in the graph: no module is called for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import layers


def projections(model: nn.Module, names: dict[int, str]) -> dict[int, dict[str, Any]]:
    """The fields of a `Layer` for every selected projection, by the id of its weight."""
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        mine, out = module._parameters, module.out_proj._parameters
        pairs = [
            (mine.get("in_proj_weight"), mine.get("in_proj_bias")),
            (out.get("weight"), out.get("bias")),
            *((mine.get(f"{which}_proj_weight"), None) for which in "qkv"),
        ]
        for weight, bias in pairs:
            selected = {
                key: names[id(p)]
                for key, p in (("weight", weight), ("bias", bias))
                if id(p) in names
            }
            if weight is not None and selected:
                rule = layers.RULES[nn.Linear]
                found[id(weight)] = {"module": module, "rule": rule, "names": selected}
    return found


def product_with(node: Any) -> tuple[Any, torch.Tensor | None]:
    """The parameter W and the rows X of a node that computes X Wᵀ (+ b); None for any other."""
    saved = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}.get(node.name())
    if saved is None:
        return None, None
    for following, _ in node.next_functions:
        if following is not None and following.name() == "TBackward0":
            weight = getattr(following.next_functions[0][0], "variable", None)
            if weight is not None:
                return weight, getattr(node, saved, None)
    return None, None

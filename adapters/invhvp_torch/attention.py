"""The projections of `nn.MultiheadAttention`, found in the graph: no module is called for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import layers
from .contributions import Span


def projections(model: nn.Module, names: dict[int, str]) -> dict[int, dict[str, Any]]:
    """The fields of a `Layer` for every selected projection, by the id of its weight."""
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        mine, out = module._parameters, module.out_proj._parameters
        width, bias_in = module.embed_dim, mine.get("in_proj_bias")
        pairs = [
            (mine.get("in_proj_weight"), bias_in, None),
            (out.get("weight"), out.get("bias"), None),
            *(
                (mine.get(f"{which}_proj_weight"), bias_in, Span(i * width, width, 3 * width))
                for i, which in enumerate("qkv")
            ),
        ]
        for weight, bias, bias_rows in pairs:
            selected = {
                key: names[id(p)]
                for key, p in (("weight", weight), ("bias", bias))
                if id(p) in names
            }
            if weight is not None and selected:
                rule = layers.RULES[nn.Linear]
                found[id(weight)] = {
                    "module": module,
                    "rule": rule,
                    "names": selected,
                    "bias_rows": bias_rows,
                }
    return found


def product_with(node: Any) -> tuple[Any, torch.Tensor | None, Span | None]:
    """The parameter W, the X and the rows of W of a node that computes X Wᵀ (+ b).

    None for any other node, and for the rows where they are all.
    """
    saved = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}.get(node.name())
    if saved is None:
        return None, None, None
    for following, _ in node.next_functions:
        if following is not None and following.name() == "TBackward0":
            weight, rows = parameter_at(following.next_functions[0])
            if weight is not None:
                return weight, getattr(node, saved, None), rows
    return None, None, None


def parameter_at(edge: tuple[Any, int]) -> tuple[Any, Span | None]:
    """The parameter that an edge of the graph leads to, and which of its rows where not all."""
    node, output = edge
    variable = getattr(node, "variable", None)
    if variable is not None or not splits_parameter(node):
        return variable, None
    variable = node.next_functions[0][0].variable
    total = variable.shape[0]
    if node.name() == "SplitBackward0":
        size = int(node._saved_split_size)
        sizes = [min(size, total - start) for start in range(0, total, size)]
    else:
        sizes = [int(size) for size in node._saved_split_sizes]
    return variable, Span(sum(sizes[:output]), sizes[output], total)


def splits_parameter(node: Any) -> bool:
    """Whether a node cuts a parameter into blocks of rows."""
    if node is None or node.name() not in ("SplitBackward0", "SplitWithSizesBackward0"):
        return False
    return node._saved_dim == 0 and hasattr(node.next_functions[0][0], "variable")

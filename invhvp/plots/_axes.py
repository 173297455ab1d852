"""Colours, and the Axes that every picture is drawn on."""

from __future__ import annotations

from typing import Any

GOOD, BAD, NEUTRAL = "#1f6fb4", "#c8402f", "#767676"
PALETTE = ("#1f6fb4", "#e08214", "#2f8f5b", "#8a4fa3", "#c8402f", "#767676", "#b59b00", "#0f9aa8")


def axes(ax: Any, width: float, height: float) -> Any:
    """The Axes given, or those of a new figure."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        msg = "plots need matplotlib, which is not installed: pip install 'invhvp[plot]'"
        raise ModuleNotFoundError(msg, name=error.name) from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def clean(ax: Any) -> Any:
    """Fewer lines: what is left is data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(visible=True, color="#e6e6e6", lw=0.7)
    ax.set_axisbelow(True)
    return ax


def ticks(limits: tuple[float, float]) -> Any:
    """The same ticks on both axes, whatever matplotlib would choose for each."""
    from matplotlib.ticker import FixedLocator, MaxNLocator

    inside = [t for t in MaxNLocator(5).tick_values(*limits) if limits[0] <= t <= limits[1]]
    return FixedLocator(inside)

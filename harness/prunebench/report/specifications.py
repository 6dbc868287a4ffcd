"""What plotly's specifications are made of, as plain data: axes, layouts, colours by name; and how they are kept short.

Colours are names that the page puts values in for, so that one specification serves light and dark: `@ink`, `@c3`, or `@c3:0.3`
with its opacity.
"""

from __future__ import annotations

import math
from typing import Any

from prunebench.plain import plain
from prunebench.report.axes import Axis
from prunebench.report.palette import INK, Look

Chart = dict[str, Any]

DIGITS = 6
"""Of every number in a figure: more than a screen has pixels."""

SYMBOLS = {"triangle": "triangle-up", "cross": "x"}
"""Shapes that plotly calls otherwise."""

DEFAULTS: dict[str, Any] = {
    "layout": {
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "font": {"color": "@ink", "size": 12},
        "xaxis": (
            _AXIS := {
                "type": "linear",
                "gridcolor": "@line",
                "zeroline": False,
                "tickfont": {"size": 11, "color": "@soft"},
                "fixedrange": True,
                "automargin": True,
                "title": {"font": {"size": 12, "color": "@soft"}},
            }
        ),
        "yaxis": _AXIS,
    },
    "scatter": {
        "mode": "markers",
        "hoverinfo": "none",
        "marker": {"size": 11, "symbol": "circle", "line": {"color": "@surface", "width": 1}},
    },
    "bar": {"orientation": "h", "hoverinfo": "none", "width": 0.36, "marker": {"line": {"color": "@surface", "width": 1}}},
    "heatmap": {
        "hoverinfo": "none",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, "@heat0"], [0.5, "@heat1"], [1, "@heat2"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": "@soft", "size": 11}},
    },
}
"""What the page lays under every layout, and under every trace of a type; a specification says only what differs."""


def shown(text: str) -> str:
    """A stranger's text for plotly, which reads tags and entities."""
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colour(look: Look, opacity: float | None = None) -> str:
    """The page's name of a method's colour."""
    name = "@ink" if look.colour == INK else f"@c{look.colour}"
    return name if opacity is None else f"{name}:{opacity}"


def axis_of(axis: Axis, title: str) -> dict[str, Any]:
    """An axis of values; `title` is safe for plotly already."""
    low, high = (math.log10(end) if axis.logarithmic else end for end in (axis.low, axis.high))
    texts = [tick_text(tick) for tick in axis.ticks]
    kind = {"type": "log"} if axis.logarithmic else {}
    return {**kind, "range": [low, high], "tickvals": list(axis.ticks), "ticktext": texts, "title": {"text": title}}


def named_axis(names: list[str], title: str = "") -> dict[str, Any]:
    """An axis of categories at 0, 1, 2 …"""
    return {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False, "ticks": "", "title": {"text": title}}


def layout_of(across: dict[str, Any], up: dict[str, Any], height: int) -> dict[str, Any]:
    """A layout of so many pixels."""
    return {"xaxis": across, "yaxis": up, "height": height}


def dense_line(value: float | None) -> dict[str, Any]:
    """The dense model's value across the picture; the page writes its name there."""
    if value is None:
        return {}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "layer": "below"}
    return {"shapes": [{**line, "line": {"color": "@soft", "width": 1, "dash": "dash"}}], "dense": value}


def tick_text(value: float) -> str:
    """A tick's number, thousands marked."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def rounded(part: Any) -> Any:
    """The same with numbers of so many digits, and nothing where there is no number."""
    if isinstance(part, dict):
        return {key: rounded(value) for key, value in part.items()}
    if isinstance(part, list | tuple):
        return [rounded(value) for value in part]
    if not isinstance(part, float):
        return part
    return float(f"{part:.{DIGITS}g}") if math.isfinite(part) else None

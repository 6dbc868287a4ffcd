"""From the data of figures to plotly's specifications, as plain data.

Colours are names that the page puts values in for, so that one specification serves light and dark: `@ink`, `@c3`, or `@c3:0.3`
with its opacity. What strangers wrote is escaped for plotly, which reads tags in its texts; hover texts are not plotly's, the
page shows them as text. Each point carries `{"runs": keys, "tip": lines}`, and each trace of a method its name in `meta`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from prunebench.plain import plain
from prunebench.report.axes import Axis, value_axis
from prunebench.report.figures import Curve, Curves, PhaseBars, Tradeoff
from prunebench.report.marks import COSTS, PEAK_MIB, PRUNE_SECONDS, SPEED_UP, Hollow, Mark
from prunebench.report.matrices import Heat, OverlapSquare
from prunebench.report.palette import COLOURS, INK, PHASES, Look, Palette, family
from prunebench.results.leaderboard import number, target_title

Chart = dict[str, Any]
Keys = Callable[[Sequence[str]], list[str]]
"""Ids of runs to the keys of their records on the page."""

COST_TITLES = dict(zip(COSTS, ("Prune time", "Peak memory", "Speed-up"), strict=True))

_COST_AXES = {PRUNE_SECONDS: "seconds to prune", PEAK_MIB: "peak memory, MiB", SPEED_UP: "speed-up, times"}
_SYMBOLS = {"triangle": "triangle-up", "cross": "x"}
_MOST_TEXTS = 16
"""Columns of a heat map whose cells still have room for their numbers."""
_MOST_LABELS = 9
"""Of marks in one picture that each have their name beside them; of more only the front has."""
_SIZE = 11
_ROW, _CELL = 40, 32
"""Pixels of a bar with its name above it, and of a heat map's row."""


def shown(text: str) -> str:
    """A stranger's text for plotly, which reads tags and entities."""
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def colour(look: Look, opacity: float | None = None) -> str:
    """The page's name of a method's colour."""
    name = "@ink" if look.colour == INK else f"@c{look.colour}"
    return name if opacity is None else f"{name}:{opacity}"


def tradeoff_chart(figure: Tradeoff, palette: Palette, keys: Keys) -> Chart:
    """Quality against a cost: a mark a row with its band, the front as a line, published numbers hollow at the edge."""
    paid = {mark.method: float(mark.cost(figure.cost) or 0.0) for mark in figure.marks}
    costs = value_axis(paid.values(), always=figure.cost == PRUNE_SECONDS)
    ends = [end for mark in figure.marks for end in (mark.low, mark.high, mark.value)]
    values = value_axis([*ends, *_dense(figure.dense), *(hollow.value for hollow in figure.published)])
    labelled = {*figure.front} if len(figure.marks) > _MOST_LABELS else {*paid}
    traces = [_front(figure, paid)]
    for mark in figure.marks:
        trace = _point(mark, paid[mark.method], palette, keys, figure.quality)
        own = trace["customdata"][0]
        own["tip"].append(_cost_line(mark, figure.cost, mark.method in figure.front))
        trace["opacity"] = 0.55 if mark.shared_machine else 1.0
        if mark.method in labelled:
            trace |= {"mode": "markers+text", "text": [f"  {shown(family(mark.method))}"], "textposition": "middle right"}
            trace["textfont"] = {"color": "@soft", "size": 11}
        traces.append(trace)
    traces += [_hollow(one, 0.02, palette, xaxis="x2") for one in figure.published]
    layout = _layout(_axis(costs, _COST_AXES[figure.cost]), _axis(values, shown(figure.quality)), 380)
    layout |= _dense_line(figure.dense)
    layout["xaxis2"] = {"overlaying": "x", "range": [0, 1], "visible": False, "fixedrange": True}
    best = "higher is better" if figure.higher_is_better else "lower is better"
    label = f"{figure.quality} against {COST_TITLES[figure.cost].lower()}, {len(figure.marks)} methods, {best}"
    return {"title": COST_TITLES[figure.cost], "label": plain(label), "data": traces, "layout": layout}


def curves_chart(figure: Curves, palette: Palette, keys: Keys) -> Chart:
    """Quality against sparsity: a line a method with its band; N:M targets as marks of their own, dashed where retrained."""
    points = [mark for curve in figure.curves for mark in (*curve.points, *curve.patterns)]
    ends = [end for mark in points for end in (mark.low, mark.high, mark.value)]
    values = value_axis([*ends, *_dense(figure.dense), *(h.value for h in figure.published)], always=figure.logarithmic)
    traces, legend = [], []
    for curve in figure.curves:
        look = palette.look(curve.method)
        legend.append({"method": curve.method, "colour": colour(look), "shape": look.shape, "trained": curve.trained})
        traces += _curve(curve, palette, keys, figure.quality)
    at = {mark.target: 100 * mark.sparsity for mark in points}
    traces += [_hollow(one, at[one.target], palette) for one in figure.published if one.target in at]
    shares = sorted({round(100 * mark.sparsity, 2) for mark in points})
    across = {
        **_axis(Axis(logarithmic=False, low=shares[0] - 3, high=shares[-1] + 3, ticks=()), "zeros asked for, %"),
        "tickvals": shares,
        "ticktext": [f"{share:g}" for share in shares],
    }
    layout = _layout(across, _axis(values, shown(figure.quality)), 420) | _dense_line(figure.dense)
    best = "higher is better" if figure.higher_is_better else "lower is better"
    label = plain(f"{figure.quality} against sparsity, {len(figure.curves)} methods, {best}")
    return {"title": "Quality against sparsity", "label": label, "data": traces, "layout": layout, "legend": legend}


def phases_chart(figure: PhaseBars, keys: Keys) -> Chart:
    """Seconds by phase: one stacked bar a row of the table, with its name above it."""
    places = list(range(len(figure.methods)))
    names, used = list(figure.phases), 0
    data = []
    for name in names:
        if name not in PHASES:
            used += 1
        token = f"@{name}" if name in PHASES else f"@c{(used - 1) % len(COLOURS)}"
        seconds = figure.phases[name]
        points = [
            {"runs": keys(ids), "tip": [plain(method), f"{plain(name)} {each:.2f} s of {whole:.2f} s"]}
            for ids, method, each, whole in zip(figure.ids, figure.methods, seconds, _sums(figure), strict=True)
        ]
        bar = {"type": "bar", "orientation": "h", "x": list(seconds), "y": places, "customdata": points, "width": 0.36}
        data.append(
            {
                **bar,
                "name": shown(name),
                "hoverinfo": "none",
                "marker": {"color": token, "line": {"color": "@surface", "width": 1}},
            }
        )
    above = [
        {
            "x": 0, "xref": "paper", "xanchor": "left", "y": place, "yshift": 15, "align": "left", "showarrow": False,
            "text": shown(f"{method}{' *' if marked else ''}"), "font": {"size": 11, "color": "@ink"},
        }
        for place, method, marked in zip(places, figure.methods, figure.marked, strict=True)
    ]  # fmt: skip
    axis = value_axis([0.0, *_sums(figure)], linear=True)
    down = {"range": [len(places) - 0.5, -0.75], "visible": False, "fixedrange": True}
    layout = _layout(_axis(axis, "seconds"), down, 70 + _ROW * len(places))
    layout |= {"barmode": "stack", "annotations": above, "bargap": 0.5}
    layout["margin"] |= {"l": 8}
    layout["xaxis"] |= {"range": [0, axis.high], "tickvals": [t for t in axis.ticks if t <= axis.high]}
    layout["xaxis"]["ticktext"] = [_tick(tick) for tick in layout["xaxis"]["tickvals"]]
    legend = [{"method": trace["name"], "colour": trace["marker"]["color"], "shape": "bar"} for trace in data]
    label = f"Seconds by phase of {len(places)} methods"
    methods = [plain(method) for method in figure.methods]
    return {"title": "Time by phase", "label": label, "data": data, "layout": layout, "legend": legend, "methods": methods}


def heat_chart(figure: Heat, keys: Keys) -> Chart:
    """One number a matrix: roles down, blocks across."""
    blocks = [str(block) for block in figure.blocks]
    chart = _grid([shown(role) for role in figure.roles], blocks, figure.values.tolist(), figure.what)
    chart["layout"]["xaxis"]["title"] = {"text": "block", "font": {"size": 12, "color": "@soft"}}
    chart["grid"] = {
        "down": list(figure.roles),
        "across": blocks,
        "what": figure.what,
        "runs": keys(figure.ids),
        "square": False,
    }
    return chart


def overlap_chart(figure: OverlapSquare, keys: Keys) -> Chart:
    """Methods and seeds against each other; a cell opens the runs of its row and its column."""
    labels = [shown(label) for label in figure.labels]
    chart = _grid(
        labels, [str(index + 1) for index in range(len(labels))], figure.values.tolist(), "overlap of removed weights"
    )
    chart["layout"]["yaxis"]["ticktext"] = [f"{label}  {index + 1}" for index, label in enumerate(labels)]
    own = list(map(plain, figure.labels))
    chart["grid"] = {"down": own, "across": own, "what": "overlap", "runs": keys(figure.ids), "square": True}
    return chart


def _grid(down: list[str], across: list[str], values: list[list[float]], what: str) -> Chart:
    """A heat map; what its cells say and open is for the page to make of `grid`, since it would be long."""
    kept = [[None if math.isnan(value) else float(f"{value:.4g}") for value in line] for line in values]
    trace = {
        "type": "heatmap", "x": list(range(len(across))), "y": list(range(len(down))), "z": kept, "hoverinfo": "none",
        "hoverongaps": False, "xgap": 2, "ygap": 2, "colorscale": [[0, "@heat0"], [0.5, "@heat1"], [1, "@heat2"]],
        "colorbar": {"thickness": 10, "outlinewidth": 0, "tickfont": {"color": "@soft", "size": 11}},
    }  # fmt: skip
    if len(across) <= _MOST_TEXTS:
        trace |= {"texttemplate": "%{z:.3g}", "textfont": {"size": 11}, "showscale": False}
    flat = [value for line in kept for value in line if value is not None]
    if flat and max(flat) - min(flat) < 0.02 * abs(max(flat)):  # nearly one value is a quiet picture, not a bright one
        trace |= {"zmin": 0, "zmax": 2 * abs(max(flat)) or 1}
    common = {"showgrid": False, "zeroline": False, "fixedrange": True, "automargin": True}
    axes = [
        {**common, "tickvals": list(range(len(names))), "ticktext": names, "tickfont": {"color": "@soft", "size": 11}}
        for names in (across, down)
    ]
    layout = _layout(axes[0], {**axes[1], "autorange": "reversed"}, 80 + _CELL * len(down))
    return {"title": what, "label": f"{what}: {len(down)} by {len(across)}", "data": [trace], "layout": layout}


def _curve(curve: Curve, palette: Palette, keys: Keys, quality: str) -> list[Chart]:
    look = palette.look(curve.method)
    traces: list[Chart] = []
    across = [100 * mark.sparsity for mark in curve.points]
    if len(curve.points) > 1:
        around = [mark.high for mark in curve.points] + [mark.low for mark in reversed(curve.points)]
        band = {"x": across + across[::-1], "y": around, "fill": "toself", "fillcolor": colour(look, 0.14), "mode": "lines"}
        traces.append({"type": "scatter", **band, "line": {"width": 0}, "hoverinfo": "skip", "meta": {"method": curve.method}})
        line = {"x": across, "y": [mark.value for mark in curve.points], "mode": "lines", "hoverinfo": "skip"}
        style = {"color": colour(look), "width": 1.75, "dash": "dot" if curve.trained else "solid"}
        traces.append({"type": "scatter", **line, "line": style, "meta": {"method": curve.method}})
    for mark in (*curve.points, *curve.patterns):
        traces.append(_point(mark, 100 * mark.sparsity, palette, keys, quality, thin=mark in curve.points))
    return traces


def _point(mark: Mark, across: float, palette: Palette, keys: Keys, quality: str, *, thin: bool = False) -> Chart:
    """One row as a mark, with its band as a broad pale bar behind it."""
    look = palette.look(mark.method)
    band = {"type": "data", "symmetric": False, "array": [mark.high - mark.value], "arrayminus": [mark.value - mark.low]}
    pattern = thin is False and ":" in mark.target
    symbol = _SYMBOLS.get(look.shape, look.shape)
    tip = [
        plain(f"{mark.method} at {target_title(mark.target)}"),
        f"{plain(quality)} {number(mark.value)}"
        + (f", 95% from {number(mark.low)} to {number(mark.high)}" if mark.low < mark.high else ", no interval"),
        f"{'rank ' + mark.rank + ', ' if mark.rank else ''}{mark.seeds}{' seeds' if mark.seeds.isdigit() else ''}",
    ]
    return {
        "type": "scatter", "mode": "markers", "x": [across], "y": [mark.value], "hoverinfo": "none",
        "customdata": [{"runs": keys(mark.ids), "tip": tip}], "meta": {"method": mark.method},
        "marker": {"color": colour(look), "symbol": symbol, "size": _SIZE - 2 if thin else _SIZE,
                   "line": {"color": "@surface", "width": 1}},
        **({} if thin else {"error_y": band | {"color": colour(look, 0.26), "thickness": 4 if pattern else 6, "width": 0}}),
    }  # fmt: skip


def _hollow(one: Hollow, across: float, palette: Palette, xaxis: str = "x") -> Chart:
    look = palette.look(one.method)
    tip = [plain(f"{one.method} at {target_title(one.target)}"), plain(f"published {number(one.value)}, {one.label}")]
    return {
        "type": "scatter", "mode": "markers", "x": [across], "y": [one.value], "xaxis": xaxis, "hoverinfo": "none",
        "customdata": [{"runs": [], "tip": tip}], "meta": {"method": one.method}, "cliponaxis": False,
        "marker": {"color": colour(look), "symbol": _SYMBOLS.get(look.shape, look.shape) + "-open", "size": _SIZE + 1,
                   "line": {"width": 2}},
    }  # fmt: skip


def _front(figure: Tradeoff, paid: dict[str, float]) -> Chart:
    """The non-dominated methods as steps: what is reached with so much, until more is spent."""
    values = {mark.method: mark.value for mark in figure.marks}
    line = {"color": "@accent:0.7", "width": 1.5, "shape": "vh" if figure.cost == SPEED_UP else "hv"}
    at = {"x": [paid[name] for name in figure.front], "y": [values[name] for name in figure.front]}
    return {"type": "scatter", "mode": "lines", **at, "line": line, "hoverinfo": "skip"}


def _cost_line(mark: Mark, cost: str, on_front: bool) -> str:
    paid = mark.cost(cost) or 0.0
    told = {PRUNE_SECONDS: f"{paid:.2f} s", PEAK_MIB: f"{paid:.0f} MiB", SPEED_UP: f"{paid:.2f} times"}[cost]
    shared = "; measured on a shared machine, so it decides nothing" if mark.shared_machine else ""
    return f"{COST_TITLES[cost].lower()} {told}{'; nobody is better in both' if on_front else ''}{shared}"


def _dense(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _dense_line(value: float | None) -> dict[str, Any]:
    """The dense model's value across the picture."""
    if value is None:
        return {}
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "layer": "below"}
    return {"shapes": [{**line, "line": {"color": "@soft", "width": 1, "dash": "dash"}}], "dense": value}


def _sums(figure: PhaseBars) -> list[float]:
    return [sum(seconds) for seconds in zip(*figure.phases.values(), strict=True)]


def _axis(axis: Axis, title: str) -> dict[str, Any]:
    low, high = (math.log10(end) if axis.logarithmic else end for end in (axis.low, axis.high))
    return {
        "type": "log" if axis.logarithmic else "linear", "range": [low, high], "tickvals": list(axis.ticks),
        "ticktext": [_tick(tick) for tick in axis.ticks], "title": {"text": title, "font": {"size": 12, "color": "@soft"}},
        "gridcolor": "@line", "zeroline": False, "tickfont": {"size": 11, "color": "@soft"}, "fixedrange": True,
        "automargin": True,
    }  # fmt: skip


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _layout(across: dict[str, Any], up: dict[str, Any], height: int) -> dict[str, Any]:
    return {
        "xaxis": across, "yaxis": up, "height": height, "showlegend": False, "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "margin": {"l": 56, "r": 16, "t": 12, "b": 48},
        "font": {"family": "system-ui, sans-serif", "color": "@ink", "size": 12},
    }  # fmt: skip

"""From the data of figures to plotly's specifications.

What strangers wrote is escaped for plotly, which reads tags in its texts; hover texts are not plotly's, the page shows them as
text. Each point carries `{"method", "runs": keys, "tip": lines, "line": one more}`, which the page keeps once for all figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from prunebench.plain import plain
from prunebench.report.axes import value_axis
from prunebench.report.figures import Curve, Curves, PhaseBars, Tradeoff
from prunebench.report.marks import COSTS, PEAK_MIB, PRUNE_SECONDS, SPEED_UP, Hollow, Mark
from prunebench.report.matrices import Heat, OverlapSquare
from prunebench.report.naming import short_labels
from prunebench.report.palette import COLOURS, PHASES, Palette, family
from prunebench.report.specifications import (
    SYMBOLS,
    Chart,
    axis_of,
    colour,
    dense_line,
    layout_of,
    named_axis,
    shown,
    tick_text,
)
from prunebench.results.leaderboard import number
from prunebench.results.rows import target_title

Keys = Callable[[Sequence[str]], list[str]]
"""Ids of runs to the keys of their records on the page."""

COST_TITLES = dict(zip(COSTS, ("Prune time", "Peak memory", "Speed-up"), strict=True))

_COST_AXES = {PRUNE_SECONDS: "seconds to prune", PEAK_MIB: "peak memory, MiB", SPEED_UP: "speed-up, times"}
_MOST_LABELS = 9
"""Of marks in one picture that each have their name beside them; of more only the front has."""
_LONGEST_LABEL = 36
_ROW, _CELL = 40, 32
"""Pixels of a bar with its name above it, and of a heat map's row."""
_COLUMN = 7.0
"""Between N:M targets, in the unit of the unstructured ones beside them, per cent."""


def tradeoff_chart(figure: Tradeoff, palette: Palette, keys: Keys) -> Chart:
    """Quality against a cost: a mark a row with its band, the front as a line, published numbers hollow at the edge."""
    paid = {mark.method: float(mark.cost(figure.cost) or 0.0) for mark in figure.marks}
    costs = value_axis(paid.values(), always=figure.cost == PRUNE_SECONDS)
    ends = [end for mark in figure.marks for end in (mark.low, mark.high, mark.value)]
    values = value_axis([*ends, *_known(figure.dense), *(hollow.value for hollow in figure.published)])
    labels = short_labels(paid)
    labelled = {*figure.front} if len(figure.marks) > _MOST_LABELS else {*paid}
    traces = [_front(figure, paid)] if len(figure.front) > 1 else []
    for mark in figure.marks:
        trace = _point(mark, paid[mark.method], palette, keys, figure.quality)
        trace["customdata"][0]["line"] = _cost_line(mark, figure.cost, mark.method in figure.front)
        if mark.shared_machine:
            trace["marker"]["opacity"] = 0.5
        if mark.method in labelled:
            side = "left" if costs.place(paid[mark.method]) > 0.5 else "right"
            name = {"text": [shown(_cut(labels[mark.method]))], "textposition": f"top {side}"}
            trace |= {"mode": "markers+text", **name, "textfont": {"color": "@soft", "size": 11}}
        traces.append(trace)
    traces += [_hollow(one, 0.02, palette) | {"xaxis": "x2"} for one in figure.published]
    layout = layout_of(axis_of(costs, _COST_AXES[figure.cost]), axis_of(values, shown(figure.quality)), 380)
    layout |= dense_line(figure.dense)
    if figure.published:
        layout["xaxis2"] = {"overlaying": "x", "range": [0, 1], "visible": False, "fixedrange": True}
    label = f"{figure.quality} against {COST_TITLES[figure.cost].lower()}, {_what(len(figure.marks), figure.higher_is_better)}"
    return {"title": COST_TITLES[figure.cost], "label": plain(label), "data": traces, "layout": layout}


def curves_chart(figure: Curves, palette: Palette, keys: Keys) -> Chart:
    """Quality against sparsity: a line a method with its band, dotted where retrained; N:M targets in columns beside them."""
    points = [mark for curve in figure.curves for mark in (*curve.points, *curve.patterns)]
    ends = [end for mark in points for end in (mark.low, mark.high, mark.value)]
    values = value_axis([*ends, *_known(figure.dense), *(h.value for h in figure.published)], always=figure.logarithmic)
    at, texts = _columns(points)
    beside = _beside_each_other([mark for mark in points if ":" in mark.target], at)
    traces: list[Chart] = []
    for curve in figure.curves:
        traces += _line(curve, palette, at)
        for mark in (*curve.points, *curve.patterns):
            place = beside.get((mark.method, mark.target, mark.ids), at[mark.target])
            traces.append(_point(mark, place, palette, keys, figure.quality, banded=":" in mark.target))
    traces += [_hollow(one, at[one.target], palette) for one in figure.published if one.target in at]
    across = {"range": [min(at.values()) - 4, max(at.values()) + 4], "tickvals": list(at.values()), "ticktext": texts}
    across |= {"title": {"text": "target: share of zeros, or survivors of each group"}}
    layout = layout_of(across, axis_of(values, shown(figure.quality)), 400) | dense_line(figure.dense)
    label = plain(f"{figure.quality} against sparsity, {_what(len(figure.curves), figure.higher_is_better)}")
    title = {"title": "Quality against sparsity", "label": label}
    return {**title, "data": traces, "layout": layout, "legend": _legend(figure.curves, palette)}


def phases_chart(figure: PhaseBars, keys: Keys) -> Chart:
    """Seconds by phase: one stacked bar a row of the table, with its name above it."""
    places = list(range(len(figure.methods)))
    whole = [sum(seconds) for seconds in zip(*figure.phases.values(), strict=True)]
    own = [name for name in figure.phases if name not in PHASES]
    data: list[Chart] = []
    for name, seconds in figure.phases.items():
        token = f"@{name}" if name in PHASES else f"@c{own.index(name) % len(COLOURS)}"
        points = [
            {"runs": keys(ids), "tip": [plain(method)], "line": f"{plain(name)} {each:.2f} s of {total:.2f} s"}
            for ids, method, each, total in zip(figure.ids, figure.methods, seconds, whole, strict=True)
        ]
        bar = {"type": "bar", "x": list(seconds), "y": places, "customdata": points}
        data.append({**bar, "name": shown(name), "marker": {"color": token}})
    above = {"x": 0, "xref": "paper", "xanchor": "left", "yshift": 15, "align": "left", "showarrow": False}
    names = [
        {**above, "y": place, "text": shown(f"{method}{' *' if marked else ''}"), "font": {"size": 11, "color": "@ink"}}
        for place, method, marked in zip(places, figure.methods, figure.marked, strict=True)
    ]
    axis = value_axis([0.0, *whole], linear=True)
    ticks = [tick for tick in axis.ticks if tick >= 0]
    across = {"range": [0, axis.high], "tickvals": ticks, "ticktext": [tick_text(tick) for tick in ticks]}
    down = {"range": [len(places) - 0.5, -0.75], "visible": False}
    layout = layout_of({**across, "title": {"text": "seconds"}}, down, 70 + _ROW * len(places))
    layout |= {"barmode": "stack", "annotations": names, "margin": {"l": 8}}
    legend = [
        {"name": plain(name), "colour": trace["marker"]["color"], "shape": "bar"}
        for name, trace in zip(figure.phases, data, strict=True)
    ]
    label = f"Seconds by phase of {len(places)} methods"
    methods = [plain(method) for method in figure.methods]
    return {"title": "Time by phase", "label": label, "data": data, "layout": layout, "legend": legend, "methods": methods}


def heat_chart(figure: Heat, keys: Keys) -> Chart:
    """One number a matrix: roles down, blocks across."""
    blocks = [str(block) for block in figure.blocks]
    chart = _grid([shown(role) for role in figure.roles], named_axis(blocks, "block"), figure.values.tolist(), figure.what)
    own = {"down": [plain(role) for role in figure.roles], "across": blocks}
    return chart | {"grid": {**own, "what": figure.what, "runs": keys(figure.ids), "square": False}}


def overlap_chart(figure: OverlapSquare, keys: Keys) -> Chart:
    """Methods and seeds against each other, named at the side and numbered below; a cell opens its two runs."""
    labels = [f"{shown(label)}  {index}" for index, label in enumerate(figure.labels, start=1)]
    numbers = named_axis([str(index + 1) for index in range(len(labels))])
    chart = _grid(labels, numbers, figure.values.tolist(), "overlap of removed weights")
    own = [plain(label) for label in figure.labels]
    return chart | {"grid": {"down": own, "across": own, "what": "overlap", "runs": keys(figure.ids), "square": True}}


def _grid(down: list[str], across: dict[str, Any], values: list[list[float]], what: str) -> Chart:
    """A heat map; what its cells say and open is for the page to make of `grid`, since it would be long."""
    columns = len(across["tickvals"])
    trace: Chart = {"type": "heatmap", "x": list(range(columns)), "y": list(range(len(down))), "z": values}
    flat = [value for line in values for value in line if value == value]
    if flat and max(flat) - min(flat) < 0.02 * abs(max(flat)):  # nearly one value is a quiet picture, not a bright one
        trace |= {"zmin": 0, "zmax": 2 * abs(max(flat)) or 1}
    layout = layout_of(across, {**named_axis(down), "autorange": "reversed"}, 80 + _CELL * len(down))
    return {"title": what, "label": f"{what}: {len(down)} by {columns}", "data": [trace], "layout": layout}


def _columns(points: Sequence[Mark]) -> tuple[dict[str, float], list[str]]:
    """Where each target stands, and what is written there: shares by their size, N:M targets in columns behind them."""
    shares = sorted({mark.target for mark in points if ":" not in mark.target}, key=float)
    patterns = sorted(
        {mark.target: mark.sparsity for mark in points if ":" in mark.target}.items(), key=lambda item: item[::-1]
    )
    at = {target: 100 * float(target) for target in shares}
    behind = max(at.values(), default=0.0) + 2
    at |= {target: behind + _COLUMN * index for index, (target, _) in enumerate(patterns, start=1)}
    return at, [f"{100 * float(target):g}%" for target in shares] + [target for target, _ in patterns]


def _beside_each_other(marks: Sequence[Mark], at: dict[str, float]) -> dict[tuple[str, str, tuple[str, ...]], float]:
    """Places of marks that share a column, the least value first."""
    found = {}
    for target in {mark.target for mark in marks}:
        own = sorted((mark for mark in marks if mark.target == target), key=lambda mark: (mark.value, mark.method))
        step = min(0.9, 0.78 * _COLUMN / len(own))
        for index, mark in enumerate(own):
            found[mark.method, target, mark.ids] = at[target] + step * (index - (len(own) - 1) / 2)
    return found


def _line(curve: Curve, palette: Palette, at: dict[str, float]) -> list[Chart]:
    """A method's line over unstructured targets and the area of its intervals."""
    if len(curve.points) < 2:
        return []
    look, across = palette.look(curve.method), [at[mark.target] for mark in curve.points]
    around = [mark.high for mark in curve.points] + [mark.low for mark in reversed(curve.points)]
    common = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "meta": {"method": plain(curve.method)}}
    area = {"x": across + across[::-1], "y": around, "fill": "toself", "fillcolor": colour(look, 0.14), "line": {"width": 0}}
    line = {"color": colour(look), "width": 1.75, "dash": "dot" if curve.trained else "solid"}
    return [{**common, **area}, {**common, "x": across, "y": [mark.value for mark in curve.points], "line": line}]


def _point(mark: Mark, across: float, palette: Palette, keys: Keys, quality: str, *, banded: bool = True) -> Chart:
    """One row as a mark, with its interval as a broad pale bar behind it."""
    look = palette.look(mark.method)
    band = f", 95% from {number(mark.low)} to {number(mark.high)}" if mark.low < mark.high else ", no interval"
    tip = [
        plain(f"{mark.method} at {target_title(mark.target)}"),
        f"{plain(quality)} {number(mark.value)}{band}",
        f"{f'rank {mark.rank}, ' if mark.rank else ''}{mark.seeds}{_seeds(mark.seeds)}",
    ]
    told = {"method": plain(mark.method), "runs": keys(mark.ids), "tip": tip}
    sign = {"color": colour(look), "symbol": SYMBOLS.get(look.shape, look.shape)}
    trace: Chart = {"type": "scatter", "x": [across], "y": [mark.value], "customdata": [told], "marker": sign}
    if banded and mark.low < mark.high:
        ends = {"array": [mark.high - mark.value], "arrayminus": [mark.value - mark.low]}
        trace["error_y"] = {"symmetric": False, **ends, "color": colour(look, 0.26), "thickness": 6, "width": 0}
    return trace


def _hollow(one: Hollow, across: float, palette: Palette) -> Chart:
    """A published number."""
    look = palette.look(one.method)
    tip = [plain(f"{one.method} at {target_title(one.target)}"), plain(f"published {number(one.value)}, {one.label}")]
    sign = {"color": colour(look), "symbol": f"{SYMBOLS.get(look.shape, look.shape)}-open", "size": 12}
    told = {"method": plain(one.method), "runs": [], "tip": tip}
    point = {"x": [across], "y": [one.value], "customdata": [told]}
    return {"type": "scatter", **point, "cliponaxis": False, "marker": {**sign, "line": {"color": colour(look), "width": 2}}}


def _front(figure: Tradeoff, paid: dict[str, float]) -> Chart:
    """The non-dominated methods as steps: what is reached with so much, until more is spent."""
    values = {mark.method: mark.value for mark in figure.marks}
    line = {"color": "@accent:0.7", "width": 1.5, "shape": "vh" if figure.cost == SPEED_UP else "hv"}
    at = {"x": [paid[name] for name in figure.front], "y": [values[name] for name in figure.front]}
    meta = {"methods": [plain(name) for name in figure.front]}
    return {"type": "scatter", "mode": "lines", **at, "line": line, "hoverinfo": "skip", "meta": meta}


def _cost_line(mark: Mark, cost: str, on_front: bool) -> str:
    paid = mark.cost(cost) or 0.0
    told = {PRUNE_SECONDS: f"{paid:.2f} s", PEAK_MIB: f"{paid:.0f} MiB", SPEED_UP: f"{paid:.2f} times"}[cost]
    shared = "; measured on a shared machine, so this is the most it can be" if mark.shared_machine else ""
    return f"{COST_TITLES[cost].lower()} {told}{'; nobody is better in both' if on_front else ''}{shared}"


def _legend(curves: Sequence[Curve], palette: Palette) -> list[dict[str, Any]]:
    """Each mark once, with the methods that have it: options are not told apart by it."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    for curve in curves:
        look, name = palette.look(curve.method), family(curve.method) + (", retrained" if curve.trained else "")
        sign = {"name": plain(name), "colour": colour(look), "shape": look.shape, "methods": []}
        found.setdefault((name, curve.trained), sign)["methods"].append(plain(curve.method))
    return list(found.values())


def _what(methods: int, higher_is_better: bool) -> str:
    return f"{methods} method{'' if methods == 1 else 's'}, {'higher' if higher_is_better else 'lower'} is better"


def _seeds(count: str) -> str:
    return " seed" if count == "1" else " seeds" if count.isdigit() else ""


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 1]}…"


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]

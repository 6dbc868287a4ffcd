"""Trade-offs and curves drawn with matplotlib, without pyplot, so that nothing is kept between two pictures.

Bands are thin lines or pale areas, marks of a shared machine are pale, published numbers hollow. A line of what nobody beats is
a staircase: between two methods nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunebench.report.axes import value_axis
from prunebench.report.canvas import (
    PALE,
    TEXT,
    WIDTH,
    MarkStyle,
    common_handles,
    draw_dense,
    finish,
    quality_label,
    set_axis,
    styles_of,
)
from prunebench.report.figures import Curve, Curves, Tradeoff
from prunebench.report.marks import PEAK_MIB, PRUNE_SECONDS, SPEED_UP, Mark
from prunebench.report.palette import Palette
from prunebench.results.rows import DENSE
from prunebench.targets import parse_target

COST_LABELS = {PRUNE_SECONDS: "prune time, s", PEAK_MIB: "peak memory, MiB", SPEED_UP: "speed-up over dense"}


def draw_tradeoff(panels: Sequence[Tradeoff], palette: Palette) -> Figure:
    """The trade-offs of one table side by side, one cost each, over one axis of quality."""
    first = panels[0]
    methods = [mark.method for mark in first.marks]
    styles = styles_of([*methods, *(hollow.method for hollow in first.published)], palette)
    values = [value for one in panels for mark in one.marks for value in (mark.low, mark.value, mark.high)]
    values += [hollow.value for hollow in first.published] + ([] if first.dense is None else [first.dense])
    figure, height = Figure(layout="constrained"), 0.9 + 0.155 * (len(methods) + 4)
    figure.set_size_inches(WIDTH, min(max(2.9, height), 8.0))
    quality = value_axis(values, linear=not first.logarithmic)
    for axes, one in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
        _draw_panel(axes, one, styles)
        set_axis(axes, "y", quality)
    figure.axes[0].set_ylabel(quality_label(first.quality, first.higher_is_better))
    controls = {mark.method for mark in first.marks if mark.is_control}
    handles = [_entry(styles[method], " (control)" if method in controls else "") for method in methods]
    notes = [_band_note(first.marks)]
    if any(one.front for one in panels):
        handles.append(Line2D([], [], color=TEXT, linewidth=0.9, label="non-dominated"))
    if any(mark.shared_machine for mark in first.marks):
        notes.append("Pale: measured on a shared machine, so this is the most it can have cost.")
    if controls:
        notes.append("Controls prune nothing and stand in no front.")
    handles += common_handles(first.dense, first.published)
    return finish(figure, first.title, [first.subtitle, " ".join(notes)], handles)


def draw_curves(curves: Curves, palette: Palette, training: str | None) -> Figure:
    """Quality over unstructured sparsities, and beside them N:M targets; of what had one training."""
    best_first = -1 if curves.higher_is_better else 1
    chosen = [curve for curve in curves.curves if curve.training == training]
    chosen.sort(key=lambda curve: (not curve.points, best_first * (curve.points or curve.patterns)[-1].value, curve.method))
    styles = styles_of([curve.method for curve in chosen], palette)
    marks = [mark for curve in chosen for mark in (*curve.points, *curve.patterns)]
    published = tuple(one for one in curves.published if one.method in styles)
    values = [value for mark in marks for value in (mark.low, mark.value, mark.high)]
    values += [one.value for one in published] + ([] if curves.dense is None else [curves.dense])
    targets = list(dict.fromkeys(m.target for m in sorted(marks, key=lambda m: (m.sparsity, m.target)) if ":" in m.target))
    figure = Figure(layout="constrained")
    figure.set_size_inches(WIDTH, min(max(3.2, 0.9 + 0.155 * (len(chosen) + 4)), 8.0))
    widths = [3.0, 0.6 * len(targets) + 0.4] if targets else [1.0]
    left, *right = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    across = [100 * mark.sparsity for curve in chosen for mark in curve.points]
    _draw_lines(left, chosen, styles)
    places = _draw_patterns(right[0], chosen, styles, targets) if right else {}
    for one in published:
        place = places.get((one.method, one.target))
        if place is not None:
            right[0].plot([place], [one.value], zorder=2.5, **styles[one.method].hollow())
        elif parse_target(one.target).sparsity * 100 in across:
            left.plot([100 * parse_target(one.target).sparsity], [one.value], zorder=2.5, **styles[one.method].hollow())
    for axes in figure.axes:
        set_axis(axes, "y", value_axis(values, always=curves.logarithmic, linear=not curves.logarithmic))
        draw_dense(axes, curves.dense)
    left.set_ylabel(quality_label(curves.quality, curves.higher_is_better))
    handles = [_entry(styles[curve.method], linestyle="-" if len(curve.points) > 1 else "none") for curve in chosen]
    title = curves.title if training is None else f"{curves.title}, retrained on {training}"
    handles += common_handles(curves.dense, published)
    return finish(figure, title, [curves.subtitle, _band_note(marks)], handles)


def _band_note(marks: Sequence[Mark]) -> str:
    with_band = sum(mark.low < mark.high for mark in marks)
    if not with_band:
        return "No intervals: the answers were not compared with dense's one by one."
    return "Bands and thin lines: 95% intervals against dense."


def _entry(style: MarkStyle, more: str = "", **changes: Any) -> Line2D:
    """A line of the legend."""
    return Line2D([], [], label=f"{style.label}{more}", **style.options(**changes))


def _draw_panel(axes: Axes, figure: Tradeoff, styles: Mapping[str, MarkStyle]) -> None:
    """One cost: marks with their bands, the front, dense, and published numbers above our own cost."""
    paid = {mark.method: mark.cost(figure.cost) or 0.0 for mark in figure.marks}
    across = value_axis(paid.values())
    set_axis(axes, "x", across)
    axes.set_xlabel(COST_LABELS[figure.cost])
    draw_dense(axes, figure.dense)
    for mark in figure.marks:
        style, faint = styles[mark.method], PALE if mark.shared_machine else 1.0
        place = paid[mark.method]
        axes.vlines(place, mark.low, mark.high, color=style.colour, linewidth=1.0, alpha=faint, zorder=2)
        axes.plot([place], [mark.value], alpha=faint, zorder=3, **style.options())
    by_method = {mark.method: mark for mark in figure.marks}
    front = [(paid[method], by_method[method].value) for method in figure.front]
    if front:
        steps = "steps-pre" if figure.cost == SPEED_UP else "steps-post"
        axes.plot(*zip(*front, strict=True), color=TEXT, linewidth=0.9, drawstyle=steps, zorder=1.8)
    for hollow in figure.published:
        place = paid.get(hollow.method, across.low)
        if hollow.method == DENSE or by_method.get(hollow.method, hollow).target == hollow.target:
            axes.plot([place], [hollow.value], zorder=2.5, clip_on=False, **styles[hollow.method].hollow())


def _draw_lines(axes: Axes, curves: Sequence[Curve], styles: Mapping[str, MarkStyle]) -> None:
    for curve in curves:
        style = styles[curve.method]
        across = [100 * mark.sparsity for mark in curve.points]
        low, high, values = (tuple(getattr(mark, name) for mark in curve.points) for name in ("low", "high", "value"))
        if len(across) > 1:
            axes.fill_between(across, low, high, color=style.colour, alpha=0.13, linewidth=0)
        if across:
            axes.plot(across, values, zorder=3, **style.options(linestyle="-", linewidth=1.1))
    ticks = sorted({100 * mark.sparsity for curve in curves for mark in curve.points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("unstructured sparsity, %")


def _draw_patterns(
    axes: Axes, curves: Sequence[Curve], styles: Mapping[str, MarkStyle], targets: Sequence[str]
) -> dict[tuple[str, str], float]:
    """N:M targets as columns, in each the methods side by side; where each method stands at each target."""
    places = {}
    for index, target in enumerate(targets):
        found: list[Mark] = [mark for curve in curves for mark in curve.patterns if mark.target == target]
        for order, mark in enumerate(found):
            across = places[mark.method, target] = index + 0.7 * ((order + 0.5) / len(found) - 0.5)
            style = styles[mark.method]
            axes.vlines(across, mark.low, mark.high, color=style.colour, linewidth=1.0, zorder=2)
            axes.plot([across], [mark.value], zorder=3, **style.options())
    axes.set_xticks(range(len(targets)), targets)
    axes.set_xlim(-0.5, len(targets) - 0.5)
    axes.set_xlabel("N:M")
    axes.grid(visible=False, axis="x")
    return places

"""Time by phase, heat maps and overlaps drawn with matplotlib, without pyplot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from prunebench.report.axes import value_axis
from prunebench.report.canvas import LINE, TEXT, WIDTH, bare, finish, tick_text
from prunebench.report.figures import PhaseBars
from prunebench.report.labels import shown, wrapped
from prunebench.report.matrices import Heat, OverlapSquare
from prunebench.report.naming import short_labels
from prunebench.report.palette import PHASES

MOST_NUMBERED = 14
"""Masks in a square that has room for numbers."""

MOST_SPAN = 30.0
"""The largest value over the smallest from which on colours are logarithmic."""

_MAP: Mapping[str, Any] = {"cmap": "cividis", "interpolation": "nearest"}
_SMALL: Mapping[str, Any] = {"fontsize": 6.5, "va": "center", "color": TEXT}


def draw_phases(bars: PhaseBars) -> Figure:
    """Seconds by phase, and the share of each phase beside them, since methods differ by orders of magnitude."""
    figure = Figure(layout="constrained")
    figure.set_size_inches(WIDTH, min(1.5 + 0.24 * len(bars.methods), 9.5))
    labels, places = short_labels(bars.methods), np.arange(len(bars.methods))
    seconds = np.array(list(bars.phases.values()))
    totals = seconds.sum(axis=0)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[1.15, 1.0])
    for axes, parts in ((left, seconds), (right, 100 * seconds / np.where(totals > 0, totals, 1.0))):
        begin = np.zeros(len(places))
        for name, part in zip(bars.phases, parts, strict=True):
            axes.barh(places, part, left=begin, height=0.62, color=_phase_colour(name), edgecolor="white", linewidth=0.3)
            begin += part
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    for place, total, shared in zip(places, totals, bars.marked, strict=True):
        left.annotate(f"{total:.3g}{'*' if shared else ''}", (total, place), (3, 0), textcoords="offset points", **_SMALL)
    left.set_xlim(0, max(totals) * 1.17)
    left.set_yticks(places, [wrapped(labels[method], 44) for method in bars.methods])
    left.invert_yaxis()
    left.set_xlabel("prune time, s")
    right.set_xlim(0, 100)
    right.set_xlabel("share of it, %")
    handles = [Patch(color=_phase_colour(name), label=shown(name)) for name in bars.phases]
    notes = ["* measured on a shared machine."] if any(bars.marked) else []
    return finish(figure, bars.title, [bars.subtitle, *notes], handles)


def draw_heats(heats: Sequence[Heat]) -> Figure:
    """Heat maps of one kind, model and target, on one scale of colours.

    Args:
        heats: at least one.
    """
    about, across = heats[0], min(3, len(heats))
    down = -(-len(heats) // across)
    figure = Figure(layout="constrained")
    names = [wrapped(heat.method, 36) for heat in heats]
    each = 0.37 + LINE * (max(len(heat.roles) for heat in heats) + max(name.count("\n") + 1 for name in names))
    figure.set_size_inches(WIDTH, min(0.9 + down * each, 10.0))
    scale = _scale(heats)
    places = figure.subplots(down, across, squeeze=False).ravel()
    for axes, heat, name in zip(places, heats, names, strict=False):
        image = axes.imshow(np.ma.masked_invalid(heat.values), norm=scale, aspect="auto", **_MAP)
        axes.set_title(name, loc="left", fontsize=7)
        axes.set_yticks(range(len(heat.roles)), [shown(role)[-24:] for role in heat.roles])
        step = -(-len(heat.blocks) // 12)
        axes.set_xticks(range(0, len(heat.blocks), step), [str(block) for block in heat.blocks[::step]])
        bare(axes)
    for axes in places[len(heats) :]:
        axes.set_visible(False)
    _colour_bar(figure, image, list(places), about.what)
    what = f"{about.what[:1].upper()}{about.what[1:]}"
    return finish(figure, f"{what}, matrix by matrix: {about.title}", [f"Across: blocks. Machine {about.machine}."], [])


def draw_overlap(square: OverlapSquare) -> Figure:
    """How far masks agree, each two of them."""
    count = len(square.labels)
    labels = [f"{shown(label, 52)}  {index + 1}" for index, label in enumerate(square.labels)]
    beside = 0.062 * max(map(len, labels))
    width = min(WIDTH, beside + 0.65 * count + 1.1)
    figure = Figure(layout=ConstrainedLayoutEngine(rect=(0, 0, width / WIDTH, 1)))
    figure.set_size_inches(WIDTH, min(0.34 * count, WIDTH - 0.95 - beside) + 0.8)
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(square.values), norm=Normalize(0, 1), aspect="auto", **_MAP)
    for row, column in np.ndindex(square.values.shape if count <= MOST_NUMBERED else (0, 0)):
        value = square.values[row, column]
        if math.isfinite(value):
            colour = "white" if value < 0.55 else TEXT
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    axes.set_yticks(range(count), labels)
    axes.set_xticks(range(count), [str(index + 1) for index in range(count)])
    bare(axes)
    _colour_bar(figure, image, [axes], "Jaccard index")
    what = "Of the weights that either mask removes, the share that both remove"
    note = f"{what}; of random masks {square.chance:.2f}. Machine {square.machine}."
    return finish(figure, f"Overlap of masks: {square.title}", [note], [])


def _scale(heats: Sequence[Heat]) -> Normalize:
    """Logarithmic where values span orders of magnitude."""
    found = np.concatenate([heat.values[np.isfinite(heat.values)] for heat in heats])
    if not len(found):
        return Normalize(0, 1)
    low, high = float(found.min()), float(found.max())
    if low > 0 and high / low > MOST_SPAN:
        return LogNorm(low, high)
    return Normalize(low, high if high > low else low + 1)


def _colour_bar(figure: Figure, image: AxesImage, places: Sequence[Axes], label: str) -> None:
    low, high = map(float, image.get_clim())
    bar = figure.colorbar(image, ax=list(places), shrink=0.9, pad=0.015, aspect=30)
    axis = value_axis([low, high], always=isinstance(image.norm, LogNorm), linear=not isinstance(image.norm, LogNorm))
    ticks = [tick for tick in axis.ticks if low <= tick <= high]
    bar.set_ticks(ticks, labels=[tick_text(tick) for tick in ticks])
    bar.minorticks_off()
    bar.set_label(shown(label, 48))
    bar.outline.set_visible(False)


def _phase_colour(name: str) -> str:
    return PHASES[name if name in PHASES else "other"][0]

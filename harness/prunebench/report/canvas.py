"""What all static pictures share: sizes and fonts, how a method's mark looks, axes with few ticks, title, legend and notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from prunebench.report.axes import Axis
from prunebench.report.labels import wrapped
from prunebench.report.marks import Hollow
from prunebench.report.naming import short_labels
from prunebench.report.palette import COLOURS, INK, Look, Palette
from prunebench.results.leaderboard import number

STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "prunebench",
}
"""Text is not read as mathematics, so that a stranger's name may hold a dollar sign."""

WIDTH = 7.2
"""Inches: both columns of a paper."""

LINE = 0.13
"""Inches that a further line of text takes."""

TEXT, SOFT = "#1f2328", "#6b7280"
PALE = 0.35
"""Opacity of what was measured on a shared machine."""

_MARKERS = {"circle": "o", "square": "s", "diamond": "D", "triangle": "^", "cross": "X", "star": "*"}
_SIZES = {"o": 6.0, "s": 5.6, "D": 5.2, "^": 6.4, "X": 6.6, "*": 8.5}
LEGEND_CHARACTERS = 34
MOST_OF_TITLE = 300

_FILLS = ("full", "left", "bottom", "right", "top")


@dataclass(frozen=True)
class MarkStyle:
    """How a method's marks are drawn."""

    colour: str
    marker: str
    fill: str
    label: str

    def options(self, **changes: Any) -> dict[str, Any]:
        """For `plot`, which draws a mark for each point."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": _SIZES[self.marker],
            "fillstyle": self.fill,
            "markerfacecoloralt": "white",
            "markeredgecolor": self.colour,
            "markeredgewidth": 0.8,
            "linestyle": "none",
            **changes,
        }

    def hollow(self) -> dict[str, Any]:
        """The same for a published number."""
        return self.options(fillstyle="none", markersize=_SIZES[self.marker] + 3, markeredgewidth=1.1)


def styles_of(methods: Iterable[str], palette: Palette) -> dict[str, MarkStyle]:
    """How each method of a figure is drawn; those of one look are filled by other halves."""
    used: dict[Look, int] = {}
    styles = {}
    for method, label in short_labels(methods).items():
        look = palette.look(method)
        fill = _FILLS[used.get(look, 0) % len(_FILLS)]
        used[look] = used.get(look, 0) + 1
        colour = TEXT if look.colour == INK else COLOURS[look.colour][0]
        styles[method] = MarkStyle(colour, _MARKERS[look.shape], fill, wrapped(label, LEGEND_CHARACTERS))
    return styles


def set_axis(axes: Axes, which: str, axis: Axis) -> None:
    """Limits and ticks of an axis; `which` is `x` or `y`."""
    if axis.logarithmic:
        axes.set(**{f"{which}scale": "log"})
    axes.set(**{f"{which}lim": (axis.low, axis.high)})
    ticks = [tick for tick in axis.ticks if axis.low <= tick <= axis.high]
    (axes.xaxis if which == "x" else axes.yaxis).set_ticks(ticks, labels=[tick_text(tick) for tick in ticks])
    axes.minorticks_off()


def tick_text(value: float) -> str:
    """A tick's number, thousands marked."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def draw_dense(axes: Axes, value: float | None) -> None:
    """The dense model's value, right across."""
    if value is not None:
        axes.axhline(value, **_DENSE)


def quality_label(quality: str, higher_is_better: bool) -> str:
    """An axis of quality says which way is better."""
    return f"{wrapped(quality, 40)} ({'higher' if higher_is_better else 'lower'} is better)"


def common_handles(dense: float | None, published: Sequence[Hollow]) -> list[Line2D]:
    """The legend's entries for dense and for the papers."""
    handles = []
    if dense is not None:
        handles.append(Line2D([], [], label=f"dense {number(dense) if dense else 0}", **_DENSE))
    if published:
        papers = "; ".join(dict.fromkeys(hollow.label for hollow in published))
        hollow = MarkStyle(TEXT, "o", "full", "").hollow()
        handles.append(Line2D([], [], label=wrapped(f"published: {papers}", LEGEND_CHARACTERS), **hollow))
    return handles


def finish(figure: Figure, title: str, notes: Sequence[str], handles: Sequence[Artist]) -> Figure:
    """Title above, notes at the foot, legend beside the axes, where no data are; all places settled."""
    head, foot = wrapped(title, 96, MOST_OF_TITLE), "\n".join(wrapped(note, 125, MOST_OF_TITLE) for note in notes if note)
    figure.set_figheight(figure.get_figheight() + LINE * (head.count("\n") + foot.count("\n")))
    figure.suptitle(head, x=0.01, ha="left", color=TEXT, weight="bold")
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=6.5, color=SOFT)
    if handles:
        place: Mapping[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.02), "borderaxespad": 0.4}
        figure.axes[-1].legend(handles=handles, labelspacing=0.55, handlelength=1.6, **place)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # which else would do it all again for each format
    return figure


def bare(axes: Axes) -> None:
    """Neither grid nor frame nor ticks: a heat map has its own."""
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


_DENSE: Mapping[str, Any] = {"color": TEXT, "linewidth": 0.9, "linestyle": (0, (4, 2)), "zorder": 1.5}

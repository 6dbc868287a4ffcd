"""Figures as files, for papers and READMEs: SVG and PNG of each, under names that tell them apart.

The same figures give the same bytes of SVG: ids are hashed with a fixed salt and no date is written. Every file is written
aside and moved into place.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from prunebench.errors import StoreError
from prunebench.report.canvas import STYLE
from prunebench.report.drawing import draw_curves, draw_tradeoff
from prunebench.report.figures import Curves, Figures, Tradeoff
from prunebench.report.grids import draw_heats, draw_overlap, draw_phases
from prunebench.report.matrices import OVERLAP, SPARSITY, Heat
from prunebench.report.palette import Palette
from prunebench.results.content import slug
from prunebench.results.files import write_aside

DOTS = 200
"""Of a PNG, an inch."""

UNIFORM = 0.5
"""Points of sparsity: where matrices differ by less, a map would show how group sizes round."""

MOST_MAPS = 24
"""In one picture; what is more stands in the HTML page."""


def write_plots(figures: Figures, folder: Path) -> list[Path]:
    """Draw every figure into a folder.

    Returns:
        The files, in the order of the figures.

    Raises:
        StoreError: one cannot be written.
    """
    palette, names, written = palette_of(figures), set[str](), []
    with matplotlib.style.context(["default", dict(STYLE)]):
        for name, figure in _drawn(figures, palette):
            stem = _unused(slug(name), names)
            written += [_write(figure, folder / f"{stem}.{kind}") for kind in ("svg", "png")]
    return written


def write_covers(figures: Figures, folder: Path) -> list[Path]:
    """Draw the README's two pictures, `tradeoff.svg` and `sparsity.svg`: of the section whose curves have most points, and of
    its table with most methods, where it can be one that was not retrained; the first of equals.

    Returns:
        The files; none where no section has curves.

    Raises:
        StoreError: one cannot be written.
    """
    with_curves = [one for one in figures.sections if one.curves is not None and one.tradeoffs]
    if not with_curves:
        return []
    chosen = max(with_curves, key=lambda one: sum(len(curve.points) for curve in one.curves.curves) if one.curves else 0)
    tables = list(_tables(chosen.tradeoffs))
    tables = [table for table in tables if not table[0].marks[0].trained] or tables
    palette = palette_of(figures)
    with matplotlib.style.context(["default", dict(STYLE)]):
        written = [_write(draw_tradeoff(max(tables, key=lambda table: len(table[0].marks)), palette), folder / "tradeoff.svg")]
        assert chosen.curves is not None
        written.append(_write(draw_curves(chosen.curves, palette, _trainings(chosen.curves)[0]), folder / "sparsity.svg"))
    return written


def palette_of(figures: Figures) -> Palette:
    """The looks of all methods that stand in any table, as in the page of the same board."""
    return Palette(row.method for one in figures.sections for table in one.section.tables for row in table.rows)


def _drawn(figures: Figures, palette: Palette) -> Iterator[tuple[str, Figure]]:
    """A name and a picture, one after the other, so that one at a time is in memory."""
    timed: set[tuple[tuple[str, ...], ...]] = set()
    for section in figures.sections:
        for panels in _tables(section.tradeoffs):
            yield f"tradeoff-{panels[0].title}", draw_tradeoff(panels, palette)
        if section.curves is not None:
            for training in _trainings(section.curves):
                yield f"sparsity-{section.curves.title}", draw_curves(section.curves, palette, training)
        for bars in section.phases:
            if bars.ids not in timed:  # the same runs, scored otherwise
                timed.add(bars.ids)
                yield f"phases-{bars.title}", draw_phases(bars)
    for heats in _panels(figures.heats):
        kind = {SPARSITY: "found", OVERLAP: "overlap-by-matrix"}.get(heats[0].what, "error")
        yield f"{kind}-{heats[0].title}", draw_heats(heats[:MOST_MAPS])
    for square in figures.overlaps:
        yield f"overlap-{square.title}", draw_overlap(square)


def _tables(tradeoffs: Sequence[Tradeoff]) -> list[list[Tradeoff]]:
    """The trade-offs of each table together."""
    return [list(found) for _, found in groupby(tradeoffs, key=lambda one: (one.title, one.marks[0].trained))]


def _panels(heats: Sequence[Heat]) -> list[list[Heat]]:
    """The heat maps of each picture: of one kind, model, target and machine, if there is anything to see."""
    found: dict[tuple[str, str, str], list[Heat]] = {}
    for heat in heats:
        if heat.what != SPARSITY or _spread(heat) > UNIFORM:
            found.setdefault((heat.what, heat.title, heat.machine), []).append(heat)
    return list(found.values())


def _trainings(curves: Curves) -> list[str | None]:
    """The trainings, none first, of which a method has two points."""
    found = dict.fromkeys(curve.training for curve in curves.curves if len(curve.points) > 1)
    return sorted(found, key=lambda training: training or "")


def _spread(heat: Heat) -> float:
    found = heat.values[np.isfinite(heat.values)]
    return float(np.ptp(found)) if len(found) else 0.0


def _unused(stem: str, names: set[str]) -> str:
    """The stem, with a number where it is taken."""
    found, count = stem, 1
    while found in names:
        count += 1
        found = f"{stem}-{count}"
    names.add(found)
    return found


def _write(figure: Figure, path: Path) -> Path:
    content = io.BytesIO()
    if path.suffix == ".svg":
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    else:
        figure.savefig(content, format="png", dpi=DOTS, metadata={"Software": None})
    try:
        write_aside(path.parent, content.getvalue(), durable=False).replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from None
    return path

"""The board as one HTML file that opens offline: tables, figures and records, and nothing that asks for anything elsewhere.

Text of strangers enters in two ways only: through Jinja with its escaping on, and as JSON in a block that no browser runs.
The page's policy names its two scripts by their hashes and allows no request at all, so that what might slip through neither
runs nor tells anybody. Plotly travels compressed; the browser unpacks it when the first figure comes into sight. Equal records
give equal bytes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from prunebench.plain import plain
from prunebench.report.charts import Keys, curves_chart, heat_chart, overlap_chart, phases_chart, tradeoff_chart
from prunebench.report.costs import cost_entries
from prunebench.report.figures import Figures, SectionFigures
from prunebench.report.matrices import OVERLAP
from prunebench.report.palette import COLOURS, PHASES, Palette
from prunebench.report.panels import Panels, of_no_table
from prunebench.report.specifications import DEFAULTS, Chart, colour, rounded
from prunebench.report.wording import (
    apart_of,
    coded,
    evaluations_of,
    filters_of,
    is_numeric,
    runs_on,
    sort_key,
    tip_of,
    totals_of,
)
from prunebench.results.beside import HEADINGS, Beside, counts, matched
from prunebench.results.board import Board, Section, Table
from prunebench.results.leaderboard import cells, columns, section_notes, table_limits, table_title
from prunebench.results.records import RunRecord
from prunebench.results.rows import DENSE, Row, target_title

MOST_HEATS = 1_000_000
"""Characters for all heat maps: pairs of methods grow with the square of how many there are."""

TEMPLATES = Path(__file__).parent / "templates"

_UNSAFE = str.maketrans({each: f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"})


def to_html(
    board: Board,
    records: Sequence[RunRecord],
    figures: Figures,
    published: Sequence[Beside] = (),
    grade: Callable[[RunRecord], str] | None = None,
) -> str:
    """The page.

    Args:
        board: perhaps only some of its sections.
        records: those the board was made of.
        figures: of that board.
        published: published numbers with what our records say to them.
        grade: how far a record is trusted, where that is known.
    """
    return _Page(board, records, figures, published, grade).html()


class _Page:
    """Gathers what the templates show."""

    def __init__(
        self,
        board: Board,
        records: Sequence[RunRecord],
        figures: Figures,
        published: Sequence[Beside],
        grade: Callable[[RunRecord], str] | None,
    ) -> None:
        self._board, self._figures, self._published = board, figures, published
        named = runs_on(board)
        shown = sorted((r for r in records if (r.machine, r.id) in named), key=lambda r: (r.machine, r.id))
        self._panels = Panels.of(shown, grade)
        self._palette = Palette(record.spec.method for record in shown)
        self._charts: list[Chart] = []
        self._points: dict[str, int] = {}
        """What points of figures say, as JSON, and where it stands."""
        self._methods = {record.spec.method for record in shown}

    def html(self) -> str:
        """The whole file."""
        sections = self._sections() + cost_entries(self._board.costs, self._panels, self._palette)
        heats = self._heats()
        overlaps = self._overlaps()
        runs = self._runs()
        script, plotly = (TEMPLATES / "page.js").read_text(encoding="utf-8"), get_plotlyjs()
        points = [json.loads(point) for point in self._points]
        data = {
            "defaults": DEFAULTS,
            "charts": self._charts,
            "points": points,
            "groups": self._panels.groups,
            "records": self._panels.records,
        }
        return _template().render(
            policy=_policy(script, plotly),
            style=_colours() + (TEMPLATES / "page.css").read_text(encoding="utf-8"),
            script=script,
            plotly=_packed(plotly),
            data=as_json(data),
            sections=sections,
            filters=filters_of(sections, runs),
            heats=heats,
            overlaps=overlaps,
            runs=runs,
            published=self._beside(),
            totals=totals_of(len(self._panels.records), len(self._methods), sections),
        )

    def _keep(self, chart: Chart) -> int:
        """Where a figure is among all; what its points say is kept apart, since other figures have the same points."""
        for trace in chart["data"]:
            if "customdata" in trace:
                trace["customdata"] = [self._point(point) for point in trace["customdata"]]
        self._charts.append(rounded(chart))
        return len(self._charts) - 1

    def _point(self, point: dict[str, Any]) -> list[Any]:
        line = [point.pop("line")] if "line" in point else []
        return [self._points.setdefault(as_json(point), len(self._points)), *line]

    def _sections(self) -> list[dict[str, Any]]:
        sections = self._board.sections
        evaluations = evaluations_of(sections)
        apart = apart_of(sections)
        several = len({section.model for section in sections}) > 1
        found = []
        for index, (section, drawn) in enumerate(zip(sections, self._figures.sections, strict=True), start=1):
            curves = drawn.curves
            found.append(
                {
                    "id": f"section-{index}",
                    "title": plain(section.title),
                    "short": plain(section.title if several else section.title.removeprefix(f"{section.model}: ")),
                    "apart": apart[index - 1],
                    "model": plain(section.model),
                    "machine": plain(section.machine),
                    "evaluation": evaluations[index - 1],
                    "notes": [coded(note) for note in section_notes(section)],
                    "silence": section.silence,
                    "curves": self._keep(curves_chart(curves, self._palette, self._of(section))) if curves else None,
                    "tables": [] if section.silence else [self._table(section, table, drawn) for table in section.tables],
                }
            )
        return found

    def _of(self, section: Section) -> Keys:
        return partial(self._panels.keys, machine=section.machine)

    def _table(self, section: Section, table: Table, drawn: SectionFigures) -> dict[str, Any]:
        keys = self._of(section)
        title = f"{section.title}, {table_title(table)}"
        tradeoffs = [self._keep(tradeoff_chart(f, self._palette, keys)) for f in drawn.tradeoffs if f.title == title]
        phases = [self._keep(phases_chart(f, keys)) for f in drawn.phases if f.title == title]
        texts = [[plain(cell) for cell in cells(section, table, row)] for row in table.rows]
        headings = columns(section, table)
        method = headings.index("method")  # before the value
        numeric = [is_numeric([line[column] for line in texts]) for column in range(len(headings))]
        return {
            "title": plain(table_title(table)),
            "target": target_title(table.target),
            "columns": [{"text": plain(t), "numeric": n} for t, n in zip(headings, numeric, strict=True)],
            "rows": [self._row(section, row, line, numeric, method) for row, line in zip(table.rows, texts, strict=True)],
            "named": method,
            "limits": table_limits(section, table),
            "tradeoffs": [{"chart": chart, "title": self._charts[chart]["title"]} for chart in tradeoffs],
            "phases": phases[0] if phases else None,
        }

    def _row(self, section: Section, row: Row, texts: list[str], numeric: list[bool], method: int) -> dict[str, Any]:
        look = self._palette.look(row.method)
        return {
            "method": plain(row.method),
            "keys": self._panels.keys(row.ids, section.machine),
            "colour": colour(look)[1:],
            "shape": look.shape,
            "best": row.rank is not None and row.rank.best,
            "dense": row.method == DENSE,
            "tip": tip_of(section, row, texts[method + 1]),
            "name": [part for part in re.split(r"(\[[^\]]*\])", texts[method]) if part],
            "cells": [{"text": t, "sort": sort_key(t) if n else None} for t, n in zip(texts, numeric, strict=True)],
        }

    def _heats(self) -> dict[str, Any]:
        """Heat maps by model and target, as the choice on the page has them; what two methods have in common comes last, and
        of that only what there is room for."""
        groups: dict[str, list[dict[str, Any]]] = {}
        room, left_out = MOST_HEATS, 0
        for figure in sorted(self._figures.heats, key=lambda figure: figure.what == OVERLAP):
            chart = heat_chart(figure, partial(self._panels.keys, machine=figure.machine))
            room -= len(as_json(rounded(chart)))
            if room < 0:
                left_out += 1
                continue
            keys = self._panels.keys(figure.ids[:1], figure.machine)
            own = {"chart": self._keep(chart), "method": plain(figure.method), "what": figure.what, "keys": keys}
            groups.setdefault(plain(figure.title), []).append(own)
        return {"groups": [{"title": title, "figures": own} for title, own in groups.items()], "left_out": left_out}

    def _overlaps(self) -> list[dict[str, Any]]:
        found = []
        for figure in self._figures.overlaps:
            chart = self._keep(overlap_chart(figure, partial(self._panels.keys, machine=figure.machine)))
            keys = self._panels.keys(figure.ids[:1], figure.machine)
            found.append({"title": plain(figure.title), "chart": chart, "keys": keys, "chance": f"{figure.chance:.2f}"})
        return found

    def _runs(self) -> list[dict[str, Any]]:
        """What stands in no table, by what became of it."""
        told = {
            "Failed runs": ("These broke off; nothing of them is in a table.", self._board.failed),
            "Refused runs": ("Here the method itself said that it does not apply, which is an answer.", self._board.refused),
            "Outdated runs": ("Measured with another revision; not ranked until they are run again.", self._board.outdated),
        }
        found = []
        for title, (text, records) in told.items():
            if records:
                own = [{**of_no_table(r), "key": self._panels.key(r.machine, r.id)} for r in records]
                found.append({"title": title, "text": text, "records": own})
        return found

    def _beside(self) -> dict[str, Any] | None:
        if not self._published:
            return None
        rows = [[plain(cell) for cell in one.cells()] for one in matched(self._published)]
        return {"counts": counts(self._published), "headings": HEADINGS, "rows": rows}


def as_json(data: Any) -> str:
    """JSON for a block inside a page: nothing in it ends the block or begins a tag."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_UNSAFE)


def _colours() -> str:
    """The colours of methods and phases as custom properties, for light and dark."""
    pairs = {f"c{index}": pair for index, pair in enumerate(COLOURS)} | PHASES
    light, dark = ("".join(f"--{name}:{pair[which]};" for name, pair in pairs.items()) for which in (0, 1))
    classes = "".join(f".{name}{{color:var(--{name})}}" for name in pairs)
    return (
        f":root{{{light}}}:root[data-theme=dark]{{{dark}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{dark}}}}}{classes}.ink{{color:var(--ink)}}\n"
    )


def _policy(*scripts: str) -> str:
    """Only these scripts run, and nothing is fetched from anywhere."""
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    rest = "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {allowed}; {rest}"


def _template() -> Template:
    source = (TEMPLATES / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(re.sub(r"(?m)^[ ]+", "", source))  # a browser needs no indentation


@cache
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()

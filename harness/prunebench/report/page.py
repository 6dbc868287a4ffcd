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
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from prunebench.plain import plain
from prunebench.report.charts import Chart, colour, curves_chart, heat_chart, overlap_chart, phases_chart, tradeoff_chart
from prunebench.report.figures import Figures, SectionFigures
from prunebench.report.palette import COLOURS, PHASES, Palette
from prunebench.report.panels import Panels, of_no_table
from prunebench.results.beside import HEADINGS, Beside, counts, matched
from prunebench.results.board import Board, Section, Table
from prunebench.results.leaderboard import cells, columns, section_notes, table_limits, table_title, target_title, value_text
from prunebench.results.records import RunRecord, fingerprint
from prunebench.results.rows import DENSE, Row

TEMPLATES = Path(__file__).parent / "templates"

_UNSAFE = str.maketrans({each: f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"})

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

_WITHOUT_NUMBER = {"", "–", "deterministic"}
"""Cells of a column of numbers that have none."""


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
        named = _named(board)
        shown = [record for record in records if (record.machine, record.id) in named]
        self._panels = Panels.of(shown, grade)
        self._palette = Palette(record.spec.method for record in shown)
        self._charts: list[Chart] = []
        self._methods = {record.spec.method for record in shown}

    def html(self) -> str:
        """The whole file."""
        sections = self._sections()
        heats = self._heats()
        overlaps = [
            {"title": plain(f.title), "chart": self._keep(overlap_chart(f, self._panels.keys))} for f in self._figures.overlaps
        ]
        runs = self._runs()
        script, plotly = (TEMPLATES / "page.js").read_text(encoding="utf-8"), get_plotlyjs()
        data = {"charts": self._charts, "groups": self._panels.groups, "records": self._panels.records}
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.get_template("page.html.j2").render(
            policy=_policy(script, plotly),
            style=Markup(_colours() + (TEMPLATES / "page.css").read_text(encoding="utf-8")),
            script=Markup(script),
            plotly=Markup(_packed(plotly)),
            data=Markup(as_json(data)),
            sections=sections,
            filters=_filters(sections, runs),
            heats=heats,
            overlaps=overlaps,
            runs=runs,
            published=self._beside(),
            totals=_totals(len(self._panels.records), len(self._methods), sections),
        )

    def _keep(self, chart: Chart) -> int:
        self._charts.append(chart)
        return len(self._charts) - 1

    def _sections(self) -> list[dict[str, Any]]:
        sections = self._board.sections
        evaluations = _evaluations(sections)
        titles = [(section.title, section.machine) for section in sections]
        found = []
        for index, (section, drawn) in enumerate(zip(sections, self._figures.sections, strict=True), start=1):
            curves = drawn.curves
            found.append(
                {
                    "id": f"section-{index}",
                    "title": plain(section.title),
                    "short": plain(section.title.removeprefix(f"{section.model}: ")),
                    "recipe": _recipe(section) if titles.count((section.title, section.machine)) > 1 else "",
                    "model": plain(section.model),
                    "machine": plain(section.machine),
                    "evaluation": evaluations[index - 1],
                    "notes": [_coded(note) for note in section_notes(section)],
                    "silence": section.silence,
                    "curves": self._keep(curves_chart(curves, self._palette, self._of(section))) if curves else None,
                    "tables": [] if section.silence else [self._table(section, table, drawn) for table in section.tables],
                }
            )
        return found

    def _of(self, section: Section) -> Callable[[Sequence[str]], list[str]]:
        return lambda ids: self._panels.keys(ids, section.machine)

    def _table(self, section: Section, table: Table, drawn: SectionFigures) -> dict[str, Any]:
        keys = self._of(section)
        title = f"{section.title}, {table_title(table)}"
        tradeoffs = [self._keep(tradeoff_chart(f, self._palette, keys)) for f in drawn.tradeoffs if f.title == title]
        phases = [self._keep(phases_chart(f, keys)) for f in drawn.phases if f.title == title]
        texts = [[plain(cell) for cell in cells(section, table, row)] for row in table.rows]
        numeric = [_is_numeric([line[column] for line in texts]) for column in range(len(columns(section, table)))]
        return {
            "title": plain(table_title(table)),
            "target": target_title(table.target),
            "columns": [{"text": plain(t), "numeric": n} for t, n in zip(columns(section, table), numeric, strict=True)],
            "rows": [self._row(section, row, line, numeric) for row, line in zip(table.rows, texts, strict=True)],
            "limits": table_limits(section, table),
            "tradeoffs": [{"chart": chart, "title": self._charts[chart]["title"]} for chart in tradeoffs],
            "phases": phases[0] if phases else None,
        }

    def _row(self, section: Section, row: Row, texts: list[str], numeric: list[bool]) -> dict[str, Any]:
        look = self._palette.look(row.method)
        return {
            "method": plain(row.method),
            "keys": self._panels.keys(row.ids, section.machine),
            "colour": colour(look)[1:],
            "shape": look.shape,
            "best": row.rank is not None and row.rank.best,
            "dense": row.method == DENSE,
            "tip": _tip(section, row, texts),
            "cells": [{"text": t, "sort": sort_key(t) if n else None} for t, n in zip(texts, numeric, strict=True)],
        }

    def _heats(self) -> list[dict[str, Any]]:
        """Heat maps by model and target, as the choice on the page has them."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for figure in self._figures.heats:
            chart = self._keep(heat_chart(figure, self._panels.keys))
            groups.setdefault(plain(figure.title), []).append(
                {"chart": chart, "method": plain(figure.method), "what": figure.what, "keys": self._panels.keys(figure.ids[:1])}
            )
        return [{"title": title, "figures": figures} for title, figures in groups.items()]

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


def sort_key(text: str) -> float | None:
    """The number that a cell begins with; of the interval `2-4` both ends count, the first for more. None without one."""
    found = _NUMBER.match(text)
    if found is None:
        return None
    first = float(found[0].replace(",", ""))
    rest = re.fullmatch(r"-(\d+)", text[found.end() :])
    return first + int(rest[1]) / 1e4 if rest else first


def _is_numeric(texts: Iterable[str]) -> bool:
    told = [text for text in texts if text not in _WITHOUT_NUMBER]
    return all(_NUMBER.match(text) for text in told)


def _tip(section: Section, row: Row, texts: Sequence[str]) -> str:
    """What is shown on hovering over a row: the difference with its interval, the seeds, the runs."""
    lines = [plain(row.method), f"{plain(section.unit)} {texts[2]}"]
    if row.versus is not None and row.versus.is_known:
        unit = " %" if section.is_ratio else " points" if section.is_share else ""
        lines.append(f"vs dense{unit} {texts[3]}, 95% interval, p {row.versus.p_value:.2g}")
    elif texts[3]:
        lines.append(f"vs dense {texts[3]}, no interval")
    if row.rank is not None:
        lines.append(f"rank {row.rank}" + (": nobody is significantly better" if row.rank.best else ""))
    if row.seeds != (None,):
        each = ", ".join(value_text(value, section.is_share) for value in row.values)
        lines.append(f"seeds {', '.join(str(seed) for seed in row.seeds)}: {each}")
    if row.shared_machine:
        lines.append("* costs measured on a shared machine")
    return "\n".join([*lines, f"run{'s' if len(row.ids) > 1 else ''} {', '.join(row.ids)}"])


def _evaluations(sections: Sequence[Section]) -> list[str]:
    """What each section measured, as the filter names it; with the fingerprint where two conditions have one name."""
    names = [plain(section.title.removeprefix(f"{section.model}: ")) for section in sections]
    prints = [fingerprint(dict(section.conditions)) for section in sections]
    alike: dict[tuple[str, str], set[str]] = {}
    for section, name, own in zip(sections, names, prints, strict=True):
        alike.setdefault((name, section.model), set()).add(own)
    return [
        name if len(alike[name, section.model]) == 1 else f"{name} ({own})"
        for section, name, own in zip(sections, names, prints, strict=True)
    ]


def _recipe(section: Section) -> str:
    """What tells a section from another of one title."""
    recipe = section.recipe
    if recipe is None or recipe.calibration is None:
        return f"conditions {fingerprint(dict(section.conditions))}"
    return plain(f"{recipe.samples} × {recipe.length} tokens of {recipe.calibration.name} (recipe {fingerprint(recipe)})")


def _coded(note: str) -> list[dict[str, Any]]:
    """A note in parts, of which every second, between backticks, is code."""
    return [{"text": plain(part), "code": index % 2 == 1} for index, part in enumerate(note.split("`")) if part]


def _filters(sections: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of each filter, in the order of the page."""
    others = [record for group in runs for record in group["records"]]
    targets = [table["target"] for section in sections for table in section["tables"]]
    found = {
        "model": [s["model"] for s in sections] + [r["model"] for r in others],
        "target": targets + [r["target"] for r in others],
        "evaluation": [s["evaluation"] for s in sections],
        "machine": [s["machine"] for s in sections] + [r["machine"] for r in others],
    }
    return [{"name": name, "choices": list(dict.fromkeys(choices))} for name, choices in found.items()]


def _totals(runs: int, methods: int, sections: Sequence[dict[str, Any]]) -> str:
    parts = {
        "run": runs,
        "method": methods,
        "model": len({section["model"] for section in sections}),
        "machine": len({section["machine"] for section in sections}),
    }
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in parts.items())


def _named(board: Board) -> set[tuple[str, str]]:
    """Machine and id of every run that the board has."""
    found = {(r.machine, r.id) for r in (*board.failed, *board.refused, *board.outdated)}
    for section in board.sections:
        found |= {(section.machine, run_id) for table in section.tables for row in table.rows for run_id in row.ids}
    return found


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


@cache
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()

"""Sections of costs for the HTML page, in the form that its template has for all sections."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from prunebench.plain import plain
from prunebench.report.palette import Palette
from prunebench.report.panels import Panels
from prunebench.report.specifications import colour
from prunebench.report.wording import coded, is_numeric, sort_key
from prunebench.results.costs_board import CostRow, CostSection, CostTable
from prunebench.results.costs_text import headings, section_notes, table_notes, texts
from prunebench.results.rows import target_title

EVALUATION = "costs"
"""What the filter of evaluations calls them."""


def cost_entries(sections: Sequence[CostSection], panels: Panels, palette: Palette) -> list[dict[str, Any]]:
    """A section of the page for each; without figures, as there is no quality to draw."""
    return [
        {
            "id": f"costs-{index}",
            "title": plain(section.title),
            "short": plain(section.title),
            "apart": plain(section.machine) if len({each.machine for each in sections}) > 1 else "",
            "model": plain(section.model),
            "machine": plain(section.machine),
            "evaluation": EVALUATION,
            "notes": [coded(note) for note in section_notes(section)],
            "silence": None,
            "curves": None,
            "tables": [_table(section, table, panels, palette) for table in section.tables],
        }
        for index, section in enumerate(sections, start=1)
    ]


def _table(section: CostSection, table: CostTable, panels: Panels, palette: Palette) -> dict[str, Any]:
    lines = [[plain(text) for text in texts(section, table, row)] for row in table.rows]
    names = headings(section, table)
    numeric = [index > 0 and is_numeric([line[index] for line in lines]) for index in range(len(names))]
    return {
        "title": plain(target_title(table.target)),
        "target": target_title(table.target),
        "columns": [{"text": plain(text), "numeric": n} for text, n in zip(names, numeric, strict=True)],
        "rows": [_row(section, row, line, numeric, panels, palette) for row, line in zip(table.rows, lines, strict=True)],
        "named": 0,
        "limits": plain(" ".join(table_notes(table))) or None,
        "tradeoffs": [],
        "phases": None,
    }


def _row(
    section: CostSection, row: CostRow, line: list[str], numeric: list[bool], panels: Panels, palette: Palette
) -> dict[str, Any]:
    look = palette.look(row.method)
    tip = [row.method, *(["* costs measured on a shared machine"] if row.shared_machine else [])]
    return {
        "method": plain(row.method),
        "keys": panels.keys(row.ids, section.machine),
        "colour": colour(look)[1:],
        "shape": look.shape,
        "best": False,
        "dense": False,
        "tip": "\n".join(map(plain, [*tip, f"run{'s' if len(row.ids) > 1 else ''} {', '.join(row.ids)}"])),
        "name": [part for part in re.split(r"(\[[^\]]*\])", line[0]) if part],
        "cells": [{"text": text, "sort": sort_key(text) if n else None} for text, n in zip(line, numeric, strict=True)],
    }

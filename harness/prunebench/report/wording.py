"""What the page says of a board in words: sort keys and tooltips of rows, what tells sections apart, the filters' choices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from prunebench.plain import plain
from prunebench.results.board import Board, Section
from prunebench.results.content import fingerprint
from prunebench.results.leaderboard import section_notes, value_text, versus_text
from prunebench.results.rows import Row

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")

_WITHOUT_NUMBER = {"", "–", "deterministic"}
"""Cells of a column of numbers that have none."""


def sort_key(text: str) -> float | None:
    """The number that a cell begins with; of the interval `2-4` both ends count, the first for more. None without one."""
    found = _NUMBER.match(text)
    if found is None:
        return None
    first = float(found[0].replace(",", ""))
    rest = re.fullmatch(r"-(\d+)", text[found.end() :])
    return first + int(rest[1]) / 1e4 if rest else first


def is_numeric(texts: Iterable[str]) -> bool:
    """Whether a column is sorted by its numbers."""
    told = [text for text in texts if text not in _WITHOUT_NUMBER]
    return all(_NUMBER.match(text) for text in told)


def tip_of(section: Section, row: Row, value: str) -> str:
    """What is shown on hovering over a row: the difference with its interval, the seeds, the runs; a line each.

    `value` is the cell's text.
    """
    lines = [plain(row.method), plain(f"{section.unit} {value}")]
    versus = versus_text(section, row)
    if row.versus is not None and row.versus.is_known:
        unit = " %" if section.is_ratio else " points" if section.is_share else ""
        lines.append(f"vs dense{unit} {versus}, 95% interval, p {row.versus.p_value:.2g}")
    elif versus:
        lines.append(f"vs dense {versus}, no interval")
    if row.rank is not None:
        lines.append(f"rank {row.rank}" + (": nobody is significantly better" if row.rank.best else ""))
    if row.seeds != (None,):
        each = ", ".join(value_text(value, section.is_share) for value in row.values)
        lines.append(f"seeds {', '.join(str(seed) for seed in row.seeds)}: {each}")
    if row.shared_machine:
        lines.append("* costs measured on a shared machine")
    return "\n".join([*lines, f"run{'s' if len(row.ids) > 1 else ''} {', '.join(row.ids)}"])


def evaluations_of(sections: Sequence[Section]) -> list[str]:
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


def apart_of(sections: Sequence[Section]) -> list[str]:
    """What tells each section from others of its title: what was asked, or what it was calibrated on; often nothing."""
    alike: dict[str, list[int]] = {}
    for index, section in enumerate(sections):
        alike.setdefault(section.title, []).append(index)
    found = [""] * len(sections)
    for places in alike.values():
        told = [_details(sections[place]) for place in places]
        for place, own in zip(places, told, strict=True) if len(places) > 1 else ():
            apart = [part for column, part in enumerate(own) if len({each[column] for each in told}) > 1 and part]
            found[place] = plain("; ".join(apart))
    return found


def _details(section: Section) -> list[str]:
    asked = section_notes(section)[0].removeprefix("Evaluation: ").partition(" (conditions")[0]
    recipe = section.recipe
    calibrated = f"calibrated on {recipe.calibration.name}" if recipe and recipe.calibration else "not calibrated"
    how = f"{recipe.samples} × {recipe.length} tokens" if recipe and recipe.calibration else ""
    return [asked, calibrated, how, f"on {section.machine}"]


def coded(note: str) -> list[dict[str, Any]]:
    """A note in parts, of which every second, between backticks, is code."""
    return [{"text": plain(part), "code": index % 2 == 1} for index, part in enumerate(note.split("`")) if part]


def filters_of(sections: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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


def totals_of(runs: int, methods: int, sections: Sequence[dict[str, Any]]) -> str:
    """What the page holds, in a line."""
    parts = {
        "run": runs,
        "method": methods,
        "model": len({section["model"] for section in sections}),
        "machine": len({section["machine"] for section in sections}),
    }
    return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for name, count in parts.items())


def runs_on(board: Board) -> set[tuple[str, str]]:
    """Machine and id of every run that the board has."""
    found = {(r.machine, r.id) for r in (*board.failed, *board.refused, *board.outdated)}
    for section in board.sections:
        found |= {(section.machine, run_id) for table in section.tables for row in table.rows for run_id in row.ids}
    for costs in board.costs:
        found |= {(costs.machine, run_id) for row in costs.rows for run_id in row.ids}
    return found

"""Tables of costs as text: headings, cells and notes, for the page `leaderboard.md`, the terminal and the HTML page alike."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from prunebench.plain import markdown
from prunebench.results.content import fingerprint
from prunebench.results.costs_board import REST, SHOWN, CostRow, CostSection, CostTable
from prunebench.results.rows import target_title

TITLE = "Costs of shapes"

ONLY_COSTS = "Random weights: costs only, no quality."

READING = """Runs of architectures with random weights, and runs of which no evaluation was asked: what pruning costs, and
nothing of what it leaves. Behind a phase's seconds stands how many times its *floor* that is: the seconds that no
implementation avoids there, from the operations and bytes of the method over the machine's own best matrix rate and copy
bandwidth, measured once and kept in `results/<machine>/machine.json`. `floor s` adds up the phases that have one; `x floor` is
the whole over that, so it also holds what has no floor: sorts, launches, copies to and from the host. A `*` marks costs
measured while other processes took cores that the run needed."""


def headings(section: CostSection, table: CostTable) -> list[str]:
    """Of the columns that say anything in this table."""
    phases = [name for name in (*SHOWN, REST) if any(name in row.phases for row in table.rows)]
    return [
        "method",
        "prune s",
        "floor s",
        "x floor",
        *phases,
        *(["device MiB"] if any(row.peak_device_bytes for row in section.rows) else []),
        "host MiB",
        *(["published s", "published GB", "times faster"] if any(row.published for row in section.rows) else []),
    ]


def texts(section: CostSection, table: CostTable, row: CostRow) -> list[str]:
    """A row's texts, one a heading."""
    mark = "*" if row.shared_machine else ""
    published = row.published
    known = {
        "method": row.method.replace(",", ", "),
        "prune s": f"{_seconds(row.seconds)}{mark}",
        "floor s": _seconds(row.floor),
        "x floor": times_text(row.times_floor),
        "device MiB": _mib(row.peak_device_bytes, mark),
        "host MiB": _mib(row.peak_host_bytes, mark),
        "published s": "" if not published else published.text or _plain(published.seconds),
        "published GB": "" if not published else _plain(published.gigabytes),
        "times faster": "" if row.faster is None else f"{'≈ ' if row.longer else ''}{row.faster:.1f}{mark}",
    }
    known |= {name: phase_text(seconds, row.floors.get(name)) for name, seconds in row.phases.items()}
    return [known.get(heading, "") for heading in headings(section, table)]


def phase_text(seconds: float, floor: float | None) -> str:
    """Seconds, and how many times their floor: `12.30 (1.4x)`."""
    return f"{_seconds(seconds)} ({times_text(seconds / floor)})" if floor else _seconds(seconds)


def section_notes(section: CostSection) -> list[str]:
    """What the tables of a section stand for."""
    notes = [ONLY_COSTS if section.is_shape else "No evaluation was asked: costs only."]
    if section.recipe is not None and section.recipe.calibration is not None:
        recipe = section.recipe
        assert recipe.calibration is not None
        read = "random tokens" if section.is_shape else recipe.calibration.label()
        notes.append(f"Calibration: {recipe.samples} x {recipe.length} tokens, {read} (recipe `{fingerprint(recipe)}`).")
    notes.append(f"Machine: {section.machine} ({section.device}).")
    if section.commands:
        notes.append("Reproduce: " + ", ".join(f"`{command}`" for command in section.commands) + ".")
    return notes


def table_notes(table: CostTable) -> list[str]:
    """What stands below a table: longer trainings, and what the published costs are of."""
    notes = [
        f"{row.method}: ≈ {_seconds(row.longer.seconds)} s ({row.longer.steps} steps, extrapolated from {row.longer.measured})."
        for row in table.rows
        if row.longer
    ]
    sources = dict.fromkeys((row.published.place, row.published.source.note) for row in table.rows if row.published)
    for place, note in sources:
        notes.append(
            f"Published costs are of another machine and of trained weights, target not stated, so they are for orientation "
            f"({place}{f'; {note}' if note else ''})."
        )
    if any(row.published and row.published.source.read == "secondary" for row in table.rows):
        notes.append("S: read in a secondary source, not in the paper.")
    return notes


def to_markdown(sections: Sequence[CostSection]) -> str:
    """All sections, for the page; below a heading of their own."""
    parts = [f"## {TITLE}", READING]
    for section in sections:
        parts.append(f"### {markdown(f'{section.title}, on {section.machine}')}")
        parts.append("\n".join(f"* {markdown(note)}" for note in section_notes(section)))
        for table in section.tables:
            rows = [[markdown(text) for text in texts(section, table, row)] for row in table.rows]
            frame = pd.DataFrame(rows, columns=[markdown(heading) for heading in headings(section, table)])
            align = ["left"] + ["right"] * (len(frame.columns) - 1)
            drawn = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
            parts.append(f"#### {markdown(target_title(table.target))}\n\n{drawn}")
            parts += [markdown(note) for note in table_notes(table)]
    return "\n\n".join(parts)


def _seconds(value: float | None) -> str:
    """Two decimals, four where they are few."""
    return "" if value is None else f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"


def times_text(ratio: float | None) -> str:
    """How many times a floor something took: `1.4x`."""
    return "" if ratio is None else f"{ratio:.1f}x" if ratio < 100 else f"{ratio:,.0f}x"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:,g}"


def _mib(count: int | None, mark: str) -> str:
    return "" if count is None else f"{count / 2**20:.0f}{mark}"

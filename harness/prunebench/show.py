"""What the commands print: boards, records and listings on a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prunebench.results import leaderboard
from prunebench.results.board import Board
from prunebench.results.records import RunRecord

WIDE = 132
"""Columns that a board needs to be shown whole."""

METHOD_WIDTH = 28
"""What a method's longest option needs."""


def print_listing(listing: Mapping[str, Any], console: Console) -> None:
    """Pruners and evaluations with their options, suites, and plugins that failed to load."""
    for kind in ("pruners", "evals"):
        console.print(f"[bold]{kind}[/]")
        for name, entry in listing[kind].items():
            origin = f"{entry['distribution']} {entry['version']}"
            console.print(f"  [bold]{name}[/]  {escape(entry['summary'])}  [dim]{escape(origin)}[/]")
            for fact in entry["options"]:
                about = f"{fact['type']}; {fact['doc']}"
                console.print(f"      {escape(fact['name'])} = {escape(fact['default'])}  [dim]{escape(about)}[/]")
    console.print(f"[bold]suites[/]\n  {', '.join(listing['suites'])}")
    if listing["broken"]:
        console.print("[bold red]plugins that cannot be used[/]")
    for item in listing["broken"]:
        console.print(f"  {escape(item['plugin'])} ({escape(item['distribution'])}): {escape(item['reason'])}")


def print_board(board: Board, console: Console) -> None:
    """Every table of a board."""
    if not board.sections:
        console.print("There are no results yet.")
    for section in board.sections:
        console.print(f"\n[bold]{escape(section.title)}[/]")
        for note in leaderboard.section_notes(section):
            console.print(f"  {escape(note.replace('`', ''))}", style="dim", highlight=False)
        if section.silence:
            console.print(f"  {escape(section.silence)}")
            continue
        for table in section.tables:
            headings = leaderboard.columns(section, table)
            texts = [leaderboard.cells(section, table, row) for row in table.rows]
            shown = _columns_that_fit(headings, texts, console)
            grid = Table(box=SIMPLE, title=escape(leaderboard.table_title(table)), title_justify="left", title_style="bold")
            for index in shown:
                # Numbers stay whole; a method with its options is broken where the terminal is narrow.
                method = headings[index] == "method"
                grid.add_column(headings[index], justify="left" if method else "right", no_wrap=not method, overflow="fold")
            grid.columns[shown.index(1)].min_width = METHOD_WIDTH
            for row, cells in zip(table.rows, texts, strict=True):
                style = "dim" if row.method == "dense" else "bold" if row.rank is not None and row.rank.best else ""
                grid.add_row(*(escape(cells[index]) for index in shown), style=style)
            console.print(grid)
            limits = leaderboard.table_limits(section, table)
            if limits:
                console.print(f"  {escape(limits)}", style="dim", highlight=False)
    for title, records in (("refused", board.refused), ("failed", board.failed), ("outdated", board.outdated)):
        for record in records:
            console.print(f"{title}: {escape(leaderboard.describe(record))}: {escape(record.reason or '')}", highlight=False)


def draw_board(board: Board) -> str:
    """A board as an SVG picture that asks for nothing from elsewhere: rich's own would fetch a font."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, record=True, width=WIDE + 4, force_terminal=True, highlight=False)
        print_board(board, console)
        picture = console.export_svg(title="prunebench report", unique_id="board")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def print_record(record: RunRecord, path: str, console: Console) -> None:
    """One record, readable."""
    spec = record.spec
    console.print(f"[bold]{escape(leaderboard.describe(record))}[/]")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()

    def fact(name: str, value: str) -> None:
        facts.add_row(name, escape(value))

    fact("file", path)
    fact("status", record.status + (f": {record.reason}" if record.reason else ""))
    fact("model", f"{spec.model.name} ({spec.model.source}, weights {spec.model.weights}, {spec.model.dtype})")
    if spec.recipe.calibration is not None:
        fact("calibration", f"{spec.recipe.samples} x {spec.recipe.length} of {spec.recipe.calibration.label()}")
    for step in record.steps:
        options = ", ".join(f"{name}={value}" for name, value in step.options.items()) or "no options"
        fact("step", f"{step.pruner} revision {step.revision} ({step.distribution} {step.version}): {options}")
        fact("  seconds", ", ".join(f"{name} {seconds:.3f}" for name, seconds in step.phases.items()))
        fact(
            "  peak memory", _memory(step.peak_host_bytes, "of the process") + _memory(step.peak_device_bytes, "on the device")
        )
        for name, note in step.notes.items():
            fact("  note", f"{name}: {note}")
    if record.audit is not None:
        audit = record.audit
        fact("zeros", f"{audit.sparsity_prunable:.4%} of prunable weights, {audit.sparsity_total:.4%} of all parameters")
        fact("extra zeros", str(audit.extra_zeros))
        fact("coverage", f"{audit.coverage:.4%} of the blocks' parameters")
    for name, score in record.scores.items():
        fact(name, f"{leaderboard.number(score.value)} ({score.seconds:.1f} s)")
        fact("  conditions", ", ".join(f"{key}={value}" for key, value in score.conditions.items()))
    made = record.provenance
    fact("made by", made.command)
    fact("at", f"{made.started}, {made.seconds:.1f} s, {made.executor}, {made.threads} threads, batches of {made.batch_size}")
    fact("on", f"{made.device}, {made.platform}, Python {made.python}")
    fact("with", ", ".join(f"{name} {version}" for name, version in made.packages.items()))
    fact("commit", f"{made.commit or 'not from a clone'}{' with changes' if made.dirty else ''}")
    console.print(facts)


def _columns_that_fit(headings: list[str], rows: list[list[str]], console: Console) -> list[int]:
    """All columns, or on a narrow terminal those that matter most."""
    widths = [max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True)]
    shown = list(range(len(headings)))
    for heading in ("coverage %", "of all %", "peak MiB", "extra", "sparsity %", "flips %"):
        if METHOD_WIDTH + sum(widths[index] for index in shown if index != 1) > console.width - 4 and heading in headings:
            shown.remove(headings.index(heading))
    return shown


def _memory(count: int | None, where: str) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB {where}"

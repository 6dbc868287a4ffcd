"""What the commands print of costs: tables of runs without scores, and a step's seconds beside their floors."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from prunebench.plain import escape
from prunebench.results import costs_text
from prunebench.results.costs_board import CostSection
from prunebench.results.records import StepRecord
from prunebench.results.rows import target_title

METHOD_WIDTH = 28

LEFT_OUT = ("rest", "published GB", "host MiB", "update", "scoring", "floor s", "propagation", "training", "statistics")
"""Columns that a narrow terminal does not show, the first of them first; a file has them all."""


def print_costs(sections: Sequence[CostSection], console: Console) -> None:
    """Every table of costs."""
    for section in sections:
        console.print(f"\n[bold]{escape(section.title)}[/]")
        for note in costs_text.section_notes(section):
            console.print(f"  {escape(note.replace('`', ''))}", style="dim", highlight=False)
        for table in section.tables:
            title = escape(target_title(table.target))
            grid = Table(box=SIMPLE, title=title, title_justify="left", title_style="bold")
            headings = costs_text.headings(section, table)
            lines = [costs_text.texts(section, table, row) for row in table.rows]
            shown = _that_fit(headings, lines, console)
            grid.add_column("method", overflow="fold", min_width=METHOD_WIDTH)
            for index in shown[1:]:
                grid.add_column(escape(headings[index]), justify="right", no_wrap=True)
            for line in lines:
                grid.add_row(*(escape(line[index]) for index in shown))
            console.print(grid)
            for note in costs_text.table_notes(table):
                console.print(f"  {escape(note)}", style="dim", highlight=False)


def _that_fit(headings: list[str], lines: list[list[str]], console: Console) -> list[int]:
    """All columns, or on a narrow terminal those that matter most; the method's is first, and can be broken."""
    widths = [max(map(len, column)) + 3 for column in zip(headings, *lines, strict=True)]
    shown = list(range(len(headings)))
    for heading in LEFT_OUT:
        if METHOD_WIDTH + sum(widths[index] for index in shown[1:]) > console.width - 4 and heading in headings:
            shown.remove(headings.index(heading))
    return shown


def seconds_text(step: StepRecord) -> str:
    """A step's seconds by phase, with how many times its floor each took: `statistics 12.300 (1.4x floor), scoring 0.510`."""
    told = []
    for name, seconds in step.phases.items():
        floor = step.floors.get(name)
        told.append(f"{name} {seconds:.3f}" + (f" ({costs_text.times_text(seconds / floor)} floor)" if floor else ""))
    return ", ".join(told)

"""What `prunebench compare BEFORE AFTER` prints: a table that is read in ten seconds, counts first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from prunebench.plain import escape, size_text
from prunebench.results.changes import Change, Changes, CostChange, Outcome, Side
from prunebench.results.leaderboard import difference_text, value_text
from prunebench.results.rows import target_title

MOST_ROWS = 25
"""Of one outcome; the rest is counted, and in the JSON."""

MOST_NOTE = 100
"""Characters of what a failed run said."""

STYLES: dict[Outcome, str] = {"worsened": "bold red", "improved": "green", "cannot be told": "yellow"}

SHOWN: tuple[Outcome, ...] = ("worsened", "improved", "vanished", "appeared", "cannot be told")
"""Outcomes whose rows are listed, in this order; the others are counted."""

STAYED: tuple[Outcome, ...] = ("within noise", "the same")

MOST_REMARKS = 5
"""Kinds of remarks on rows that stayed."""


def print_changes(changes: Changes, with_costs: bool, console: Console) -> None:
    """Counts, then what worsened, improved, vanished, appeared and cannot be told, then costs.

    Args:
        changes: of two folders.
        with_costs: whether costs that grew count as worsened.
        console: where to.
    """
    console.print(f"{changes.records[0]} runs before, {changes.records[1]} after; scores compared row by row:")
    counts = changes.counts
    said = [
        f"[{STYLES.get(outcome, 'bold') if counts[outcome] else 'dim'}]{counts[outcome]} {outcome}[/]"
        for outcome in counts
        if counts[outcome] or outcome in ("worsened", "improved", "vanished", "appeared")
    ]
    console.print(f"  {', '.join(said)}")
    stayed = [note for outcome in STAYED for change in changes.of(outcome) for note in change.notes]
    for note, count in Counter(stayed).most_common(MOST_REMARKS):
        console.print(f"  of those that stayed {count} {'has' if count == 1 else 'have'}: {escape(note)}", style="dim")
    for outcome in SHOWN:
        found = changes.of(outcome)
        if found:
            console.print(f"\n[{STYLES.get(outcome, 'bold')}]{outcome}[/]")
            console.print(_alone(found) if outcome in ("vanished", "appeared") else _both(found))
            _rest(len(found), console)
    for title, grew in (("slower or larger", True), ("faster or smaller", False)):
        costs = [cost for cost in changes.costs if cost.grew == grew]
        if costs:
            counted = ", counted as worsened" if with_costs and grew else ""
            console.print(f"\n[bold]{title}[/] on the same machine, by more than a quarter{counted}")
            console.print(_costs(costs))
            _rest(len(costs), console)


def _both(found: Sequence[Change]) -> Table:
    """Rows with a value on both sides, or a reason why not."""
    grid = _grid("model", "method", "target", "score", "before", "after", "change [95%]", "p", "remarks")
    for change in found[:MOST_ROWS]:
        difference = change.difference
        told = "" if difference is None else difference_text(difference, change.is_ratio, change.is_share)
        unit = " %" if change.is_ratio else " points" if change.is_share else ""
        grid.add_row(
            *_what(change),
            _value(change, change.before),
            _value(change, change.after),
            f"{told}{unit}" if told else "",
            "" if change.corrected is None else f"{change.corrected:.2g}",
            _notes(change),
        )
    return grid


def _alone(found: Sequence[Change]) -> Table:
    """Rows that only one side has."""
    grid = _grid("model", "method", "target", "score", "value", "machine", "remarks")
    for change in found[:MOST_ROWS]:
        side = change.before or change.after
        assert side is not None
        grid.add_row(*_what(change), _value(change, side), escape(side.machine), _notes(change))
    return grid


def _costs(costs: Sequence[CostChange]) -> Table:
    grid = _grid("model", "method", "target", "cost", "before", "after", "times")
    for cost in costs[:MOST_ROWS]:
        values = [
            f"{value:.2f} s" if cost.cost == "prune seconds" else size_text(round(value)) for value in (cost.before, cost.after)
        ]
        label = cost.label
        names = (escape(label.model), escape(label.method), target_title(label.target), cost.cost)
        grid.add_row(*names, *values, f"{cost.factor:.2f}")
    return grid


def _grid(*headings: str) -> Table:
    grid = Table(box=SIMPLE)
    for heading in headings:
        number = heading in ("before", "after", "change [95%]", "p", "value", "times")
        grid.add_column(escape(heading), justify="right" if number else "left", overflow="fold", no_wrap=number)
    return grid


def _what(change: Change) -> list[str]:
    label = change.label
    name = change.scores[0] if len(change.scores) == 1 else f"{len(change.scores)} scores"
    method, name = (text.replace(",", ", ") for text in (label.method, name))  # so that a narrow column can break it
    return [escape(label.model), escape(method), escape(target_title(label.target)), escape(name)]


def _value(change: Change, side: Side | None) -> str:
    return "" if side is None or side.value is None else value_text(side.value, change.is_share)


def _notes(change: Change) -> str:
    notes = (*change.notes, *change.apart)
    return escape("; ".join(note if len(note) <= MOST_NOTE else f"{note[:MOST_NOTE]}…" for note in notes))


def _rest(count: int, console: Console) -> None:
    if count > MOST_ROWS:
        console.print(f"  … and {count - MOST_ROWS} more; `--json` has all.", style="dim")

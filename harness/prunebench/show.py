"""What the commands print: boards, records and listings on a terminal."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, JustifyMethod
from rich.table import Table

from prunebench.plain import escape, size_text
from prunebench.results import leaderboard
from prunebench.results.board import Board
from prunebench.results.contest import Contest
from prunebench.results.explain import Explanation
from prunebench.results.records import RunRecord
from prunebench.show_costs import print_costs, seconds_text

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
            console.print(f"  [bold]{escape(name)}[/]  {escape(entry['summary'])}  [dim]{escape(origin)}[/]")
            for fact in entry["options"]:
                about = f"{fact['type']}; {fact['doc']}"
                console.print(f"      {escape(fact['name'])} = {escape(fact['default'])}  [dim]{escape(about)}[/]")
    console.print(f"[bold]suites[/]\n  {escape(', '.join(listing['suites']))}")
    if listing["broken"]:
        console.print("[bold red]plugins that cannot be used[/]")
    for item in listing["broken"]:
        console.print(f"  {escape(item['plugin'])} ({escape(item['distribution'])}): {escape(item['reason'])}")


def print_board(board: Board, console: Console) -> None:
    """Every table of a board."""
    if not board.titles:
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
            shown = _columns_that_fit(headings, texts, section.parts, console)
            grid = Table(box=SIMPLE, title=escape(leaderboard.table_title(table)), title_justify="left", title_style="bold")
            for index in shown:
                # Numbers stay whole; a method with its options is broken where the terminal is narrow.
                method = headings[index] == "method"
                justify: JustifyMethod = "left" if method else "right"
                grid.add_column(escape(headings[index]), justify=justify, no_wrap=not method, overflow="fold")
            grid.columns[shown.index(1)].min_width = METHOD_WIDTH
            for row, cells in zip(table.rows, texts, strict=True):
                style = "dim" if row.method == "dense" else "bold" if row.rank is not None and row.rank.best else ""
                grid.add_row(*(escape(cells[index]) for index in shown), style=style)
            console.print(grid)
            limits = leaderboard.table_limits(section, table)
            if limits:
                console.print(f"  {escape(limits)}", style="dim", highlight=False)
    print_costs(board.costs, console)
    for title, records in (("refused", board.refused), ("failed", board.failed), ("outdated", board.outdated)):
        for record in records:
            console.print(
                f"{title}: {escape(leaderboard.describe(record))}: {escape(leaderboard.reason(record))}", highlight=False
            )


def draw_board(board: Board) -> str:
    """A board as an SVG picture that asks for nothing from elsewhere: rich's own would fetch a font."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(file=nowhere, record=True, width=WIDE + 4, force_terminal=True, highlight=False)
        print_board(board, console)
        picture = console.export_svg(title="prunebench report", unique_id="board")
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)


def print_explanations(explanations: Sequence[Explanation], console: Console) -> None:
    """Whether two scores may be compared, and every field in which they differ."""
    for found in explanations:
        verdict = "[green]may be ranked together[/]" if found.comparable else "[red]may not be ranked together[/]"
        names = found.first if found.first == found.second else f"{found.first} / {found.second}"
        console.print(f"\n[bold]{escape(names)}[/]: {verdict}")
        if not found.points:
            continue
        grid = Table(box=SIMPLE)
        for heading in ("field", "A", "B", "consequence"):
            grid.add_column(heading, overflow="fold")
        for point in sorted(found.points, key=lambda point: point.consequence is None):
            style = "dim" if point.consequence is None else ""
            grid.add_row(*map(escape, (point.field, point.first, point.second, point.consequence or "none")), style=style)
        console.print(grid)


def print_contests(contests: Sequence[Contest], console: Console) -> None:
    """Two rows, score by score."""
    tested = sum(contest.corrected is not None for contest in contests)
    for contest in contests:
        share, exponential = contest.score.is_share, contest.score.is_ratio
        console.print(f"\n[bold]{escape(contest.name)}[/]")
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        for name, values in (("A", contest.first), ("B", contest.second)):
            shown = ", ".join(leaderboard.value_text(value, share) for value in values)
            facts.add_row(name, f"{shown}  {escape(contest.score.unit)}")
        if contest.comparison is None:
            facts.add_row("A - B", "cannot be compared item by item: other items, no seed in common, or no items kept")
            console.print(facts)
            continue
        found = contest.comparison
        seeds = "deterministic" if found.seeds == (None,) else f"seeds {', '.join(map(str, found.seeds))}"
        now, later = (leaderboard.difference_text(each, exponential, share) for each in (found.new_items, found.new_seeds))
        facts.add_row(f"A - B{' %' if exponential else ' points' if share else ''}", f"{now}  these seeds, new text ({seeds})")
        corrected = "" if contest.corrected is None else f", {contest.corrected:.3g} after Holm over {tested} scores"
        facts.add_row("p", f"{found.new_items.p_value:.3g}{corrected}")
        few = "" if found.new_seeds.supports_rank else "; fewer than 5 seeds, so nothing rests on it"
        facts.add_row("", f"{later if found.new_seeds.is_known else 'no interval'}  new seeds too{few}")
        least = leaderboard.difference_size(found.detectable(), exponential, share)
        could = (
            f"true differences from {least} on, four times of five"
            if math.isfinite(found.detectable())
            else "none: too few items"
        )
        facts.add_row("could show", could)
        if found.first.are_right_or_wrong:
            for seed, flips in zip(found.seeds, found.flips, strict=True):
                label = "flips" if seed is None else f"flips, seed {seed}"
                lost, won = flips.right_to_wrong, flips.wrong_to_right
                text = f"from A to B {lost} right to wrong, {won} wrong to right of {flips.asked:,} ({flips.share:.1%})"
                facts.add_row(label, text + (f", McNemar p {flips.p_value:.3g}" if len(found.first.tasks) == 1 else ""))
        console.print(facts)


def print_record(record: RunRecord, path: str, console: Console) -> None:
    """One record, readable."""
    spec = record.spec
    console.print(f"[bold]{escape(leaderboard.describe(record))}[/]")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()

    def fact(name: str, value: str) -> None:
        facts.add_row(escape(name), escape(value))

    fact("file", path)
    fact("status", record.status + (f": {record.reason}" if record.reason else ""))
    fact("model", f"{spec.model.name} ({spec.model.source}, weights {spec.model.weights}, {spec.model.dtype})")
    if spec.recipe.calibration is not None:
        fact("calibration", f"{spec.recipe.samples} x {spec.recipe.length} of {spec.recipe.calibration.label()}")
    for step in record.steps:
        options = ", ".join(f"{name}={value}" for name, value in step.options.items()) or "no options"
        fact("step", f"{step.pruner} revision {step.revision} ({step.distribution} {step.version}): {options}")
        fact("  seconds", seconds_text(step))
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
    for name, told in _kept(record):
        fact(name, told)
    if spec.model.is_shape:
        fact("scores", "of costs only: the weights are random")
    for name, score in record.scores.items():
        shown = score.reason or "no mean" if score.value is None else f"{score.value:.6g}"
        fact(name, f"{shown} ({score.seconds:.1f} s)")
        for part, value in score.parts.items():
            fact(f"  {part}", f"{value:.4g}")
        fact("  conditions", ", ".join(f"{key}={value}" for key, value in score.conditions.items()))
    made = record.provenance
    fact("made by", made.command)
    fact("at", f"{made.started}, {made.seconds:.1f} s, {made.executor}, {made.threads} threads, batches of {made.batch_size}")
    fact("on", f"{made.device}, {made.platform}, Python {made.python}")
    if made.predicted_seconds is not None:
        peak = f"{made.predicted_seconds:.1f} s, {_memory(made.predicted_peak_bytes, 'at the peak, evaluation included')}"
        fact("predicted", f"{peak}; found {made.seconds:.1f} s, {_memory(record.peak_bytes, 'at the peak of a step')}")
    fact("with", ", ".join(f"{name} {version}" for name, version in made.packages.items()))
    fact("commit", f"{made.commit or 'not from a clone'}{' with changes' if made.dirty else ''}")
    console.print(facts)


def _columns_that_fit(headings: list[str], rows: list[list[str]], parts: list[str], console: Console) -> list[int]:
    """All columns, or on a narrow terminal those that matter most: tasks go before anything else does, the last ones first."""
    widths = [max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True)]
    shown = list(range(len(headings)))
    for heading in (*reversed(parts), "coverage %", "of all %", "peak MiB", "extra", "sparsity %", "flips %"):
        if METHOD_WIDTH + sum(widths[index] for index in shown if index != 1) > console.width - 4 and heading in headings:
            shown.remove(headings.index(heading))
    return shown


def _kept(record: RunRecord) -> Iterator[tuple[str, str]]:
    """What was kept of a pruned model, and whose masks were scored."""
    if record.rescored_from is not None:
        yield "rescored", f"nothing was pruned anew: masks and costs of pruning are those of {record.rescored_from}"
    kept = record.masks
    if kept is not None:
        yield "masks", f"{kept.file}, {size_text(kept.bytes)}" + (" with the weights" if kept.weights_file else "")
        if kept.weights_file is not None:
            yield "weights", kept.weights_file
        if not record.spec.model.is_shape:
            again = f"`prunebench rescore {record.id}` scores them again"
            yield "", f"cannot be scored again: {kept.note}" if kept.note else again


def _memory(count: int | None, where: str) -> str:
    return "" if count is None else f"{count / 2**20:.0f} MiB {where}"

"""What `prunebench advise` prints: the answer first, then the evidence for it, then what is not known."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from prunebench.errors import did_you_mean
from prunebench.plain import escape
from prunebench.results.advice import Advice, Elsewhere, Evidence, Tally, tally
from prunebench.results.content import fingerprint
from prunebench.results.dominance import Choice, Verdict
from prunebench.results.leaderboard import describe, difference_text, reason, value_text
from prunebench.results.rows import target_title

SAID: dict[Verdict, str] = {"open": "open: ", "beaten": "beaten by ", "ruled out": "ruled out: "}
"""What speaks against a row."""

RULE = "Worth choosing: no other is at least as good and costs no more. * marks the costs of a machine that was shared."

WIDTH = 32
"""Of a method."""

MOST_TABLES = 8
"""That are printed whole, those that people look for first."""

MOST_RUNS = 10
"""Without a score, that are told."""

MOST_REASONS = 3
"""Of one kind; the evidence and the JSON have all."""


def print_advice(advice: Advice, commands: Sequence[str], console: Console) -> None:
    """An answer.

    Args:
        advice: the answer.
        commands: that would make what evidence is missing.
        console: where to.
    """
    question = advice.question
    asked = f"{escape(question.model)} at {escape(target_title(question.target))}"
    if advice.evidence:
        machines = escape(", ".join(sorted({one.section.machine for one in advice.evidence})))
        count = len(advice.evidence)
        console.print(
            f"[bold]{asked}[/]: {count} {'table' if count == 1 else 'tables'} of evidence, with the costs of {machines}"
        )
        console.print(RULE, style="dim")
        _print_answer(advice.evidence, console)
        for one in advice.evidence[:MOST_TABLES]:
            _print_evidence(one, console)
        if count > MOST_TABLES:
            console.print(f"\n… and {count - MOST_TABLES} more tables, which the answer counts; `--json` has all.", style="dim")
    else:
        where = f" on {escape(question.machine)}" if question.machine else ""
        console.print(f"[bold]{asked}{where}: no evidence[/]")
        if question.weights is None and question.model not in advice.models:
            near = did_you_mean(question.model, advice.models)
            console.print(f"  no record is of a model of that name{escape(near)}")
    for record in advice.without[:MOST_RUNS]:
        console.print(f"no score: {escape(describe(record))}: {escape(reason(record))}")
    if len(advice.without) > MOST_RUNS:
        console.print(f"no score: {len(advice.without) - MOST_RUNS} more runs; `--json` has all.")
    if advice.outdated:
        console.print(f"{advice.outdated} runs are of another revision of the method or an evaluation, so they do not count.")
    for other in advice.elsewhere:
        _print_elsewhere(other, console)
    if commands:
        console.print("\nWhat is not known, and what shows how long it would take to know it:")
        for command in commands:
            console.print(f"  {escape(command)}", soft_wrap=True)
    elif not advice.evidence:
        target = escape(question.target)
        console.print(f'\nTo know it, write a suite with `targets = ["{target}"]`, and look with `prunebench run … --dry-run`.')


def _print_elsewhere(other: Elsewhere, console: Console) -> None:
    """What somebody who extrapolates would go by."""
    console.print(f"\n[bold]Extrapolated, from {other.kind}: {escape(other.what)}[/]. Nothing shows that it carries over.")
    found = [one for one in tally(other.evidence) if one.counts["choose"]]
    for trained, title in ((False, "without retraining"), (True, "retrained on text")):
        names = [f"{one.method} ({one.counts['choose']} of {one.measured} tables)" for one in found if one.trained == trained]
        if names:
            console.print(f"  worth choosing there, {title}: {escape('; '.join(names))}")


def command_for(suite: str, model: str, method: str) -> str:
    """What shows what a run of a method on a model would take."""
    return shlex.join(["prunebench", "run", suite, "--model", model, "--method", method, "--dry-run"])


def _print_answer(evidence: Sequence[Evidence], console: Console) -> None:
    """Each method in how many tables it is worth choosing; those retrained on text apart."""
    found = tally(evidence)
    for trained, title in ((False, "without retraining"), (True, "retrained on text")):
        methods = [one for one in found if one.trained == trained]
        if not methods:
            continue
        grid = Table(box=SIMPLE, title=f"{title}: worth choosing", title_justify="left", title_style="bold")
        for heading, right in (("method", False), ("in tables", True), ("best rank", True), ("prune s", True)):
            grid.add_column(heading, justify="right" if right else "left", overflow="fold", min_width=None if right else WIDTH)
        grid.add_column("peak MiB", justify="right")
        grid.add_column("otherwise", overflow="fold")
        for one in methods:
            style = "" if one.counts["choose"] else "dim"
            chosen = f"{one.counts['choose']} of {one.measured}"
            grid.add_row(escape(one.method.replace(",", ", ")), chosen, *_span(one.choices), escape(_why(one)), style=style)
        console.print(grid)


def _span(choices: Sequence[Choice]) -> list[str]:
    """The best rank that a method has anywhere, and its costs from least to most."""
    ranks = [choice.row.rank for choice in choices if choice.row.rank is not None]
    best = min(ranks, key=lambda rank: (rank.first, rank.last), default=None)
    mark = "*" if any(choice.row.shared_machine for choice in choices) else ""
    seconds = sorted(choice.row.prune_seconds for choice in choices)
    peaks = sorted(choice.row.peak_bytes for choice in choices if choice.row.peak_bytes is not None)
    costs = [[f"{value:.2f}" for value in seconds], [f"{value / 2**20:.0f}" for value in peaks]]
    spans = ["" if not values else values[0] if values[0] == values[-1] else f"{values[0]} … {values[-1]}" for values in costs]
    return ["" if best is None else str(best), *(f"{span}{mark}" if span else "" for span in spans)]


def _why(one: Tally) -> str:
    """What speaks against a method, where something does."""
    found = [f"{SAID[verdict]}{_some(one.reasons[verdict])} ({one.counts[verdict]})" for verdict in SAID if one.counts[verdict]]
    return "; ".join(found)


def _some(reasons: Sequence[str]) -> str:
    """The first of them."""
    more = len(reasons) - MOST_REASONS
    return ", ".join([*reasons[:MOST_REASONS], *([f"{more} more"] if more > 0 else [])])


def _print_evidence(evidence: Evidence, console: Console) -> None:
    """One table: what was measured, under which conditions, and what of it is worth choosing."""
    section, table = evidence.section, evidence.table
    size = f", {_count(evidence.parameters)} parameters" if evidence.parameters else ""
    recipe = section.recipe
    dtype = section.conditions.get("dtype")
    conditions = f"conditions {fingerprint(dict(section.conditions))}{f' ({dtype})' if dtype else ''}"
    notes = [conditions, f"weights {evidence.weights[:8]}{size}"]
    if recipe is not None and recipe.calibration is not None:
        notes.append(f"calibration {recipe.samples} x {recipe.length} of {recipe.calibration.label()}")
    if table.training is not None and table.training.training is not None:
        notes.append(f"retrained on {table.training.training_tokens:,} tokens of {table.training.training.label()}")
    notes.append(section.machine)
    if section.baseline is not None:
        notes.append(f"dense {value_text(section.baseline, section.is_share)}")
    console.print(f"\n[bold]{escape(section.title)}[/]\n  {escape('; '.join(notes))}")
    chosen = [choice for choice in evidence.choices if choice.verdict == "choose"]
    if chosen:
        grid = Table(box=SIMPLE, show_edge=False)
        for heading in ("worth choosing", section.unit, "vs dense [95%]", "rank", "seeds", "prune s", "peak MiB"):
            text = heading == "worth choosing"
            grid.add_column(escape(heading), justify="left" if text else "right", overflow="fold", no_wrap=not text)
        for choice in chosen:
            grid.add_row(*_cells(evidence, choice))
        console.print(grid)
    for choice in evidence.choices:
        if choice.verdict in SAID:
            rank = "" if choice.row.rank is None else f", rank {choice.row.rank}"
            value = f"{choice.row.method}: {value_text(choice.row.mean, section.is_share)}{rank}; {SAID[choice.verdict]}"
            console.print(f"  {escape(value + ', '.join(choice.reasons))}", style="dim")


def _cells(evidence: Evidence, choice: Choice) -> list[str]:
    section, row = evidence.section, choice.row
    mark = "*" if row.shared_machine else ""
    unit = " %" if section.is_ratio else " points" if section.is_share else ""
    versus = "" if row.versus is None else difference_text(row.versus, section.is_ratio, section.is_share) + unit
    return [
        escape(f"{row.method.replace(',', ', ')}{' (tuned)' if row.tuned else ''}"),
        value_text(row.mean, section.is_share),
        versus,
        "" if row.rank is None else str(row.rank),
        row.seeds_shown,
        f"{row.prune_seconds:.2f}{mark}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}{mark}",
    ]


def _count(number: int) -> str:
    """A number of parameters as people say it."""
    for size, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)

"""From boards to text: the page `leaderboard.md`, and the cells that the terminal shows too. Equal records, equal bytes."""

from __future__ import annotations

import math

import pandas as pd

from prunebench.results.board import DENSE, Board, Row, Section, Table
from prunebench.results.records import RunRecord, fingerprint


def to_markdown(board: Board) -> str:
    """The page, as `leaderboard.md`."""
    parts = [_INTRODUCTION]
    if not board.sections:
        parts.append("There are no results yet: `make leaderboard` runs the quickstart.")
    parts += [_section_markdown(section) for section in board.sections]
    for title, records in (("Refused", board.refused), ("Failed", board.failed), ("Outdated", board.outdated)):
        if records:
            lines = [f"* {_one_line(f'{describe(record)}: {_reason(record)}')}" for record in records]
            parts.append(f"## {title} runs\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def columns(section: Section, table: Table) -> list[str]:
    """The headings of a table."""
    return [
        "method",
        section.unit,
        "vs dense",
        *(["vs control", "extra"] if table.training else []),
        "seeds",
        "prune s",
        "peak MiB",
        "sparsity %",
        "of all %",
        "coverage %",
    ]


def cells(table: Table, row: Row) -> list[str]:
    """A row's texts, one a heading."""
    spread = "" if row.spread is None else f" ± {number(row.spread)}"
    mark = "*" if row.shared_machine else ""
    method = row.method.replace(",", ", ")  # so that a narrow column can break it; steps are read with the spaces too
    return [
        f"{method} (tuned)" if row.tuned else method,
        f"{number(row.mean)}{spread}",
        _percent(row.change),
        *([_percent(row.control), f"{row.extra_parameters:,}" if row.extra_parameters else ""] if table.training else []),
        row.seeds_shown,
        f"{row.prune_seconds:.2f}{mark}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}{mark}",
        f"{row.sparsity_prunable:.2%}".removesuffix("%"),
        f"{row.sparsity_total:.2%}".removesuffix("%"),
        f"{row.coverage:.2%}".removesuffix("%"),
    ]


def _percent(change: float | None) -> str:
    return "" if change is None else f"{change:+.1%}"


def section_notes(section: Section) -> list[str]:
    """What the tables of a section stand for: conditions, recipe, machine, command."""
    conditions = section.conditions
    notes = [
        f"Evaluation: {conditions.get('windows', '?')} windows of {conditions.get('window', '?')} tokens, "
        f"{conditions.get('dtype')}, {conditions.get('attention')} attention "
        f"(conditions `{fingerprint(dict(conditions))}`)."
    ]
    if section.recipe is not None and section.recipe.calibration is not None:
        recipe = section.recipe
        assert recipe.calibration is not None
        notes.append(
            f"Calibration: {recipe.samples} x {recipe.length} tokens of {recipe.calibration.label()} "
            f"(recipe `{fingerprint(recipe)}`)."
        )
    notes.append(f"Machine: {section.machine}.")
    if section.suites:
        notes.append("Reproduce: " + ", ".join(f"`prunebench run {suite}`" for suite in section.suites) + ".")
    return notes


def describe(record: RunRecord) -> str:
    """A run in a few words."""
    seed = "" if record.spec.seed is None else f", seed {record.spec.seed}"
    return f"{record.spec.model.name}, {record.spec.method} at {record.spec.target}{seed}, on {record.machine} (`{record.id}`)"


def number(value: float | None) -> str:
    """Two decimals, four where the value is small, none and thousands marked where it is large."""
    if value is None or math.isnan(value):
        return "–"
    if abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.2f}"


_INTRODUCTION = """# prunebench leaderboard

Made by `prunebench report` from the records in `results/`; never edited by hand.

Rows in one table were measured under the same conditions on the same machine, and prunings that used data had the same
recipe. Several calibration seeds are one row: mean ± standard deviation over seeds. `deterministic` methods use neither data
nor randomness. Rows are sorted by value; **there are no ranks**, because no test of the differences has been made: a
difference within the spread over seeds, or one that a few windows of text could turn round, means nothing.

Options that differ from a method's defaults are written out; `(tuned)` says that they were chosen on validation text, by the
records of a suite that are kept too. What was retrained on text has tables of its own: on top the dense model, and the dense
model after the very same training as a control, since training alone helps a model too; `vs control` compares with that.
Budgets of training are in the options (`steps`, `batch`), in the suites that ship for small machines far below the papers'.

`sparsity %` is the share of zeros found in the prunable weights (all linear weights of the decoder blocks), `of all %` the
same zeros as a share of all parameters. `coverage %` is the share of the blocks' parameters that are in matrices the method
pruned, `extra` how many parameters it added. `prune s` is the whole pruning without loading and evaluation, with the original cost
of whatever was reused; `peak MiB` the highest memory of the process (of the GPU where there is one) while pruning; a `*` marks
costs measured while other processes took cores that the run needed."""


def _section_markdown(section: Section) -> str:
    notes = "\n".join(f"* {_one_line(note)}" for note in section_notes(section))
    parts = [f"## {_one_line(section.title)}", notes]
    for table in section.tables:
        rows = [[_one_line(cell) for cell in cells(table, row)] for row in table.rows]
        frame = pd.DataFrame(rows, columns=[_one_line(heading) for heading in columns(section, table)])
        align = ["left"] + ["right"] * (len(frame.columns) - 1)
        text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        parts.append(f"### {_one_line(table_title(table))}\n\n{text}")
    return "\n\n".join(parts)


def target_title(target: str) -> str:
    """A target as a heading."""
    return target if ":" in target or target == DENSE else f"{float(target) * 100:g}% unstructured"


def table_title(table: Table) -> str:
    """A table's target, and what its rows were trained on."""
    title = target_title(table.target)
    if table.training is None or table.training.training is None:
        return title
    return f"{title}, retrained on text of {table.training.training.label()}, {table.training.training_tokens:,} tokens"


def _reason(record: RunRecord) -> str:
    if record.failure is not None:
        return f"{record.failure.kind}: {record.failure.message}"
    return record.reason or "measured with another revision of the method; run the suite again"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

"""The board as data for other programs, and as JSON. Equal records give equal bytes.

Numbers are raw: shares and not per cent, seconds, bytes, and nothing rounded; what is not a number, or has no end, is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prunebench.results.beside import Beside
from prunebench.results.board import Board, Section, Table
from prunebench.results.content import fingerprint
from prunebench.results.costs_export import ExportedCosts, exported_costs
from prunebench.results.leaderboard import reason, table_limits
from prunebench.results.records import RunRecord
from prunebench.results.rows import Row
from prunebench.results.verdicts import Grade

EXPORT_SCHEMA = 1
"""The format of the JSON file; it rises when a field is renamed, leaves, or means something else."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExportedDifference(_Frozen):
    """A row against the dense model, item by item."""

    estimate: float | None = Field(description="this row minus dense")
    low: float | None = Field(description="of the 95% interval; null where answers cannot be compared one by one")
    high: float | None = Field(description="likewise")
    unit: str = Field(description="`share of dense` (0.2 is 20% more), or the section's unit")


class ExportedRow(_Frozen):
    """One method at one target, its seeds together."""

    method: str = Field(description="steps, with the options that differ from their defaults")
    pruned: bool = Field(description="false for the dense model, also after training: it stands on top and has no rank")
    tuned: str | None = Field(description="the suite by whose records options were chosen")
    value: float | None = Field(description="mean over seeds")
    values: list[float | None] = Field(description="of each seed")
    standard_deviation: float | None = Field(description="over seeds")
    seeds: list[int | None] = Field(description="[null]: neither data nor randomness, so there is nothing to repeat")
    rank_low: int | None = Field(description="1 + how many are significantly better, by Holm; null without tests")
    rank_high: int | None = Field(description="how many rows there are less those that are significantly worse")
    best: bool | None = Field(description="nobody is significantly better")
    difference: ExportedDifference | None = Field(description="null for the dense model itself, and without one")
    control: float | None = Field(description="value of the dense model after the same training")
    right_to_wrong: float | None = Field(description="share of the questions that the dense model answers and this does not")
    wrong_to_right: float | None = Field(description="share of the questions that this answers and the dense model does not")
    guesses: list[str] = Field(description="tasks whose accuracy cannot be told from guessing; the empty name is their mean")
    below_chance: list[str] = Field(description="tasks in which it is significantly worse than guessing")
    parts: dict[str, float | None] = Field(description="further numbers, means over seeds")
    prune_seconds: float = Field(description="the whole pruning, without loading and evaluation; mean over seeds")
    peak_bytes: int | None = Field(description="highest memory while pruning, of the GPU where there is one")
    costs_ranked: bool = Field(description="false where costs were measured while others took cores that the run needed")
    sparsity_prunable: float = Field(description="share of zeros in the prunable weights")
    sparsity_total: float = Field(description="the same zeros over all parameters")
    coverage: float = Field(description="share of the blocks' parameters that are in matrices the method pruned")
    extra_parameters: int = Field(description="that the method added")
    ids: list[str] = Field(description="of the runs, one a seed")
    trust: Grade = Field(description="how far its least trusted run was looked at again: reported, checked or replayed")


class ExportedTable(_Frozen):
    """All methods at one target; dense on top, then by value."""

    target: str = Field(description="share of zeros, `keep:of`, or `dense`")
    training: str | None = Field(description="the text that rows were trained on; null where none was")
    training_tokens: int | None = Field(description="how many of it")
    limits: str | None = Field(description="what the table can and cannot show")
    detectable: float | None = Field(
        description="smallest true difference that had an 80% chance to show; of perplexities of their logarithms"
    )
    rows: list[ExportedRow] = Field(description="dense on top, then the best mean first")


class ExportedSection(_Frozen):
    """Tables of one set of conditions, recipe and machine."""

    title: str = Field(description="model, evaluation and data in a line")
    machine: str = Field(description="hardware the runs were on")
    model: str = Field(description="what the model is called")
    evaluation: str = Field(description="`perplexity`, `zero_shot`, ...")
    data: str = Field(description="the data set, or the tasks")
    unit: str = Field(description="of values; `accuracy` is a share")
    higher_is_better: bool = Field(description="of values")
    conditions: dict[str, JsonValue] = Field(description="all that makes two values comparable")
    conditions_fingerprint: str = Field(description="of these; values of another may not be compared")
    recipe: dict[str, JsonValue] | None = Field(description="calibration of the rows that used data")
    recipe_fingerprint: str | None = Field(description="of that")
    dense: float | None = Field(description="the dense model's value")
    silence: str | None = Field(description="why the page shows no tables of it: the dense model cannot do what is asked")
    tuning: bool = Field(description="whether every row is of a suite by which options of others were chosen")
    commands: list[str] = Field(description="that measure the rows again")
    unread: list[str] = Field(description="raw answers that could not be read")
    tables: list[ExportedTable] = Field(description="one a target and training")


class ExportedRun(_Frozen):
    """A run that stands in no table."""

    id: str = Field(description="of the record")
    machine: str = Field(description="hardware it was on")
    model: str = Field(description="what the model is called")
    method: str = Field(description="steps with options")
    target: str = Field(description="share of zeros, `keep:of`, or `dense`")
    seed: int | None = Field(description="null where a method uses neither data nor randomness")
    reason: str = Field(description="why it is in no table")


class ExportedNumber(_Frozen):
    """A number that a paper prints, and what our records say to it."""

    paper: str = Field(description="its name")
    table: str = Field(description="where it stands")
    model: str = Field(description="on the Hub, or as printed")
    method: str = Field(description="as prunebench spells it, or as printed")
    target: str = Field(description="share of zeros, or `keep:of`")
    what: str = Field(description="the task, or the metric")
    printed: str = Field(description="as it stands there")
    value: float | None = Field(description="perplexity, or accuracy in per cent; null where the paper has no number")
    ours: float | None = Field(description="in the same unit, mean over seeds")
    seeds: int = Field(description="how many of ours")
    status: str = Field(description="`reproduced`, `off`, `not run`, `not comparable` or `copy`")
    reason: str | None = Field(description="why it cannot be compared")


class ExportedBoard(_Frozen):
    """The whole board."""

    schema_: int = Field(default=EXPORT_SCHEMA, alias="schema", description="the format of this file")
    sections: list[ExportedSection] = Field(description="by machine and model, what people look for first")
    refused: list[ExportedRun] = Field(description="with the reason of the method")
    failed: list[ExportedRun] = Field(description="with what went wrong")
    outdated: list[ExportedRun] = Field(description="measured with another revision of the method or of an evaluation")
    published: list[ExportedNumber] = Field(description="what papers print")
    costs: list[ExportedCosts] = Field(default_factory=list, description="runs of which only costs are known")

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


def exported(board: Board, published: Sequence[Beside] = ()) -> ExportedBoard:
    """The board as data."""
    return ExportedBoard(
        sections=[_section(section) for section in board.sections],
        refused=[_run(record) for record in board.refused],
        failed=[_run(record) for record in board.failed],
        outdated=[_run(record) for record in board.outdated],
        published=[_number(one) for one in published],
        costs=exported_costs(board.costs),
    )


def to_json(board: Board, published: Sequence[Beside] = ()) -> str:
    """The board as JSON; `ExportedBoard.model_json_schema()` describes it."""
    left_out = None if board.costs else {"costs"}  # a board without any has the bytes that it always had
    data = exported(board, published).model_dump(mode="json", by_alias=True, exclude=left_out)
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _section(section: Section) -> ExportedSection:
    conditions = dict(section.conditions)
    return ExportedSection(
        title=section.title,
        machine=section.machine,
        model=section.model,
        evaluation=str(conditions.get("eval", section.score)),
        data=section.data,
        unit=section.unit,
        higher_is_better=section.higher_is_better,
        conditions=conditions,
        conditions_fingerprint=fingerprint(conditions),
        recipe=None if section.recipe is None else section.recipe.model_dump(mode="json", exclude_none=True),
        recipe_fingerprint=None if section.recipe is None else fingerprint(section.recipe),
        dense=_finite(section.baseline),
        silence=section.silence,
        tuning=section.is_tuning,
        commands=list(section.commands),
        unread=list(section.unread),
        tables=[_table(section, table) for table in section.tables],
    )


def _table(section: Section, table: Table) -> ExportedTable:
    training = table.training and table.training.training
    return ExportedTable(
        target=table.target,
        training=training.label() if training else None,
        training_tokens=table.training.training_tokens if table.training else None,
        limits=table_limits(section, table),
        detectable=_finite(table.detectable),
        rows=[_row(section, row) for row in table.rows],
    )


def _row(section: Section, row: Row) -> ExportedRow:
    return ExportedRow(
        method=row.method,
        pruned=not row.unpruned,
        tuned=row.tuned,
        value=_finite(row.mean),
        values=[_finite(value) for value in row.values],
        standard_deviation=_finite(row.spread),
        seeds=list(row.seeds),
        rank_low=row.rank.first if row.rank else None,
        rank_high=row.rank.last if row.rank else None,
        best=row.rank.best if row.rank else None,
        difference=difference_of(section, row),
        control=_finite(row.control),
        right_to_wrong=row.flipped and row.flipped[0],
        wrong_to_right=row.flipped and row.flipped[1],
        guesses=sorted(row.guesses),
        below_chance=sorted(row.below_chance),
        parts={name: _finite(value) for name, value in row.parts.items()},
        prune_seconds=row.prune_seconds,
        peak_bytes=row.peak_bytes,
        costs_ranked=not row.shared_machine,
        sparsity_prunable=row.sparsity_prunable,
        sparsity_total=row.sparsity_total,
        coverage=row.coverage,
        extra_parameters=row.extra_parameters,
        ids=list(row.ids),
        trust=row.grade,
    )


def difference_of(section: Section, row: Row) -> ExportedDifference | None:
    """A row against dense: of values that are compared by their ratio as a share of dense, of others in their unit."""
    unit = "share of dense" if section.is_ratio else section.unit
    if row.versus is not None:
        values = [row.versus.estimate, *((row.versus.low, row.versus.high) if row.versus.is_known else (math.nan, math.nan))]
        if section.is_ratio:
            values = [math.expm1(min(value, 700.0)) for value in values]
        estimate, low, high = map(_finite, values)
        return ExportedDifference(estimate=estimate, low=low, high=high, unit=unit)
    if row.dense is None or (section.is_ratio and not row.dense):
        return None
    plainly = row.mean / row.dense - 1 if section.is_ratio else row.mean - row.dense
    return ExportedDifference(estimate=_finite(plainly), low=None, high=None, unit=unit)


def _run(record: RunRecord) -> ExportedRun:
    spec = record.spec
    return ExportedRun(
        id=record.id,
        machine=record.machine,
        model=spec.model.name,
        method=spec.method,
        target=spec.target,
        seed=spec.seed,
        reason=reason(record),
    )


def _number(one: Beside) -> ExportedNumber:
    number = one.published
    return ExportedNumber(
        paper=number.paper,
        table=number.table,
        model=number.model or number.model_label,
        method=number.method or number.method_label,
        target=number.target,
        what=number.task or number.metric,
        printed=number.printed,
        value=_finite(number.value),
        ours=_finite(one.ours),
        seeds=one.seeds,
        status=one.status,
        reason=one.reason,
    )


def _finite(value: float | None) -> float | None:
    """The number, or None where it is none or has no end."""
    return value if value is not None and math.isfinite(value) else None

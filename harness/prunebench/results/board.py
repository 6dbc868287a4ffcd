"""From records to boards: which rows may stand in one table.

Rows stand in one table only when their scores were measured under the same conditions, on the same machine, and the prunings
that used data had the same recipe; methods that use no data match any recipe. What was trained on text of its own never stands
beside what was not: it has tables of its own, with the same training of the dense model as a control on top. Several seeds are
one row. Rows are sorted by value and carry no ranks: an order of means is not evidence until a test says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prunebench.results.records import Recipe, RunRecord, ScoreRecord, TextSpec, fingerprint
from prunebench.results.store import Stored

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One method at one target: its seeds together."""

    method: str
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]
    change: float | None
    """Relative change of the mean against dense, or None without a dense run, or where that is zero."""
    control: float | None
    """Relative change of the mean against the dense model after the same training, or None without such a run."""
    tuned: str | None
    """The suite in which options were chosen."""
    extra_parameters: int
    prune_seconds: float
    peak_bytes: int | None
    sparsity_prunable: float
    sparsity_total: float
    coverage: float
    shared_machine: bool
    ids: tuple[str, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, or None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def seeds_shown(self) -> str:
        """How many seeds, or that there is nothing to repeat."""
        return "deterministic" if self.seeds == (None,) else str(len(self.seeds))


@dataclass(frozen=True)
class Table:
    """All methods at one target; dense on top."""

    target: str
    rows: tuple[Row, ...]
    training: Recipe | None = None
    """The recipe of rows that were trained on text; None where none was."""


@dataclass(frozen=True)
class Section:
    """The tables of one set of conditions, recipe and machine."""

    model: str
    machine: str
    score: str
    unit: str
    conditions: Mapping[str, Any]
    recipe: Recipe | None
    suites: tuple[str, ...]
    tables: tuple[Table, ...]

    @property
    def title(self) -> str:
        """Model and evaluation in a line."""
        what = self.conditions.get("eval", self.score)
        return f"{self.model}: {what} on {self.data}, window {self.conditions.get('window', '?')}"

    @property
    def data(self) -> str:
        """The evaluation's data as a record's text source prints it."""
        keys = ("config", "split", "origin", "content")
        text = TextSpec(
            name=str(self.conditions.get("data", "?")),
            complete=bool(self.conditions.get("complete", True)),
            **{key: str(self.conditions.get(key, "")) for key in keys},
        )
        return text.label()


@dataclass(frozen=True)
class Board:
    """All there is to show."""

    sections: tuple[Section, ...]
    failed: tuple[RunRecord, ...]
    refused: tuple[RunRecord, ...]
    outdated: tuple[RunRecord, ...]

    def only(self, text: str) -> Board:
        """The board with those sections whose title contains `text`."""
        return replace(self, sections=tuple(s for s in self.sections if text in s.title))


@dataclass
class _Entry:
    record: RunRecord
    name: str
    score: ScoreRecord


@dataclass
class _Bucket:
    entries: list[_Entry] = field(default_factory=list)


def build_board(stored: Iterable[Stored], revisions: Mapping[str, int] | None = None) -> Board:
    """Group the latest records.

    Args:
        stored: records, as `ResultStore.latest` gives them.
        revisions: the present revisions of pruners; records of another revision are outdated and stand in no table.
    """
    records = [item.record for item in sorted(stored, key=lambda item: item.path)]
    outdated = [r for r in records if _is_outdated(r, revisions or {})]
    present = [r for r in records if r not in outdated]
    buckets: dict[tuple[str, str, str], _Bucket] = {}
    for record in present:
        if record.status == "ok":
            for name, score in record.scores.items():
                measured = {"conditions": dict(score.conditions), "revision": _eval_revision(record, score)}
                key = (record.machine, record.spec.model.name, fingerprint(measured))
                buckets.setdefault(key, _Bucket()).entries.append(_Entry(record, name, score))
    sections = [section for key in sorted(buckets) for section in _sections(buckets[key].entries)]
    by_label = lambda record: (record.machine, record.spec.model.name, record.spec.file_stem)  # noqa: E731
    return Board(
        sections=tuple(sections),
        failed=tuple(sorted((r for r in present if r.status == "failed"), key=by_label)),
        refused=tuple(sorted((r for r in present if r.status == "refused"), key=by_label)),
        outdated=tuple(sorted(outdated, key=by_label)),
    )


def _sections(entries: list[_Entry]) -> list[Section]:
    """One section a calibration recipe; rows of methods without calibration stand in each."""
    recipes: dict[str, Recipe] = {}
    keys = []
    for entry in entries:
        calibration = entry.record.spec.recipe.model_copy(update={"training": None, "training_tokens": None})
        keys.append(fingerprint(calibration) if calibration.calibration else None)
        if keys[-1]:
            recipes[keys[-1]] = calibration
    found = []
    for key in sorted(recipes) or [""]:
        members = [entry for entry, own in zip(entries, keys, strict=True) if own in (None, key)]
        found.append(_section(_latest(members), recipes.get(key)))
    return found


def _latest(entries: list[_Entry]) -> list[_Entry]:
    """One entry a method, target and seed: runs that differ only in what else they measured are one, not two seeds."""
    chosen: dict[tuple[str, str, int | None], _Entry] = {}
    for entry in sorted(entries, key=lambda e: (e.record.provenance.started, e.record.id)):
        chosen[entry.record.spec.method, entry.record.spec.target, entry.record.spec.seed] = entry
    return list(chosen.values())


def _section(entries: list[_Entry], recipe: Recipe | None) -> Section:
    dense = [e for e in entries if e.record.spec.target == DENSE]
    baseline = next((_value(e) for e in dense if e.record.spec.method == DENSE), None)
    trainings: dict[str, Recipe | None] = {_training(e): e.record.spec.recipe if _training(e) else None for e in entries}
    lower_first = not entries[0].score.higher_is_better
    tables = []
    for training in sorted(trainings):
        top = [e for e in dense if e.record.spec.method == DENSE or _training(e) == training]
        controls = {
            e.record.spec.method: [_value(o) for o in top if o.record.spec.method == e.record.spec.method] for e in top
        }
        mine = [e for e in entries if _training(e) == training and e.record.spec.target != DENSE]
        for target in sorted({e.record.spec.target for e in mine}, key=_target_order) or [DENSE]:
            at_target = [e for e in mine if e.record.spec.target == target]
            rows = sorted(
                _rows(at_target, baseline, controls), key=lambda row: (row.mean if lower_first else -row.mean, row.method)
            )
            tables.append(Table(target, (*_rows(top, baseline, {}), *rows), trainings[training]))
    first = entries[0]
    return Section(
        model=first.record.spec.model.name,
        machine=first.record.machine,
        score=first.name,
        unit=first.score.unit,
        conditions=first.score.conditions,
        recipe=recipe,
        suites=tuple(sorted({e.record.provenance.suite for e in entries if e.record.provenance.suite})),
        tables=tuple(tables),
    )


def _value(entry: _Entry) -> float:
    return math.nan if entry.score.value is None else entry.score.value


def _training(entry: _Entry) -> str:
    """The fingerprint of the text that a run was trained on; empty where it was not."""
    recipe = entry.record.spec.recipe
    if recipe.training is None and recipe.training_tokens is None:
        return ""
    return fingerprint(Recipe(training=recipe.training, training_tokens=recipe.training_tokens))


def _rows(entries: list[_Entry], baseline: float | None, controls: Mapping[str, list[float]]) -> list[Row]:
    by_method: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_method.setdefault(entry.record.spec.method, []).append(entry)
    methods = sorted(by_method, key=lambda m: (m != DENSE, m))
    return [_row(method, by_method[method], baseline, controls) for method in methods]


def _row(method: str, entries: list[_Entry], baseline: float | None, controls: Mapping[str, list[float]]) -> Row:
    entries = sorted(entries, key=lambda e: -1 if e.record.spec.seed is None else e.record.spec.seed)
    values = tuple(_value(e) for e in entries)
    audits = [e.record.audit for e in entries if e.record.audit is not None]
    peaks = [e.record.peak_bytes for e in entries if e.record.peak_bytes is not None]
    is_baseline = method == DENSE and entries[0].record.spec.target == DENSE
    mean = statistics.fmean(values)
    # `dense + perp[...]` is the control of `wanda + perp[...]`.
    later = [step.text for step in entries[0].record.spec.steps[1:]]
    control = controls.get(" + ".join([DENSE, *later])) if later else None
    is_control = entries[0].record.spec.target == DENSE
    return Row(
        method=method,
        values=values,
        seeds=tuple(e.record.spec.seed for e in entries),
        change=None if not baseline or is_baseline else mean / baseline - 1,
        control=None if not control or is_control else mean / statistics.fmean(control) - 1,
        tuned=next((e.record.provenance.tuned for e in entries if e.record.provenance.tuned), None),
        extra_parameters=max(e.record.extra_parameters for e in entries),
        prune_seconds=statistics.fmean(e.record.prune_seconds for e in entries),
        peak_bytes=max(peaks, default=None),
        sparsity_prunable=statistics.fmean(a.sparsity_prunable for a in audits) if audits else 0.0,
        sparsity_total=statistics.fmean(a.sparsity_total for a in audits) if audits else 0.0,
        coverage=statistics.fmean(a.coverage for a in audits) if audits else 0.0,
        shared_machine=any(e.record.provenance.shared_machine for e in entries),
        ids=tuple(e.record.id for e in entries),
    )


def _eval_revision(record: RunRecord, score: ScoreRecord) -> int | None:
    return next((spec.revision for spec in record.spec.evals if spec.conditions == score.conditions), None)


def _is_outdated(record: RunRecord, revisions: Mapping[str, int]) -> bool:
    names = [(step.text.partition("[")[0], step.revision) for step in record.spec.steps]
    return any(revisions.get(name, revision) != revision for name, revision in names)


def _target_order(target: str) -> tuple[int, float, str]:
    if ":" in target:
        keep, _, of = target.partition(":")
        return (1, 1 - int(keep) / int(of), f"{int(of):04}")
    return (0, float(target), "")

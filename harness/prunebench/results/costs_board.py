"""From records to tables of costs: runs of which only costs mean anything, or nothing else was asked.

Runs of shapes (random weights) and runs without evaluations have no score, so they stand in no section of the board but here:
a section for each model, machine and calibration, a table for each target, a row for each method, its seeds together. Beside
what was found stand the floors of the record, and what was published of a model of the same sizes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from prunebench.results.content import fingerprint
from prunebench.results.published_costs import PublishedCost
from prunebench.results.records import Recipe, RunRecord, ScoreRecord
from prunebench.results.rows import DENSE, command_of, seed_order

SHOWN = ("statistics", "scoring", "update", "propagation", "training")
"""Phases that have a column; all others are together in one."""

REST = "rest"

LONG = 1000
"""Steps of the training that a shorter one is told for: what PERP takes by default."""

PACE = "seconds a training step"
"""The note of a step that trained."""

LIMITED = "device memory limited to"
"""The note of a step of a run that might not use all there is: it may stream where another does not."""

WITHIN = " (within "
"""Between a method and such a limit."""

QUALITIES = ("perplexity", "divergence", "zero_shot", "generation", "layer_error")
"""Evaluations that come with prunebench and measure no costs."""


@dataclass(frozen=True)
class LongTraining:
    """What a run would have taken with more training steps, by the seconds of one that were measured in it."""

    seconds: float
    """Of the whole run."""
    steps: int
    measured: int
    """Steps by which one was timed, after those of warm-up."""


@dataclass(frozen=True)
class CostRow:
    """One method at one target; means over seeds, the highest of peaks."""

    method: str
    """With the limit that its runs kept to, if they had one: `wanda (within 8 GiB)`."""
    phases: Mapping[str, float]
    """Seconds by phase, those that have no column as `REST`."""
    floors: Mapping[str, float]
    """Seconds by phase that no implementation avoids, where known."""
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    shared_machine: bool
    seeds: tuple[int | None, ...]
    ids: tuple[str, ...]
    longer: LongTraining | None = None
    published: PublishedCost | None = None

    @property
    def seconds(self) -> float:
        """The whole pruning."""
        return sum(self.phases.values())

    @property
    def floor(self) -> float | None:
        """Of all phases that have one."""
        return sum(self.floors.values()) or None

    @property
    def times_floor(self) -> float | None:
        """Found over floor, of the whole."""
        return self.seconds / self.floor if self.floor else None

    @property
    def faster(self) -> float | None:
        """How many times what was published takes as long; a training is compared by its longer self."""
        found = self.longer.seconds if self.longer else self.seconds
        return self.published.seconds / found if self.published and self.published.seconds and found else None


@dataclass(frozen=True)
class CostTable:
    """All methods at one target."""

    target: str
    rows: tuple[CostRow, ...]


@dataclass(frozen=True)
class CostSection:
    """The tables of one model, machine and calibration."""

    model: str
    source: str
    """The shape, as `shape:NAME`, or where the model is from."""
    dtype: str
    machine: str
    device: str
    is_shape: bool
    recipe: Recipe | None
    commands: tuple[str, ...]
    tables: tuple[CostTable, ...]

    @property
    def title(self) -> str:
        """Model, dtype and what was read, in a line."""
        recipe = self.recipe
        read = f", {recipe.samples} x {recipe.length} tokens" if recipe else ""
        return f"Costs of {self.model} in {self.dtype}{read}"

    @property
    def rows(self) -> list[CostRow]:
        """Of all tables."""
        return [row for table in self.tables for row in table.rows]


@dataclass
class _Group:
    records: list[RunRecord] = field(default_factory=list)
    recipes: dict[str, Recipe] = field(default_factory=dict)


def is_cost_only(record: RunRecord) -> bool:
    """Whether a record says what a pruning costs, and nothing of its quality."""
    return record.spec.model.is_shape or not record.spec.evals


def is_quality_of_shape(record: RunRecord, score: ScoreRecord) -> bool:
    """Whether a score is of the quality of random weights, which have none; of a stranger's evaluation it is not known."""
    return record.spec.model.is_shape and score.conditions.get("eval") in QUALITIES


def cost_sections(records: Iterable[RunRecord], published: Sequence[PublishedCost] = ()) -> tuple[CostSection, ...]:
    """The sections of all records that are of costs only.

    Args:
        records: of present revisions.
        published: what others took; it is set beside runs on a GPU, of a shape of the same sizes, with as much calibration.
    """
    groups: dict[tuple[str, ...], _Group] = {}
    for record in records:
        if record.status == "ok" and is_cost_only(record) and record.spec.method != DENSE:
            model = record.spec.model
            group = groups.setdefault((record.machine, model.name, model.source, model.weights, model.dtype), _Group())
            group.records.append(record)
            calibration = record.spec.recipe.of_calibration
            if calibration:
                group.recipes[fingerprint(calibration)] = calibration
    return tuple(section for key in sorted(groups) for section in _sections(groups[key], published))


def _sections(group: _Group, published: Sequence[PublishedCost]) -> list[CostSection]:
    """One a calibration recipe; methods without calibration stand in each."""
    found = []
    for key in sorted(group.recipes) or [""]:
        own = [record for record in group.records if _calibration(record) in ("", key)]
        found.append(_section(own, group.recipes.get(key), published))
    return found


def _calibration(record: RunRecord) -> str:
    calibration = record.spec.recipe.of_calibration
    return fingerprint(calibration) if calibration else ""


def _section(records: Sequence[RunRecord], recipe: Recipe | None, published: Sequence[PublishedCost]) -> CostSection:
    model = records[0].spec.model
    latest = sorted(records, key=lambda record: (record.provenance.started, record.id))
    rows: dict[tuple[str, str], dict[int | None, RunRecord]] = {}
    for record in latest:
        rows.setdefault((record.spec.target, _limited(record)), {})[record.spec.seed] = record
    tables = []
    for target in sorted({target for target, _ in rows}, key=lambda target: (":" in target, target)):
        own = [_row(method, list(seeds.values())) for (at, method), seeds in rows.items() if at == target]
        beside = (replace(row, published=_beside(row, model.source, recipe, published)) for row in own)
        tables.append(CostTable(target, tuple(sorted(beside, key=lambda row: (row.seconds, row.method)))))
    return CostSection(
        model=model.name,
        source=model.source,
        dtype=model.dtype,
        machine=records[0].machine,
        device=latest[-1].provenance.device,
        is_shape=model.is_shape,
        recipe=recipe,
        commands=tuple(sorted({command_of(record) for record in records if record.provenance.suite})),
        tables=tuple(tables),
    )


def _limited(record: RunRecord) -> str:
    """The method, and how much of the device its run might use where that was limited."""
    limit = next((str(step.notes[LIMITED]) for step in record.steps if LIMITED in step.notes), None)
    return record.spec.method if limit is None else f"{record.spec.method}{WITHIN}{limit})"


def _row(method: str, records: Sequence[RunRecord]) -> CostRow:
    records = sorted(records, key=seed_order)
    phases = [_by_column(step.phases for step in record.steps) for record in records]
    floors = [_by_column(step.floors for step in record.steps) for record in records]
    longer = [found for record in records if (found := _longer(record))]
    return CostRow(
        method=method,
        phases=_mean(phases),
        floors=_mean(floors) if all(floors) else {},
        peak_device_bytes=max((s.peak_device_bytes for r in records for s in r.steps if s.peak_device_bytes), default=None),
        peak_host_bytes=max((s.peak_host_bytes for r in records for s in r.steps if s.peak_host_bytes), default=None),
        shared_machine=any(record.provenance.shared_machine for record in records),
        seeds=tuple(record.spec.seed for record in records),
        ids=tuple(record.id for record in records),
        longer=replace(longer[0], seconds=statistics.fmean(one.seconds for one in longer))
        if len(longer) == len(records)
        else None,
    )


def _by_column(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The seconds of all steps by phases that have a column; what is there for others counts for the rest."""
    found: dict[str, float] = {}
    for seconds_of in steps:
        for name, seconds in seconds_of.items():
            shown = name if name in SHOWN else REST
            found[shown] = found.get(shown, 0.0) + seconds
    return found


def _mean(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for each in several for name in each)
    return {name: statistics.fmean(each.get(name, 0.0) for each in several) for name in names}


def _longer(record: RunRecord) -> LongTraining | None:
    """Where the last training was shorter than `LONG` steps, and timed."""
    for step in reversed(record.steps):
        pace = step.notes.get(PACE)
        if not isinstance(pace, dict):
            continue
        steps, after, seconds = (pace.get(name) for name in ("steps", "after", "seconds"))
        if isinstance(steps, int) and isinstance(after, int) and isinstance(seconds, int | float) and after < steps < LONG:
            return LongTraining(record.prune_seconds + (LONG - steps) * float(seconds), LONG, steps - after)
    return None


def _beside(row: CostRow, source: str, recipe: Recipe | None, published: Sequence[PublishedCost]) -> PublishedCost | None:
    """What was published of the method on a model of these sizes; only beside runs on a GPU, with all of its memory."""
    if row.peak_device_bytes is None or WITHIN in row.method:
        return None
    for one in published:
        sizes = source.removeprefix("shape:") in one.setting.shapes and source.startswith("shape:")
        asked = (one.setting.samples, one.setting.length)
        same = asked == (None, None) or (recipe is not None and asked == (recipe.samples, recipe.length))
        if sizes and same and (row.method == one.method or _last(row.method) == one.method == "perp"):
            return one
    return None


def _last(method: str) -> str:
    """The name of the last of several steps."""
    return method.rpartition(" + ")[2].partition("[")[0] if " + " in method else ""

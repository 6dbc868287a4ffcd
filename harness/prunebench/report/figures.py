"""From a board and its records to the data of every picture; `plots.py` and `page.py` only draw.

A figure says what the records say: a band is the interval of the paired difference from dense laid on dense's value, a front
is who is beaten by nobody in both quality and cost. Controls (a dense model after the same training) are shown and stand in no
front. Costs measured on a shared machine are the most that they can have been (`front_of`). What has no value or no cost is in
no picture of it; the tables have it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prunebench.report.marks import COSTS, SPEED_UP, Hollow, Mark, band_of, front_of, hollows_of
from prunebench.report.matrices import Heat, OverlapSquare, heats_of, overlaps_of
from prunebench.report.palette import PHASES
from prunebench.results.beside import Beside, matched
from prunebench.results.board import Board, Section, Table
from prunebench.results.comparison import LoadItems
from prunebench.results.content import fingerprint
from prunebench.results.leaderboard import table_title
from prunebench.results.mask_files import MaskFile
from prunebench.results.records import RunRecord, ScoreRecord
from prunebench.results.rows import DENSE, Row


@dataclass(frozen=True)
class Tradeoff:
    """Quality against a cost, for one table."""

    cost: str
    """One of `COSTS`."""
    marks: tuple[Mark, ...]
    front: tuple[str, ...]
    """Methods that nobody beats in both, from little cost to much."""
    dense: float | None
    published: tuple[Hollow, ...]
    title: str
    """Model, evaluation and target."""
    subtitle: str
    """Recipe and machine."""
    quality: str
    """What the values are, with their unit: `perplexity`, `accuracy %`."""
    higher_is_better: bool
    logarithmic: bool
    """Whether values are compared by their ratio."""


@dataclass(frozen=True)
class Curve:
    """One method's quality over sparsities, its seeds averaged."""

    method: str
    points: tuple[Mark, ...]
    """At unstructured targets, by sparsity."""
    patterns: tuple[Mark, ...]
    """At N:M targets, which stand beside the curve and not on it."""
    training: str | None
    """What it was retrained on, or None."""

    @property
    def trained(self) -> bool:
        """Whether it was retrained on text."""
        return self.training is not None


@dataclass(frozen=True)
class Curves:
    """Quality against sparsity, for one section."""

    title: str
    subtitle: str
    quality: str
    dense: float | None
    logarithmic: bool
    higher_is_better: bool
    curves: tuple[Curve, ...]
    published: tuple[Hollow, ...]


@dataclass(frozen=True)
class PhaseBars:
    """Seconds by phase, one stacked bar a row of a table."""

    title: str
    subtitle: str
    methods: tuple[str, ...]
    phases: Mapping[str, tuple[float, ...]]
    """Seconds, one a method, mean over its seeds; in the order of the work, a stranger's phase before the last."""
    marked: tuple[bool, ...]
    """Which were measured on a shared machine."""
    ids: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class SectionFigures:
    """What there is to draw of a section; nothing where its dense model cannot do what is asked."""

    section: Section
    tradeoffs: tuple[Tradeoff, ...]
    curves: Curves | None
    phases: tuple[PhaseBars, ...]


@dataclass(frozen=True)
class Figures:
    """All there is to draw."""

    sections: tuple[SectionFigures, ...]
    heats: tuple[Heat, ...]
    overlaps: tuple[OverlapSquare, ...]


def figures_of(
    board: Board,
    records: Sequence[RunRecord],
    placed: Sequence[Beside],
    masks: Callable[[RunRecord], MaskFile | None],
    load: LoadItems = lambda _, score: score.items,
) -> Figures:
    """The data of all figures.

    Args:
        board: perhaps only some of its sections; matrices are drawn of the runs that stand in those.
        records: those the board was made of.
        placed: published numbers with what our records say to them.
        masks: gives a run's keep masks, `ResultStore.masks`; None where they are not kept.
        load: gives raw answers, `ResultStore.items`.
    """
    matching = matched(placed)
    by_run = {(record.machine, record.id): record for record in records}
    shown = [by_run[key] for key in dict.fromkeys(_runs(board)) if key in by_run]
    return Figures(
        sections=tuple(_Drawer(section, by_run, matching).figures() for section in board.sections),
        heats=tuple(heats_of(shown, masks, load)),
        overlaps=tuple(overlaps_of(shown, masks)),
    )


class _Drawer:
    """Makes the figures of one section."""

    def __init__(self, section: Section, by_run: Mapping[tuple[str, str], RunRecord], matching: Sequence[Beside]) -> None:
        self._section, self._runs, self._matching = section, by_run, matching
        self._measured = fingerprint(dict(section.conditions))
        scores = [
            score
            for table in section.tables
            for row in table.rows
            for run in self._of(row)
            for score in self._own(run).values()
        ]
        self._higher = scores[0].higher_is_better if scores else section.is_share
        self._scale = 100.0 if section.is_share else 1.0
        self._dense = None if section.baseline is None else self._scale * section.baseline
        self._quality = f"{section.unit} %" if section.is_share else section.unit

    def figures(self) -> SectionFigures:
        """All of them."""
        section = self._section
        if section.silence:
            return SectionFigures(section, (), None, ())
        marks = [self._marks(table) for table in section.tables]
        hollows = [self._hollows(table) for table in section.tables]
        tables = list(zip(section.tables, marks, hollows, strict=True))
        tradeoffs = [self._tradeoff(*table, cost) for table in tables for cost in COSTS]
        bars = [self._bars(table) for table in section.tables] if section.shows_costs else []
        return SectionFigures(
            section=section,
            tradeoffs=tuple(one for one in tradeoffs if one.marks),
            curves=self._curves(tables),
            phases=tuple(one for one in bars if one.phases),
        )

    def _of(self, row: Row) -> list[RunRecord]:
        keys = [(self._section.machine, run_id) for run_id in row.ids]
        return [self._runs[key] for key in keys if key in self._runs]

    def _own(self, record: RunRecord) -> dict[str, ScoreRecord]:
        """Those of a record's scores that are this section's."""
        named = record.scores.items()
        return {name: score for name, score in named if fingerprint(dict(score.conditions)) == self._measured}

    def _hollows(self, table: Table) -> tuple[Hollow, ...]:
        if not self._matching:
            return ()
        runs = [run.model_copy(update={"scores": self._own(run)}) for row in table.rows for run in self._of(row)]
        return hollows_of(self._section, runs, self._matching)

    @property
    def _subtitle(self) -> str:
        recipe = self._section.recipe
        told = f"machine {self._section.machine}"
        if recipe is None or recipe.calibration is None:
            return told
        return f"calibration {recipe.samples} x {recipe.length} tokens of {recipe.calibration.label()}; {told}"

    def _marks(self, table: Table) -> tuple[Mark, ...]:
        """The rows that have a value, without the dense model itself."""
        return tuple(self._mark(table, row) for row in table.rows if row.method != DENSE and math.isfinite(row.mean))

    def _mark(self, table: Table, row: Row) -> Mark:
        runs = self._of(row)
        told = () if self._section.unit == SPEED_UP else runs  # against itself it says nothing
        speeds = [s.value for run in told for s in run.scores.values() if s.unit == SPEED_UP and s.value is not None]
        low, high = band_of(row, self._section.is_ratio)
        return Mark(
            method=row.method,
            target=runs[0].spec.target if runs else table.target,
            ids=row.ids,
            value=self._scale * row.mean,
            low=self._scale * low,
            high=self._scale * high,
            prune_seconds=row.prune_seconds,
            peak_bytes=row.peak_bytes,
            shared_machine=row.shared_machine,
            speedup=statistics.fmean(speeds) if speeds else None,
            trained=table.training is not None,
            rank="" if row.rank is None else str(row.rank),
            seeds=row.seeds_shown,
        )

    def _tradeoff(self, table: Table, marks: Sequence[Mark], hollows: tuple[Hollow, ...], cost: str) -> Tradeoff:
        paid = tuple(mark for mark in marks if mark.cost(cost) is not None)
        return Tradeoff(
            cost=cost,
            marks=paid,
            front=front_of(paid, cost, self._higher),
            dense=self._dense,
            published=hollows,
            title=f"{self._section.title}, {table_title(table)}",
            subtitle=self._subtitle,
            quality=self._quality,
            higher_is_better=self._higher,
            logarithmic=self._section.is_ratio,
        )

    def _curves(self, tables: Sequence[tuple[Table, tuple[Mark, ...], tuple[Hollow, ...]]]) -> Curves | None:
        """Where some method was measured at two unstructured targets or more; without controls."""
        found: dict[tuple[str, str | None], list[Mark]] = {}
        for table, marks, _ in tables:
            for mark in marks:
                if not mark.is_control:
                    found.setdefault((mark.method, trained_on(table)), []).append(mark)
        curves = []
        for (method, training), own in found.items():
            own.sort(key=lambda mark: (mark.sparsity, mark.target))
            points, patterns = (tuple(mark for mark in own if (":" in mark.target) is apart) for apart in (False, True))
            curves.append(Curve(method, points, patterns, training))
        if max((len(curve.points) for curve in curves), default=0) < 2:
            return None
        return Curves(
            title=self._section.title,
            subtitle=self._subtitle,
            quality=self._quality,
            dense=self._dense,
            logarithmic=self._section.is_ratio,
            higher_is_better=self._higher,
            curves=tuple(sorted(curves, key=lambda curve: (curve.trained, curve.method, curve.training or ""))),
            published=tuple(dict.fromkeys(hollow for _, _, several in tables for hollow in several)),
        )

    def _bars(self, table: Table) -> PhaseBars:
        rows = [(row, self._of(row)) for row in table.rows if row.method != DENSE]
        rows = [(row, records) for row, records in rows if any(record.steps for record in records)]
        spent = [_phases(records) for _, records in rows]
        *known, last = PHASES
        own = sorted({name for seconds in spent for name in seconds} - {*PHASES})
        names = [name for name in (*known, *own, last) if any(seconds.get(name) for seconds in spent)]
        return PhaseBars(
            title=f"{self._section.title}, {table_title(table)}",
            subtitle=self._subtitle,
            methods=tuple(row.method for row, _ in rows),
            phases={name: tuple(seconds.get(name, 0.0) for seconds in spent) for name in names},
            marked=tuple(row.shared_machine for row, _ in rows),
            ids=tuple(row.ids for row, _ in rows),
        )


def trained_on(table: Table) -> str | None:
    """What a table's rows were retrained on, in a few words."""
    if table.training is None:
        return None
    text = table.training.training.label() if table.training.training else "text"
    return text if table.training.training_tokens is None else f"{text}, {table.training.training_tokens:,} tokens"


def _phases(records: Sequence[RunRecord]) -> dict[str, float]:
    """Seconds by phase of all steps, mean over runs."""
    spent: dict[str, float] = {}
    for record in records:
        for step in record.steps:
            for name, seconds in step.phases.items():
                spent[name] = spent.get(name, 0.0) + seconds / len(records)
    return spent


def _runs(board: Board) -> Iterator[tuple[str, str]]:
    """Machine and id of every run that stands in a table."""
    for section in board.sections:
        for table in section.tables:
            for row in table.rows:
                yield from ((section.machine, run_id) for run_id in row.ids)

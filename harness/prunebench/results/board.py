"""From records to boards: which rows may stand in one table.

Rows stand in one table only when their scores were measured under the same conditions, on the same machine, and the prunings
that used data had the same recipe; methods that use no data match any recipe. What was trained on text of its own never stands
beside what was not: it has tables of its own, with the same training of the dense model as a control on top. Several seeds are
one row. Ranks are intervals and rest on paired tests (`rows.py`); where these cannot be made there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prunebench.results.comparison import LoadItems, Measured
from prunebench.results.content import fingerprint
from prunebench.results.costs_board import CostSection, cost_sections, is_quality_of_shape
from prunebench.results.published_costs import PublishedCost
from prunebench.results.records import Recipe, RunRecord, SampleRecord, TextSpec
from prunebench.results.rows import DENSE, Row, RowBuilder, command_of, value_of
from prunebench.results.store import Stored
from prunebench.results.verdicts import Grade, lowest

OWN_PACKAGE = "prunebench"
"""The distribution of the built-in methods."""

KINDS = ("perplexity", "zero_shot", "divergence", "generation")
"""Evaluations in the order in which people look for them; others follow."""


@dataclass(frozen=True)
class Table:
    """All methods at one target; dense on top."""

    target: str
    rows: tuple[Row, ...]
    training: Recipe | None = None
    """The recipe of rows that were trained on text; None where none was."""
    detectable: float | None = None
    """The smallest true difference of two rows that would have shown with 80% power, median over pairs; None without ranks."""


@dataclass(frozen=True)
class Section:
    """The tables of one set of conditions, recipe and machine."""

    model: str
    machine: str
    score: str
    unit: str
    is_share: bool
    """Whether values are shares, shown as percentages."""
    is_ratio: bool
    """Whether values are compared by their ratio, as perplexities are."""
    conditions: Mapping[str, Any]
    sample: SampleRecord | None
    recipe: Recipe | None
    baseline: float | None
    """The dense model's value."""
    commands: tuple[str, ...]
    """By which the rows were measured: shipped suites, or files, with the models and methods that stood in for theirs."""
    strangers: tuple[str, ...]
    """Methods that come with other packages, and which these are."""
    tables: tuple[Table, ...]
    unread: tuple[str, ...] = ()
    """Raw answers that could not be read, and why."""
    higher_is_better: bool = False
    is_tuning: bool = False
    """Whether every row comes of a suite by which options of others were chosen: a means, and no result."""

    @property
    def title(self) -> str:
        """Model and evaluation in a line."""
        window = f", window {self.conditions['window']}" if "window" in self.conditions else ""
        return f"{self.model}: {self.conditions.get('eval', self.score)} on {self.data}{window}"

    @property
    def asks_questions(self) -> bool:
        """Whether items are questions, whose answers can flip."""
        return self.sample is not None and self.sample.strata is not None

    @property
    def shows_costs(self) -> bool:
        """Costs stand in the tables of perplexities; the same runs' other scores would only repeat them."""
        return self.sample is None or self.is_ratio

    @property
    def shows_trust(self) -> bool:
        """Whether somebody looked at any of it again."""
        return any(row.grade != "reported" for table in self.tables for row in table.rows)

    @property
    def parts(self) -> list[str]:
        """Further numbers that rows have, without one that is the value again in every row."""
        rows = [row for table in self.tables for row in table.rows]
        names = dict.fromkeys(part for row in rows for part in row.parts)
        return [name for name in names if any(row.parts.get(name, row.mean) != row.mean for row in rows)]

    @property
    def silence(self) -> str | None:
        """Why the tables are left out: the dense model cannot do what is asked."""
        least, dense = self.conditions.get("least_of_dense"), self.baseline
        if least is None or dense is None or dense >= least:
            return None
        return f"The dense model gets {dense:.1%} right, less than {least:.0%}: what pruning changes there cannot be seen."

    @property
    def data(self) -> str:
        """The evaluation's data as a record's text source prints it, or the names of its tasks."""
        if isinstance(self.conditions.get("tasks"), dict):
            return str(self.conditions.get("set") or ", ".join(self.conditions["tasks"]))
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
    costs: tuple[CostSection, ...] = ()
    """Runs of which only costs are known."""

    @property
    def titles(self) -> list[str]:
        """Of all sections."""
        return [*(section.title for section in self.sections), *(section.title for section in self.costs)]

    def only(self, text: str) -> Board:
        """The board with those sections whose title contains `text`."""
        costs = tuple(section for section in self.costs if text in section.title)
        return replace(self, sections=tuple(s for s in self.sections if text in s.title), costs=costs)

    def present(self, records: Iterable[RunRecord]) -> list[RunRecord]:
        """Those of present revisions."""
        old = {record.id for record in self.outdated}
        return [record for record in records if record.id not in old]


def build_board(
    stored: Iterable[Stored],
    revisions: Mapping[str, int] | None = None,
    load: LoadItems = lambda _, score: score.items,
    grade: Callable[[RunRecord], Grade] = lambda _: "reported",
    published: Sequence[PublishedCost] = (),
) -> Board:
    """Group the latest records.

    Args:
        stored: records, as `ResultStore.latest` gives them.
        revisions: the present revisions of pruners by name and of evaluations by `eval NAME`; records of another revision are
            outdated and stand in no table.
        load: gives raw answers, `ResultStore.items`; without it those that are in the records.
        grade: says how far a record may be trusted, `Verdicts.grade`; without it nobody looked at any again.
        published: what prunings cost elsewhere, to stand beside ours.
    """
    records = [item.record for item in sorted(stored, key=lambda item: item.path)]
    outdated = [r for r in records if is_outdated(r, revisions or {})]
    present = [r for r in records if r not in outdated]
    buckets: dict[tuple[str, str, str], list[Measured]] = {}
    for record in present:
        if record.status == "ok":
            for name, score in record.scores.items():
                if is_quality_of_shape(record, score):
                    continue
                measured = Measured(record, name, score)
                key = (record.machine, record.spec.model.name, measured.measurement)
                buckets.setdefault(key, []).append(measured)
    tuning = {record.provenance.tuned for record in records if record.provenance.tuned}
    sections = [section for key in sorted(buckets) for section in _sections(buckets[key], load, tuning)]
    by_label = lambda record: (record.machine, record.spec.model.name, record.spec.file_stem)  # noqa: E731
    return Board(
        sections=tuple(_in_order(_graded(section, present, grade) for section in sections)),
        failed=tuple(sorted((r for r in present if r.status == "failed"), key=by_label)),
        refused=tuple(sorted((r for r in present if r.status == "refused"), key=by_label)),
        outdated=tuple(sorted(outdated, key=by_label)),
        costs=cost_sections(present, published),
    )


def _graded(section: Section, records: Sequence[RunRecord], grade: Callable[[RunRecord], Grade]) -> Section:
    """The section with each row's grade: that of its least trusted record."""
    known = {record.id: record for record in records if record.machine == section.machine}
    tables = (
        replace(table, rows=tuple(replace(row, grade=lowest(grade(known[each]) for each in row.ids)) for row in table.rows))
        for table in section.tables
    )
    return replace(section, tables=tuple(tables))


def _in_order(sections: Iterable[Section]) -> list[Section]:
    """By machine and model; what people look for first, with the most rows first, and what was only a means last."""
    listed = list(sections)
    rows = {id(section): sum(len(table.rows) for table in section.tables) for section in listed}
    together: Counter[tuple[str, str, str]] = Counter()
    for section in listed:
        together[section.machine, section.model, section.title] += rows[id(section)]

    def key(section: Section) -> tuple[Any, ...]:
        kind = section.conditions.get("eval")
        of_title = -together[section.machine, section.model, section.title]
        interest = (section.is_tuning, section.silence is not None, KINDS.index(kind) if kind in KINDS else len(KINDS))
        return (section.machine, section.model, *interest, of_title, section.title, -rows[id(section)])

    return sorted(listed, key=key)


def _sections(entries: list[Measured], load: LoadItems, tuning: Collection[str]) -> list[Section]:
    """One section a calibration recipe; rows of methods without calibration stand in each."""
    recipes: dict[str, Recipe] = {}
    keys = []
    for entry in entries:
        calibration = entry.record.spec.recipe.of_calibration
        keys.append(fingerprint(calibration) if calibration else None)
        if calibration:
            recipes[fingerprint(calibration)] = calibration
    found = []
    for key in sorted(recipes) or [""]:
        members = [entry for entry, own in zip(entries, keys, strict=True) if own in (None, key)]
        found.append(_section(_latest(members), recipes.get(key), load, tuning))
    return found


def _latest(entries: list[Measured]) -> list[Measured]:
    """One entry a method, training, target and seed: runs that differ only in what else they measured are one, not two."""
    chosen: dict[tuple[str, str, str, int | None], Measured] = {}
    for entry in sorted(entries, key=lambda e: (e.record.provenance.started, e.record.id)):
        spec = entry.record.spec
        chosen[spec.method, _training(entry), spec.target, spec.seed] = entry
    return list(chosen.values())


def _section(entries: list[Measured], recipe: Recipe | None, load: LoadItems, tuning: Collection[str]) -> Section:
    dense = [e for e in entries if e.record.spec.target == DENSE]
    builder = RowBuilder(dense, load)
    trainings: dict[str, Recipe | None] = {_training(e): e.record.spec.recipe if _training(e) else None for e in entries}
    higher = entries[0].score.higher_is_better
    tables = []
    for training in sorted(trainings):
        top = [e for e in dense if e.record.spec.method == DENSE or _training(e) == training]
        controls: dict[str, list[float]] = {}
        for entry in top:
            controls.setdefault(entry.record.spec.method, []).append(value_of(entry))
        mine = [e for e in entries if _training(e) == training and e.record.spec.target != DENSE]
        for target in sorted({e.record.spec.target for e in mine}, key=_target_order) or [DENSE]:
            at_target = [e for e in mine if e.record.spec.target == target]
            rows, detectable = builder.ranked(builder.rows(at_target, controls), higher)
            rows.sort(key=lambda row: (-row.mean if higher else row.mean, row.method))
            tables.append(Table(target, (*builder.rows(top, {}), *rows), trainings[training], detectable))
    first = entries[0]
    return Section(
        model=first.record.spec.model.name,
        machine=first.record.machine,
        score=first.name,
        unit=first.score.unit,
        is_share=first.score.is_share,
        is_ratio=first.score.is_ratio,
        conditions=first.score.conditions,
        sample=first.score.sample,
        recipe=recipe,
        baseline=builder.baseline,
        commands=tuple(sorted({command_of(e.record) for e in entries if e.record.provenance.suite})),
        strangers=tuple(sorted({name for e in entries for name in _strangers(e.record)})),
        tables=tuple(tables),
        unread=tuple(dict.fromkeys(builder.unread)),
        higher_is_better=higher,
        is_tuning=all(e.record.provenance.suite in tuning for e in entries),
    )


def _strangers(record: RunRecord) -> list[str]:
    return [f"{s.pruner} ({s.distribution} {s.version})" for s in record.steps if s.distribution != OWN_PACKAGE]


def _training(entry: Measured) -> str:
    """The fingerprint of the text that a run was trained on; empty where it was not."""
    recipe = entry.record.spec.recipe
    if recipe.training is None and recipe.training_tokens is None:
        return ""
    return fingerprint(Recipe(training=recipe.training, training_tokens=recipe.training_tokens))


def is_outdated(record: RunRecord, revisions: Mapping[str, int]) -> bool:
    """Whether a record is of another revision of its method or of an evaluation than the present; see `build_board`."""
    names = [(step.text.partition("[")[0], step.revision) for step in record.spec.steps]
    names += [(f"eval {spec.conditions.get('eval')}", spec.revision) for spec in record.spec.evals]
    return any(revisions.get(name, revision) != revision for name, revision in names)


def _target_order(target: str) -> tuple[int, float, str]:
    if ":" in target:
        keep, _, of = target.partition(":")
        return (1, 1 - int(keep) / int(of), f"{int(of):04}")
    return (0, float(target), "")

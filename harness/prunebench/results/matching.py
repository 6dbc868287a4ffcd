"""The rows of a results folder by content, and the partner of each in another folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prunebench.results.changes import Label
from prunebench.results.comparison import LoadItems, Measured
from prunebench.results.content import fingerprint
from prunebench.results.records import RunRecord

Key = tuple[str, ...]
Seed = int | None


@dataclass(frozen=True)
class Folder:
    """The runs of a folder, and where their raw answers are."""

    records: Sequence[RunRecord]
    """The latest of each machine and id, `ResultStore.latest`."""
    load: LoadItems


@dataclass
class Score:
    """One measurement of a row: what each seed gave."""

    name: str
    measured: dict[Seed, Measured] = field(default_factory=dict)
    without: dict[Seed, RunRecord] = field(default_factory=dict)
    """Runs that failed or were refused."""
    revision: int = 0
    """Of the evaluation."""

    @property
    def runs(self) -> list[Measured] | list[RunRecord]:
        """Those that measured it, or else those that should have."""
        return list(self.measured.values()) or list(self.without.values())


NOTHING = Score("")
"""What a row has of an evaluation that it was not asked."""


@dataclass
class RowRuns:
    """A method at a target on one machine, its seeds together."""

    records: list[RunRecord]
    """Of one revision, in the order in which they began."""
    scores: dict[str, Score] = field(default_factory=dict)
    """By the fingerprint of their conditions."""

    @property
    def machine(self) -> str:
        """Where it was run."""
        return self.records[0].machine

    @property
    def label(self) -> Label:
        """As a person reads it."""
        spec = self.records[-1].spec
        return Label(spec.model.name, spec.method, spec.target, spec.model.weights, spec.model.dtype, fingerprint(spec.recipe))


def rows_of(records: Iterable[RunRecord]) -> dict[Key, dict[str, RowRuns]]:
    """Rows by content, and by machine."""
    groups: dict[tuple[Key, str], dict[tuple[int, ...], list[RunRecord]]] = {}
    for record in sorted(records, key=lambda record: (record.provenance.started, record.id)):
        spec = record.spec
        model = spec.model
        key: Key = (model.weights, model.tokenizer, model.dtype, spec.method, spec.target, fingerprint(spec.recipe))
        revisions = tuple(step.revision for step in spec.steps)
        groups.setdefault((key, record.machine), {}).setdefault(revisions, []).append(record)
    found: dict[Key, dict[str, RowRuns]] = {}
    for (key, machine), by_revision in groups.items():
        row = found.setdefault(key, {})[machine] = RowRuns(by_revision[max(by_revision)])
        for record in row.records:
            _add(row, record)
    return found


def _add(row: RowRuns, record: RunRecord) -> None:
    """What a run was asked, with what it gave; of an evaluation the highest revision, of a seed the latest score."""
    given = {fingerprint(dict(score.conditions)): (name, score) for name, score in record.scores.items()}
    for asked in record.spec.evals:
        key = fingerprint(dict(asked.conditions))
        score = row.scores.setdefault(key, Score(asked.text))
        if asked.revision < score.revision:
            continue
        if asked.revision > score.revision:
            score.measured, score.without, score.revision = {}, {}, asked.revision
        if record.status != "ok":
            score.without[record.spec.seed] = record
        elif key in given:
            score.name = given[key][0]
            score.measured[record.spec.seed] = Measured(record, *given[key])


def partners(mine: Mapping[str, RowRuns], theirs: Mapping[str, RowRuns]) -> Iterator[tuple[RowRuns | None, RowRuns | None]]:
    """Rows of one content: those of one machine, then the others in the order of their machines' names."""
    for machine in sorted(mine.keys() & theirs.keys()):
        yield mine[machine], theirs[machine]
    left = [mine[machine] for machine in sorted(mine.keys() - theirs.keys())]
    right = [theirs[machine] for machine in sorted(theirs.keys() - mine.keys())]
    yield from zip(left, right, strict=False)
    yield from ((row, None) for row in left[len(right) :])
    yield from ((None, row) for row in right[len(left) :])

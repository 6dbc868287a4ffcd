"""`prunebench compare`: two rows, score by score, with everything that can be said of their difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prunebench.results.comparison import Answers, Comparison, LoadItems, Measured, compare
from prunebench.results.content import fingerprint
from prunebench.results.ranks import holm
from prunebench.results.records import RunRecord, ScoreRecord
from prunebench.results.rows import by_seed, seed_order


@dataclass(frozen=True)
class Contest:
    """One score of two rows measured under the same conditions."""

    name: str
    first: tuple[float | None, ...]
    """Values by seed."""
    second: tuple[float | None, ...]
    score: ScoreRecord
    """Of the first run: its unit and direction."""
    comparison: Comparison | None
    """None where the rows were not asked the same items, share no seed, or keep no items."""
    corrected: float | None = None
    """The p-value after Holm's correction over all scores compared here."""


def row_of(record: RunRecord, records: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs that stand in one row with a run: all seeds of its method, target, recipe and model on its machine, and of a
    seed every run, since one may have measured what another did not."""
    key = row_key(record)
    found = [other for other in records if other.status == "ok" and row_key(other) == key]
    return sorted(found, key=seed_order)


def contests(first: Sequence[RunRecord], second: Sequence[RunRecord], load: LoadItems) -> list[Contest]:
    """The scores that two rows share, compared."""
    mine, theirs = _scores(first), _scores(second)
    found = []
    for key, row in mine.items():
        if key not in theirs:
            continue
        answers = [Answers.of(each, load) for each in (row, theirs[key])]
        comparison = compare(answers[0], answers[1]) if answers[0] and answers[1] else None
        values = [tuple(measured.score.value for measured in each) for each in (row, theirs[key])]
        found.append(Contest(row[0].name, values[0], values[1], row[0].score, comparison))
    corrected = iter(holm([contest.comparison.new_items.p_value for contest in found if contest.comparison is not None]))
    return [contest if contest.comparison is None else replace(contest, corrected=next(corrected)) for contest in found]


def _scores(row: Sequence[RunRecord]) -> dict[str, list[Measured]]:
    """A row's scores by their conditions: of each seed that was measured so the latest."""
    found: dict[str, dict[int | None, Measured]] = {}
    for record in sorted(row, key=lambda record: (record.provenance.started, record.id)):
        for name, score in record.scores.items():
            measured = Measured(record, name, score)
            found.setdefault(measured.measurement, {})[record.spec.seed] = measured
    return {key: by_seed(list(seeds.values())) for key, seeds in found.items()}


def row_key(record: RunRecord) -> tuple[str, ...]:
    """What the runs of a row have in common; only their seeds differ."""
    spec = record.spec
    revisions = ", ".join(str(step.revision) for step in spec.steps)
    return (record.machine, spec.model.weights, spec.model.dtype, spec.method, revisions, spec.target, fingerprint(spec.recipe))

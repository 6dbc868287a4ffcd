"""`prunebench compare`: two rows, score by score, with everything that can be said of their difference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from prunebench.results.comparison import Answers, Comparison, LoadItems, Measured, compare
from prunebench.results.ranks import holm
from prunebench.results.records import RunRecord, ScoreRecord, eval_revision, fingerprint
from prunebench.results.rows import by_seed


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
    """The runs that stand in one row with a run: all seeds of its method, target, recipe and model on its machine."""
    key = row_key(record)
    found = {other.spec.seed: other for other in records if other.status == "ok" and row_key(other) == key}
    return [found[seed] for seed in sorted(found, key=lambda seed: -1 if seed is None else seed)]


def contests(first: Sequence[RunRecord], second: Sequence[RunRecord], load: LoadItems) -> list[Contest]:
    """The scores that two rows share, compared."""
    mine, theirs = _scores(first), _scores(second)
    found = []
    for key, row in mine.items():
        if key not in theirs:
            continue
        answers = [Answers.of(by_seed(each), load) for each in (row, theirs[key])]
        comparison = compare(answers[0], answers[1]) if answers[0] and answers[1] else None
        values = [tuple(measured.score.value for measured in by_seed(each)) for each in (row, theirs[key])]
        found.append(Contest(row[0].name, values[0], values[1], row[0].score, comparison))
    tested = [contest for contest in found if contest.comparison is not None]
    p_values = holm([contest.comparison.new_items.p_value for contest in tested if contest.comparison is not None])
    corrected = {contest.name: p_value for contest, p_value in zip(tested, p_values, strict=True)}
    return [replace(contest, corrected=corrected.get(contest.name)) for contest in found]


def _scores(row: Sequence[RunRecord]) -> dict[str, list[Measured]]:
    """A row's scores by their conditions; those that not every run has are left out."""
    found: dict[str, list[Measured]] = {}
    for record in row:
        for name, score in record.scores.items():
            key = fingerprint({"conditions": dict(score.conditions), "revision": eval_revision(record, score)})
            found.setdefault(key, []).append(Measured(record, name, score))
    return {key: measured for key, measured in found.items() if len(measured) == len(row)}


def row_key(record: RunRecord) -> tuple[str, ...]:
    """What the runs of a row have in common; only their seeds differ."""
    spec = record.spec
    recipe = fingerprint(spec.recipe)
    return (record.machine, spec.model.weights, spec.model.dtype, spec.method, spec.target, recipe)

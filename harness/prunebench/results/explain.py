"""Why two scores may or may not be compared, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prunebench.results.comparison import Measured
from prunebench.results.content import fingerprint
from prunebench.results.records import RunRecord, eval_revision

ELSEWHERE = ("origin", "complete")
"""Where a text came from; equal content is what counts."""


@dataclass(frozen=True)
class Point:
    """One field in which two scores differ."""

    field: str
    first: str
    second: str
    consequence: str | None
    """Why they may not be ranked together; None where the field does not matter for that."""


@dataclass(frozen=True)
class Explanation:
    """Two scores of one evaluation."""

    first: str
    """What the score is called in the first record."""
    second: str
    points: tuple[Point, ...]

    @property
    def comparable(self) -> bool:
        """Whether the two may be ranked together."""
        return all(point.consequence is None for point in self.points)


def explain(first: RunRecord, second: RunRecord) -> list[Explanation]:
    """Each score of the first record beside the nearest of the second that the same evaluation gave."""
    found = []
    for name, score in first.scores.items():
        mine = Measured(first, name, score)
        others = [
            Measured(second, other, theirs)
            for other, theirs in second.scores.items()
            if theirs.conditions.get("eval", other) == score.conditions.get("eval", name)
        ]
        explained = [Explanation(name, other.name, tuple(_points(mine, other))) for other in others]
        if explained:
            found.append(min(explained, key=lambda one: len(one.points)))
    return found


def _points(first: Measured, second: Measured) -> Iterator[Point]:
    mine, theirs = first.record, second.record
    yield from _differing(
        "conditions", first.score.conditions, second.score.conditions, "the values were measured under other conditions"
    )
    revisions = eval_revision(mine, first.score), eval_revision(theirs, second.score)
    if revisions[0] != revisions[1]:
        yield Point("revision", str(revisions[0]), str(revisions[1]), "the evaluation was changed in between")
    given = [record.spec.recipe.of_calibration for record in (mine, theirs)]
    if given[0] and given[1]:
        dumped = [recipe.model_dump(mode="json") for recipe in given if recipe]
        yield from _differing("recipe", dumped[0], dumped[1], "the methods were given other calibration text")
    trained = [_training(record) for record in (mine, theirs)]
    if trained[0] != trained[1]:
        why = "retrained and calibration-only rows are ranked apart, and so are rows trained on other text"
        yield Point("training", trained[0] or "none", trained[1] or "none", why)
    if mine.spec.target != theirs.spec.target:
        yield Point("target", mine.spec.target, theirs.spec.target, "each target has a table of its own")
    if mine.machine != theirs.machine:
        yield Point("machine", mine.machine, theirs.machine, "a table has one machine's costs")
    if mine.spec.method != theirs.spec.method:
        yield Point("method", mine.spec.method, theirs.spec.method, None)
    seeds = ["none" if record.spec.seed is None else str(record.spec.seed) for record in (mine, theirs)]
    if seeds[0] != seeds[1]:
        yield Point("seed", seeds[0], seeds[1], None)


def _training(record: RunRecord) -> str | None:
    recipe = record.spec.recipe
    if recipe.training is None:
        return None
    return f"{recipe.training_tokens:,} tokens of {recipe.training.label()} ({fingerprint(recipe.training)})"


def _differing(place: str, first: Mapping[str, Any], second: Mapping[str, Any], why: str) -> Iterator[Point]:
    """Fields that differ, those inside others by their path."""
    for name in dict.fromkeys([*first, *second]):
        mine, theirs = first.get(name), second.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
            mine, theirs = ({str(number): value for number, value in enumerate(values)} for values in (mine, theirs))
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from _differing(f"{place}.{name}", mine, theirs, why)
        else:
            shown = ["absent" if value is None else _short(value) for value in (mine, theirs)]
            yield Point(f"{place}.{name}", shown[0], shown[1], None if name in ELSEWHERE else why)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Two folders of results, before and after a change, or ours and a contributor's: what became of each row.

Rows are matched by content: weights, tokenizer, dtype, method with its options, target, what it was given (calibration and
training text), and the conditions of the evaluation. Ids also hash revisions; where only these differ the rows are one, and the
change of revision is told. Of several revisions in one folder the highest counts. A row on the same machine is preferred.

Beyond noise is what the same items and the same seeds say: the paired difference of the raw answers (`comparison.py`), after
Holm's correction at 5% over all rows whose answers differ. Answers that are equal bit for bit are no test, so they cost none of
the power. A run that had a score and is now failed or refused has worsened.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from prunebench.errors import StoreError
from prunebench.results.changes import (
    COST_FACTOR,
    LEAST_SECONDS,
    OUTCOMES,
    Change,
    Changes,
    CostChange,
    Outcome,
    Side,
    told_apart,
)
from prunebench.results.comparison import Answers, LoadItems, Measured, compare
from prunebench.results.matching import NOTHING, Folder, RowRuns, Score, Seed, partners, rows_of
from prunebench.results.ranks import holm
from prunebench.results.records import RunRecord
from prunebench.results.rows import by_seed
from prunebench.results.statistics import Difference

MOST_EXPONENT = 700.0
"""Of a logarithm whose exponential is a number."""

ERROR = 0.05
"""The probability that anything at all is told to have changed where nothing did."""


def changes(before: Folder, after: Folder, least: float = 0.0) -> Changes:
    """What became of each row, the worst first.

    Args:
        before: a folder's runs.
        after: another's, or the same folder's later.
        least: per cent of a value, or points of a share, below which a change counts as noise however certain it is.

    Whoever has nothing in common has only rows that vanished and rows that appeared.
    """
    mine, theirs = rows_of(before.records), rows_of(after.records)
    found: list[Change] = []
    costs: list[CostChange] = []
    for key in sorted({*mine, *theirs}):
        for first, second in partners(mine.get(key, {}), theirs.get(key, {})):
            if first is None or second is None:
                found.append(_alone(first, second))
                continue
            found += _compared(first, second, (before.load, after.load))
            costs += _costs(first, second)
    rows = sorted(told_apart(_corrected(found, least)), key=_order)
    return Changes((len(before.records), len(after.records)), tuple(rows), tuple(costs))


def _alone(first: RowRuns | None, second: RowRuns | None) -> Change:
    """A whole row that vanished or appeared."""
    row = first or second
    assert row is not None
    scores = list(row.scores.values())
    side = _side(row, list(scores[0].measured.values()) if len(scores) == 1 and scores[0].measured else row.records)
    names = tuple(score.name for score in scores)
    ends = sorted({_ending(record) for record in row.records if record.status != "ok"})
    return Change("vanished" if first else "appeared", row.label, names, *_sides(first, side), notes=tuple(ends))


def _sides(first: object, side: Side) -> tuple[Side | None, Side | None]:
    return (side, None) if first is not None else (None, side)


def _compared(first: RowRuns, second: RowRuns, loads: tuple[LoadItems, LoadItems]) -> Iterator[Change]:
    """The scores of a row that both folders have."""
    notes = _not_as_it_was(first, second)
    yield from _endings(first, second, notes)
    for key in dict.fromkeys([*first.scores, *second.scores]):
        mine, theirs = first.scores.get(key, NOTHING), second.scores.get(key, NOTHING)
        sides = _side(first, mine.runs), _side(second, theirs.runs)
        ends = tuple(sorted({_ending(record) for record in [*mine.without.values(), *theirs.without.values()]}))
        if mine.measured and theirs.measured:
            yield _change(first, second, (mine, theirs), loads, notes)
        elif mine.without and theirs.without and not mine.measured and not theirs.measured:
            yield Change("no score", second.label, (theirs.name,), *sides, notes=(*ends, *notes))
        elif mine.runs and not mine.measured.keys() & theirs.without.keys() and not theirs.measured:
            yield Change("vanished", second.label, (mine.name,), sides[0], None, notes=(*ends, *notes))
        elif theirs.runs and not theirs.measured.keys() & mine.without.keys() and not mine.measured:
            yield Change("appeared", second.label, (theirs.name,), None, sides[1], notes=(*ends, *notes))


def _endings(first: RowRuns, second: RowRuns, notes: tuple[str, ...]) -> Iterator[Change]:
    """Runs that had scores and have none any more, and the other way round: one change for each way in which they ended."""
    found: dict[tuple[bool, str], dict[str, list[tuple[RunRecord, RunRecord]]]] = {}
    for key in sorted(first.scores.keys() & second.scores.keys()):
        mine, theirs = first.scores[key], second.scores[key]
        for seed in _in_order(mine.measured.keys() & (theirs.without.keys() - theirs.measured.keys())):
            pair = (mine.measured[seed].record, theirs.without[seed])
            found.setdefault((True, _ending(pair[1])), {}).setdefault(mine.name, []).append(pair)
        for seed in _in_order(theirs.measured.keys() & (mine.without.keys() - mine.measured.keys())):
            pair = (mine.without[seed], theirs.measured[seed].record)
            found.setdefault((False, _ending(pair[0])), {}).setdefault(mine.name, []).append(pair)
    for (lost, ending), by_score in sorted(found.items()):
        pairs = next(iter(by_score.values()))
        sides = _side(first, [one for one, _ in pairs]), _side(second, [other for _, other in pairs])
        said = f"now {ending}" if lost else f"before {ending}"
        yield Change("worsened" if lost else "improved", second.label, tuple(sorted(by_score)), *sides, notes=(said, *notes))


def _in_order(seeds: Iterable[Seed]) -> list[Seed]:
    return sorted(seeds, key=lambda seed: -1 if seed is None else seed)


def _change(
    first: RowRuns, second: RowRuns, scores: tuple[Score, Score], loads: tuple[LoadItems, LoadItems], notes: tuple[str, ...]
) -> Change:
    """One score, before and after, from the answers of the seeds that both have."""
    mine, theirs = (score.measured for score in scores)
    shared = mine.keys() & theirs.keys()
    free = {None} in (mine.keys(), theirs.keys())  # a row without seeds stands beside each seed of the other
    rows = [by_seed([one for seed, one in row.items() if free or not shared or seed in shared]) for row in (mine, theirs)]
    notes = (*_revised(*scores), *_missing(*scores), *notes)
    score = rows[1][0].score
    change = Change(
        "cannot be told",
        second.label,
        (rows[1][0].name,),
        _side(first, rows[0]),
        _side(second, rows[1]),
        score.unit,
        score.higher_is_better,
        score.is_share,
        score.is_ratio,
    )
    found = _difference(rows, loads, bool(shared) or free)
    if isinstance(found, str):
        return replace(change, notes=(found, *notes))
    return replace(change, outcome="the same" if found is None else "within noise", difference=found, notes=notes)


def _difference(
    rows: Sequence[Sequence[Measured]], loads: tuple[LoadItems, LoadItems], paired: bool
) -> Difference | str | None:
    """After minus before, a reason why nothing can be said, or None where all answers are equal."""
    if not paired:
        return "no seed in common"
    told = [(one.score.sample, one.score.unit, one.score.higher_is_better) for row in rows for one in row]
    if any(other != told[0] for other in told):
        return "unit, direction or kind of answers is not the same on both sides"
    if any(one.score.value is None for row in rows for one in row):
        return "a score without a mean has no difference of means"
    answers = []
    for side, row, load in zip(("before", "after"), rows, loads, strict=True):
        try:
            found = Answers.of(row, load)
        except StoreError as error:
            return f"{side}: {str(error).rstrip('.')}"
        if found is None:
            return f"{side}: no raw answers are kept that could be compared"
        answers.append(found)
    compared = compare(answers[1], answers[0])
    if compared is None:
        return "other items: not the same windows or questions were asked"
    if np.array_equal(*compared.pairs):
        return None
    return compared.new_items if compared.new_items.is_known else "too few items to tell"


def _corrected(found: list[Change], least: float) -> list[Change]:
    """The outcomes of rows whose answers differ, after Holm's correction."""
    tested = [(index, change.difference) for index, change in enumerate(found) if change.difference is not None]
    adjusted = holm([difference.p_value for _, difference in tested])
    for (index, difference), p_value in zip(tested, adjusted, strict=True):
        better = (difference.estimate > 0) == found[index].higher_is_better
        certain = p_value < ERROR
        counts = certain and _size(found[index]) >= least
        outcome: Outcome = "within noise" if not counts else "improved" if better else "worsened"
        notes = (f"beyond noise, and below {least:g}",) if certain and not counts else ()
        found[index] = replace(found[index], corrected=p_value, outcome=outcome, notes=(*notes, *found[index].notes))
    return found


def _size(change: Change) -> float:
    """How large a difference is: of shares in points, else in per cent of the value before."""
    assert change.difference is not None
    if change.is_ratio:
        return 100 * abs(math.expm1(min(change.difference.estimate, MOST_EXPONENT)))
    size = abs(change.difference.estimate)
    if change.is_share:
        return 100 * size
    value = change.before.value if change.before is not None else None
    return 100 * size / abs(value) if value else math.inf


def _costs(first: RowRuns, second: RowRuns) -> Iterator[CostChange]:
    """Costs that are another by more than `COST_FACTOR`, on the same machine, neither run sharing it."""
    if first.machine != second.machine:
        return
    runs = [
        {record.spec.seed: record for record in row.records if record.status == "ok" and not record.rescored_from}
        for row in (first, second)
    ]
    seeds = runs[0].keys() & runs[1].keys()
    pairs = [(runs[0][seed], runs[1][seed]) for seed in seeds]
    if not pairs or any(record.provenance.shared_machine for pair in pairs for record in pair):
        return
    seconds = [statistics.fmean(pair[side].prune_seconds for pair in pairs) for side in (0, 1)]
    if _differs(*seconds) and abs(seconds[1] - seconds[0]) >= LEAST_SECONDS:
        yield CostChange(second.label, second.machine, "prune seconds", *seconds)
    peaks = [[pair[side].peak_bytes for pair in pairs] for side in (0, 1)]
    known = [statistics.fmean(peak for peak in side if peak is not None) for side in peaks if None not in side]
    if len(known) == 2 and _differs(*known):
        yield CostChange(second.label, second.machine, "peak memory", *known)


def _differs(first: float, second: float) -> bool:
    return max(first, second) > COST_FACTOR * min(first, second)


def _side(row: RowRuns, runs: Sequence[Measured] | Sequence[RunRecord]) -> Side:
    """One side of a change."""
    records = [run.record if isinstance(run, Measured) else run for run in runs]
    values = [run.score.value for run in runs if isinstance(run, Measured)]
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known and len(known) == len(values) else None
    return Side(row.machine, tuple(record.spec.seed for record in records), mean, tuple(record.id for record in records))


def _not_as_it_was(first: RowRuns, second: RowRuns) -> tuple[str, ...]:
    """What of a row changed that does not keep it apart."""
    one, other = first.records[-1].spec, second.records[-1].spec
    found = [
        f"{now.text.partition('[')[0]} revision {then.revision} → {now.revision}"
        for then, now in zip(one.steps, other.steps, strict=True)
        if then.revision != now.revision
    ]
    if first.machine != second.machine:
        found.append(f"machine {first.machine} → {second.machine}")
    if one.model.name != other.model.name:
        found.append(f"called {one.model.name} before")
    return tuple(found)


def _revised(mine: Score, theirs: Score) -> tuple[str, ...]:
    return () if mine.revision == theirs.revision else (f"evaluation revision {mine.revision} → {theirs.revision}",)


def _missing(mine: Score, theirs: Score) -> Iterator[str]:
    """Seeds that only one side has."""
    if {None} in (mine.measured.keys(), theirs.measured.keys()):
        return
    for said, one, other in (("vanished", mine, theirs), ("appeared", theirs, mine)):
        if seeds := _in_order(one.measured.keys() - other.measured.keys() - other.without.keys()):
            yield f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} {said}"


def _ending(record: RunRecord) -> str:
    """How a run ended that has no scores."""
    if record.failure is not None:
        return f"failed ({record.failure.kind}): {record.failure.message}"
    return f"{record.status}: {record.reason}" if record.reason else record.status


def _order(change: Change) -> tuple[int, float, str, str, str, tuple[str, ...]]:
    """Outcomes in their order; within one the largest change first, relative where it is."""
    size = abs(change.difference.estimate) if change.difference is not None else math.inf
    label = change.label
    return OUTCOMES.index(change.outcome), -size, label.model, label.target, label.method, change.scores

"""What a record says, worked out again: scores from raw answers, sums and shares of the audit from its matrices.

Answers are kept with six decimals (divergences with eight), in Parquet in single precision; so a mean is found again within
`TOLERANCE` of itself, and a count exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from prunebench.results.findings import Entry, Finding
from prunebench.results.items import Columns
from prunebench.results.records import AuditRecord, MatrixAudit, RunRecord, SampleRecord, ScoreRecord
from prunebench.targets import NM, Dense, Unstructured, parse_target

TOLERANCE = 2e-6
"""Relative, and absolute below 1."""

EXTRA_ZEROS = 0.001
"""The share of a matrix that may be zero beyond what its mask removes, unless the method noted why: as the audit has it."""

USUAL_SLAB = 128
"""Columns of a slab where the options of the steps name no number."""

_SHARES = ("recognised", "produced", "empty", "repetitive")
"""Columns of `generation` that are parts of its score too."""


def scores(entry: Entry) -> Iterator[Finding]:
    """Values and parts against the raw answers."""
    for name, score in entry.record.scores.items():
        place = f"scores.{name}"
        if name in entry.unreadable:
            yield entry.finding("arithmetic", f"{place}.items", f"cannot be recomputed from: {entry.unreadable[name]}")
            continue
        columns = entry.answers[name]
        if problem := _unusable(columns, score):
            yield entry.finding("arithmetic", f"{place}.items", problem)
            continue
        found = value_of(columns, score)
        if found is not None and not (_close(score.value, found) or _has_no_value(score)):
            yield entry.finding("arithmetic", f"{place}.value", f"is {score.value!r}, and its raw answers give {found:.8g}")
        again = parts_of(columns, score)
        for part, value in score.parts.items():
            if part in again and not _close(value, again[part]):
                yield entry.finding(
                    "arithmetic", f"{place}.parts.{part}", f"is {value!r}, and its raw answers give {again[part]:.8g}"
                )
        for part in sorted(again.keys() - score.parts.keys()):
            yield entry.finding("arithmetic", f"{place}.parts.{part}", "is absent, and its raw answers have it")


def answers(entry: Entry) -> Iterator[Finding]:
    """Raw answers against each other: who chose the right answer is right, by the likelihoods that are kept beside it."""
    for name, columns in entry.answers.items():
        place = f"scores.{name}.items"
        if {"gold", "choice", "right", "likelihoods", "choices"} <= columns.keys():
            yield from _choices(entry, place, columns, entry.record.scores[name])
        if {"margin", "recognised"} <= columns.keys():
            for row, (margin, recognised) in enumerate(zip(columns["margin"], columns["recognised"], strict=True)):
                if abs(float(margin)) > 1e-4 and bool(recognised) != (float(margin) > 0):
                    yield entry.finding("answers", f"{place}.recognised", f"is {recognised} at {row}, by a margin of {margin}")
                    break
        if {"produced", "empty"} <= columns.keys():
            both = [r for r, (p, e) in enumerate(zip(columns["produced"], columns["empty"], strict=True)) if p and e]
            if both:
                yield entry.finding("answers", f"{place}.empty", f"is true at {both[0]}, where an answer is produced")


def value_of(columns: Columns, score: ScoreRecord) -> float | None:
    """A score's value out of its raw answers; None where it does not say how it is made, or there are none."""
    sample = score.sample
    if (
        score.conditions.get("eval") == "speed"
    ):  # of its rows the first decides; without a kernel there is a value for dense only
        return None if score.value is None or not columns.get("speed_up") else float(columns["speed_up"][0]) or 1.0
    if sample is None and score.conditions.get("eval") == "layer_error":  # matrices are no sample of anything, and have a mean
        sample = SampleRecord(column="error")
    if sample is None or not columns.get(sample.column):
        return None
    mean = _mean(columns, sample)
    return math.exp(min(mean, 700.0)) if sample.exponential else mean


def parts_of(columns: Columns, score: ScoreRecord) -> dict[str, float]:
    """The parts of a score that can be worked out: of the built-in evaluations all of them."""
    kind, sample = score.conditions.get("eval"), score.sample
    if sample is None:
        return {}
    if kind == "zero_shot":
        means = _means(columns, sample)
        return means if len(means) > 1 or score.conditions.get("missing") else {}
    if kind == "divergence" and "agreement" in columns:
        return {"top-1 agreement": math.fsum(map(float, columns["agreement"])) / len(columns["agreement"])}
    if kind == "generation" and set(_SHARES) <= columns.keys():
        parts = {name: _mean(columns, sample.model_copy(update={"column": name})) for name in _SHARES}
        return {**parts, "gap": parts["recognised"] - parts["produced"]}
    return {}


def audit(entry: Entry) -> Iterator[Finding]:
    """Sums, shares and counts of the audit."""
    record = entry.record
    if record.status != "ok":
        return
    if record.audit is None:
        yield entry.finding("audit", "audit", "is absent, so nobody knows what was removed")
        return
    found, matrices = record.audit, record.audit.matrices
    for matrix in matrices:
        if not 0 <= matrix.removed <= matrix.zeros <= _size(matrix):
            yield entry.finding(
                "audit",
                f"audit.matrices.{matrix.name}",
                f"has {matrix.removed} removed and {matrix.zeros} zeros of {_size(matrix)}",
            )
    for field in ("removed", "zeros"):
        total = sum(getattr(matrix, field) for matrix in matrices)
        if getattr(found, field) != total:
            yield entry.finding("audit", f"audit.{field}", f"is {getattr(found, field)}, and its matrices have {total}")
    if found.extra_zeros != found.zeros - found.removed:
        yield entry.finding(
            "audit",
            "audit.extra_zeros",
            f"is {found.extra_zeros}, and {found.zeros} zeros less {found.removed} removed are others",
        )
    yield from _shares(entry, found)
    yield from _counts(entry, record, matrices)


def _shares(entry: Entry, found: AuditRecord) -> Iterator[Finding]:
    """Shares of prunable weights, of all parameters, of the blocks' parameters: the denominators are whole numbers."""
    prunable = sum(map(_size, found.matrices))
    share = found.zeros / prunable if prunable else 0.0
    if not math.isclose(found.sparsity_prunable, share, rel_tol=1e-9, abs_tol=1e-12):
        yield entry.finding(
            "audit", "audit.sparsity_prunable", f"is {found.sparsity_prunable!r}, and its matrices give {share!r}"
        )
    pruned = sum(_size(matrix) for matrix in found.matrices if matrix.removed)
    for field, above, least in (("sparsity_total", found.zeros, prunable), ("coverage", pruned, prunable)):
        value = getattr(found, field)
        whole = above / value if value else 0.0
        wrong = bool(above) != bool(value) or (above and (abs(whole - round(whole)) > 1e-3 or round(whole) < least))
        if not 0 <= value <= 1 or wrong:
            yield entry.finding("audit", f"audit.{field}", f"is {value!r}, which no number of parameters gives for {above}")


def _counts(entry: Entry, record: RunRecord, matrices: Sequence[MatrixAudit]) -> Iterator[Finding]:
    """Removed entries against the target, by any comparison group that a method may have."""
    target = parse_target(record.spec.target)
    if isinstance(target, Unstructured):
        total = target.removed(sum(map(_size, matrices)))
        if sum(matrix.removed for matrix in matrices) != total:  # a model's total need not be every matrix's
            yield from _exact(entry, record, target)
    explained = any("extra_zeros" in step.notes for step in record.steps)
    for matrix in matrices:
        place, size = f"audit.matrices.{matrix.name}", _size(matrix)
        if isinstance(target, NM) and matrix.removed < size // target.of * (target.of - target.keep):
            said = f"is {matrix.removed} of {size}, fewer than the target {target} asks for"
            yield entry.finding("audit", f"{place}.removed", said)
        if isinstance(target, Dense) and matrix.removed:
            yield entry.finding("audit", f"{place}.removed", f"is {matrix.removed}, and the target is dense")
        if not explained and not isinstance(target, Dense) and matrix.zeros - matrix.removed > EXTRA_ZEROS * size:
            said = f"is {matrix.zeros - matrix.removed} beyond what was removed, and no note says why"
            yield entry.finding("audit", f"{place}.zeros", said)


def _exact(entry: Entry, record: RunRecord, target: Unstructured) -> Iterator[Finding]:
    """Matrices whose count no comparison group gives."""
    assert record.audit is not None
    slabs = _slabs(record)
    for matrix in record.audit.matrices:
        wanted = _possible(matrix, target, slabs)
        if matrix.removed not in wanted:
            said = f"is {matrix.removed} of {_size(matrix)}, and the target {target} asks for {' or '.join(map(str, wanted))}"
            yield entry.finding("audit", f"audit.matrices.{matrix.name}.removed", said)


def _possible(matrix: MatrixAudit, target: Unstructured, slabs: Sequence[int]) -> list[int]:
    """Exact counts by row, by matrix, and by slabs of so many columns."""
    rows, columns = matrix.shape
    found = [rows * target.removed(columns), target.removed(rows * columns)]
    for width in slabs:
        whole, rest = divmod(columns, width)
        found.append(whole * target.removed(rows * width) + target.removed(rows * rest))
    return sorted(set(found))


def _slabs(record: RunRecord) -> list[int]:
    """Widths that slabs of columns may have: whole numbers among the options."""
    named = {value for step in record.steps for value in step.options.values() if type(value) is int and 0 < value < 1 << 20}
    return sorted({USUAL_SLAB, *named})


def _size(matrix: MatrixAudit) -> int:
    return matrix.shape[0] * matrix.shape[1]


def _mean(columns: Columns, sample: SampleRecord) -> float:
    """The mean of the column that counts: of its tasks' means where it has tasks."""
    means = list(_means(columns, sample).values())
    return math.fsum(means) / len(means)


def _means(columns: Columns, sample: SampleRecord) -> dict[str, float]:
    values = [float(value) for value in columns[sample.column]]
    if sample.tasks is None:
        return {"": math.fsum(values) / len(values)}
    by_task: dict[str, list[float]] = {}
    for task, value in zip(columns[sample.tasks], values, strict=True):
        by_task.setdefault(str(task), []).append(value)
    return {task: math.fsum(own) / len(own) for task, own in by_task.items()}


def _unusable(columns: Columns, score: ScoreRecord) -> str | None:
    """Why a score's value cannot be worked out of its raw answers; None where it can, or does not say how it is made."""
    sample = score.sample
    if sample is None:
        return None
    missing = [name for name in (sample.column, sample.documents, sample.strata, sample.tasks) if name and name not in columns]
    if missing:
        return f"lack the column {missing[0]!r}, so the value cannot be recomputed"
    if len({len(values) for values in columns.values()}) != 1 or not columns[sample.column]:
        return "are none, or columns of several lengths"
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in columns[sample.column]):
        return f"are not all numbers under {sample.column!r}"
    return None


def _choices(entry: Entry, place: str, columns: Columns, score: ScoreRecord) -> Iterator[Finding]:
    """Of questions with several answers: the choice is the likeliest, and right when it is the right one.

    Metrics that weigh likelihoods by length choose another way, and some tasks have several right answers or give shares: there
    only what is right by the first of them is known.
    """
    rows = zip(*(columns[name] for name in ("gold", "choice", "right", "likelihoods", "choices")), strict=True)
    for row, (gold, choice, right, text, count) in enumerate(rows):
        likelihoods = [float(value) for value in str(text).split()]
        if len(likelihoods) != count:
            yield entry.finding("answers", f"{place}.likelihoods", f"are {len(likelihoods)} at {row}, of {count} choices")
            return
        if len(likelihoods) == 1 or score.conditions.get("metric") != "acc" or not isinstance(choice, int):
            continue
        if not 0 <= choice < len(likelihoods) or likelihoods[choice] < max(likelihoods) - 0.0011:  # kept with three decimals
            yield entry.finding("answers", f"{place}.choice", f"is {choice} at {row}, which is not the likeliest answer")
            return
        if right == 0 and choice == gold:
            yield entry.finding("answers", f"{place}.right", f"is 0 at {row}, where the choice is the right one")
            return
        if right == 1 and choice != gold and gold != -1:
            yield entry.finding("answers", f"{place}.right", f"is 1 at {row}, where the choice is another than the right one")
            return


def _has_no_value(score: ScoreRecord) -> bool:
    """Whether a score rightly has no value: one of a set's tasks could not be asked."""
    return score.value is None and score.conditions.get("eval") == "zero_shot" and bool(score.conditions.get("missing"))


def _close(value: float | None, found: float) -> bool:
    return value is not None and math.isclose(value, found, rel_tol=TOLERANCE, abs_tol=TOLERANCE)

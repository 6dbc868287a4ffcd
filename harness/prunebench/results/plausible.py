"""Whether records can be true beside others: of the same bundle, and of those that are known.

Equal work gives equal hashes: the same recipe and seed the same tokens, other seeds others. A model is the same wherever it is
measured, so its dense scores agree, and so do its matrices and the questions it was asked. What is merely odd is a warning.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import binomtest

from prunebench.results.comparison import Measured
from prunebench.results.content import canonical_json, fingerprint
from prunebench.results.findings import Entry, Finding, Level, is_pruned, is_trained
from prunebench.results.planning import Asked
from prunebench.results.records import RunRecord, ScoreRecord
from prunebench.results.verdicts import content_checksum

DENSE_AGREES = 0.005
"""Relative: the same model on the same text differs by rounding, far less than this, and by a few questions near a tie."""

REPEAT_AGREES = 0.02
"""Relative: a pruning repeated elsewhere may keep other weights where scores tie, by rounding."""

QUESTIONS = 3
"""So many answers near a tie may fall the other way."""

SURPRISING = 0.001
"""The p of a pruned model that is better than the dense one, from which on somebody should explain it."""

FAR = {True: 10.0, False: 100.0}
"""How many times longer or shorter the same pruning may take: on the same machine, on another."""

LEAST_ITEMS = 8
"""Fewer raw answers may be equal by chance."""

LABELS = ("document", "task", "stratum", "question", "gold", "choices")
"""Columns that the evaluation gives, not the model."""


class Neighbours:
    """Records that are examined, among each other and beside known ones."""

    def __init__(self, entries: Sequence[Entry], known: Sequence[Entry] = ()) -> None:
        """A known record that is examined too counts once, as examined."""
        mine = {content_checksum(entry.record) for entry in entries}
        self.entries = list(entries)
        self.known = [entry for entry in known if content_checksum(entry.record) not in mine]
        self._by_measurement: dict[tuple[str, str], list[tuple[Entry, str]]] = defaultdict(list)
        for entry in (*self.known, *self.entries):
            for name, score in entry.record.scores.items():
                key = Measured(entry.record, name, score).measurement
                self._by_measurement[key, entry.record.spec.model.weights].append((entry, name))
        self._digests: dict[tuple[int, str], dict[str, str]] = {}

    def all(self) -> list[Entry]:
        """Known ones first, so that a contradiction is blamed on what is examined."""
        return [*self.known, *self.entries]

    def beside(self, entry: Entry, name: str) -> list[tuple[Entry, str]]:
        """Scores of other runs, measured under the same conditions as this one, known ones first."""
        key = Measured(entry.record, name, entry.record.scores[name]).measurement
        return [pair for pair in self._by_measurement[key, entry.record.spec.model.weights] if pair[0] is not entry]

    def digests(self, entry: Entry, name: str) -> dict[str, str]:
        """A hash of each column of a score's raw answers."""
        if (id(entry), name) not in self._digests:
            held = "_read" in entry.__dict__
            columns = entry.answers.get(name, {})
            found = {column: hashlib.sha256(canonical_json(values).encode()).hexdigest() for column, values in columns.items()}
            self._digests[id(entry), name] = found
            if not held:
                entry.forget()
        return self._digests[id(entry), name]


def tokens(near: Neighbours) -> Iterator[Finding]:
    """The same recipe and seed has the same calibration tokens, another seed has others."""
    by_seed: dict[tuple[str, int | None], Entry] = {}
    by_tokens: dict[tuple[str, str | None], Entry] = {}
    for entry in near.all():
        spec = entry.record.spec
        if spec.recipe.of_calibration is None or spec.calibration_tokens is None:
            continue
        key = fingerprint({"recipe": spec.recipe.of_calibration.model_dump(mode="json"), "tokenizer": spec.model.tokenizer})
        other = by_seed.setdefault((key, spec.seed), entry)
        if other.record.spec.calibration_tokens != spec.calibration_tokens:
            theirs = other.record.spec.calibration_tokens
            said = f"is {spec.calibration_tokens}, and {other.label} has {theirs} of the same recipe and seed"
            yield entry.finding("tokens", "spec.calibration_tokens", said)
        other = by_tokens.setdefault((key, spec.calibration_tokens), entry)
        if other.record.spec.seed != spec.seed and spec.recipe.sampler != "as given":
            said = f"is {spec.seed}, and {other.label} has the same tokens of seed {other.record.spec.seed}"
            yield entry.finding("tokens", "spec.seed", said)


def twins(near: Neighbours) -> Iterator[Finding]:
    """One method on other tokens gives other masks and other answers."""
    masks: dict[str, Entry] = {}
    for entry in near.all():
        kept = entry.record.masks
        other = masks.setdefault(kept.hash, entry) if kept else entry
        if other is not entry and _pruning(other.record) != _pruning(entry.record):
            yield entry.finding("twins", "masks.hash", f"is that of {other.label}, which is another pruning")
    for entry in near.entries:
        for name in entry.record.scores:
            twin = _twin(near, entry, name)
            if twin is not None:
                said = f"are those of {twin.label}, whose pruning had other tokens"
                yield entry.finding("twins", f"scores.{name}.items", said)


def _twin(near: Neighbours, entry: Entry, name: str) -> Entry | None:
    """Another run of the same method at the same target on other tokens, with the same answers."""
    record, score = entry.record, entry.record.scores[name]
    if score.sample is None or score.sample.strata is not None or record.spec.calibration_tokens is None:
        return None
    for other, theirs in near.beside(entry, name):
        same = (other.record.spec.steps, other.record.spec.target) == (record.spec.steps, record.spec.target)
        if not same or other.record.spec.calibration_tokens in (None, record.spec.calibration_tokens):
            continue
        column, count = score.sample.column, len(entry.answers.get(name, {}).get(score.sample.column, []))
        mine = near.digests(entry, name).get(column)
        if count >= LEAST_ITEMS and mine is not None and mine == near.digests(other, theirs).get(column):
            return other
    return None


def _pruning(record: RunRecord) -> str:
    """All that the masks of a run depend on."""
    told = {"steps", "target", "seed", "calibration_tokens", "training_tokens"}
    return canonical_json(record.spec.model_dump(mode="json", include=told))


def dense(near: Neighbours) -> Iterator[Finding]:
    """The dense model has the same score wherever it is measured under the same conditions."""
    for entry in near.entries:
        if entry.record.spec.method != "dense":
            continue
        for name, score in entry.record.scores.items():
            for other, theirs in near.beside(entry, name):
                found = other.record.scores[theirs]
                if other.record.spec.method == "dense" and not _agree(score, found, DENSE_AGREES):
                    said = f"is {score.value!r}, and the same model has {found.value!r} in {other.label}"
                    yield entry.finding("plausible", f"scores.{name}.value", said)
                    break


def repeated(near: Neighbours) -> Iterator[Finding]:
    """The same run elsewhere has the same score, or nearly; training scatters more."""
    for entry in near.entries:
        for name, score in entry.record.scores.items():
            for other, theirs in near.beside(entry, name):
                found = other.record.scores[theirs]
                if other.record.id == entry.record.id and not _agree(score, found, REPEAT_AGREES):
                    level: Level = "warning" if is_trained(entry.record) else "error"
                    said = f"is {score.value!r}, and the same run has {found.value!r} in {other.label}"
                    yield entry.finding("plausible", f"scores.{name}.value", said, level)
                    break


def questions(near: Neighbours) -> Iterator[Finding]:
    """What was asked is the same under the same conditions: documents, tasks, right answers."""
    for entry in near.entries:
        for name in entry.record.scores:
            mine = near.digests(entry, name)
            other = next((pair for pair in near.beside(entry, name) if mine and near.digests(*pair)), None)
            if other is None:
                continue
            theirs = near.digests(*other)
            for column in LABELS:
                if mine.get(column) != theirs.get(column):
                    said = f"are others than those of {other[0].label}, which was asked the same"
                    yield entry.finding("plausible", f"scores.{name}.items.{column}", said)


def matrices(near: Neighbours) -> Iterator[Finding]:
    """One model has one set of matrices and one number of parameters."""
    shapes: dict[str, Entry] = {}
    sizes: dict[tuple[str, str], tuple[range, Entry]] = {}
    for entry in near.all():
        audit, weights = entry.record.audit, entry.record.spec.model.weights
        if audit is None:
            continue
        first = shapes.setdefault(weights, entry).record.audit
        assert first is not None
        mine, theirs = ({m.name: m.shape for m in found.matrices} for found in (audit, first))
        if mine != theirs:
            name = next(name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name))
            said = f"is {mine.get(name)}, and {theirs.get(name)} of the same model in {shapes[weights].label}"
            yield entry.finding("plausible", f"audit.matrices.{name}.shape", said)
        pruned = sum(rows * columns for rows, columns in (matrix.shape for matrix in audit.matrices if matrix.removed))
        for field, above in (("sparsity_total", audit.zeros), ("coverage", pruned)):
            share = getattr(audit, field)
            if not share:
                continue
            total = round(above / share)
            # An untied head is among all parameters, an adapter is not: of what was added any part may be counted.
            added = max(0, entry.record.extra_parameters) if field == "sparsity_total" else 0
            own = range(total - added, total + 1)
            known, other = sizes.setdefault((weights, field), (own, entry))
            if own.start >= known.stop or known.start >= own.stop:
                said = f"tells of {total} parameters, and {other.label} of {known.stop - 1} of the same model"
                yield entry.finding("plausible", f"audit.{field}", said)


def better_than_dense(near: Neighbours) -> Iterator[Finding]:
    """A model that was pruned and not trained is not better than before, as a rule."""
    for entry in near.entries:
        if not is_pruned(entry.record) or is_trained(entry.record):
            continue
        for name, score in entry.record.scores.items():
            dense = next((pair for pair in near.beside(entry, name) if pair[0].record.spec.method == "dense"), None)
            if dense is None or score.value is None:
                continue
            base = dense[0].record.scores[dense[1]]
            if base.value is None or score.value == base.value or (score.value > base.value) != score.higher_is_better:
                continue
            p_value = _p_value(entry, name, *dense)
            if p_value is not None and p_value < SURPRISING:
                said = (
                    f"is {score.value:.6g}, better than the dense model's {base.value:.6g} ({dense[0].label}, p {p_value:.1g})"
                )
                yield entry.finding("odd", f"scores.{name}.value", said, "warning")


def _p_value(entry: Entry, name: str, other: Entry, theirs: str) -> float | None:
    """Of a sign test over the items of which one model is better, as if each were drawn by itself: enough for a question."""
    sample = entry.record.scores[name].sample
    columns = [one.answers.get(score, {}) for one, score in ((entry, name), (other, theirs))]
    if sample is None or any(sample.column not in found for found in columns):
        return None
    mine, dense = (np.asarray(found[sample.column], np.float64) for found in columns)
    if mine.shape != dense.shape or not (mine != dense).any():
        return None
    won = (mine > dense) if entry.record.scores[name].higher_is_better else (mine < dense)
    return float(binomtest(int(won.sum()), int((mine != dense).sum()), alternative="greater").pvalue)


def costs(near: Neighbours) -> Iterator[Finding]:
    """The same pruning takes about as long as it is known to take."""
    known: dict[str, list[Entry]] = defaultdict(list)
    for entry in near.known:
        if entry.record.prune_seconds > 0 and not entry.record.provenance.shared_machine:
            known[_work(entry.record)].append(entry)
    for entry in near.entries:
        seconds = entry.record.prune_seconds
        if seconds <= 0 or entry.record.provenance.shared_machine:
            continue
        for other in known[_work(entry.record)]:
            times = max(seconds, 0.1) / max(other.record.prune_seconds, 0.1)
            if (
                not 1 / FAR[other.record.machine == entry.record.machine]
                < times
                < FAR[other.record.machine == entry.record.machine]
            ):
                said = f"give {seconds:.2f} s, and {other.label} took {other.record.prune_seconds:.2f} s for the same"
                yield entry.finding("odd", "steps.phases", said, "warning")
                break


def _work(record: RunRecord) -> str:
    spec = record.spec
    return canonical_json([spec.model.weights, spec.method, spec.target, spec.recipe.samples, spec.recipe.length])


def _agree(one: ScoreRecord, other: ScoreRecord, share: float) -> bool:
    if one.value is None or other.value is None:
        return one.value == other.value
    few = 0.0
    if one.is_share:
        few = QUESTIONS / max(1, sum(count for _, count in Asked.by(one.conditions).questions))
    return math.isclose(one.value, other.value, rel_tol=share, abs_tol=max(few, 1e-6))

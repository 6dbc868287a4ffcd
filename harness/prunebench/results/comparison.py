"""Two rows of a table, item by item: what the same windows or questions, and the same seeds, say of their difference."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError
from prunebench.results.accuracy import Flips, accuracy_interval, macro_accuracy_interval, mcnemar
from prunebench.results.content import fingerprint
from prunebench.results.items import Columns
from prunebench.results.records import RunRecord, SampleRecord, ScoreRecord, eval_revision
from prunebench.results.resampling import Floats, Items, equal_weights, macro_weights
from prunebench.results.statistics import Difference, new_items, new_seeds_too, smallest_detectable

LoadItems = Callable[[RunRecord, ScoreRecord], Columns]
"""Gives a score's raw answers: `ResultStore.items`."""


MOST = {False: 1e100, True: 700.0}
"""How large a value may be; where a mean of them is a logarithm, its exponential must be a number too."""


@dataclass(frozen=True)
class Measured:
    """One score of one run."""

    record: RunRecord
    name: str
    score: ScoreRecord

    @property
    def measurement(self) -> str:
        """The fingerprint of how it was measured: the conditions, and the revision of the evaluation."""
        return fingerprint({"conditions": dict(self.score.conditions), "revision": eval_revision(self.record, self.score)})


@dataclass(frozen=True, eq=False)
class Answers:
    """A row's values, item by item: one method at one target, its seeds together."""

    values: Floats
    """[seeds, items], of the column that the score averages."""
    seeds: tuple[int | None, ...]
    """(None,) for a method without data and randomness."""
    items: Items
    labels: Mapping[str, tuple[float | int | str, ...]]
    """What tells items apart; rows with other labels were not asked the same."""
    tasks: Mapping[str, NDArray[np.intp]]
    """The items of each task, by name."""
    choices: Floats | None
    """[items], among how many answers each question is one, where it is a choice."""
    exponential: bool
    ids: tuple[str, ...]

    @classmethod
    def of(cls, row: Sequence[Measured], load: LoadItems) -> Answers | None:
        """The answers of a row's runs, or None where the score does not say what it is made of, or that is not kept.

        Raises:
            StoreError: they cannot be read, or are not what the score says of them.
        """
        samples = [measured.score.sample for measured in row]
        sample = samples[0]
        if sample is None or any(other != sample for other in samples):
            return None
        columns = [load(measured.record, measured.score) for measured in row]
        first = columns[0]
        names = [name for name in (sample.documents, sample.strata, sample.tasks) if name is not None]
        if any(name not in other for other in columns for name in (sample.column, *names)):
            return None
        for measured, other in zip(row, columns, strict=True):
            if problem := _problem(other, sample):
                raise StoreError(f"the raw answers of {measured.name} in {measured.record.id} {problem}.")
        labels = {name: tuple(first[name]) for name in names}
        if any({name: tuple(other[name]) for name in names} != labels for other in columns):
            return None
        tasks = _codes(labels[sample.tasks]) if sample.tasks is not None else None
        documents = _codes(labels[sample.documents]) if sample.documents is not None else None
        if documents is not None and not documents.any() and sample.strata is None:
            documents = None  # a text in one piece, of which no articles are known: its neighbouring windows are drawn together
        items = Items(
            weights=equal_weights(len(first[sample.column])) if tasks is None else macro_weights(tasks),
            clusters=documents,
            strata=_codes(labels[sample.strata]) if sample.strata is not None else None,
        )
        return cls(
            values=np.asarray([other[sample.column] for other in columns], np.float64),
            seeds=tuple(measured.record.spec.seed for measured in row),
            items=items,
            labels=labels,
            tasks={} if sample.tasks is None else _positions(labels[sample.tasks]),
            choices=np.asarray(first["choices"], np.float64) if "choices" in first else None,
            exponential=sample.exponential,
            ids=tuple(measured.record.id for measured in row),
        )

    @property
    def are_right_or_wrong(self) -> bool:
        """Whether the values are answers to questions."""
        return self.items.strata is not None and bool(np.isin(self.values, (0, 1)).all())

    @property
    def guesses(self) -> frozenset[str]:
        """Tasks whose accuracy, the mean over seeds, cannot be told from that of guessing; the empty name is their mean."""
        return frozenset(name for name, (low, chance, high) in self._against_chance.items() if low <= chance <= high)

    @property
    def below_chance(self) -> frozenset[str]:
        """Tasks whose accuracy is significantly worse than that of guessing; the empty name is their mean."""
        return frozenset(name for name, (_, chance, high) in self._against_chance.items() if high < chance)

    @cached_property
    def _against_chance(self) -> dict[str, tuple[float, float, float]]:
        """The accuracy that guessing has, between the ends of the 95% interval, by task; the empty name is their mean."""
        if self.choices is None or not self.are_right_or_wrong:
            return {}
        right = self.values.mean(axis=0)
        asked = {name: where for name, where in self.tasks.items() if bool((self.choices[where] > 1).all())}
        counts = {name: (round(float(right[where].sum())), len(where)) for name, where in asked.items()}
        chances = {name: float((1 / self.choices[where]).mean()) for name, where in asked.items()}
        found = {}
        for name, chance in chances.items():
            low, high = accuracy_interval(*counts[name])
            found[name] = (low, chance, high)
        if len(asked) == len(self.tasks):
            low, high = macro_accuracy_interval([c for c, _ in counts.values()], [n for _, n in counts.values()])
            found[""] = (low, sum(chances.values()) / len(chances), high)
        return found


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two rows, A and B; differences are A minus B."""

    first: Answers
    second: Answers
    seeds: tuple[int | None, ...]
    """Those both rows have; a row without seeds stands beside each seed of the other."""

    @cached_property
    def pairs(self) -> tuple[Floats, Floats]:
        """The values of both, [seeds, items]."""
        return _at(self.first, self.seeds), _at(self.second, self.seeds)

    @cached_property
    def new_items(self) -> Difference:
        """These seeds, new text: what ranks rest on."""
        first, second = self.pairs
        return new_items(first - second, self.first.items, self._seed)

    @cached_property
    def new_seeds(self) -> Difference:
        """New seeds and new text."""
        first, second = self.pairs
        return new_seeds_too(first - second, self.first.items, self._seed)

    @property
    def flips(self) -> list[Flips]:
        """Answers that changed sides from A to B, with McNemar's test: one for each seed and never pooled."""
        return [mcnemar(first, second) for first, second in zip(*self.pairs, strict=True)]

    @property
    def flipped(self) -> tuple[float, float]:
        """Shares of the questions that went from right to wrong and from wrong to right, from A to B; means over seeds."""
        first, second = self.pairs
        weights = self.first.items.weights
        lost, won = (first > second).mean(axis=0), (second > first).mean(axis=0)
        return float(lost @ weights), float(won @ weights)

    def detectable(self, level: float = 0.95) -> float:
        """The smallest true difference that these items and seeds would have shown at this level in four of five cases."""
        found = self.new_items
        if not found.is_known:
            return math.inf
        return smallest_detectable(found.standard_error, found.degrees_of_freedom, level)

    @property
    def _seed(self) -> bytes:
        """Of the resampling: the same for A against B and B against A."""
        return hashlib.sha256(" ".join(sorted({*self.first.ids, *self.second.ids})).encode()).digest()


def compare(first: Answers, second: Answers) -> Comparison | None:
    """Two rows, or None where they were not asked the same items, or share no seed."""
    if first.labels != second.labels or first.values.shape[1] != second.values.shape[1]:
        return None
    if first.seeds == (None,) or second.seeds == (None,):
        return Comparison(first, second, second.seeds if first.seeds == (None,) else first.seeds)
    shared = tuple(seed for seed in first.seeds if seed in second.seeds)
    return Comparison(first, second, shared) if shared else None


def _at(answers: Answers, seeds: tuple[int | None, ...]) -> Floats:
    """The rows of these seeds, [seeds, items]."""
    if answers.seeds == (None,):
        return np.broadcast_to(answers.values, (len(seeds), answers.values.shape[1]))
    return answers.values[[answers.seeds.index(seed) for seed in seeds]]


def _codes(labels: Sequence[object]) -> NDArray[np.intp]:
    """Labels as whole numbers, by first appearance."""
    numbers: dict[object, int] = {}
    return np.asarray([numbers.setdefault(label, len(numbers)) for label in labels], np.intp)


def _positions(labels: Sequence[object]) -> dict[str, NDArray[np.intp]]:
    names = np.asarray([str(label) for label in labels])
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}


def _problem(columns: Columns, sample: SampleRecord) -> str | None:
    """What of raw answers does not fit what a score says of them: anybody may have written them."""
    counted = [name for name in (sample.column, "choices") if name in columns]
    named = [name for name in (sample.documents, sample.strata, sample.tasks) if name is not None]
    count = len(columns[sample.column])
    if not count or any(len(columns[name]) != count for name in (*counted, *named)):
        return "are none, or columns of several lengths"
    for name in counted:
        least, most = (1.0, MOST[False]) if name == "choices" else (-MOST[sample.exponential], MOST[sample.exponential])
        if not all(isinstance(value, int | float) and least <= value <= most for value in columns[name]):
            return f"are not all numbers from {least:g} to {most:g}"
    if sample.documents is not None and sample.strata is not None:
        pairs = set(zip(columns[sample.documents], columns[sample.strata], strict=True))
        if len(pairs) > len(set(columns[sample.documents])):
            return "have a document in two strata"
    return None

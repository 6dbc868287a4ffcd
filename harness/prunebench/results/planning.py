"""The smallest difference that an evaluation could show, before it is run.

Where records hold answers under the same conditions, their items and the usual deviation of two methods' differences are taken;
otherwise the number of items is, and a deviation is assumed. The estimand is that of ranks: these seeds, new text. More seeds
bring the estimate nearer to these seeds' mean, not the text's part down.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunebench.errors import StoreError
from prunebench.results.comparison import Answers, LoadItems, Measured, compare
from prunebench.results.content import fingerprint
from prunebench.results.contest import row_key
from prunebench.results.records import RunRecord
from prunebench.results.resampling import Items, equal_weights, macro_weights
from prunebench.results.rows import DENSE, by_seed
from prunebench.results.statistics import planned_difference

WINDOW_DEVIATION = 0.05
"""Nats, of a window's difference between two methods; between methods that are near each other it is less."""

ANSWERS_DIFFER = 0.15
"""The share of answers that are right from one method and wrong from the other."""

MOST_PAIRS = 10
"""Pairs of rows that the deviation is the median of."""


@dataclass(frozen=True)
class Asked:
    """What an evaluation reads, by its conditions: windows of a text, or questions of tasks."""

    windows: int
    window: int
    questions: tuple[tuple[str, int], ...]
    """Tasks with how many each has."""

    @classmethod
    def by(cls, conditions: Mapping[str, Any]) -> Asked:
        """As perplexity and divergence, zero_shot and generation say it; nothing where an evaluation says it otherwise."""
        try:
            return cls._read(conditions)
        except (AttributeError, KeyError, TypeError, ValueError):  # a stranger's may call anything `tasks` or `windows`
            return cls(0, 0, ())

    @classmethod
    def _read(cls, conditions: Mapping[str, Any]) -> Asked:
        limit, tasks = conditions.get("limit"), conditions.get("tasks")
        questions: list[tuple[str, int]] = []
        if isinstance(tasks, Mapping):
            for name, task in tasks.items():
                questions.append((name, min(task["items"], limit * task.get("tasks", 1)) if limit else task["items"]))
        elif isinstance(tasks, Sequence):
            questions = [(task["task"], task["questions"]) for task in tasks]
        return cls(int(conditions.get("windows", 0)), int(conditions.get("window", 0)), tuple(questions))


@dataclass(frozen=True)
class Figure:
    """What one evaluation could show of two methods."""

    difference: float
    """In nats, or a share of answers; infinite where there are too few items."""
    exponential: bool
    share: bool
    items: int
    deviation: float
    """Of an item's paired difference."""
    pairs: int
    """Of rows in records that the deviation comes from; 0 where it is assumed."""


def figure(conditions: Mapping[str, Any], records: Iterable[RunRecord], load: LoadItems) -> Figure | None:
    """The difference that would be found four times of five at 95%, before any correction for many pairs.

    Args:
        conditions: of the evaluation.
        records: of any machine.
        load: gives a score's raw answers.

    Returns:
        None where neither records nor conditions say what the items are.
    """
    known, deviations = None, []
    for first, second in _pairs(_rows(conditions, records)):
        try:
            answers = [Answers.of(by_seed(row), load) for row in (first, second)]
        except StoreError:  # its raw answers are gone; others may be there
            continue
        compared = compare(answers[0], answers[1]) if answers[0] and answers[1] else None
        if compared is None or len(compared.first.items.weights) < 2:
            continue
        one, other = compared.pairs
        known = compared.first
        deviations.append(float((one - other).mean(axis=0).std(ddof=1)))
        if len(deviations) == MOST_PAIRS:
            break
    if known is None:
        return _assumed(conditions)
    deviation = statistics.median(deviations)
    size = planned_difference(known.items, deviation)
    share = known.items.strata is not None
    return Figure(size, known.exponential, share, len(known.items.weights), deviation, len(deviations))


def _assumed(conditions: Mapping[str, Any]) -> Figure | None:
    asked = Asked.by(conditions)
    if asked.windows:
        size = planned_difference(Items(equal_weights(asked.windows)), WINDOW_DEVIATION)
        return Figure(size, conditions.get("eval") == "perplexity", False, asked.windows, WINDOW_DEVIATION, 0)
    counts = [count for _, count in asked.questions]
    if not any(counts):
        return None
    tasks = np.repeat(np.arange(len(counts)), counts)
    deviation = math.sqrt(ANSWERS_DIFFER)
    size = planned_difference(Items(macro_weights(tasks), strata=tasks), deviation)
    return Figure(size, False, True, len(tasks), deviation, 0)


def _rows(conditions: Mapping[str, Any], records: Iterable[RunRecord]) -> list[list[Measured]]:
    """Rows of pruned models measured under these conditions."""
    key = fingerprint(dict(conditions))
    rows: dict[tuple[str, ...], list[Measured]] = {}
    for record in records:
        if record.status == "ok" and record.spec.target != DENSE:
            for name, score in record.scores.items():
                if fingerprint(dict(score.conditions)) == key:
                    rows.setdefault(row_key(record), []).append(Measured(record, name, score))
    return [rows[key] for key in sorted(rows)]


def _pairs(rows: Sequence[list[Measured]]) -> Iterable[tuple[list[Measured], list[Measured]]]:
    """Pairs of one target, which tables compare; of each target in turn."""
    by_target: dict[str, list[list[Measured]]] = {}
    for row in rows:
        by_target.setdefault(row[0].record.spec.target, []).append(row)
    turns = itertools.zip_longest(*(itertools.combinations(found, 2) for found in by_target.values()))
    return (pair for turn in turns for pair in turn if pair is not None)

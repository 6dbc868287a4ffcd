"""Right and wrong answers: an accuracy's interval, and McNemar's test of one pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtri

from prunebench.errors import RequestError


@dataclass(frozen=True)
class Flips:
    """Answers that differ between two models on one task, and McNemar's test of them."""

    right_to_wrong: int
    wrong_to_right: int
    asked: int
    p_value: float
    """Exact and two-sided: that so uneven a split of the answers that differ has probability 1/2 each way."""

    @property
    def share(self) -> float:
        """Answers that changed sides, of all: equal accuracies do not make equal models."""
        return (self.right_to_wrong + self.wrong_to_right) / self.asked


def mcnemar(first_right: ArrayLike, second_right: ArrayLike) -> Flips:
    """McNemar's exact test for one pair of models, one task and one seed (Psychometrika 12, 1947).

    Args:
        first_right: [questions], whether the first model's answer is right.
        second_right: the same of the second model, question by question.

    Raises:
        RequestError: the models were not asked the same number of questions, or none.
    """
    first, second = np.asarray(first_right, dtype=bool), np.asarray(second_right, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise RequestError(f"answers of shapes {list(first.shape)} and {list(second.shape)} are not pairs of one task.")
    lost, won = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    return Flips(lost, won, first.size, min(1.0, 2 * float(bdtr(min(lost, won), lost + won, 0.5))))


def accuracy_interval(right: int, asked: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of one accuracy (Journal of the American Statistical Association 22, 1927).

    Raises:
        RequestError: there is no question, or more right answers than questions.
    """
    if not 0 <= right <= asked or not asked:
        raise RequestError(f"{right} right answers to {asked} questions make no accuracy.")
    z = float(ndtri((1 + level) / 2))
    share, part = right / asked, z * z / asked
    middle = (share + part / 2) / (1 + part)
    reach = z / (1 + part) * math.sqrt(share * (1 - share) / asked + part / (4 * asked))
    return (middle - reach if right else 0.0), (middle + reach if right < asked else 1.0)


def macro_accuracy_interval(right: Sequence[int], asked: Sequence[int], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean of several tasks' accuracies, each task's questions being independent.

    Each side's distance is `sqrt(sum(distance_h^2)) / tasks` over the distances of each task's Wilson interval (Zou and Donner,
    Statistics in Medicine 27, 2008): the stratified normal interval where tasks are large, Wilson's where there is one, and
    still of some width where all answers of a task are right.

    Raises:
        RequestError: there is no task, a task without questions, or one with more right answers than questions.
    """
    if not right:
        raise RequestError("a mean over tasks needs at least one.")
    shares = [r / n if n else 0.0 for r, n in zip(right, asked, strict=True)]
    bounds = [accuracy_interval(r, n, level) for r, n in zip(right, asked, strict=True)]
    middle = math.fsum(shares) / len(shares)
    below = math.hypot(*(share - low for share, (low, _) in zip(shares, bounds, strict=True))) / len(shares)
    above = math.hypot(*(high - share for share, (_, high) in zip(shares, bounds, strict=True))) / len(shares)
    return middle - below, middle + above

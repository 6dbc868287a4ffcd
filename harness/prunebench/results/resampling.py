"""What an evaluation's items are resampled by, and the variance of their weighted mean under it.

Documents where they are known, else moving blocks of `BLOCK` consecutive items (Künsch, Annals of Statistics 17, 1989), else
the questions of each stratum. Every stratum keeps its share of the statistic; within it the statistic is the ratio
`sum(weight * value) / sum(weight)` over what was drawn. Where all units of a stratum are of one size the variance of that ratio
over resamples is known exactly, and nothing is drawn.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prunebench.errors import RequestError

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

BLOCK = 8
"""Consecutive items in a moving block, where documents are unknown."""

RESAMPLES = 4000
"""The standard error's own error is 1 / sqrt(2 * RESAMPLES), about 1%."""

MANY = 2000
"""Documents from which on the resampled variance is given by its limit, which differs from it by less than its own error."""


@dataclass(frozen=True)
class Units:
    """What is resampled: documents, blocks or questions, each in a stratum, strata numbered from 0."""

    stratum: Indices
    size: Floats
    """Sum of the weights of a unit's items."""
    drawn: Floats
    """[strata], how many units make one resampled stratum; of overlapping blocks fewer than there are."""
    weight: Floats
    """[strata], the stratum's share of the statistic."""
    item: Indices | None
    """The unit of each item; None where units are moving blocks."""

    def sums(self, values: Floats) -> Floats:
        """Sums over each unit's items, [rows, items] to [rows, units]."""
        if self.item is None:
            total = np.cumsum(np.pad(values, ((0, 0), (1, 0))), axis=1)
            return np.asarray(total[:, BLOCK:] - total[:, :-BLOCK])
        return np.stack([np.bincount(self.item, row, len(self.size)) for row in values])


@dataclass(frozen=True, eq=False)
class Items:
    """The items of an evaluation: windows of a text in its order, or questions.

    Args:
        weights: of the statistic, [items], positive, sum 1; `equal_weights` and `macro_weights` make the usual ones.
        clusters: the document of each item, whole numbers; items of one document are resampled together.
        strata: the subject, phenomenon or task of each item, whole numbers; without clusters each item of a stratum is
            independent. One task of independent questions has one stratum. With neither clusters nor strata items are
            neighbours in a text, and moving blocks are resampled.

    Raises:
        RequestError: lengths differ, weights are not positive or do not sum to 1, or a document lies in two strata.
    """

    weights: Floats
    clusters: NDArray[np.integer] | None = None
    strata: NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        count = len(self.weights)
        for name, labels in (("clusters", self.clusters), ("strata", self.strata)):
            if labels is not None and labels.shape != (count,):
                raise RequestError(f"there are {count} items and {name} of shape {list(labels.shape)}.")
        if not count or not bool(np.all(self.weights > 0)) or abs(math.fsum(self.weights) - 1) > 1e-9:
            raise RequestError("the weights of items must be positive and sum to 1.")

    @cached_property
    def units(self) -> Units:
        """What is resampled."""
        count = len(self.weights)
        if self.clusters is None and self.strata is None:
            if count < BLOCK:
                return Units(np.zeros(1, np.intp), np.ones(1), np.ones(1), np.ones(1), np.zeros(count, np.intp))
            size: Floats = np.convolve(self.weights, np.ones(BLOCK), "valid")
            return Units(np.zeros(len(size), np.intp), size, np.array([count / BLOCK]), np.ones(1), None)
        strata = np.zeros(count, np.intp) if self.strata is None else np.unique(self.strata, return_inverse=True)[1]
        item = np.arange(count) if self.clusters is None else np.unique(self.clusters, return_inverse=True)[1]
        size = np.asarray(np.bincount(item, self.weights), np.float64)
        stratum = np.zeros(len(size), np.intp)
        stratum[item] = strata
        if not np.array_equal(stratum[item], strata):
            raise RequestError("a document has items in two strata, which are then not independent.")
        weight = np.asarray(np.bincount(stratum, size), np.float64)
        return Units(stratum, size, np.bincount(stratum).astype(np.float64), weight, item)


def equal_weights(count: int) -> Floats:
    """Every item counts the same."""
    return np.full(count, 1 / count)


def macro_weights(strata: NDArray[np.integer]) -> Floats:
    """Every stratum counts the same, and every item within it: the mean over tasks of a task's mean."""
    _, index, counts = np.unique(strata, return_inverse=True, return_counts=True)
    return np.asarray(1 / (len(counts) * counts[index]))


@dataclass(frozen=True)
class Spread:
    """Resampled variances of the statistic of each row of values, by one set of resampled units."""

    variances: Floats
    freedom: float
    """Of the first row's variance."""
    differing: int
    """Units whose first value is not zero; of overlapping blocks no more than fit without overlap."""
    scale: float
    """Largest absolute value of the first row."""

    @classmethod
    def of(cls, rows: Floats, items: Items, seed: int | bytes, resamples: int) -> Spread:
        units = items.units
        sums = units.sums(rows * items.weights)
        values = sums / units.size
        by_stratum = _variances(values, units, seed, resamples)
        variances = by_stratum.sum(axis=1)
        freedom = satterthwaite(by_stratum[0], freedoms(units)) if math.isfinite(variances[0]) else 0.0
        differing = min(int(np.count_nonzero(values[0])), int(units.drawn.sum()))
        # Where most values are 0 and the others 1 or -1, a variance's own relative variance, 2 / freedom, is 1 / differing,
        # however many zeros there are.
        return cls(variances, min(freedom, max(1.0, 2.0 * differing)), differing, float(np.abs(rows[0]).max()))


def satterthwaite(parts: ArrayLike, freedoms: ArrayLike, variance: float | None = None) -> float:
    """Degrees of freedom of a sum of independent estimated variances; `variance` is that sum where some enter negatively."""
    squares = np.asarray(parts, np.float64) ** 2
    total = float(np.sum(parts)) if variance is None else variance
    below = float(np.sum(squares / np.asarray(freedoms, np.float64)))
    return total**2 / below if below > 0 else math.inf


def freedoms(units: Units) -> Floats:
    """[strata], the effective number of units less one; at least 1, which a stratum of one unit gets from the others."""
    counts = np.bincount(units.stratum)
    squares = np.bincount(units.stratum, units.size**2)
    sums = np.bincount(units.stratum, units.size)
    effective = units.drawn * sums**2 / (counts * squares)
    return np.asarray(np.where(counts > 1, np.maximum(1.0, effective - 1), np.maximum(1.0, np.sum(counts - 1))))


def _variances(values: Floats, units: Units, seed: int | bytes, resamples: int) -> Floats:
    """Variance that each stratum gives the statistic, [rows, units] to [rows, strata]; infinite where nothing can be said."""
    stratum, drawn = units.stratum, units.drawn
    counts = np.bincount(stratum)
    if not np.any(drawn >= 2):
        return np.full((len(values), len(drawn)), math.inf)
    share = units.size / np.bincount(stratum, units.size)[stratum]
    means = np.stack([np.bincount(stratum, row * share) for row in values])
    # The first order of the resampled ratio's variance; where all units of a stratum are of one size it is exact.
    residuals = (values - means[:, stratum]) * share * counts[stratum]
    squares = np.stack([np.bincount(stratum, row) for row in residuals**2]) / counts
    found = squares / drawn
    for index in _uneven(units):
        inside = stratum == index
        found[:, index] = _resampled(values[:, inside], share[inside], (round(drawn[index]), index), seed, resamples)
        found[:, index] *= round(drawn[index]) / drawn[index]
    several = drawn >= 2
    found[:, several] *= drawn[several] / (drawn[several] - 1)
    if not several.all():  # a stratum of one unit takes the spread within the others
        within = (found * drawn)[:, several] @ (counts - 1)[several] / np.sum(counts - 1)
        found[:, ~several] = within[:, None]
    return np.asarray(found * units.weight**2)


def _uneven(units: Units) -> list[int]:
    """Strata whose units are of several sizes, and not so many that resampling would only add noise."""
    largest, smallest = np.zeros(len(units.drawn)), np.full(len(units.drawn), math.inf)
    np.maximum.at(largest, units.stratum, units.size)
    np.minimum.at(smallest, units.stratum, units.size)
    counts = np.bincount(units.stratum)
    return [int(index) for index in np.flatnonzero((largest > smallest * (1 + 1e-9)) & (counts > 1) & (counts < MANY))]


def _resampled(values: Floats, share: Floats, draw: tuple[int, int], seed: int | bytes, resamples: int) -> Floats:
    """[rows], the variance of the ratio `sum(share * value) / sum(share)` over resampled units."""
    number = int.from_bytes(hashlib.sha256(seed).digest()) if isinstance(seed, bytes) else int(seed)
    times = _times(len(share), *draw, number, resamples)
    total = times @ share
    return np.array([np.var(times @ (row * share) / total) for row in values])  # row by row: the same bits beside other rows


@lru_cache(maxsize=2)  # both estimands of a pair are resampled alike
def _times(units: int, drawn: int, stratum: int, seed: int, resamples: int) -> Floats:
    """How often each unit is drawn, [resamples, units]."""
    generator = np.random.default_rng([abs(seed), int(seed < 0), stratum])
    return generator.multinomial(drawn, np.full(units, 1 / units), size=resamples).astype(np.float64)

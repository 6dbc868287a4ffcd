"""Paired differences of two methods: what the same items and seeds can tell apart.

A value `differences[seed, item]` is A minus B (nats of a window, or 1 and 0 of an answer); the statistic is the weighted mean
over items of its mean over seeds. Two estimands, never mixed:

* `new_items`: these seeds, new text. Documents are resampled where they are known, else moving blocks of `BLOCK` consecutive
  items; questions within their strata. The standard error is the deviation over resamples times `sqrt(n / (n - 1))`, the
  quantile t's with the effective number of documents less one as degrees of freedom, `1 / sum(share^2) - 1`: where few
  documents are most of the text the usual `n - 1` covers too little. Simulations: `harness/decisions/0007-intervals.md`.
* `new_seeds_too`: seeds and items crossed, both random. Variance = seed part + item part - the part of their interaction, which
  is in both; degrees of freedom by Satterthwaite (Biometrics Bulletin 2, 1946).

Interval and p-value come from one t statistic: p < 1 - level exactly where the interval leaves out zero. Swapping A and B turns
the interval round and keeps p, given one seed for both orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri, stdtr, stdtrit

from prunebench.errors import NonFiniteError, RequestError
from prunebench.results.resampling import BLOCK, RESAMPLES, Floats, Items, Spread, freedoms, satterthwaite

SEEDS_FOR_RANKS = 5
"""With fewer, the seed part rests on so few numbers that no rank may rest on it."""

_ROUNDING = 1e-12
"""Spread below this share of the values is rounding."""


@dataclass(frozen=True)
class Difference:
    """A paired difference, A minus B, with its uncertainty.

    Where the data can give no interval (one document, one seed for `new_seeds_too`) it reaches from -inf to inf and p is 1.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    """Two-sided, of no difference."""
    standard_error: float
    degrees_of_freedom: float
    level: float
    supports_rank: bool = True

    @property
    def is_known(self) -> bool:
        """Whether there is an interval at all."""
        return math.isfinite(self.standard_error)

    @property
    def is_significant(self) -> bool:
        """Before any correction for many comparisons."""
        return self.p_value < 1 - self.level


def new_items(
    differences: ArrayLike, items: Items, seed: int | bytes, level: float = 0.95, resamples: int = RESAMPLES
) -> Difference:
    """These seeds, new text: the difference that ranks rest on.

    Args:
        differences: [seeds, items] or [items], A minus B.
        items: their weights and what they are resampled by.
        seed: of the resampling; from the ids of the records, the same for A against B and B against A.
        level: of the interval.
        resamples: how often documents of unequal size are resampled; for all else the resampled variance is known exactly.

    Raises:
        NonFiniteError: a difference is not finite.
        RequestError: there is not one column an item.
    """
    mean = _checked(differences, items).mean(axis=0, keepdims=True)
    estimate = float(mean[0] @ items.weights)
    spread = Spread.of(mean, items, seed, resamples)
    return _difference(estimate, float(spread.variances[0]), spread.freedom, spread, level)


def new_seeds_too(
    differences: ArrayLike, items: Items, seed: int | bytes, level: float = 0.95, resamples: int = RESAMPLES
) -> Difference:
    """New seeds and new text: both vary, crossed.

    With `m_s` the statistic of seed s, the seed part is `var(m_s) / seeds`; the item part is the variance that `new_items` has;
    the interaction, which both contain, is the item part of the seeds' deviations from their mean. Their balance is that of the
    crossed analysis of variance, `(MS_seed + MS_item - MS_both) / (seeds * items)` for equal weights and independent items; it
    is never taken below the larger of the two parts. Two deterministic methods, given as equal rows, have no seed part.

    Args:
        differences: [seeds, items], A minus B; a deterministic method stands in every row. One row has no interval.
        items: as for `new_items`, and so are `seed`, `level` and `resamples`.
        seed: of the resampling.
        level: of the interval.
        resamples: of documents.

    Raises:
        NonFiniteError: a difference is not finite.
        RequestError: there is not one column an item.
    """
    table = _checked(differences, items)
    seeds = len(table)
    mean = table.mean(axis=0, keepdims=True)
    estimate = float(mean[0] @ items.weights)
    ranks = seeds >= SEEDS_FOR_RANKS
    spread = Spread.of(np.concatenate([mean, table - mean]), items, seed, resamples)
    if seeds == 1 or not math.isfinite(spread.variances[0]):
        return _unknown(estimate, level, ranks)
    by_seed = float(np.var((table - mean) @ items.weights, ddof=1)) / seeds
    by_item = float(spread.variances[0])
    by_both = float(spread.variances[1:].sum()) / (seeds * (seeds - 1))
    variance = max(by_seed + by_item - by_both, by_seed, by_item)
    freedom = satterthwaite((by_seed, by_item, by_both), (seeds - 1, spread.freedom, (seeds - 1) * spread.freedom), variance)
    freedom = max(freedom, min(seeds - 1, spread.freedom))
    return _difference(estimate, variance, freedom, spread, level, supports_rank=ranks)


def smallest_detectable(standard_error: float, degrees_of_freedom: float, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest true difference that would have been found, at this level, with this probability.

    `(t(1 - (1 - level) / 2) + t(power)) * standard_error`, both quantiles of t with these degrees of freedom (normal ones where
    they are infinite); for comparisons corrected by Bonferroni or Holm give `level = 1 - 0.05 / pairs`.
    """
    return (_quantile(degrees_of_freedom, (1 + level) / 2) + _quantile(degrees_of_freedom, power)) * standard_error


def planned_difference(
    items: Items,
    deviation: float,
    shared: float = 0.2,
    seeds: int = 1,
    seed_deviation: float = 0.0,
    level: float = 0.95,
    power: float = 0.8,
) -> float:
    """The smallest difference that a suite not yet run could show with this probability, in the unit of `deviation`.

    Args:
        items: weights, and documents or strata where known; without both, blocks of `BLOCK` stand for documents.
        deviation: standard deviation of an item's paired difference, assumed or from an earlier run.
        shared: correlation of two items of a document (about 0.2 for neighbouring windows of wiki7m's pruned models).
        seeds: how many, for the estimand of new seeds.
        seed_deviation: standard deviation over seeds of the difference; 0 for the estimand of these seeds.
        level: of the test.
        power: the probability.
    """
    units = items.units
    item = np.arange(len(items.weights)) // BLOCK if units.item is None else units.item
    size = np.bincount(item, items.weights)
    alone = float(np.sum(items.weights**2))
    by_item = deviation**2 * ((1 - shared) * alone + shared * float(np.sum(size**2)))
    by_seed = seed_deviation**2 / seeds
    freedom = satterthwaite(np.bincount(units.stratum, units.size**2), freedoms(units))
    if not np.any(units.drawn >= 2) or (by_seed > 0 and seeds < 2):
        return math.inf
    if by_seed > 0:
        freedom = satterthwaite((by_seed, by_item), (seeds - 1, freedom))
    return smallest_detectable(math.sqrt(by_item + by_seed), freedom, level, power)


def _checked(differences: ArrayLike, items: Items) -> Floats:
    table = np.atleast_2d(np.asarray(differences, np.float64))
    if table.ndim != 2 or table.shape[1] != len(items.weights) or not len(table):
        raise RequestError(f"differences of shape {list(table.shape)} do not fit {len(items.weights)} items.")
    if not np.all(np.isfinite(table)):
        raise NonFiniteError(f"{int(np.sum(~np.isfinite(table)))} of {table.size} differences are not finite.")
    return table


def _difference(
    estimate: float, variance: float, freedom: float, spread: Spread, level: float, supports_rank: bool = True
) -> Difference:
    """Interval and p-value from one t statistic, and the cases without spread."""
    error = math.sqrt(variance)
    if math.isfinite(error) and error > _ROUNDING * spread.scale:
        reach = _quantile(freedom, (1 + level) / 2) * error
        p_value = min(1.0, 2 * float(stdtr(freedom, -abs(estimate) / error)))
        return Difference(estimate, estimate - reach, estimate + reach, p_value, error, freedom, level, supports_rank)
    if error <= _ROUNDING * spread.scale:
        # Without spread t says nothing; were there no difference, all signs would be alike by chance with this probability.
        p_value = 1.0 if abs(estimate) <= _ROUNDING * spread.scale else 2.0 ** (1 - spread.differing)
        if abs(estimate) <= _ROUNDING * spread.scale or p_value < 1 - level:
            return Difference(estimate, estimate, estimate, p_value, 0.0, freedom, level, supports_rank)
    return _unknown(estimate, level, supports_rank)


def _unknown(estimate: float, level: float, supports_rank: bool) -> Difference:
    return Difference(estimate, -math.inf, math.inf, 1.0, math.inf, 0.0, level, supports_rank)


def _quantile(freedom: float, probability: float) -> float:
    return float(ndtri(probability) if math.isinf(freedom) else stdtrit(freedom, probability))

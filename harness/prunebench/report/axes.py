"""Axes with few round ticks: linear, or logarithmic where values span a lot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

SPANS = 6.0
"""The largest value over the smallest from which on a logarithmic axis shows more."""

_FEWEST = 3
_MOST = 8
_WITHIN = 5.0
"""Of two ends of a logarithmic axis, the larger over the smaller up to which linear steps are spaced well enough."""


@dataclass(frozen=True)
class Axis:
    """Where an axis begins and ends, in values, and its ticks."""

    logarithmic: bool
    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """Where a value stands: 0 at the beginning, 1 at the end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def value_axis(values: Iterable[float], *, always: bool = False, linear: bool = False) -> Axis:
    """An axis that has room around finite values.

    Args:
        values: what it shows; those that are not finite are left out.
        always: logarithmic even where values span little, if all are above zero.
        linear: never logarithmic.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low > 0 and not linear and (always or high / low >= SPANS):
        room = max((high / low) ** 0.06, 1.02)
        low, high = low / room, high * room
        return Axis(True, low, high, _logarithmic(low, high))
    room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    low, high = low - room, high + room
    return Axis(False, low, high, _round(low, high))


def _round(low: float, high: float) -> tuple[float, ...]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / _FEWEST))
    step = next(s * power for s in (5.0, 2.0, 1.0, 0.5) if (high - low) / (s * power) >= _FEWEST)
    first = math.ceil(low / step)
    return tuple(float(f"{k * step:.12g}") for k in range(first, math.floor(high / step) + 1))


def _logarithmic(low: float, high: float) -> tuple[float, ...]:
    """1, 2 and 5 of each power of ten, or only the powers; within one, as on a linear axis."""
    if high / low < _WITHIN:
        return _round(low, high)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1, 2, 3, 5), (1, 2, 5), (1,)):
        ticks = tuple(float(f"{part * 10.0**power:.12g}") for power in powers for part in parts)
        ticks = tuple(tick for tick in ticks if low <= tick <= high)
        if _FEWEST <= len(ticks) <= _MOST:
            return ticks
    return ticks[:: math.ceil(len(ticks) / _MOST)] if len(ticks) > _MOST else _round(low, high)

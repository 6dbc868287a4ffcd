"""The marks of pictures: rows with their bands, who of them is beaten by nobody, and published numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prunebench.results.beside import Beside, differences, measured_in
from prunebench.results.board import Section
from prunebench.results.records import RunRecord
from prunebench.results.rows import DENSE, Row
from prunebench.targets import parse_target

PRUNE_SECONDS, PEAK_MIB, SPEED_UP = "prune s", "peak MiB", "speed-up"
COSTS = (PRUNE_SECONDS, PEAK_MIB, SPEED_UP)
"""What quality is set against; of a speed-up more is better. It is also the unit of the scores that are one."""

MOST_EXPONENT = 700.0
"""Of a ratio's logarithm: its exponential must be a number."""


@dataclass(frozen=True)
class Mark:
    """One row of a table as a mark in a picture."""

    method: str
    target: str
    """`dense` for a control."""
    ids: tuple[str, ...]
    value: float
    """Mean over seeds, in the figure's `quality`: shares in per cent."""
    low: float
    high: float
    """The 95% interval of the paired difference from dense, laid on dense's value; the value itself where there is none."""
    prune_seconds: float
    peak_bytes: int | None
    shared_machine: bool
    speedup: float | None
    """The mean of the runs' scores whose unit is `speed-up`, or None."""
    trained: bool
    rank: str
    seeds: str

    @property
    def is_control(self) -> bool:
        """Whether nothing was pruned."""
        return self.target == DENSE

    @property
    def sparsity(self) -> float:
        """The share of zeros asked for."""
        return parse_target(self.target).sparsity

    def cost(self, name: str) -> float | None:
        """One of `COSTS`, or None where it was not measured."""
        if name == PEAK_MIB:
            return None if self.peak_bytes is None else self.peak_bytes / 2**20
        return self.prune_seconds if name == PRUNE_SECONDS else self.speedup


@dataclass(frozen=True)
class Hollow:
    """A published number that stands beside ours (`results/beside.py`), drawn hollow; it has no cost of its own."""

    label: str
    """The paper and its table."""
    method: str
    target: str
    value: float
    """In the figure's `quality`."""


def front_of(marks: Iterable[Mark], cost: str, higher_is_better: bool) -> tuple[str, ...]:
    """The methods that nobody beats: no other is as good in quality and cost and better in one of them.

    Means decide, not bands, so a neighbour of the front may be as good. Sharing a machine only adds to the costs of pruning, so
    whom such a mark beats is beaten, and where none beats it none does; beaten itself, it is left open. Of speed-ups that is
    not so: there it neither stands in the front nor keeps others out of it. Nor do controls, and what has no such number. Of
    marks that are equal in both all stand there.

    Args:
        marks: of one table.
        cost: one of `COSTS`.
        higher_is_better: of the quality.
    """
    places = {}
    for mark in marks:
        paid = mark.cost(cost)
        if mark.is_control or (mark.shared_machine and cost == SPEED_UP):
            continue
        if paid is not None and math.isfinite(paid + mark.value):
            places[mark.method] = (-paid if cost == SPEED_UP else paid, -mark.value if higher_is_better else mark.value)
    front, least = [], math.inf
    for place in sorted(set(places.values())):  # by cost, so that only quality is left to be beaten
        if place[1] < least:
            front += sorted(method for method, own in places.items() if own == place)
            least = place[1]
    return tuple(reversed(front) if cost == SPEED_UP else front)


def band_of(row: Row, is_ratio: bool) -> tuple[float, float]:
    """The interval of a row's difference from dense, laid on dense's value; the row's mean twice where there is none.

    Of perplexities the difference is one of logarithms, so dense's value is multiplied by its exponential. The interval is
    that of *these seeds, new text*; over several seeds its middle is a geometric mean, a little below the row's own.
    """
    if row.versus is None or row.dense is None or not row.versus.is_known:
        return row.mean, row.mean
    ends = (row.versus.low, row.versus.high)
    if is_ratio:
        low, high = (row.dense * math.exp(end) if end < MOST_EXPONENT else math.inf for end in ends)
    else:
        low, high = (row.dense + end for end in ends)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else (row.mean, row.mean)


def hollows_of(section: Section, runs: Iterable[RunRecord], matched: Sequence[Beside]) -> tuple[Hollow, ...]:
    """The published numbers of the very thing that a section measured, each once.

    Args:
        section: where they would be drawn.
        runs: of its rows, with no other scores than the section's.
        matched: published numbers beside which something of ours stands.
    """
    tasks = section.conditions.get("tasks")
    names = list(tasks) if isinstance(tasks, dict) else []
    mean_of = section.conditions.get("set") or (names[0] if len(names) == 1 else None)
    found = {}
    for record in runs:
        spec = record.spec
        for candidate in measured_in(record):
            if candidate.metric != "perplexity" and candidate.subject != mean_of:
                continue  # one task's accuracy, where the picture shows the mean of many
            ours = (candidate.metric, candidate.subject, spec.model.source.partition("@")[0], spec.method, spec.target)
            for number in (one.published for one in matched):
                theirs = (number.metric, number.task or number.conditions.data, number.model, number.method, number.target)
                if ours == theirs and not differences(number, candidate):
                    found[number.place, spec.method, spec.target] = number.value
    return tuple(Hollow(label, method, target, value) for (label, method, target), value in found.items())

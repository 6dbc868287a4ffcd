"""What became of the rows of a results folder: the nouns of `prunebench compare BEFORE AFTER`, and their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from prunebench.results.statistics import Difference

Outcome = Literal["worsened", "improved", "within noise", "the same", "cannot be told", "no score", "vanished", "appeared"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""In the order in which they are counted. `within noise`: answers differ, and no more than chance would have it; `no score`:
failed or refused on both sides."""

COST_FACTOR = 1.25
"""How many times as large a cost must be to be told."""

LEAST_SECONDS = 0.1
"""Prune seconds that differ by less are not told: of a method that takes no time the clock's own noise is a large factor."""


@dataclass(frozen=True)
class Label:
    """Which row, as a person reads it."""

    model: str
    method: str
    target: str
    weights: str
    dtype: str
    recipe: str
    """Fingerprint of all it was given besides the weights."""

    @property
    def short(self) -> tuple[str, str, str]:
        """What is printed of it."""
        return self.model, self.method, self.target


@dataclass(frozen=True)
class Side:
    """What one folder has of a row's score."""

    machine: str
    seeds: tuple[int | None, ...]
    value: float | None
    """Mean over the seeds that both folders have, where both have one; None without a score, or where it has no mean."""
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One score of one row, before and after."""

    outcome: Outcome
    label: Label
    scores: tuple[str, ...]
    """One name where values are compared; several where all of a row vanished, appeared or failed alike."""
    before: Side | None
    after: Side | None
    unit: str = ""
    higher_is_better: bool = False
    is_share: bool = False
    is_ratio: bool = False
    difference: Difference | None = None
    """After minus before: these seeds, new text. Of perplexities the difference of their logarithms."""
    corrected: float | None = None
    """The p-value after Holm's correction over all rows whose answers differ."""
    notes: tuple[str, ...] = ()
    """Why it cannot be told, how a run failed, and what else is not as it was: revisions, the machine, seeds."""
    apart: tuple[str, ...] = ()
    """What tells it from rows that read alike: weights, dtype or recipe."""


@dataclass(frozen=True)
class CostChange:
    """A cost of a row on the same machine, which no other process shared."""

    label: Label
    machine: str
    cost: Literal["prune seconds", "peak memory"]
    before: float
    """Seconds or bytes, means over the seeds that both folders have."""
    after: float

    @property
    def factor(self) -> float:
        """How many times as large it is now."""
        return self.after / self.before if self.before else float("inf")

    @property
    def grew(self) -> bool:
        """Slower, or larger."""
        return self.after > self.before


@dataclass(frozen=True)
class Changes:
    """Two folders of results."""

    records: tuple[int, int]
    """How many runs each has."""
    rows: tuple[Change, ...]
    costs: tuple[CostChange, ...]

    def of(self, outcome: Outcome) -> list[Change]:
        """Those that ended so."""
        return [change for change in self.rows if change.outcome == outcome]

    def worsened(self, with_costs: bool = False) -> bool:
        """Whether a guard should stop: a score is worse beyond noise, a run is lost, or, if asked, a cost grew."""
        return bool(self.of("worsened")) or (with_costs and any(cost.grew for cost in self.costs))

    @property
    def counts(self) -> Mapping[Outcome, int]:
        """How many ended how, all outcomes."""
        return {outcome: len(self.of(outcome)) for outcome in OUTCOMES}

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "records": {"before": self.records[0], "after": self.records[1]},
            "counts": {**self.counts},
            "rows": [_row(change) for change in self.rows],
            "costs": [
                {**vars(cost.label), "machine": cost.machine, "cost": cost.cost, "before": cost.before, "after": cost.after}
                for cost in self.costs
            ],
        }


def told_apart(changes: Sequence[Change]) -> list[Change]:
    """Rows that a person would read as one bear the remark in what they differ: weights, dtype or recipe."""
    alike: dict[tuple[str, str, str], set[Label]] = {}
    for change in changes:
        alike.setdefault(change.label.short, set()).add(change.label)
    found = []
    for change in changes:
        others = alike[change.label.short]
        differing = [name for name in ("weights", "dtype", "recipe") if len({getattr(other, name) for other in others}) > 1]
        remarks = tuple(f"{name} {getattr(change.label, name)}" for name in differing)
        found.append(replace(change, apart=remarks))
    return found


def _row(change: Change) -> dict[str, Any]:
    found = change.difference
    told = found is not None and found.is_known
    return {
        "outcome": change.outcome,
        **vars(change.label),
        "scores": list(change.scores),
        "unit": change.unit,
        "higher_is_better": change.higher_is_better,
        "before": None if change.before is None else vars(change.before),
        "after": None if change.after is None else vars(change.after),
        "logarithmic": change.is_ratio,
        "difference": found.estimate if found and told else None,
        "interval": [found.low, found.high] if found and told else None,
        "p": found.p_value if found and told else None,
        "corrected_p": change.corrected,
        "notes": list(change.notes),
    }

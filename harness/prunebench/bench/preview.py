"""What a suite would take, before any of it is run: downloads, runs, time, memory, and the differences that it could show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from prunebench.bench.costs import Work
from prunebench.bench.estimate import Estimate, Estimator
from prunebench.bench.experience import Basis
from prunebench.bench.plan import Planner
from prunebench.results.comparison import LoadItems
from prunebench.results.content import fingerprint
from prunebench.results.planning import Figure, figure
from prunebench.results.records import RunRecord
from prunebench.toolkit.hub import Download


@dataclass(frozen=True)
class Cost:
    """What the runs of one model would take, one after the other."""

    model: str
    runs: int
    seconds: float
    peak_bytes: int


@dataclass
class Preview:
    """All that `run --dry-run` shows."""

    planner: Planner
    records: Sequence[RunRecord]
    """The latest of each run, of any machine."""
    load: LoadItems
    """Gives a score's raw answers."""
    downloads: list[Download]
    todo: list[Work]
    done: list[Work]
    here: bool = True
    """Runs are on this machine, whose rates can be measured; without it there are no estimates."""

    @cached_property
    def estimator(self) -> Estimator:
        """By the records of this machine."""
        return Estimator.of(self.planner, self.records)

    @cached_property
    def estimates(self) -> list[Estimate | None]:
        """Of each run that is to do."""
        return [self.estimator.estimate(work) if self.here else None for work in self.todo]

    @cached_property
    def costs(self) -> list[Cost]:
        """What is to do, by model."""
        found: dict[tuple[str, str], list[Estimate]] = {}
        for work, estimate in zip(self.todo, self.estimates, strict=True):
            if estimate is not None:
                found.setdefault((work.model.name, work.dtype), []).append(estimate)
        return [_cost(name, estimates) for (name, _), estimates in found.items()]

    @cached_property
    def bases(self) -> dict[Basis, float]:
        """Shares of the seconds by what they rest on."""
        found = Counter[Basis]()
        for estimate in self.estimates:
            found.update(estimate.bases if estimate else {})
        total = sum(found.values()) or 1.0
        return {basis: seconds / total for basis, seconds in found.items()}

    @cached_property
    def figures(self) -> list[tuple[str, str, Figure | None]]:
        """For each model and evaluation the difference it could show."""
        found = {}
        for work in [*self.todo, *self.done]:
            for spec in work.evals:
                key = (work.model.name, spec.text, fingerprint(spec.conditions))
                if key not in found:
                    found[key] = figure(spec.conditions, self.records, self.load)
        return [(name, text, value) for (name, text, _), value in found.items()]


def _cost(model: str, estimates: Sequence[Estimate]) -> Cost:
    predictions = [estimate.prediction for estimate in estimates]
    seconds, peak = sum(found.seconds for found in predictions), max(found.peak_bytes for found in predictions)
    return Cost(model, len(predictions), seconds, peak)

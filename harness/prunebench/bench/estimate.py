"""What runs will take, before they are run: the cost model, a machine's rates, and what its records make of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from prunebench.bench.costs import RatesFor, Work, eval_bytes, step_bytes
from prunebench.bench.experience import Basis, Experience, parts, past_of
from prunebench.bench.floors import run_floors
from prunebench.bench.machine_rates import machine_rates
from prunebench.bench.plan import Planner, Prediction, RunRequest
from prunebench.bench.rates import Rates, rates_of
from prunebench.bench.specs import build_method
from prunebench.plugins import Registry
from prunebench.results.records import RunRecord
from prunebench.toolkit.loading import ModelSource, shape_of
from prunebench.toolkit.model_shape import ModelShape
from prunebench.toolkit.spread import devices_of


@dataclass(frozen=True)
class Estimate:
    """What a run will take, and what that rests on."""

    prediction: Prediction
    bases: Mapping[Basis, float]
    """Seconds by what they rest on."""


@dataclass
class Estimator:
    """Estimates runs on one machine."""

    machine: str
    device: str
    threads: int
    registry: Registry
    records: Sequence[RunRecord] = ()
    """Of the machine."""
    rates: dict[tuple[str, str], Rates] = field(default_factory=dict)
    """Of one thread, by the model's name and the dtype, where they were needed."""
    _experiences: dict[tuple[str, str], Experience] = field(default_factory=dict)

    @classmethod
    def of(cls, planner: Planner, records: Iterable[RunRecord]) -> Estimator:
        """With the records that are of the planner's machine; what was scored again has another record's costs of pruning."""
        own = [record for record in records if record.machine == planner.machine and record.rescored_from is None]
        threads = planner.suite.limits.threads or torch.get_num_threads()
        return cls(planner.machine, planner.device, threads, planner.registry, own)

    def estimate(self, work: Work) -> Estimate:
        """What a run will take.

        Raises:
            PluginError: a pruner does not say what it computes.
        """
        experience, bases = self._experience(work), dict[Basis, float]()
        planned = parts(work, self._rates(work, self.threads))
        for part in planned:
            seconds, basis = experience.seconds(part)
            bases[basis] = bases.get(basis, 0.0) + seconds
        peaks = [eval_bytes(work, self.on_host)] if work.evals else []
        steps = [part for part in planned if part.kind == "step"]
        for part, efforts in zip(steps, work.efforts(), strict=True):
            peaks.append(experience.peak_bytes(part) or step_bytes(efforts, work, self.on_host))
        return Estimate(Prediction(sum(bases.values()), max(peaks, default=0)), bases)

    @cached_property
    def on_host(self) -> bool:
        """Whether runs are on the CPU, and memory is the process's."""
        return not self.device.startswith("cuda")

    def _experience(self, work: Work) -> Experience:
        """Records, seen with the rates at this model's sizes."""
        key = (work.model.name, work.dtype)
        if key not in self._experiences:
            known = {work.weights: work.shape} if work.weights else {}
            found = past_of(self.records, self.registry, lambda threads: self._rates(work, threads), known)
            self._experiences[key] = Experience(self.threads, found)
        return self._experiences[key]

    def _rates(self, work: Work, threads: int) -> RatesFor:
        def rates(dtype: str) -> Rates:
            key = (work.model.name, dtype)
            if key not in self.rates:
                self.rates[key] = rates_of(work.shape, dtype, str(devices_of(self.device)[0]), self.machine)
            return self.rates[key].times(threads) if self.on_host else self.rates[key]

        return rates


def with_predictions(
    requests: Iterable[RunRequest], records: Iterable[RunRecord], planner: Planner, folder: Path | None = None
) -> list[RunRequest]:
    """The requests, each with what it is expected to take, and what no implementation avoids.

    Args:
        requests: all that are to do.
        records: the latest of each run, of any machine.
        planner: who made the requests.
        folder: of the machine in a results folder, which keeps what the machine can do; without it floors stay unknown.

    Raises:
        PluginError: a pruner does not say what it computes.
        WriteError: what the machine can do cannot be written.
    """
    asked = list(requests)
    estimator = Estimator.of(planner, records)
    works = known_work(asked, planner.registry)
    rates = machine_rates(folder, planner.machine, planner.device).times(estimator.threads) if folder and asked else None
    return [
        replace(request, predicted=estimator.estimate(work).prediction, floors=run_floors(work, rates) if rates else ())
        for request, work in zip(asked, works, strict=True)
    ]


def known_work(requests: Iterable[RunRequest], registry: Registry) -> list[Work]:
    """Runs whose model and texts are here."""
    shapes: dict[ModelSource, ModelShape] = {}

    def shape(source: ModelSource) -> ModelShape:
        if source not in shapes:
            shapes[source] = shape_of(source)
        return shapes[source]

    return [_known(request, shape(request.model), registry) for request in requests]


def _known(request: RunRequest, shape: ModelShape, registry: Registry) -> Work:
    pruners = build_method([step.text for step in request.spec.steps], registry).pruners
    training = request.tokens.get("training")
    windows, window = training.shape if training is not None else (0, 0)
    return Work.of(request.spec, request.model, shape, pruners, (windows, window), request.batch_size)

"""What a suite would take, before any of it is run: downloads, runs, time, memory, and the differences that it could show.

Seconds are those of records of this machine where there are some, run by run and evaluation by evaluation. Otherwise they are
operations over the rate of a plain matrix product: a forward pass has two operations a parameter and token; statistics take two
passes over the calibration tokens, gradients three more, training three over the training tokens. That is rough: pruning took
0.5 to 3 times as long in 33 of 39 rows of wiki7m, and 9 to 22 times in the 6 that optimise block by block, which no declaration
tells. A small model on a large device takes longer too.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch

from prunebench.answers import ask
from prunebench.bench.evals.windows import MAX_LOGITS
from prunebench.bench.plan import Planner, RunRequest
from prunebench.bench.runner import threads
from prunebench.bench.specs import build_method
from prunebench.plugins import Registry
from prunebench.results.planning import Asked, Figure, figure
from prunebench.results.records import EvalSpec, RunRecord, fingerprint
from prunebench.results.store import ResultStore
from prunebench.spec import Needs, Pruner
from prunebench.toolkit.calibration import DEFAULT_LENGTH
from prunebench.toolkit.hub import Download
from prunebench.toolkit.loading import DTYPES, ModelShape, ModelSource, shape_of

QUESTION_TOKENS, PAIR_TOKENS = 4 * 64, 2 * 16
"""Assumed: four answers to a question, each read with the question before it; or two sentences, in blimp and in `…pairs`."""

START_SECONDS, READ_BYTES, START_BYTES = 0.5, 1e9, 300 << 20
"""Of a run: until the weights are read, bytes of them that are read in a second, and the libraries on the host."""

ACTIVATIONS = 17
"""Values that a block keeps of each token and hidden column for its gradients (Korthikanti et al. 2022, arXiv 2205.05198)."""

RATE_SECONDS, LARGEST = 0.3, 8192
"""How long the rate is measured, and rows of the largest matrix."""


@dataclass(frozen=True)
class Work:
    """A run, as far as its cost depends on it."""

    model: ModelSource
    weights: str | None
    """Hash of the weights; None where they are not here."""
    shape: ModelShape
    dtype: str
    method: str
    target: str
    seed: int | None
    tokens: int
    """Tokens that go through a forward pass while pruning, those of several passes counted as often."""
    held: int
    """Calibration tokens, whose hidden states are kept."""
    trains: bool
    evals: tuple[EvalSpec, ...]
    """With their conditions, or as much as is known of them."""
    id: str | None = None

    @property
    def weight_bytes(self) -> int:
        """In the run's dtype."""
        return self.shape.parameters * DTYPES[self.dtype].itemsize

    def eval_tokens(self, spec: EvalSpec) -> int:
        """Tokens that go through a forward pass of any model in an evaluation."""
        asked = Asked.by(spec.conditions)
        models = 2 if _reads_dense(spec) else 1
        questions = sum(
            count * (PAIR_TOKENS if name.startswith("blimp") or name.endswith("pairs") else QUESTION_TOKENS)
            for name, count in asked.questions
        )
        return asked.windows * asked.window * models + questions

    def pruning_bytes(self, batch: int) -> int:
        """Weights, hidden states of all calibration tokens before and behind a block, a batch's logits; what training takes."""
        held = 2 * self.held * self.shape.hidden * DTYPES[self.dtype].itemsize
        trained = 0
        if self.trains:  # a gradient and two moments, were all of it trained; what a batch leaves for the way back
            kept = ACTIVATIONS * self._read(batch) * self.shape.layers * self.shape.hidden
            trained = 4 * (3 * self.shape.parameters + kept)
        return self.weight_bytes + held + trained + self._logits(batch)

    def measuring_bytes(self, batch: int) -> int:
        """Weights, those of the dense model where it is read too, and a batch's logits."""
        return self.weight_bytes * (2 if any(map(_reads_dense, self.evals)) else 1) + self._logits(batch)

    def _read(self, batch: int) -> int:
        return batch * min(self.shape.context, DEFAULT_LENGTH)

    def _logits(self, batch: int) -> int:
        return 4 * min(self._read(batch) * self.shape.vocabulary, MAX_LOGITS)


@dataclass(frozen=True)
class Cost:
    """What the runs of one model would take."""

    model: str
    runs: int
    seconds: float
    peak_bytes: int
    records: int
    """From which seconds come."""
    assumed: int
    """Runs of which at least a part is estimated from operations."""


@dataclass
class Preview:
    """All that `run --dry-run` shows."""

    planner: Planner
    store: ResultStore
    downloads: list[Download]
    todo: list[Work]
    done: list[Work]
    rates: dict[str, float] = field(default_factory=dict)
    """Operations a second by dtype, where they were needed."""

    @cached_property
    def costs(self) -> list[Cost]:
        """What is to do, by model."""
        models = dict.fromkeys((work.model, work.dtype) for work in self.todo)
        return [self._cost([work for work in self.todo if (work.model, work.dtype) == model]) for model in models]

    @cached_property
    def figures(self) -> list[tuple[str, str, Figure | None]]:
        """For each model and evaluation the difference it could show."""
        found = {}
        for work in [*self.todo, *self.done]:
            for spec in work.evals:
                key = (work.model.name, spec.text, fingerprint(spec.conditions))
                if key not in found:
                    found[key] = figure(spec.conditions, self._records, self.store.items)
        return [(name, text, value) for (name, text, _), value in found.items()]

    @cached_property
    def _records(self) -> list[RunRecord]:
        return [stored.record for stored in self.store.latest()]

    def _cost(self, runs: Sequence[Work]) -> Cost:
        own = [record for record in self._records if record.status == "ok" and self._is_of(record, runs[0])]
        pruning: dict[tuple[str, str], list[tuple[str, float]]] = {}
        measuring: dict[str, list[tuple[str, float]]] = {}
        peaks: dict[tuple[str, str], int] = {}
        for record in own:
            names = {fingerprint(spec.conditions): spec.text for spec in record.spec.evals}
            for score in record.scores.values():
                measuring.setdefault(names.get(fingerprint(score.conditions), ""), []).append((record.id, score.seconds))
            key = (record.spec.method, record.spec.target)
            left = record.provenance.seconds - sum(score.seconds for score in record.scores.values())
            pruning.setdefault(key, []).append((record.id, left))
            peaks[key] = max(peaks.get(key, 0), record.peak_bytes or 0)
        libraries = 0 if self.planner.device.startswith("cuda") else START_BYTES
        batch = self.planner.suite.limits.batch_size
        seconds, used, assumed, peak = 0.0, set(), 0, 0
        for work in runs:
            start = START_SECONDS + work.weight_bytes / READ_BYTES
            parts = [(pruning.get((work.method, work.target)), work.tokens, start)]
            parts += [(measuring.get(spec.text), work.eval_tokens(spec), 0.0) for spec in work.evals]
            for recorded, tokens, more in parts:
                if recorded:
                    used |= {record for record, _ in recorded}
                    seconds += fmean(value for _, value in recorded)
                else:
                    seconds += more + 2 * work.shape.multiplied * tokens / self._rate(work.dtype)
            assumed += any(not recorded and (tokens or more) for recorded, tokens, more in parts)
            own_peak = peaks.get((work.method, work.target)) or libraries + work.pruning_bytes(batch)
            peak = max(peak, own_peak, libraries + work.measuring_bytes(batch))
        return Cost(runs[0].model.name, len(runs), seconds, peak, len(used), assumed)

    def _is_of(self, record: RunRecord, work: Work) -> bool:
        """Whether a record is of this machine and of a run's model."""
        model = record.spec.model
        same = model.weights == work.weights if work.weights else model.source == work.model.source
        return same and model.dtype == work.dtype and record.machine == self.planner.machine

    def _rate(self, dtype: str) -> float:
        if dtype not in self.rates:
            device, cores = self.planner.device, self.planner.suite.limits.threads or torch.get_num_threads()
            self.rates[dtype] = matrix_rate(device, dtype) * (1 if device.startswith("cuda") else cores)
        return self.rates[dtype]


def matrix_rate(device: str, dtype: str) -> float:
    """Operations a second of a product of square matrices, the best of sizes that grow until one takes a while.

    On a CPU those of one core: several would wait for each other wherever another process has one of them.
    """
    size, best = 256, 0.0
    with threads(1):
        _product(size, device, dtype)  # a device wakes up, libraries are loaded
        deadline = time.perf_counter() + RATE_SECONDS
        while time.perf_counter() < deadline:
            taken = min(_product(size, device, dtype) for _ in range(3))
            best = max(best, 2 * size**3 / taken)
            size = min(2 * size, LARGEST) if taken < RATE_SECONDS / 100 else size
    return best


def _product(size: int, device: str, dtype: str) -> float:
    """Seconds of one product."""
    one, other = (torch.ones(size, size, dtype=DTYPES[dtype], device=device) for _ in range(2))
    other[0, 0].item()  # waits for the device
    started = time.perf_counter()
    (one @ other)[0, 0].item()
    return time.perf_counter() - started


def known_work(requests: Iterable[RunRequest], registry: Registry) -> list[Work]:
    """Runs whose texts are here."""
    shapes: dict[Path, ModelShape] = {}
    found = []
    for request in requests:
        spec, source = request.spec, request.model
        if source.folder not in shapes:
            shapes[source.folder] = shape_of(source)
        pruners = build_method([step.text for step in spec.steps], registry).pruners
        held = (spec.recipe.samples or 0) * (spec.recipe.length or 0)
        tokens = pruning_tokens(pruners, held, spec.recipe.training_tokens or 0)
        found.append(
            Work(
                model=source,
                weights=spec.model.weights,
                shape=shapes[source.folder],
                dtype=spec.model.dtype,
                method=spec.method,
                target=spec.target,
                seed=spec.seed,
                tokens=tokens,
                held=held,
                trains=spec.recipe.training_tokens is not None,
                evals=spec.evals,
                id=spec.id,
            )
        )
    return found


def pruning_tokens(pruners: Iterable[Pruner], calibration: int, training: int) -> int:
    """Tokens through a forward pass, by what the steps declare that they need."""
    passes = [ask(pruner, "needs") for pruner in pruners]
    by_need = {Needs.CALIBRATION: 2 * calibration, Needs.GRADIENTS: 3 * calibration, Needs.TRAINING: 3 * training}
    return sum(tokens for needs in passes for need, tokens in by_need.items() if needs & need)


def _reads_dense(spec: EvalSpec) -> bool:
    return spec.conditions.get("eval") == "divergence"

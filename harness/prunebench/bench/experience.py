"""What records of a machine say about the cost model: how much longer than expected each part of a run has taken.

A run has parts: until the weights are there, each step, each evaluation. The expected seconds of a part are set right by the
geometric mean of found over expected (what counts is the factor by which one is wrong), in the nearest records that there are:
of the very same part; of the same pruner or evaluation on whatever model; for a step, phase by phase, of other pruners. Rates
cancel where records exist, so a calibration that was disturbed does no harm there. Records of as many threads are asked first;
those of runs whose cores others took are asked too, because the next run will have the same neighbours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import geometric_mean
from types import MappingProxyType
from typing import Literal

from prunebench.bench.costs import RatesFor, Work, effort_seconds, eval_effort, start_seconds, step_seconds
from prunebench.errors import PrunebenchError
from prunebench.options import parse_step
from prunebench.plugins import Registry
from prunebench.results.content import fingerprint
from prunebench.results.records import RunRecord
from prunebench.toolkit.calibration import DEFAULT_LENGTH
from prunebench.toolkit.loading import ModelSource
from prunebench.toolkit.model_shape import ModelShape, read_widths

Basis = Literal["the same", "its kind", "others", "rates", "guess"]
"""What seconds rest on: records of the same part, of the same pruner or evaluation, of others; rates alone; not even a count of
tokens."""

LEAST_SECONDS = 0.05
"""A phase that took less in a record says nothing about others."""


@dataclass(frozen=True)
class Part:
    """A part of a run, with what it is expected to take."""

    kind: Literal["start", "step", "evaluation"]
    name: str
    """The pruner's or evaluation's."""
    same: str
    """Equal for parts that should take equally long."""
    dtype: str
    expected: Mapping[str, float]
    """Seconds by phase."""
    counted: bool = True
    """Whether anybody has said how much it computes."""

    @property
    def seconds(self) -> float:
        """Expected in all."""
        return sum(self.expected.values())


@dataclass(frozen=True)
class Past:
    """A part of a run that has been."""

    part: Part
    found: Mapping[str, float]
    """Seconds by phase."""
    threads: int
    peak_bytes: int | None = None
    """Of a step."""

    @property
    def ratio(self) -> float | None:
        """Found over expected; None where nothing was expected, or took no time."""
        found = sum(self.found.values())
        return found / self.part.seconds if found > 0 and self.part.seconds > 0 else None


@dataclass
class Experience:
    """Parts of runs that have been on a machine."""

    threads: int
    """Of the runs that are asked about."""
    past: list[Past] = field(default_factory=list)

    def seconds(self, part: Part) -> tuple[float, Basis]:
        """What a part will take, and what that rests on."""
        alike = self._named.get((part.kind, part.name), [])
        nearest: list[tuple[Basis, list[Past]]] = [
            ("the same", [past for past in alike if past.part.same == part.same]),
            ("its kind", [past for past in alike if past.part.dtype == part.dtype]),
            ("its kind", alike),
        ]
        for basis, found in nearest:
            if ratios := self._ratios(found):
                return part.seconds * geometric_mean(ratios), basis
        if part.kind == "step":
            return self._by_phase(part)
        ratios = self._ratios([past for past in self.past if past.part.kind == part.kind and past.part.counted])
        known: Basis = "others" if ratios else "rates"
        return part.seconds * (geometric_mean(ratios) if ratios else 1.0), known if part.counted else "guess"

    def peak_bytes(self, part: Part) -> int | None:
        """The highest peak of the very same step, where there are records of it."""
        alike = self._named.get((part.kind, part.name), [])
        return max((past.peak_bytes or 0 for past in alike if past.part.same == part.same), default=0) or None

    @cached_property
    def _named(self) -> dict[tuple[str, str], list[Past]]:
        """By kind and name: a sweep of hundreds of runs asks for every part of each."""
        found: dict[tuple[str, str], list[Past]] = {}
        for past in self.past:
            found.setdefault((past.part.kind, past.part.name), []).append(past)
        return found

    def _by_phase(self, part: Part) -> tuple[float, Basis]:
        seconds, known = 0.0, False
        steps = [past for past in self.past if past.part.kind == "step"]
        for phase, expected in part.expected.items():
            told = [past for past in steps if past.found.get(phase, 0) >= LEAST_SECONDS and past.part.expected.get(phase)]
            ratios: dict[str, list[float]] = {}
            for past in self._best([past for past in told if past.part.dtype == part.dtype] or told):
                ratios.setdefault(past.part.name, []).append(past.found[phase] / past.part.expected[phase])
            known |= bool(ratios)
            # Each pruner counts once, however many records it has.
            seconds += expected * (geometric_mean(map(geometric_mean, ratios.values())) if ratios else 1.0)
        return seconds, "others" if known else "rates"

    def _ratios(self, found: Sequence[Past]) -> list[float]:
        return [past.ratio for past in self._best(found) if past.ratio]

    def _best(self, found: Sequence[Past]) -> Sequence[Past]:
        return [past for past in found if past.threads == self.threads] or found


def parts(work: Work, rates: RatesFor) -> list[Part]:
    """The parts of a run: its start, its steps, its evaluations."""
    shape, facts = work.shape, work.facts
    key = (work.weights, work.dtype, work.target, facts.samples, facts.length, facts.windows * facts.window)
    found = [Part("start", "start", repr((work.weights, work.dtype)), work.dtype, {"start": start_seconds(work)})]
    for text, pruner, efforts in zip(work.steps, work.pruners, work.efforts(), strict=True):
        expected = step_seconds(efforts, shape, work.dtype, facts, rates)
        found.append(Part("step", pruner.name, repr((text, *key)), work.dtype, expected))
    for spec in work.evals:
        effort, counted = eval_effort(spec.conditions)
        seconds = {effort.phase: effort_seconds(effort, shape, work.dtype, facts, rates)}
        name = str(spec.conditions.get("eval"))
        found.append(Part("evaluation", name, fingerprint(spec.conditions), work.dtype, seconds, counted))
    return found


Shapes = Mapping[str, ModelShape]
"""Shapes of models by the hash of their weights."""


def past_of(
    records: Iterable[RunRecord], registry: Registry, rates: Callable[[int], RatesFor], shapes: Shapes = MappingProxyType({})
) -> list[Past]:
    """The parts of runs that went well; of steps by pruners that are still installed.

    Args:
        records: of one machine.
        registry: builds the pruners.
        rates: by the number of threads.
        shapes: those that are known; of other models records tell them nearly.
    """
    return [
        past
        for record, work in works_of(records, registry, shapes)
        for past in _past(record, parts(work, rates(record.provenance.threads)))
    ]


def works_of(
    records: Iterable[RunRecord], registry: Registry, shapes: Shapes = MappingProxyType({})
) -> list[tuple[RunRecord, Work]]:
    """Runs that went well, as far as their cost depends on them, where their pruners are still installed."""
    good = [record for record in records if record.status == "ok" and record.audit is not None]
    totals, lengths = _totals(good), _lengths(good)
    found = []
    for record in good:
        suite, model = record.provenance.suite, record.spec.model.weights
        shape = shapes.get(model) or shape_in(record, totals.get(model))
        with suppress(PrunebenchError):  # a pruner that is gone, an option that it no longer has
            found.append((record, _work(record, registry, shape, lengths.get(suite or "", 512))))
    return found


def _past(record: RunRecord, planned: Sequence[Part]) -> list[Past]:
    made = record.provenance
    steps = sum(step.seconds for step in record.steps)
    start = made.seconds - steps - sum(score.seconds for score in record.scores.values())
    scores = {fingerprint(score.conditions): score.seconds for score in record.scores.values()}
    seconds = {("start", 0): {"start": start}} if not any(step.reused for step in record.steps) else {}
    seconds |= {("step", index): step.phases for index, step in enumerate(record.steps)}
    found, counts = [], Counter[str]()
    for part in planned:
        at, counts[part.kind] = counts[part.kind], counts[part.kind] + 1
        taken = {"evaluation": scores[part.same]} if part.same in scores else seconds.get((part.kind, at))
        if taken is not None:
            step = record.steps[at] if part.kind == "step" else None
            peak = (step.peak_device_bytes or step.peak_host_bytes) if step else None
            found.append(Past(part, taken, made.threads, peak))
    return found


def _work(record: RunRecord, registry: Registry, shape: ModelShape, window: int) -> Work:
    spec, tokens = record.spec, record.spec.recipe.training_tokens or 0
    model = ModelSource(Path(), spec.model.name, spec.model.source)
    pruners = [registry.pruner(parse_step(step.text)) for step in spec.steps]
    length = spec.recipe.length or window
    training = (tokens // length, length if tokens else 0)
    return Work.of(spec, model, shape, pruners, training, record.provenance.batch_size)


def shape_in(record: RunRecord, parameters: int | None = None) -> ModelShape:
    """A model's shape as far as its record tells: the matrices are listed there, and what is left is taken for embeddings.

    Args:
        record: with an audit.
        parameters: of the model, where another record tells.
    """
    assert record.audit is not None
    matrices = [(matrix.name, matrix.shape) for matrix in record.audit.matrices]
    prunable = sum(outputs * inputs for _, (outputs, inputs) in matrices)
    hidden = Counter(inputs for _, (_, inputs) in matrices).most_common(1)[0][0]
    total = parameters or prunable
    blocks = {found[0] for name, _ in matrices if (found := re.search(r"\.\d+\.", f".{name}"))}
    siblings: dict[str, list[int]] = {}
    for name, (_, inputs) in matrices:
        siblings.setdefault(name.rpartition(".")[0], []).append(inputs)
    return ModelShape(
        parameters=total,
        multiplied=total,
        layers=max(1, len(blocks)),
        hidden=hidden,
        vocabulary=(total - prunable) // hidden,
        context=record.spec.recipe.length or DEFAULT_LENGTH,
        attention=hidden,
        matrices=tuple(shape for _, shape in matrices),
        inputs=tuple(width for widths in siblings.values() for width in read_widths(widths)),
    )


def _totals(records: Iterable[RunRecord]) -> dict[str, int]:
    """Parameters of models by their hash, from records in which some are zero."""
    found = {}
    for record in records:
        audit = record.audit
        if audit is not None and audit.sparsity_total:
            found[record.spec.model.weights] = round(audit.zeros / audit.sparsity_total)
    return found


def _lengths(records: Iterable[RunRecord]) -> dict[str, int]:
    """Tokens of a training window by suite: those of its calibration, which a record without calibration does not name."""
    return {record.provenance.suite or "": record.spec.recipe.length for record in records if record.spec.recipe.length}

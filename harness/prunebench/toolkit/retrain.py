"""Retraining under fixed keep masks: what may move, the schedules, and the loop. Zeros stay zero.

Trainable numbers are float32 copies whatever the model's dtype (`methods.md` 8.1): a step too small for 16 bits adds up
until it shows. AdamW without weight decay; gradients are clipped to a norm of 1, as the trainer does that PERP's code uses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from prunebench.errors import NonFiniteError, RunError
from prunebench.spec import Changes, Job, JobFacts, JsonDict, Matrix, option
from prunebench.toolkit.anatomy import is_norm
from prunebench.toolkit.casts import Cast
from prunebench.toolkit.lowrank import Kind, LowRank
from prunebench.toolkit.memory import halving
from prunebench.toolkit.pace import Pace
from prunebench.toolkit.phases import phase
from prunebench.toolkit.scores import at_least_float32

Subset = Literal["biases", "norms", "biases+norms", "head", "mask_lora", "scale_lora", "lora_prune", "all"]
LORA_KINDS: tuple[Kind, ...] = ("mask_lora", "scale_lora", "lora_prune")
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises (`methods.md` 3 and 8.3)."""
CLIP = 1.0
CURVE_POINTS = 50

_CHANGES = {
    "biases": Changes.BIASES,
    "norms": Changes.NORMS,
    "biases+norms": Changes.BIASES | Changes.NORMS,
    "head": Changes.HEAD,
    "all": Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS,
}
_LEARNING_RATES = {"biases": 5e-4, "norms": 5e-4, "biases+norms": 5e-4, "all": 1e-5}


@dataclass
class Retraining:
    """What is trained, and for how long. The fields are options of the methods that retrain."""

    subset: Subset = option("mask_lora", "which parameters move")
    steps: int = option(1000, "optimiser steps")
    batch: int = option(8, "sequences a step")
    learning_rate: float | None = option(
        None, "the highest; none: 1e-4 for the LoRA kinds and the head, 5e-4 for biases and norms, 1e-5 for all (ours)"
    )
    schedule: Literal["llr", "clr"] = option("llr", "after 10% warm-up linear (llr) or cosine (clr) to zero")
    rank: int = option(16, "of the LoRA kinds and the head")
    alpha: float = option(32.0, "the LoRA kinds are scaled by alpha / rank")
    precision: Literal["model", "bfloat16"] = option(
        "model", "of the products in training: the model's dtype, or bfloat16 by autocast; what is trained stays float32"
    )

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing."""
        if self.steps < 0 or self.batch < 1 or self.rank < 1:
            given = f"steps is {self.steps}, batch {self.batch} and rank {self.rank}"
            raise ValueError(f"{given}; steps must not be negative, batch and rank must be at least 1.")
        if self.learning_rate is not None and self.learning_rate < 0:
            raise ValueError("learning_rate must not be negative.")

    def highest_rate(self) -> float:
        """The learning rate after warm-up."""
        return _LEARNING_RATES.get(self.subset, 1e-4) if self.learning_rate is None else self.learning_rate

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a cosine ramp up, then the schedule down to zero after the last."""
        warm_up = math.ceil(WARM_UP * self.steps)
        if step < warm_up:
            return self.highest_rate() * (1 - math.cos(math.pi * (step + 1) / warm_up)) / 2
        left = 1 - (step - warm_up) / max(1, self.steps - warm_up)
        return self.highest_rate() * (left if self.schedule == "llr" else (1 - math.cos(math.pi * left)) / 2)

    def changed(self) -> Changes:
        """What training the subset changes."""
        return _CHANGES.get(self.subset, Changes.KEPT_WEIGHTS)

    def misfit(self, facts: JobFacts) -> str | None:
        """Why the subset cannot be trained, in one sentence, or None."""
        if self.subset == "biases" and not facts.biases:
            return f"a {facts.config.model_type} model has no biases, so there is nothing that subset=biases could train."
        return None


Loss = Callable[[torch.Tensor], torch.Tensor]
"""From a piece of a batch to a differentiable mean over its rows."""


class Part(Protocol):
    """Some trainable numbers, and how the model gets to use them."""

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        """What the optimiser steps: float32 (float64 in exact tests) leaves."""

    def installed(self) -> AbstractContextManager[None]:
        """A context in which the model uses them."""

    def collect_gradients(self) -> None:
        """After each backward pass of a step: add the gradients to the parameters'."""

    def refresh(self) -> None:
        """After a step: bring the parameters to the model."""


class OwnParameters:
    """Parameters of the model itself, trained through float32 copies."""

    def __init__(self, owned: Sequence[nn.Parameter], masks: Mapping[int, torch.Tensor] | None = None) -> None:
        """`masks`: by the parameter's `id`, in its stored orientation, where only some entries may move."""
        self._owned, self._masks = list(owned), dict(masks or {})
        self.parameters = [at_least_float32(parameter.detach()).clone().requires_grad_(True) for parameter in owned]
        # To tell afterwards what the cast has left of training; where there is none, nothing is lost.
        self._before = [p.detach().to("cpu", copy=True) if p.element_size() < 4 else None for p in owned]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's own parameters take gradients for the time inside."""
        for parameter in self._owned:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in self._owned:
                parameter.grad = None
                parameter.requires_grad_(False)

    def collect_gradients(self) -> None:
        """With the entries that a mask removes at zero: a first step of Adam moves whatever has a gradient."""
        for copied, parameter in zip(self.parameters, self._owned, strict=True):
            if parameter.grad is not None:
                found = parameter.grad.to(copied.dtype)
                if id(parameter) in self._masks:
                    found *= self._masks[id(parameter)]
                copied.grad = found if copied.grad is None else copied.grad.add_(found)
                parameter.grad = None

    def refresh(self) -> None:
        """Cast the copies into the model."""
        with torch.no_grad():
            for copied, parameter in zip(self.parameters, self._owned, strict=True):
                parameter.copy_(copied)

    def compare(self, cast: Cast) -> None:
        """Count what the cast has left of training."""
        for copied, before in zip(self.parameters, self._before, strict=True):
            if before is not None:
                cast.count(copied.detach(), before.to(copied.device))


@dataclass
class Scope:
    """What training runs on: a whole model, or the replica of one block."""

    root: nn.Module
    modules: Mapping[Matrix, nn.Module]
    """The module of each prunable matrix inside the root."""
    masks: Mapping[str, torch.Tensor]
    """Keep masks by matrix name; a matrix without one keeps everything."""
    head: nn.Module | None = None

    def mask(self, matrix: Matrix) -> torch.Tensor:
        """A matrix's keep mask on its device."""
        weight = matrix.weight
        found = self.masks.get(matrix.name)
        return torch.ones(matrix.shape, dtype=torch.bool, device=weight.device) if found is None else found.to(weight.device)


def whole_model(job: Job, masks: Mapping[str, torch.Tensor] | None = None) -> Scope:
    """The scope of training a whole model, under the job's masks or others."""
    modules = {matrix: matrix.module for matrix in job.anatomy.matrices}
    head = job.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return Scope(job.model, modules, job.masks if masks is None else masks, head)


def parts_of(settings: Retraining, scope: Scope, generator: torch.Generator) -> list[Part]:
    """The trainable parts of a subset.

    Raises:
        RunError: the scope has nothing of the kind.
    """
    if settings.subset in LORA_KINDS:
        return [_low_rank(settings, scope, matrix, module, generator) for matrix, module in scope.modules.items()]
    if settings.subset == "head":
        assert isinstance(scope.head, nn.Module)
        weight = scope.head.weight
        assert isinstance(weight, torch.Tensor)
        return [LowRank(scope.head, weight, "lora", settings.rank, settings.alpha, generator)]
    owned, masks = _owned(settings, scope)
    if not owned:
        raise RunError(f"there is nothing that subset={settings.subset} could train.")
    return [OwnParameters(owned, masks)]


def _low_rank(settings: Retraining, scope: Scope, matrix: Matrix, module: nn.Module, generator: torch.Generator) -> LowRank:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    kind: Kind = settings.subset  # type: ignore[assignment]  # the caller has looked
    return LowRank(module, matrix.oriented(weight), kind, settings.rank, settings.alpha, generator, scope.mask(matrix))


def _owned(settings: Retraining, scope: Scope) -> tuple[list[nn.Parameter], dict[int, torch.Tensor]]:
    """Biases, norms, or with them the prunable matrices under their masks; never embeddings or the head."""
    owned: dict[int, nn.Parameter] = {}
    masks: dict[int, torch.Tensor] = {}
    everything = settings.subset == "all"
    for module in scope.root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wanted = (
                ("biases" in settings.subset or everything)
                if name == "bias"
                else is_norm(module) and ("norms" in settings.subset or everything)
            )
            if wanted and module is not scope.head:
                owned[id(parameter)] = parameter
    if everything:
        for matrix, module in scope.modules.items():
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            owned[id(weight)] = weight
            masks[id(weight)] = matrix.oriented(scope.mask(matrix))
    return list(owned.values()), masks


@dataclass(frozen=True)
class Trained:
    """What a training was."""

    parameters: int
    losses: tuple[float, ...]
    """Mean loss of each step's batch, before the step."""
    pace: JsonDict | None = None
    """Seconds a step, as `Pace.noted` has them."""

    def curve(self) -> list[float]:
        """The losses as at most `CURVE_POINTS` means of consecutive steps."""
        size = max(1, math.ceil(len(self.losses) / CURVE_POINTS))
        chunks = [self.losses[i : i + size] for i in range(0, len(self.losses), size)]
        return [round(sum(chunk) / len(chunk), 5) for chunk in chunks]


def train(
    settings: Retraining, scope: Scope, parts: Sequence[Part], batches: Iterator[torch.Tensor], loss: Loss, job: Job
) -> Trained:
    """Take the steps; afterwards the parts hold what was learned and the scope is as it was, but for own parameters.

    Args:
        settings: steps, learning rate, schedule.
        scope: everything in it is frozen but the parts.
        parts: what is trained.
        batches: one tensor a step, [batch, ...] on the device; worked on in pieces of the job's batch size, and when memory
            runs out for one, all of them again in pieces of half the size.
        loss: from a piece to the mean loss over its rows; draws no random numbers.
        job: for progress and the batch size.

    Raises:
        NonFiniteError: the loss is no number; says at which step.
    """
    parameters = [parameter for part in parts for parameter in part.parameters]
    count = sum(parameter.numel() for parameter in parameters)
    if not settings.steps:
        return Trained(count, ())
    optimiser = torch.optim.AdamW(parameters, lr=settings.highest_rate(), weight_decay=0.0)
    losses, pace = [], Pace(settings.steps)
    with phase("training"), ExitStack() as stack, torch.enable_grad():
        stack.enter_context(frozen(scope.root))
        for part in parts:
            stack.enter_context(part.installed())
        for step, batch in enumerate(itertools.islice(batches, settings.steps)):
            job.progress("train", step, settings.steps)
            optimiser.param_groups[0]["lr"] = settings.rate(step)
            losses.append(_gradients(settings, scope, parts, batch, loss, job, f"training step {step + 1}"))
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            optimiser.zero_grad()
            for part in parts:
                part.refresh()
            pace.step(step + 1)
    values = tuple(torch.stack(losses).tolist())
    for step, value in enumerate(values):
        if not math.isfinite(value):
            raise NonFiniteError(f"the training loss is {value} at step {step + 1} of {settings.steps}; a lower rate may help.")
    return Trained(count, values, pace.noted())


def _gradients(
    settings: Retraining, scope: Scope, parts: Sequence[Part], batch: torch.Tensor, loss: Loss, job: Job, where: str
) -> torch.Tensor:
    """The mean loss of a step's batch, a scalar on the device; its gradients are left in the parts' parameters."""

    def attempt() -> torch.Tensor:
        scope.root.zero_grad()  # what a piece that failed left in the model
        for part in parts:
            for parameter in part.parameters:
                parameter.grad = None
        total = torch.zeros((), device=job.device)
        for piece in torch.split(batch, job.batch_size):
            with torch.autocast(job.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
                found = loss(piece) * (len(piece) / len(batch))
            found.backward()  # type: ignore[no-untyped-call]
            total += found.detach()
            for part in parts:  # now, as gradients of 16 bits should not add up in 16 bits
                part.collect_gradients()
        return total

    return halving(job, lambda: min(job.batch_size, len(batch)), attempt, where)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter takes gradients for the time inside; each gets its flag back."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

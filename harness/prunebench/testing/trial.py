"""One pruner on one fresh tiny model: what every law starts from."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest import SkipTest

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunebench.handles import Checkpoint
from prunebench.options import canonical
from prunebench.spec import Changes, JsonDict, Pruner
from prunebench.targets import NM, Dense, Target, Unstructured
from prunebench.testing.models import INNER, make_job, tiny_model
from prunebench.testing.placements import Counted
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.masks import keep_mask
from prunebench.toolkit.placement import Resident
from prunebench.toolkit.state import guarded

Factory = Callable[[], Pruner]
"""A pruner class, or anything that makes a pruner: `partial(Magnitude, group="row")`."""

Contents = dict[str, torch.Tensor]


class CheckFailed(AssertionError):
    """A pruner breaks a law; the message is one sentence."""


class Declined(SkipTest):
    """The pruner refuses everything that the law would ask of it on this family; a skipped test under pytest."""


@dataclass(frozen=True)
class Task:
    """What a pruner is asked for, and what an earlier step has left."""

    target: Target
    earlier: Target | None = None
    """An earlier step removed so much of each row, or group, at random."""
    inner: int = INNER
    """The width inside the MLPs."""

    def __str__(self) -> str:
        after = f" after an earlier step at {self.earlier}" if self.earlier else ""
        return f"{self.target}{after}" + (f" with an inner width of {self.inner}" if self.inner != INNER else "")


class Trial:
    """A pruner's instance, a model of its own, and the job.

    Args:
        make: makes the pruner, unless `pruner` is given.
        family: of the tiny model, unless `model` is given.
        task: what is asked.
        dtype: of the tiny model.
        batch_size: sequences at a time.
        pruner: an instance that is used again.
        model: another than the tiny one; the step works on it.
        placement: one that knows which blocks it holds where none is given.
        lay: does to the model what an earlier step did; `task.earlier` at random where none is given.
        texts: token arrays for `make_job`, by argument.
        checkpoint: where the walk leaves what a killed run needs.
    """

    def __init__(
        self,
        make: Factory,
        family: str,
        task: Task,
        *,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 3,
        pruner: Pruner | None = None,
        model: PreTrainedModel | None = None,
        placement: Resident | None = None,
        lay: Callable[[ModelAnatomy], None] | None = None,
        texts: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.pruner = make() if pruner is None else pruner
        self.task = task
        self.model = tiny_model(family, inner=task.inner, dtype=dtype) if model is None else model
        self.anatomy = find_anatomy(self.model)
        self.dense = DenseWeights(self.anatomy)
        self.notes: JsonDict = {}
        self.placement = Counted()
        self.state_changed: list[str] = []
        """Global state that `prune` left changed."""
        self.written = io.StringIO()
        self.warned: list[str] = []
        self.logged: list[str] = []
        """What any logger said at the level of warnings or above, whoever shows it."""
        if lay:
            lay(self.anatomy)
        elif task.earlier:
            generator = torch.Generator().manual_seed(4)
            for matrix in self.anatomy.matrices:
                matrix.keep(keep_mask(torch.rand(matrix.shape, generator=generator), task.earlier, "row"))
        self.job = make_job(
            self.pruner,
            self.model,
            task.target,
            batch_size=batch_size,
            anatomy=self.anatomy,
            dense=self.dense,
            placement=placement or self.placement,
            notes=self.notes,
            **(texts or {}),
        )
        self.job.checkpoint = checkpoint

    @property
    def group(self) -> str:
        """In which the target is exact: the pruner's own, or the earlier step's where only that made masks."""
        own = self.pruner.audit_group() if self.pruner.changes() & Changes.MASKS else "earlier"
        return "row" if own == "earlier" else own

    def prune(self) -> Trial:
        """Take the step; global state is restored afterwards, and what the step changed, wrote and warned of is remembered.

        Raises:
            CheckFailed: the pruner raises.
        """
        quiet = redirect_stdout(self.written), redirect_stderr(self.written)
        with (
            quiet[0],
            quiet[1],
            guarded(self.state_changed),
            _overheard(self.logged),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")  # whatever the test run makes of warnings, they break one law, not all
            try:
                self.pruner.prune(self.job)
            except Exception as error:
                raise CheckFailed(f"prune raised at {self.task}: {type(error).__name__}: {error}") from error
        self.warned = [str(warning.message) for warning in warned]
        return self

    def left(self) -> Contents:
        """All numbers of the model and of its adapters."""
        found = contents(self.model)
        for index, adapter in enumerate(self.anatomy.adapters):
            name = f"adapter {index} of {adapter.matrix}"
            found |= {f"the {half} factor of {name}": getattr(adapter, half).clone() for half in ("down", "up")}
            found[f"the scale of {name}"] = torch.tensor(adapter.scale, dtype=torch.float64)
        return found


@contextmanager
def _overheard(said: list[str]) -> Iterator[None]:
    """Take note of what loggers say: a handler may write to a stream that was opened long before, or be pytest's."""
    make = logging.getLogRecordFactory()

    def noted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return record

    logging.setLogRecordFactory(noted)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)


@contextmanager
def failing() -> Iterator[None]:
    """Make whatever is raised inside a `CheckFailed`, so that an excuse covers it; also a decorator."""
    try:
        yield
    except (CheckFailed, Declined):
        raise
    except AssertionError as error:
        raise CheckFailed(str(error)) from error
    except Exception as error:
        raise CheckFailed(f"{type(error).__name__}: {error}") from error


def tasks(
    make: Factory, family: str, targets: Sequence[Target], inner: int = INNER, model: PreTrainedModel | None = None
) -> list[Task]:
    """What the pruner accepts: the targets, left by an earlier step if it refuses all without one; for one that makes no masks
    `dense`, and the targets left by an earlier step.

    Raises:
        Declined: it refuses all of them.
    """
    pruner, reasons = make(), list[str | None]()
    left = [Task(target, target, inner) for target in targets]
    masks = bool(pruner.changes() & Changes.MASKS)
    model = tiny_model(family, inner=inner) if model is None else model
    for wanted in [[Task(target, None, inner) for target in targets], left] if masks else [[Task(Dense(), None, inner), *left]]:
        found = [refusal(pruner, model, task) for task in wanted]
        if None in found:
            return [task for task, reason in zip(wanted, found, strict=True) if reason is None]
        reasons += found
    raise Declined(f"{label(make)} refuses {family}: {reasons[0]}")


def refusal(pruner: Pruner, model: PreTrainedModel, task: Task) -> str | None:
    """Why the harness, or the pruner, declines the task, or None."""
    facts = find_anatomy(model).facts(task.target, ("earlier",) if task.earlier else ())
    return (facts.misfit() if pruner.changes() & Changes.MASKS else None) or pruner.refuses(facts)


def first_of_each(accepted: Sequence[Task]) -> list[Task]:
    """The first unstructured task and the first N:M one; of a step that makes no masks, those that it was left."""
    first = {type(task.target): task for task in reversed(accepted) if not isinstance(task.target, Dense)}
    return [task for task in accepted if task in first.values()]


def lighter(target: Target) -> Target | None:
    """A target whose masks can grow into this one's, or None."""
    if isinstance(target, Unstructured) and target.sparsity:
        return Unstructured(target.sparsity / 2)
    return NM(target.keep + 1, target.of) if isinstance(target, NM) and target.keep + 1 < target.of else None


def label(make: Factory) -> str:
    """The pruner as a step is written, with the options that differ from their defaults."""
    pruner = make()
    return canonical(pruner.name, pruner)


def added(anatomy: ModelAnatomy) -> Contents:
    """What all adapters of a matrix add to its weight, [outputs, inputs] in float64 by matrix name."""
    found: Contents = {}
    for adapter in anatomy.adapters:
        product = adapter.scale * adapter.up.double() @ adapter.down.double()
        found[adapter.matrix] = found.get(adapter.matrix, torch.zeros(())) + product
    return found


def far_apart(before: Contents, now: Contents) -> list[str]:
    """Names of what was added, removed, or differs by more than a millionth of the largest entry."""
    names = sorted(before.keys() | now.keys())
    return [n for n in names if n not in before or n not in now or not _near(before[n], now[n])]


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= 1e-6 * float(one.abs().max())


def linears(model: PreTrainedModel) -> Contents:
    """The prunable weights [outputs, inputs] by module name, found without the toolkit: every linear but the head."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            weight = module.weight.detach()
            found[name] = weight.t() if isinstance(module, Conv1D) else weight
    return found


def zeros(model: PreTrainedModel) -> Contents:
    """Where the prunable weights are zero, [outputs, inputs] by module name."""
    return {name: weight == 0 for name, weight in linears(model).items()}


def contents(model: nn.Module) -> Contents:
    """A copy of every parameter and buffer under each of its names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Groups of parameter names that share memory."""
    places: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(group) for group in places.values() if len(group) > 1}


def without_head(model: PreTrainedModel, tied: set[frozenset[str]]) -> set[frozenset[str]]:
    """The groups that would be left if the head alone left its own."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return {group - names for group in tied if len(group - names) > 1}


def differing(before: Contents, now: Contents) -> list[str]:
    """Names of what was added, removed, or differs in a bit, a shape or a dtype."""
    names = sorted(before.keys() | now.keys())
    return [name for name in names if name not in before or name not in now or not same_bits(before[name], now[name])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal as bit patterns: tells -0.0 from 0.0."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each entry, [..., bytes]."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)

"""The contract: what a pruner and an evaluation are, and what the harness hands them.

A pruner is a dataclass whose fields are its hyper-parameters and whose `prune` changes a model in place. The harness owns
clock, memory, seeds, dtype, device and evaluation; a pruner never prints, times or seeds. Torch and transformers are
imported for type checking only, so that a plugin can be listed without loading them.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from prunebench.effort import Effort, EffortFacts, usual_effort
from prunebench.errors import ContractError
from prunebench.handles import Anatomy, BlockHandle, Checkpoint, DenseWeights, Matrix, Placement
from prunebench.hooks import API_VERSION, Hooks, hookimpl, hookspec
from prunebench.scoring import Eval, EvalFacts, EvalJob, JsonDict, Progress, Sample, Score
from prunebench.targets import NM, Target

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "API_VERSION",
    "Anatomy",
    "BlockHandle",
    "Changes",
    "Claims",
    "DenseWeights",
    "Effort",
    "EffortFacts",
    "Eval",
    "EvalFacts",
    "EvalJob",
    "Hooks",
    "Job",
    "JobFacts",
    "JsonDict",
    "Matrix",
    "MatrixFacts",
    "Needs",
    "Placement",
    "Progress",
    "Pruner",
    "Sample",
    "Score",
    "hookimpl",
    "hookspec",
    "option",
]


class Needs(enum.Flag):
    """What a pruner reads besides the model. What is not named is not handed over."""

    WEIGHTS = enum.auto()
    CALIBRATION = enum.auto()
    GRADIENTS = enum.auto()
    TRAINING = enum.auto()
    SEED = enum.auto()
    """Draws random numbers from `job.seed`. Without it (and without calibration or training text) a method runs once."""


class Changes(enum.Flag):
    """What a pruner may leave changed. What is not named must be bit-identical afterwards."""

    NOTHING = 0
    MASK_GROWS = enum.auto()
    """Entries are removed, none is revived: the normal case."""
    MASK_MOVES = enum.auto()
    """Removed entries may come back; the target is audited again."""
    MASKS = MASK_GROWS | MASK_MOVES
    """Either: the step prunes."""
    KEPT_WEIGHTS = enum.auto()
    """The values of surviving entries."""
    BIASES = enum.auto()
    NORMS = enum.auto()
    HEAD = enum.auto()
    """The head's weight; one that is tied to the embedding is untied first, and then counts as extra parameters."""
    ADAPTER = enum.auto()
    """Parameters that stay apart from the weights, by `job.attach`."""


class Claims(enum.Flag):
    """What else holds of a pruner's masks by its mathematics: the conformance kit puts it to what it claims, in float64."""

    NOTHING = 0
    ROWS = enum.auto()
    """Permute the rows of one matrix: the rows of its mask are permuted with them, and nothing else of the mask changes."""
    CHANNELS = enum.auto()
    """Permute the channels inside the MLPs, which leaves the model's function as it is: the masks are permuted with them.
    For unstructured targets; groups of M consecutive columns would be others."""
    NESTED = enum.auto()
    """What is removed at a lower sparsity is removed at a higher one too, and what 2:4 removes by 1:4."""
    PREFIX = enum.auto()
    """Statistics come from the pruned prefix: a block's masks are what they are when an earlier step had pruned, as this one
    does, the blocks before it."""
    BLOCKWISE = enum.auto()
    """One walk changes nothing but blocks, each by its weights, its inputs, the job and what the walk is told to carry."""


@dataclass(frozen=True)
class MatrixFacts:
    """Name and shape of a prunable matrix."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class JobFacts:
    """What a pruner may look at before it accepts a job."""

    target: Target
    config: PretrainedConfig
    matrices: tuple[MatrixFacts, ...]
    tied: tuple[tuple[str, ...], ...]
    """Groups of parameter names that share one tensor."""
    biases: tuple[str, ...]
    """Names of the bias parameters that exist."""
    earlier: tuple[str, ...]
    """The steps before this one, as written."""

    def misfit(self) -> str | None:
        """Why the target's pattern cannot be laid over the matrices, or None."""
        if isinstance(self.target, NM):
            for matrix in self.matrices:
                if matrix.shape[1] % self.target.of:
                    return (
                        f"{matrix.name} has {matrix.shape[1]} input columns, not a multiple of {self.target.of}, "
                        f"so {self.target} has no meaning for it."
                    )
        return None


@dataclass(kw_only=True)
class Job:
    """One step's work: the model and everything the step may use.

    Token arrays are int64 tensors `[sequences, length]` on the host. A step that did not declare the need for one gets a
    `ContractError` when it reads it.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    target: Target
    needs: Needs
    seed: int
    placement: Placement
    batch_size: int
    masks: Mapping[str, torch.Tensor]
    """Keep masks left by earlier steps, by matrix name (boolean, [outputs, inputs]); empty before the first."""
    dense: DenseWeights
    progress: Progress
    note: Callable[[str, Any], None]
    """`note(key, value)`: something the record should keep (a retry, a share, a deviation)."""
    attach: Callable[[Matrix, torch.Tensor, torch.Tensor, float], None]
    """`attach(matrix, down, up, scale)`: from now on the matrix's output gains `scale * up @ down @ input`, by a forward hook;
    `down` is [rank, inputs], `up` [outputs, rank]. Needs `Changes.ADAPTER`; saved beside the model, counted as extra."""
    artefact: Callable[[str, Callable[[], dict[str, torch.Tensor]]], dict[str, torch.Tensor]]
    """`artefact(name, make)`: tensors that depend on the weights, the calibration tokens and `name` alone. A later run takes
    them from the cache; its record says so, and the cost of making them is added to its own."""
    calibration_tokens: torch.Tensor | None = None
    training_tokens: torch.Tensor | None = None
    validation_tokens: torch.Tensor | None = None
    checkpoint: Checkpoint | None = None
    """Where `walk` leaves what a killed run needs; for those who claim BLOCKWISE."""

    @property
    def device(self) -> torch.device:
        """Where work is done."""
        return self.placement.device

    @property
    def calibration(self) -> torch.Tensor:
        """Calibration sequences [samples, length]; needs `Needs.CALIBRATION`."""
        return self._declared("calibration", Needs.CALIBRATION | Needs.GRADIENTS, self.calibration_tokens)

    @property
    def training(self) -> torch.Tensor:
        """Packed training windows [n, length], from documents that no other text uses; needs `Needs.TRAINING`."""
        return self._declared("training", Needs.TRAINING, self.training_tokens)

    @property
    def validation(self) -> torch.Tensor:
        """Packed validation windows [n, length], for choosing options; needs `Needs.TRAINING`."""
        return self._declared("validation", Needs.TRAINING, self.validation_tokens)

    def _declared(self, name: str, need: Needs, tokens: torch.Tensor | None) -> torch.Tensor:
        if not self.needs & need:
            raise ContractError(f"the pruner reads job.{name} but its needs() do not declare it.")
        if tokens is None:
            raise ContractError(f"the pruner needs job.{name}, and this run has no {name} text.")
        return tokens


_T = TypeVar("_T")


def option(default: _T, doc: str) -> _T:
    """A hyper-parameter of a pruner or an option of an evaluation: a dataclass field with its one-line description."""
    found: _T = field(default=default, metadata={"doc": doc})
    return found


@dataclass
class Pruner(abc.ABC):
    """One pruning method. The fields of the dataclass are its hyper-parameters."""

    name: ClassVar[str]
    """What users write, e.g. 'wanda': lower case letters, digits, '.', '+', '-' and '_'."""
    revision: ClassVar[int] = 1
    """Raise it whenever outputs or a default can change: it is part of a run's id."""
    excuses: ClassVar[Mapping[str, str]] = {}
    """Laws of the conformance kit that the method is known to break ('same_seed', or 'same_seed/opt' on one family), each with
    the reason; the kit shows them as excused, and fails where one is kept after all."""

    def needs(self) -> Needs:
        """What the method reads; may depend on options."""
        return Needs.WEIGHTS

    def changes(self) -> Changes:
        """What the method may leave changed; may depend on options."""
        return Changes.MASK_GROWS

    def audit_group(self) -> str:
        """The comparison group in which an unstructured target is exact: `row`, `matrix`, `model`, `columns:N` or `earlier`.

        The audit counts in it. With `model` the total is exact and each matrix's rate is recorded; `columns:128` are slabs of
        128 consecutive columns over all rows (the last may be narrower). With `earlier` it is the group of the step before,
        for steps that move the masks they find and keep their counts. N:M targets are always counted in groups of M.
        """
        return "row"

    def claims(self) -> Claims:
        """What holds beyond the contract, which the conformance kit checks; may depend on options."""
        return Claims.NOTHING

    def refuses(self, facts: JobFacts) -> str | None:  # noqa: ARG002 - the signature is the contract
        """A reason in one sentence why this job cannot be done, or None; asked for every step before the first starts."""
        return None

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """What `prune` computes, by phase, for an estimate of its cost before it runs; the usual for what it needs."""
        needs = self.needs()
        calibrated, gradients, trains = (bool(needs & n) for n in (Needs.CALIBRATION, Needs.GRADIENTS, Needs.TRAINING))
        return usual_effort(facts, calibrated=calibrated, gradients=gradients, trains=trains)

    @abc.abstractmethod
    def prune(self, job: Job) -> None:
        """Prune `job.model` in place."""

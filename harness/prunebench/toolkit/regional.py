"""A block trained towards the outputs of its dense self while its masks move: Wanda++'s regional optimisation.

The student is a float32 replica (float64 for such a model), and only its prunable matrices train. The teacher is the block
as it is until its visit ends with new weights: the block itself, or a second replica where the model is in 16 bit, whose
rounding would be as large as what is to be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prunebench.effort import TO_WEIGHTS, Effort, EffortFacts
from prunebench.handles import Matrix
from prunebench.spec import Job
from prunebench.toolkit.memory import halving
from prunebench.toolkit.phases import phase
from prunebench.toolkit.walk import Block, Replica


class Student:
    """A replica of a block on its way from dense to pruned."""

    def __init__(self, job: Job, block: Block, replica: Replica, learning_rate: float, latent: bool) -> None:
        """`latent`: a removed weight keeps its value out of sight of the forward, and its gradient there moves the value.

        Without it a removed weight is set to zero, and trains on from there like any other.
        """
        self.replica = replica
        self._job, self._block = job, block
        self._teacher = block if replica.dtype == job.model.dtype else block.replica()
        self._shown = {matrix: replica.parameter(matrix) for matrix in block.matrices}
        # Detached tensors share the parameters' memory: without `latent` the values are what the forward sees.
        self._values = {m: p.detach().clone() if latent else p.detach() for m, p in self._shown.items()}
        self._latent = latent
        self._masks: dict[Matrix, torch.Tensor] = {}
        gone = {matrix: ~job.masks[matrix.name] for matrix in block.matrices if matrix.name in job.masks}
        self._gone = {matrix: matrix.oriented(mask).to(replica.parameter(matrix).device) for matrix, mask in gone.items()}
        """Removed by an earlier step: these do not train."""
        self._optimizer = torch.optim.RMSprop(self._values.values(), lr=learning_rate)  # state is kept to the end

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """A matrix's weight [outputs, inputs] as it has become, of removed entries too."""
        return matrix.oriented(self._values[matrix])

    def prune(self, masks: Mapping[Matrix, torch.Tensor]) -> None:
        """Lay new keep masks [outputs, inputs] over the matrices."""
        with phase("update"):
            self._masks = {matrix: matrix.oriented(mask) for matrix, mask in masks.items()}
            if self._latent:
                self._show()
            else:
                for matrix, mask in self._masks.items():
                    self._values[matrix].masked_fill_(~mask, 0)

    def train(self, inputs: torch.Tensor) -> None:
        """One step for each sample of the block's inputs [samples, length, hidden]: squared distance to the teacher's output.

        Squares are added up, not averaged: RMSprop forgets the scale, but for the 1e-8 that it adds to the root, which mean
        gradients of a large block do not exceed.
        """
        with phase("training"):
            targets = self._taught(inputs)
            for hidden, target in zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True):
                with torch.enable_grad():
                    loss = nn.functional.mse_loss(self.replica.forward(hidden), target, reduction="sum")
                    found = torch.autograd.grad(loss, list(self._shown.values()), materialize_grads=True)
                for (matrix, value), gradient in zip(self._values.items(), found, strict=True):
                    value.grad = gradient.masked_fill_(self._gone[matrix], 0) if matrix in self._gone else gradient
                self._optimizer.step()
                if self._latent:
                    self._show()

    def error(self, samples: Sequence[int], weights: Mapping[Matrix, torch.Tensor]) -> torch.Tensor:
        """Mean squared distance to the teacher's outputs on some samples with other weights [outputs, inputs]; a scalar.

        The student's own weights are as before afterwards.
        """
        inputs = self._block.inputs(samples)
        own = {matrix: shown.detach().clone() for matrix, shown in self._shown.items()}
        with torch.no_grad():
            for matrix, shown in self._shown.items():
                shown.copy_(matrix.oriented(weights[matrix]))
            found = self._passed(self.replica.forward, inputs)
            for matrix, shown in self._shown.items():
                shown.copy_(own[matrix])
        return nn.functional.mse_loss(found, self._taught(inputs))

    def _taught(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._passed(self._teacher.forward, inputs)

    def _passed(self, forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """Outputs for inputs [samples, length, hidden], a batch at a time; when memory runs out, again with half of it.

        A step of training works on one sample: where that does not fit, nothing helps.
        """
        return halving(
            self._job,
            lambda: min(self._job.batch_size, len(inputs)),
            lambda: torch.cat([forward(part) for part in torch.split(inputs, self._job.batch_size)]),
            f"block {self._block.index}",
        )

    def _show(self) -> None:
        with torch.no_grad():
            for matrix, mask in self._masks.items():
                torch.mul(self._values[matrix], mask, out=self._shown[matrix].detach())


def student_effort(facts: EffortFacts, steps: int, drawn: int) -> Effort:
    """What `Student.train` computes: so many steps of one sample in every block, the teacher's outputs of those drawn held."""
    return Effort(
        phase="training",
        blocks=(TO_WEIGHTS + 1) * steps * facts.length,
        length=facts.length,
        at_once=facts.length,
        looks=6 * steps,  # RMSprop reads and writes the weight, its gradient and their mean square
        dtype="float32",
        held=facts.tokens + 2 * drawn * facts.length,
        graph=facts.length,
        copies=6 / facts.layers,
    )


@dataclass
class Findings:
    """What training did to the blocks, kept on the device until the end."""

    errors: list[tuple[int, torch.Tensor, torch.Tensor] | None] = field(default_factory=list)
    """For each block the number of held-out samples, and the mean squared error on them before and after, if any."""
    counts: list[torch.Tensor] = field(default_factory=list)
    """For each matrix the kept weights, those of them that changed, and those that differ after the cast, [3]."""

    def compare(self, matrix: Matrix, weight: torch.Tensor, mask: torch.Tensor) -> None:
        """Count what is about to be written: a weight and a mask, [outputs, inputs]."""
        dense = matrix.weight
        changed, cast = mask & (weight != dense), mask & (weight.to(dense.dtype) != dense)
        self.counts.append(torch.stack([mask.sum(), changed.sum(), cast.sum()]))

    def tell(self, job: Job) -> None:
        """Note it."""
        kept, changed, cast = torch.stack(self.counts).sum(dim=0).tolist()
        job.note("kept_weights_changed", changed / max(1, kept))
        job.note("kept_weights_changed_after_cast", cast / max(1, kept))
        job.note("held_out_samples", [found[0] if found else 0 for found in self.errors])
        if any(self.errors):
            job.note("block_error_before", [float(found[1]) if found else None for found in self.errors])
            job.note("block_error_after", [float(found[2]) if found else None for found in self.errors])
        else:
            job.note("block_error", "not measured: the rounds drew every calibration sample")

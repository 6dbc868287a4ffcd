"""A block trained towards the outputs of its dense self while its masks move: Wanda++'s regional optimisation.

The student is a float32 replica (float64 for such a model), and only its prunable matrices train. What it learns from are the
outputs of that replica while it was dense, made once for all rounds: in the pass that finds its gradients, where there is one.
In 16 bit their rounding would be as large as what is to be learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from prunebench.effort import TO_WEIGHTS, Effort, EffortFacts
from prunebench.handles import Matrix
from prunebench.spec import Job, Placement
from prunebench.toolkit import kernels
from prunebench.toolkit.memory import halving
from prunebench.toolkit.phases import phase
from prunebench.toolkit.placement import HostActivations
from prunebench.toolkit.precision import single_precision
from prunebench.toolkit.sample_gradients import OnTheWay
from prunebench.toolkit.walk import Block, Replica

SMOOTHING, EPSILON = 0.99, 1e-8
"""Of RMSprop, PyTorch's defaults."""

PIECE = 1 << 15
"""Entries that a host's thread updates at a time: a piece of weight, gradient, mean and root together stay in its cache."""


MOST_THERE = 2 << 30
"""Bytes of a block's wanted outputs on a GPU. Those of a 7B model are 3.5 GB, which would be the largest part of the peak; from
pinned memory each comes while the one before is learned."""


class Lesson:
    """The dense block's outputs for the samples that will be asked for, kept where activations rest or on the host."""

    def __init__(self, job: Job, replica: Replica, samples: Iterable[int]) -> None:
        """Of a replica that is still dense, for these calibration sequences."""
        self._job, self._replica, self._placement = job, replica, job.placement
        self._row = {sample: row for row, sample in enumerate(sorted(set(samples)))}
        self._outputs: torch.Tensor | None = None

    def see(self, first: int, outputs: torch.Tensor) -> None:
        """Keep what is wanted of outputs [sequences, length, hidden] that begin with a calibration sequence."""
        for sample, output in enumerate(outputs, first):
            if sample in self._row:
                self._keep(sample, output)

    def work_out(self) -> None:
        """Run the replica over the samples, where nobody else does."""
        samples = list(self._row)

        def attempt() -> None:
            at = 0
            with torch.no_grad():
                for part in self._replica.inputs(samples):
                    for sample, output in zip(samples[at : at + len(part)], self._replica.forward(part), strict=True):
                        self._keep(sample, output)
                    at += len(part)

        with phase("training"):
            halving(self._job, lambda: self._job.batch_size, attempt, "what a block is to learn")

    def outputs(self, samples: Iterable[int]) -> Iterator[torch.Tensor]:
        """For one sample [1, length, hidden] after the other, on the device."""
        assert self._outputs is not None
        return self._placement.batches(self._outputs, [slice(self._row[sample], self._row[sample] + 1) for sample in samples])

    def _keep(self, sample: int, output: torch.Tensor) -> None:
        if self._outputs is None:
            self._placement = _place(self._job.placement, len(self._row) * output.nbytes)
            self._outputs = self._placement.room(output[None], len(self._row))
        self._placement.store(self._outputs, slice(self._row[sample], self._row[sample] + 1), output[None])


def _place(placement: Placement, size: int) -> Placement:
    """Where so many bytes of outputs are kept: where activations rest, or, of more than a GPU should hold, on the host."""
    devices = placement.devices
    there = size <= MOST_THERE or len(devices) > 1 or devices[0].type != "cuda" or isinstance(placement, HostActivations)
    return placement if there else HostActivations(devices[0])


class Student:
    """A replica of a block on its way from dense to pruned."""

    def __init__(self, job: Job, block: Block, replica: Replica, lesson: Lesson, learning_rate: float, latent: bool) -> None:
        """`latent`: a removed weight keeps its value out of sight of the forward, and its gradient there moves the value.

        Without it a removed weight is set to zero, and trains on from there like any other.
        """
        self.replica = replica
        self._job, self._block, self._lesson = job, block, lesson
        self._shown = {matrix: replica.parameter(matrix) for matrix in block.matrices}
        # Detached tensors share the parameters' memory: without `latent` the values are what the forward sees.
        self._values = {m: p.detach().clone() if latent else p.detach() for m, p in self._shown.items()}
        self._latent = latent
        self._masks: dict[Matrix, torch.Tensor] = {}
        gone = {matrix: ~job.masks[matrix.name] for matrix in block.matrices if matrix.name in job.masks}
        self._gone = {matrix: matrix.oriented(mask).to(replica.parameter(matrix).device) for matrix, mask in gone.items()}
        """Removed by an earlier step: these do not train."""
        self._optimizer = RmsProp(list(self._values.values()), learning_rate)  # its means are kept to the end
        self._steps = OnTheWay(list(self._shown.values()), self._step)

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

    def train(self, samples: Sequence[int]) -> None:
        """One step for each of these calibration sequences: squared distance to the dense block's output.

        Squares are added up, not averaged: RMSprop forgets the scale, but for the 1e-8 that it adds to the root, which mean
        gradients of a large block do not exceed. On CUDA products are TF32: steps that are half a percent off do as well.
        """
        with phase("training"), single_precision(self.replica.device):
            for hidden, target in self._pairs(samples):
                with self._steps.taking(self.replica.module):
                    output = self.replica.forward(hidden)
                    distance = (output.detach() - target).mul_(2)  # the gradient of the sum of squares
                    self._steps.backward(1, output, distance)
                for index in self._steps.missed:  # as an expert to which no token went
                    self._step(index, torch.zeros_like(self._values[self._block.matrices[index]]))
                if self._latent:
                    self._show()

    def _step(self, index: int, gradient: torch.Tensor) -> None:
        """Move a matrix as soon as its gradient is known; the way back needs it no more."""
        matrix = self._block.matrices[index]
        if matrix in self._gone:
            gradient.masked_fill_(self._gone[matrix], 0)
        self._optimizer.step(index, gradient)

    def error(self, samples: Sequence[int], weights: Mapping[Matrix, torch.Tensor]) -> torch.Tensor:
        """Mean squared distance to the dense outputs on some samples with other weights [outputs, inputs]; a scalar.

        The student's own weights are as before afterwards.
        """
        own = {matrix: shown.data for matrix, shown in self._shown.items()}
        with torch.no_grad():
            for matrix, shown in self._shown.items():
                shown.data = matrix.oriented(weights[matrix]).to(shown.dtype)
            pairs = self._pairs(samples)
            found = torch.stack([nn.functional.mse_loss(self.replica.forward(hidden), target) for hidden, target in pairs])
            for matrix, shown in self._shown.items():
                shown.data = own[matrix]
        return found.mean()

    def _pairs(self, samples: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Input and wanted output [1, length, hidden] of one sample after the other; where one does not fit, nothing helps."""
        return zip((self._block.inputs([sample]) for sample in samples), self._lesson.outputs(samples), strict=True)

    def _show(self) -> None:
        with torch.no_grad():
            for matrix, mask in self._masks.items():
                torch.mul(self._values[matrix], mask, out=self._shown[matrix].detach())


class RmsProp:
    """The steps of `torch.optim.RMSprop`, on a host bit for bit, without a temporary of a weight's size there."""

    def __init__(self, values: Sequence[torch.Tensor], learning_rate: float) -> None:
        """For these weights, changed in place."""
        self._learning_rate = learning_rate
        self._values = [_pieces(value) for value in values]
        self._squares = [[torch.zeros_like(piece) for piece in pieces] for pieces in self._values]
        self._root: torch.Tensor | None = None

    def step(self, index: int, gradient: torch.Tensor) -> None:
        """Move one of the weights by its gradient, of the same shape."""
        if self._by_kernel(index, gradient):
            return
        for value, square, part in zip(self._values[index], self._squares[index], _pieces(gradient), strict=True):
            square.mul_(SMOOTHING).addcmul_(part, part, value=1 - SMOOTHING)
            root = torch.sqrt(square, out=self._room()[: square.numel()].view(square.shape)).add_(EPSILON)
            value.addcdiv_(part, root, value=-self._learning_rate)

    def _room(self) -> torch.Tensor:
        if self._root is None:
            largest = max((piece for pieces in self._values for piece in pieces), key=torch.numel)
            self._root = largest.new_empty(largest.numel())
        return self._root

    def _by_kernel(self, index: int, gradient: torch.Tensor) -> bool:
        """The same in one pass over memory, within rounding; whether there is a kernel for it."""
        (value, *others), (square, *_) = self._values[index], self._squares[index]
        if others:
            return False
        numbers = (self._learning_rate, SMOOTHING, EPSILON)
        return kernels.run(value.device, "rmsprop", lambda k: k.step(value, square, gradient, *numbers)) is not None


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of a matrix that are worked on together; on a device, which has no such cache, all of them."""
    if weight.device.type != "cpu":
        return (weight,)
    return torch.split(weight, max(1, PIECE * torch.get_num_threads() // max(1, weight.shape[1])))


def student_effort(facts: EffortFacts, steps: int, drawn: int) -> Effort:
    """What `Student.train` computes: so many steps of one sample in every block, the teacher's outputs of those drawn held."""
    return Effort(
        phase="training",
        blocks=TO_WEIGHTS * steps * facts.length,
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
        # A sum would make eight bytes of every entry first.
        self.counts.append(torch.stack([torch.count_nonzero(found) for found in (mask, changed, cast)]))

    def tell(self, job: Job) -> None:
        """Note it."""
        counts = [found.to(job.device) for found in self.counts]  # blocks may be on several
        kept, changed, cast = torch.stack(counts).sum(dim=0).tolist()
        job.note("kept_weights_changed", changed / max(1, kept))
        job.note("kept_weights_changed_after_cast", cast / max(1, kept))
        job.note("held_out_samples", [found[0] if found else 0 for found in self.errors])
        if any(self.errors):
            job.note("block_error_before", [float(found[1]) if found else None for found in self.errors])
            job.note("block_error_after", [float(found[2]) if found else None for found in self.errors])
        else:
            job.note("block_error", "not measured: the rounds drew every calibration sample")

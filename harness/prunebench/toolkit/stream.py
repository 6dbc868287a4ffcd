"""The hidden states on their way through the blocks: recorded once, handed to each block, overwritten by its outputs.

The batch is what the job says, or what pays; it is halved when memory runs out, and the pass in which that happens starts again
(`memory.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from prunebench.errors import ContractError
from prunebench.spec import Job
from prunebench.toolkit.gathering import Starved
from prunebench.toolkit.memory import halving
from prunebench.toolkit.phases import phase
from prunebench.toolkit.placement import brought, paying_batch
from prunebench.toolkit.precision import working
from prunebench.toolkit.products import quick
from prunebench.toolkit.recorder import BlockCall, record_arguments, record_calls, unpack

_T = TypeVar("_T")


class Stream:
    """The calibration set in front of one block after the other."""

    def __init__(self, job: Job, quickly: bool = True) -> None:
        """`quickly`: blocks multiply as `products.quick` has it; without it as the model does, to the last bit."""
        self._job, self._quickly = job, quickly
        self._hidden: torch.Tensor | None = None
        self._calls: list[BlockCall] = []
        self._at = 0
        self.starved = Starved(job)

    @property
    def batch_size(self) -> int:
        """Sequences at a time: the job's number, or what pays."""
        return paying_batch(self._job.batch_size, self._job.calibration.shape[1], self._job.placement.device)

    def halving(self, attempt: Callable[[], _T], index: int) -> _T:
        """Attempt a pass over a block's inputs, and again from its start with half the batch when memory runs out."""
        return halving(self._job, lambda: self.batch_size, attempt, f"block {index}")

    def chosen(self, index: int, samples: Sequence[int]) -> torch.Tensor:
        """A block's inputs for some of the calibration sequences, on the device."""
        return self._job.placement.pick(self.resting(index), samples)

    def batches(self, index: int) -> Iterator[torch.Tensor]:
        """A block's inputs for all of them, in order, on the device."""
        hidden = self.resting(index)
        yield from self._job.placement.batches(hidden, _slices(0, len(hidden), self.batch_size))

    def call(self, index: int, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What a block, or a copy of it, makes of a hidden state, with the arguments that the model gives the block."""
        if not self._calls:
            self.resting(index)
        fast = quick(module) if self._quickly else nullcontext()
        with evaluating(module), fast, working(self._job.model.dtype, hidden):
            args, kwargs = self._calls[index].sized(hidden.shape[0], hidden.dtype, hidden.device)
            return unpack(module(hidden, *args, **kwargs))

    def expect(self, index: int) -> None:
        """The block of this number, if there is one, is brought next."""
        blocks = self._job.anatomy.blocks
        self._job.placement.expect(blocks[index].module if index < len(blocks) else None)

    def leave(self, index: int) -> None:
        """Move on from a block: its outputs, as it now is, become the inputs of the next."""
        if self._hidden is not None and self._at == index and index + 1 < len(self._job.anatomy.blocks):
            self.propagate(index)

    def state(self) -> tuple[int, torch.Tensor | None]:
        """The block whose inputs the hidden states are, and these; None where nobody has asked for data yet."""
        self._job.placement.finish()
        return self._at, self._hidden

    def go_on(self, at: int, hidden: torch.Tensor) -> None:
        """Take up hidden states that are the inputs of block `at`; the blocks' arguments are recorded anew.

        Raises:
            ContractError: they are not those of the calibration set.
        """
        placement, first = self._job.placement, self._job.anatomy.blocks[0].module
        if hidden.shape[:2] != self._job.calibration.shape:
            raise ContractError(f"hidden states of {list(hidden.shape)} are not those of the calibration set.")
        with brought(placement, first), torch.no_grad(), evaluating(self._job.model):  # the recorder runs it on one sequence
            self._calls = record_arguments(self._job)
        self._at, self._hidden = at, placement.room(hidden, len(hidden)).copy_(hidden)

    def close(self) -> None:
        """Let go of everything; nothing can be asked for afterwards."""
        self._job.placement.finish()
        self._hidden, self._calls, self._at = None, [], len(self._job.anatomy.blocks)

    def outputs(self) -> torch.Tensor:
        """The hidden states after the last block, handed over for good."""
        hidden, self._hidden = self._hidden, None
        if hidden is None or self._at < len(self._job.anatomy.blocks):
            raise ContractError("the last block was not run yet, or its outputs are gone.")
        self._job.placement.finish()
        return hidden

    def returning(self, hidden: torch.Tensor) -> Any:
        """A hidden state as the blocks of this model return it."""
        return self._calls[0].returning(hidden)

    def work_dtype(self) -> torch.dtype:
        """The dtype for gradients: float32, or float64 where the model is."""
        return torch.float64 if self._job.model.dtype == torch.float64 else torch.float32

    def inputs(self, index: int) -> torch.Tensor:
        """The hidden states that enter a block, where activations rest, to be read there; raises as `resting`."""
        hidden = self.resting(index)
        self._job.placement.finish()
        return hidden

    def resting(self, index: int) -> torch.Tensor:
        """The same for whoever has the placement fetch them: some may still be on their way to where they rest.

        Raises:
            Refused: the model's blocks cannot be run one by one.
            ContractError: the block was left, or the walk closed.
        """
        if self._hidden is None and self._at:
            raise ContractError("a walk that was closed cannot be asked for data.")
        if self._at > index:
            raise ContractError(f"block {index} was left; its inputs are gone.")
        if self._hidden is None and index == 0:
            self._record()
        elif self._at < index:
            self._catch_up(index)
        assert self._hidden is not None
        return self._hidden

    def _record(self) -> None:
        with phase("calibration"), torch.no_grad(), evaluating(self._job.model):
            self._hidden, self._calls = halving(
                self._job, lambda: self.batch_size, lambda: record_calls(self._job, self.batch_size), "the model's first pass"
            )

    def _catch_up(self, index: int) -> None:
        """The first data are asked for after the first block: run the ones before, while this one steps aside."""
        placement, modules = self._job.placement, [block.module for block in self._job.anatomy.blocks]
        placement.release(modules[index])
        try:
            while self._at < index:
                with brought(placement, modules[self._at]):
                    self.expect(self._at + 1)
                    if self._hidden is None:
                        self._record()
                    self.propagate(self._at)
        finally:
            placement.bring(modules[index])
            self.expect(index + 1)

    def propagate(self, index: int) -> None:
        """Run a block over its inputs, which its outputs overwrite; started again, it goes on where they are still inputs."""
        assert self._hidden is not None
        module = self._job.anatomy.blocks[index].module
        written = 0

        def attempt() -> None:
            nonlocal written
            assert self._hidden is not None
            parts = _slices(written, len(self._hidden), self.batch_size)
            for rows, batch in zip(parts, self._job.placement.batches(self._hidden, parts), strict=True):
                self._job.placement.store(self._hidden, rows, self.call(index, module, batch))
                written = rows.stop

        with phase("propagation"), torch.no_grad():
            self.halving(attempt, index)
        self._at = index + 1


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all inside it in eval mode, and each back in the mode it was in."""
    modes = [(inner, inner.training) for inner in module.modules()]
    for inner, _ in modes:
        inner.training = False
    try:
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]

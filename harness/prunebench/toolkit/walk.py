"""Visit the decoder blocks in order, each with its true inputs: the outputs of the blocks before it, as they now are.

The first time a block is asked for data, the model's own forward runs once over the calibration set with every block
replaced by a recorder, which keeps the first block's input and each block's arguments. From then on only blocks run, one at
a time, and one buffer of hidden states is overwritten in place. A method that asks for no data costs no forward pass.

Nothing is held across a `yield`: no hook, context manager, grad mode or autocast; leaving the loop early closes the walk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prunebench.spec import BlockHandle, Job, Matrix
from prunebench.toolkit.gathering import gather
from prunebench.toolkit.phases import phase
from prunebench.toolkit.resuming import Bookmark
from prunebench.toolkit.sample_gradients import Reduce, SampleGradients
from prunebench.toolkit.stats import Statistic
from prunebench.toolkit.stream import Stream


def walk(job: Job, carries: Sequence[object] = ()) -> Iterator[Block]:
    """Yield the model's blocks, first to last; what the loop changes in a block counts for all later ones.

    A run that was killed may start at a later block, the ones before it put back as they were (`Claims.BLOCKWISE`).

    Args:
        job: of the step.
        carries: what the loop's body keeps from block to block: random generators, lists, dictionaries, objects that hold
            such things, tensors, numbers and strings. They are put back too.
    """
    stream = Stream(job)
    blocks = job.anatomy.blocks
    bookmark = Bookmark(job, stream, carries)
    try:
        for index in range(bookmark.open(), len(blocks)):
            handle = blocks[index]
            job.progress("block", index, len(blocks))
            job.placement.bring(handle.module)
            try:
                stream.expect(index + 1)
                try:
                    yield Block(handle, index, stream)
                finally:
                    job.placement.settle(handle.module)
                stream.leave(index)
            finally:
                job.placement.release(handle.module)
            bookmark.leave(index + 1)
        job.progress("block", len(blocks), len(blocks))
    finally:
        job.placement.expect(None)
        stream.close()


class Block:
    """A decoder block on its visit, with its calibration inputs."""

    def __init__(self, handle: BlockHandle, index: int, stream: Stream) -> None:
        self.handle, self.index, self._stream = handle, index, stream

    @property
    def name(self) -> str:
        """The module's dotted name in the model."""
        return self.handle.name

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self.handle.module

    @property
    def matrices(self) -> list[Matrix]:
        """The block's prunable matrices, in module order."""
        return list(self.handle.matrices)

    def batches(self) -> Iterator[torch.Tensor]:
        """The block's inputs over the calibration set, in order: [sequences, length, hidden] on the device.

        A loop over them is the caller's own: when memory runs out in it nobody can start it again, and the run fails. The
        passes of `collect`, of gradients and from block to block are done again with half the batch.
        """
        return self._stream.batches(self.index)

    def inputs(self, samples: Sequence[int]) -> torch.Tensor:
        """The block's inputs for chosen calibration sequences, in the order given: [chosen, length, hidden] on the device."""
        return self._stream.chosen(self.index, samples)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output [sequences, length, hidden], as it now is, without gradients."""
        with torch.no_grad():
            return self._stream.call(self.index, self.module, hidden)

    def collect(self, *kinds: type[Statistic]) -> Any:
        """Gather statistics of the inputs of every matrix in one pass of the calibration set through the block.

        An expert of a mixture reads the tokens that are routed to it; where these are too few all, in a second pass.

        Args:
            kinds: classes of statistics, any number in one pass.

        Returns:
            For one kind a mapping from matrix to value; for several, a tuple of such mappings in the same order.
        """
        self._stream.resting(self.index)  # before any hook: the first recording runs a block on one sequence
        modules = {matrix: matrix.module for matrix in self.matrices}

        def attempt() -> Any:
            return gather(self.module, modules, kinds, self.batches, self.forward, self._stream.starved)

        return self._stream.halving(attempt, self.index)

    def replica(self, dtype: torch.dtype | None = None, of: nn.Module | None = None) -> Replica:
        """A detached copy of the block (or of another such block), whose parameters take gradients; float32 unless given
        (float64 for such a model)."""
        return Replica(self, dtype or self._stream.work_dtype(), of)

    def gradients(self, loss: Callable[[torch.Tensor], torch.Tensor], reduce: Reduce = "rms") -> dict[Matrix, torch.Tensor]:
        """What `Replica.gradients` finds for the block as it now is."""
        with phase("statistics"):
            return self.replica().gradients(loss, reduce)


class Replica:
    """A detached copy of a block: train it, compare with it, throw it away."""

    def __init__(self, block: Block, dtype: torch.dtype, of: nn.Module | None = None) -> None:
        self._block, self.dtype = block, dtype
        self.module = copy.deepcopy(block.module if of is None else of).to(dtype).eval()
        self.module.requires_grad_(True)
        self._inner = {f"{block.name}.{name}".rstrip("."): module for name, module in self.module.named_modules()}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The copy's output for inputs of the block, [sequences, length, hidden] in the copy's dtype."""
        return self._block._stream.call(self._block.index, self.module, hidden.to(self.dtype))

    def inner(self, matrix: Matrix) -> nn.Module:
        """The copy of a matrix's module."""
        module: nn.Module = self._inner[matrix.name]
        return module

    def collect(self, *kinds: type[Statistic], inputs: torch.Tensor | None = None, samples: Sequence[int] | None = None) -> Any:
        """As `Block.collect`, of what the copy's matrices read.

        Args:
            kinds: classes of statistics, any number in one pass.
            inputs: of the block, [sequences, length, hidden].
            samples: calibration sequences whose inputs are read instead; without both the whole calibration set.
        """
        stream, modules = self._block._stream, self._modules()

        def batches() -> Iterable[torch.Tensor]:
            if inputs is not None:
                return torch.split(inputs, stream.batch_size)
            return self._block.batches() if samples is None else self.inputs(samples)

        def attempt() -> Any:
            return gather(self.module, modules, kinds, batches, self.forward, stream.starved)

        return stream.halving(attempt, self._block.index)

    def inputs(self, samples: Sequence[int]) -> Iterator[torch.Tensor]:
        """The block's inputs for chosen calibration sequences, a batch at a time."""
        size = self._block._stream.batch_size
        for start in range(0, len(samples), size):
            yield self._block.inputs(samples[start : start + size])

    @property
    def device(self) -> torch.device:
        """Where the copy is."""
        return next(self.module.parameters()).device

    def gradients(
        self,
        loss: Callable[[torch.Tensor], torch.Tensor],
        reduce: Reduce = "rms",
        see: Callable[[int, torch.Tensor], None] | None = None,
    ) -> dict[Matrix, torch.Tensor]:
        """Gradients of a regional loss with respect to each matrix, each sample's own, reduced over the calibration set.

        Args:
            loss: from the output for one sample [1, length, hidden] in the copy's dtype to a scalar.
            reduce: over samples: root of the mean of squares, sum of magnitudes, or root of the sum of squares.
            see: is shown the outputs on the way, [samples, length, hidden], and the number of the first of these samples; again
                from the start when memory runs out.

        Returns:
            [outputs, inputs] in the copy's dtype for each matrix; zero where no sample reaches one.
        """
        return self.gradients_and(None, loss, reduce, see)[0]

    def gradients_and(
        self,
        kind: type[Statistic] | None,
        loss: Callable[[torch.Tensor], torch.Tensor],
        reduce: Reduce = "rms",
        see: Callable[[int, torch.Tensor], None] | None = None,
    ) -> tuple[dict[Matrix, torch.Tensor], dict[Matrix, torch.Tensor]]:
        """What `gradients` finds and what `collect` does, in one pass; of no kind there are no statistics."""
        block, stream, modules = self._block, self._block._stream, self._modules()

        def attempt() -> tuple[dict[Matrix, torch.Tensor], dict[Matrix, torch.Tensor]]:
            found, samples = SampleGradients([self.parameter(matrix) for matrix in modules], reduce), 0

            def parts() -> Iterator[torch.Tensor]:
                return found.parts(block.batches(), stream.batch_size)

            def go(part: torch.Tensor) -> None:
                nonlocal samples
                with found.taking(self.module):
                    output = self.forward(part)
                    found.backward(len(part), torch.stack([loss(own) for own in torch.split(output, 1)]).sum())
                if see:
                    see(samples, output.detach())
                samples += len(part)

            values: dict[Matrix, torch.Tensor] = {}
            if kind is None:
                for part in parts():
                    go(part)
            else:
                values = gather(self.module, modules, [kind], parts, self.forward, stream.starved, go)
            return {m: m.oriented(total) for m, total in zip(modules, found.reduced(), strict=True)}, values

        with phase("statistics"):
            return stream.halving(attempt, block.index)

    def _modules(self) -> dict[Matrix, nn.Module]:
        return {matrix: self._inner[matrix.name] for matrix in self._block.matrices}

    def parameter(self, matrix: Matrix) -> nn.Parameter:
        """The copy of a matrix's parameter, in its stored orientation; takes gradients."""
        weight = self._inner[matrix.name].weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The copy of a matrix's weight as [outputs, inputs]; part of the graph."""
        return matrix.oriented(self.parameter(matrix))

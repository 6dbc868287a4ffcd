"""Where a walk is: written down on leaving a block, and put back when a killed run is started again.

The step starts on the model as it found it the first time, so what a method makes before it walks is made again on the same
weights. The walk then puts back the finished blocks with their masks, the hidden states, what the method carries from block to
block and random generators that were drawn from, and goes on with the next block: the bits of a run that was never killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from prunebench.errors import ContractError
from prunebench.handles import BlockHandle, WalkState
from prunebench.spec import Job
from prunebench.toolkit import carried
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.phases import uncounted
from prunebench.toolkit.state import generators, set_generators
from prunebench.toolkit.stream import Stream

_HIDDEN = "hidden states"


class Bookmark:
    """The place of one walk in its job."""

    def __init__(self, job: Job, stream: Stream, carries: Sequence[object]) -> None:
        """`carries` is what the method keeps from block to block: see `carried.py`."""
        self._job, self._stream, self._carries = job, stream, carries
        self._kept = 0
        self._generators: dict[str, Any] = {}
        """As the walk found them."""

    def open(self) -> int:
        """The block to start with, all before it put back.

        Raises:
            ContractError: what was left does not fit the model or what is carried now.
        """
        if self._job.checkpoint is None:
            return 0
        with uncounted():
            self._generators = generators()
            state = self._job.checkpoint.take()
            if state is not None:
                self._put_back(state)
                self._kept = state.done
        return self._kept

    def leave(self, done: int) -> None:
        """So many blocks are finished, and the hidden states are the inputs of the next."""
        checkpoint = self._job.checkpoint
        if checkpoint is None or done == len(self._job.anatomy.blocks) or not checkpoint.due(done):
            return
        with uncounted():
            blocks = dict(self._written(self._job.anatomy.blocks[self._kept : done]))
            passing, written = carried.written(self._carries)
            at, hidden = self._stream.state()
            if hidden is not None:
                passing[_HIDDEN] = hidden
            drawn = generators()
            facts = {
                "at": at,
                "batch_size": self._job.batch_size,
                "carried": written,
                # Nobody who keeps the contract draws from them; untouched ones differ from process to process.
                "starved": self._stream.starved.tokens,
                "generators": None if drawn == self._generators else drawn,
            }
            checkpoint.keep(WalkState(done, len(self._job.anatomy.blocks), blocks, passing, facts))
            self._kept = done

    def _written(self, blocks: Sequence[BlockHandle]) -> Iterator[tuple[str, torch.Tensor]]:
        anatomy = self._job.anatomy
        assert isinstance(anatomy, ModelAnatomy)
        for block in blocks:
            for name, tensor in _numbers(block).items():
                yield name, tensor.detach()
            yield from anatomy.masks.written(block.matrices).items()

    def _put_back(self, state: WalkState) -> None:
        anatomy, facts = self._job.anatomy, state.facts
        assert isinstance(anatomy, ModelAnatomy)
        blocks = anatomy.blocks[: state.done]
        numbers = {name: tensor for block in blocks for name, tensor in _numbers(block).items()}
        missing = numbers.keys() - state.blocks.keys()
        if missing:
            raise ContractError(f"what the killed run left lacks {min(missing)}.")
        with torch.no_grad():
            for name, tensor in numbers.items():
                tensor.copy_(state.blocks[name])
        for block in blocks:
            anatomy.masks.put_back(block.matrices, state.blocks)
        carried.put_back(self._carries, state.passing, facts["carried"])
        self._job.batch_size = facts["batch_size"]
        self._stream.starved.meet(facts["starved"])
        if _HIDDEN in state.passing:
            self._stream.go_on(facts["at"], state.passing[_HIDDEN])
        if facts["generators"] is not None:
            set_generators(facts["generators"])


def _numbers(block: BlockHandle) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers of a block by their full names, each once."""
    named: list[tuple[str, Any]] = [*block.module.named_parameters(), *block.module.named_buffers()]
    return {f"{block.name}.{name}": tensor for name, tensor in named}

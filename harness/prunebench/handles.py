"""Handles: what a pruner holds of a model while it works. The toolkit implements them; see `spec.py` for the contract.

Torch is imported for type checking only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Matrix(Protocol):
    """A prunable matrix: a handle that is found once, before the first step, and stays valid to the end."""

    @property
    def name(self) -> str:
        """The module's dotted name in the model."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""

    @property
    def module(self) -> torch.nn.Module:
        """The module that owns the weight."""

    @property
    def weight(self) -> torch.Tensor:
        """The weight as [outputs, inputs], detached, whatever the storage; looked up at each access, so do not hold it."""

    def oriented(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor in the orientation of the stored parameter (GPT-2 stores it transposed) as [outputs, inputs], and back."""

    def keep(self, mask: torch.Tensor) -> None:
        """Zero the entries where `mask` (boolean, [outputs, inputs]) is False; survivors keep their bits."""

    def write(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        """Store new values [outputs, inputs], cast to the matrix's dtype, and zero the entries where `mask` is False."""


class BlockHandle(Protocol):
    """A decoder block and its prunable matrices."""

    @property
    def name(self) -> str:
        """The module's dotted name in the model."""

    @property
    def module(self) -> torch.nn.Module:
        """The block itself."""

    @property
    def matrices(self) -> Sequence[Matrix]:
        """Its prunable matrices, in module order."""


class Anatomy(Protocol):
    """The decoder blocks of a model, in order."""

    @property
    def blocks(self) -> Sequence[BlockHandle]:
        """The decoder blocks, first to last."""

    @property
    def matrices(self) -> Sequence[Matrix]:
        """All prunable matrices, block by block."""


class DenseWeights(Protocol):
    """The weights before the first step, read a matrix or a block at a time."""

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The dense weight [outputs, inputs], on the matrix's device, in its dtype."""

    def block(self, block: BlockHandle) -> torch.nn.Module:
        """A copy of the block with all its dense parameters, on the block's device."""


class Placement(Protocol):
    """Where blocks and activations rest while they are not worked on, and how they come and go while others are."""

    @property
    def device(self) -> torch.device:
        """Where work is done, and what is in no block."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that blocks may be worked on, `device` first."""

    def expect(self, module: torch.nn.Module | None) -> None:
        """This block is brought next, and its way may begin; with None no block is."""

    def bring(self, module: torch.nn.Module) -> None:
        """Move a block to the device."""

    def settle(self, module: torch.nn.Module) -> None:
        """The block is only read from here to its release, and its way back may begin."""

    def release(self, module: torch.nn.Module) -> None:
        """Let a block go back to where it rests."""

    def drop(self, module: torch.nn.Module) -> None:
        """The same for a block that was only read."""

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where activations rest."""

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch of activations on the device of the block that was brought last."""

    def room(self, like: torch.Tensor, sequences: int) -> torch.Tensor:
        """An empty tensor for so many sequences like the first of `like`, where activations rest."""

    def batches(self, resting: torch.Tensor, rows: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Slices of resting activations, as `fetch` gives them, the next on its way while one is worked on."""

    def pick(self, resting: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Chosen sequences of resting activations, as `fetch` gives them."""

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        """Write a batch, which nobody changes afterwards, over rows of resting activations; fetching them finds it."""

    def finish(self) -> None:
        """Wait until everything is stored: before resting activations are read where they rest."""


@dataclass(frozen=True)
class WalkState:
    """What a walk needs to go on behind a block."""

    done: int
    """Blocks that are finished, the first ones."""
    of: int
    """All blocks."""
    blocks: Mapping[str, torch.Tensor]
    """Numbers and keep masks of the blocks that were finished since the state before; of all of them when it is given back.
    The model's own tensors, which change when it goes on."""
    passing: Mapping[str, torch.Tensor]
    """Hidden states, and what else each state replaces."""
    facts: dict[str, Any]
    """The rest, which `json` can write."""


class Checkpoint(Protocol):
    """Where a step's walk leaves what a run that is killed needs to go on."""

    def take(self) -> WalkState | None:
        """What a killed run left of this walk; None where it starts from the first block; also for a second walk."""

    def due(self, done: int) -> bool:
        """Whether a state is wanted after so many blocks."""

    def keep(self, state: WalkState) -> None:
        """Make a state durable; the one before it is given up only then."""

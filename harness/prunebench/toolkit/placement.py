"""Where blocks and activations rest: all on the device, or on the host and brought over one at a time; and which of it fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.spec import BlockHandle

MOST_SEQUENCES = 8
"""Sequences at a time where there is room. More gain little; fewer change the last bits of sums."""

SPARE = 0.9
"""The share of what is free that may be planned with: allocators keep some, and the footprint is an estimate."""

HOST_TOKENS = 1024
"""Tokens at a time on a host. More gain nothing there, and tensors above 32 MiB take fresh pages from the system each time:
with 4,096 wanda on wiki7m takes a sixth longer, and perplexity an eighth."""


def paying_batch(batch_size: int, length: int, device: torch.device | str) -> int:
    """Sequences of `length` tokens at a time: as many as asked for, on a host no more than make `HOST_TOKENS`."""
    return max(1, min(batch_size, HOST_TOKENS // length)) if torch.device(device).type == "cpu" else batch_size


class Resident:
    """Everything stays on the device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def bring(self, module: nn.Module) -> None:
        """Nothing to do: the block is there."""

    def release(self, module: nn.Module) -> None:
        """Nothing to do: the block stays."""

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the device."""
        return tensor.to(self.device)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch of activations on the device; a copy, so that a block may write into its input."""
        return tensor.to(self.device, copy=True)


class HostActivations(Resident):
    """The model stays on the device; activations rest on the host, and one batch of them at a time is on the device."""

    host = torch.device("cpu")

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the host."""
        return tensor.to(self.host)


class Streaming(HostActivations):
    """Blocks and activations rest on the host; one block and one batch at a time are on the device.

    Embeddings, final norm and head are moved to the device by whoever sets this up (`place_model`).
    """

    def bring(self, module: nn.Module) -> None:
        """Move the block's parameters and buffers to the device."""
        module.to(self.device)

    def release(self, module: nn.Module) -> None:
        """Move the block's parameters and buffers back to the host."""
        module.to(self.host)


@dataclass(frozen=True)
class Footprint:
    """What a walk over the blocks takes on the device, in bytes; estimates, but for the first three."""

    weights: int
    """The whole model."""
    outside: int
    """Of it what is in no block: embeddings, head, final norm."""
    activations: int
    """The hidden states of the calibration set before a block."""
    block: int
    """A block, its copy in float32, the gradients of that, the Gram matrices of its inputs."""
    sequence: int
    """What one sequence leaves in a block for the way back."""


def footprint(model: nn.Module, blocks: Sequence[BlockHandle], samples: int, length: int, hidden: int) -> Footprint:
    """What a walk takes on this model with so many calibration sequences of `length` tokens, hidden states `hidden` wide."""
    own = max((parameter.element_size() for parameter in model.parameters()), default=4)
    single = max(4, own)  # work is done in float32, or in float64 where the model is
    weights = _bytes(model.parameters())
    largest = max(blocks, key=lambda block: _bytes(block.module.parameters()))
    shapes = [matrix.shape for matrix in largest.matrices]
    numbers = sum(parameter.numel() for parameter in largest.module.parameters())
    grams = sum(width * width for width in {inputs for _, inputs in shapes})
    wide = 2 * sum(outputs for outputs, _ in shapes) + max((inputs for _, inputs in shapes), default=0)
    return Footprint(
        weights=weights,
        outside=weights - sum(_bytes(block.module.parameters()) for block in blocks),
        activations=samples * length * hidden * own,
        block=numbers * own + single * (2 * numbers + 2 * grams),
        sequence=single * length * (wide + 4 * hidden),
    )


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum({id(parameter): parameter.nbytes for parameter in parameters}.values())


@dataclass(frozen=True)
class Arrangement:
    """How many sequences are worked on at a time, and where everything rests."""

    batch_size: int
    resting: type[Resident]


def arrange(footprint: Footprint, free: int, resting: Sequence[type[Resident]], batch_size: int | None = None) -> Arrangement:
    """The first arrangement that fits: the full batch wherever it can be had, as where things rest changes no bit.

    Only before the blocks themselves would leave the device is the batch halved. What is free decides nothing where there is
    ample room, and where nothing fits the last arrangement is tried all the same.

    Args:
        footprint: of the model and its calibration set.
        free: bytes on the device, the model not yet there.
        resting: what may be chosen, the fastest first.
        batch_size: asked for; a power of two up to `MOST_SEQUENCES` is chosen without it.
    """
    sizes = [MOST_SEQUENCES >> halved for halved in range(MOST_SEQUENCES.bit_length())] if batch_size is None else [batch_size]
    on_device = [(size, place) for place in resting if place is not Streaming for size in sizes]
    on_device.sort(key=lambda found: found[0], reverse=True)  # stable: for each size, the fastest first
    tried = on_device + [(size, place) for place in resting if place is Streaming for size in sizes]
    for size, place in tried:
        held = footprint.outside if place is Streaming else footprint.weights
        kept = footprint.activations if place is Resident else 0
        if held + kept + footprint.block + size * footprint.sequence <= SPARE * free:
            return Arrangement(size, place)
    return Arrangement(*tried[-1])


def place_model(model: nn.Module, blocks: list[nn.Module], placement: Resident) -> None:
    """Put a model where its placement wants it before the first step."""
    if not isinstance(placement, Streaming):
        model.to(placement.device)
        return
    inside = {id(tensor) for block in blocks for tensor in [*block.parameters(), *block.buffers()]}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None and id(tensor) not in inside:
                    tensor.data = tensor.data.to(placement.device)
    for block in blocks:
        placement.release(block)

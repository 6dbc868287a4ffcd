"""What fits where: how many sequences are worked on at a time, and where blocks and activations rest, by what is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.spec import BlockHandle
from prunebench.toolkit.experts import experts_in
from prunebench.toolkit.placement import MOST_SEQUENCES, HostActivations, Resident, Streaming
from prunebench.toolkit.spread import Spread, homes_of

SPARE = 0.9
"""The share of what is free that may be planned with: allocators keep some, and the footprint is an estimate."""


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
    """What one sequence leaves in a block for the way back; without gradients, what a pass holds of it at most."""
    passing: int = 0
    """Of one sequence the hidden states on their way between host and device, beside those that are worked on."""
    blocks: tuple[int, ...] = ()
    """The weights of each block, in order."""


def footprint(
    model: nn.Module, blocks: Sequence[BlockHandle], samples: int, length: int, hidden: int, gradients: bool = True
) -> Footprint:
    """What a walk takes on this model with so many calibration sequences of `length` tokens, hidden states `hidden` wide.

    Without `gradients` a pass holds most of a sequence where the widest matrix reads it: its input, that in float32 and its
    squares, and four hidden states; 2.3 GB for 8 sequences of LLaMA-2-7B, where 2.2 were counted.
    """
    own = max((parameter.element_size() for parameter in model.parameters()), default=4)
    single = max(4, own)  # work is done in float32, or in float64 where the model is
    weights = _bytes(model.parameters())
    each = tuple(_bytes(block.module.parameters()) for block in blocks)
    largest = blocks[each.index(max(each))]
    shapes = [matrix.shape for matrix in largest.matrices]
    numbers = sum(parameter.numel() for parameter in largest.module.parameters())
    alone = experts_in(largest.module)  # each expert reads tokens of its own
    grams = sum(width * width for width in {m.shape[1] for m in largest.matrices if m.module not in alone})
    grams += sum(matrix.shape[1] ** 2 for matrix in largest.matrices if matrix.module in alone)
    widest = max((inputs for _, inputs in shapes), default=0)
    kept = single * (2 * sum(outputs for outputs, _ in shapes) + widest + 4 * hidden)
    passed = 2 * single * widest + own * (widest + 4 * hidden)
    return Footprint(
        weights=weights,
        outside=weights - sum(each),
        activations=samples * length * hidden * own,
        block=numbers * own + single * (2 * numbers + 2 * grams),
        sequence=length * (kept if gradients else passed),
        passing=3 * length * hidden * own,  # the next inputs, those that the loop still holds, the last outputs
        blocks=each,
    )


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum({id(parameter): parameter.nbytes for parameter in parameters}.values())


@dataclass(frozen=True)
class Arrangement:
    """How many sequences are worked on at a time, and where everything rests."""

    batch_size: int
    resting: type[Resident]
    homes: tuple[int, ...] = ()
    """Where blocks are spread over several devices: the number of each block's."""


def arrange(
    footprint: Footprint,
    free: int | Sequence[int],
    resting: Sequence[type[Resident]],
    batch_size: int | None = None,
) -> Arrangement:
    """The first arrangement that fits: the full batch wherever it can be had, as where things rest changes no bit.

    Only before the blocks themselves would leave the device is the batch halved. What is free decides nothing where there is
    ample room, and where nothing fits the last arrangement is tried all the same.

    Args:
        footprint: of the model and its calibration set.
        free: bytes on the device, the model not yet there; of each device where there are several.
        resting: what may be chosen, the fastest first.
        batch_size: asked for; a power of two up to `MOST_SEQUENCES` is chosen without it.
    """
    free = [free] if isinstance(free, int) else list(free)
    sizes = [MOST_SEQUENCES >> halved for halved in range(MOST_SEQUENCES.bit_length())] if batch_size is None else [batch_size]
    on_device = [(size, place) for place in resting if place is not Streaming for size in sizes]
    on_device.sort(key=lambda found: found[0], reverse=True)  # stable: for each size, the fastest first
    tried = on_device + [(size, place) for place in resting if place is Streaming for size in sizes]
    for size, place in tried:
        if place is Spread:
            homes = spread_out(footprint, [int(SPARE * there) for there in free], size)
            if homes is not None:
                return Arrangement(size, place, homes)
        elif _taken(footprint, place, size) <= SPARE * free[0]:
            return Arrangement(size, place)
    return Arrangement(*[found for found in tried if found[1] is not Spread][-1])


def spread_out(footprint: Footprint, room: Sequence[int], size: int) -> tuple[int, ...] | None:
    """The device of each block, with room for so many bytes on each and so many sequences at a time; None where it is not
    enough. The first device has the first block, what is in no block, and the activations."""
    working = footprint.block + size * footprint.sequence
    first = footprint.outside + footprint.activations
    homes = homes_of(footprint.blocks, [there - working - (0 if index else first) for index, there in enumerate(room)])
    return homes if homes and homes[0] == 0 else None


def _taken(footprint: Footprint, place: type[Resident], size: int) -> int:
    """Bytes on one device."""
    held = footprint.weights
    if place is Streaming:
        held = footprint.outside + max(footprint.blocks, default=0)  # `block` counts one, and the next is on its way
    kept = footprint.activations if place is Resident else 0
    passing = footprint.passing if issubclass(place, HostActivations) else 0
    return held + kept + footprint.block + size * (footprint.sequence + passing)

"""Activations that are put away one after the other and taken back last first: the inputs of all blocks, for a way back.

On the host they go through two pinned buffers. What is copied from a GPU straight into fresh memory is written by one thread
of the driver, page by page; out of a pinned buffer all cores write it, while the GPU works on the block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from prunebench.toolkit.transfer import Lane, Ticket, lane_to


class Shelf:
    """Takes copies of tensors of one shape."""

    def __init__(self, device: torch.device, there: bool, lanes: Callable[[torch.device], Lane] = lane_to) -> None:
        """`there`: copies stay where the tensors are; otherwise they go from `device` to the host, by a lane of `lanes`."""
        self._there, self._lane = there, lanes(device)
        self._kept: list[torch.Tensor] = []
        self._buffers: list[torch.Tensor] = []
        self._turn = 0
        self._arriving: tuple[Ticket, torch.Tensor] | None = None
        self._read: Ticket | None = None

    def append(self, hidden: torch.Tensor) -> None:
        """Put a copy away; work that is started on the device from now on may write into the tensor."""
        if self._there:
            self._kept.append(hidden.clone())
            return
        buffer = self._buffer(hidden)
        ticket = self._lane.copy([(hidden, buffer)])
        ticket.wait()
        self._clear()
        self._arriving = ticket, buffer

    def pop(self) -> torch.Tensor:
        """What was put away last of what is left, to be read until the next but one is taken."""
        self._clear()
        found = self._kept.pop()
        if self._there:
            return found
        earlier, self._read = self._read, self._lane.copy([])  # behind all that reads the buffer of the last call
        if earlier is not None:
            earlier.finish()
        return self._buffer(found).copy_(found)

    def _clear(self) -> None:
        """What has arrived leaves its buffer."""
        if self._arriving is not None:
            ticket, buffer = self._arriving
            ticket.finish()
            self._kept.append(buffer.clone())
            self._arriving = None

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """The one of two whose turn it is."""
        self._turn += 1
        if len(self._buffers) < 2:
            self._buffers.append(self._lane.room(like.shape, like.dtype))
            return self._buffers[-1]
        return self._buffers[(self._turn - 1) % 2]

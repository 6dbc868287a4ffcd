"""Copies between the host and a device that go on while both work: a lane takes them in order, a ticket stands for some.

The rules under which no memory is used again while a copy is under way, without `record_stream`, whose memory comes back only
when the device gets there, so that a host that runs ahead fills the device:

* tensors on the device are made by whoever works there, on the stream of that work;
* a lane begins a copy behind all work that was started before it;
* a ticket holds its tensors until it is waited for, and everybody waits for what they began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Sources and their targets, of one shape each."""


class Ticket(Protocol):
    """Copies that were begun."""

    def wait(self) -> None:
        """Work that is started on the device from now on comes behind the copies; the host goes on."""

    def finish(self) -> None:
        """The host waits until they are done, and may read the targets."""


class Lane(Protocol):
    """Takes copies one after the other, so that one that reads what an earlier one writes needs no waiting."""

    plain: int
    """Bytes on the host that could not be had as wished: copies to and from them hold the host up."""

    def copy(self, pairs: Pairs) -> Ticket:
        """Begin copies behind those begun before, and behind the device's work so far. Nobody may write into a source, or touch
        a target, before the ticket is waited for."""

    def room(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An empty tensor on the host, to and from which copies hold nobody up."""

    def resting(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host where copies from it hold nobody up: itself, or a copy of the same strides."""


def lane_to(device: torch.device) -> Lane:
    """A lane between the host and a device."""
    return CudaLane(device) if device.type == "cuda" else Footpath()


class CudaLane:
    """A stream of its own on a GPU, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self.plain = 0
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Pairs) -> Ticket:
        """Two calls of the runtime, and one a pair."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _CudaTicket(self._device, event, pairs)

    def room(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Pinned. PyTorch takes the next power of two of bytes, keeps what was let go, and needs about 0.4 s a GiB the first
        time."""
        try:
            return torch.empty(tuple(size), dtype=dtype, pin_memory=True)
        except RuntimeError:  # the system lets a process pin so much and no more
            found = torch.empty(tuple(size), dtype=dtype)
            self.plain += found.nbytes
            return found

    def resting(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pinned, one by one: a block in one piece would be rounded up as far, and would stand longer before the batches."""
        if tensor.is_pinned():
            return tensor
        try:
            return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
        except RuntimeError:
            self.plain += tensor.nbytes
            return tensor.cpu()


class _CudaTicket:
    def __init__(self, device: torch.device, event: torch.cuda.Event, pairs: Pairs) -> None:
        self._device, self._event, self._held = device, event, pairs

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._held = ()

    def finish(self) -> None:
        self._event.synchronize()
        self._held = ()


class Footpath:
    """Copies at once: where the host is the device, and on devices that have no streams."""

    plain = 0

    def copy(self, pairs: Pairs) -> Ticket:
        """Done on return."""
        with torch.no_grad():
            for source, target in pairs:
                target.copy_(source)
        return _Done()

    def room(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Plain memory."""
        return torch.empty(tuple(size), dtype=dtype)

    def resting(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""

    def finish(self) -> None:
        """Nothing is under way."""

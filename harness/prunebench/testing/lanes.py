"""A lane without a device: copies that are done late, so that whoever forgets to wait for one finds NaN.

The host plays the device. What a lane promises is what it does, and no more: copies in order; on the device only behind a
`wait`, on the host only behind a `finish`, and a later copy of the lane finds what an earlier one brings. A source that
changes while its copy is under way is an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prunebench.toolkit.transfer import Pairs


class LateLane:
    """Takes copies between the host and a device that is played by the host."""

    plain = 0

    def __init__(self, device: torch.device) -> None:
        """`device` is the host; lanes that are made by one placement know nothing of each other."""
        assert device.type == "cpu"
        self._under_way: list[_Copy] = []
        self._at_rest: dict[int, torch.Tensor] = {}
        """The host's memory, kept: an address that is used again would be taken for it."""
        self.lost = self.there = self.most = self.begun = 0
        """Copies whose ticket was thrown away; bytes on the device that came by this lane, and the most there were; copies."""

    def copy(self, pairs: Pairs) -> LateTicket:
        """Take note of what the sources hold now, and spoil the targets."""
        ticket = LateTicket(self)
        for source, target in pairs:
            self.begun += 1
            earlier = [copy for copy in self._under_way if _same_memory(copy.target, source)]
            value = _seen(source, earlier)
            self._overtake(target)
            out = self._is_at_rest(target)
            self._under_way.append(_Copy(ticket, source.detach(), target.detach(), value, out, bool(earlier)))
            spoil(target)
            if not out:
                self._count(target)
        return ticket

    def room(self, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Plain memory, known to be the host's."""
        return self.resting(torch.zeros(tuple(size), dtype=dtype))

    def resting(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, known to be the host's."""
        self._at_rest[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def reach(self, ticket: LateTicket, host: bool) -> None:
        """All copies up to those of a ticket are done: for the device, or for the host as well."""
        last = max((i for i, copy in enumerate(self._under_way) if copy.ticket is ticket), default=-1)
        for number, copy in enumerate(self._under_way[: last + 1]):
            copy.check()
            copy.checked = True
            again = any(_overlap(copy.target, later.target) for later in self._under_way[number + 1 :])
            if (host or not copy.out) and not again:  # a later copy may have written there already
                copy.target.copy_(copy.value)
        self._under_way = [c for i, c in enumerate(self._under_way) if i > last or (c.out and not host)]

    @property
    def open(self) -> int:
        """Copies that nobody has waited for yet."""
        return sum(not copy.ticket.waited for copy in self._under_way)

    def _overtake(self, target: torch.Tensor) -> None:
        """Sources that this lane itself writes over were read before."""
        for copy in self._under_way:
            if _same_memory(copy.source, target):
                copy.check()
                copy.checked = True

    def _is_at_rest(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._at_rest

    def _count(self, target: torch.Tensor) -> None:
        whole = target if target._base is None else target._base
        if not getattr(whole, "counted_by_a_lane", False):
            whole.counted_by_a_lane = True  # type: ignore[attr-defined]
            self.there += whole.nbytes
            self.most = max(self.most, self.there)
            weakref.finalize(whole, self._gone, whole.nbytes)

    def _gone(self, size: int) -> None:
        self.there -= size


class LateTicket:
    """Stands for copies of such a lane."""

    def __init__(self, lane: LateLane) -> None:
        self._lane, self.waited = lane, False

    def wait(self) -> None:
        """They are done for the device."""
        self.waited = True
        self._lane.reach(self, host=False)

    def finish(self) -> None:
        """They are done for the host."""
        self.waited = True
        self._lane.reach(self, host=True)


@dataclass
class _Copy:
    ticket: LateTicket
    source: torch.Tensor
    target: torch.Tensor
    value: torch.Tensor
    out: bool
    """To the host."""
    checked: bool
    """Nothing more is to be said about its source, which the lane itself writes into."""

    def check(self) -> None:
        """The source has not changed since the copy was begun."""
        if not (self.checked or torch.equal(_bits(self.source), _bits(self.value))):
            raise AssertionError("somebody has written into a tensor while it was copied.")


def _seen(source: torch.Tensor, earlier: Sequence[_Copy]) -> torch.Tensor:
    """What the lane finds in a source when it gets there: what its earlier copies bring."""
    for copy in earlier:
        copy.target.copy_(copy.value)
    value = source.detach().clone()
    for copy in earlier:
        spoil(copy.target)
    return value


def spoil(tensor: torch.Tensor) -> None:
    """Fill a tensor with what no number survives."""
    with torch.no_grad():
        tensor.detach().fill_(torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else 77)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Equal for NaN as well."""
    flat = tensor.detach().contiguous()
    return flat.view(torch.uint8) if flat.ndim else flat.reshape(1).view(torch.uint8)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors without gaps share memory."""
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

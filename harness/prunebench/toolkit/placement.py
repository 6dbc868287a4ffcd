"""Where blocks and activations rest: all on the device, or on the host and brought over one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from prunebench.handles import Placement
from prunebench.plain import size_text
from prunebench.toolkit.transfer import Lane, Ticket, lane_to

MOST_SEQUENCES = 8
"""Sequences at a time where there is room. More gain little; fewer change the last bits of sums."""

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

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that work is done on, `device` first."""
        return (self.device,)

    def expect(self, module: nn.Module | None) -> None:
        """Nothing to do: the block is there."""

    def bring(self, module: nn.Module) -> None:
        """Nothing to do: the block is there."""

    def settle(self, module: nn.Module) -> None:
        """Nothing to do: the block stays."""

    def release(self, module: nn.Module) -> None:
        """Nothing to do: the block stays."""

    def drop(self, module: nn.Module) -> None:
        """As `release`."""
        self.release(module)

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the device."""
        return tensor.to(self.device)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch of activations on the device; a copy, so that a block may write into its input. From pinned memory the host
        does not wait for it."""
        return tensor.to(self.device, non_blocking=True, copy=True)

    def room(self, like: torch.Tensor, sequences: int) -> torch.Tensor:
        """An empty tensor for so many sequences like the first of `like`, where activations rest."""
        return self.rest(like.new_empty((0, *like.shape[1:]))).new_empty((sequences, *like.shape[1:]))

    def batches(self, resting: torch.Tensor, rows: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Slices of resting activations, one after the other on the device."""
        for chosen in rows:
            yield self.fetch(resting[chosen])

    def pick(self, resting: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Chosen sequences of resting activations on the device, in the order given."""
        return self.fetch(resting[list(samples)])

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        """Write a batch, which nobody changes afterwards, over the rows of resting activations."""
        resting[rows] = self.rest(batch)

    def finish(self) -> None:
        """Nothing is under way."""

    def remarks(self) -> dict[str, str]:
        """What a record should say of how things came and went."""
        return {}


class HostActivations(Resident):
    """The model stays on the device; activations rest on the host, and a few batches of them are on the device.

    The next batch comes while one is worked on, and the outputs of the last go back. One lane takes both: a batch that is
    fetched where another was stored comes behind it, and the host never waits.
    """

    host = torch.device("cpu")

    def __init__(self, device: torch.device | str, lanes: Callable[[torch.device], Lane] = lane_to) -> None:
        """`lanes` makes a lane between the host and a device."""
        super().__init__(device)
        self._rows = lanes(self.device)
        self._stores: deque[Ticket] = deque()

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the host."""
        return tensor.to(self.host)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, of what is stored first if that is under way."""
        there, ticket = self._begun([tensor], len(tensor))
        ticket.wait()
        return there

    def room(self, like: torch.Tensor, sequences: int) -> torch.Tensor:
        """Room on the host, to and from which copies hold nobody up."""
        return self._rows.room((sequences, *like.shape[1:]), like.dtype)

    def batches(self, resting: torch.Tensor, rows: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Slices one after the other on the device, each on its way while the one before is worked on."""
        ahead: deque[tuple[torch.Tensor, Ticket]] = deque()
        try:
            for index in range(len(rows)):
                for chosen in rows[index + len(ahead) : index + 2]:
                    part = resting[chosen]
                    ahead.append(self._begun([part], len(part)))
                ahead[0][1].wait()
                yield ahead.popleft()[0]
        finally:
            for _, ticket in ahead:  # the loop was left: its memory must not be used again before the copy is done
                ticket.wait()

    def pick(self, resting: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Chosen sequences, each by a copy of its own: gathering them on the host would hold it up."""
        there, ticket = self._begun([resting[sample : sample + 1] for sample in samples], len(samples))
        ticket.wait()
        return there

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        """Begin to write a batch over the rows; it stays on the device until the next is stored or fetched."""
        self._let_go(all_but=1)
        self._stores.append(self._rows.copy([(batch, resting[rows])]))

    def finish(self) -> None:
        """The host waits until everything is stored, and may read it."""
        while self._stores:
            self._stores.popleft().finish()

    def remarks(self) -> dict[str, str]:
        """Of memory that could not be pinned."""
        plain = self._plain()
        return {"host memory that could not be pinned": f"{size_text(plain)}; its copies were waited for"} if plain else {}

    def _plain(self) -> int:
        return self._rows.plain

    def _begun(self, parts: Sequence[torch.Tensor], sequences: int) -> tuple[torch.Tensor, Ticket]:
        self._let_go(all_but=1)
        there = torch.empty((sequences, *parts[0].shape[1:]), dtype=parts[0].dtype, device=self.device)
        return there, self._rows.copy(list(zip(parts, torch.split(there, [len(part) for part in parts]), strict=True)))

    def _let_go(self, all_but: int) -> None:
        while len(self._stores) > all_but:
            self._stores.popleft().wait()


class Streaming(HostActivations):
    """Blocks and activations rest on the host; one block, the next one and a few batches are on the device.

    A block is pinned when it is first on its way, so that the time for that passes while the device works. On its return it
    is copied whole: whether it changed cannot be told from its tensors, as writes through `.data` leave no trace; who has
    only read it says so (`drop`). Blocks have a lane of their own, so that batches need not wait behind one.

    Embeddings, final norm and head are moved to the device by whoever sets this up (`place_model`).
    """

    def __init__(self, device: torch.device | str, lanes: Callable[[torch.device], Lane] = lane_to) -> None:
        """See `HostActivations`."""
        super().__init__(device, lanes)
        self._lane = lanes(self.device)
        self._expected: _Visit | None = None
        self._visits: dict[int, _Visit] = {}

    def expect(self, module: nn.Module | None) -> None:
        """Begin to copy a block to the device; what was expected before and has not come is given up. The block is not written
        into until it is brought."""
        if self._expected is not None and self._expected.module is not module:
            self._expected.ticket.wait()
            self._expected = None
        if module is None or self._expected is not None or id(module) in self._visits:
            return
        shared = {id(tensor) for visit in self._visits.values() for tensor in visit.tensors}
        if not shared & {id(tensor) for tensor in tensors_of(module)}:  # else it is on its visit with another block
            try:
                self._expected = self._sent(module)
            except torch.OutOfMemoryError:
                self._expected = None  # there is no room for two at present: it is sent for when it is brought

    def bring(self, module: nn.Module) -> None:
        """Have the block's parameters and buffers on the device, behind their copy."""
        if self._expected is not None and self._expected.module is module:
            visit, self._expected = self._expected, None
        else:
            visit = self._sent(module)
        visit.ticket.wait()
        for tensor, there in zip(visit.tensors, visit.there, strict=True):
            tensor.data = there
        self._visits[id(module)] = visit

    def settle(self, module: nn.Module) -> None:
        """Begin to copy the block back: it is only read from here to its release."""
        visit = self._visits[id(module)]
        visit.back = self._lane.copy(list(zip(visit.there, visit.resting, strict=True)))

    def release(self, module: nn.Module) -> None:
        """The block is on the host again, with what it has become."""
        visit = self._visits[id(module)]
        if visit.back is None:
            self.settle(module)
        self.drop(module)

    def drop(self, module: nn.Module) -> None:
        """The block is on the host again, as it was brought or settled."""
        visit = self._visits.pop(id(module))
        if visit.back is not None:
            visit.back.finish()
        for tensor, resting in zip(visit.tensors, visit.resting, strict=True):
            tensor.data = resting

    def _plain(self) -> int:
        return super()._plain() + self._lane.plain

    def _sent(self, module: nn.Module) -> _Visit:
        tensors = tensors_of(module)
        for tensor in tensors:
            tensor.data = self._lane.resting(tensor.data)
        resting = [tensor.data for tensor in tensors]
        there = [torch.empty_like(tensor, device=self.device) for tensor in resting]
        ticket = self._lane.copy(list(zip(resting, there, strict=True)))
        return _Visit(module, tensors, resting, there, ticket)


@dataclass
class _Visit:
    """A block on the device, or on its way there."""

    module: nn.Module
    tensors: list[torch.Tensor]
    """Its parameters and buffers."""
    resting: list[torch.Tensor]
    """Their numbers on the host."""
    there: list[torch.Tensor]
    """And on the device."""
    ticket: Ticket
    back: Ticket | None = None


@contextmanager
def brought(placement: Placement, module: nn.Module) -> Iterator[None]:
    """A block that is only read, on the device for the time inside."""
    placement.bring(module)
    try:
        yield
    finally:
        placement.drop(module)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}.values())


def place_rest(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Move what is in no block."""
    inside = {id(tensor) for block in blocks for tensor in tensors_of(block)}
    for tensor in tensors_of(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)


def place_model(model: nn.Module, blocks: list[nn.Module], placement: Resident) -> None:
    """Put a model where its placement wants it before the first step."""
    if not isinstance(placement, Streaming):
        model.to(placement.device)
        return
    place_rest(model, blocks, placement.device)
    for block in blocks:
        block.to(placement.host)

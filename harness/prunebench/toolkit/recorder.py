"""The arguments that a model's own forward gives each of its blocks, recorded once and replayed for any batch size.

Kept per block, because they differ by layer (Gemma-3's sliding and full attention, `methods.md` 1.6). All calibration
sequences have one length and no padding, so the arguments are the same for every sequence; that is checked for every batch,
and a model for which it does not hold, or whose blocks exchange more than the hidden state, is refused by name. Which
tensors grow with the batch is seen by giving the model one sequence, and the same one twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunebench.errors import Refused
from prunebench.spec import Job


@dataclass
class BlockCall:
    """What a block is called with besides the hidden state; of tensors that grow with the batch, one sequence's part."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    """The hidden state's."""
    tail: tuple[Any, ...] | None = None
    """What the block returns after the hidden state; None where it returns that alone, and no tuple."""
    device: torch.device | None = None
    """The hidden state's."""

    def returning(self, hidden: torch.Tensor) -> Any:
        """A hidden state as the block returns it."""
        return hidden if self.tail is None else (hidden, *self.tail)

    def sized(
        self, batch: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for `batch` sequences; for a hidden state of another dtype floating tensors follow it, and to another
        device all that were where it was."""

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if device is None or tensor.device != self.device else tensor.to(device)

        def fit(value: Any) -> Any:
            if isinstance(value, _PerSequence | torch.Tensor):
                value = _whole(value, batch, there)
            follows = dtype != self.dtype and isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.to(dtype) if follows else value

        return _map(fit, self.args), _map(fit, self.kwargs)


@dataclass
class _PerSequence:
    """A tensor whose first dimension grows with the batch: what one sequence adds to it."""

    part: torch.Tensor


def _whole(
    kept: _PerSequence | torch.Tensor, batch: int, there: Callable[[torch.Tensor], torch.Tensor] = lambda part: part
) -> torch.Tensor:
    """A tensor for so many sequences, of what was kept of it; `there` may move that."""
    if isinstance(kept, torch.Tensor):
        return there(kept)
    part = there(kept.part)
    parts, *rest = part.shape
    # A view wherever it can be one: an attention mask of a whole batch may be a gigabyte.
    return part.expand(batch, *rest) if parts == 1 else torch.cat([part] * batch)


def unpack(output: Any) -> torch.Tensor:
    """The hidden state of a block's return value, a tensor or a tuple that begins with one: the one place that knows."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def record_calls(job: Job, batch_size: int) -> tuple[torch.Tensor, list[BlockCall]]:
    """Run the model over the calibration set with every block replaced by a recorder.

    Returns:
        The first block's inputs [samples, length, hidden], where activations rest, and each block's call.

    Raises:
        Refused: the blocks exchange more than the hidden state, or their arguments depend on the tokens.
    """
    tokens = job.calibration
    hidden: torch.Tensor | None = None
    with _recorders(job) as (run, calls):
        for start in range(0, len(tokens), batch_size):
            batch = tokens[start : start + batch_size]
            first = run(batch)
            if hidden is None:
                hidden = job.placement.room(first, len(tokens))
            job.placement.store(hidden, slice(start, start + len(batch)), first)
    assert hidden is not None
    return hidden, calls


def record_arguments(job: Job) -> list[BlockCall]:
    """Each block's call alone, by what it takes to know it: one sequence, and the same one twice; raises as `record_calls`."""
    with _recorders(job) as (_, calls):
        return calls


@contextmanager
def _recorders(job: Job) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], list[BlockCall]]]:
    """Replace every block by a recorder, which is shown one sequence, and the same one twice.

    Yields what shows it a batch of tokens [sequences, length] and returns the first block's input, and each block's call.
    """
    blocks = [block.module for block in job.anatomy.blocks]
    recording = _Recording(type(job.model).__name__, len(blocks))

    def run(batch: torch.Tensor) -> torch.Tensor:
        recording.start_batch(len(batch))
        # The decoder without the head: its logits over the whole vocabulary would be thrown away.
        job.model.base_model(input_ids=batch.to(job.device), use_cache=False)
        return recording.end_batch()

    first = job.calibration[:1]
    with replaced(blocks, recording.forward):
        run(first)
        run(first.repeat(2, 1))
        yield run, recording.calls


@contextmanager
def replaced(blocks: list[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Give every block the forward that `make` gives for its index and its own, by instance attribute; no module is."""
    earlier = [block.__dict__.get("forward") for block in blocks]  # others replace it too, accelerate for one
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index, block.forward)
        yield
    finally:
        for block, before in zip(blocks, earlier, strict=True):
            block.__dict__.pop("forward", None)
            if before is not None:
                block.forward = before


class _Recording:
    """What the recorders have seen."""

    def __init__(self, family: str, depth: int) -> None:
        self.calls: list[BlockCall] = []
        self._family, self._depth = family, depth
        self._batch = 0
        self._visited = 0
        self._runs = 0
        self._first: torch.Tensor | None = None
        self._handed: tuple[torch.Tensor, int] | None = None
        self._compared: deque[tuple[torch.Tensor, torch.Tensor, int]] = deque(maxlen=8)

    def start_batch(self, size: int) -> None:
        self._batch, self._visited, self._first, self._handed = size, 0, None, None
        self._compared.clear()
        self._runs += 1

    def end_batch(self) -> torch.Tensor:
        if self._visited != self._depth or self._first is None:
            raise Refused(
                f"{self._family} ran {self._visited} of its {self._depth} blocks; every block must run once, in order."
            )
        return self._first

    def visit(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called: keep, or compare with, its arguments."""
        handed, writes = self._handed or (hidden, _writes(hidden))
        if index != self._visited or hidden is not handed or _writes(hidden) != writes:
            raise Refused(f"{self._family} changes the hidden state between its blocks, which the block walk cannot follow.")
        kwargs = {name: value for name, value in kwargs.items() if not _is_cache(value)}
        if self._runs == 1:
            self.calls.append(BlockCall(args, kwargs, hidden.dtype, device=hidden.device))
        elif self._runs == 2:
            kept = self.calls[index]
            marked = _marked(kept.args, args), _marked(kept.kwargs, kwargs)
            self.calls[index] = BlockCall(*marked, kept.dtype, kept.tail, kept.device)
        if not _same((self.calls[index].args, self.calls[index].kwargs), (args, kwargs), self._equal):
            raise Refused(f"{self._family} gives its blocks arguments that depend on the tokens, which cannot be replayed.")
        self._visited += 1
        if index == 0:
            self._first = hidden.clone()  # after the last block the model may write into it
        self._handed = (hidden, _writes(hidden))

    def _equal(self, kept: _PerSequence | torch.Tensor, given: torch.Tensor) -> bool:
        """Whether a tensor is for the batch what was kept of it; the host waits, so what all blocks share is compared once."""
        part, writes = (kept.part if isinstance(kept, _PerSequence) else kept), _writes(given)
        if any(part is one and given is other and writes == then for one, other, then in self._compared):
            return True
        whole = _whole(kept, self._batch)
        if whole.dtype != given.dtype or not torch.equal(whole, given):
            return False
        self._compared.append((part, given, writes))
        return True

    def forward(self, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """What block `index` does instead of its own forward."""

        def record(*args: Any, **kwargs: Any) -> Any:
            hidden, rest, named = _split(args, kwargs)
            self.visit(index, hidden, rest, named)
            call = self.calls[index]
            if self._runs == 1:
                call.tail = self.calls[0].tail if index else _tail(own, hidden, call, self._family)
            return call.returning(hidden)

        return record


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def _tail(own: Callable[..., Any], hidden: torch.Tensor, call: BlockCall, family: str) -> tuple[Any, ...] | None:
    """What the blocks return after the hidden state, found by running the first, which is on the device, on one sequence."""
    args, kwargs = call.sized(1, hidden.dtype)
    output = own(hidden[:1].clone(), *args, **kwargs)
    if not isinstance(output, tuple):
        return None
    if any(isinstance(part, torch.Tensor) for part in output[1:]):
        raise Refused(f"the blocks of {family} return more than the hidden state, which the walk cannot follow.")
    return output[1:]


def _writes(tensor: torch.Tensor) -> int:
    """How often the tensor was written into; not known in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_map(change, part) for part in value)
    if isinstance(value, list):
        return [_map(change, part) for part in value]
    if isinstance(value, dict):
        return {name: _map(change, part) for name, part in value.items()}
    return change(value)


def _marked(one: Any, two: Any) -> Any:
    """What one sequence gave, with the tensors marked that are twice as long for two."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return _PerSequence(one) if one.ndim and two.shape == (2 * one.shape[0], *one.shape[1:]) else one
    if isinstance(one, tuple | list) and isinstance(two, tuple | list) and len(one) == len(two):
        parts = [_marked(part, other) for part, other in zip(one, two, strict=True)]
        return tuple(parts) if isinstance(one, tuple) else parts
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {name: _marked(part, two[name]) for name, part in one.items()}
    return one


def _same(one: Any, other: Any, equal: Callable[[Any, torch.Tensor], bool]) -> bool:
    if isinstance(one, torch.Tensor | _PerSequence) and isinstance(other, torch.Tensor):
        return equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(_same(part, given, equal) for part, given in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name], equal) for name in one)
    return type(one) is type(other) and (not isinstance(one, int | float | str) or one == other)

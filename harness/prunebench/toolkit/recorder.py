"""The arguments that a model's own forward gives each of its blocks, recorded once and replayed for any batch size.

Kept per block, because they differ by layer (Gemma-3's sliding and full attention, `methods.md` 1.6). All calibration
sequences have one length and no padding, so the arguments are the same for every sequence; that is checked for every batch,
and a model for which it does not hold, or whose blocks exchange more than the hidden state, is refused by name.
"""

from __future__ import annotations

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
    """What a block is called with besides the hidden state; batch-sized tensors hold one row."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def sized(self, batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for `batch` sequences; floating tensors in the hidden state's dtype."""

        def fit(value: Any) -> Any:
            if isinstance(value, _PerSequence):
                value = value.row.expand(batch, *value.row.shape[1:])
            return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        args = tuple(_map(fit, value) for value in self.args)
        return args, {name: _map(fit, value) for name, value in self.kwargs.items()}


@dataclass
class _PerSequence:
    """A tensor whose first dimension is the batch: its one row."""

    row: torch.Tensor


def unpack(output: Any) -> torch.Tensor:
    """The hidden state of a block's return value, a tensor or a tuple that begins with one: the one place that knows."""
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


def record_calls(job: Job) -> tuple[torch.Tensor, list[BlockCall]]:
    """Run the model over the calibration set with every block replaced by a recorder.

    Returns:
        The first block's inputs [samples, length, hidden], where activations rest, and each block's call.

    Raises:
        Refused: the blocks exchange more than the hidden state, or their arguments depend on the tokens.
    """
    tokens = job.calibration
    blocks = [block.module for block in job.anatomy.blocks]
    family = type(job.model).__name__
    recording = _Recording(family, len(blocks))
    hidden: torch.Tensor | None = None
    with _replaced(blocks, recording, job):
        for start in range(0, len(tokens), job.batch_size):
            batch = tokens[start : start + job.batch_size].to(job.device)
            recording.start_batch(len(batch))
            # The decoder without the head: its logits over the whole vocabulary would be thrown away.
            job.model.base_model(input_ids=batch, use_cache=False)
            first = recording.end_batch()
            if hidden is None:
                hidden = job.placement.rest(first.new_empty((0, *first.shape[1:]))).new_empty(
                    (len(tokens), *first.shape[1:])
                )
            hidden[start : start + len(batch)] = job.placement.rest(first)
    assert hidden is not None
    return hidden, recording.calls


class _Recording:
    """What the recorders have seen."""

    def __init__(self, family: str, depth: int) -> None:
        self.calls: list[BlockCall] = []
        self._family, self._depth = family, depth
        self._batch = 0
        self._visited = 0
        self._first: torch.Tensor | None = None
        self._handed: torch.Tensor | None = None

    def start_batch(self, size: int) -> None:
        self._batch, self._visited, self._first, self._handed = size, 0, None, None

    def end_batch(self) -> torch.Tensor:
        if self._visited != self._depth or self._first is None:
            raise Refused(
                f"{self._family} ran {self._visited} of its {self._depth} blocks; every block must run once, in order."
            )
        return self._first

    def visit(self, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block is called: keep, or compare with, its arguments."""
        if index != self._visited or (self._handed is not None and hidden is not self._handed):
            raise Refused(
                f"{self._family} changes the hidden state between its blocks, which the block walk cannot follow."
            )
        call = BlockCall(
            tuple(_map(self._keep, value) for value in args),
            {name: _map(self._keep, value) for name, value in kwargs.items() if not _is_cache(value)},
        )
        if len(self.calls) == index:
            self.calls.append(call)
        elif not _same((call.args, call.kwargs), (self.calls[index].args, self.calls[index].kwargs)):
            raise Refused(
                f"{self._family} gives its blocks arguments that depend on the tokens, which cannot be replayed."
            )
        self._visited += 1
        self._first = hidden if index == 0 else self._first
        self._handed = hidden

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or self._batch == 1 or value.shape[0] != self._batch:
            # With a batch of one, a first dimension of 1 fits any batch by broadcasting.
            return value
        if not bool((value == value[:1]).all()):
            raise Refused(
                f"{self._family} gives its blocks arguments that depend on the tokens, which cannot be replayed."
            )
        return _PerSequence(value[:1].clone())


@contextmanager
def _replaced(blocks: list[nn.Module], recording: _Recording, job: Job) -> Iterator[None]:
    """Give every block a recording forward, by instance attribute: the module tree stays as it is."""
    shape: Callable[[torch.Tensor], Any] | None = None

    def recorder(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal shape
            hidden, rest, named = _split(args, kwargs)
            recording.visit(index, hidden, rest, named)
            if shape is None:
                shape = _return_shape(own, hidden, recording.calls[0], job, blocks[0])
            return shape(hidden)

        return forward

    originals = [block.forward for block in blocks]
    try:
        for index, (block, own) in enumerate(zip(blocks, originals, strict=True)):
            block.forward = recorder(index, own)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def _return_shape(
    own: Callable[..., Any], hidden: torch.Tensor, call: BlockCall, job: Job, block: nn.Module
) -> Callable[[torch.Tensor], Any]:
    """How the blocks return the hidden state, found by running the first one on one sequence."""
    args, kwargs = call.sized(1, hidden.dtype)
    job.placement.bring(block)
    output = own(hidden[:1], *args, **kwargs)
    if not isinstance(output, tuple):
        return lambda state: state
    if any(isinstance(part, torch.Tensor) for part in output[1:]):
        raise Refused(
            f"the blocks of {type(job.model).__name__} return more than the hidden state, which the walk cannot follow."
        )
    tail = output[1:]
    return lambda state: (state, *tail)


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


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, _PerSequence) or isinstance(other, _PerSequence):
        return torch.equal(_row(one), _row(other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return type(one) is type(other)


def _row(value: Any) -> torch.Tensor:
    row = value.row if isinstance(value, _PerSequence) else value
    assert isinstance(row, torch.Tensor)
    return row

"""A model whose blocks are not all on the device, called as if they were: each comes when it is called and goes again.

Right for every evaluation, also one that knows nothing of it, and as slow as bringing every block for every batch is: what
can take its batches through one block at a time does so instead, by the same placement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunebench.handles import Placement
from prunebench.toolkit.placement import brought
from prunebench.toolkit.recorder import replaced
from prunebench.toolkit.spread import called_there


class Visits:
    """A placement for blocks that are only read, which counts who asks for one: the first brings it, the last lets it go."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._asked: Counter[int] = Counter()

    @property
    def device(self) -> torch.device:
        """Where work is done."""
        return self._placement.device

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All devices that blocks may be worked on."""
        return self._placement.devices

    def expect(self, module: nn.Module | None) -> None:
        """This block is brought next."""
        self._placement.expect(module)

    def bring(self, module: nn.Module) -> None:
        """Have a block on the device, where it may be already."""
        if not self._asked[id(module)]:
            self._placement.bring(module)
        self._asked[id(module)] += 1

    def settle(self, module: nn.Module) -> None:
        """Nothing of the block has to be copied back."""

    def release(self, module: nn.Module) -> None:
        """Let a block go, once nobody else asked for it."""
        self._asked[id(module)] -= 1
        if not self._asked[id(module)]:
            del self._asked[id(module)]
            self._placement.drop(module)

    def drop(self, module: nn.Module) -> None:
        """As `release`."""
        self.release(module)

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where activations rest."""
        return self._placement.rest(tensor)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch of activations on the device of the block that was brought last."""
        return self._placement.fetch(tensor)

    def room(self, like: torch.Tensor, sequences: int) -> torch.Tensor:
        """An empty tensor for so many sequences like the first of `like`, where activations rest."""
        return self._placement.room(like, sequences)

    def batches(self, resting: torch.Tensor, rows: Sequence[slice]) -> Iterator[torch.Tensor]:
        """Slices of resting activations, as `fetch` gives them."""
        return self._placement.batches(resting, rows)

    def pick(self, resting: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """Chosen sequences of resting activations, as `fetch` gives them."""
        return self._placement.pick(resting, samples)

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        """Write a batch over rows of resting activations."""
        self._placement.store(resting, rows, batch)

    def finish(self) -> None:
        """Wait until everything is stored."""
        self._placement.finish()


@contextmanager
def visiting(blocks: Sequence[nn.Module], visits: Visits) -> Iterator[None]:
    """While this is open, a block that is called comes before its forward and goes behind it; the next is expected."""

    def visit(index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with brought(visits, blocks[index]):
                visits.expect(blocks[(index + 1) % len(blocks)])
                return called_there(blocks[index], own, args, kwargs)

        return forward

    try:
        with replaced(list(blocks), visit):
            yield
    finally:
        visits.expect(None)

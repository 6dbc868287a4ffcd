"""Placements that see what a pruner does with blocks that may move."""

from __future__ import annotations

import torch
from torch import nn

from prunebench.toolkit.placement import Resident, Streaming


class Counted(Resident):
    """A placement that knows which blocks were brought and not released: an open walk holds one."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.held: list[nn.Module] = []

    def bring(self, module: nn.Module) -> None:
        """Remember the block."""
        self.held.append(module)

    def release(self, module: nn.Module) -> None:
        """Forget it."""
        self.held = [other for other in self.held if other is not module]


class Moved(Streaming):
    """Streaming as to a device of its own, on the host: with each move a block's numbers change place, and NaN stays behind."""

    def __init__(self) -> None:
        super().__init__("cpu")

    def bring(self, module: nn.Module) -> None:
        """To the device."""
        _move(module)

    def release(self, module: nn.Module) -> None:
        """And back."""
        _move(module)


def _move(module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        left = tensor.data
        tensor.data = left.clone()
        if left.is_floating_point():
            left.fill_(torch.nan)

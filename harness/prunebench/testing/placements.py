"""Placements that see what a pruner does with blocks that may move."""

from __future__ import annotations

import torch
from torch import nn

from prunebench.testing.lanes import LateLane, spoil
from prunebench.toolkit.placement import Resident, Streaming, tensors_of


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
    """Streaming as to a device of its own, on the host: copies are late, and of a block that was there NaN stays behind."""

    def __init__(self) -> None:
        super().__init__("cpu", LateLane)

    def bring(self, module: nn.Module) -> None:
        """To the device."""
        left = [tensor.data for tensor in tensors_of(module)]
        super().bring(module)
        _spoil(left)

    def drop(self, module: nn.Module) -> None:
        """And back, whether it changed or not: what was left on the host is gone."""
        if self._visits[id(module)].back is None:
            self.settle(module)
        left = [tensor.data for tensor in tensors_of(module)]
        super().drop(module)
        _spoil(left)


def _spoil(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        spoil(tensor)

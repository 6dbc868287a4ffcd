"""Low-rank adapters that stay apart from the weights: forward hooks add to a matrix's output, the module tree is untouched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from prunebench.errors import ContractError
from prunebench.handles import Matrix


@dataclass(eq=False)
class Adapter:
    """`scale * up @ down` beside a matrix (Hu et al. 2021, arXiv 2106.09685, section 4.1)."""

    matrix: str
    """The matrix's name."""
    down: torch.Tensor
    """[rank, inputs]."""
    up: torch.Tensor
    """[outputs, rank]."""
    scale: float

    def added(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the matrix's output gains, in the adapter's dtype; the factors follow the inputs to their device."""
        self.down, self.up = self.down.to(inputs.device), self.up.to(inputs.device)
        return nn.functional.linear(nn.functional.linear(inputs.to(self.down.dtype), self.down), self.up) * self.scale

    def hook(self, module: nn.Module) -> RemovableHandle:
        """Let a module's output gain it until the handle is removed; added before rounding to the output's dtype."""

        def add(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return (output + self.added(args[0])).to(output.dtype)

        return module.register_forward_hook(add)


class Adapters:
    """The adapters attached to a model, in the order they came."""

    def __init__(self) -> None:
        self._attached: list[tuple[Adapter, RemovableHandle]] = []

    def attach(self, matrix: Matrix, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        """Attach a copy of the two factors to a matrix, for good.

        Raises:
            ContractError: the factors do not fit the matrix.
        """
        outputs, inputs = matrix.shape
        if down.ndim != 2 or up.shape != (outputs, down.shape[0]) or down.shape[1] != inputs:
            factors = f"{list(up.shape)} times {list(down.shape)}"
            raise ContractError(f"{matrix.name} is {list(matrix.shape)}, and an adapter of {factors} does not fit.")
        adapter = Adapter(matrix.name, down.detach().clone(), up.detach().clone(), scale)
        self._attached.append((adapter, adapter.hook(matrix.module)))

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(adapter.down.numel() + adapter.up.numel() for adapter in self)

    def detach(self) -> None:
        """Take all of them off."""
        for _, handle in self._attached:
            handle.remove()
        self._attached.clear()

    def __iter__(self) -> Iterator[Adapter]:
        return (adapter for adapter, _ in self._attached)

    def __len__(self) -> int:
        return len(self._attached)

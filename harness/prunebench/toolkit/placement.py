"""Where blocks and activations rest: all on the device, or on the host and brought over one at a time."""

from __future__ import annotations

import torch
from torch import nn

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

    def bring(self, module: nn.Module) -> None:
        """Nothing to do: the block is there."""

    def release(self, module: nn.Module) -> None:
        """Nothing to do: the block stays."""

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the device."""
        return tensor.to(self.device)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A batch of activations on the device; a copy, so that a block may write into its input."""
        return tensor.to(self.device, copy=True)


class Streaming(Resident):
    """Blocks and activations rest on the host; one block and one batch at a time are on the device.

    Embeddings, final norm and head are moved to the device by whoever sets this up (`place_model`).
    """

    host = torch.device("cpu")

    def bring(self, module: nn.Module) -> None:
        """Move the block's parameters and buffers to the device."""
        module.to(self.device)

    def release(self, module: nn.Module) -> None:
        """Move the block's parameters and buffers back to the host."""
        module.to(self.host)

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Activations rest on the host."""
        return tensor.to(self.host)


def place_model(model: nn.Module, blocks: list[nn.Module], placement: Resident) -> None:
    """Put a model where its placement wants it before the first step."""
    if not isinstance(placement, Streaming):
        model.to(placement.device)
        return
    inside = {id(tensor) for block in blocks for tensor in [*block.parameters(), *block.buffers()]}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None and id(tensor) not in inside:
                    tensor.data = tensor.data.to(placement.device)
    for block in blocks:
        placement.release(block)

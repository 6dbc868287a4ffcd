"""One run over several devices: which block is on which, and a walk whose hidden states go to the block.

The first device has what is in no block, embeddings, final norm and head: what reads tokens or makes logits works there, and
`job.device` is it. Hidden states rest there too, and each batch goes to the device of the block that it passes and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunebench.errors import RequestError
from prunebench.toolkit.placement import Resident, Streaming, place_rest


def devices_of(text: str) -> tuple[torch.device, ...]:
    """The devices that a text names: `cpu`, `cuda` (the first), `cuda:1`, `cuda:0+1` for two GPUs, `cuda+` for all.

    Raises:
        RequestError: it names none, or one twice.
    """
    kind, _, numbers = text.partition(":")
    if kind == "cuda+" and not numbers:
        return tuple(torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    parts = numbers.split("+") if numbers else []
    plain = kind == "cuda" and (bool(parts) or ":" not in text) and all(part.isascii() and part.isdigit() for part in parts)
    if text != "cpu" and not plain:
        raise RequestError(f"--device is cpu, cuda or cuda:N, cuda:N+M for several GPUs or cuda+ for all, not {text!r}.")
    # A GPU always has its number: PyTorch takes `cuda` and `cuda:0` for two devices, and some calls want the number.
    found = (torch.device("cpu"),) if kind == "cpu" else tuple(torch.device(kind, int(part)) for part in parts or ["0"])
    if len(set(found)) < len(found):
        raise RequestError(f"--device {text} names a GPU twice.")
    return found


def homes_of(blocks: Sequence[int], room: Sequence[int]) -> tuple[int, ...] | None:
    """The device of each block: as many of the first ones as fit on the first device, then on the next; None if not all fit.

    Contiguous runs, so that hidden states change the device as seldom as can be. Whatever fits in this order of devices at all
    fits so: no other choice has more blocks placed by the time a device is left.

    Args:
        blocks: bytes of each.
        room: bytes for blocks on each device; a negative number is none.
    """
    found: list[int] = []
    device, left = 0, room[0] if room else 0
    for size in blocks:
        while size > left:
            device += 1
            if device >= len(room):
                return None
            left = room[device]
        left -= size
        found.append(device)
    return tuple(found)


class Spread(Resident):
    """Every block stays on its device, and what is fetched goes to that of the block that was brought last.

    Blocks of other models, the dense one beside a pruned one, come from the host to the first device and go again.
    """

    def __init__(self, devices: Sequence[torch.device], homes: Mapping[nn.Module, int]) -> None:
        """`homes` says for each block which of the devices has it."""
        super().__init__(devices[0])
        self._devices = tuple(devices)
        self._homes = {id(module): self._devices[home] for module, home in homes.items()}
        self._present = self.device
        self._guests = Streaming(self.device)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All of them."""
        return self._devices

    def counts(self) -> dict[str, int]:
        """How many blocks each device has."""
        homes = list(self._homes.values())
        return {str(device): homes.count(device) for device in self._devices}

    def expect(self, module: nn.Module | None) -> None:
        """A guest's way may begin."""
        self._guests.expect(None if id(module) in self._homes else module)

    def bring(self, module: nn.Module) -> None:
        """From now on batches go to this block."""
        self._present = self._homes.get(id(module), self.device)
        if id(module) not in self._homes:
            self._guests.bring(module)

    def release(self, module: nn.Module) -> None:
        """A guest goes back with what it has become; batches still go where it was."""
        if id(module) not in self._homes:
            self._guests.release(module)

    def drop(self, module: nn.Module) -> None:
        """A guest goes back as it came."""
        if id(module) not in self._homes:
            self._guests.drop(module)

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device of the block that was brought last."""
        return tensor.to(self._present, non_blocking=True, copy=True)

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        """Write a batch back to the first device."""
        resting[rows].copy_(batch)

    def place(self, model: nn.Module) -> None:
        """Put a model's blocks where they belong, and what is in no block on the first device."""
        blocks = [module for module in model.modules() if id(module) in self._homes]
        for block in blocks:
            block.to(self._homes[id(block)])
        place_rest(model, blocks, self.device)


def called_there(block: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block's own forward returns where its input came from, wherever the block is."""
    hidden = args[0] if args else kwargs["hidden_states"]
    there = next(block.parameters()).device
    if hidden.device == there:
        return own(*args, **kwargs)
    return moved(own(*moved(args, there), **moved(kwargs, there)), hidden.device)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dictionaries on another device; the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    return value

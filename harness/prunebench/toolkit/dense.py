"""The weights before the first step, for methods that compare with them and for the audit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from prunebench.spec import BlockHandle, Matrix
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy


class DenseWeights:
    """Read-only weights of the blocks as they were: read from the model's own files, or from a copy on the host.

    The files are used only where every block parameter is found there under its own name and shape, and the first block's
    values agree with the model as loaded: some checkpoints are renamed or rearranged on loading.
    """

    def __init__(self, anatomy: ModelAnatomy, folder: Path | None = None) -> None:
        """`folder` is where the model was loaded from; without one the weights are copied to the host now."""
        self._names = {id(module): name for name, module in anatomy.model.named_modules()}
        self._hooks = {name: set(module._forward_hooks) for name, module in anatomy.model.named_modules()}
        self._files = _files_by_tensor(folder) if folder else {}
        self._copies: dict[str, torch.Tensor] = {}
        if not self._files or not all(self._agrees(block, check_values=i == 0) for i, block in enumerate(anatomy.blocks)):
            self._files = {}
            for block in anatomy.blocks:
                for name, parameter in block.module.named_parameters():
                    self._copies[f"{block.name}.{name}"] = parameter.detach().to("cpu", copy=True)

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The dense weight [outputs, inputs], on the matrix's device, in its dtype."""
        assert isinstance(matrix, LinearMatrix)
        stored = self._read(f"{self._names[id(matrix.module)]}.weight")
        return matrix.oriented(stored.to(matrix.parameter.device, matrix.parameter.dtype))

    def block(self, block: BlockHandle) -> nn.Module:
        """A copy of the block with all its dense parameters, on the block's device; without adapters attached since."""
        twin = copy.deepcopy(block.module)
        for name, module in twin.named_modules():
            for key in module._forward_hooks.keys() - self._hooks[f"{block.name}.{name}".rstrip(".")]:
                del module._forward_hooks[key]
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(self._read(f"{block.name}.{name}"))
        return twin

    def _read(self, name: str) -> torch.Tensor:
        if name in self._copies:
            return self._copies[name].clone()  # a caller may work on it in place
        with safe_open(str(self._files[name]), framework="pt") as file:
            tensor = file.get_tensor(name)
            assert isinstance(tensor, torch.Tensor)
            return tensor

    def _agrees(self, block: BlockHandle, check_values: bool) -> bool:
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            if full not in self._files:
                return False
            with safe_open(str(self._files[full]), framework="pt") as file:
                if list(file.get_slice(full).get_shape()) != list(parameter.shape):
                    return False
            if check_values and not torch.equal(self._read(full).to(parameter.device, parameter.dtype), parameter):
                return False
        return True


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found

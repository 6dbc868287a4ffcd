"""The weights before the first step, for methods that compare with them and for the audit."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from prunebench.spec import BlockHandle, Matrix
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy
from prunebench.toolkit.experts import Piece, names_in_files


class DenseWeights:
    """Read-only weights of the blocks as they were: read from the model's own files, or from a copy on the host.

    The files are used only where every block parameter is found there in its own shape, under its own name or, of an expert,
    under one of those that mixtures have in files, and the first block's values agree with the model as loaded: some
    checkpoints are renamed or rearranged on loading.
    """

    def __init__(self, anatomy: ModelAnatomy, folder: Path | None = None) -> None:
        """`folder` is where the model was loaded from; without one the weights are copied to the host now."""
        self._remember(anatomy)
        self._files = _files_by_tensor(folder) if folder else {}
        self._found: dict[str, tuple[Piece, ...]] = {}
        self._copies: dict[str, torch.Tensor] = {}
        if not self._files or not all(self._agrees(block, check_values=i == 0) for i, block in enumerate(anatomy.blocks)):
            self._files = {}
            for block in anatomy.blocks:
                for name, parameter in block.module.named_parameters():
                    self._copies[f"{block.name}.{name}"] = parameter.detach().to("cpu", copy=True)

    def _remember(self, anatomy: ModelAnatomy) -> None:
        """What modules are called, and which hooks they have."""
        self._names = {id(module): name for name, module in anatomy.model.named_modules()}
        self._hooks = {name: set(module._forward_hooks) for name, module in anatomy.model.named_modules()}

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
        pieces = [self._piece(*piece) for piece in self._pieces(name)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _piece(self, name: str, index: int | None) -> torch.Tensor:
        with safe_open(str(self._files[name]), framework="pt") as file:
            tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
            assert isinstance(tensor, torch.Tensor)
            return tensor

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        """Where the files have a parameter, told by name; nothing where they have it not."""
        if name not in self._found:
            there = (pieces for pieces in names_in_files(name) if all(part in self._files for part, _ in pieces))
            self._found[name] = next(there, ())
        return self._found[name]

    def _shape(self, pieces: tuple[Piece, ...]) -> list[int]:
        shapes = []
        for name, index in pieces:
            with safe_open(str(self._files[name]), framework="pt") as file:
                shape = list(file.get_slice(name).get_shape())
                shapes.append(shape if index is None else shape[1:])
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if len(shapes) > 1 else shapes[0]

    def _agrees(self, block: BlockHandle, check_values: bool) -> bool:
        for name, parameter in block.module.named_parameters():
            full = f"{block.name}.{name}"
            pieces = self._pieces(full)
            if not pieces or self._shape(pieces) != list(parameter.shape):
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

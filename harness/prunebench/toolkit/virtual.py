"""Virtual shapes: models that are too large to be anywhere whole. A block's weights are drawn when the walk reaches it, and
are looked at and dropped when it is left.

Between visits a block rests on the meta device, without a byte. Drawn again, its matrices get zeros where the recorded keep
masks remove entries. What else a step changed in it is lost, so a block whose kept weights, biases or norms were changed is not
drawn again: a step that does that is the last one, and visits each block once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from prunebench.errors import Refused
from prunebench.spec import Changes, Pruner
from prunebench.toolkit.anatomy import DecoderBlock, KeepMasks, LinearMatrix, ModelAnatomy, find_anatomy
from prunebench.toolkit.audit import Look, bits, differing, look_at
from prunebench.toolkit.memory import gib_setting
from prunebench.toolkit.phases import uncounted
from prunebench.toolkit.placement import HostActivations, Resident
from prunebench.toolkit.shapes import RandomWeights, filled

LIMIT = "PRUNEBENCH_VIRTUAL_GIB"
"""The environment variable that says from how many GiB of weights on a shape is virtual."""

SHARE_OF_HOST = 0.5
"""Of the host's memory: what weights may take up to be there whole."""

_LOST = Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS
"""Changes in a block that cannot be made again from the seed and the masks."""


def is_large(weight_bytes: int) -> bool:
    """Whether a shape of so many bytes is virtual on this host.

    Raises:
        RequestError: the setting is not a number of GiB.
    """
    most = gib_setting(LIMIT)
    if most is None:
        return weight_bytes > SHARE_OF_HOST * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return weight_bytes > most


def is_virtual(model: nn.Module) -> bool:
    """Whether some of a model's weights are nowhere."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_steps(pruners: Sequence[Pruner], steps: Sequence[str], name: str) -> None:
    """Whether the steps can be taken on a virtual shape, whose blocks are made anew for each step.

    Args:
        pruners: one a step.
        steps: as written.
        name: of the shape.

    Raises:
        Refused: a step that is not the last leaves more behind than masks.
    """
    for pruner, text in zip(pruners[:-1], steps, strict=False):
        if pruner.changes() & _LOST:
            raise Refused(
                f"{text} changes more than masks, which {name} would lose before the next step: it is too large for this host, "
                "and its blocks are drawn anew for each step."
            )


def left_virtual(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Draw what is in no block of a model without weights, on the device; the blocks stay without."""
    inside = tuple(f"{block.name}." for block in find_anatomy(model).blocks)
    return filled(model, dtype, device, lambda name: None if name.startswith(inside) else device)


class Drawing(Resident):
    """A block is drawn when it is brought, looked at and dropped when it is released; activations rest on the device.

    Neither counts in a phase: they stand for a model that is there.
    """

    def __init__(self, device: torch.device | str, anatomy: ModelAnatomy, weights: RandomWeights) -> None:
        super().__init__(device)
        self._anatomy, self._weights = anatomy, weights
        self._blocks = {id(block.module): block for block in anatomy.blocks}
        self._owners = {matrix.name: block for block in anatomy.blocks for matrix in block.matrices}
        self._there: dict[str, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
        """What rests on the meta device of the blocks that are here, by the block's name."""
        self._earlier = KeepMasks()
        self._looks: dict[str, tuple[Look, int]] = {}
        self._changed: set[str] = set()
        self._altered: set[str] = set()
        """Blocks in which more was changed than the masks say."""

    def begin(self) -> None:
        """A step begins: what it finds is the seed's weights under the masks of now."""
        self._earlier = self._anatomy.masks.copy()
        self._looks.clear()
        self._changed.clear()

    def bring(self, module: nn.Module) -> None:
        """Draw a block.

        Raises:
            Refused: it was changed in a way that cannot be made again.
        """
        block = self._blocks[id(module)]
        if block.name in self._there:
            return
        if block.name in self._altered:
            raise Refused(
                f"{block.name} is visited again after its kept weights were changed, which a shape that is too large for this "
                "host cannot keep."
            )
        with uncounted(), torch.no_grad():
            self._there[block.name] = list(_parameters(block))
            for name, owner, key, resting in self._there[block.name]:
                owner._parameters[key] = nn.Parameter(self._weights.make(name, resting), resting.requires_grad)
            for matrix in block.matrices:
                if (mask := self._anatomy.masks.beside(matrix)) is not None:
                    matrix.weight.masked_fill_(~mask, 0)

    def release(self, module: nn.Module) -> None:
        """Look at a block and drop it; where an exception is on its way, only drop it."""
        failing = isinstance(sys.exc_info()[1], Exception)
        block = self._blocks[id(module)]
        if block.name in self._there and not failing:
            with uncounted(), torch.no_grad():
                self._look_at(block)
        self.drop(module)

    def drop(self, module: nn.Module) -> None:
        """Drop a block that was only read."""
        for _, owner, key, resting in self._there.pop(self._blocks[id(module)].name, []):
            owner._parameters[key] = resting

    def look(self, matrix: LinearMatrix) -> Look:
        """What was seen of a matrix when its block was left last; of one that the step did not visit, what it is now."""
        if matrix.name not in self._looks:
            module = self._owners[matrix.name].module
            self.bring(module)
            self.release(module)
        return self._looks[matrix.name][0]

    def differing(self, matrix: LinearMatrix) -> int:
        """Survivors that the step changed, when the block was left last."""
        self.look(matrix)
        return self._looks[matrix.name][1]

    def changed(self) -> set[str]:
        """Names of parameters outside the matrices that the step changed."""
        return self._changed

    def _look_at(self, block: DecoderBlock) -> None:
        matrices = {id(matrix.parameter): matrix for matrix in block.matrices}
        for name, _, _, parameter in _parameters(block):
            drawn = self._weights.make(name, parameter)
            if id(parameter) in matrices:
                self._look_at_matrix(block, matrices[id(parameter)], drawn)
            elif not torch.equal(bits(parameter.detach()), bits(drawn)):
                self._changed.add(name)
                self._altered.add(block.name)

    def _look_at_matrix(self, block: DecoderBlock, matrix: LinearMatrix, drawn: torch.Tensor) -> None:
        mask, old, dense = self._anatomy.masks.beside(matrix), self._earlier.beside(matrix), matrix.oriented(drawn)
        was = dense if old is None else dense.masked_fill(~old, 0)
        found = differing(matrix.weight, was, mask, old, dense)
        self._looks[matrix.name] = look_at(matrix.weight, mask), found
        if found:
            self._altered.add(block.name)


class DrawingToHost(Drawing, HostActivations):
    """The same, with activations on the host."""


def _parameters(block: DecoderBlock) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """A block's parameters: the full name in the model, the module that holds it, its name there, and it."""
    for prefix, module in block.module.named_modules(prefix=block.name):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}", module, key, parameter

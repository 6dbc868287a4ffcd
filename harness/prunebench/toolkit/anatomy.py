"""Decoder blocks and prunable matrices, found by structure: no list of names per family.

The blocks are the members of the outermost `nn.ModuleList` that holds the most linear weights; the prunable matrices are
the `nn.Linear` and transformers `Conv1D` (weights stored transposed) inside them (`methods.md` 1.1). Embeddings, the head,
norms, biases, linears outside the blocks and the routers of mixtures of experts are never touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from prunebench.errors import ContractError, ModelError, Refused
from prunebench.handles import Matrix
from prunebench.spec import JobFacts, MatrixFacts
from prunebench.targets import Target
from prunebench.toolkit.adapters import Adapters
from prunebench.toolkit.experts import gates_of
from prunebench.toolkit.masks import pack_bits, unpack_bits
from prunebench.toolkit.phases import phase


class KeepMasks(Mapping[str, torch.Tensor]):
    """Keep masks by matrix name, bit-packed on the host: a sixteenth of 16-bit weights."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[torch.Tensor, tuple[int, int]]] = {}

    def record(self, name: str, mask: torch.Tensor) -> None:
        """Remember a matrix's mask [outputs, inputs]."""
        rows, columns = mask.shape
        self._packed[name] = (pack_bits(mask), (rows, columns))

    def packed(self) -> dict[str, torch.Tensor]:
        """The masks as bytes (numpy's `packbits`, C order), by matrix name."""
        return {name: bits for name, (bits, _) in self._packed.items()}

    def written(self, matrices: Iterable[Matrix]) -> dict[str, torch.Tensor]:
        """The masks of these matrices as bytes, for a checkpoint, under names that nothing else of a model has."""
        return {_written_name(matrix): self._packed[matrix.name][0] for matrix in matrices if matrix.name in self._packed}

    def put_back(self, matrices: Iterable[Matrix], tensors: Mapping[str, torch.Tensor]) -> None:
        """Remember the masks of these matrices that are among the tensors, as `written` gave them."""
        for matrix in matrices:
            if _written_name(matrix) in tensors:
                self.record(matrix.name, unpack_bits(tensors[_written_name(matrix)], matrix.shape))

    def copy(self) -> KeepMasks:
        """An independent copy, cheap: masks are replaced, never written into."""
        other = KeepMasks()
        other._packed = dict(self._packed)
        return other

    def beside(self, matrix: LinearMatrix, place: torch.device | None = None) -> torch.Tensor | None:
        """A matrix's mask where its weight is, or where asked for, unpacked there: an eighth of the bytes travel.

        None where it has no mask.
        """
        if matrix.name not in self._packed:
            return None
        (packed, shape), device = self._packed[matrix.name], place or matrix.parameter.device
        return unpack_bits(packed if device.type == "meta" else packed.to(device), shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return unpack_bits(*self._packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


def _written_name(matrix: Matrix) -> str:
    return f"the mask of {matrix.name}"


class LinearMatrix:
    """The handle on the weight of one `nn.Linear` or `Conv1D`."""

    def __init__(self, name: str, module: nn.Module, masks: KeepMasks) -> None:
        self.name = name
        self.module = module
        self._transposed = isinstance(module, Conv1D)
        self._masks = masks

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter, in its own orientation."""
        weight = self.module.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self._transposed else (rows, columns)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as [outputs, inputs], detached; a view of what is stored."""
        return self.oriented(self.parameter.detach())

    def oriented(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of the stored orientation as [outputs, inputs], and the other way round."""
        return stored.t() if self._transposed else stored

    def keep(self, mask: torch.Tensor) -> None:
        """Zero the entries where `mask` is False; survivors keep their bits.

        Raises:
            ContractError: the mask is not boolean or not of the matrix's shape.
        """
        with phase("update"):
            self._check(mask)
            self.weight.masked_fill_(~mask.to(self.parameter.device), 0)
            self._masks.record(self.name, mask)

    def write(self, weight: torch.Tensor, mask: torch.Tensor) -> None:
        """Store new values, cast to the matrix's dtype, and zero the entries where `mask` is False.

        Raises:
            ContractError: the weight or the mask does not fit the matrix.
        """
        if tuple(weight.shape) != self.shape:
            raise ContractError(f"{self.name} is {list(self.shape)}, and was given a weight of {list(weight.shape)}.")
        with phase("update"):
            self._check(mask)
            self.weight.copy_(weight.detach())
        self.keep(mask)

    def _check(self, mask: torch.Tensor) -> None:
        if self.parameter.is_meta:
            raise ContractError(f"{self.name} is not there: a matrix of a shape this large is changed inside the walk only.")
        if mask.dtype != torch.bool or tuple(mask.shape) != self.shape:
            kind = str(mask.dtype).removeprefix("torch.")
            raise ContractError(f"{self.name} takes a boolean mask of {list(self.shape)}, not {kind} of {list(mask.shape)}.")


class DecoderBlock:
    """A decoder block and the handles on its matrices."""

    def __init__(self, name: str, module: nn.Module, matrices: Sequence[LinearMatrix]) -> None:
        self.name, self.module, self.matrices = name, module, matrices


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class: there is no other mark that all families share."""
    return "norm" in type(module).__name__.lower()


class ModelAnatomy:
    """The decoder blocks of a model, with the masks laid over their matrices and the adapters attached so far."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[DecoderBlock], masks: KeepMasks) -> None:
        self.model, self.blocks, self.masks = model, blocks, masks
        self.adapters = Adapters()

    @cached_property
    def matrices(self) -> list[LinearMatrix]:
        """All prunable matrices, block by block."""
        return [matrix for block in self.blocks for matrix in block.matrices]

    @property
    def prunable_parameters(self) -> int:
        """Weights in prunable matrices."""
        return sum(matrix.parameter.numel() for matrix in self.matrices)

    @property
    def block_parameters(self) -> int:
        """Parameters in the decoder blocks, each counted once."""
        return sum({id(p): p.numel() for block in self.blocks for p in block.module.parameters()}.values())

    @property
    def total_parameters(self) -> int:
        """Parameters of the model; tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of parameter names that share one tensor."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return tuple(tuple(group) for group in names.values() if len(group) > 1)

    def facts(self, target: Target, earlier: tuple[str, ...] = ()) -> JobFacts:
        """What a pruner may look at before it accepts a job."""
        return JobFacts(
            target=target,
            config=self.model.config,
            matrices=tuple(MatrixFacts(matrix.name, matrix.shape) for matrix in self.matrices),
            tied=self.tied(),
            biases=tuple(name for name, _ in self.model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"),
            earlier=earlier,
        )


def find_anatomy(model: PreTrainedModel) -> ModelAnatomy:
    """Find the decoder blocks and prunable matrices of a model, whose fused experts were taken apart (`experts.py`).

    Raises:
        ModelError: nothing prunable is found, or the blocks cannot be told.
        Refused: block weights sit in fused 3-D parameters (experts not understood), which would be left out silently.
    """
    list_name, members = _find_blocks(model)
    masks = KeepMasks()
    seen: set[int] = set()
    blocks = []
    for index, member in enumerate(members):
        matrices, gates = [], gates_of(member)
        for name, module in member.named_modules():
            weight = None if module in gates else prunable_weight(module)
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                matrices.append(LinearMatrix(f"{list_name}.{index}.{name}".rstrip("."), module, masks))
        blocks.append(DecoderBlock(f"{list_name}.{index}", member, matrices))
    _refuse_fused(blocks)
    return ModelAnatomy(model, blocks, masks)


def prunable_weight(module: nn.Module) -> nn.Parameter | None:
    """The prunable matrix that a module holds itself: the floating 2-D weight of a linear layer."""
    weight = module.weight if isinstance(module, nn.Linear | Conv1D) else None
    return weight if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point() else None


def _find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    sizes: dict[str, int] = {}
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(outer + ".") for outer in lists):
            size = sum(weight.numel() for inner in module.modules() if (weight := prunable_weight(inner)) is not None)
            if size:
                lists[name], sizes[name] = module, size
    if not lists:
        found = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ModelError(
            f"no decoder blocks in {type(model).__name__}: looked for an nn.ModuleList whose members hold nn.Linear or "
            f"Conv1D weights, found parameters only in {', '.join(found)}."
        )
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    of_depth = [name for name in lists if len(lists[name]) == depth] or list(lists)
    chosen = max(of_depth, key=lambda name: sizes[name])
    return chosen, lists[chosen]


def _refuse_fused(blocks: Sequence[DecoderBlock]) -> None:
    fused = [(f"{b.name}.{n}", p.numel()) for b in blocks for n, p in b.module.named_parameters() if p.ndim > 2]
    if fused:
        share = sum(size for _, size in fused) / sum(p.numel() for b in blocks for p in b.module.parameters())
        raise Refused(
            f"{share:.1%} of the block parameters are in fused parameters of three or more dimensions (the first is "
            f"{fused[0][0]}), as mixtures of experts keep them; they cannot be pruned yet and would be left out."
        )

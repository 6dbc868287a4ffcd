"""Did a step do what it said: counts, pattern, coverage, and untouched parts bit for bit.

The reference for "untouched" is taken before each step: fingerprints of everything outside the prunable matrices, and for
the matrices the dense weights under the masks left by earlier steps, or a copy where an earlier step changed survivors.

Of a model that is never there whole the weights are looked at when a block is left (`virtual.py`): `Looks` has what was seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch

from prunebench.errors import AuditError, ContractError, NonFiniteError
from prunebench.spec import Changes
from prunebench.targets import NM, Dense, Target, Unstructured
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy, is_norm
from prunebench.toolkit.dense import DenseWeights

EXTRA_ZEROS = 0.001
"""The share of a matrix that may be zero beyond what the mask removes, unless the method noted why (`extra_zeros`)."""


@dataclass(frozen=True)
class Look:
    """What an audit has to know of a weight."""

    not_finite: int
    """Entries that are NaN or infinite."""
    zeros: int
    left: int
    """Entries that the mask removes and that are not zero."""


class Looks(Protocol):
    """What was seen of weights that are not there any more."""

    @property
    def device(self) -> torch.device:
        """Where it was seen."""

    def look(self, matrix: LinearMatrix) -> Look:
        """At a matrix, when its block was left last."""

    def differing(self, matrix: LinearMatrix) -> int:
        """Survivors of a matrix that the step changed."""

    def changed(self) -> Collection[str]:
        """Parameters of blocks, outside the matrices, that the step changed."""


@dataclass(frozen=True)
class MatrixFinding:
    """Counts of one matrix."""

    name: str
    shape: tuple[int, int]
    removed: int
    zeros: int
    extra: int


@dataclass(frozen=True)
class Finding:
    """What an audit found."""

    matrices: tuple[MatrixFinding, ...]
    prunable_parameters: int
    block_parameters: int
    total_parameters: int

    @property
    def removed(self) -> int:
        """Entries the masks remove."""
        return sum(matrix.removed for matrix in self.matrices)

    @property
    def zeros(self) -> int:
        """Exact zeros in prunable matrices."""
        return sum(matrix.zeros for matrix in self.matrices)

    @property
    def extra(self) -> int:
        """Zeros among the survivors."""
        return sum(matrix.extra for matrix in self.matrices)

    @property
    def coverage(self) -> float:
        """Share of the blocks' parameters that are in matrices from which something was removed."""
        pruned = sum(m.shape[0] * m.shape[1] for m in self.matrices if m.removed)
        return pruned / self.block_parameters


class Before:
    """What a step found, to compare with what it leaves."""

    def __init__(self, anatomy: ModelAnatomy, dense: DenseWeights, survivors_changed: bool, looks: Looks | None = None) -> None:
        """`survivors_changed`: an earlier step changed survivors, so the dense weights no longer tell."""
        self._anatomy, self._dense, self._looks = anatomy, dense, looks
        self.masks = anatomy.masks.copy()
        self._adapters = len(anatomy.adapters)
        self._tied = anatomy.tied()
        self._prints = fingerprints(anatomy)
        self._copies = {m.name: m.weight.to("cpu", copy=True) for m in anatomy.matrices} if survivors_changed else {}

    def weight(self, matrix: LinearMatrix) -> torch.Tensor:
        """A matrix as the step found it, [outputs, inputs]."""
        if matrix.name in self._copies:
            return self._copies[matrix.name].to(matrix.weight.device)
        weight = self._dense.weight(matrix)
        mask = self.masks.beside(matrix)
        return weight if mask is None else weight.masked_fill(~mask.to(weight.device), 0)

    def check_declared(self, changes: Changes) -> None:
        """Compare the model with what the step declared to change.

        Raises:
            ContractError: something undeclared is not bit-identical.
        """
        if len(self._anatomy.adapters) != self._adapters and not changes & Changes.ADAPTER:
            raise ContractError("the step attached adapters, which it does not declare.")
        if self._anatomy.tied() != self._tied and not (changes & Changes.HEAD and self._head_untied()):
            raise ContractError("the step untied parameters that shared one tensor, or tied others.")
        now, seen = fingerprints(self._anatomy), set(self._looks.changed() if self._looks else ())
        for name in sorted(self._prints.keys() | now.keys()):
            if (name in seen or self._prints.get(name) != now.get(name)) and not changes & kind_of(name, self._anatomy):
                raise ContractError(f"the step changed {name}, which it does not declare.")
        if not changes & Changes.KEPT_WEIGHTS:
            for matrix in self._anatomy.matrices:
                self._check_survivors(matrix, changes)

    def check_masks(self, changes: Changes) -> None:
        """Compare the masks with those of earlier steps.

        Raises:
            ContractError: the step changed masks, or revived entries, without declaring it.
        """
        if changes & Changes.MASK_MOVES:
            return
        place = self._looks.device if self._looks else None
        for matrix in self._anatomy.matrices:
            name, old = matrix.name, self.masks.beside(matrix, place)
            if name not in self._anatomy.masks or (old is None and changes & Changes.MASK_GROWS):
                continue
            mask = self._anatomy.masks.beside(matrix, place)
            assert mask is not None
            if old is None and not bool(mask.all()):
                raise ContractError(f"the step masked {name}, and does not declare to change masks.")
            if old is not None and bool((mask & ~old).any()):
                raise ContractError(
                    f"the step revived {int((mask & ~old).sum())} entries of {name}, which it does not declare."
                )
            if old is not None and not changes & Changes.MASK_GROWS and not torch.equal(mask, old):
                raise ContractError(f"the step changed the mask of {name}, and does not declare to change masks.")

    def _head_untied(self) -> bool:
        """Whether all that changed among the ties is that the head, which must change alone, left them."""
        head = self._anatomy.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        names = {f"{name}.weight" for name, module in self._anatomy.model.named_modules() if module is head}
        without = [tuple(n for n in group if n not in names) for group in self._tied]
        return self._anatomy.tied() == tuple(group for group in without if len(group) > 1)

    def _check_survivors(self, matrix: LinearMatrix, changes: Changes) -> None:
        if self._looks is not None:
            found = self._looks.differing(matrix)
        else:
            mask, old = self._anatomy.masks.beside(matrix), self.masks.beside(matrix)
            dense = self._dense.weight(matrix) if old is not None and changes & Changes.MASK_MOVES else None
            found = differing(matrix.weight, self.weight(matrix), mask, old, dense)
        if found:
            raise ContractError(
                f"the step changed {found} surviving entries of {matrix.name}, and does not declare KEPT_WEIGHTS."
            )


def differing(
    now: torch.Tensor, was: torch.Tensor, mask: torch.Tensor | None, old: torch.Tensor | None, dense: torch.Tensor | None
) -> int:
    """How many survivors of a matrix are not the bits that they were, all [outputs, inputs].

    Args:
        now: the weight.
        was: as the step found it.
        mask: the keep mask, if there is one.
        old: the one before the step.
        dense: before the first step, where masks may move: what comes back takes its dense value.
    """
    differs = bits(now) != bits(was)
    if mask is not None:
        differs &= mask.to(differs.device)
    if old is not None and dense is not None:
        differs &= old.to(differs.device) | (bits(now) != bits(dense))
    return int(differs.sum())


def audit(anatomy: ModelAnatomy, target: Target, group: str, explained: bool = False, looks: Looks | None = None) -> Finding:
    """Count, and compare with the target.

    Args:
        anatomy: the pruned model.
        target: what was asked for.
        group: in which comparison group unstructured counts are exact: `row`, `matrix`, `model` or `columns:N`.
        explained: whether the method noted why there are extra zeros.
        looks: what was seen of the weights, where they are not there.

    Raises:
        AuditError: the target is not met; names the matrix that fails.
        NonFiniteError: a matrix holds NaN or infinity.
    """
    findings = tuple(_examine(matrix, anatomy, target, group, looks) for matrix in anatomy.matrices)
    if group == "model" and isinstance(target, Unstructured):
        total, wanted = sum(f.removed for f in findings), target.removed(anatomy.prunable_parameters)
        if total != wanted:
            raise AuditError(f"{total} entries of the model are removed; {target} of all of them are {wanted}.")
    for finding in findings:
        size = finding.shape[0] * finding.shape[1]
        if not explained and not isinstance(target, Dense) and finding.extra > EXTRA_ZEROS * size:
            raise AuditError(
                f"{finding.name} has {finding.extra} zeros beyond the {finding.removed} its mask removes, more than "
                f"{EXTRA_ZEROS:.1%} of the matrix, and the method did not note why (note 'extra_zeros')."
            )
    return Finding(findings, anatomy.prunable_parameters, anatomy.block_parameters, anatomy.total_parameters)


def look_at(weight: torch.Tensor, mask: torch.Tensor | None) -> Look:
    """A weight and its keep mask, if it has one, [outputs, inputs]."""
    finite, is_zero = torch.isfinite(weight), weight == 0
    left = 0 if mask is None else int((~mask.to(weight.device) & ~is_zero).sum())
    return Look(0 if bool(finite.all()) else int((~finite).sum()), int(is_zero.sum()), left)


def _examine(matrix: LinearMatrix, anatomy: ModelAnatomy, target: Target, group: str, looks: Looks | None) -> MatrixFinding:
    mask = anatomy.masks.beside(matrix, looks.device if looks else None)
    found = look_at(matrix.weight, mask) if looks is None else looks.look(matrix)
    if found.not_finite:
        raise NonFiniteError(f"{matrix.name} holds {found.not_finite} entries that are NaN or infinite.")
    if mask is None:
        if target.sparsity > 0:
            raise AuditError(f"{matrix.name} has no keep mask: the method did not prune it, or wrote zeros without `keep`.")
        return MatrixFinding(matrix.name, matrix.shape, 0, found.zeros, found.zeros)
    if found.left:
        raise AuditError(f"{found.left} entries of {matrix.name} that its mask removes are not zero in the weights.")
    gone = ~mask
    removed = int(gone.sum())
    _check_counts(matrix, gone, removed, target, group)
    return MatrixFinding(matrix.name, matrix.shape, removed, found.zeros, found.zeros - removed)


def _check_counts(matrix: LinearMatrix, gone: torch.Tensor, removed: int, target: Target, group: str) -> None:
    rows, columns = matrix.shape
    if isinstance(target, NM):
        kept = target.of - gone.view(rows, columns // target.of, target.of).sum(dim=-1)
        if int(kept.max()) > target.keep:
            bad = int((kept > target.keep).sum())
            raise AuditError(f"{bad} groups of {matrix.name} keep more than {target.keep} of {target.of} weights.")
    elif isinstance(target, Dense):
        if removed:
            raise AuditError(f"{removed} entries of {matrix.name} are removed, and the target is dense.")
    elif group == "row":
        wanted, counts = target.removed(columns), gone.sum(dim=1)
        wrong = int((counts != wanted).sum())
        if wrong:
            example = int(counts[(counts != wanted).nonzero()[0, 0]])
            raise AuditError(
                f"{wrong} of the {rows} rows of {matrix.name} do not have exactly {wanted} of {columns} entries removed "
                f"(one has {example}); a method that compares over another group says so in `audit_group`."
            )
    elif group == "matrix":
        wanted = target.removed(rows * columns)
        if removed != wanted:
            raise AuditError(f"{removed} entries of {matrix.name} are removed; {target} of {rows * columns} are {wanted}.")
    elif group.startswith("columns:"):
        _check_slabs(matrix, gone, target, group)
    elif group != "model":
        raise AuditError(f"the comparison group {group!r} is none of row, matrix, model and columns:N.")


def _check_slabs(matrix: LinearMatrix, gone: torch.Tensor, target: Unstructured, group: str) -> None:
    """Slabs of N consecutive columns over all rows; the last may be narrower."""
    width = group.removeprefix("columns:")
    if not width.isdecimal() or not int(width):
        raise AuditError(f"the comparison group {group!r} names no number of columns.")
    for index, slab in enumerate(torch.split(gone, int(width), dim=1)):
        removed, wanted = int(slab.sum()), target.removed(slab.numel())
        if removed != wanted:
            first = index * int(width)
            raise AuditError(
                f"{removed} entries of columns {first} to {first + slab.shape[1] - 1} of {matrix.name} are removed; "
                f"{target} of {slab.numel()} are {wanted}."
            )


def fingerprints(anatomy: ModelAnatomy) -> dict[str, bytes]:
    """A hash of every parameter and buffer outside the prunable matrices, with its dtype and shape."""
    matrices = {id(matrix.parameter) for matrix in anatomy.matrices}
    tensors = [*anatomy.model.named_parameters(), *anatomy.model.named_buffers()]
    found = {}
    for name, tensor in tensors:
        described = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        content = b"" if id(tensor) in matrices or tensor.is_meta else _raw(tensor)
        found[name] = hashlib.blake2b(described + content, digest_size=16).digest()
    return found


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers with the bits of a float tensor, so that -0.0 is not 0.0."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(whole)


def kind_of(name: str, anatomy: ModelAnatomy) -> Changes:
    """Which declaration covers a parameter outside the prunable matrices."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = anatomy.model.get_submodule(owner)
    except AttributeError:
        return Changes.NOTHING  # the module is gone, and no declaration covers that
    head = anatomy.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    kind = Changes.NOTHING
    if leaf == "bias":
        kind |= Changes.BIASES
    if is_norm(module):
        kind |= Changes.NORMS
    if head is not None and module is head:
        kind |= Changes.HEAD
    return kind

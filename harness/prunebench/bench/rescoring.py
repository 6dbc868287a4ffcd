"""An earlier run's pruned model, made again from what it kept: the dense model under its masks, with the tensors it changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from prunebench.bench.declared import check_kept, declared
from prunebench.bench.mask_bank import NAMES, WEIGHTS_FORMAT, factor, named_tensors
from prunebench.bench.plan import Rescoring, RunRequest
from prunebench.errors import AuditError, StoreError
from prunebench.results.mask_files import read_masks
from prunebench.results.records import RunRecord
from prunebench.results.tensor_files import Found, read_tensors
from prunebench.spec import Changes, Progress
from prunebench.toolkit.adapter_files import load_adapters
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy, find_anatomy
from prunebench.toolkit.audit import Finding, MatrixFinding
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.loading import check_unchanged, load_model

if TYPE_CHECKING:
    from prunebench.bench.runner import Outcome


def rescored(request: RunRequest, progress: Progress, outcome: Outcome) -> PreTrainedModel:
    """Load the model and make of it what an earlier run made; what pruning had cost is taken from that run's record.

    Raises:
        RunError: the pruned model is not the one that was.
        RequestError: the model, or a file that was kept, is not the one in the record.
    """
    assert request.rescoring is not None
    earlier = request.rescoring.record
    progress("load", 0, 1)
    check_unchanged(request.model, request.spec.model.weights, request.spec.model.tokenizer)
    model = load_model(request.model, request.spec.model.dtype)
    anatomy = outcome.anatomy = find_anatomy(model)
    load_adapters(anatomy, request.model.folder)
    own_parameters = anatomy.total_parameters
    _put_back(request.rescoring, anatomy)
    progress("audit", 0, 1)
    outcome.finding = _counted(anatomy)
    _check_counts(outcome.finding, earlier)
    outcome.steps = [step.model_copy(deep=True) for step in earlier.steps]
    outcome.crowded = earlier.provenance.shared_machine or earlier.machine != request.machine
    outcome.batch_size, outcome.masks = request.batch_size, earlier.masks
    outcome.extra_parameters = anatomy.total_parameters - own_parameters + anatomy.adapters.parameters
    if outcome.extra_parameters != earlier.extra_parameters:
        found, said = outcome.extra_parameters, earlier.extra_parameters
        raise StoreError(f"what was kept has {found} extra parameters, and the record {earlier.id} says {said}.")
    return model


def _put_back(rescoring: Rescoring, anatomy: ModelAnatomy) -> None:
    """Put the masks, and what else was kept, into a model as it was loaded.

    Raises:
        StoreError: a file is missing or changed, belongs to another model, or holds what no step declares to change.
    """
    record, folder = rescoring.record, Path(rescoring.results)
    assert record.masks is not None
    masks = read_masks(folder / record.masks.file, record.masks.hash)
    shapes = {matrix.name: matrix.shape for matrix in anatomy.matrices}
    if masks.manifest.get("weights") != record.spec.model.weights or dict(masks.shapes) != shapes:
        raise StoreError(f"the masks {record.masks.file} belong to another model than {record.spec.model.name}.")
    replaced, changes = set[int](), declared(record.spec)
    if record.masks.weights_file is not None:
        path = folder / record.masks.weights_file
        replaced = _put_weights(_Kept.read(path, record.masks.weights_hash), anatomy, changes)
    elif changes is not None:
        check_kept(None, (), (), anatomy, changes)
    for matrix in anatomy.matrices:
        keep = torch.from_numpy(masks.keep(matrix.name))
        if id(matrix.parameter) in replaced:  # to the bit what it was, also where zeros are negative
            anatomy.masks.record(matrix.name, keep)
        else:
            matrix.keep(keep)


@dataclass(frozen=True)
class _Kept:
    """The tensors of a file of kept weights, and its adapters: the matrix and the scale of each."""

    path: Path
    tensors: Mapping[str, Found]
    adapters: list[tuple[str, float]]

    @classmethod
    def read(cls, path: Path, digest: str | None) -> _Kept:
        """Read it.

        Raises:
            StoreError: it is missing, changed, or holds no kept weights.
        """
        tensors, metadata = read_tensors(path, digest, "the file of kept weights")
        if metadata.get("format") != WEIGHTS_FORMAT:
            raise StoreError(f"{path.name} is no file of kept weights: it is not in the format {WEIGHTS_FORMAT}.")
        try:
            adapters = [(str(matrix), float(scale)) for matrix, scale in json.loads(metadata["adapters"])]
        except (KeyError, TypeError, ValueError, RecursionError):
            raise StoreError(f"the file of kept weights {path.name} does not say what its adapters are.") from None
        return cls(path, tensors, adapters)

    def misfit(self, name: str) -> StoreError:
        """A tensor is not one of the model."""
        return StoreError(f"the file of kept weights {self.path.name} does not fit the model: see {name[:100]!r}.")


def _put_weights(kept: _Kept, anatomy: ModelAnatomy, changes: Changes | None) -> set[int]:
    """Put kept tensors in their places, and attach kept adapters; only what the steps declare, where that is known.

    Returns:
        The parameters that were replaced, by `id`.

    Raises:
        StoreError: they do not fit the model, or the declaration.
    """
    model, left = anatomy.model, dict(kept.tensors)
    matrices = {matrix.name: matrix for matrix in anatomy.matrices}
    for number, (name, scale) in enumerate(kept.adapters):
        found = [left.pop(factor(number, half), None) for half in ("down", "up")]
        if name not in matrices or None in found:
            raise kept.misfit(name)
        down, up = (_tensor(each) for each in found if each is not None)
        anatomy.adapters.attach(matrices[name], down, up, scale)
    if not left.keys() <= named_tensors(anatomy).keys():
        untie_head(model)  # a head that was tied has no name of its own
    if changes is not None:
        check_kept(kept.path.name, left, (name for name, _ in kept.adapters), anatomy, changes)
    named = named_tensors(anatomy)
    with torch.no_grad():
        for name, found_tensor in left.items():
            if name not in named or not _fits(found_tensor, named[name]):
                raise kept.misfit(name)
            named[name].copy_(_tensor(found_tensor))
    return {id(named[name]) for name in left}


def _fits(found: Found, tensor: torch.Tensor) -> bool:
    return found.shape == tuple(tensor.shape) and found.dtype == NAMES.get(tensor.dtype)


def _tensor(found: Found) -> torch.Tensor:
    """A copy in memory: what is on the disk may not be written."""
    content: NDArray[np.uint8] = found.content.copy()
    dtype = next(dtype for dtype, name in NAMES.items() if name == found.dtype)
    return torch.from_numpy(content).view(dtype).view(found.shape)


def _counted(anatomy: ModelAnatomy) -> Finding:
    """Count what an audit counts.

    Raises:
        AuditError: an entry that a mask removes is not zero.
    """
    findings = tuple(_count(matrix, anatomy.masks[matrix.name]) for matrix in anatomy.matrices)
    return Finding(findings, anatomy.prunable_parameters, anatomy.block_parameters, anatomy.total_parameters)


def _count(matrix: LinearMatrix, keep: torch.Tensor) -> MatrixFinding:
    is_zero = matrix.weight == 0
    left, removed, zeros = int((~keep & ~is_zero).sum()), int((~keep).sum()), int(is_zero.sum())
    if left:
        raise AuditError(f"{left} entries of {matrix.name} that its mask removes are not zero in the kept weights.")
    return MatrixFinding(matrix.name, matrix.shape, removed, zeros, zeros - removed)


def _check_counts(found: Finding, earlier: RunRecord) -> None:
    """Compare with the audit of then.

    Raises:
        AuditError: other zeros, or another sparsity.
    """
    audit = earlier.audit
    assert audit is not None
    for now, then in zip(found.matrices, audit.matrices, strict=False):
        if (now.name, now.shape, now.removed, now.zeros) != (then.name, then.shape, then.removed, then.zeros):
            raise AuditError(
                f"{now.name} has {now.zeros} zeros and {now.removed} entries removed, and the record {earlier.id} says "
                f"{then.zeros} and {then.removed} of {then.name}."
            )
    shares = (found.zeros / found.prunable_parameters, found.zeros / found.total_parameters)
    if len(found.matrices) != len(audit.matrices) or shares != (audit.sparsity_prunable, audit.sparsity_total):
        raise AuditError(f"the pruned model has {shares[0]:.6%} zeros, and the record {earlier.id} says something else.")

"""Zeros counted again in the keep masks and weights that a run left: matrix by matrix against the audit, N:M group by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError
from prunebench.plain import plain
from prunebench.results.content import canonical_json
from prunebench.results.findings import Entry, Finding
from prunebench.results.mask_files import MaskFile
from prunebench.results.records import AuditRecord, MatrixAudit, RunRecord
from prunebench.results.tensor_files import BYTES, Found, read_tensors
from prunebench.targets import NM, Target, parse_target


def masks(entry: Entry) -> Iterator[Finding]:
    """The file of the record's masks, if any were kept: its hash, whose it says it is, and what it removes."""
    record = entry.record
    if record.masks is None:
        return
    try:
        found = entry.store.masks(record)
    except StoreError as error:
        yield entry.finding("masks", "masks.hash", f"does not fit: {error}")
        return
    assert found is not None
    yield from _manifest(entry, record, "masks.file", found.manifest)
    if record.audit is None:
        return
    yield from _matrices(entry, record.audit, found, parse_target(record.spec.target))
    if record.masks.weights_file is not None:
        yield from _weights(entry, record, record.audit, found)


def _weights(entry: Entry, record: RunRecord, audit: AuditRecord, masks: MaskFile) -> Iterator[Finding]:
    """The file of kept weights: its hash, whose it says it is, its zeros against the audit and against the masks."""
    assert record.masks is not None
    try:
        path = entry.store.folder / str(record.masks.weights_file)
        found, manifest = read_tensors(path, record.masks.weights_hash, "the file of kept weights")
    except StoreError as error:
        yield entry.finding("masks", "masks.weights_hash", f"does not fit: {error}")
        return
    yield from _manifest(entry, record, "masks.weights_file", manifest)
    for matrix in audit.matrices:
        tensor = found.get(f"{matrix.name}.weight")
        keep = masks.keep(matrix.name) if masks.shapes.get(matrix.name) == tuple(matrix.shape) else None
        if tensor is None or keep is None or tensor.shape not in (keep.shape, keep.shape[::-1]):
            continue
        is_zero = _zeros(tensor)
        if tensor.shape != keep.shape:  # GPT-2 stores it the other way round
            is_zero = is_zero.T
        zeros, left = int(is_zero.sum()), int(np.count_nonzero(~keep & ~is_zero))
        if zeros != matrix.zeros:
            said = f"is {matrix.zeros}, and its kept weights have {zeros} zeros"
            yield entry.finding("masks", f"audit.matrices.{matrix.name}.zeros", said)
        if left:
            said = f"has {left} entries of {matrix.name} that its mask removes and that are not zero"
            yield entry.finding("masks", "masks.weights_file", said)


def _zeros(tensor: Found) -> NDArray[np.bool_]:
    """Where a tensor of numbers is zero, by its bits: all but the sign's are."""
    bits = tensor.content.copy().view({2: np.uint16, 4: np.uint32, 8: np.uint64}[BYTES[tensor.dtype]])
    return np.asarray((bits << 1) == 0).reshape(tensor.shape)


def _manifest(entry: Entry, record: RunRecord, field: str, manifest: Mapping[str, str]) -> Iterator[Finding]:
    """Whose the masks or weights are, as far as their file says it."""
    spec = record.spec
    mine = {
        "weights": spec.model.weights,
        "target": spec.target,
        "method": spec.method,
        "seed": "" if spec.seed is None else str(spec.seed),
        "recipe": canonical_json(spec.recipe.model_dump(mode="json")),
    }
    for key, value in mine.items():
        said = manifest.get(key)
        if said != value:
            theirs = "no word" if said is None else plain(said[:60])
            yield entry.finding("masks", field, f"says {theirs} of its {key}, and the record's is {value[:60] or 'none'}")


def _matrices(entry: Entry, audit: AuditRecord, found: MaskFile, target: Target) -> Iterator[Finding]:
    shapes = {matrix.name: matrix.shape for matrix in audit.matrices}
    for name in sorted(found.shapes.keys() - shapes.keys()):
        yield entry.finding("masks", "masks.file", f"has a mask of {name}, which the audit lacks")
    for matrix in audit.matrices:
        field = f"audit.matrices.{matrix.name}"
        if matrix.name not in found.shapes:
            if matrix.removed:
                yield entry.finding("masks", f"{field}.removed", f"is {matrix.removed}, and the file of masks has none of it")
        elif found.shapes[matrix.name] != tuple(matrix.shape):
            said = f"is {list(matrix.shape)}, and its mask is of {list(found.shapes[matrix.name])}"
            yield entry.finding("masks", f"{field}.shape", said)
        else:
            yield from _counted(entry, matrix, found, target)


def _counted(entry: Entry, matrix: MatrixAudit, found: MaskFile, target: Target) -> Iterator[Finding]:
    field, removed = f"audit.matrices.{matrix.name}.removed", found.removed(matrix.name)
    if removed != matrix.removed:
        yield entry.finding("masks", field, f"is {matrix.removed}, and its mask removes {removed}")
    if isinstance(target, NM) and matrix.removed:
        bad = _overfull(found.keep(matrix.name), target)
        if bad:
            said = f"are in a mask in which {bad} groups keep more than {target.keep} of {target.of}"
            yield entry.finding("masks", field, said)


def _overfull(keep: NDArray[np.bool_], target: NM) -> int:
    """Groups of M consecutive columns that keep more than N."""
    rows, columns = keep.shape
    if columns % target.of:
        return int(rows)
    kept = keep.reshape(rows, columns // target.of, target.of).sum(axis=2)
    return int(np.count_nonzero(kept > target.keep))

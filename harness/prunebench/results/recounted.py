"""Zeros counted again in the keep masks that a run left: matrix by matrix against the audit, N:M group by group."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError
from prunebench.plain import plain
from prunebench.results.findings import Entry, Finding
from prunebench.results.mask_files import MaskFile
from prunebench.results.records import AuditRecord, MatrixAudit, RunRecord, canonical_json
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
    yield from _manifest(entry, record, found)
    if record.audit is None:
        return
    yield from _matrices(entry, record.audit, found, parse_target(record.spec.target))


def _manifest(entry: Entry, record: RunRecord, found: MaskFile) -> Iterator[Finding]:
    """Whose the masks are, as far as their file says it."""
    spec = record.spec
    mine = {
        "weights": spec.model.weights,
        "target": spec.target,
        "method": spec.method,
        "seed": "" if spec.seed is None else str(spec.seed),
        "recipe": canonical_json(spec.recipe.model_dump(mode="json")),
    }
    for key, value in mine.items():
        said = found.manifest.get(key)
        if said != value:
            theirs = "no word" if said is None else plain(said[:60])
            yield entry.finding(
                "masks", "masks.file", f"says {theirs} of its {key}, and the record's is {value[:60] or 'none'}"
            )


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
        return rows
    kept = keep.reshape(rows, columns // target.of, target.of).sum(axis=2)
    return int(np.count_nonzero(kept > target.keep))

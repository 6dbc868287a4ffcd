"""What runs will keep in the mask bank, told before any work, and whether it fits on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from prunebench.answers import ask
from prunebench.bench.costs import Work
from prunebench.errors import RequestError
from prunebench.plain import size_text
from prunebench.results.mask_files import mask_bytes
from prunebench.results.records import RunRecord
from prunebench.spec import Changes
from prunebench.targets import parse_target
from prunebench.toolkit.loading import DTYPES
from prunebench.toolkit.model_shape import ModelShape

SPARE_BYTES = 64 << 20
"""Beside what is expected to be kept, for records and raw answers."""


def expected_bytes(works: Sequence[Work], weights: bool) -> int:
    """What runs will keep, at most; of adapters, whose rank nobody knows before, nothing is counted.

    Raises:
        PluginError: a pruner does not say what it changes.
    """
    return sum(_expected(work, weights) for work in works)


def check_room(results: Path, needed: int) -> None:
    """Find out before any work whether what is to be kept fits on the disk.

    Raises:
        RequestError: it does not.
    """
    there = next(folder for folder in (results.absolute(), *results.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed + SPARE_BYTES > free:
        raise RequestError(
            f"what is to be kept takes up to {size_text(needed)}, and the disk of {results} has {size_text(free)} free: "
            "name another --results, keep no weights, or run less with --only."
        )


def without_masks(records: Sequence[RunRecord], weights: bool) -> int:
    """How many of some settled runs did not keep what is asked for now."""
    pruned = [record for record in records if record.status == "ok" and parse_target(record.spec.target).sparsity > 0]
    return sum(record.masks is None or (weights and record.masks.note is not None) for record in pruned)


def _expected(work: Work, weights: bool) -> int:
    if parse_target(work.target).sparsity == 0:
        return 0
    found, shape, changes = sum(map(mask_bytes, work.shape.matrices)), work.shape, Changes.NOTHING
    for pruner in work.pruners:
        changes |= ask(pruner, "changes")
    if not weights:
        return found
    entries = shape.prunable if changes & Changes.KEPT_WEIGHTS else 0
    entries += shape.vocabulary * shape.hidden if changes & Changes.HEAD else 0
    entries += _small(shape) if changes & (Changes.BIASES | Changes.NORMS) else 0
    return found + entries * DTYPES[work.dtype].itemsize


def _small(shape: ModelShape) -> int:
    """Parameters that are in no matrix, at most; tied heads count as one with the embedding."""
    return max(0, shape.parameters - shape.prunable - shape.vocabulary * shape.hidden)

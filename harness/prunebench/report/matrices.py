"""What was found matrix by matrix: heat maps over roles and blocks, and squares of how far masks overlap.

Runs of one model, method, target and recipe on one machine are one picture, the mean over its seeds. Overlaps are Jaccard
indices: of the weights that either mask removes, the share that both remove; two random halves have 1/3.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError
from prunebench.results.comparison import LoadItems
from prunebench.results.leaderboard import target_title
from prunebench.results.mask_files import MaskFile
from prunebench.results.overlap import overlap
from prunebench.results.records import RunRecord, fingerprint
from prunebench.results.rows import DENSE, seed_order

SPARSITY, ERROR, OVERLAP = "sparsity %", "output error", "overlap of removed weights"

LAYER_ERROR = "layer_error"
"""The evaluation whose items have the columns `matrix` and `error`."""

MOST_MASKS = 24
"""In one square; its pairs grow with the square of it, and so do its labels shrink."""

Masks = Callable[[RunRecord], MaskFile | None]


@dataclass(frozen=True, eq=False)
class Heat:
    """One number a matrix."""

    title: str
    """Model and target."""
    method: str
    """Or two of them, of an overlap."""
    what: str
    """`sparsity %`, `output error` or `overlap of removed weights`."""
    roles: tuple[str, ...]
    """Rows: what a matrix is called in its block."""
    blocks: tuple[int, ...]
    values: NDArray[np.float64]
    """[roles, blocks]; nan where there is no such matrix."""
    ids: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class OverlapSquare:
    """The masks of a model's runs at one target against each other."""

    title: str
    """Model and target; and how many were left out, where there were too many."""
    labels: tuple[str, ...]
    """Methods, with the seed where there is one."""
    values: NDArray[np.float64]
    """[labels, labels], Jaccard indices over all matrices that two masks share; nan where they share none."""
    ids: tuple[str, ...]
    """One a label."""


def heats_of(records: Sequence[RunRecord], masks: Masks, load: LoadItems) -> Iterator[Heat]:
    """The sparsity found and the output error of each row, then the overlap of each two methods with a seed in common."""
    groups = _groups(records)
    for runs in groups.values():
        about = (_title(runs[0]), runs[0].spec.method)
        audits = [run.audit for run in runs if run.audit is not None]
        found = [{one.name: 100 * one.zeros / math.prod(one.shape) for one in audit.matrices} for audit in audits]
        if runs[0].spec.target != DENSE:
            yield from _heat(*about, SPARSITY, found, runs)
        errors = [_errors(run, load) for run in runs]
        yield from _heat(*about, ERROR, [one for one in errors if one], runs)
    for several in _at_one_target(groups).values():
        kept = list(_kept([runs[0] for runs in several], masks))[:MOST_MASKS]
        for (first, one), (second, other) in combinations(kept, 2):
            label = f"{first.spec.method} / {second.spec.method}"
            yield from _heat(_title(first), label, OVERLAP, [overlap(one, other)], [first, second])


def overlaps_of(records: Sequence[RunRecord], masks: Masks) -> Iterator[OverlapSquare]:
    """A square for each model and target of which two masks are kept."""
    for several in _at_one_target(_groups(records)).values():
        every = list(_kept([run for runs in several for run in runs], masks))
        kept = every[:MOST_MASKS]
        if len(kept) < 2:
            continue
        values = np.eye(len(kept))
        for (i, (_, one)), (j, (_, other)) in combinations(enumerate(kept), 2):
            values[i, j] = values[j, i] = jaccard(one, other)
        left = f", the first {len(kept)} of {len(every)} masks" if len(every) > len(kept) else ""
        labels = tuple(_label(run) for run, _ in kept)
        yield OverlapSquare(f"{_title(kept[0][0])}{left}", labels, values, tuple(run.id for run, _ in kept))


def jaccard(first: MaskFile, second: MaskFile) -> float:
    """Of the weights that either removes, in the matrices that both have, the share that both remove; nan where none is."""
    both = either = 0.0
    for name, share in overlap(first, second).items():
        if math.isfinite(share):
            removed = first.removed(name) + second.removed(name)
            common = removed * share / (1 + share)  # from share = common / (removed - common)
            both, either = both + common, either + removed - common
    return both / either if either else math.nan


def place_of(name: str) -> tuple[int, str] | None:
    """A matrix's block and what it is called there: `model.layers.3.self_attn.q_proj` is (3, self_attn.q_proj).

    None for what is in no block.
    """
    found = re.search(r"(?:^|\.)(\d{1,9})\.(.+)$", name)
    return (int(found[1]), found[2]) if found else None


def _heat(
    title: str, method: str, what: str, found: Sequence[Mapping[str, float]], runs: Sequence[RunRecord]
) -> Iterator[Heat]:
    """The mean over runs of each matrix; nothing where no matrix is in a block."""
    names = dict.fromkeys(name for one in found for name in one)
    places = {name: place for name in names if (place := place_of(name)) is not None}
    if not places:
        return
    roles = list(dict.fromkeys(role for _, role in places.values()))
    blocks = sorted({block for block, _ in places.values()})
    values = np.full((len(roles), len(blocks)), math.nan)
    for name, (block, role) in places.items():
        values[roles.index(role), blocks.index(block)] = statistics.fmean(one[name] for one in found if name in one)
    yield Heat(title, method, what, _short(roles), tuple(blocks), values, tuple(run.id for run in runs))


def _short(roles: Sequence[str]) -> tuple[str, ...]:
    """The last parts of their names, where these still tell them apart."""
    last = tuple(role.rpartition(".")[2] for role in roles)
    return last if len(set(last)) == len(last) else tuple(roles)


def _errors(run: RunRecord, load: LoadItems) -> dict[str, float]:
    """The relative squared output error of each matrix, where it was measured and can be read."""
    for score in run.scores.values():
        if score.conditions.get("eval") == LAYER_ERROR:
            try:
                columns = load(run, score)
            except StoreError:  # the board says so
                return {}
            pairs = zip(columns.get("matrix", []), columns.get("error", []), strict=False)
            return {str(name): float(error) for name, error in pairs if not isinstance(error, str)}
    return {}


def _groups(records: Iterable[RunRecord]) -> dict[tuple[str, ...], list[RunRecord]]:
    """The runs of each row, in the order of their seeds; the last parts of a key are target and method."""
    found: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in sorted(records, key=lambda record: (seed_order(record), record.id)):
        if record.status == "ok":
            spec = record.spec
            key = (spec.model.name, spec.model.weights, record.machine, spec.target, spec.method, fingerprint(spec.recipe))
            found.setdefault(key, []).append(record)
    return dict(sorted(found.items()))


def _at_one_target(groups: Mapping[tuple[str, ...], list[RunRecord]]) -> dict[tuple[str, ...], list[list[RunRecord]]]:
    """The rows of each model, machine and target, without what was not pruned."""
    found: dict[tuple[str, ...], list[list[RunRecord]]] = {}
    for key, runs in groups.items():
        if key[3] != DENSE:
            found.setdefault(key[:4], []).append(runs)
    return found


def _kept(runs: Iterable[RunRecord], masks: Masks) -> Iterator[tuple[RunRecord, MaskFile]]:
    """The runs whose masks are kept and can be read."""
    for run in runs:
        try:
            found = masks(run)
        except StoreError:
            continue
        if found is not None:
            yield run, found


def _title(run: RunRecord) -> str:
    return f"{run.spec.model.name}, {target_title(run.spec.target)}"


def _label(run: RunRecord) -> str:
    return run.spec.method if run.spec.seed is None else f"{run.spec.method}, seed {run.spec.seed}"

"""What was found matrix by matrix: heat maps over roles and blocks, and squares of how far masks overlap.

Runs of one model, method, target and recipe on one machine are one picture, the mean over its seeds. Overlaps are Jaccard
indices: of the weights that either mask removes, the share that both remove; two random halves have 1/3.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import RequestError, StoreError
from prunebench.report.naming import short_labels
from prunebench.results.comparison import LoadItems
from prunebench.results.content import fingerprint
from prunebench.results.mask_files import MaskFile
from prunebench.results.overlap import overlap, overlap_in_total
from prunebench.results.records import Recipe, RunRecord
from prunebench.results.rows import DENSE, seed_order, target_title
from prunebench.targets import parse_target

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
    machine: str
    method: str
    """In short, or two of them, of an overlap; with the data where several rows differ in that alone."""
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
    machine: str
    labels: tuple[str, ...]
    """Methods in short, with the data where several rows differ in that alone, and the seed where there is one."""
    values: NDArray[np.float64]
    """[labels, labels], Jaccard indices over all matrices together; nan where two masks are not of the same ones."""
    ids: tuple[str, ...]
    """One a label."""
    chance: float
    """What two masks that remove as many weights at random come to."""


def heats_of(records: Sequence[RunRecord], masks: Masks, load: LoadItems) -> Iterator[Heat]:
    """The sparsity found and the output error of each row, then the overlap of each two rows, by their first seeds."""
    for lines in _lines(records):
        for line in lines:
            audits = [run.audit for run in line.runs if run.audit is not None]
            found = [{one.name: 100 * one.zeros / math.prod(one.shape) for one in audit.matrices} for audit in audits]
            yield from _heat(line, SPARSITY, found)
            errors = [_errors(run, load) for run in line.runs]
            yield from _heat(line, ERROR, [one for one in errors if one])
        kept = [(line.label, *next(iter(own.values()))) for line in lines if (own := _kept(line, masks))][:MOST_MASKS]
        for (first, run, one), (second, another, other) in combinations(kept, 2):
            pair = _Line(f"{first} / {second}", [run, another])
            with suppress(RequestError):  # one of them prunes other matrices
                yield from _heat(pair, OVERLAP, [overlap(one, other)])


def overlaps_of(records: Sequence[RunRecord], masks: Masks) -> Iterator[OverlapSquare]:
    """A square for each model, machine and target of which two masks are kept."""
    for lines in _lines(records):
        every = [(line, run, mask) for line in lines for run, mask in _kept(line, masks).values()]
        kept = every[:MOST_MASKS]
        if len(kept) < 2:
            continue
        values = np.eye(len(kept))
        for (i, (*_, one)), (j, (*_, other)) in combinations(enumerate(kept), 2):
            values[i, j] = values[j, i] = agreement(one, other)
        first = kept[0][1]
        yield OverlapSquare(
            title=_title(first) + (f", the first {len(kept)} of {len(every)} masks" if len(every) > len(kept) else ""),
            machine=first.machine,
            labels=tuple(f"{line.label}{_seed(run)}" for line, run, _ in kept),
            values=values,
            ids=tuple(run.id for _, run, _ in kept),
            chance=(share := parse_target(first.spec.target).sparsity) / (2 - share),
        )


def agreement(first: MaskFile, second: MaskFile) -> float:
    """Of the weights that either removes the share that both remove; nan where none is, or the matrices are not the same."""
    try:
        return overlap_in_total(first, second)
    except RequestError:
        return math.nan


def place_of(name: str) -> tuple[int, str] | None:
    """A matrix's block and what it is called there: `model.layers.3.self_attn.q_proj` is (3, self_attn.q_proj).

    None for what is in no block.
    """
    found = re.search(r"(?:^|\.)(\d{1,9})\.(.+)$", name)
    return (int(found[1]), found[2]) if found else None


def _heat(line: _Line, what: str, found: Sequence[Mapping[str, float]]) -> Iterator[Heat]:
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
    first = line.runs[0]
    ids = tuple(run.id for run in line.runs)
    yield Heat(_title(first), first.machine, line.label, what, _short(roles), tuple(blocks), values, ids)


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


@dataclass(frozen=True)
class _Line:
    """The seeds of one method and recipe, at one target."""

    label: str
    runs: list[RunRecord]


def _lines(records: Iterable[RunRecord]) -> list[list[_Line]]:
    """By model, machine and target, the rows that were pruned, with their runs in the order of their seeds."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[RunRecord]]] = {}
    for record in sorted(records, key=lambda record: (seed_order(record), record.provenance.started, record.id)):
        if record.status == "ok" and record.spec.target != DENSE:
            spec = record.spec
            group = groups.setdefault((spec.model.name, spec.model.weights, record.machine, spec.target), {})
            group.setdefault((spec.method, fingerprint(spec.recipe)), []).append(record)
    return [_labelled(group) for _, group in sorted(groups.items())]


def _labelled(group: Mapping[tuple[str, str], list[RunRecord]]) -> list[_Line]:
    """With the data where these tell rows of one method apart."""
    by_method: dict[str, list[list[RunRecord]]] = {}
    for (method, _), runs in sorted(group.items()):
        by_method.setdefault(method, []).append(runs)
    short, lines = short_labels(by_method), []
    for method, rows in by_method.items():
        recipes = [runs[0].spec.recipe for runs in rows]
        given = next((told for told in (_texts(recipes), _whole(recipes)) if len(set(told)) == len(told)), _whole(recipes))
        labels = [f"{short[method]} ({told})" for told in given] if len(rows) > 1 else [short[method]]
        lines += [_Line(label, runs) for label, runs in zip(labels, rows, strict=True)]
    return lines


def _texts(recipes: Sequence[Recipe]) -> list[str]:
    """By the names of their texts."""
    return [" and ".join(text.name for text in (one.calibration, one.training) if text) or "no data" for one in recipes]


def _whole(recipes: Sequence[Recipe]) -> list[str]:
    """By all that is in them."""
    found = []
    for one in recipes:
        calibrated = f"{one.samples} x {one.length} of {one.calibration.label()}" if one.calibration else ""
        trained = f"{one.training_tokens or 0:,} of {one.training.label()}" if one.training else ""
        found.append("; ".join(filter(None, (calibrated, trained))) or "no data")
    return found


def _kept(line: _Line, masks: Masks) -> dict[int | None, tuple[RunRecord, MaskFile]]:
    """By seed the last of a row's runs whose masks are kept and can be read; runs of one seed differ in what they measured."""
    found: dict[int | None, tuple[RunRecord, MaskFile]] = {}
    for run in line.runs:
        with suppress(StoreError):
            mask = masks(run)
            if mask is not None:
                found[run.spec.seed] = (run, mask)
    return found


def _title(run: RunRecord) -> str:
    return f"{run.spec.model.name}, {target_title(run.spec.target)}"


def _seed(run: RunRecord) -> str:
    return "" if run.spec.seed is None else f", seed {run.spec.seed}"

"""One block pruned again by the method's own code, up to there, and its masks and weights compared with those that were kept.

A method whose walk can be left behind a block (`Claims.BLOCKWISE`) is stopped there, by the door through which runs leave
checkpoints. Another is run to its end where the model is small. What was trained is not made again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from prunebench.bench.artefacts import Artefacts
from prunebench.bench.machine import package_versions
from prunebench.bench.mask_bank import NAMES
from prunebench.bench.measure import free_bytes
from prunebench.bench.plan import RunRequest
from prunebench.bench.workplace import set_up
from prunebench.errors import PrunebenchError
from prunebench.handles import Checkpoint, WalkState
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.mask_files import MaskFile
from prunebench.results.records import RunRecord
from prunebench.results.tensor_files import Found
from prunebench.spec import Changes, Claims, JsonDict, Needs, Progress, Pruner
from prunebench.targets import parse_target
from prunebench.toolkit.adapter_files import load_adapters
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.loading import load_model
from prunebench.toolkit.state import guarded
from prunebench.toolkit.stream import evaluating

SMALL = 50_000_000
"""Prunable weights of a model on which a method that cannot be stopped is run to its end."""

LEAST = 1e-3
"""Of the norm of a matrix: kept weights may be so far from those that the method leaves; on another kind of machine as far as
the share of its mask."""

FEW = 2
"""Entries that may differ whatever the size."""

NEAR, FAR, COARSE = 1e-4, 1e-2, 5e-2
"""Shares of a matrix that may differ: on the same kind of machine, where only batch sizes and threads are others; on another
kind, whose sums are rounded otherwise, which later blocks amplify; there in a 16-bit type."""


class CannotReplay(Exception):
    """Why something was not replayed: a sentence."""


class _Stopped(BaseException):
    """The block that was asked for is done; no method catches it."""


class _StopBehind:
    """A checkpoint that ends a step once so many blocks are finished."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks

    def take(self) -> WalkState | None:
        """Nothing was left: every walk starts with the first block."""
        return None

    def due(self, done: int) -> bool:
        """Behind the last block that is asked for."""
        return done == self._blocks

    def keep(self, state: WalkState) -> None:  # noqa: ARG002 - nobody goes on from there
        """End the step.

        Raises:
            _Stopped: always.
        """
        raise _Stopped


def replay_block(
    request: RunRequest,
    record: RunRecord,
    masks: MaskFile,
    weights: Mapping[str, Found],
    draw: random.Random,
    progress: Progress,
) -> tuple[str, list[tuple[str, str]]]:
    """Prune again up to a block that is drawn.

    Returns:
        What was done, and for each matrix with too many other entries, or too different weights, the field and what is wrong.

    Raises:
        CannotReplay: the method cannot be stopped, was trained, or is another than here.
    """
    pruners = _pruners(record)
    trained = [pruner.name for pruner in pruners if pruner.needs() & Needs.TRAINING]
    if trained:
        raise CannotReplay(f"{trained[0]} trains the model, which was not done again, so no block was compared.")
    progress("load", 0, 1)
    model = load_model(request.model, request.spec.model.dtype)
    anatomy = find_anatomy(model)
    load_adapters(anatomy, request.model.folder)
    stops = len(pruners) == 1 and bool(pruners[0].claims() & Claims.BLOCKWISE) and not pruners[0].changes() & _OUTSIDE
    if not stops and anatomy.prunable_parameters > SMALL:
        raise CannotReplay(
            f"{record.spec.method} cannot be stopped behind a block, and the model is too large to run it whole."
        )
    block = draw.randrange(len(anatomy.blocks))
    target = parse_target(record.spec.target)
    work = set_up(request, model, anatomy, target, pruners, free_bytes(torch.device(request.device), request.memory))
    checkpoint: Checkpoint | None = _StopBehind(block + 1) if stops else None
    for number, pruner in enumerate(pruners):
        notes: JsonDict = {}
        job = work.job(pruner, progress, notes, Artefacts(work.request, pruner, first=number == 0), checkpoint)
        try:
            with guarded([]), evaluating(model):
                pruner.prune(job)
        except _Stopped:
            break
    share = _allowed(record, request)
    wrong = [("masks.file", said) for said in _wrong(anatomy, block, masks, share)]
    wrong += [("masks.weights_file", said) for said in _changed(anatomy, block, weights, share)]
    return f"block {block} of {len(anatomy.blocks)}", wrong


_OUTSIDE = Changes.HEAD | Changes.ADAPTER


def _pruners(record: RunRecord) -> list[Pruner]:
    """The record's steps, as they are here.

    Raises:
        CannotReplay: one is not here, or is of another revision.
    """
    found = []
    for step in record.spec.steps:
        try:
            pruner = load_registry().pruner(parse_step(step.text))
        except PrunebenchError as error:
            raise CannotReplay(f"the method is not here: {error}") from None
        if pruner.revision != step.revision:
            raise CannotReplay(f"{pruner.name} is of revision {pruner.revision} here, and the record of {step.revision}.")
        found.append(pruner)
    return found


def _allowed(record: RunRecord, request: RunRequest) -> float:
    """The share of a matrix's entries that may differ here."""
    same = record.machine == request.machine and record.provenance.packages.get("torch") == package_versions().get("torch")
    if same:
        return NEAR
    return FAR if record.spec.model.dtype in ("float32", "float64") else COARSE


def _changed(anatomy: ModelAnatomy, block: int, weights: Mapping[str, Found], share: float) -> list[str]:
    """Matrices of a block whose kept weights are too far from those that the method leaves, by their norm."""
    found, most = [], max(LEAST, share)
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    for matrix in anatomy.blocks[block].matrices:
        kept = weights.get(f"{matrix.name}.weight")
        if kept is None:
            continue
        mine = matrix.parameter.detach().cpu().double()
        if kept.shape != tuple(mine.shape):
            found.append(f"has weights of another shape of {matrix.name}")
            continue
        theirs = torch.from_numpy(kept.content.copy()).view(dtypes[kept.dtype]).view(kept.shape).double()
        apart = float((mine - theirs).norm() / mine.norm().clamp(min=1e-30))
        if not apart <= most:  # also where it is not a number
            found.append(
                f"has weights of {matrix.name} that are {apart:.2%} from those that the method leaves, more than {most:.1%}"
            )
    return found


def _wrong(anatomy: ModelAnatomy, block: int, masks: MaskFile, share: float) -> list[str]:
    """Matrices of a block whose masks differ in more entries than may differ."""
    found = []
    for matrix in anatomy.blocks[block].matrices:
        kept = torch.from_numpy(masks.keep(matrix.name)) if matrix.name in masks.shapes else None
        mine = anatomy.masks.get(matrix.name)
        if kept is None or mine is None or kept.shape != mine.shape:
            found.append(f"has no such mask of {matrix.name} as the method leaves there")
            continue
        differing, most = int((kept != mine.cpu()).sum()), max(FEW, int(share * kept.numel()))
        if differing > most:
            found.append(f"has {differing} other entries in {matrix.name} than the method leaves there, more than {most}")
    return found

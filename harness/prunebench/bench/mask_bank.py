"""What a run keeps so that its pruned model can be made again: bit-packed masks, and on request what else its method changed.

Masks are a sixteenth of 16-bit weights. With them and the dense model, the pruned one is there again where the method left the
survivors alone. Other methods need the tensors they changed too: every matrix where survivors changed, what differs outside the
matrices, and the factors of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

import prunebench
from prunebench.bench.machine import portable
from prunebench.bench.plan import RunRequest
from prunebench.errors import WriteError
from prunebench.results.content import canonical_json, slug
from prunebench.results.mask_files import mask_metadata, mask_tensors
from prunebench.results.records import MASKS, KeptMasks, RunRecord, RunSpec
from prunebench.results.tensor_files import Tensor, write_tensors
from prunebench.spec import Changes
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.audit import fingerprints

WEIGHTS_FORMAT = "prunebench-weights-1"

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Bank:
    """What one run keeps; made when the model was loaded and nothing was changed."""

    def __init__(self, request: RunRequest, anatomy: ModelAnatomy) -> None:
        assert request.keep is not None
        self._keeping, self._spec, self._anatomy = request.keep, request.spec, anatomy
        self._prefix = _prefix(request)
        remove_half_written(request)
        self._own_adapters = len(anatomy.adapters)
        self._prints = fingerprints(anatomy) if request.keep.weights else {}

    def kept(self, changes: Changes, note: Callable[[str, str], None]) -> KeptMasks | None:
        """Write the masks, and what else is to be kept; None where no mask was laid.

        A disk that is full costs what does not fit on it, and not the run: it is noted.

        Args:
            changes: all that the run's steps declared.
            note: told when they cannot be written.
        """
        if not len(self._anatomy.masks):
            return None
        folder = Path(self._keeping.results) / MASKS
        try:
            path, digest = write_tensors(folder, *masks_of(self._anatomy, self._spec), self._prefix)
            kept = KeptMasks(file=f"{MASKS}/{path.name}", hash=digest, bytes=path.stat().st_size)
        except (WriteError, OSError) as error:
            note("masks not kept", portable(str(error)))
            return None
        beside = [text for flag, text in BESIDE.items() if changes & flag]
        if not beside:
            return kept
        if not self._keeping.weights:
            return kept.model_copy(update={"note": _lacking(beside, "it was not asked for with --keep-weights")})
        try:
            path, digest = write_tensors(folder, *self._weights(changes), self._prefix)
            size = kept.bytes + path.stat().st_size
            return kept.model_copy(update={"weights_file": f"{MASKS}/{path.name}", "weights_hash": digest, "bytes": size})
        except (WriteError, OSError) as error:
            return kept.model_copy(update={"note": _lacking(beside, portable(str(error)))})

    def _weights(self, changes: Changes) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that the run changed, whole and in the run's dtype, and the factors of its adapters."""
        anatomy, found = self._anatomy, dict[str, Tensor]()
        now, inside = fingerprints(anatomy), {id(matrix.parameter) for matrix in anatomy.matrices}
        for name, tensor in named_tensors(anatomy).items():
            differs = changes & Changes.KEPT_WEIGHTS if id(tensor) in inside else now[name] != self._prints.get(name)
            if differs:
                found[name] = _as_written(name, tensor)
        adapters = list(anatomy.adapters)[self._own_adapters :]
        for number, adapter in enumerate(adapters):
            for half, tensor in (("down", adapter.down), ("up", adapter.up)):
                found[factor(number, half)] = _as_written(factor(number, half), tensor)
        said = json.dumps([[adapter.matrix, adapter.scale] for adapter in adapters])
        return found, {**manifest(self._spec), "format": WEIGHTS_FORMAT, "adapters": said}


BESIDE = {
    Changes.KEPT_WEIGHTS: "surviving weights",
    Changes.BIASES: "biases",
    Changes.NORMS: "norms",
    Changes.HEAD: "the head",
    Changes.ADAPTER: "adapters",
}
"""What masks do not say, in words."""


def remove_half_written(request: RunRequest) -> None:
    """Remove what this run had not written to the end when it was killed; nobody else may be at work on it."""
    if request.keep is not None:
        for path in (Path(request.keep.results) / MASKS).glob(f"{_prefix(request)}*.tmp"):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _prefix(request: RunRequest) -> str:
    return f"{request.spec.id}-{slug(request.machine)}-"


def only_what_is_here(record: RunRecord, results: Path) -> RunRecord:
    """The record; where its run was on a node that writes to another disk, without the masks that are there."""
    kept = record.masks
    if kept is None or all((results / file).is_file() for file in (kept.file, kept.weights_file) if file is not None):
        return record
    steps = [step.model_copy(deep=True) for step in record.steps]
    steps[-1].notes["masks not kept"] = "the node of the run does not write to the disk that the results folder is on"
    return record.model_copy(update={"masks": None, "steps": steps})


def masks_of(anatomy: ModelAnatomy, spec: RunSpec) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The keep masks of a pruned model as they are written, and what stands in the file's header."""
    shapes = {matrix.name: matrix.shape for matrix in anatomy.matrices if matrix.name in anatomy.masks}
    packed = anatomy.masks.packed()
    return mask_tensors({name: packed[name].numpy() for name in shapes}), mask_metadata(shapes, manifest(spec))


def manifest(spec: RunSpec) -> dict[str, str]:
    """Whose masks these are."""
    return {
        "weights": spec.model.weights,
        "model": spec.model.name,
        "dtype": spec.model.dtype,
        "target": spec.target,
        "method": spec.method,
        "recipe": canonical_json(spec.recipe.model_dump(mode="json")),
        "seed": "" if spec.seed is None else str(spec.seed),
        "prunebench": prunebench.__version__,
    }


def named_tensors(anatomy: ModelAnatomy) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a model, by the names under which they are kept."""
    return dict([*anatomy.model.named_parameters(), *anatomy.model.named_buffers()])


def factor(number: int, half: str) -> str:
    """What a factor of an adapter is called in the file."""
    return f"adapter {number} {half}"


def _lacking(beside: Sequence[str], reason: str) -> str:
    """Why masks alone are not enough."""
    return f"the method changes more than its masks say ({', '.join(beside)}), and that was not kept: {reason.rstrip('.')}"


def _as_written(name: str, tensor: torch.Tensor) -> Tensor:
    if tensor.dtype not in NAMES:
        raise WriteError(f"{name} holds {tensor.dtype}, which is none of {', '.join(map(str, NAMES))}.")
    return Tensor(NAMES[tensor.dtype], tuple(tensor.shape), partial(_bytes, tensor))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()

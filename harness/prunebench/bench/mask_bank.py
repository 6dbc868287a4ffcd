"""What a run keeps so that its pruned model can be made again: bit-packed masks, and on request what else its method changed.

Masks are a sixteenth of 16-bit weights. With them and the dense model, the pruned one is there again where the method left the
survivors alone. Other methods need the tensors they changed too: every matrix where survivors changed, what differs outside the
matrices, and the factors of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import prunebench
from prunebench.bench.machine import portable
from prunebench.bench.plan import Keeping
from prunebench.errors import WriteError
from prunebench.results.mask_files import mask_metadata, mask_tensors
from prunebench.results.records import MASKS, KeptMasks, RunSpec, canonical_json
from prunebench.results.tensor_files import Tensor, write_tensors
from prunebench.spec import Changes
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.audit import fingerprints

WEIGHTS_FORMAT = "prunebench-weights-1"

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class Bank:
    """What one run keeps; made when the model was loaded and nothing was changed."""

    def __init__(self, keeping: Keeping, spec: RunSpec, anatomy: ModelAnatomy) -> None:
        self._keeping, self._spec, self._anatomy = keeping, spec, anatomy
        self._own_adapters = len(anatomy.adapters)
        self._prints = fingerprints(anatomy) if keeping.weights else {}

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
            path, digest = write_tensors(folder, *masks_of(self._anatomy, self._spec))
            kept = KeptMasks(file=f"{MASKS}/{path.name}", hash=digest, bytes=path.stat().st_size)
        except (WriteError, OSError) as error:
            note("masks not kept", portable(str(error)))
            return None
        beside = [text for flag, text in _BESIDE.items() if changes & flag]
        if not beside:
            return kept
        try:
            if not self._keeping.weights:
                raise WriteError("it was not asked for with --keep-weights")
            path, digest = write_tensors(folder, *self._weights(changes))
            size = kept.bytes + path.stat().st_size
            return kept.model_copy(update={"weights_file": f"{MASKS}/{path.name}", "weights_hash": digest, "bytes": size})
        except (WriteError, OSError) as error:
            said = f"the method changes more than its masks say ({', '.join(beside)}), and that was not kept: "
            return kept.model_copy(update={"note": said + portable(str(error))})

    def _weights(self, changes: Changes) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors that the run changed, whole and in the run's dtype, and the factors of its adapters."""
        anatomy, found = self._anatomy, dict[str, Tensor]()
        now, inside = fingerprints(anatomy), {id(matrix.parameter) for matrix in anatomy.matrices}
        for name, tensor in [*anatomy.model.named_parameters(), *anatomy.model.named_buffers()]:
            differs = changes & Changes.KEPT_WEIGHTS if id(tensor) in inside else now[name] != self._prints.get(name)
            if differs:
                found[name] = _as_written(name, tensor)
        adapters = list(anatomy.adapters)[self._own_adapters :]
        for number, adapter in enumerate(adapters):
            for half, tensor in (("down", adapter.down), ("up", adapter.up)):
                found[factor(number, half)] = _as_written(factor(number, half), tensor)
        said = json.dumps([[adapter.matrix, adapter.scale] for adapter in adapters])
        return found, {**manifest(self._spec), "format": WEIGHTS_FORMAT, "adapters": said}


_BESIDE = {
    Changes.KEPT_WEIGHTS: "surviving weights",
    Changes.BIASES: "biases",
    Changes.NORMS: "norms",
    Changes.HEAD: "the head",
    Changes.ADAPTER: "adapters",
}


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


def factor(number: int, half: str) -> str:
    """What a factor of an adapter is called in the file."""
    return f"adapter {number} {half}"


def _as_written(name: str, tensor: torch.Tensor) -> Tensor:
    if tensor.dtype not in NAMES:
        raise WriteError(f"{name} holds {tensor.dtype}, which is none of {', '.join(map(str, NAMES))}.")
    return Tensor(NAMES[tensor.dtype], tuple(tensor.shape), partial(_bytes, tensor))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()

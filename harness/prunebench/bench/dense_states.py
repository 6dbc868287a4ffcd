"""The dense model's last hidden states, kept between runs: every run of a sweep that compares predictions needs the same.

They are kept beside the artefacts of pruning, by all that their bits depend on, within the same limit; a file is mapped into
memory, not read whole. What an evaluation takes from it is bit for bit what it would make.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from prunebench.bench.artefacts import KIND, as_array, limit_bytes, make_room, making
from prunebench.bench.checkpoint_origin import code_digest
from prunebench.bench.plan import RunRequest
from prunebench.spec import Progress
from prunebench.toolkit.cache import cache_folder, digest, write_file

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
}


class DenseStates:
    """`EvalJob.artefact` for the evaluations of one run."""

    def __init__(self, request: RunRequest, progress: Progress) -> None:
        """For a run, whose model and conditions make the key."""
        model = request.spec.model
        self._progress = progress
        self._key = (
            *(code_digest(frozenset()), model.weights, model.dtype, request.machine, torch.device(request.device).type),
            *(str(request.threads or torch.get_num_threads()), version("torch"), version("transformers")),
        )
        self._waited, self._found, self._made = 0.0, False, False

    def __call__(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor kept by an earlier run; made now, and kept, where there is none. Nobody may write into it.

        Raises:
            RequestError: the setting of how much may be kept is not a number of GiB.
        """
        key, limit = digest([*self._key, "dense states", name]), limit_bytes()
        if (kept := _load(key)) is not None:
            self._found = True
            return kept
        started = time.perf_counter()
        with making(key, lambda: self._progress("wait for what another run makes of the dense model", 0, 1)):
            self._waited += time.perf_counter() - started
            if (kept := _load(key)) is not None:
                self._found = True
                return kept
            self._made, made = True, make()
            _save(key, made, limit)
        return made

    def settle(self, note: Callable[[str, str], None]) -> float:
        """Seconds that the last evaluation waited for another run; notes that it took what another has made."""
        waited, found = self._waited, self._found and not self._made
        self._waited, self._found, self._made = 0.0, False, False
        if found:
            note("the dense model", "its last hidden states are those that another run has kept")
        return waited


def _load(key: str) -> torch.Tensor | None:
    """The tensor under a key, mapped into memory; None where there is none, or none that is as it was written."""
    for path in sorted((cache_folder() / KIND).glob(f"{key}.*.npy")):
        try:
            _, dtype, checksum, _ = path.name.split(".")
            array = np.load(path, mmap_mode="c", allow_pickle=False)  # writing into it would change no file
            if _checksum(array) == checksum:
                return torch.from_numpy(np.asarray(array)).view(_DTYPES[dtype])
        except (OSError, EOFError, ValueError, KeyError):  # cut short or not ours
            pass
        path.unlink(missing_ok=True)
    return None


def _save(key: str, tensor: torch.Tensor, limit: int) -> None:
    """Keep a tensor; where it does not fit, or nothing can be written, it is made again next time."""
    array = as_array(tensor)
    if not make_room(array.nbytes, limit):
        return
    name = f"{key}.{str(tensor.dtype).removeprefix('torch.')}.{_checksum(array)}.npy"
    write_file(cache_folder() / KIND / name, lambda file: np.save(file, array, allow_pickle=False))


def _checksum(array: np.ndarray[Any, Any]) -> str:
    """Of an array's bytes, eight hex digits; a part of the file's name, as the format has no place for it."""
    return f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"

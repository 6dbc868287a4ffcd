"""What `job.artefact` keeps between runs: tensors that serve every target of a sweep, with what they cost to make.

The key is all that their bits depend on, and the machine, whose costs they carry. A run that takes one from the cache adds
that cost to its own, so that prune seconds are always stand-alone; the time of loading and saving is in no phase.
Only a run's first step is served: what a later one finds depends on the steps before it. What was made with a batch that had
to be halved is not kept: its bits are not those of the batch in the key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import filelock
import numpy as np
import torch

from prunebench.bench.checkpoint_origin import code_digest
from prunebench.bench.measure import Cost, peaks_so_far
from prunebench.bench.plan import RunRequest
from prunebench.spec import Job, Pruner
from prunebench.toolkit.cache import cache_folder, digest, load_arrays, save_arrays
from prunebench.toolkit.memory import gib_setting
from prunebench.toolkit.phases import lap, uncounted

KIND = "artefacts"
LIMIT = "PRUNEBENCH_ARTEFACTS_GIB"
DEFAULT_LIMIT = 20 << 30

Tensors = dict[str, torch.Tensor]

_COST, _TENSOR, _BFLOAT16 = "cost", "tensor ", "bfloat16 tensor "
"""Names inside a file: the cost as JSON, and what a tensor's own name begins with, also where it is of bfloat16."""


class Artefacts:
    """`Job.artefact` for one step."""

    def __init__(self, request: RunRequest, pruner: Pruner, first: bool) -> None:
        """For a step of the run; only the first takes from the cache.

        Raises:
            RequestError: the setting of how much may be kept is not a number of GiB; found before the work, not after it.
        """
        self._limit = limit_bytes()
        self.reused: list[str] = []
        """Names of what was taken from the cache."""
        self.job: Job | None = None
        """The step's, whose batch size is lowered when memory runs out."""
        self._first, self._device, self._batch_size = first, torch.device(request.device), request.batch_size
        self._asked: set[str] = set()
        self._earlier = Cost()
        model, tokens = request.spec.model, request.spec.calibration_tokens
        self._key = (
            *(_code(pruner), model.weights, model.dtype, str(tokens), request.machine, self._device.type),
            *(str(request.batch_size), str(request.threads or torch.get_num_threads())),
            *(version("torch"), version("transformers"), pruner.name, str(pruner.revision)),
        )

    def __call__(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Tensors kept by an earlier run, on the host; made now, and kept, where there are none."""
        if not self._first or name in self._asked:
            return make()
        self._asked.add(name)
        key = digest([*self._key, name])
        with uncounted():
            kept = _load(key)
        if kept is not None:
            return self._taken(name, kept)
        with self._alone(key, name):
            with uncounted():
                kept = _load(key)  # which another run may have made while this one waited
            if kept is not None:
                return self._taken(name, kept)
            with lap() as seconds:
                tensors = make()
            if self.job is None or self.job.batch_size == self._batch_size:
                with uncounted():
                    _save(key, tensors, Cost(seconds, *peaks_so_far(self._device)), self._limit)
        return tensors

    def _taken(self, name: str, kept: tuple[Tensors, Cost]) -> Tensors:
        tensors, cost = kept
        self.reused.append(name)
        self._earlier.include(cost)
        return tensors

    @contextmanager
    def _alone(self, key: str, name: str) -> Iterator[None]:
        """Wait, in no phase, for another run that makes the same; two at once would make it twice, and each more slowly."""
        progress = self.job.progress if self.job is not None else lambda *_: None
        with ExitStack() as stack:
            with uncounted():
                stack.enter_context(making(key, lambda: progress(f"wait for another run's {name}", 0, 1)))
            yield

    def settle(self, cost: Cost) -> None:
        """Add to a step's cost what making the reused ones had cost."""
        cost.include(self._earlier)


@contextmanager
def making(key: str, waits: Callable[[], None]) -> Iterator[None]:
    """Be the only process that makes what is kept under a key; nobody waits for one that died.

    Args:
        key: under which it will be kept.
        waits: called when another process is at it, before waiting.
    """
    path = cache_folder() / "making" / f"{key}.lock"
    lock = filelock.FileLock(path, mode=0o600)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            waits()
            lock.acquire()
    except (OSError, NotImplementedError):  # a cache that cannot be written: everybody makes their own
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _code(pruner: Pruner) -> str:
    """Of what made a tensor, the code: another may give other bits, and surely takes another time."""
    return code_digest(frozenset({type(pruner).__module__.partition(".")[0]}))


def _load(key: str) -> tuple[Tensors, Cost] | None:
    arrays = load_arrays(KIND, key)
    try:
        cost = Cost(**json.loads((arrays or {}).pop(_COST).tobytes()))
    except (KeyError, TypeError, ValueError):  # nothing there, or not ours
        return None
    tensors = {}
    for name, array in (arrays or {}).items():
        tensor = torch.from_numpy(array)
        if name.startswith(_BFLOAT16):
            tensors[name.removeprefix(_BFLOAT16)] = tensor.view(torch.bfloat16)
        else:
            tensors[name.removeprefix(_TENSOR)] = tensor
    return tensors, cost


def _save(key: str, tensors: Tensors, cost: Cost, limit: int) -> None:
    arrays = {}
    for name, tensor in tensors.items():
        arrays[(_BFLOAT16 if tensor.dtype == torch.bfloat16 else _TENSOR) + name] = as_array(tensor)
    arrays[_COST] = np.frombuffer(json.dumps(asdict(cost)).encode(), dtype=np.uint8)
    if make_room(sum(array.nbytes for array in arrays.values()), limit):
        save_arrays(KIND, key, arrays)


def as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor's numbers; those of bfloat16, which NumPy does not know, as integers of the same bits."""
    stored = tensor.detach().cpu().contiguous()
    return stored.view(torch.int16 if stored.dtype == torch.bfloat16 else stored.dtype).numpy()


def make_room(size: int, limit: int) -> bool:
    """Remove the oldest artefacts until one of `size` bytes fits into `limit`; False where it never would."""
    if size > limit:
        return False
    files = []
    for path in (cache_folder() / KIND).glob("*"):  # what a killed run left half written too
        try:
            stat = path.stat()
        except OSError:  # another run made room
            continue
        files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(used for _, used, _ in files)
    for _, used, path in sorted(files):
        if total + size <= limit:
            break
        path.unlink(missing_ok=True)
        total -= used
    return True


def limit_bytes() -> int:
    """The most bytes that all artefacts may take.

    Raises:
        RequestError: the setting is not a number of GiB.
    """
    found = gib_setting(LIMIT)
    return DEFAULT_LIMIT if found is None else found

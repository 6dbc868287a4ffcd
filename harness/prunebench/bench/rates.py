"""How fast a machine is at what runs are made of: measured in a few seconds, once, and kept in the user's cache.

Other processes may have the cores meanwhile. So on a CPU one thread is measured, by the time in which it had a core: several
would wait for each other wherever another process has one. Everything is the best of several.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from prunebench.bench.runner import threads
from prunebench.toolkit.cache import digest, load_json, save_json
from prunebench.toolkit.loading import DTYPES
from prunebench.toolkit.memory import let_go
from prunebench.toolkit.model_shape import ModelShape
from prunebench.toolkit.placement import HOST_TOKENS

SECONDS = 0.2
"""How long each of five rates is measured, and at least once: in all a second or two, ten for the largest matrices."""

PATIENCE = 5
"""So many times that long it may take where others have the cores."""

LARGEST_ON_HOST, LARGEST_ON_DEVICE = 2048, 16384
"""The largest side of a matrix: beyond it the rate no longer changes, and on a host a product takes a second."""

DEVICE_TOKENS = 4096
SEQUENCE = 512
"""Tokens of a sequence in which attention is measured."""

ELEMENTS_ON_HOST, ELEMENTS_ON_DEVICE = 1 << 24, 1 << 28
"""Of tensors that no cache holds."""

LAUNCHES = 200


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, in one dtype and at one model's sizes."""

    products: float
    """Operations of products of tokens and matrices; a multiplication and an addition are two."""
    attention: float
    """Operations of attention over whole sequences, causal or not."""
    moved: float
    """Bytes read and written by an elementwise operation."""
    factored: float
    """Cubes of the size of matrices that are factored (Cholesky, float32)."""
    launch: float
    """Seconds, not a rate: from one small operation to the next."""

    def times(self, cores: int) -> Rates:
        """Of so many threads: those of one, so many times."""
        return replace(self, **{name: cores * value for name, value in asdict(self).items() if name != "launch"})


def rates_of(shape: ModelShape, dtype: str, device: str, machine: str) -> Rates:
    """The rates of a machine for a model, on a CPU those of one thread; measured where the cache has none.

    Args:
        shape: whose sizes are measured.
        dtype: of the products.
        device: where.
        machine: its slug, under which rates are kept.
    """
    on_host = not device.startswith("cuda")
    key = digest([machine, torch.__version__, torch.device(device).type, dtype, repr(_sizes(shape, on_host)), f"{shape.heads}"])
    found = _remembered(key)
    if found is None:
        with threads(1 if on_host else 0), torch.no_grad():
            found = _measured(shape, dtype, torch.device(device))
        if not on_host:
            let_go()  # the runs need the memory, in other processes
        save_json("rates", key, asdict(found))
    return found


def _remembered(key: str) -> Rates | None:
    kept = load_json("rates", key)
    try:
        return Rates(**{name: float(value) for name, value in kept.items()}) if kept else None
    except (AttributeError, TypeError, ValueError):  # changed by another hand
        return None


def _sizes(shape: ModelShape, on_host: bool) -> list[tuple[int, int]]:
    """(outputs, inputs) of the matrices that are measured: the three most frequent of the model's."""
    most = LARGEST_ON_HOST if on_host else LARGEST_ON_DEVICE
    there = Counter(shape.matrices or [(shape.hidden, shape.hidden), (4 * shape.hidden, shape.hidden)])
    return [(min(outputs, most), min(inputs, most)) for (outputs, inputs), _ in there.most_common(3)]


def _measured(shape: ModelShape, dtype: str, device: torch.device) -> Rates:
    on_host, kind = device.type == "cpu", DTYPES[dtype]
    tokens = HOST_TOKENS if on_host else DEVICE_TOKENS
    operations = taken = 0.0
    sizes = _sizes(shape, on_host)
    for outputs, inputs in sizes:
        rows, matrix = _filled(kind, device, tokens, inputs), _filled(kind, device, outputs, inputs)
        taken += quickest(lambda rows=rows, matrix=matrix: rows @ matrix.t(), device, SECONDS / len(sizes))  # type: ignore[misc]
        operations += 2 * tokens * outputs * inputs
    width = max(1, (shape.attention or shape.hidden) // shape.heads)
    queries = _filled(kind, device, tokens // SEQUENCE, shape.heads, SEQUENCE, width)
    attending = quickest(lambda: torch.nn.functional.scaled_dot_product_attention(queries, queries, queries), device, SECONDS)
    elements = _filled(kind, device, ELEMENTS_ON_HOST if on_host else ELEMENTS_ON_DEVICE)
    moving = quickest(lambda: elements * elements, device, SECONDS)
    size = min(max(shape.inputs or (shape.hidden,)), LARGEST_ON_HOST if on_host else LARGEST_ON_DEVICE)
    gram = torch.eye(size, device=device) + _filled(torch.float32, device, size, size) / size
    factoring = quickest(lambda: torch.linalg.cholesky_ex(gram), device, SECONDS)
    small = _filled(torch.float32, device, 64)

    def launch() -> None:
        for _ in range(LAUNCHES):
            small.add_(0.0)

    return Rates(
        products=operations / taken,
        attention=4 * tokens * SEQUENCE * shape.heads * width / attending,
        moved=3 * elements.nbytes / moving,
        factored=size**3 / factoring,
        launch=quickest(launch, device, SECONDS) / LAUNCHES,
    )


def _filled(dtype: torch.dtype, device: torch.device, *size: int) -> torch.Tensor:
    return torch.full(size, 0.5, dtype=dtype, device=device)


def quickest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the quickest of as many as fit into `seconds`, one at least, after one that wakes the device up.

    On a CPU seconds in which the thread had a core.
    """
    best = float("inf")
    work()
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    deadline, patience = clock() + seconds, time.perf_counter() + PATIENCE * seconds
    while best == float("inf") or (clock() < deadline and time.perf_counter() < patience):
        _wait(device)
        started = clock()
        work()
        _wait(device)
        best = min(best, clock() - started)
    return max(best, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

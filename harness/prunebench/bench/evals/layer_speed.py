"""Seconds of single products: every distinct shape of pruned matrix, dense and by each kernel, for prefill and decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from prunebench.bench.evals.clocks import CannotRecord, Launch, device_state, launches, median_seconds
from prunebench.bench.evals.sparse_kernels import TOLERANCE, Kernel, Product, dense_product, made, relative_error
from prunebench.handles import Matrix
from prunebench.spec import Progress
from prunebench.toolkit.memory import is_out_of_memory, let_go

Shape = tuple[int, int]

CACHES = 4
"""So many times the device's last cache is what the weights of a round take together, if the model has as many."""

MOST_WEIGHTS = 16


@dataclass
class Row:
    """One thing that was timed; seconds that were not measured are 0, and the note says why."""

    shape: str
    """Outputs x inputs, or that it is the whole model."""
    phase: str
    batch: int
    tokens: int
    """That go through at once."""
    dense_ms: float = 0.0
    sparse_ms: float = 0.0
    speed_up: float = 0.0
    kernel: str = ""
    note: str = ""
    """How it was launched, and the state of the device right after; or why there is no time."""

    @classmethod
    def timed(cls, shape: str, phase: str, batch: int, tokens: int, dense: float, sparse: float, kernel: str, note: str) -> Row:
        """Of seconds; `sparse` is 0 where only the dense model was measured."""
        speed_up = float(f"{dense / sparse:.5g}") if sparse else 0.0
        return cls(shape, phase, batch, tokens, round(1e3 * dense, 6), round(1e3 * sparse, 6), speed_up, kernel, note)


def columns(rows: Sequence[Row]) -> dict[str, Sequence[float | int | str]]:
    """Rows as the items of a score."""
    told = [asdict(row) for row in rows]
    return {name: [row[name] for row in told] for name in asdict(Row("", "", 0, 0))}


@dataclass
class Layers:
    """What was found of single products."""

    rows: list[Row] = field(default_factory=list)
    best: dict[Shape, Kernel] = field(default_factory=dict)
    """By shape the kernel that decodes the smallest batch in the least time; a shape that none takes is not there."""


@dataclass(frozen=True)
class Point:
    """A number of tokens at which products are timed."""

    phase: str
    batch: int
    tokens: int


def points(batches: Sequence[int], prompt: int) -> list[Point]:
    """Decoding first, the smallest batch in front."""
    decoding = [Point("decode", batch, batch) for batch in batches]
    return decoding + [Point("prefill", batch, batch * prompt) for batch in batches]


def time_layers(
    matrices: Sequence[Matrix],
    dense: Mapping[str, torch.Tensor],
    kernels: Sequence[Kernel],
    at: Sequence[Point],
    progress: Progress,
) -> Layers:
    """Time each shape of the matrices with each kernel, beside the dense product of the same matrices as they were.

    Args:
        matrices: pruned.
        dense: their dense weights [outputs, inputs] by name.
        kernels: that run on the device.
        at: the points of which the first decides between kernels.
        progress: told how far it is.
    """
    found = Layers()
    shapes: dict[Shape, list[Matrix]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for done, (shape, members) in enumerate(sorted(shapes.items())):
        progress("layer shape", done, len(shapes))
        chosen = members[: _weights_of_a_round(members[0].weight)]
        weights = [dense[matrix.name] for matrix in chosen]
        quickest = math.inf
        for kernel in kernels:
            rows = _timed(shape, chosen, weights, kernel, at)
            found.rows += rows
            first = rows[0].sparse_ms
            if 0 < first < quickest:
                quickest, found.best[shape] = first, kernel
    progress("layer shape", len(shapes), len(shapes))
    return found


def _weights_of_a_round(weight: torch.Tensor) -> int:
    """How many matrices of a shape are multiplied one after the other: one alone would be read from a cache."""
    if weight.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(weight.device).L2_cache_size
    return max(1, min(MOST_WEIGHTS, math.ceil(CACHES * cache / (weight.nbytes / 2))))


def _timed(
    shape: Shape, matrices: Sequence[Matrix], weights: Sequence[torch.Tensor], kernel: Kernel, at: Sequence[Point]
) -> list[Row]:
    """A row a point; one row that says why where the kernel does not take the shape."""
    name, products = f"{shape[0]}x{shape[1]}", []
    for matrix in matrices:
        product = made(kernel, matrix.weight)
        if isinstance(product, str):
            return [Row(name, at[0].phase, at[0].batch, at[0].tokens, kernel=kernel.name, note=product)]
        products.append(product)
    error = relative_error(products[0], matrices[0].weight, _inputs(weights[0], at[0].tokens))
    if not error < TOLERANCE:
        note = f"wrong products: relative error {error:.2g}"
        return [Row(name, at[0].phase, at[0].batch, at[0].tokens, kernel=kernel.name, note=note)]
    return [_row(name, point, weights, products, kernel.name) for point in at]


def _row(name: str, point: Point, weights: Sequence[torch.Tensor], products: Sequence[Product], kernel: str) -> Row:
    try:
        launch, dense, sparse = _both(weights, products, _inputs(weights[0], point.tokens))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        note = f"{launch}, {device_state(weights[0].device)}"
        return Row.timed(name, point.phase, point.batch, point.tokens, dense, sparse, kernel, note)
    let_go()
    return Row(name, point.phase, point.batch, point.tokens, kernel=kernel, note="out of memory")


def _both(weights: Sequence[torch.Tensor], products: Sequence[Product], inputs: torch.Tensor) -> tuple[Launch, float, float]:
    """Seconds of one product, dense and by the kernel, launched the same way."""
    for launch in launches(inputs.device):
        try:
            dense, sparse = (
                median_seconds(_through(several, inputs), inputs.device, launch) / len(several)
                for several in ([dense_product(weight) for weight in weights], products)
            )
        except CannotRecord:
            continue
        return launch, dense, sparse
    raise AssertionError("what is launched operation by operation need not be recorded")


def _through(products: Sequence[Product], inputs: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        for product in products:
            product(inputs, None)

    return work


def _inputs(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """[tokens, inputs] as random as activations: on zeros products are faster than they will be."""
    generator = torch.Generator(weight.device).manual_seed(0)
    return torch.randn(tokens, weight.shape[1], generator=generator, device=weight.device, dtype=weight.dtype)

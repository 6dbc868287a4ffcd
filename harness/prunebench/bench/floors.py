"""Seconds that no implementation of a step avoids on a machine, by phase: from its efforts and the model's shape.

With W the prunable weights that a token meets, s the share of them that a pass may leave out, d hidden columns, V the
vocabulary, P all prunable weights and L blocks, an effort asks for operations

    blocks  x  2 W (1 - s)
    head    x  2 V d  x  2/3 while training                (a head that is not trained gets no gradient of its weight)
    grams   x  sum of inputs²                              (half of a symmetric matrix, two operations; of experts their share)
    factors x  sum of inputs³ / 3                          (of a Cholesky factorisation, the least of what is counted as one)
    sweeps  x  sum of outputs inputs²

over the machine's best matrix rate in the dtype they are computed in: the model's for Gram matrices too, since products of 16
bits are exact in float32; float32 for the last two. A pass that a pruner asks for in float32 runs in TF32 on CUDA where the
model is in 16 bits, or where it trains; of a wider model in float32, or in three products of TF32 for one
(`toolkit/precision.py`). And it asks that bytes move:

    blocks  the weights once, and the hidden states of a calibration set once, onwards to the next block twice
    grams   every Gram matrix once
    looks   in scoring the weights once, in update once     (read, and written)

over the rate of a large copy. A phase's floor is the larger of the two sums: an implementation can let them overlap.

Everything is a lower bound. s is what nobody reads: of a pass for statistics the matrices behind the last inputs (those that do
not read hidden states); on the way back the gradients of a block's own inputs, where nobody asks for them (at most `UNASKED` of
all passes, also for blocks whose attention and MLP read the same). A pass that leaves all blocks' inputs for a way back, which
goes forward again, is left out whole. So are attention, norms, sorts, copies between host and device and the start of a kernel.
What a cache could hold counts as not moved. A CPU's products of short types are divided by the rate of float32 where that is
the higher one: an implementation may convert. Blocks count as alike, in what they weigh.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunebench.bench.costs import Work
from prunebench.bench.machine_rates import TF32
from prunebench.effort import LOOKS_TO_SCORE, LOOKS_TO_UPDATE, TO_INPUTS, TO_WEIGHTS, Effort
from prunebench.results.machines import MachineRates
from prunebench.toolkit.loading import DTYPES
from prunebench.toolkit.model_shape import ModelShape

CACHED = 128 << 20
"""Bytes that caches may hold from one use to the next: of a block's weights or Gram matrices, of all hidden states."""

UNASKED = 0.2
"""Of the three products of a way forward and back through a block alone, the share that the gradient of its own input is: six
tenths of one where attention and MLP both read that input, a quarter of one where only attention does."""


def step_floors(efforts: Sequence[Effort], shape: ModelShape, dtype: str, rates: MachineRates) -> dict[str, float]:
    """Seconds by phase that no implementation of a step avoids; phases of which nothing is known are left out.

    Args:
        efforts: of the step.
        shape: of the model.
        dtype: of the model.
        rates: of the machine, with as many threads as the step has.
    """
    whole = any(effort.head for effort in efforts)
    swept = any(effort.sweeps for effort in efforts)
    operations: dict[str, float] = {}
    moved: dict[str, float] = {}
    for effort in efforts:
        # A sweep chooses as it goes: what it looks at for that counts in its phase.
        name = "update" if swept and effort.phase == "scoring" else effort.phase
        operations[name] = operations.get(name, 0.0) + product_seconds(effort, shape, dtype, rates, whole)
        moved[name] = moved.get(name, 0.0) + moved_bytes(effort, shape, dtype) / rates.copied
    found = {name: max(operations[name], moved[name]) for name in operations}
    return {name: float(f"{seconds:.6g}") for name, seconds in found.items() if seconds > 0}


def run_floors(work: Work, rates: MachineRates) -> tuple[dict[str, float], ...]:
    """The floors of each step of a run; see `step_floors`.

    Raises:
        PluginError: a pruner does not say what it computes.
    """
    return tuple(step_floors(efforts, work.shape, work.dtype, rates) for efforts in work.efforts())


def product_seconds(effort: Effort, shape: ModelShape, dtype: str, rates: MachineRates, whole: bool) -> float:
    """Seconds of an effort's products, as the module's formula says.

    Args:
        effort: in one phase.
        shape: of the model.
        dtype: of the model.
        rates: of the machine.
        whole: the step takes gradients through the whole model, so that every block but the first is asked for its input's.
    """
    rough = effort.dtype == "float32" and (DTYPES[dtype].itemsize == 2 or effort.phase == "training")
    asked = TF32 if rough and TF32 in rates.products else effort.dtype or dtype
    own, summed, single = (best_rate(rates, name) for name in (asked, dtype, "float32"))
    if own is None or summed is None or single is None:
        return 0.0
    head = effort.head * (TO_INPUTS / TO_WEIGHTS if effort.phase == "training" else 1.0)
    blocks = 0.0 if is_recomputed(effort) else effort.blocks * (1 - left_out(effort, shape, whole))
    products = blocks * 2 * met(shape) + head * 2 * shape.vocabulary * shape.hidden
    reached = met(shape) / max(1, shape.prunable)  # an expert's Gram matrix takes the tokens that go there
    grams = effort.grams * reached * sum(width**2 for width in shape.inputs)
    factors = effort.factors * sum(width**3 for width in shape.inputs) / 3
    sweeps = effort.sweeps * sum(outputs * inputs**2 for outputs, inputs in shape.matrices)
    return products / own + grams / summed + (factors + sweeps) / single


def is_recomputed(effort: Effort) -> bool:
    """Whether a pass only leaves each block's inputs for a way back, which then goes forward once more: a graph avoids it."""
    return effort.held > 2 * effort.blocks > 0  # a walk holds the set once, and passes it through all blocks but the last


def met(shape: ModelShape) -> int:
    """Prunable weights that a token meets in all blocks; of experts those that it goes to."""
    if not shape.active:
        return shape.prunable
    return max(0, shape.prunable - (shape.in_blocks - shape.active))


def left_out(effort: Effort, shape: ModelShape, whole: bool) -> float:
    """The share of an effort's products through blocks that an implementation may leave out."""
    if effort.graph:
        return 1 / (TO_INPUTS * max(1, shape.layers)) if whole else UNASKED
    if effort.phase != "statistics":
        return 0.0
    behind = sum(outputs * inputs for outputs, inputs in shape.matrices if inputs != shape.hidden)
    largest = max((outputs * inputs for outputs, inputs in shape.matrices), default=0) * shape.layers
    return min(1.0, (behind or largest) / max(1, shape.prunable))


def moved_bytes(effort: Effort, shape: ModelShape, dtype: str) -> float:
    """Bytes that an effort reads and writes at least, beyond what caches may hold."""
    itemsize = DTYPES[dtype].itemsize
    weights, layers = shape.prunable * itemsize, max(1, shape.layers)
    weights = weights if weights > CACHED * layers else 0
    found = float(weights) if effort.blocks else 0.0
    states = min(effort.held, effort.blocks) * shape.hidden * itemsize
    if states > CACHED and not is_recomputed(effort):
        found += states * layers * (2 if effort.phase == "propagation" else 1)
    grams = 4 * sum(width**2 for width in shape.inputs)
    if effort.grams and grams > CACHED * layers:
        found += grams
    if effort.looks and effort.phase in ("scoring", "update"):
        found += weights * effort.looks / (LOOKS_TO_SCORE if effort.phase == "scoring" else LOOKS_TO_UPDATE)
    return found


def best_rate(rates: MachineRates, dtype: str) -> float | None:
    """Operations a second of products in a dtype, or in float32 where that is quicker; None where it was not measured.

    One in float32 can be made of three in TF32.
    """
    if dtype not in rates.products:
        return None
    return max(rates.products[dtype], rates.products.get("float32", 0.0), rates.products.get(TF32, 0.0) / 3)

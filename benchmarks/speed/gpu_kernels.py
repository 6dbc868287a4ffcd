"""How fast the kernels of `toolkit/kernels` are: against the PyTorch versions, and against the memory's bandwidth.

    python benchmarks/speed/gpu_kernels.py [--json FILE] [--repeats 20] [--only rows] [--shape llama-2-7b] [--device cuda]

Matrices are those of LLaMA-2-7B and LLaMA-3.1-70B, or of another shape. Before any time counts the two results are
compared. Times are of the device, by events around each call, the smallest kernel's launch included; the median is shown.
`bandwidth` is the bytes that must be read and written once, over the time, over what a copy reaches here: a kernel that reads
its input several times stays below one by as much. The file is not called `kernels.py`, as transformers would take it for the
library of that name. On a machine without CUDA there is nothing to time, and it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunebench.bench.machine import machine_slug
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import Gram, InputNorm, keep_mask, kernels
from prunebench.toolkit.least_squares import InverseFactor, choose_groups, choose_slabs, sweep
from prunebench.toolkit.masks import keep_by_norms
from prunebench.toolkit.regional import RmsProp
from prunebench.toolkit.scores import wanda_scores
from prunebench.toolkit.shapes import config_of, shape_named
from prunebench.toolkit.stats import Statistic

SHAPES = ("llama-2-7b", "llama-3.1-70b")
TOKENS = 32768
HALF, PAIRS = Unstructured(0.5), NM(2, 4)


@dataclass(frozen=True)
class Case:
    """Something that a kernel does, and PyTorch does without it."""

    kernel: str
    name: str
    work: Callable[[], Any]
    bytes_moved: int
    """Read and written once."""


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a case."""

    kernel: str
    name: str
    ours: float
    torch: float
    bandwidth: float
    differing: float
    """The share of a mask's entries, or of a result's size, by which the two are apart."""


def cases(shapes: dict[str, tuple[int, int]], device: torch.device) -> Iterator[Case]:
    """Everything that is timed, one after another, so that only one needs memory."""
    generator = torch.Generator(device).manual_seed(0)
    for name, (rows, columns) in shapes.items():
        weight = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.bfloat16)
        norms = torch.rand(columns, generator=generator, device=device)
        scores = wanda_scores(weight, norms)
        size = rows * columns
        yield Case("groups", f"2:4 {name}", lambda s=scores: keep_mask(s, PAIRS), 5 * size)
        yield Case("groups", f"wanda 2:4 {name}", lambda w=weight, n=norms: keep_by_norms(w, n, PAIRS), 3 * size)
        yield Case("rows", f"50% {name}", lambda s=scores: keep_mask(s, HALF), 5 * size)
        yield Case("rows", f"wanda 50% {name}", lambda w=weight, n=norms: keep_by_norms(w, n, HALF), 3 * size)
        yield Case("matrices", f"50% {name}", lambda s=scores: keep_mask(s, HALF, "matrix"), 5 * size)
        del scores
        factor = _factor(columns, device)
        for label, choose, every in (("50%", choose_slabs(HALF, None), 0), ("2:4", choose_groups(PAIRS, None), 4)):
            work = lambda w=weight, f=factor, c=choose, e=every: sweep(w, f, c, every=e)  # noqa: E731 - as the others
            yield Case("column_sweep", f"sparsegpt {label} {name}", work, 4 * columns * columns // 2 + 7 * size)
        stepping, gradient = weight.float(), torch.randn(rows, columns, generator=generator, device=device)
        del factor, weight
        yield Case("rmsprop", f"step and copy {name}", lambda w=stepping, g=gradient: _stepped(w, g), 32 * size)
        del stepping, gradient
        inputs = torch.randn(TOKENS, columns, generator=generator, device=device, dtype=torch.bfloat16)
        yield Case("column_squares", f"norms {name}", lambda x=inputs: _statistic(InputNorm, x), 2 * inputs.numel())
        moved = 2 * inputs.numel() + 8 * columns * columns
        yield Case("gram", f"Gram {name}", lambda x=inputs: _statistic(Gram, x), moved)


def sizes(name: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a shape's matrices, by what they are."""
    config = config_of(shape_named(name.removeprefix("shape:")))
    hidden, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    return {f"{hidden}x{hidden}": (hidden, hidden), f"{inner}x{hidden}": (inner, hidden), f"{hidden}x{inner}": (hidden, inner)}


def _factor(columns: int, device: torch.device) -> InverseFactor:
    """A factor without a factorisation: near the identity, as wide as asked."""
    upper = torch.randn(columns, columns, device=device).mul_(0.3 / columns**0.5).triu_()
    upper.diagonal().copy_(1 + upper.diagonal().abs())
    return InverseFactor(upper, torch.zeros(columns, dtype=torch.bool, device=device))


def _statistic(kind: type[Statistic], inputs: torch.Tensor) -> torch.Tensor:
    statistic = kind(inputs.shape[1], inputs.device, torch.float32)
    statistic.add(inputs if statistic.takes(inputs) else inputs.float(), 16)
    return statistic.value()


def _stepped(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    moved = weight.clone()
    RmsProp([moved], 0.01).step(0, gradient)
    return moved


def milliseconds(work: Callable[[], Any], repeats: int) -> float:
    """The median of several calls, after three that do not count."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repeats):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last))
    return statistics.median(found)


def apart(ours: Any, theirs: Any) -> float:
    """How far two results are from each other."""
    if not isinstance(ours, torch.Tensor):  # a sweep
        ours, theirs = ours.keep, theirs.keep
    if ours.dtype == torch.bool:
        return float((ours != theirs).float().mean())
    return float((ours - theirs).norm() / theirs.norm())


def timed(case: Case, repeats: int, bandwidth: float) -> Timed:
    """A case with its kernel and without."""
    os.environ["PRUNEBENCH_KERNELS"] = "off"
    theirs = case.work()
    without = milliseconds(case.work, max(3, repeats // 4))
    os.environ["PRUNEBENCH_KERNELS"] = "on"
    differing = apart(case.work(), theirs)
    ours = milliseconds(case.work, repeats)
    return Timed(case.kernel, case.name, ours, without, case.bytes_moved / (ours / 1000) / bandwidth, differing)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    here = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return 2 * here.numel() / (milliseconds(lambda: there.copy_(here), 20) / 1000)


def main() -> int:
    """Time what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", choices=kernels.NAMES, help="one kernel")
    parser.add_argument("--shape", help="whose matrices, in place of those of LLaMA-2-7B and LLaMA-3.1-70B")
    parser.add_argument("--device", default="cuda", help="which one")
    asked = parser.parse_args()
    if not torch.cuda.is_available() or not asked.device.startswith("cuda"):
        print("There is no CUDA device here: kernels run on one only, and their times in an interpreter say nothing.")
        return 0
    device = torch.empty(0, device=asked.device).device
    torch.cuda.set_device(device)
    os.environ["PRUNEBENCH_KERNELS"] = "on"
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; a copy: {bandwidth / 1e12:.2f} TB/s")
    print(f"{'kernel':<16}{'case':<26}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}{'bandwidth':>11}{'apart':>10}")
    found = []
    shapes = {label: size for name in ([asked.shape] if asked.shape else SHAPES) for label, size in sizes(name).items()}
    for case in cases(shapes, device):
        if asked.only in (None, case.kernel):
            one = timed(case, asked.repeats, bandwidth)
            found.append(one)
            print(
                f"{one.kernel:<16}{one.name:<26}{one.ours:>10.3f}{one.torch:>10.3f}{one.torch / one.ours:>8.1f}"
                f"{one.bandwidth:>11.1%}{one.differing:>10.1e}",
                flush=True,
            )
    for name, verdict in kernels.report().items():
        print(f"{name}: {verdict}")
    if asked.json:
        told = {"machine": machine_slug(), "torch": torch.__version__, "copy_bytes_a_second": bandwidth}
        asked.json.write_text(
            json.dumps(told | {"kernels": kernels.report(), "cases": [asdict(one) for one in found]}, indent=1)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast the library prunes: against the plain implementation in `baseline.py`, and against what the arithmetic must cost.

    python benchmarks/speed/run.py [--repeats 5] [--threads 2] [--only sparsegpt] [--json FILE]

Both prune copies of one random model, in one process, one after the other and again, so that what else the machine does falls
on both: a ratio is taken of each pair, its median and quartiles are shown. `found/floor` is our seconds over those of the
products that no implementation of these methods avoids, at the rate of a plain product measured here. Seconds mean something on
a quiet machine only; the load is printed. Before any time counts, the masks are compared, so that equal work is compared.
`memory` is what is resident at most beyond the model and the set, in a process of its own, whose allocator gives every tensor's
pages back at once: else what it keeps for later, up to 100 MiB on either side, is what is measured.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunebench.bench.machine import machine_slug
from prunebench.spec import Pruner
from prunebench.targets import NM, Target, parse_target
from prunebench.testing import make_job
from prunebench.toolkit.least_squares import InverseFactor, choose_groups, choose_slabs
from prunebench.toolkit.least_squares import sweep as our_sweep
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

sys.path.insert(0, str(Path(__file__).parent))
import baseline

Masks = dict[str, torch.Tensor]

KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
"""For glibc, whose threshold otherwise rises to 32 MiB."""


@dataclass(frozen=True)
class Shape:
    """A LLaMA of random weights and its calibration set."""

    layers: int = 4
    hidden: int = 768
    inner: int = 2048
    heads: int = 12
    vocabulary: int = 4096
    samples: int = 32
    length: int = 512

    def model(self) -> LlamaForCausalLM:
        """The model in float32; every call gives the same weights."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.length,
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return LlamaForCausalLM(config).eval()

    def tokens(self) -> torch.Tensor:
        """Random ids [samples, length]."""
        return torch.randint(self.vocabulary, (self.samples, self.length), generator=torch.Generator().manual_seed(0))

    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the seven matrices of a block."""
        hidden, inner = self.hidden, self.inner
        return [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]

    def wanda_operations(self) -> float:
        """Floating point operations of the products: each block dense, but for the last matrix, and all but one pruned."""
        tokens, last = self.samples * self.length, 2 * self.hidden * self.inner
        return tokens * (self.layers * (self.block_operations() - last) + (self.layers - 1) * self.block_operations())

    def block_operations(self) -> float:
        """Of a token through a block."""
        attention = 2 * self.length * self.hidden  # scores and values, half of them behind the causal mask
        return attention + sum(2 * rows * columns for rows, columns in self.matrices())

    def gblm_operations(self) -> float:
        """As Wanda, and each sample through all blocks and the head, and back to inputs and, in blocks, to weights."""
        into_first, head = 3 * 2 * self.hidden**2, 2 * self.hidden * self.vocabulary
        there_and_back = 3 * self.layers * self.block_operations() - into_first + 2 * head
        return self.wanda_operations() + self.samples * self.length * there_and_back

    def regional(self) -> Shape:
        """What Wanda++ is timed on: it takes tens of times as long as Wanda."""
        return replace(self, layers=max(1, self.layers // 2), samples=max(2, self.samples // 2))

    @property
    def drawn(self) -> int:
        """Samples of a round of Wanda++: a quarter, as published."""
        return max(1, self.samples // 4)

    def wanda_plus_plus_operations(self) -> float:
        """As Wanda, and in each block all samples and those of every round there and back, and norms for all rounds but one.

        The first round's norms and all dense outputs can be seen in the pass that finds the gradients.
        """
        steps, there_and_back = baseline.ROUNDS * self.drawn, 3 * self.block_operations() - 3 * 2 * self.hidden**2
        norms = (steps - self.drawn) * (self.block_operations() - 2 * self.hidden * self.inner)
        return self.wanda_operations() + self.layers * self.length * ((self.samples + steps) * there_and_back + norms)

    def sparsegpt_operations(self) -> float:
        """As Wanda, and Gram matrices (a half of each), their factors (Cholesky and an inverse triangle), the sweep."""
        widths = [self.hidden] * 3 + [self.inner]
        grams = sum(self.samples * self.length * width**2 for width in widths)
        factors = sum(2 / 3 * width**3 for width in widths)
        return self.wanda_operations() + self.layers * (grams + factors + self.sweep_operations())

    def sweep_operations(self) -> float:
        """Each column corrects those behind it: over a block's seven matrices."""
        return float(sum(rows * columns**2 for rows, columns in self.matrices()))


@dataclass(frozen=True)
class Case:
    """What is timed. The two sides make the same masks, each from inputs that it may write into."""

    name: str
    aim: float
    operations: float
    plain: Callable[[], Callable[[], Masks]]
    """Prepares, untimed; what it returns is timed."""
    ours: Callable[[], Callable[[], Masks]]
    tolerance: tuple[float, float]
    """The share of entries that may differ in a matrix of the first block, as in `tests/test_golden.py`, and over all. What
    later blocks read has changed by then, and random weights spread it: two entries became 2,840 of the last matrix."""


@dataclass(frozen=True)
class Found:
    """A case's seconds, pair by pair."""

    case: str
    aim: float
    baseline_seconds: list[float]
    our_seconds: list[float]
    floor_seconds: float
    differing: int
    baseline_mebibytes: float
    our_mebibytes: float

    @property
    def ratios(self) -> list[float]:
        """How many times as fast we were, a pair."""
        return [plain / ours for plain, ours in zip(self.baseline_seconds, self.our_seconds, strict=True)]

    def line(self) -> str:
        """A row of the table."""
        low, middle, high = quartiles(self.ratios)
        plain, ours = statistics.median(self.baseline_seconds), statistics.median(self.our_seconds)
        ratio = f"{middle:5.2f}x ({low:.2f} to {high:.2f})"
        return (
            f"{self.case:20} {plain:8.2f} s {ours:8.2f} s  {ratio:24} {self.aim:4.1f}x {ours / self.floor_seconds:8.1f}"
            f" {self.differing:10} {self.baseline_mebibytes:8.0f} {self.our_mebibytes:8.0f} MiB"
        )


HEADER = (
    f"{'':20} {'baseline':>10} {'ours':>10}  {'ratio (quartiles)':24} {'aim':>5} {'/floor':>8} {'differing':>10}"
    f" {'memory':>8} {'ours':>8}"
)


def cases(shape: Shape) -> list[Case]:
    """Wanda, SparseGPT, GBLM, Wanda++, and SparseGPT's sweep over the matrices of one block."""
    exact, nearly = (1e-4, 5e-3), (1e-2, 5e-2)
    aims = {"0.5": (2.0, exact, nearly), "2:4": (1.3, exact, exact)}
    found = []
    for text, (aim, of_wanda, of_sparsegpt) in aims.items():
        target = parse_target(text)
        plain, ours = pruning(shape, baseline.wanda, Wanda(), target)
        found.append(Case(f"wanda {text}", aim, shape.wanda_operations(), plain, ours, of_wanda))
        plain, ours = pruning(shape, baseline.sparsegpt, SparseGpt(), target)
        found.append(Case(f"sparsegpt {text}", 1.6, shape.sparsegpt_operations(), plain, ours, nearly))
        plain, ours = pruning(shape, baseline.gblm, Gblm(), target)
        found.append(Case(f"gblm {text}", 1.5, shape.gblm_operations(), plain, ours, nearly))
        part = shape.regional()
        by_rounds = partial(baseline.wanda_plus_plus, drawn_samples=part.drawn)
        plain, ours = pruning(part, by_rounds, WandaPlusPlus(ro_samples=part.drawn), target)
        found.append(Case(f"wanda++ {text}", 1.5, part.wanda_plus_plus_operations(), plain, ours, nearly))
        plain, ours = sweeping(shape, target)
        found.append(Case(f"sweep {text}", 8.0, shape.sweep_operations(), plain, ours, of_sparsegpt))
    return found


def as_plain(target: Target) -> baseline.Target:
    """A target as the baseline writes it."""
    return (target.keep, target.of) if isinstance(target, NM) else float(str(target))


def pruning(shape: Shape, plain: Callable[..., Masks], pruner: Pruner, target: Target) -> tuple[Any, Any]:
    """Both sides of a whole method."""
    model, tokens = shape.model(), shape.tokens()

    def prepare_plain() -> Callable[[], Masks]:
        own = copy.deepcopy(model)
        return lambda: plain(own, tokens, as_plain(target))

    def prepare_ours() -> Callable[[], Masks]:
        job = make_job(pruner, copy.deepcopy(model), target, tokens=tokens, batch_size=8)

        def run() -> Masks:
            pruner.prune(job)
            return dict(job.anatomy.masks)  # type: ignore[attr-defined]

        return run

    return prepare_plain, prepare_ours


def sweeping(shape: Shape, target: Target) -> tuple[Any, Any]:
    """Both sides of the column sweep, with factors made beforehand."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, columns, generator=generator) for rows, columns in shape.matrices()]
    factors = {}
    for width in {shape.hidden, shape.inner}:
        inputs = torch.randn(2 * width, width, generator=generator) * torch.rand(width, generator=generator)
        factors[width] = baseline.factor(inputs.t() @ inputs)

    def plain() -> Masks:
        return {str(i): baseline.sweep(w, factors[w.shape[1]], as_plain(target))[1] for i, w in enumerate(weights)}

    def ours() -> Masks:
        masks = {}
        for i, weight in enumerate(weights):
            upper = factors[weight.shape[1]]
            factor = InverseFactor(upper, torch.zeros(len(upper), dtype=torch.bool))
            choose = choose_groups(target, None) if isinstance(target, NM) else choose_slabs(target, None)
            masks[str(i)] = our_sweep(weight, factor, choose, every=target.of if isinstance(target, NM) else 0).keep
        return masks

    return lambda: plain, lambda: ours


def differing(case: Case, plain: Masks, ours: Masks) -> int:
    """Entries in which the masks differ.

    Raises:
        AssertionError: too many, so that the two sides do not do the same work.
    """
    assert plain.keys() == ours.keys()
    counts = {name: int((mask != ours[name]).sum()) for name, mask in plain.items()}
    in_matrix, over_all = case.tolerance
    for name, count in counts.items():
        later = name.startswith("model.") and not name.startswith("model.layers.0.")
        assert later or count <= max(4, in_matrix * plain[name].numel()), f"{case.name}: {count} entries of {name} differ"
    assert sum(counts.values()) <= max(4, over_all * sum(mask.numel() for mask in plain.values())), case.name
    return sum(counts.values())


def measure(case: Case, repeats: int, rate: Callable[[], float], memory: dict[str, float]) -> Found:
    """Time both sides in turn, so many times; the best rate found before any of them makes the floor."""
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    best, differ = 0.0, 0
    for repeat in range(repeats):
        best, masks = max(best, rate()), {}
        for side, prepare in (("plain", case.plain), ("ours", case.ours)):
            run = prepare()
            taken, masks[side] = timed(run)
            seconds[side].append(taken)
            del run
        if not repeat:
            differ = differing(case, masks["plain"], masks["ours"])
    floor = case.operations / best
    return Found(case.name, case.aim, seconds["plain"], seconds["ours"], floor, differ, memory["plain"], memory["ours"])


def memory_apart(shape: Shape, name: str) -> dict[str, float]:
    """What `memory` finds for a case, in a process whose allocator keeps nothing."""
    size = json.dumps(asdict(shape))
    command = [sys.executable, __file__, "--memory", name, "--shape", size, "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, env=os.environ | KEEP_NOTHING, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory(case: Case) -> dict[str, float]:
    """MiB resident at most on each side beyond what was there."""
    found = {}
    for side, prepare in (("plain", case.plain), ("ours", case.ours)):
        for _ in range(2):  # the first time libraries make themselves at home
            run, before = prepare(), resident_set_back()
            run()
            found[side] = resident("VmHWM") - before
            del run
    return found


def resident_set_back() -> float:
    """Give free memory to the system and set the high-water mark back; what is resident then, MiB (nothing off Linux)."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(what: str) -> float:
    """`VmRSS` now or its high-water mark `VmHWM`, MiB."""
    if sys.platform != "linux":
        return float("nan")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


def timed(run: Callable[[], Masks]) -> tuple[float, Masks]:
    """Seconds of the wall, and what came out."""
    start = time.perf_counter()
    masks = run()
    return time.perf_counter() - start, masks


def matrix_rate(shape: Shape, repeats: int = 20) -> float:
    """Operations a second of the product that most of the work consists of; the best of some."""
    inputs, weight = torch.randn(1024, shape.hidden), torch.randn(shape.inner, shape.hidden)
    best = min(timed(lambda: {"": inputs @ weight.t()})[0] for _ in range(repeats))
    return 2 * inputs.numel() * shape.inner / best


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Times the library against the plain implementation.")
    parser.add_argument("--repeats", type=int, default=5, help="pairs a case")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--json", type=Path, help="a file for all seconds")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, default={}, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shape, load = Shape(**arguments.shape), os.getloadavg()[0]
    if arguments.memory:
        print(json.dumps(memory(next(case for case in cases(shape) if case.name == arguments.memory))))
        return
    rate = partial(matrix_rate, shape)
    print(f"{machine_slug()}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f}")
    print(f"{rate() / 1e9:.0f} GFLOP/s in a plain product of float32 matrices\n\n{HEADER}")
    found = []
    for case in cases(shape):
        if arguments.only in case.name:
            found.append(measure(case, arguments.repeats, rate, memory_apart(shape, case.name)))
            print(found[-1].line(), flush=True)
    if arguments.json:
        about = {"shape": asdict(shape), "torch": torch.__version__, "threads": torch.get_num_threads(), "load": load}
        arguments.json.write_text(json.dumps(about | {"cases": [asdict(one) for one in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()

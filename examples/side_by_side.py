"""Ours and theirs on the quickstart's model, with the same calibration tokens: do they remove the same, and what does it cost?

    python examples/side_by_side.py

wants prunebench and the packages of this folder installed, and PRUNEBENCH_LLMCOMPRESSOR_PYTHON set; prints a Markdown table.
CPU seconds are those of all threads: on a busy machine they tell more than the clock does.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from prunebench_llmcompressor import LlmCompressorSparseGpt, LlmCompressorWanda
from prunebench_torch_prune import TorchL1
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunebench.spec import Job, JsonDict, Pruner
from prunebench.targets import Target, parse_target
from prunebench.testing import make_job
from prunebench.toolkit import keep_mask, magnitude_scores
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda

QUICKSTART = Path(__file__).parents[1] / "benchmarks" / "quickstart"
SAMPLES, LENGTH = 32, 256
THEIRS = "CPU seconds of llm-compressor"


class ModelMagnitude(Magnitude):
    """Magnitude over all matrices together, which the built-in method does not offer: it collapses language models."""

    def prune(self, job: Job) -> None:
        """One order of all entries."""
        matrices = job.anatomy.matrices
        masks = keep_mask([magnitude_scores(matrix.weight) for matrix in matrices], job.target, group="model")
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.keep(mask)


PAIRS: list[tuple[Pruner, Pruner, str, tuple[str, ...]]] = [
    (Wanda(), LlmCompressorWanda(), "wanda, llmc-wanda", ("0.5", "2:4")),
    (SparseGpt(), LlmCompressorSparseGpt(), "sparsegpt, llmc-sparsegpt", ("0.5", "2:4")),
    (SparseGpt(counts="reference"), LlmCompressorSparseGpt(), "sparsegpt[counts=reference], llmc-sparsegpt", ("0.5",)),
    (ModelMagnitude(), TorchL1(), "keep_mask(group=model), torch-l1", ("0.5",)),
]


def calibration() -> torch.Tensor:
    """The first windows of the quickstart's calibration text, [samples, length]."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "wiki7m")
    ids = tokenizer((QUICKSTART / "texts" / "calibration.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: SAMPLES * LENGTH]).view(SAMPLES, LENGTH)


def pruned(pruner: Pruner, target: Target, tokens: torch.Tensor) -> tuple[Job, float]:
    """The job after pruning a fresh copy of the model, and the CPU seconds that it took."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "wiki7m", dtype=torch.float32).eval()
    notes: JsonDict = {}
    job = make_job(pruner, model, target, tokens=tokens, batch_size=8, notes=notes)
    started = time.process_time()
    pruner.prune(job)
    return job, notes.get(THEIRS) or time.process_time() - started


def compared(ours: Job, theirs: Job) -> str:
    """How many zeros differ, in the whole model and in the worst matrix, and how far the weights are apart."""
    pairs = [(a.weight, b.weight) for a, b in zip(ours.anatomy.matrices, theirs.anatomy.matrices, strict=True)]
    counts, sizes = [int(((a == 0) != (b == 0)).sum()) for a, b in pairs], [a.numel() for a, _ in pairs]
    most = max(count / size for count, size in zip(counts, sizes, strict=True))
    apart = torch.cat([(a - b).flatten() for a, b in pairs]).norm() / torch.cat([a.flatten() for a, _ in pairs]).norm()
    return f"{sum(counts)} of {sum(sizes)} | {most:.3%} | {apart:.1e}"


def table() -> Iterator[str]:
    """A line a comparison."""
    tokens = calibration()
    yield "| ours, theirs | target | zeros that differ | in the worst matrix | weights apart | CPU s, ours | CPU s, theirs |"
    yield "|---|---|---|---|---|---|---|"
    for one, other, names, targets in PAIRS:
        for target in map(parse_target, targets):
            (ours, cost), (theirs, their_cost) = pruned(one, target, tokens), pruned(other, target, tokens)
            yield f"| {names} | {target} | {compared(ours, theirs)} | {cost:.1f} | {their_cost:.1f} |"


if __name__ == "__main__":
    for line in table():
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

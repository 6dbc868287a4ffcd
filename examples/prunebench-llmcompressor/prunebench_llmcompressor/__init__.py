"""llm-compressor's SparseGPT and Wanda modifiers for prunebench, as peers of the built-in `sparsegpt` and `wanda`.

llm-compressor pins transformers and huggingface_hub below the versions that prunebench is tested with, so it runs in an
environment of its own: `PRUNEBENCH_LLMCOMPRESSOR_PYTHON` names that environment's interpreter. Model and calibration tokens go
over as files, `worker.py` runs there, and the pruned weights come back. Where llm-compressor is installed beside prunebench, no
variable is needed.

A record's seconds include starting the other interpreter, and its memory is that of our process alone. The notes have the
peer's own: `seconds of llm-compressor` and `CPU seconds of llm-compressor` are those of its `oneshot` call, `peak host GiB of
llm-compressor` is its process's.
"""

from __future__ import annotations

import abc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_model

from prunebench.spec import Changes, Job, JobFacts, Needs, Pruner, hookimpl, option
from prunebench.targets import NM
from prunebench.toolkit import keep_mask, phase

VARIABLE = "PRUNEBENCH_LLMCOMPRESSOR_PYTHON"
"""The environment variable that names the interpreter. No option: a path would be part of a run's id."""

WORKER = Path(__file__).with_name("worker.py")


def interpreter() -> str | None:
    """The interpreter of an environment with llm-compressor, or None."""
    named = os.environ.get(VARIABLE)
    return named or (sys.executable if find_spec("llmcompressor") else None)


@dataclass
class _Peer(Pruner):
    """What both modifiers share."""

    def needs(self) -> Needs:
        """Weights and calibration text."""
        return Needs.WEIGHTS | Needs.CALIBRATION

    def refuses(self, facts: JobFacts) -> str | None:
        """No interpreter, masks of others, storage that it passes over."""
        python = interpreter()
        if python is None:
            return f"set {VARIABLE} to the interpreter of an environment with llm-compressor (and give --again)."
        if not Path(python).is_file():
            return f"{VARIABLE} names {python}, which is no file."
        if facts.earlier:
            return f"{self.name} starts from the dense model; llm-compressor does not know the masks of earlier steps."
        if facts.config.model_type == "gpt2":
            return "llm-compressor passes over the Conv1D layers of GPT-2."
        return None

    @abc.abstractmethod
    def modifier(self) -> tuple[str, dict[str, Any]]:
        """Which class of llmcompressor.modifiers.pruning, and its arguments besides the target."""

    @abc.abstractmethod
    def removed(self, weight: torch.Tensor, job: Job) -> torch.Tensor:
        """The keep mask [outputs, inputs] that the zeros of `weight` stand for, with exact counts."""

    def prune(self, job: Job) -> None:
        """Hand over, run, and take the weights back."""
        matrices = job.anatomy.matrices
        found = self._run(job, matrices)
        beyond = 0
        for matrix in matrices:
            weight = matrix.oriented(found[matrix.name]).to(matrix.weight.device)
            mask = self.removed(weight, job)
            beyond += int((mask & (weight == 0)).sum())
            matrix.write(weight, mask)
        if beyond:
            job.note("extra_zeros", {"llm-compressor's": beyond})

    def _run(self, job: Job, matrices: Any) -> dict[str, torch.Tensor]:
        """The pruned weights by matrix name, as they are stored, on the host."""
        python = interpreter()
        if python is None:
            raise RuntimeError(f"{VARIABLE} is no longer set.")
        with tempfile.TemporaryDirectory() as name, phase("other"):
            folder = Path(name)
            hand_over(folder, job, self.modifier(), [matrix.name for matrix in matrices])
            done = run_worker(python, folder, job.device.type == "cuda")
            if done.returncode:
                last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
                raise RuntimeError(f"llm-compressor ended with exit code {done.returncode}: {last[:500]}")
            for key, value in json.loads((folder / "notes.json").read_text()).items():
                job.note(key, value)
            return load_file(folder / "pruned.safetensors")


def hand_over(folder: Path, job: Job, modifier: tuple[str, dict[str, Any]], names: list[str]) -> None:
    """Write model, tokens and request into the folder."""
    target = job.target
    pattern = f"{target.of - target.keep}:{target.of}" if isinstance(target, NM) else "0:0"  # theirs counts the zeros
    request = {
        "modifier": modifier[0],
        "arguments": modifier[1] | {"sparsity": target.sparsity, "mask_structure": pattern},
        "matrices": names,
        "dtype": str(job.model.dtype).removeprefix("torch."),
    }
    (folder / "request.json").write_text(json.dumps(request))
    np.save(folder / "tokens.npy", job.calibration.numpy())
    model = folder / "model"
    model.mkdir()
    job.model.config.to_json_file(model / "config.json", use_diff=False)
    save_model(job.model, str(model / "model.safetensors"), metadata={"format": "pt"})


def run_worker(python: str, folder: Path, on_cuda: bool) -> subprocess.CompletedProcess[str]:
    """Run `worker.py` on the folder, with our number of threads, and wait for its end."""
    settings = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    settings |= {} if on_cuda else {"CUDA_VISIBLE_DEVICES": ""}
    reading, writing = os.pipe()  # its other end closes when this process ends, however it ends, and the worker ends with it
    try:
        command, settings = [python, str(WORKER), str(folder)], os.environ | settings
        return subprocess.run(command, stdin=reading, capture_output=True, text=True, check=False, env=settings)
    finally:
        os.close(reading)
        os.close(writing)


def nonzero(weight: torch.Tensor) -> torch.Tensor:
    """Scores by which `keep_mask` removes zeros only, and of too many zeros the first: 1 where a weight is not zero."""
    return (weight != 0).float()


@dataclass
class LlmCompressorWanda(_Peer):
    """llm-compressor's WandaPruningModifier."""

    name: ClassVar[str] = "llmc-wanda"

    def modifier(self) -> tuple[str, dict[str, Any]]:
        """No options of its own."""
        return "WandaPruningModifier", {}

    def removed(self, weight: torch.Tensor, job: Job) -> torch.Tensor:
        """It counts in rows."""
        return keep_mask(nonzero(weight), job.target, group="row")


@dataclass
class LlmCompressorSparseGpt(_Peer):
    """llm-compressor's SparseGPTModifier."""

    name: ClassVar[str] = "llmc-sparsegpt"

    block_size: int = option(128, "columns of a slab, in which it counts")
    damping: float = option(0.01, "its dampening_frac: added to the diagonal, as a share of its mean")

    def changes(self) -> Changes:
        """Survivors too."""
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def audit_group(self) -> str:
        """Slabs."""
        return f"columns:{self.block_size}"

    def refuses(self, facts: JobFacts) -> str | None:
        """Slabs that cut groups."""
        if isinstance(facts.target, NM) and self.block_size % facts.target.of:
            return f"a block_size of {self.block_size} is not a multiple of {facts.target.of}: slabs would cut groups."
        return super().refuses(facts)

    def modifier(self) -> tuple[str, dict[str, Any]]:
        """Its options."""
        return "SparseGPTModifier", {"block_size": self.block_size, "dampening_frac": self.damping}

    def removed(self, weight: torch.Tensor, job: Job) -> torch.Tensor:
        """It removes one entry a slab more than `int(size * s)`, and all ties: these are zeros beyond the mask."""
        slabs = torch.split(weight, self.block_size, dim=1)
        return torch.cat([keep_mask(nonzero(slab), job.target, group="matrix") for slab in slabs], dim=1)


@hookimpl
def prunebench_pruners() -> list[type[Pruner]]:
    """What this package adds."""
    return [LlmCompressorWanda, LlmCompressorSparseGpt]

"""How wrong each prunable matrix's output has become, on the windows of text that perplexity takes.

For a matrix with dense weight `W`, as it is now `V`, and its inputs `x` in the pruned model: `sum |V x - W x|^2 / sum |W x|^2`
over all tokens, the error that layer-wise methods minimise (SparseGPT, section 3), on text that they have not seen. Adapters
and changed biases count as changes; the bias is left out of what the error is measured against. The value is the mean over
matrices. It tells where in a model a method does its harm, and does not say how harmful that is to the model's predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from prunebench.bench.evals.blockwise import Passage
from prunebench.bench.evals.windows import WindowEval
from prunebench.errors import NonFiniteError, Refused
from prunebench.handles import Placement
from prunebench.spec import EvalFacts, EvalJob, JsonDict, Matrix, Score
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.placement import brought


@dataclass
class LayerError(WindowEval):
    """Relative squared error of each matrix's output at the inputs it gets in the pruned model."""

    name: ClassVar[str] = "layer_error"
    revision: ClassVar[int] = 1

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Those of perplexity, and what is compared with what."""
        return {**super().conditions(facts), "error": "sum |(pruned - dense) x|^2 / sum |dense x|^2, x of the pruned model"}

    def measure(self, job: EvalJob) -> Score:
        """The error of every matrix; one whose dense output is zero throughout, or that is never used, is left out."""
        found = {name: both.tolist() for name, both in self._sums(job).items()}
        errors = {name: wrong / whole for name, (wrong, whole) in found.items() if whole}
        bad = [name for name, error in errors.items() if not math.isfinite(error)]
        if bad or not errors:
            what = f"of {len(bad)} of {len(errors)} matrices is not finite, first of {bad[0]}" if bad else "is of no matrix"
            raise NonFiniteError(f"the error of the output {what}.")
        items: dict[str, Sequence[float | int | str]] = {
            "matrix": list(errors),
            "error": [round(error, 8) for error in errors.values()],
        }
        return Score(math.fsum(errors.values()) / len(errors), "relative error", False, items)

    def _sums(self, job: EvalJob) -> dict[str, torch.Tensor]:
        """Squares of each matrix's error and of its dense output, [2] in float64, over all windows."""
        dense, pruned = find_anatomy(job.dense()), find_anatomy(job.model)
        own = {matrix.name: matrix.module for matrix in dense.matrices}
        sums = {matrix.name: torch.zeros(2, dtype=torch.float64, device=job.device) for matrix in pruned.matrices}

        @contextmanager
        def comparing(matrices: Sequence[Matrix], placement: Placement | None = None) -> Iterator[None]:
            hooks = [m.module.register_forward_hook(_comparing(own[m.name], sums[m.name], placement)) for m in matrices]
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

        @contextmanager
        def at(index: int) -> Iterator[None]:
            assert job.placement is not None
            with brought(job.placement, dense.blocks[index].module), comparing(pruned.blocks[index].matrices):
                yield

        windows = self.cut(job)
        with torch.no_grad():
            if job.placement is not None:
                with suppress(Refused):  # before any block was run
                    Passage(job, job.model, windows).last_hidden(at)
                    return sums
            with comparing(pruned.matrices, job.placement):
                for ids in windows.batches(job):
                    job.model(input_ids=ids, use_cache=False)
        return sums


def _comparing(dense: nn.Module, sums: torch.Tensor, placement: Placement | None) -> Callable[..., None]:
    """A forward hook that adds the squares of a matrix's error and of its dense output to `sums`, [2] in float64.

    The dense output is computed by the same operation in the same dtype, so that what was not changed has no error at all.
    With a placement the dense matrix is brought for it.
    """

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        with nullcontext() if placement is None else brought(placement, dense):
            there = next(dense.parameters()).device  # of several, the pruned matrix may be on another
            expected, output = dense(inputs[0].to(there)), output.to(there)
            wrong = (output.float() - expected.float()).square().sum(dtype=torch.float64)
            bias = getattr(dense, "bias", None)
            whole = (expected.float() if bias is None else expected.float() - bias.float()).square().sum(dtype=torch.float64)
        sums.add_(torch.stack([wrong, whole]).to(sums.device))

    return hook

"""`torch.nn.utils.prune` for prunebench, the pruner that whoever has PyTorch has: global L1 over all prunable matrices.

`torch-l1` calls `global_unstructured` with `L1Unstructured`: of the entries of all matrices together the smallest in magnitude
go, so matrices lose different shares. That is a global allocation, and the audit counts over the model. Ties go as `torch.topk`
has them, in no order that it promises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.utils import prune as torch_prune

from prunebench.spec import Claims, Job, JobFacts, Pruner, hookimpl
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import phase


@dataclass
class TorchL1(Pruner):
    """Remove the entries of smallest magnitude among those of all matrices, by torch.nn.utils.prune."""

    name: ClassVar[str] = "torch-l1"

    def claims(self) -> Claims:
        """One order of all entries; no block is on its own."""
        return Claims.ROWS | Claims.CHANNELS | Claims.NESTED

    def audit_group(self) -> str:
        """All matrices together."""
        return "model"

    def refuses(self, facts: JobFacts) -> str | None:
        """Patterns."""
        if isinstance(facts.target, NM):
            return f"torch.nn.utils.prune.global_unstructured knows no patterns such as {facts.target}."
        return None

    def prune(self, job: Job) -> None:
        """One call, and all of its traces taken back: what stays are zeros, and the masks that the harness keeps."""
        matrices = job.anatomy.matrices
        size = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
        count = job.target.removed(size) if isinstance(job.target, Unstructured) else 0
        with phase("scoring"):
            parameters = [(matrix.module, "weight") for matrix in matrices]
            torch_prune.global_unstructured(parameters, torch_prune.L1Unstructured, amount=count)
            masks = [matrix.oriented(matrix.module.get_buffer("weight_mask")).bool() for matrix in matrices]
        for matrix, mask in zip(matrices, masks, strict=True):
            torch_prune.remove(matrix.module, "weight")  # type: ignore[no-untyped-call]
            _bias_last(matrix.module)
            matrix.keep(mask)


def _bias_last(module: nn.Module) -> None:
    """Weight before bias, as they were: `prune` and `remove` leave the weight behind the bias."""
    bias = dict(module.named_parameters()).get("bias")
    if bias is not None:
        del module.bias
        module.register_parameter("bias", bias)


@hookimpl
def prunebench_pruners() -> list[type[Pruner]]:
    """What this package adds."""
    return [TorchL1]

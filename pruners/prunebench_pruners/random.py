"""Random pruning: the floor that any method has to beat.

Score: uniform noise from `job.seed`. Comparison group: each output row. Needs no data.
Entries that an earlier step removed stay removed: their score is below every other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunebench.spec import Claims, Job, Needs, Pruner
from prunebench.toolkit import keep_mask, phase, walk


@dataclass
class RandomPruner(Pruner):
    """Remove entries at random, the same share in every output row."""

    name: ClassVar[str] = "random"
    excuses: ClassVar[Mapping[str, str]] = {"better_than_random": "it is what the others are compared with"}

    def needs(self) -> Needs:
        """The weights' shapes and a seed."""
        return Needs.WEIGHTS | Needs.SEED

    def claims(self) -> Claims:
        """The noise is the same whatever the target and the weights; it belongs to places, so it follows no permutation."""
        return Claims.NESTED | Claims.PREFIX | Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        """Draw on the host, so that the masks are the same on every device."""
        generator = torch.Generator().manual_seed(job.seed)
        for block in walk(job, carries=[generator]):
            for matrix in block.matrices:
                with phase("scoring"):
                    scores = torch.rand(matrix.shape, generator=generator).to(matrix.weight.device)
                    if matrix.name in job.masks:
                        scores.masked_fill_(~job.masks[matrix.name].to(scores.device), -1.0)
                matrix.keep(keep_mask(scores, job.target, group="row"))

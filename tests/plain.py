"""A right pruner in pieces, of which wrong and unusual ones change one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from prunebench.spec import Changes, Job, Matrix, Pruner
from prunebench.toolkit import keep_mask, magnitude_scores, walk

CLAIMS = {"rows_commute", "channels_commute", "nested", "pruned_prefix", "resumes"}
"""Laws that are asked of those who claim them."""


@dataclass
class Plain(Pruner):
    """Magnitude pruning by rows."""

    name: ClassVar[str] = "plain"

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(matrix.weight), job.target, "row")

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.keep(mask)

    def finish(self, job: Job) -> None:
        pass

    def prune(self, job: Job) -> None:
        for block in walk(job):
            for matrix in block.matrices:
                self.lay(job, matrix, self.mask(job, matrix))
        self.finish(job)


class Prints(Plain):
    def finish(self, job: Job) -> None:
        print("pruning layer 0 name self_attn.q_proj")


class Attaches(Plain):
    """Does not say so."""

    def factors(self, job: Job, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = matrix.shape
        return torch.arange(2.0 * columns).view(2, columns), torch.arange(2.0 * rows).view(rows, 2)

    def finish(self, job: Job) -> None:
        for matrix in job.anatomy.matrices[1::2]:
            job.attach(matrix, *self.factors(job, matrix), 0.25)


class Adapts(Attaches):
    """Says so."""

    name: ClassVar[str] = "adapts"

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.ADAPTER

"""Magnitude pruning (Han et al. 2015, arXiv 1506.02626), the baseline of every paper.

Score: `S_ij = |W_ij|`. Comparison group: the whole matrix (every reference implementation), or each output row; N:M in
groups of M columns. Needs no data.

Deviations from the reference code (SparseGPT's and Wanda's repositories): they remove `int(size * s) + 1` entries and all
ties at the threshold; we remove exactly `int(size * s)`, ties by position. Comparing over the whole network is not offered:
it collapses language models (`methods.md` 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from prunebench.spec import Claims, Job, Pruner, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk


@dataclass
class Magnitude(Pruner):
    """Remove the entries of smallest magnitude."""

    name: ClassVar[str] = "magnitude"

    group: Literal["matrix", "row"] = option("matrix", "what is compared with what: the whole matrix, or each output row")

    def audit_group(self) -> str:
        """As the option says."""
        return self.group

    def claims(self) -> Claims:
        """An entry's score is its own: all of them."""
        return Claims.ROWS | Claims.CHANNELS | Claims.NESTED | Claims.PREFIX | Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        """One look at each matrix."""
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group=self.group))

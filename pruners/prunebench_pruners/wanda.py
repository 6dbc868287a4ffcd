"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al. 2023, arXiv 2306.11695).

Score: `S_ij = |W_ij| * ||X_j||_2`, X_j being input feature j over all calibration tokens (section 3, equation 1).
Comparison group: each output row; N:M in groups of M columns. Needs calibration text; changes no surviving weight.
Inputs of a block are the outputs of the pruned blocks before it; its statistics come from one pass of the dense block.

Deviations from the authors' code: none in the masks, but for the last bit of sums (squares are added up in float64 over
batches, not sample by sample in float32). The code's `--use_variant`, absent from the paper's headline tables, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Claims, Job, Needs, Pruner
from prunebench.toolkit import InputNorm, walk
from prunebench.toolkit.masks import keep_by_norms


@dataclass
class Wanda(Pruner):
    """Remove the entries of smallest magnitude times input norm."""

    name: ClassVar[str] = "wanda"

    def needs(self) -> Needs:
        """Weights and calibration text."""
        return Needs.WEIGHTS | Needs.CALIBRATION

    def claims(self) -> Claims:
        """Not nested: sparser blocks hand other inputs to those behind them."""
        return Claims.ROWS | Claims.CHANNELS | Claims.PREFIX | Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        """One pass of the calibration set through each block, and one through the pruned block."""
        for block in walk(job):
            norms = block.collect(InputNorm)
            for matrix in block.matrices:
                matrix.keep(keep_by_norms(matrix.weight, norms[matrix], job.target))

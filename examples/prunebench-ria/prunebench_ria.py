"""RIA and DSnoT for prunebench, written against its public documentation only.

`ria` (Zhang et al., "Plug-and-Play: An Efficient Post-Training Pruning Method for Large Language Models", ICLR 2024):
`S_ij = (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) * ||X_j||_2 ^ a`, a = 0.5. Comparison group: each output row, as for
Wanda; the authors' code compares over the whole matrix unless told otherwise (`group=matrix`). Its channel permutation, which
makes N:M masks of reordered columns, is not offered: a prunebench mask is laid over the columns as they stand.

`dsnot` (Zhang et al., "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024, arXiv 2310.08915):
a step after any pruner. In each output row it swaps removed entries for kept ones, as long as the row's expected error is above
a threshold; no weight gets a new value, and what comes back has its dense one. See `Dsnot` for the rule, and where it deviates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from prunebench.spec import Changes, Claims, Job, JobFacts, Needs, Pruner, hookimpl, option
from prunebench.targets import NM
from prunebench.toolkit import InputNorm, Statistic, keep_mask, phase, walk, wanda_scores

__all__ = ["Dsnot", "InputSum", "InputVariance", "Ria", "prunebench_pruners", "relative_importance"]


def relative_importance(weight: torch.Tensor) -> torch.Tensor:
    """`|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|`, [outputs, inputs]; rows and columns of zeros have none."""
    sizes = weight.abs() if weight.dtype == torch.float64 else weight.float().abs()
    least = torch.finfo(sizes.dtype).tiny
    return sizes / sizes.sum(1, keepdim=True).clamp(min=least) + sizes / sizes.sum(0, keepdim=True).clamp(min=least)


@dataclass
class Ria(Pruner):
    """Remove the entries of smallest share in their row and column, times a power of the input norm."""

    name: ClassVar[str] = "ria"

    a: float = option(0.5, "power of the input norm: 0 is relative importance alone")
    group: Literal["row", "matrix"] = option("row", "what is compared with what: each output row, or the whole matrix")

    def __post_init__(self) -> None:
        """Decline a power that would favour what is never read."""
        if self.a < 0:
            raise ValueError("a must be at least 0.")

    def needs(self) -> Needs:
        """Weights and calibration text."""
        return Needs.WEIGHTS | Needs.CALIBRATION

    def claims(self) -> Claims:
        """As Wanda's; sums over a row or a column do not depend on the order of the others."""
        return Claims.ROWS | Claims.CHANNELS | Claims.PREFIX

    def audit_group(self) -> str:
        """As the option says."""
        return self.group

    def prune(self, job: Job) -> None:
        """One pass of the calibration set through each block, and one through the pruned block."""
        for block in walk(job):
            norms = block.collect(InputNorm)
            for matrix in block.matrices:
                with phase("scoring"):
                    scores = relative_importance(matrix.weight) * norms[matrix] ** self.a
                matrix.keep(keep_mask(scores, job.target, group=self.group))


class InputSum(Statistic):
    """`1/N * sum over N sequences and their tokens of x_j`, [inputs]: the mean over tokens, times a sequence's length."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._total = torch.zeros(width, device=device, dtype=torch.float64)
        self._sequences = 0

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Add a batch."""
        self._total += inputs.double().sum(0)
        self._sequences += sequences

    def value(self) -> torch.Tensor:
        """The sums, [inputs]."""
        return (self._total / max(1, self._sequences)).to(self.dtype)


class InputVariance(Statistic):
    """`1/N * sum over N sequences of the variance of x_j over the sequence's tokens`, [inputs], as in the authors' code."""

    by_sequence = True  # an expert of a mixture reads sequences of many lengths

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._total = torch.zeros(width, device=device, dtype=torch.float64)
        self._sequences = 0

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Add the variances of a batch, whose sequences have equal length and follow one another."""
        self._total += inputs.reshape(sequences, -1, self.width).var(dim=1, correction=0).double().sum(0)
        self._sequences += sequences

    def value(self) -> torch.Tensor:
        """The mean of the variances, [inputs]."""
        return (self._total / max(1, self._sequences)).to(self.dtype)


@dataclass
class Dsnot(Pruner):
    """Swap removed entries for kept ones, towards a smaller expected error of each output row; weights stay as they are.

    With `e` the expected error of a row's output over a sequence (dense minus pruned, summed over tokens), each cycle revives
    the removed entry whose return lowers |e| most, weighed by `1 / Var(x_j) ^ variance_power`, and removes the kept entry of
    lowest `|W_ij| * ||X_j||_2` among those whose removal lowers |e| too. Targets N:M: the lowest in the group of the revived
    one, whatever its sign, and a row stops before its error changes sign. An entry is swapped at most once. Every row, and
    every group of M, keeps as many entries as before.

    Deviations from the authors' code: the masks come from the step before, whatever it is, so that N:M too ranks what goes by
    Wanda's score, not by the first step's; and a row that has no candidate left stops, where theirs goes on with entries of the
    wrong sign. Statistics are those of the dense block behind the refined blocks, as theirs.
    """

    name: ClassVar[str] = "dsnot"

    max_cycles: int = option(50, "swaps a row at most; 0 leaves every mask as it is")
    threshold: float = option(0.1, "a row whose expected error, summed over a sequence's tokens, is no larger is left alone")
    variance_power: float = option(1.0, "how much a varying input counts against what returns; 0: not at all")
    keep_sign: bool = option(False, "stop a row before its error changes sign; N:M always does, as in the authors' code")
    skip: str = option("mlp", "leave matrices alone whose name contains this; mlp is the authors' default, '' leaves none")

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing."""
        if self.max_cycles < 0 or self.threshold < 0 or self.variance_power < 0:
            raise ValueError("max_cycles, threshold and variance_power must be at least 0.")

    def needs(self) -> Needs:
        """Weights and calibration text."""
        return Needs.WEIGHTS | Needs.CALIBRATION

    def changes(self) -> Changes:
        """Masks, both ways; no value."""
        return Changes.MASK_MOVES

    def audit_group(self) -> str:
        """Rows keep their counts, and so does whatever they are part of."""
        return "earlier"

    def refuses(self, facts: JobFacts) -> str | None:
        """Nothing to refine."""
        return None if facts.earlier else "dsnot refines the masks of the step before it, and there is none."

    def prune(self, job: Job) -> None:
        """One pass of the calibration set through each dense block, and one through the refined block."""
        swaps = 0
        for block in walk(job):
            found = {matrix.name: matrix.weight.clone() for matrix in block.matrices}
            for matrix in block.matrices:
                matrix.weight.copy_(job.dense.weight(matrix))
            norms, sums, variances = block.collect(InputNorm, InputSum, InputVariance)
            for matrix in block.matrices:
                dense, now = matrix.weight.clone(), found[matrix.name]
                before = job.masks.get(matrix.name, torch.ones_like(now, dtype=torch.bool)).to(now.device)
                keep = before
                if not (self.skip and self.skip in matrix.name):
                    with phase("scoring"):
                        keep = self._refined(job, before, dense, now, [norms[matrix], sums[matrix], variances[matrix]])
                swaps += int((keep & ~before).sum())
                matrix.write(torch.where(before, now, dense), keep)
        job.note("entries swapped", swaps)

    def _refined(
        self, job: Job, keep: torch.Tensor, dense: torch.Tensor, now: torch.Tensor, statistics: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The mask [outputs, inputs] after the swaps; `now` holds the weights that `keep` left of `dense`."""
        norms, sums, variances = statistics
        dense, now = dense.to(sums.dtype), now.to(sums.dtype)
        gains, losses, scores = dense * sums, now * sums, wanda_scores(now, norms)
        merits = gains.abs() / variances**self.variance_power
        error = (gains - losses).sum(1, keepdim=True)
        first_sign, moving = error.sign(), torch.ones_like(error, dtype=torch.bool)
        goes, comes = keep.clone(), ~keep  # who may still be swapped; each only once
        keep = keep.clone()
        of = job.target.of if isinstance(job.target, NM) else 0
        for _ in range(self.max_cycles):
            moving &= error.abs() > self.threshold
            coming = comes & (gains * error.sign() > 0) & _has_any(goes, of)
            revived = merits.masked_fill(~coming, -torch.inf).argmax(1, keepdim=True)
            going = goes & (_same_group(goes, revived, of) if of else losses * error.sign() < 0)
            removed = scores.masked_fill(~going, torch.inf).argmin(1, keepdim=True)
            after = error - gains.gather(1, revived) + losses.gather(1, removed)
            moving &= coming.any(1, keepdim=True) & going.any(1, keepdim=True)
            if of or self.keep_sign:
                moving &= after.sign() == first_sign
            if not bool(moving.any()):
                break
            for mask, column in [(keep, removed), (comes, revived), (goes, removed)]:
                mask.scatter_(1, column, mask.gather(1, column) & ~moving)
            keep.scatter_(1, revived, keep.gather(1, revived) | moving)
            error = torch.where(moving, after, error)
        return keep


def _has_any(candidates: torch.Tensor, of: int) -> torch.Tensor:
    """Whether each entry's group of `of` columns (0: its row) has a candidate, broadcast to [outputs, inputs]."""
    if not of:
        return candidates.any(1, keepdim=True)
    return candidates.view(len(candidates), -1, of).any(2).repeat_interleave(of, dim=1)


def _same_group(like: torch.Tensor, column: torch.Tensor, of: int) -> torch.Tensor:
    """Which entries share the group of `of` columns with the row's chosen column [outputs, 1]."""
    return torch.arange(like.shape[1], device=like.device) // of == column // of


@hookimpl
def prunebench_pruners() -> list[type[Pruner]]:
    """What this package adds."""
    return [Ria, Dsnot]

"""SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (Frantar and Alistarh 2023, arXiv 2301.00774).

Least squares `min ||(W - Q) X||²` a matrix, approached column by column: `toolkit/least_squares.py`. Score: `W_ij² / U_jj²` of
the weights as the columns before have changed them, `U'U` the inverse of the damped `2/N * sum of X'X`. Comparison group: slabs
of `block_size` columns over all rows; N:M in groups of M columns. Needs calibration text; changes surviving weights. Inputs of
a block are the outputs of the pruned blocks before it; its statistics come from one pass of the dense block.

`mask = wanda` sweeps under Wanda's mask of the block's inputs (each output row; the Wanda paper's table 7). `mask = given`
sweeps the dense weights under the mask that earlier steps left, and keeps it bit for bit.

Deviations from the authors' code: slabs lose exactly `int(size * s)` entries, ties by position, where theirs lose one more and
all ties at the threshold (`counts = reference`: these are then zeros beyond the keep mask). A factorisation that fails is tried
again with more damping, and noted, where theirs stops. Entries that earlier steps removed stay removed; theirs may revive them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch

from prunebench.effort import Effort, EffortFacts, pruning_effort, walking_effort
from prunebench.errors import RunError
from prunebench.spec import Changes, Claims, Job, JobFacts, Matrix, Needs, Pruner, option
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import Block, Gram, InputNorm, walk
from prunebench.toolkit.least_squares import (
    Choose,
    ThresholdRule,
    check_room,
    choose_given,
    choose_groups,
    choose_slabs,
    inverse_factor,
    sweep,
)
from prunebench.toolkit.masks import keep_by_norms


@dataclass
class SparseGpt(Pruner):
    """Remove entries column by column, the later columns making up for the earlier."""

    name: ClassVar[str] = "sparsegpt"

    block_size: int = option(128, "columns of a slab: what is compared, and whose errors the rest takes up at once")
    damping: float = option(0.01, "added to the diagonal of the Gram matrix, as a share of its mean")
    mask: Literal["own", "wanda", "given"] = option("own", "whose mask: its own, Wanda's, or that of earlier steps")
    counts: Literal["exact", "reference"] = option("exact", "mask=own: exact counts, or the authors' threshold rule")

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing, and a rule that would never be asked."""
        if self.block_size < 1 or not 0 < self.damping <= 1:
            raise ValueError("block_size must be at least 1, and damping above 0 and at most 1.")
        if self.mask != "own" and self.counts != "exact":
            raise ValueError(f"counts={self.counts} is a rule for mask=own, and mask is {self.mask}.")

    def needs(self) -> Needs:
        """Weights and calibration text."""
        return Needs.WEIGHTS | Needs.CALIBRATION

    def changes(self) -> Changes:
        """What survives, and the mask where it is not given."""
        return Changes.KEPT_WEIGHTS if self.mask == "given" else Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def audit_group(self) -> str:
        """Slabs for its own mask, rows for Wanda's."""
        return f"columns:{self.block_size}" if self.mask == "own" else "row"

    def claims(self) -> Claims:
        """Rows are swept apart; columns in order, so not by channels; a mask that is given is not its own."""
        return Claims.BLOCKWISE if self.mask == "given" else Claims.ROWS | Claims.PREFIX | Claims.BLOCKWISE

    def refuses(self, facts: JobFacts) -> str | None:
        """Slabs that cut groups, a mask that nobody gives."""
        if self.mask == "own" and isinstance(facts.target, NM) and self.block_size % facts.target.of:
            return f"a block_size of {self.block_size} is not a multiple of {facts.target.of}: slabs would cut groups."
        if self.mask == "given" and not facts.earlier:
            return "mask=given keeps the mask of an earlier step, and there is none."
        return None

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """Gram matrices beside the norms; two factorisations and an inversion of each, and a sweep a matrix."""
        grams = Effort(phase="statistics", grams=facts.tokens, at_once=facts.batch_size * facts.length)
        return [*walking_effort(facts), *pruning_effort(), grams, Effort(phase="update", factors=3, sweeps=1)]

    def prune(self, job: Job) -> None:
        """One pass of the calibration set through each block, a sweep a matrix, one pass through the pruned block."""
        findings = _Findings()
        for block in walk(job, carries=[findings]):
            if self.mask == "given":
                for matrix in block.matrices:
                    matrix.weight.copy_(job.dense.weight(matrix))
            self._sweep_block(job, block, findings)
        findings.note(job)

    def _sweep_block(self, job: Job, block: Block, findings: _Findings) -> None:
        grams, norms = block.collect(Gram, InputNorm)
        gram, losses = None, []
        for matrix in block.matrices:
            if grams[matrix] is not gram:  # siblings share inputs, and so the factor
                gram = grams[matrix]
                factor = inverse_factor(gram, self.damping, partial(findings.retried, matrix.name))
            choose, every = self._choose(job, matrix, norms[matrix])
            swept = sweep(matrix.weight, factor, choose, self.block_size, every)
            keep = choose.exact if isinstance(choose, ThresholdRule) else swept.keep
            findings.extra_zeros["threshold rule"] += int((keep & ~swept.keep).sum())
            findings.extra_zeros["dead inputs"] += int((swept.keep & factor.dead).sum())
            matrix.write(swept.weight, keep)
            losses.append(swept.loss)
        findings.losses.append(float(torch.stack(losses).sum()))

    def _choose(self, job: Job, matrix: Matrix, norms: torch.Tensor) -> tuple[Choose, int]:
        """Who decides what stays, and how many columns at a time (0: a slab)."""
        weight, earlier = matrix.weight, job.masks.get(matrix.name)
        if self.mask == "given":
            if earlier is None:
                raise RunError(f"mask=given finds no mask of {matrix.name}: no earlier step has pruned it.")
            return choose_given(earlier.to(weight.device)), 0
        removed = None
        if earlier is not None:
            groups = torch.split(~earlier, self.block_size, dim=1) if self.mask == "own" else torch.split(~earlier, 1)
            check_room(matrix.name, groups, job.target)
            removed = ~earlier.to(weight.device)
        if self.mask == "wanda":
            keep = keep_by_norms(weight, norms, job.target, removed=removed)
            return choose_given(keep if removed is None else keep & ~removed), 0
        if isinstance(job.target, NM):
            return choose_groups(job.target, removed), job.target.of
        if isinstance(job.target, Unstructured) and self.counts == "reference":
            return ThresholdRule(job.target, removed, weight), 0
        return choose_slabs(job.target, removed), 0


class _Findings:
    """What the record should keep."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        """`sum((w - q)²/U_jj²)/2` a block."""
        self.extra_zeros: Counter[str] = Counter()
        """Entries that the mask keeps and that became zero, by reason."""
        self._retries: defaultdict[str, list[float]] = defaultdict(list)

    def retried(self, name: str, damping: float) -> None:
        """A Gram matrix, named by the first matrix that reads these inputs, needed so much damping."""
        self._retries[name].append(damping)

    def note(self, job: Job) -> None:
        """Tell the record."""
        job.note("losses of the blocks", self.losses)
        if +self.extra_zeros:
            job.note("extra_zeros", dict(+self.extra_zeros))
        if self._retries:
            job.note("damping tried again", dict(self._retries))

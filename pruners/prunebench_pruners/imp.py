"""Iterative magnitude pruning (Han et al. 2015, arXiv 1506.02626; Renda et al. 2020, arXiv 2003.02389): prune a little,
retrain, and so on. `rounds = 1` is one-shot IMP, the full retraining that PERP compares with.

Score: `|W|` among the survivors, so masks only grow. Comparison group: the whole matrix, or each output row. After round k of n
the share of zeros is `1 - (1 - S)^(k/n)` (geometric: each round removes the same share of survivors), `S k/n` (linear) or
`S (1 - (1 - k/n)^3)` (cubic; Zhu & Gupta 2017), exactly S in the end. N:M: rounds keep `M - ceil((M - N) s_k / S)` of each
group, so 2:4 goes over 3:4; a round that repeats the pattern of the one before only retrains, and says so.
Each round retrains with a new optimiser state. Learning rates: LLR (linear to zero, 10% warm-up) or CLR (cosine), as in BIMP
(Zimmer et al. 2023, arXiv 2111.00843); its other schedules need the original training's, which published models lack.

Deviations: the vision code prunes over the whole network, which collapses language models; references for those prune each
matrix to the same share, and so do we.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from prunebench.effort import Effort, EffortFacts, pruning_effort
from prunebench.spec import Changes, Claims, Job, JobFacts, Needs, Pruner, option
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import Retraining, keep_mask, magnitude_scores, report, retrain
from prunebench.toolkit.recovery import retraining_effort


@dataclass
class Imp(Pruner):
    """Remove the smallest survivors and retrain, round by round."""

    name: ClassVar[str] = "imp"

    rounds: int = option(3, "prunings, each followed by retraining; 1 is one-shot")
    schedule: Literal["geometric", "linear", "cubic"] = option("geometric", "how sparsity rises over the rounds")
    group: Literal["matrix", "row"] = option("matrix", "what is compared with what: the whole matrix, or each output row")
    retrain: Retraining = field(default_factory=lambda: Retraining(subset="all"))

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing."""
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1.")

    def needs(self) -> Needs:
        """Weights and training text."""
        return Needs.WEIGHTS | Needs.TRAINING | Needs.SEED

    def changes(self) -> Changes:
        """Masks, and what retraining changes."""
        return Changes.MASK_GROWS | self.retrain.changed()

    def audit_group(self) -> str:
        """As the option says."""
        return self.group

    def claims(self) -> Claims:
        """One-shot masks are those of magnitude; later rounds see what retraining made, out of the whole model and rounding."""
        return Claims.ROWS | Claims.CHANNELS | Claims.NESTED | Claims.PREFIX if self.rounds == 1 else Claims.NOTHING

    def refuses(self, facts: JobFacts) -> str | None:
        """What retraining refuses."""
        return self.retrain.misfit(facts)

    def sparsity(self, done: int, final: float) -> float:
        """The share of zeros after `done` of the rounds."""
        if done == self.rounds:
            return final
        share = done / self.rounds
        if self.schedule == "geometric":
            return 1 - math.pow(1 - final, share)
        return final * (share if self.schedule == "linear" else 1 - math.pow(1 - share, 3))

    def target(self, done: int, final: Target) -> Target:
        """The pattern after `done` of the rounds."""
        if isinstance(final, NM):
            # Rounded first: 2 * 0.5 / 0.5 may come out a hair above 2.
            removed = math.ceil(round((final.of - final.keep) * self.sparsity(done, final.sparsity) / final.sparsity, 9))
            return NM(final.of - removed, final.of)
        return Unstructured(self.sparsity(done, final.sparsity)) if isinstance(final, Unstructured) else final

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """A scoring and a training a round."""
        return [*pruning_effort(self.rounds), retraining_effort(self.retrain, facts, self.rounds)]

    def prune(self, job: Job) -> None:
        """Round by round."""
        masks = dict(job.masks)
        trainings = []
        repeated = []
        earlier = None
        for done in range(1, self.rounds + 1):
            target = self.target(done, job.target)
            if target == earlier:
                repeated.append(f"round {done} keeps {target}")
            else:
                self._grow(job, target, masks)
            trainings.append(retrain(job, self.retrain, masks, stage=done - 1))  # one-shot draws what perp alone would
            earlier = target
        report(job, self.retrain, *trainings)
        if repeated:
            job.note("rounds_that_only_retrain", repeated)

    def _grow(self, job: Job, target: Target, masks: dict[str, torch.Tensor]) -> None:
        for matrix in job.anatomy.matrices:
            scores = magnitude_scores(matrix.weight)
            survivors = masks.get(matrix.name, torch.ones(matrix.shape, dtype=torch.bool)).to(scores.device)
            scores.masked_fill_(~survivors, -1.0)  # a survivor may be zero too
            # An earlier step may have removed more than this round asks for.
            masks[matrix.name] = keep_mask(scores, target, group=self.group) & survivors
            matrix.keep(masks[matrix.name])

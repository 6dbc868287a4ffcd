"""GBLM-Pruner: Beyond Size, How Gradients Shape Pruning Decisions in Large Language Models (Das et al. 2023, arXiv 2311.04902).

Score: `S_ij = |W_ij| * (||X_j||_2 + alpha * ||G_ij||_p)`: X_j is input feature j over all calibration tokens, as in Wanda (the
mean over sequences of their sums of squares, then the root); G_ij the gradients of the samples' losses, and the p-norm is over
samples: the *sum* of magnitudes (l1) or the root of the *sum* of squares (l2). alpha = 100 means something with just these
normalisations: with more samples the l1 term grows in proportion, the l2 term with their root, the activations' not at all.
Comparison group: each output row; N:M in groups of M columns. Needs calibration text; changes no surviving weight.
The gradients are those of the model before this step, found once; the inputs are those that the pruned blocks before hand on.

Deviations from the authors' code: accumulators and products are float32. Theirs are float16 (for l1 the sums, for both what
is saved and multiplied), which costs up to 0.7% of the entries and 2% of perplexity against float32. The backward pass is
theirs in `eval()`; it is done block by block, so that it needs the memory of one block and not of the whole model's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prunebench.effort import TO_INPUTS, Effort, EffortFacts, gradient_effort, pruning_effort, walking_effort
from prunebench.spec import Claims, Job, Needs, Pruner, option
from prunebench.toolkit import InputNorm, loss_gradients, walk
from prunebench.toolkit.masks import keep_by_norms


@dataclass
class Gblm(Pruner):
    """Remove the entries of smallest magnitude times input norm plus gradient."""

    name: ClassVar[str] = "gblm"

    norm: Literal["l1", "l2"] = option(
        "l1", "of the gradients over samples: the sum of magnitudes, or the root of the sum of squares"
    )
    alpha: float = option(100.0, "how much the gradients count beside the input norms; 0 is wanda")

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing."""
        if self.alpha < 0:
            raise ValueError("alpha must not be negative.")

    def needs(self) -> Needs:
        """Weights, calibration text and gradients of the loss on it."""
        return Needs.WEIGHTS | Needs.CALIBRATION | Needs.GRADIENTS

    def claims(self) -> Claims:
        """A gradient depends on all rows of a matrix, and on the model as it was before the step; without any it is Wanda."""
        claims = Claims.CHANNELS | Claims.BLOCKWISE
        return claims if self.alpha else claims | Claims.ROWS | Claims.PREFIX

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """Wanda's, and a pass forward with all blocks' inputs kept, the head, and every block there and back."""
        tokens = facts.tokens
        forward = Effort(phase="propagation", blocks=tokens, length=facts.length, held=tokens * (facts.layers + 2), copies=1)
        top = Effort(phase="statistics", head=TO_INPUTS * tokens, at_once=facts.length)
        return [*walking_effort(facts), *pruning_effort(), forward, top, gradient_effort(facts)]

    def prune(self, job: Job) -> None:
        """One backward pass of each sample through the whole model, and then Wanda with another score."""
        gradients = job.artefact(f"loss gradients {self.norm}", lambda: loss_gradients(job, self.norm))
        for block in walk(job):
            norms = block.collect(InputNorm)
            for matrix in block.matrices:
                gradient = gradients[matrix.name]
                matrix.keep(keep_by_norms(matrix.weight, norms[matrix], job.target, gradient, self.alpha))

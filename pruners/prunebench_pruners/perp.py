"""PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (Zimmer et al. 2023, arXiv 2312.15230).

A step after any pruner: a small subset of the parameters is retrained under the masks that the earlier steps left (those masks,
never `W != 0`), or each block is reconstructed (`mode = reconstruct`). With M the keep mask, W the pruned weight and
s = alpha / rank:

* `mask_lora`: `W + s (M * BA)`, merged exactly; `lora_prune`: trained as `W + s BA`, masked when merged;
  `scale_lora`: `W * BA`, which starts from BA = 1 with all components of the rank equal, so they stay equal;
* `biases`, `norms` (weights of the norms), both, or the `head` (LoRA, merged; a tied head gets a weight of its own first);
* `all`: full sparse fine-tuning of matrices, biases and norms; the gradient of what the mask removes is zeroed.

Trained in float32 whatever the model's dtype, and cast back. AdamW, no weight decay, 10% warm-up, then linear to zero.

Deviations from the authors' code (`methods.md` 8): windows are packed, not padded; the mask is the one that was recorded, so a
kept weight that happens to be zero may move; learning rates, batch and number of samples of the paper are UNVERIFIED, so
`learning_rate` has defaults of ours (1e-4 for the LoRA kinds and the head, 5e-4 for biases and norms, 1e-5 for all), and so
has `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from prunebench.effort import Effort, EffortFacts
from prunebench.spec import Changes, Claims, Job, JobFacts, Needs, Pruner, option
from prunebench.toolkit import Retraining, reconstruct, report, retrain
from prunebench.toolkit.recovery import reconstruction_effort, retraining_effort


@dataclass
class Perp(Retraining, Pruner):
    """Retrain a small subset of the parameters, the masks fixed."""

    name: ClassVar[str] = "perp"

    mode: Literal["retrain", "reconstruct"] = option("retrain", "the model on training text, or block by block")

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing, and a subset that the mode cannot reach."""
        super().__post_init__()
        if self.mode == "reconstruct" and self.subset == "head":
            raise ValueError("the head is in no block, so subset=head cannot be trained by mode=reconstruct.")

    def needs(self) -> Needs:
        """Training text, or calibration text to reconstruct."""
        return Needs.WEIGHTS | Needs.SEED | (Needs.TRAINING if self.mode == "retrain" else Needs.CALIBRATION)

    def changes(self) -> Changes:
        """What the subset says; never a mask."""
        return self.changed()

    def claims(self) -> Claims:
        """Blocks are reconstructed one after the other; retraining is of the whole model."""
        return Claims.BLOCKWISE if self.mode == "reconstruct" else Claims.NOTHING

    def refuses(self, facts: JobFacts) -> str | None:
        """A subset that the model does not have."""
        return self.misfit(facts)

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """That of the mode."""
        return [retraining_effort(self, facts)] if self.mode == "retrain" else reconstruction_effort(self, facts)

    def prune(self, job: Job) -> None:
        """Recover."""
        if self.mode == "retrain":
            report(job, self, retrain(job, self))
        else:
            reconstruct(job, self)

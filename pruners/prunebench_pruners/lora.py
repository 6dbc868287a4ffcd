"""Sparsity-aware LoRA fine-tuning after any pruner, as in Wanda (Sun et al. 2023, arXiv 2306.11695, section 5).

With W the pruned weight, M its keep mask, s = alpha / rank, and factors B [outputs, rank] from zero and A [rank, inputs]
(LoRA, Hu et al. 2021, arXiv 2106.09685), beside the matrices of the asked roles, query and value in the recipe:

* `merge = apart`: `W x + s B(A x)`; the adapter stays beside the weight, as merging it would fill the zeros. Extra parameters,
  saved in PEFT's format and counted.
* `merge = masked`: trained as `W + s (M * BA)`, and merged so in float32: nothing is left beside the weights (`mask_lora` of
  PERP, Zimmer et al. 2023, arXiv 2312.15230).

Everything else is frozen. In a fused matrix only the rows of the asked roles are trained; the other rows of B stay zero, and
are counted with the rest. Needs training text and a seed. No comparison group: the masks stay as they are.

The recipe (`lora_ft` of the authors' code): rank 8, alpha 16, learning rate 1e-4, one epoch of 30,000 C4 sequences of 1024 in
batches of 128, which are our 234 steps. Deviations: no dropout (theirs is 0.05), so that a run is a function of its seed; 10%
of the steps warm up (theirs: 5 steps); factors in float32 whatever the model's dtype (theirs train in fp16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from prunebench.effort import TO_INPUTS, Effort, EffortFacts, training_effort
from prunebench.spec import Changes, Job, JobFacts, Matrix, Needs, Pruner, option
from prunebench.toolkit.adapter_files import NO_NAME
from prunebench.toolkit.adapters import Adapter
from prunebench.toolkit.experts import is_of_expert
from prunebench.toolkit.lowrank import LowRank
from prunebench.toolkit.recovery import generators, merge_and_compare, next_token_loss, report, retraining_effort, shuffled
from prunebench.toolkit.retrain import Retraining, Scope, train, whole_model
from prunebench.toolkit.roles import Role, rows_with, unknown_roles


class _OfRows(LowRank):
    """A low-rank change of some output rows: `up` stays zero in the others."""

    rows: torch.Tensor
    """Boolean, [outputs]."""

    def collect_gradients(self) -> None:
        """Without those of the other rows: Adam moves whatever has a gradient."""
        if self.up.grad is not None:
            self.up.grad *= self.rows[:, None]


class _Beside(_OfRows):
    """Trained as it will be used, by what it adds to the output: no change is lost in a weight of 16 bits."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the module's output gain `s B(A x)` for the time inside."""
        handle = Adapter("", self.down, self.up, self.scale).hook(self.module)
        try:
            yield
        finally:
            handle.remove()


@dataclass
class Lora(Pruner):
    """Train low-rank adapters beside the pruned weights, and keep them apart or merge them under the masks."""

    name: ClassVar[str] = "lora"

    roles: tuple[Role, ...] = option(("query", "value"), "which matrices get an adapter")
    rank: int = option(8, "of the adapters")
    alpha: float = option(16.0, "adapters are scaled by alpha / rank")
    learning_rate: float = option(1e-4, "the highest")
    steps: int = option(234, "optimiser steps; 0 changes nothing")
    batch: int = option(128, "sequences a step")
    schedule: Literal["llr", "clr"] = option("llr", "after 10% warm-up linear (llr) or cosine (clr) to zero")
    precision: Literal["model", "bfloat16"] = option("model", "of the products in training: the model's dtype, or by autocast")
    merge: Literal["apart", "masked"] = option("apart", "stay beside the weights, or merge under the masks")

    def __post_init__(self) -> None:
        """Decline numbers that mean nothing."""
        self.settings()
        if not self.roles or len(set(self.roles)) < len(self.roles):
            raise ValueError("roles must name at least one role, and none twice.")

    def settings(self) -> Retraining:
        """What the training loop takes."""
        return Retraining(
            subset="mask_lora",
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            rank=self.rank,
            alpha=self.alpha,
            precision=self.precision,
        )

    def needs(self) -> Needs:
        """Training text; the seed draws the factors and the order of the text."""
        return Needs.WEIGHTS | Needs.TRAINING | Needs.SEED

    def changes(self) -> Changes:
        """Adapters, or the surviving weights."""
        return Changes.ADAPTER if self.merge == "apart" else Changes.KEPT_WEIGHTS

    def refuses(self, facts: JobFacts) -> str | None:
        """A model in which a role is not found, or in which an adapter's matrix would have no name in PEFT's format."""
        reason = unknown_roles(self.roles, facts)
        if reason or self.merge == "masked":
            return reason
        played = (m.name for m in facts.matrices if is_of_expert(m.name) and bool(rows_with(self.roles, m, facts.config).any()))
        expert = next(played, None)
        return f"an adapter of {expert} could not be saved: {NO_NAME}; merge=masked needs none." if expert else None

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:
        """Beside the weights no gradient of a matrix is taken; for the masks that of the merged one."""
        if self.merge == "masked":
            return [retraining_effort(self.settings(), facts)]
        dtype = "bfloat16" if self.precision == "bfloat16" else None
        return [training_effort(facts, self.steps * self.batch, TO_INPUTS, copies=0.0, dtype=dtype)]

    def prune(self, job: Job) -> None:
        """Train, then attach or merge."""
        settings, scope = self.settings(), whole_model(job)
        for_factors, for_order = generators(job.seed)
        parts = self._parts(job, scope, for_factors)
        windows = shuffled(job.training, self.batch, for_order, job.device)
        trained = train(settings, scope, list(parts.values()), windows, next_token_loss(job.model), job)
        report(job, settings, trained)
        if self.steps and self.merge == "masked":
            merge_and_compare(job, scope, list(parts.values()))
        elif self.steps:
            for matrix, part in parts.items():
                job.attach(matrix, part.down, part.up, part.scale)

    def _parts(self, job: Job, scope: Scope, generator: torch.Generator) -> dict[Matrix, _OfRows]:
        found: dict[Matrix, _OfRows] = {}
        for matrix in job.anatomy.matrices:
            rows = rows_with(self.roles, matrix, job.model.config)
            if bool(rows.any()):
                shape = (self.rank, self.alpha, generator)
                if self.merge == "apart":
                    part: _OfRows = _Beside(matrix.module, matrix.weight, "lora", *shape)
                else:
                    part = _OfRows(matrix.module, matrix.weight, "mask_lora", *shape, scope.mask(matrix))
                part.rows = rows.to(part.up.device)
                found[matrix] = part
        return found

"""The kit catches pruners that break a law by that law, and by no other that they keep."""

from __future__ import annotations

import logging
import sys
import warnings
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from plain import CLAIMS, Adapts, Attaches, Plain, Prints
from torch import nn

from prunebench.spec import Changes, Claims, Job, JobFacts, Matrix, Needs, option
from prunebench.targets import NM, Unstructured
from prunebench.testing import CHECKS, FAMILIES, check_pruner, random_tokens, tiny_model
from prunebench.testing.claims import permute_channels
from prunebench.toolkit import InputNorm, keep_mask, magnitude_scores, walk, wanda_scores
from prunebench.toolkit.heads import untie_head

# Each is `Plain` but for one thing


class OffByOne(Plain):
    """The threshold form of the reference codes, which removes one entry more."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        keep = super().mask(job, matrix)
        if isinstance(job.target, Unstructured) and job.target.sparsity:
            scores = magnitude_scores(matrix.weight).masked_fill(~keep, float("inf"))
            keep &= scores > scores.min(dim=1, keepdim=True).values
        return keep


class Complement(Plain):
    """Counts what stays, and rounds that down."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        if not isinstance(job.target, Unstructured):
            return super().mask(job, matrix)
        scores = magnitude_scores(matrix.weight)
        kept = int(scores.shape[1] * (1 - job.target.sparsity))
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(kept).indices, True)


class WrongGroup(Plain):
    """Compares over the matrix, and says rows."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(matrix.weight), job.target, "matrix")


class InvertedNM(Plain):
    """Removes N of M."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        target = NM(job.target.of - job.target.keep, job.target.of) if isinstance(job.target, NM) else job.target
        return keep_mask(magnitude_scores(matrix.weight), target, "row")


class TransposedNM(Plain):
    """Groups along the outputs."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        if not isinstance(job.target, NM):
            return super().mask(job, matrix)
        return keep_mask(magnitude_scores(matrix.weight).t().contiguous(), job.target, "row").t()


class TooMuchNM(Plain):
    """Keeps fewer of each group than it may, which the audit lets through."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        target = NM(job.target.keep - 1, job.target.of) if job.target == NM(2, 4) else job.target
        return keep_mask(magnitude_scores(matrix.weight), target, "row")


class DropsLastRows(Plain):
    """Works in pieces of 16 rows and forgets the rest."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        keep = super().mask(job, matrix)
        keep[len(keep) // 16 * 16 :] = True
        return keep


class SkipsLastBlock(Plain):
    def prune(self, job: Job) -> None:
        for handle in job.anatomy.blocks[:-1]:
            for matrix in handle.matrices:
                matrix.keep(self.mask(job, matrix))


class ZeroesWithoutKeep(Plain):
    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.weight.masked_fill_(~mask, 0)


class MasksWithoutZeroing(Plain):
    """Keeps the masked entries as they were."""

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        weight = matrix.weight.clone()
        matrix.keep(mask)
        matrix.weight.copy_(weight)


class ChangesSurvivors(Plain):
    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.write(matrix.weight * 1.01, mask)


class NegativeZeros(Plain):
    """Multiplies by the mask: removed negative weights become -0.0, and nothing else shows."""

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.keep(mask)
        matrix.weight.copy_(torch.where(mask, matrix.weight, -0.0))


class RevivesZeros(Plain):
    """Prunes the dense weights again, whatever earlier steps removed."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(job.dense.weight(matrix)), job.target, "row")

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.write(job.dense.weight(matrix), mask)


class TouchesHead(Plain):
    def finish(self, job: Job) -> None:
        job.model.get_output_embeddings().weight.data[0, 0] += 1


class ChangesNorm(Plain):
    def finish(self, job: Job) -> None:
        job.model.model.norm.weight.data.mul_(1.5)


class ChangesBias(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.matrices[0].module.bias.data += 1


class UntiesHead(Plain):
    def finish(self, job: Job) -> None:
        head = job.model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())


class UntiesInMemoryOnly(UntiesHead):
    """Declares it, and the settings still say that the head is tied."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.HEAD


class ChangesTiedHead(TouchesHead):
    """Declares the head, and changes the embedding with it."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.HEAD


class UntiesAndForgets(Plain):
    """A gradient stays at the head that was untied."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.HEAD

    def finish(self, job: Job) -> None:
        untie_head(job.model)
        head = job.model.get_output_embeddings().weight
        head.grad = torch.ones_like(head)


class AdaptsAndHooks(Adapts):
    """Leaves a hook of its own besides, which no saving knows of."""

    def finish(self, job: Job) -> None:
        super().finish(job)
        job.anatomy.matrices[0].module.register_forward_hook(lambda module, args, output: output * 2)


class AdaptsByChance(Adapts):
    def factors(self, job: Job, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = matrix.shape
        return torch.randn(2, columns), torch.randn(rows, 2)


class AdaptsByBatch(Adapts):
    def factors(self, job: Job, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = super().factors(job, matrix)
        return down, up + job.batch_size


class FirstBatchOnly(Plain):
    """Wanda with the norms of one batch."""

    def needs(self) -> Needs:
        return Needs.WEIGHTS | Needs.CALIBRATION

    def batches(self, block: Any) -> list[torch.Tensor]:
        return list(block.batches())[:1]

    def prune(self, job: Job) -> None:
        for block in walk(job):
            with torch.no_grad():
                inputs = torch.cat(self.batches(block)).flatten(0, 1)
            for matrix in block.matrices:
                norms = inputs.norm(dim=0).repeat(9)[: matrix.shape[1]]
                matrix.keep(keep_mask(wanda_scores(matrix.weight, norms), job.target, "row"))


class DropsLastBatch(FirstBatchOnly):
    """Leaves a batch out that is shorter than the others."""

    def batches(self, block: Any) -> list[torch.Tensor]:
        found = list(block.batches())
        return [batch for batch in found if len(batch) == len(found[0])]


class DropsLastSequences(FirstBatchOnly):
    """Stops a sequence short of the end of each batch."""

    def batches(self, block: Any) -> list[torch.Tensor]:
        return [batch[:-1] for batch in block.batches()]


class GlobalRandom(Plain):
    """Draws from the global generator."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(torch.rand(matrix.shape).masked_fill_(matrix.weight == 0, -1), job.target, "row")


class SeedsGlobally(GlobalRandom):
    """The same bits each time, at the cost of everybody else."""

    def needs(self) -> Needs:
        return Needs.WEIGHTS | Needs.SEED

    def prune(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        super().prune(job)


class Drifts(Plain):
    """Keeps something on the instance that the next run starts from."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        scores = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(self.seen))
        return keep_mask(scores.masked_fill_(matrix.weight == 0, -1), job.target, "row")


class LeavesHook(Plain):
    def finish(self, job: Job) -> None:
        job.model.register_forward_pre_hook(lambda module, args: None)


class LeavesBackwardHook(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.matrices[0].module.register_full_backward_hook(lambda module, inputs, outputs: None)


class LeavesTensorHook(Plain):
    def finish(self, job: Job) -> None:
        next(p for p in job.model.parameters() if p.requires_grad).register_hook(lambda grad: None)


class LeavesGlobalHook(Plain):
    handles: ClassVar[list[Any]] = []

    def finish(self, job: Job) -> None:
        self.handles.append(nn.modules.module.register_module_forward_hook(lambda module, args, output: None))


class LeavesAttribute(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.matrices[0].module.scaler_row = 1.0


class LeavesForward(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.blocks[0].module.forward = job.anatomy.blocks[0].module.forward


class LeavesBuffer(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.matrices[0].module.register_buffer("mask", torch.ones(1))


class WrapsModule(Plain):
    def finish(self, job: Job) -> None:
        block = job.anatomy.blocks[0].module
        block.mlp = nn.Sequential(block.mlp)


class LeavesGrad(Plain):
    def finish(self, job: Job) -> None:
        torch.stack([p.sum() for p in job.model.parameters()]).sum().backward()


class Freezes(Plain):
    def finish(self, job: Job) -> None:
        job.model.requires_grad_(False)


class LeavesTraining(Plain):
    def finish(self, job: Job) -> None:
        job.anatomy.blocks[0].module.train()


class ChangesConfig(Plain):
    def finish(self, job: Job) -> None:
        job.model.config.use_cache = False


class LeavesGradModeOff(Plain):
    def finish(self, job: Job) -> None:
        torch.set_grad_enabled(False)


class ChangesDefaultDtype(Plain):
    def finish(self, job: Job) -> None:
        torch.set_default_dtype(torch.float64)


class Warns(Plain):
    def finish(self, job: Job) -> None:
        warnings.warn("deprecated", FutureWarning, stacklevel=1)


class LeavesWalkOpen(Plain):
    def finish(self, job: Job) -> None:
        self.visits = walk(job)
        next(self.visits)


@dataclass
class ChangesOptions(Plain):
    name: ClassVar[str] = "plain"
    strength: float = option(1.0, "how much")

    def finish(self, job: Job) -> None:
        self.strength /= 2


class Raises(Plain):
    def finish(self, job: Job) -> None:
        raise RuntimeError("shapes cannot be multiplied")


class RefusalTouches(Plain):
    def refuses(self, facts: JobFacts) -> str | None:
        facts.config.use_cache = False
        return None


class AnswersOtherwise(Plain):
    def refuses(self, facts: JobFacts) -> str | None:
        self.asked = getattr(self, "asked", 0) + 1
        return f"no, for the {self.asked}th time" if facts.matrices[-1].shape[1] == 21 else None


class NoSuchGroup(Plain):
    def audit_group(self) -> str:
        return "column"


# What the usual targets do not show


class ForgetsOddWidths(Plain):
    """Leaves a matrix alone that its kernel cannot take."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return super().mask(job, matrix) | (matrix.shape[1] % 2 == 1)


class RoundsToNearest(Plain):
    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        if not isinstance(job.target, Unstructured):
            return super().mask(job, matrix)
        return keep_most(magnitude_scores(matrix.weight), round(matrix.shape[1] * (1 - job.target.sparsity)))


class CountsInFractions(Plain):
    """Takes the decimal for what was meant: of 50 entries 0.58 is 29, and in floats a hair below."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        if not isinstance(job.target, Unstructured):
            return super().mask(job, matrix)
        columns = matrix.shape[1]
        removed = int(columns * Fraction(job.target.sparsity).limit_denominator(1000))
        return keep_most(magnitude_scores(matrix.weight), columns - removed)


class AlwaysRemovesOne(Plain):
    """Takes a threshold from a list that must not be empty."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        keep = super().mask(job, matrix)
        if job.target.sparsity and bool(keep.all()):
            keep[:, 0] = False
        return keep


class WholeRows(Plain):
    """Removes outputs: the total is right."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        if not isinstance(job.target, Unstructured):
            return super().mask(job, matrix)
        norms = matrix.weight.norm(dim=1)
        return (norms.argsort().argsort() >= int(len(norms) * job.target.sparsity))[:, None].expand(matrix.shape).clone()


class ShiftedGroups(Plain):
    """Groups that begin in the middle of others."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(matrix.weight).roll(1, dims=1), job.target, "row").roll(-1, dims=1)


# Dtypes


class CastsWeights(Plain):
    """Works in half precision and casts back."""

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.write(matrix.weight.bfloat16().float(), mask)


class ChangesDtype(Plain):
    """Declares that weights change, which covers no dtype."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def finish(self, job: Job) -> None:
        job.anatomy.matrices[0].module.to(torch.bfloat16)


# Masks of earlier steps


class KeepsWhatIsGone(Plain):
    """The weights stay zero; the masks say otherwise."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(job.dense.weight(matrix)), job.target, "row")


class TrainsWhatIsGone(Plain):
    """Declares that survivors change, and moves the others too."""

    def changes(self) -> Changes:
        return Changes.KEPT_WEIGHTS

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.weight.add_(0.01)


# Streaming


class HoldsReferences(Plain):
    """Takes all weights before the first visit."""

    def prune(self, job: Job) -> None:
        self.held = {matrix.name: matrix.weight for matrix in job.anatomy.matrices}
        super().prune(job)
        self.held = {}

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(torch.nan_to_num(magnitude_scores(self.held[matrix.name])), job.target, "row")


class WritesLate(Plain):
    """Changes survivors when the block has left the device: the copy there changes, and nothing else."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def prune(self, job: Job) -> None:
        self.held: list[torch.Tensor] = []
        super().prune(job)

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        super().lay(job, matrix, mask)
        self.held.append(matrix.weight)

    def finish(self, job: Job) -> None:
        for weight in self.held:
            weight.mul_(1.01)
        self.held = []


# What is printed


class PrintsToStderr(Plain):
    def finish(self, job: Job) -> None:
        print("100%|██████████|", file=sys.stderr)


class Logs(Plain):
    """By a logger, which under pytest writes to no stream that is there."""

    def finish(self, job: Job) -> None:
        logging.getLogger("stranger").warning("weights were %s", "pruned")


# Claims that do not hold


class CouplesRows(Plain):
    """Measures each entry against those above it."""

    def claims(self) -> Claims:
        return Claims.ROWS

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        scores = magnitude_scores(matrix.weight)
        return survivors_by(scores / scores.cumsum(dim=0), matrix, job)


class OrdersColumns(Plain):
    """Prefers later columns."""

    def claims(self) -> Claims:
        return Claims.CHANNELS

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        scores = magnitude_scores(matrix.weight)
        return survivors_by(scores * torch.linspace(1, 2, scores.shape[1], dtype=scores.dtype), matrix, job)


class DrawsForEachSparsity(Plain):
    """Seeded, but anew for each target."""

    def needs(self) -> Needs:
        return Needs.WEIGHTS | Needs.SEED

    def claims(self) -> Claims:
        return Claims.NESTED

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        generator = torch.Generator().manual_seed(job.seed + int(1000 * job.target.sparsity))
        return survivors_by(torch.rand(matrix.shape, generator=generator), matrix, job)


class DensePrefix(Plain):
    """Wanda, with all norms from the model as it was."""

    def needs(self) -> Needs:
        return Needs.WEIGHTS | Needs.CALIBRATION

    def claims(self) -> Claims:
        return Claims.ROWS | Claims.CHANNELS | Claims.PREFIX

    def prune(self, job: Job) -> None:
        norms: dict[Matrix, torch.Tensor] = {}
        for block in walk(job):
            norms |= block.collect(InputNorm)
        for matrix, norm in norms.items():
            matrix.keep(keep_mask(wanda_scores(matrix.weight, norm), job.target, "row"))


class RemembersBlocks(Plain):
    """Spares in a block what stood out in the one before, and tells the walk of nothing that it carries."""

    def claims(self) -> Claims:
        return Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        seen = torch.zeros(())
        for block in walk(job):
            for matrix in block.matrices:
                scores = magnitude_scores(matrix.weight)
                scores[:, : scores.shape[1] // 2] += seen.abs()
                seen = scores.mean()
                matrix.keep(survivors_by(scores, matrix, job))


class GoesBack(Plain):
    """Lays the masks of all blocks when it has seen the last, so that nothing is finished on leaving one."""

    def claims(self) -> Claims:
        return Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        masks = [(matrix, self.mask(job, matrix)) for block in walk(job) for matrix in block.matrices]
        for matrix, mask in masks:
            matrix.keep(mask)


class WalksNot(Plain):
    """Has no walk that could be taken up."""

    def claims(self) -> Claims:
        return Claims.BLOCKWISE

    def prune(self, job: Job) -> None:
        for matrix in job.anatomy.matrices:
            matrix.keep(self.mask(job, matrix))


class ClaimsNoClaim(Plain):
    def claims(self) -> Any:
        return "rows"


# Worse than random


class Inverted(Plain):
    """Removes the largest."""

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return survivors_by(-magnitude_scores(matrix.weight), matrix, job)


class WholeColumns(Plain):
    """Removes inputs, the same of all rows: every count is right."""

    def refuses(self, facts: JobFacts) -> str | None:
        return "columns that lack entries cannot be compared." if facts.earlier else None

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return (
            keep_mask(magnitude_scores(matrix.weight).sum(dim=0, keepdim=True), job.target, "row").expand(matrix.shape).clone()
        )


class BreaksSurvivors(Plain):
    """Declares that they change."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.write(matrix.weight * torch.nan, mask)


class Spoils(Plain):
    """Makes no masks, and what it trains gets worse."""

    def changes(self) -> Changes:
        return Changes.KEPT_WEIGHTS

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.weight.mul_(1.5)


def keep_most(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Keep so many entries of highest score in each row."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(count).indices, True)


def survivors_by(scores: torch.Tensor, matrix: Matrix, job: Job) -> torch.Tensor:
    """What has the highest scores among what is left in each row."""
    return keep_mask(scores.masked_fill(matrix.weight == 0, -torch.inf), job.target, "row")


# What catches them


COUNTS = {"target_met", "odd_shapes"}
STRAY = {"declared_changes", "zero_sparsity"}
LEFT = {"nothing_left"}
SILENT = {"silent"}
POOR = {"better_than_random"}
WRONG: list[tuple[type[Plain], str, set[str], str]] = [  # where, the laws that it breaks, and what one of them says
    (OffByOne, "llama", COUNTS, "do not have exactly 8 of 16"),
    (Complement, "llama", COUNTS, "do not have exactly 9 of 16"),
    (WrongGroup, "llama", COUNTS, "audit_group"),
    (InvertedNM, "llama", COUNTS, "keep more than 1 of 4"),
    (TransposedNM, "llama", COUNTS | {"earlier_zeros"}, "keep more than 2 of 4"),
    (TooMuchNM, "llama", COUNTS, "has 3 zeros at 2:4, and exactly 2"),
    (DropsLastRows, "llama", COUNTS | {"earlier_zeros"}, "do not have exactly"),
    (SkipsLastBlock, "llama", COUNTS, "has no keep mask"),
    (ZeroesWithoutKeep, "llama", COUNTS | {"declared_changes"}, "has no keep mask"),
    (MasksWithoutZeroing, "llama", COUNTS, "are not zero in the weights"),
    (ChangesSurvivors, "llama", STRAY, "changed at 0.5"),
    (ForgetsOddWidths, "llama", {"odd_shapes"}, "do not have exactly"),
    (RoundsToNearest, "llama", COUNTS, "do not have exactly 9 of 16"),
    (CountsInFractions, "llama", {"odd_shapes"}, "do not have exactly 28 of 50"),
    (AlwaysRemovesOne, "llama", {"odd_shapes"}, "do not have exactly 0 of"),
    (WholeRows, "llama", COUNTS | {"earlier_zeros"}, "do not have exactly"),
    (ShiftedGroups, "llama", COUNTS, "keep more than 2 of 4"),
    (CastsWeights, "llama", STRAY, "changed at 0.5"),
    (ChangesDtype, "llama", {"declared_changes", "zero_sparsity", "saves"}, "q_proj.weight changed at 0.5"),
    (RevivesZeros, "llama", {"earlier_zeros"}, "came back at 0.5 after an earlier step"),
    (KeepsWhatIsGone, "llama", {"earlier_zeros"}, "entries again at 0.5 after an earlier step"),
    (TrainsWhatIsGone, "llama", COUNTS | {"earlier_zeros"}, "came back"),
    (HoldsReferences, "llama", {"streaming"}, "is another at 0.5 when blocks are streamed"),
    (WritesLate, "llama", {"streaming"}, "is another at 0.5 when blocks are streamed"),
    (PrintsToStderr, "llama", SILENT, "printed '100%"),
    (Logs, "llama", SILENT, "logged 'weights were pruned'"),
    (CouplesRows, "llama", {"rows_commute"}, "do not move with its rows"),
    (OrdersColumns, "llama", {"channels_commute"}, "do not move with the channels"),
    (OrdersColumns, "opt", {"channels_commute"}, "do not move with the channels"),
    (DrawsForEachSparsity, "llama", {"nested"}, "are removed at 0.25 and not at 0.5"),
    (DensePrefix, "llama", {"pruned_prefix"}, "when an earlier step had pruned the block before it"),
    (RemembersBlocks, "llama", {"resumes"}, "is another at 0.5 when the step was killed after 1 of its blocks"),
    (GoesBack, "llama", {"resumes"}, "is another at 0.5 when the step was killed after 1 of its blocks"),
    (WalksNot, "llama", {"resumes"}, "no walk left a block at 0.5"),
    (ClaimsNoClaim, "llama", {"refuses_first", *CLAIMS}, "claims() of the pruner 'plain' answers 'rows'"),
    (Inverted, "quickstart", POOR, "random pruning would leave at least"),
    (WholeColumns, "quickstart", POOR, "random pruning would leave at least"),
    (BreaksSurvivors, "quickstart", POOR | COUNTS, "is nan at 0.5"),
    (Spoils, "quickstart", POOR, "before the step it was"),
    (TouchesHead, "llama", STRAY, "lm_head.weight changed"),
    (ChangesNorm, "llama", STRAY, "model.norm.weight changed"),
    (ChangesBias, "qwen2", STRAY, "q_proj.bias changed"),
    (UntiesHead, "gpt2", {"declared_changes", "saves"}, "untied"),
    (UntiesHead, "opt", {"declared_changes", "saves"}, "untied"),
    (UntiesInMemoryOnly, "gpt2", LEFT | {"saves"}, "tie_word_embeddings is True and should be False"),
    (ChangesTiedHead, "qwen3", STRAY, "model.embed_tokens.weight changed"),
    (UntiesAndForgets, "opt", LEFT, "left a gradient on lm_head.weight"),
    (Attaches, "llama", STRAY | LEFT, "left a hook (forward_hooks) on model.layers.0.mlp.up_proj"),
    (AdaptsAndHooks, "llama", LEFT, "left a hook (forward_hooks) on model.layers.0.self_attn.q_proj"),
    (AdaptsByChance, "llama", LEFT | {"same_seed"}, "factor of adapter 0 of model.layers.0.self_attn.k_proj"),
    (AdaptsByBatch, "llama", {"batch_splits"}, "in the adapter of model.layers.0.mlp.up_proj in float64"),
    (FirstBatchOnly, "llama", {"batch_splits"}, "batches of 3 and of 7 differ"),
    (DropsLastSequences, "llama", {"batch_splits"}, "batches of 3 and of 7 differ"),
    (DropsLastBatch, "llama", {"batch_splits"}, "batches of 3 and of 7 differ"),
    (GlobalRandom, "llama", LEFT | {"same_seed"}, "with the same seed"),
    (SeedsGlobally, "llama", LEFT, "torch's random generator"),
    (Drifts, "llama", {"same_seed"}, "with the same seed"),
    (LeavesHook, "llama", LEFT, "left a hook (forward_pre_hooks) on the model"),
    (LeavesBackwardHook, "llama", LEFT, "left a hook (backward_hooks) on model.layers.0"),
    (LeavesTensorHook, "llama", LEFT, "left a hook on model.embed_tokens.weight"),
    (LeavesGlobalHook, "llama", LEFT, "on all modules of the process"),
    (LeavesAttribute, "llama", LEFT, "attribute scaler_row on model.layers.0"),
    (LeavesForward, "llama", LEFT, "attribute forward on model.layers.0"),
    (LeavesBuffer, "llama", LEFT | STRAY | {"saves"}, "too many: model.layers.0.self_attn.q_proj.mask"),
    (WrapsModule, "llama", LEFT | STRAY | {"saves"}, "module tree"),
    (LeavesGrad, "llama", LEFT, "left a gradient on model.embed_tokens.weight"),
    (Freezes, "llama", LEFT, "left requires_grad of model.embed_tokens.weight as False"),
    (LeavesTraining, "llama", LEFT, "model.layers.0 in training mode"),
    (ChangesConfig, "llama", LEFT, "use_cache is False"),
    (LeavesGradModeOff, "llama", LEFT, "left changed: grad mode"),
    (ChangesDefaultDtype, "llama", LEFT, "the default dtype"),
    (Prints, "llama", SILENT, "printed 'pruning layer 0"),
    (Warns, "llama", SILENT, "warning through: deprecated"),
    (LeavesWalkOpen, "llama", LEFT, "left a walk open"),
    (ChangesOptions, "llama", LEFT, "changed its own options"),
    (Raises, "llama", set(CHECKS) - {"refuses_first", *CLAIMS, *POOR}, "RuntimeError: shapes cannot be multiplied"),
    (RefusalTouches, "llama", {"refuses_first"}, "use_cache is False"),
    (AnswersOtherwise, "llama", {"refuses_first"}, "a second time"),
    (NoSuchGroup, "llama", COUNTS | {"refuses_first"}, "'column'"),
]


@pytest.mark.parametrize(("wrong", "family", "broken", "says"), WRONG, ids=[f"{w[0].__name__}-{w[1]}" for w in WRONG])
def test_wrong_pruner_is_caught_by_its_law_alone(wrong: type[Plain], family: str, broken: set[str], says: str) -> None:
    families = ["llama", family] if family == "quickstart" else [family]
    try:
        failed = {
            result.check: result.message
            for result in check_pruner(wrong, families=families, checks=tuple(CHECKS))
            if result.outcome == "failed"
        }
    finally:
        while LeavesGlobalHook.handles:
            LeavesGlobalHook.handles.pop().remove()
    assert set(failed) == broken, failed
    assert any(says in message for message in failed.values()), failed


def test_wrong_pruners_are_right_but_for_one_thing() -> None:
    results = check_pruner(Plain, families=["llama", "gpt2", "quickstart"])
    assert {(r.check, r.outcome) for r in results if r.outcome != "passed"} == {(check, "declined") for check in CLAIMS}


@pytest.mark.parametrize("family", FAMILIES)
def test_permuted_channels_leave_the_function_alone(family: str) -> None:
    model, permuted = (tiny_model(family, dtype=torch.float64) for _ in range(2))
    permute_channels(permuted, torch.randperm(40, generator=torch.Generator().manual_seed(1)))
    tokens = random_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(permuted(tokens).logits, model(tokens).logits, rtol=1e-11, atol=1e-12)
    moved = {name for name, p in permuted.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert all("mlp" in name or "fc" in name for name in moved)
    assert len(moved) >= 2 * len(list(model.base_model.modules())[1:2])

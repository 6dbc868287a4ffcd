"""Recovery under fixed masks: retrain the whole model, or reconstruct it block by block (`methods.md` 8.3 and 8.4)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from prunebench.spec import Job, Matrix
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.lowrank import LowRank
from prunebench.toolkit.phases import phase
from prunebench.toolkit.retrain import (
    Loss,
    Part,
    Retraining,
    Scope,
    Trained,
    next_token_loss,
    parts_of,
    shuffled,
    train,
    whole_model,
)
from prunebench.toolkit.walk import Block, Replica, walk


def retrain(job: Job, settings: Retraining, masks: Mapping[str, torch.Tensor] | None = None, stage: int = 0) -> Trained:
    """Train a subset of a whole model on the job's training windows, and merge what was learned under the masks.

    Args:
        job: with training windows.
        settings: what, and for how long.
        masks: keep masks by matrix name, where they are not those of earlier steps.
        stage: tells the random numbers of several trainings in one job apart.

    Raises:
        NonFiniteError: the loss is no number.
    """
    if settings.subset == "head":
        untie_head(job.model)
    scope = whole_model(job, masks)
    generator = torch.Generator().manual_seed(1000 * job.seed + stage)
    parts = parts_of(settings, scope, generator)
    windows = shuffled(job.training, settings.batch, generator, job.device)
    trained = train(settings, scope, parts, windows, next_token_loss(job.model), job)
    if settings.steps:
        merge_and_compare(job, scope, parts)
    return trained


def reconstruct(job: Job, settings: Retraining) -> None:
    """Block by block: train a subset of the block so that its output is the dense block's on the same inputs.

    Inputs are the outputs of the pruned and reconstructed blocks before it; the loss is the mean squared error; batches are
    taken in order, over and over. The block is worked on in float32 and cast back.

    Raises:
        NonFiniteError: the loss is no number.
    """
    generator = torch.Generator().manual_seed(1000 * job.seed)
    before, after = [], []
    for block in walk(job):
        replica, dense = block.replica(), block.replica(of=job.dense.block(block.handle))
        scope = Scope(replica.module, {matrix: replica.inner(matrix) for matrix in block.matrices}, job.masks)
        parts = parts_of(settings, scope, generator)
        samples = _in_order(len(job.calibration), settings.batch)
        trained = train(settings, scope, parts, samples, _block_loss(block, replica, dense), job)
        if trained.losses:
            before.append(trained.losses[0])
            after.append(trained.losses[-1])
            _merge(scope, parts)
            _store(block, replica, scope)
    if before:
        job.note("block_loss_of_the_first_batch", [float(f"{value:.4g}") for value in before])
        job.note("block_loss_of_the_last_batch", [float(f"{value:.4g}") for value in after])


def report(job: Job, settings: Retraining, *trainings: Trained) -> None:
    """Note what trainings on the job's windows were: their share of the parameters, their tokens, their losses."""
    seen = settings.steps * settings.batch * len(trainings)
    job.note("trained_parameters", trainings[0].parameters)
    job.note("trained_share", trainings[0].parameters / sum(parameter.numel() for parameter in job.model.parameters()))
    job.note("tokens_seen", seen * job.training.shape[1])
    job.note("epochs", seen / len(job.training))
    job.note("loss_curve", [point for training in trainings for point in training.curve()])


def merge_and_compare(job: Job, scope: Scope, parts: Sequence[Part]) -> None:
    """Merge low-rank parts, and note how far any logit of one training window moves by it, as a share of their range."""
    if not any(isinstance(part, LowRank) for part in parts):
        return
    probe = job.training[:1].to(job.device)
    with phase("update"), torch.no_grad():
        before = _logits(job.model, probe, parts)
        survived = _merge(scope, parts)
        after = _logits(job.model, probe, ())
    job.note("merge_logit_change", float((after - before).abs().max() / (before.max() - before.min())))
    job.note("changes_that_survive_the_cast", survived)


def _merge(scope: Scope, parts: Sequence[Part]) -> float:
    """Write what low-rank parts learned into the weights; returns the share of changed entries that still differ there."""
    matrices = {id(module): matrix for matrix, module in scope.modules.items()}
    changed = survived = 0
    for part in parts:
        if isinstance(part, LowRank):
            weight = part.module.weight
            assert isinstance(weight, torch.Tensor)
            merged = part.merged_weight()
            matrix = matrices.get(id(part.module))
            stored = weight.detach() if matrix is None else matrix.oriented(weight.detach())
            rounded = merged.to(stored.dtype)
            changed += int((merged != stored.to(merged.dtype)).sum())
            survived += int((rounded != stored).sum())
            if matrix is not None and matrix.module is part.module:
                matrix.write(merged, scope.mask(matrix))
            else:
                stored.copy_(rounded)
    return survived / changed if changed else 1.0


def _logits(model: nn.Module, tokens: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    contexts = [part.installed() for part in parts]
    for context in contexts:
        context.__enter__()
    try:
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return found.float()
    finally:
        for context in contexts:
            context.__exit__(None, None, None)


def _in_order(samples: int, size: int) -> Iterator[torch.Tensor]:
    """Numbers of samples, `size` at a time, over and over."""
    endless = itertools.cycle(range(samples))
    while True:
        yield torch.tensor(list(itertools.islice(endless, size)))


def _block_loss(block: Block, replica: Replica, dense: Replica) -> Loss:
    def loss(piece: torch.Tensor) -> torch.Tensor:
        hidden = block.inputs(piece.tolist())
        with torch.no_grad():
            wanted = dense.forward(hidden.clone())
        return nn.functional.mse_loss(replica.forward(hidden), wanted)

    return loss


def _store(block: Block, replica: Replica, scope: Scope) -> None:
    """Bring a trained replica's numbers into the block; what was not trained comes back as it was, bit for bit."""
    with phase("update"), torch.no_grad():
        written: list[Matrix] = block.matrices
        mine = {id(matrix.module.weight) for matrix in written}
        for (_, own), (_, copied) in zip(block.module.named_parameters(), replica.module.named_parameters(), strict=True):
            if id(own) not in mine:
                own.copy_(copied)
        for matrix in written:
            matrix.write(replica.weight(matrix), scope.mask(matrix))

"""Recovery under fixed masks: retrain the whole model, or reconstruct it block by block (`methods.md` 8.3 and 8.4)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

import torch
from torch import nn

from prunebench.effort import TO_INPUTS, TO_WEIGHTS, Effort, EffortFacts, training_effort, walking_effort
from prunebench.spec import Job
from prunebench.toolkit.casts import Cast
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.lowrank import LowRank
from prunebench.toolkit.memory import is_out_of_memory, let_go
from prunebench.toolkit.phases import phase
from prunebench.toolkit.recomputing import recomputed
from prunebench.toolkit.retrain import (
    LORA_KINDS,
    Loss,
    OwnParameters,
    Part,
    Retraining,
    Scope,
    Trained,
    parts_of,
    train,
    whole_model,
)
from prunebench.toolkit.scores import at_least_float32
from prunebench.toolkit.walk import Block, Replica, walk

_T = TypeVar("_T")


def retrain(job: Job, settings: Retraining, masks: Mapping[str, torch.Tensor] | None = None, stage: int = 0) -> Trained:
    """Train a subset of a whole model on the job's training windows, and merge what was learned under the masks.

    Args:
        job: with training windows.
        settings: what, and for how long.
        masks: keep masks by matrix name, where they are not those of earlier steps.
        stage: tells the random numbers of several trainings in one job apart.

    Raises:
        RunError: the model has nothing of the subset.
        NonFiniteError: the loss is no number.
    """
    if settings.subset == "head" and settings.steps:
        untie_head(job.model)
    scope = whole_model(job, masks)

    def attempt(blocks: Sequence[nn.Module]) -> tuple[Trained, list[Part]]:
        for_factors, for_order = generators(job.seed, stage)
        parts = parts_of(settings, scope, for_factors)
        windows = shuffled(job.training, settings.batch, for_order, job.device)
        with recomputed(blocks):
            return train(settings, scope, parts, windows, next_token_loss(job.model), job), parts

    trained, parts = _in_less_memory(job, settings, attempt)
    if settings.steps:
        merge_and_compare(job, scope, parts)
    return trained


def _in_less_memory(job: Job, settings: Retraining, attempt: Callable[[Sequence[nn.Module]], _T]) -> _T:
    """Train, and where one sequence does not fit begin again with blocks that are run again on the way back.

    Only what leaves the model alone until it is merged can begin again.
    """
    try:
        return attempt([])
    except (MemoryError, RuntimeError) as error:
        if settings.subset not in LORA_KINDS or not is_out_of_memory(error):
            raise
    # Here the error is gone, and with it the frames whose tensors it held.
    let_go()
    job.note("blocks run again on the way back", "out of memory")
    return attempt([block.module for block in job.anatomy.blocks])


def reconstruct(job: Job, settings: Retraining) -> None:
    """Block by block: train a subset of the block so that its output is the dense block's on the same inputs.

    Inputs are the outputs of the pruned and reconstructed blocks before it; the loss is the mean squared error; batches are
    taken in order, over and over. The block is worked on in float32 and cast back.

    Raises:
        RunError: a block has nothing of the subset.
        NonFiniteError: the loss is no number.
    """
    for_factors, _ = generators(job.seed)
    parameters: list[int] = []
    losses: list[tuple[float, ...]] = []
    cast = Cast()
    for block in walk(job, carries=[for_factors, parameters, losses, cast]):
        replica, dense = block.replica(), block.replica(of=job.dense.block(block.handle))
        scope = Scope(replica.module, {matrix: replica.inner(matrix) for matrix in block.matrices}, job.masks)
        parts = parts_of(settings, scope, for_factors)
        samples = _in_order(len(job.calibration), settings.batch)
        trained = train(settings, scope, parts, samples, _block_loss(block, replica, dense), job)
        parameters.append(trained.parameters)
        losses.append(trained.losses)
        if settings.steps:
            _merge(scope, parts, Cast())
            _store(block, replica, scope, cast)
    _note_size(job, sum(parameters), settings.steps * settings.batch, job.calibration)
    if settings.steps:
        job.note("block_loss_of_the_first_batch", [float(f"{found[0]:.4g}") for found in losses])
        job.note("block_loss_of_the_last_batch", [float(f"{found[-1]:.4g}") for found in losses])
        job.note("changes_that_survive_the_cast", cast.share)


def retraining_effort(settings: Retraining, facts: EffortFacts, trainings: int = 1) -> Effort:
    """What `retrain` computes, so many times: AdamW looks at a weight eight times a step, a merged one is made anew a piece."""
    sequences = trainings * settings.steps * settings.batch
    pieces = sequences / min(facts.batch_size, settings.batch)
    dtype = "bfloat16" if settings.precision == "bfloat16" else None
    if settings.subset in LORA_KINDS:  # the merged weight, its gradient, and both times the mask
        return training_effort(facts, sequences, copies=2.0, looks=8 * pieces, dtype=dtype)
    if settings.subset == "all":
        return training_effort(facts, sequences, looks=8 * trainings * settings.steps + 4 * pieces, dtype=dtype)
    return training_effort(facts, sequences, TO_INPUTS, copies=0.0, dtype=dtype)


def reconstruction_effort(settings: Retraining, facts: EffortFacts) -> list[Effort]:
    """What `reconstruct` computes: in each block every step, and the dense block's outputs in float32."""
    tokens, batch = settings.steps * settings.batch * facts.length, facts.batch_size * facts.length
    passes = TO_WEIGHTS if settings.subset in LORA_KINDS or settings.subset == "all" else TO_INPUTS
    trained = Effort(
        phase="training",
        blocks=passes * tokens,
        length=facts.length,
        at_once=batch,
        looks=8 * settings.steps,
        dtype="bfloat16" if settings.precision == "bfloat16" else "float32",
        held=facts.tokens,
        graph=batch,
        copies=6 / facts.layers,
    )
    dense = Effort(phase="training", blocks=tokens, length=facts.length, at_once=batch, dtype="float32")
    return [*walking_effort(facts, collected=False), trained, dense]


def next_token_loss(model: nn.Module) -> Loss:
    """The mean cross-entropy of the next token, in float32 whatever the model's dtype."""

    def loss(piece: torch.Tensor) -> torch.Tensor:
        logits = at_least_float32(model(input_ids=piece, use_cache=False).logits[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())

    return loss


def generators(seed: int, stage: int = 0) -> tuple[torch.Generator, torch.Generator]:
    """For the factors and for the order of the windows: two, so that every subset sees the same text in the same order."""
    first = 1000 * seed + stage
    return torch.Generator().manual_seed(first), torch.Generator().manual_seed(first + 500)


def shuffled(windows: torch.Tensor, size: int, generator: torch.Generator, device: torch.device) -> Iterator[torch.Tensor]:
    """Batches of `size` windows for ever: a new order each time all have been seen."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        yield windows[order[:size]].to(device)
        order = order[size:]


def report(job: Job, settings: Retraining, *trainings: Trained) -> None:
    """Note what trainings on the job's windows were: their share of the parameters, their tokens, their losses."""
    _note_size(job, trainings[0].parameters, settings.steps * settings.batch * len(trainings), job.training)
    job.note("loss_curve", [point for training in trainings for point in training.curve()])
    if trainings[-1].pace is not None:
        job.note("seconds a training step", trainings[-1].pace)


def _note_size(job: Job, parameters: int, seen: int, windows: torch.Tensor) -> None:
    job.note("trained_parameters", parameters)
    job.note("trained_share", parameters / sum(parameter.numel() for parameter in job.model.parameters()))
    job.note("tokens_seen", seen * windows.shape[1])
    job.note("epochs", seen / len(windows))


def merge_and_compare(job: Job, scope: Scope, parts: Sequence[Part]) -> None:
    """Merge low-rank parts, and note how far any logit of one training window moves by it, as a share of their range.

    Noted for all parts: the share of the changed numbers that differ in the model's dtype too. Training computes with weights
    of that dtype already, so in 16 bits too the merge moves no logit.
    """
    cast = Cast()
    with phase("update"), torch.no_grad():
        for part in parts:
            if isinstance(part, OwnParameters):
                part.compare(cast)
        if any(isinstance(part, LowRank) for part in parts):
            probe = job.training[:1].to(job.device)
            before = _logits(job.model, probe, parts)
            _merge(scope, parts, cast)
            after = _logits(job.model, probe, ())
            job.note("merge_logit_change", float((after - before).abs().max() / (before.max() - before.min())))
    job.note("changes_that_survive_the_cast", cast.share)


def _merge(scope: Scope, parts: Sequence[Part], cast: Cast) -> None:
    """Write what low-rank parts learned into the weights."""
    matrices = {id(module): matrix for matrix, module in scope.modules.items()}
    for part in parts:
        if isinstance(part, LowRank):
            weight = part.module.weight
            assert isinstance(weight, torch.Tensor)
            merged = part.merged_weight()
            matrix = matrices.get(id(part.module))
            stored = weight.detach() if matrix is None else matrix.oriented(weight.detach())
            cast.count(merged, stored)
            if matrix is not None and matrix.module is part.module:
                matrix.write(merged, scope.mask(matrix))
            else:
                stored.copy_(merged)


def _logits(model: nn.Module, tokens: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.installed())
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return found.float()


def _in_order(samples: int, size: int) -> Iterator[torch.Tensor]:
    """Numbers of samples, `size` at a time, over and over."""
    endless = itertools.cycle(range(samples))
    while True:
        yield torch.tensor(list(itertools.islice(endless, size)))


def _block_loss(block: Block, replica: Replica, dense: Replica) -> Loss:
    def loss(piece: torch.Tensor) -> torch.Tensor:
        hidden = block.inputs(piece.tolist())
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            wanted = dense.forward(hidden.clone())
        return nn.functional.mse_loss(replica.forward(hidden), wanted)

    return loss


def _store(block: Block, replica: Replica, scope: Scope, cast: Cast) -> None:
    """Bring a trained replica's numbers into the block; what was not trained comes back as it was, bit for bit."""
    with phase("update"), torch.no_grad():
        matrices = {id(matrix.module.weight) for matrix in block.matrices}
        for own, copied in zip(block.module.parameters(), replica.module.parameters(), strict=True):
            cast.count(copied, own)
            if id(own) not in matrices:
                own.copy_(copied)
        for matrix in block.matrices:
            matrix.write(replica.weight(matrix), scope.mask(matrix))

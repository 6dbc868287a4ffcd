"""Wanda, SparseGPT, GBLM and Wanda++ in the plainest form that is right: what the library's speed is measured against.

Written from the definitions (`methods.md` 4 to 7) and the loop that the reference codes share (1.3), and kept for ever as it
is, so that ratios of different days can be compared: one sample at a time, a statistic of its own for every matrix, whole rows
and whole slabs sorted, one column at a time, autograd's own gradients. LLaMA blocks in float32 only; nothing of the library is
used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Target = float | tuple[int, int]
"""The share of zeros, or how many survive of how many consecutive columns."""

DAMPING = 0.01
BLOCK_SIZE = 128
ALPHA = 100.0
ROUNDS, ROUND_SAMPLES, LEARNING_RATE = 5, 32, 3e-7
"""Of Wanda++, as published."""


def wanda(model: nn.Module, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place; the keep masks [outputs, inputs] by module name."""

    def prune(weight: torch.Tensor, statistic: MeanSquares) -> torch.Tensor:
        return prune_by(weight, weight.abs() * statistic.value.sqrt(), target)

    return block_by_block(model, tokens, MeanSquares, prune)


def sparsegpt(model: nn.Module, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place and correct what is kept; the keep masks [outputs, inputs] by module name."""

    def prune(weight: torch.Tensor, statistic: MeanGram) -> torch.Tensor:
        updated, keep = sweep(weight, factor(statistic.value), target)
        weight.copy_(updated)
        return keep

    return block_by_block(model, tokens, MeanGram, prune)


def gblm(model: Any, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place by Wanda's score and the magnitudes of every sample's gradients added up; the keep masks.

    As the authors' code: a backward pass of the whole model a sample, all its gradients kept until the next, and then Wanda's
    loop with another score. Their accumulators are float16, these float32.
    """
    weights = [linear.weight for block in model.model.layers for linear in linears_of(block).values()]
    totals = {weight: torch.zeros_like(weight) for weight in weights}
    for sample in tokens:
        model.zero_grad()
        model(input_ids=sample[None], labels=sample[None], use_cache=False).loss.backward()
        for weight in weights:
            totals[weight] += weight.grad.abs()
    model.zero_grad()
    of_data = {weight.data_ptr(): total for weight, total in totals.items()}

    def prune(weight: torch.Tensor, statistic: MeanSquares) -> torch.Tensor:
        scores = weight.abs() * (statistic.value.sqrt() + ALPHA * of_data[weight.data_ptr()])
        return prune_by(weight, scores, target)

    return block_by_block(model, tokens, MeanSquares, prune)


def wanda_plus_plus(
    model: Any, tokens: torch.Tensor, target: Target, drawn_samples: int = ROUND_SAMPLES, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place by regional gradients, training each block towards its dense outputs; the keep masks.

    The dense block's outputs are made anew for every sample of every round, as the public unofficial code does.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        hidden = [model.model.embed_tokens(sample[None]) for sample in tokens]
        rotations = model.model.rotary_emb(hidden[0], torch.arange(tokens.shape[1])[None])
    masks = {}
    for index, block in enumerate(model.model.layers):
        linears = linears_of(block)
        gradients = regional_gradients(block, linears, hidden, rotations)
        teacher = copy.deepcopy(block)
        optimizer = torch.optim.RMSprop([linear.weight for linear in linears.values()], lr=LEARNING_RATE)
        for _ in range(ROUNDS):
            drawn = [hidden[i] for i in torch.randperm(len(hidden), generator=generator)[:drawn_samples].tolist()]
            prune_regionally(block, linears, gradients, drawn, rotations, target)
            for sample in drawn:
                with torch.no_grad():
                    wanted = teacher(sample, position_embeddings=rotations)
                block.zero_grad()
                (block(sample, position_embeddings=rotations) - wanted).square().sum().backward()
                optimizer.step()
        block.zero_grad()
        for name, keep in prune_regionally(block, linears, gradients, hidden, rotations, target).items():
            masks[f"model.layers.{index}.{name}"] = keep
        with torch.no_grad():
            hidden = [block(sample, position_embeddings=rotations) for sample in hidden]
    return masks


def regional_gradients(
    block: nn.Module, linears: dict[str, nn.Linear], hidden: list[torch.Tensor], rotations: Any
) -> dict[str, torch.Tensor]:
    """The root mean square over samples of the gradients of each one's output norm, [outputs, inputs] by name."""
    squares = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
    for sample in hidden:
        block.zero_grad()
        block(sample, position_embeddings=rotations).norm().backward()
        for name, linear in linears.items():
            assert linear.weight.grad is not None
            squares[name] += linear.weight.grad**2
    block.zero_grad()
    return {name: (total / len(hidden)).sqrt() for name, total in squares.items()}


@torch.no_grad()
def prune_regionally(
    block: nn.Module,
    linears: dict[str, nn.Linear],
    gradients: dict[str, torch.Tensor],
    samples: list[torch.Tensor],
    rotations: Any,
    target: Target,
) -> dict[str, torch.Tensor]:
    """Score a block as it is on some samples, and zero what falls; norms are over all their tokens. The keep masks by name."""
    statistics = statistics_of(block, linears, MeanSquares, samples, rotations)
    masks = {}
    for name, linear in linears.items():
        norms = (statistics[name].value * len(samples)).sqrt()
        scores = linear.weight.abs() * (norms + ALPHA * gradients[name])
        masks[name] = prune_by(linear.weight.data, scores, target)
    return masks


class MeanSquares:
    """The mean over sequences of the sums of squares, [inputs]."""

    def __init__(self, width: int) -> None:
        self.value = torch.zeros(width)
        self.sequences = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in one sequence [length, inputs]."""
        self.value *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.value += inputs.norm(p=2, dim=0) ** 2 / self.sequences


class MeanGram:
    """`2/N * sum X'X` over N sequences, [inputs, inputs]."""

    def __init__(self, width: int) -> None:
        self.value = torch.zeros(width, width)
        self.sequences = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Take in one sequence [length, inputs]."""
        self.value *= self.sequences / (self.sequences + 1)
        self.sequences += 1
        self.value += 2 / self.sequences * (inputs.t() @ inputs)


@torch.no_grad()
def block_by_block(model: Any, tokens: torch.Tensor, statistic: type[Any], prune: Callable[..., torch.Tensor]) -> Any:
    """Visit the blocks in order: statistics of the dense block, prune, then its outputs are what the next block reads."""
    decoder = model.model
    hidden = [decoder.embed_tokens(sample[None]) for sample in tokens]
    rotations = decoder.rotary_emb(hidden[0], torch.arange(tokens.shape[1])[None])
    masks = {}
    for index, block in enumerate(decoder.layers):
        linears = linears_of(block)
        statistics = statistics_of(block, linears, statistic, hidden, rotations)
        for name, linear in linears.items():
            masks[f"model.layers.{index}.{name}"] = prune(linear.weight.data, statistics[name])
        hidden = [block(sample, position_embeddings=rotations) for sample in hidden]
    return masks


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def statistics_of(
    block: nn.Module, linears: dict[str, nn.Linear], statistic: type[Any], samples: list[torch.Tensor], rotations: Any
) -> dict[str, Any]:
    """One statistic for each linear, of what it reads while the samples pass through the block."""
    statistics = {name: statistic(linear.in_features) for name, linear in linears.items()}
    handles = [linear.register_forward_hook(adding_to(statistics[name])) for name, linear in linears.items()]
    for sample in samples:
        block(sample, position_embeddings=rotations)
    for handle in handles:
        handle.remove()
    return statistics


def adding_to(statistic: Any) -> Callable[..., None]:
    """A hook that gives the statistic what its linear reads, a sequence at a time."""
    return lambda _module, args, _output: statistic.add(args[0][0])


def prune_by(weight: torch.Tensor, scores: torch.Tensor, target: Target) -> torch.Tensor:
    """Zero the entries of lowest score; the keep mask [outputs, inputs]."""
    keep = kept_of_groups(scores, target) if isinstance(target, tuple) else kept_of_rows(scores, target)
    weight[~keep] = 0
    return keep


def kept_of_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """All but the `int(columns * sparsity)` lowest scores of each row; of equal ones the lower column goes first."""
    order = scores.sort(dim=1, stable=True).indices
    removed = order[:, : int(scores.shape[1] * sparsity)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, removed, False)


def kept_of_groups(scores: torch.Tensor, pattern: tuple[int, int]) -> torch.Tensor:
    """The highest scores of each group of consecutive columns."""
    survivors, of = pattern
    keep = torch.ones_like(scores, dtype=torch.bool)
    for start in range(0, scores.shape[1], of):
        lowest = scores[:, start : start + of].topk(of - survivors, dim=1, largest=False).indices
        keep.scatter_(1, start + lowest, False)
    return keep


def factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with `U'U` the inverse of the damped Gram matrix."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def sweep(weight: torch.Tensor, upper: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove column after column, each time correcting the columns behind it.

    Args:
        weight: [outputs, inputs]; not changed.
        upper: of `factor`.
        target: chosen over all rows of a slab of columns, or every M columns in each row.

    Returns:
        The new weight and the keep mask, [outputs, inputs].
    """
    weight, columns = weight.clone(), weight.shape[1]
    keep = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, columns)
        slab, errors = weight[:, start:end].clone(), torch.zeros(len(weight), end - start)
        inner, kept = upper[start:end, start:end], keep[:, start:end]
        if isinstance(target, float):
            scores = slab**2 / inner.diagonal() ** 2
            removed = int(scores.numel() * target)
            if removed:
                kept &= scores > scores.flatten().sort().values[removed - 1]
        for j in range(end - start):
            if isinstance(target, tuple) and j % target[1] == 0:
                group = slice(j, j + target[1])
                kept[:, group] = kept_of_groups(slab[:, group] ** 2 / inner.diagonal()[group] ** 2, target)
            column = slab[:, j].clone()
            slab[:, j] = column * kept[:, j]
            errors[:, j] = (column - slab[:, j]) / inner[j, j]
            slab[:, j + 1 :] -= errors[:, j : j + 1] @ inner[j : j + 1, j + 1 :]
        weight[:, start:end] = slab
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight, keep

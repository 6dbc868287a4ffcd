"""Wanda and SparseGPT in the plainest form that is right: what the library's speed is measured against.

Written from the definitions (`methods.md` 4 and 5) and the loop that the reference codes share (1.3), and kept for ever as it
is, so that ratios of different days can be compared: one sample at a time, a statistic of its own for every matrix, whole rows
and whole slabs sorted, one column at a time. LLaMA blocks in float32 only; nothing of the library is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Target = float | tuple[int, int]
"""The share of zeros, or how many survive of how many consecutive columns."""

DAMPING = 0.01
BLOCK_SIZE = 128


def wanda(model: nn.Module, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place; the keep masks [outputs, inputs] by module name."""

    def prune(weight: torch.Tensor, statistic: MeanSquares) -> torch.Tensor:
        scores = weight.abs() * statistic.value.sqrt()
        keep = kept_of_groups(scores, target) if isinstance(target, tuple) else kept_of_rows(scores, target)
        weight[~keep] = 0
        return keep

    return block_by_block(model, tokens, MeanSquares, prune)


def sparsegpt(model: nn.Module, tokens: torch.Tensor, target: Target) -> dict[str, torch.Tensor]:
    """Prune a LLaMA in place and correct what is kept; the keep masks [outputs, inputs] by module name."""

    def prune(weight: torch.Tensor, statistic: MeanGram) -> torch.Tensor:
        updated, keep = sweep(weight, factor(statistic.value), target)
        weight.copy_(updated)
        return keep

    return block_by_block(model, tokens, MeanGram, prune)


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
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        statistics = {name: statistic(linear.in_features) for name, linear in linears.items()}
        handles = [linear.register_forward_hook(adding_to(statistics[name])) for name, linear in linears.items()]
        for sample in hidden:
            block(sample, position_embeddings=rotations)
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            masks[f"model.layers.{index}.{name}"] = prune(linear.weight.data, statistics[name])
        hidden = [block(sample, position_embeddings=rotations) for sample in hidden]
    return masks


def adding_to(statistic: Any) -> Callable[..., None]:
    """A hook that gives the statistic what its linear reads, a sequence at a time."""
    return lambda _module, args, _output: statistic.add(args[0][0])


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

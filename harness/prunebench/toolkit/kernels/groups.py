"""N:M keep masks: groups of M consecutive columns, each entry ranked by counting who is smaller, scores read once."""

import torch
import triton
import triton.language as tl

from prunebench.targets import NM
from prunebench.toolkit.kernels import comparing, scoring
from prunebench.toolkit.kernels.scoring import load_scores

_TILE = 4096
"""Entries a program."""


@triton.jit
def _keep_groups(
    scores, norms, gradients, keep, nans, alpha, groups, per_row,
    row_step, column_step, gradient_row_step, gradient_column_step, keep_row_step, keep_column_step,
    KEEP: tl.constexpr, OF: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, OF)[None, :]
    row = (group // per_row)[:, None]
    column = ((group % per_row) * OF)[:, None] + within
    inside = (group < groups)[:, None] & (within < OF)
    offsets, gradient_offsets = row * row_step + column * column_step, row * gradient_row_step + column * gradient_column_step
    values = load_scores(scores, norms, gradients, alpha, offsets, gradient_offsets, column, inside, KIND)
    found = tl.sum(tl.sum((values != values).to(tl.int32), axis=1), axis=0)
    if found > 0:
        tl.atomic_add(nans, found)
    rank = (within + group[:, None]) * 0
    for other in tl.static_range(OF):
        theirs = tl.sum(tl.where(within == other, values, 0.0), axis=1)[:, None]
        later, earlier = (within < other) & (theirs < values), (within > other) & ~(values < theirs)
        rank += (later | earlier).to(tl.int32)
    tl.store(keep + row * keep_row_step + column * keep_column_step, (rank >= OF - KEEP).to(tl.int8), mask=inside)


def keep(
    scores: torch.Tensor,
    target: NM,
    norms: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
    alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The keep mask [outputs, inputs] of an N:M target, and on the device how many scores are NaN; nothing is waited for.

    Args:
        scores: [outputs, inputs], float32; with `norms` the weights instead, in bfloat16, float16 or float32.
        target: M a power of two, at most 32; None is returned for others.
        norms: of the input features, [inputs], float32: the scores are `|W| (norm + alpha G)`.
        gradients: [outputs, inputs], float32.
        alpha: how much they count.
    """
    rows, columns = scores.shape
    if columns % target.of or target.of > 32 or target.of & (target.of - 1) or not scoring.taken(scores, norms, gradients):
        return None
    mask = torch.empty_like(scores, dtype=torch.bool)
    nans = torch.zeros((), dtype=torch.int32, device=scores.device)
    per_row, tile = columns // target.of, max(1, _TILE // target.of)
    gradient_steps = (0, 0) if gradients is None else gradients.stride()
    kind = scoring.GIVEN if norms is None else scoring.NORMS if gradients is None else scoring.GRADIENTS
    _keep_groups[(triton.cdiv(rows * per_row, tile),)](
        scores, scores if norms is None else norms, scores if gradients is None else gradients,
        mask.view(torch.int8), nans, float(alpha), rows * per_row, per_row,
        *scores.stride(), *gradient_steps, *mask.stride(),
        KEEP=target.keep, OF=target.of, KIND=kind, GROUPS=tile, num_warps=8, **scoring.PRECISE,
    )  # fmt: skip
    return mask, nans


def check(device: torch.device) -> None:
    """Compare with the PyTorch version."""
    from prunebench.toolkit.masks import keep_nm
    from prunebench.toolkit.scores import gradient_scores, wanda_scores

    for target in (NM(2, 4), NM(4, 8)):
        for scores in comparing.samples(device, 48):
            comparing.compare(str(target), comparing.made(keep(scores, target)), keep_nm(scores, target))
    target = NM(2, 4)
    for weight, norms, gradients in comparing.weights(device, 48):
        wanted = keep_nm(wanda_scores(weight, norms), target)
        comparing.compare("by norms", comparing.made(keep(weight, target, norms)), wanted)
        wanted = keep_nm(gradient_scores(weight, norms, gradients, 3.7), target)
        comparing.compare("by gradients", comparing.made(keep(weight, target, norms, gradients, 3.7)), wanted)

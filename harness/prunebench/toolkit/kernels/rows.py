"""Keep masks by rows without a sort: the k-th smallest score of a row by the bits of its integer key, then ties by column.

A row lies in registers while 32 comparisons of all its entries decide the bits of the threshold from the top; where more
entries are equal to it than may go, as many as a column number has bits decide up to which column they go.
"""

import torch
import triton
import triton.language as tl

from prunebench.targets import Unstructured
from prunebench.toolkit.kernels import comparing, scoring
from prunebench.toolkit.kernels.scoring import load_scores, ordered

WIDEST = 32768
"""Columns that the registers of one program hold."""

_TILE = 4096
"""Entries a program at least."""


@triton.jit(do_not_specialize=["removed"])
def _keep_rows(
    scores, norms, gradients, keep, nans, alpha, rows, columns, removed,
    row_step, column_step, gradient_row_step, gradient_column_step, keep_row_step, keep_column_step,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BITS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    offsets, gradient_offsets = row * row_step + column * column_step, row * gradient_row_step + column * gradient_column_step
    values = load_scores(scores, norms, gradients, alpha, offsets, gradient_offsets, column, inside, KIND)
    found = tl.sum(tl.sum((values != values).to(tl.int32), axis=1), axis=0)
    if found > 0:
        tl.atomic_add(nans, found)
    keys = tl.where(inside, ordered(values), 0x7FFFFFFF)  # what is outside is below nothing
    threshold = tl.where(tl.sum((keys < 0).to(tl.int32), axis=1) < removed, 0, -2147483648)
    for bit in range(0, 31):
        candidate = threshold + (0x40000000 >> bit)
        below = tl.sum((keys < candidate[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(below < removed, candidate, threshold)
    equal = keys == threshold[:, None]
    room = removed - tl.sum((keys < threshold[:, None]).to(tl.int32), axis=1)
    last = room * 0 + COLUMNS  # the column of the last of the equal entries that go
    if tl.max(tl.sum(equal.to(tl.int32), axis=1) - room, axis=0) > 0:
        last = room * 0
        for bit in range(0, COLUMN_BITS):
            candidate = last + ((COLUMNS // 2) >> bit)
            before = tl.sum((equal & (column < candidate[:, None])).to(tl.int32), axis=1)
            last = tl.where(before < room, candidate, last)
    stays = (keys > threshold[:, None]) | (equal & (column > last[:, None]))
    tl.store(keep + row * keep_row_step + column * keep_column_step, stays.to(tl.int8), mask=inside)


def keep(
    scores: torch.Tensor,
    target: Unstructured,
    norms: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
    alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The keep mask [outputs, inputs] with each row compared in itself, and on the device how many scores are NaN.

    Arguments are those of `groups.keep`. None where rows are wider than `WIDEST`, or nothing is to go.
    """
    rows, columns = scores.shape
    removed = target.removed(columns)
    if not scoring.taken(scores, norms, gradients) or not removed or columns > WIDEST:
        return None
    mask = torch.empty_like(scores, dtype=torch.bool)
    nans = torch.zeros((), dtype=torch.int32, device=scores.device)
    width = scoring.power_of_two(columns)
    height = max(1, min(_TILE // width, scoring.power_of_two(rows)))
    gradient_steps = (0, 0) if gradients is None else gradients.stride()
    kind = scoring.GIVEN if norms is None else scoring.NORMS if gradients is None else scoring.GRADIENTS
    _keep_rows[(triton.cdiv(rows, height),)](
        scores, scores if norms is None else norms, scores if gradients is None else gradients,
        mask.view(torch.int8), nans, float(alpha), rows, columns, removed,
        *scores.stride(), *gradient_steps, *mask.stride(),
        KIND=kind, ROWS=height, COLUMNS=width, COLUMN_BITS=width.bit_length() - 1,
        num_warps=scoring.warps(width * height), **scoring.PRECISE,
    )  # fmt: skip
    return mask, nans


def check(device: torch.device) -> None:
    """Compare with the PyTorch version."""
    from prunebench.toolkit.masks import keep_rows as by_torch
    from prunebench.toolkit.scores import gradient_scores, wanda_scores

    for share, columns in ((0.05, 40), (0.95, 300)):
        target = Unstructured(share)
        for scores in comparing.samples(device, columns):
            comparing.compare(f"rows of {columns}", comparing.made(keep(scores, target)), by_torch(scores, target))
    target = Unstructured(0.5)
    for weight, norms, gradients in comparing.weights(device, 300):
        wanted = by_torch(wanda_scores(weight, norms), target)
        comparing.compare("by norms", comparing.made(keep(weight, target, norms)), wanted)
        wanted = by_torch(gradient_scores(weight, norms, gradients, 3.7), target)
        comparing.compare("by gradients", comparing.made(keep(weight, target, norms, gradients, 3.7)), wanted)

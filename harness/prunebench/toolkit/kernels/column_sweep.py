"""SparseGPT's sweep over a slab of columns: a program takes some rows of W, whose slab stays in registers from end to end.

Column by column: the error of what goes, and at once its share in all later columns of the slab (`least_squares.py` sweeps by
leaves and halves, with the same sums in another order). Under a mask made before, or in groups of M columns, whose entries are
chosen by their present weights when the sweep reaches them. All in float32.
"""

import torch
import triton
import triton.language as tl

from prunebench.toolkit.kernels import fits, scoring
from prunebench.toolkit.kernels.comparing import compare_sweeps

WIDEST = 256
"""Columns of a slab."""

_TILE = 2048
"""Entries of W a program: 16 a thread, so that several programs share a processor and one waits while another works."""


@triton.jit
def _sweep(
    work, keep, removed, upper, inverses, errors, outputs, columns, upper_step, removed_row_step, removed_column_step,
    KEEP: tl.constexpr, OF: tl.constexpr, REMOVED: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[:, None]
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    inside = (column < columns) & (output < outputs)
    where = column * outputs + output  # [columns, outputs]: a column of W is contiguous
    weight = tl.load(work + where, mask=inside, other=0.0)
    inverse = tl.load(inverses + column, mask=column < columns, other=0.0)  # a quotient would not be rounded as PyTorch's
    if OF == 0:  # noqa: SIM108 - types of both are seen in an expression
        stays = tl.load(keep + where, mask=inside, other=1).to(tl.int32)
    else:
        stays = tl.full([COLUMNS, OUTPUTS], 1, tl.int32)
    scale = tl.where(stays > 0, 0.0, inverse)
    for group in range(0, columns, 1 if OF == 0 else OF):
        if OF > 0:
            scores = weight * inverse
            scores = scores * scores
            if REMOVED:
                gone = tl.load(removed + output * removed_row_step + column * removed_column_step, mask=inside, other=0) != 0
                scores = tl.where(gone, -1.0, scores)
            rank = stays * 0
            for member in range(0, OF):
                at = group + member
                theirs = tl.sum(tl.where(column == at, scores, 0.0), axis=0)[None, :]
                later, earlier = (column < at) & (theirs < scores), (column > at) & ~(scores < theirs)
                rank += (later | earlier).to(tl.int32)
            chosen = (rank >= OF - KEEP).to(tl.int32)
            if REMOVED:
                chosen = tl.where(gone, 0, chosen)
            stays = tl.where((column >= group) & (column < group + OF), chosen, stays)
            scale = tl.where(stays > 0, 0.0, inverse)
        for member in range(0, 1 if OF == 0 else OF):
            at = group + member
            error = tl.sum(tl.where(column == at, weight * scale, 0.0), axis=0)[None, :]
            tl.store(errors + at * outputs + output, error, mask=output < outputs)
            share = tl.load(upper + at * upper_step + column, mask=(column > at) & (column < columns), other=0.0)
            weight -= share * error
    tl.store(work + where, weight * stays.to(tl.float32), mask=inside)  # a NaN stays one
    if OF > 0:
        tl.store(keep + where, stays.to(tl.int8), mask=inside)


def sweep_slab(
    work: torch.Tensor,
    keep: torch.Tensor,
    upper: torch.Tensor,
    inverse: torch.Tensor,
    keeps: int = 0,
    of: int = 0,
    removed: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Sweep a slab in place, and return the errors `(w - q)/U_jj`, [columns, outputs].

    Args:
        work: the slab's present weights, [columns, outputs], float32, contiguous.
        keep: its mask, [columns, outputs], contiguous; written where `of` is given, read where not.
        upper: its square of the factor, [columns, columns].
        inverse: 1/U_jj, [columns, 1].
        keeps: how many of `of` stay in each group.
        of: M of an N:M target, which divides the columns; 0 where the mask is given.
        removed: for N:M, what goes first and stays away, [outputs, columns].

    None is returned, and nothing written, where a slab is too wide for the registers.
    """
    columns, outputs = work.shape
    fitting = columns <= WIDEST and not (of and columns % of) and work.is_contiguous() and fits(upper)
    if not fitting or not scoring.taken(work, None, None):
        return None
    upper = upper if upper.stride(1) == 1 else upper.contiguous()  # rows are read, and factors come by columns
    errors = torch.empty_like(work)
    height = scoring.power_of_two(columns)
    width = max(8, min(64, _TILE // height))
    steps = (0, 0) if removed is None else removed.stride()
    _sweep[(triton.cdiv(outputs, width),)](
        work, keep.view(torch.int8), keep.view(torch.int8) if removed is None else removed.view(torch.int8),
        upper, inverse, errors, outputs, columns, upper.stride(0), *steps,
        KEEP=keeps, OF=of, REMOVED=removed is not None, COLUMNS=height, OUTPUTS=width, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return errors


def check(device: torch.device) -> None:
    """Compare with a sweep in float64, column by column."""
    compare_sweeps(device, sweep_slab)

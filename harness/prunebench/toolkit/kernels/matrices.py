"""Keep masks over whole matrices, or several: the k-th smallest entry by four digits of eight bits, then ties by position.

Four passes count digits among the entries that share the digits found before; every program works out for itself what the
counts say, so nothing goes to the host. Two more passes make the mask: equal entries are counted tile by tile, tiles being
row-major pieces of a matrix, and the first of them go.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from prunebench.targets import Unstructured
from prunebench.toolkit.kernels import LIMIT, Mismatch, comparing, scoring
from prunebench.toolkit.kernels.scoring import ordered

_TILE = 4096
_PROGRAMS = 1056
"""Programs that count digits: eight for each of an H200's processors."""


@triton.jit
def _found(counts, rank, PASSES: tl.constexpr):
    """The digits so far as one number, and the rank that is left among the entries that have them."""
    digits = tl.arange(0, 256)
    prefix, left = rank * 0, rank
    for done in tl.static_range(PASSES):
        here = tl.load(counts + done * 256 + digits)
        below = tl.cumsum(here, axis=0)
        digit = tl.sum((below < left).to(tl.int32), axis=0)
        left -= tl.sum(tl.where(digits < digit, here, 0), axis=0)
        prefix = (prefix << 8) | digit
    return prefix, left


@triton.jit
def _place(tile, rows, columns, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a tile's entries, and which of them exist."""
    row = (tile // across * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tile % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit(do_not_specialize=["rank"])
def _count_digits(
    scores, counts, nans, rank, rows, columns, across, tiles, row_step, column_step,
    PASS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    prefix, _left = _found(counts, rank, PASS)
    digits = tl.arange(0, 512)
    found = digits * 0
    unordered = rank * 0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column, inside = _place(tile, rows, columns, across, ROWS, COLUMNS)
        values = tl.load(scores + row * row_step + column * column_step, mask=inside, other=0.0)
        if PASS == 0:
            unordered += tl.sum(tl.sum((values != values).to(tl.int32), axis=1), axis=0)
        keys = ordered(values) ^ -2147483648  # as if without sign, in the same bits
        digit = (keys >> (24 - 8 * PASS)) & 255
        if PASS > 0:
            inside = inside & (((keys >> (32 - 8 * PASS)) & ((1 << (8 * PASS)) - 1)) == prefix)
        found += tl.histogram(tl.reshape(tl.where(inside, digit, 256), [ROWS * COLUMNS]), 512)
    tl.atomic_add(counts + PASS * 256 + digits, found, mask=(digits < 256) & (found > 0))
    if unordered > 0:
        tl.atomic_add(nans, unordered)


@triton.jit(do_not_specialize=["rank"])
def _count_ties(
    scores, counts, ties, rank, rows, columns, across, row_step, column_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    tile = tl.program_id(0)
    prefix, _left = _found(counts, rank, 4)
    row, column, inside = _place(tile, rows, columns, across, ROWS, COLUMNS)
    values = tl.load(scores + row * row_step + column * column_step, mask=inside, other=0.0)
    equal = inside & (ordered(values) == (prefix ^ -2147483648))
    tl.store(ties + tile, tl.sum(tl.sum(equal.to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["rank"])
def _keep_tiles(
    scores, counts, ties, ties_so_far, keep, rank, rows, columns, across,
    row_step, column_step, keep_row_step, keep_column_step, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    prefix, room = _found(counts, rank, 4)
    threshold = prefix ^ -2147483648
    row, column, inside = _place(tile, rows, columns, across, ROWS, COLUMNS)
    keys = ordered(tl.load(scores + row * row_step + column * column_step, mask=inside, other=0.0))
    equal = (inside & (keys == threshold)).to(tl.int32)
    in_row = tl.sum(equal, axis=1)
    before = (tl.load(ties_so_far + tile) - tl.load(ties + tile)) + tl.cumsum(in_row, axis=0) - in_row
    position = before[:, None] + tl.cumsum(equal, axis=1)
    stays = (keys > threshold) | ((equal > 0) & (position > room))
    tl.store(keep + row * keep_row_step + column * keep_column_step, stays.to(tl.int8), mask=inside)


def keep(matrices: Sequence[torch.Tensor], target: Unstructured) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Keep masks of matrices [outputs, inputs] in float32 that are compared with each other, and on the device how many of
    their scores are NaN; nothing is waited for. None where nothing is to go, or there are too many entries."""
    device, total = matrices[0].device, sum(matrix.numel() for matrix in matrices)
    removed = target.removed(total)
    if not removed or total >= LIMIT or not all(scoring.taken(m, None, None) and m.device == device for m in matrices):
        return None
    numbers = torch.zeros(4 * 256 + 1, dtype=torch.int32, device=device)
    counts, nans = numbers[:-1], numbers[-1]
    tilings = [_tiling(matrix) for matrix in matrices]
    ties = torch.empty(sum(tiles for *_, tiles in tilings), dtype=torch.int32, device=device)
    for step in range(4):
        for matrix, (height, width, across, tiles) in zip(matrices, tilings, strict=True):
            _count_digits[(min(tiles, _PROGRAMS),)](
                matrix, counts, nans, removed, *matrix.shape, across, tiles, *matrix.stride(),
                PASS=step, ROWS=height, COLUMNS=width, num_warps=8, **scoring.PRECISE,
            )  # fmt: skip
    parts = torch.split(ties, [tiles for *_, tiles in tilings])
    for matrix, part, (height, width, across, tiles) in zip(matrices, parts, tilings, strict=True):
        _count_ties[(tiles,)](
            matrix,
            counts,
            part,
            removed,
            *matrix.shape,
            across,
            *matrix.stride(),
            ROWS=height,
            COLUMNS=width,
            num_warps=8,
            **scoring.PRECISE,
        )
    sums = torch.split(ties.cumsum(0, dtype=torch.int32), [tiles for *_, tiles in tilings])
    masks = []
    for matrix, part, so_far, (height, width, across, tiles) in zip(matrices, parts, sums, tilings, strict=True):
        mask = torch.empty_like(matrix, dtype=torch.bool)
        _keep_tiles[(tiles,)](
            matrix, counts, part, so_far, mask.view(torch.int8), removed, *matrix.shape, across,
            *matrix.stride(), *mask.stride(), ROWS=height, COLUMNS=width, num_warps=8, **scoring.PRECISE,
        )  # fmt: skip
        masks.append(mask)
    return masks, nans


def _tiling(matrix: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, tiles side by side, and tiles in all: whole rows, or a piece of one row."""
    rows, columns = matrix.shape
    width = min(_TILE, scoring.power_of_two(columns))
    height = _TILE // width
    across = triton.cdiv(columns, width)
    if across > 1:
        height = 1
    return height, width, across, across * triton.cdiv(rows, height)


def check(device: torch.device) -> None:
    """Compare with the PyTorch version."""
    from prunebench.toolkit.masks import keep_together as by_torch

    narrow, wide = list(comparing.samples(device, 48)), [scores[:2] for scores in comparing.samples(device, 4200)]
    for share, matrices in ((0.05, narrow[:1]), (0.5, narrow[2:]), (0.5, wide[1:2]), (0.95, narrow + wide)):
        target = Unstructured(share)
        _same(keep(matrices, target), by_torch(matrices, target))


def _same(found: tuple[list[torch.Tensor], torch.Tensor] | None, wanted: list[torch.Tensor]) -> None:
    if found is None:
        raise Mismatch("no mask was made")
    for mask, other in zip(found[0], wanted, strict=True):
        comparing.compare("matrices", mask, other)

"""From scores to keep masks, with exact counts and one tie rule.

Ties go to the lower column first, and to the earlier row where whole matrices are compared, as a stable ascending sort would
have it (`methods.md` 1.4); the same on every device. Besides the mask itself, the peak extra memory of the unstructured
groups is bounded by `CHUNK_ENTRIES` entries (about 20 bytes each), whatever the size of the matrix; N:M needs 10 bytes
an entry of a chunk. On GPUs kernels do the same (`kernels/`) for float32 scores, bit for bit, and the device is waited for just
once, to see that no score was NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import numpy as np
import torch

from prunebench.errors import NonFiniteError, RunError
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import kernels
from prunebench.toolkit.phases import phase
from prunebench.toolkit.scores import gradient_scores, wanda_scores

Group = Literal["row", "matrix"]

CHUNK_ENTRIES = 1 << 22
"""Entries worked on at a time."""

_DIGIT_BITS = 16


@overload
def keep_mask(scores: torch.Tensor, target: Target, group: Group = "row") -> torch.Tensor: ...
@overload
def keep_mask(scores: Sequence[torch.Tensor], target: Target, group: Literal["model"]) -> list[torch.Tensor]: ...
def keep_mask(
    scores: torch.Tensor | Sequence[torch.Tensor], target: Target, group: Group | Literal["model"] = "row"
) -> torch.Tensor | list[torch.Tensor]:
    """Keep the entries of highest score: exactly `int(size * s)` are removed in every comparison group.

    Args:
        scores: [outputs, inputs], float32 (float64 in exact tests); with `group="model"` one such tensor a matrix.
        target: the pattern; an N:M target compares within groups of M consecutive columns and ignores `group`.
        group: what is compared with what: each row, the whole matrix, or all the matrices together.

    Returns:
        A boolean tensor of the shape of the scores, True where the entry survives; with `group="model"` a list of them.

    Raises:
        NonFiniteError: a score is NaN.
        RunError: the scores are not float32 or float64, the columns are not a multiple of M, or there is no such group.
    """
    if group not in ("row", "matrix", "model"):
        raise RunError(f"the comparison group {group!r} is none of row, matrix and model.")
    with phase("scoring"):
        together = [scores] if isinstance(scores, torch.Tensor) else list(scores)
        for matrix in together:
            _check_form(matrix, target)
        found = _by_kernels(together, target, group)
        if found is None or int(found[1]):
            for matrix in together:
                _check_order(matrix)
        if found is not None:
            masks = found[0]
        elif isinstance(target, NM):
            masks = [keep_nm(matrix, target) for matrix in together]
        elif not isinstance(target, Unstructured):
            masks = [torch.ones_like(matrix, dtype=torch.bool) for matrix in together]
        elif group == "row":
            masks = [keep_rows(matrix, target) for matrix in together]
        else:
            masks = keep_together(together, target)
        return masks[0] if isinstance(scores, torch.Tensor) else masks


def keep_by_norms(
    weight: torch.Tensor,
    norms: torch.Tensor,
    target: Target,
    gradients: torch.Tensor | None = None,
    alpha: float = 0.0,
    removed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`keep_mask` by rows of `wanda_scores`, or of `gradient_scores` where there are gradients; on GPUs scores are not written.

    Args:
        weight: [outputs, inputs], in any float dtype.
        norms: of the input features, [inputs].
        target: the pattern.
        gradients: magnitudes reduced over samples, [outputs, inputs], anywhere.
        alpha: how much the gradients count.
        removed: entries that go first, [outputs, inputs].

    Raises:
        NonFiniteError, RunError: as `keep_mask`.
    """
    with phase("scoring"):
        there = None if gradients is None else gradients.to(weight.device)
        found = None if removed is not None else _by_kernel(weight, target, norms, there, alpha)
        if found is not None and not int(found[1]):
            return found[0]
        scores = wanda_scores(weight, norms) if there is None else gradient_scores(weight, norms, there, alpha)
        return keep_mask(scores if removed is None else scores.masked_fill_(removed, -1), target, "row")


def keep_slab(scores: torch.Tensor, target: Target) -> torch.Tensor:
    """`keep_mask(scores, target, "matrix")`, but where kernels are used nobody waits to see that no score is NaN."""
    with phase("scoring"):
        found = _by_kernels([scores], target, "matrix")
        return keep_mask(scores, target, "matrix") if found is None else found[0][0]


def _by_kernels(matrices: Sequence[torch.Tensor], target: Target, group: str) -> tuple[list[torch.Tensor], torch.Tensor] | None:
    """Masks, and on the device how many scores are NaN; None where kernels are not used, or not for such scores."""
    if isinstance(target, Unstructured) and group != "row":
        return kernels.run(matrices[0].device, "matrices", lambda k: k.keep(matrices, target)) if matrices else None
    found = [made for matrix in matrices if (made := _by_kernel(matrix, target)) is not None]
    if not found or len(found) < len(matrices):
        return None
    return [mask for mask, _ in found], torch.stack([nans for _, nans in found]).sum()


def _by_kernel(
    scores: torch.Tensor,
    target: Target,
    norms: torch.Tensor | None = None,
    gradients: torch.Tensor | None = None,
    alpha: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """As `_by_kernels`, of one matrix by groups or rows; with norms the scores are weights, and made on the way."""
    if not isinstance(target, NM | Unstructured):
        return None
    name = "groups" if isinstance(target, NM) else "rows"
    return kernels.run(scores.device, name, lambda k: k.keep(scores, target, norms, gradients, alpha))


def _check_form(scores: torch.Tensor, target: Target) -> None:
    if scores.dtype not in (torch.float32, torch.float64):
        raise RunError(
            f"scores must be float32, not {str(scores.dtype).removeprefix('torch.')}: ties of a short type distort counts."
        )
    if scores.ndim != 2:
        raise RunError(f"scores must be [outputs, inputs], not {list(scores.shape)}.")
    if isinstance(target, NM) and scores.shape[1] % target.of:
        raise RunError(f"{scores.shape[1]} columns are not a multiple of {target.of}, so {target} has no meaning for them.")


def _check_order(scores: torch.Tensor) -> None:
    if scores.numel() and bool(torch.isnan(scores.amin())):  # a NaN is the least of all; one pass, nothing written
        raise NonFiniteError(
            f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN; no mask can be made of them."
        )


def _row_chunks(scores: torch.Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ENTRIES // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], rows):
        yield slice(start, min(start + rows, scores.shape[0]))


def keep_rows(scores: torch.Tensor, target: Unstructured) -> torch.Tensor:
    """Per row, by the k-th smallest score; of those equal to it the first columns go."""
    removed = target.removed(scores.shape[1])
    keep = torch.ones_like(scores, dtype=torch.bool)
    if removed == 0:
        return keep
    for rows in _row_chunks(scores):
        keep[rows] = _above(scores[rows], _kth_smallest(scores[rows], removed), removed)
    return keep


def _above(scores: torch.Tensor, threshold: torch.Tensor, removed: int) -> torch.Tensor:
    """Remove the `removed` smallest of each row, whose largest is the row's threshold; positions count only among equals."""
    keep = scores > threshold
    if int(keep.sum()) != keep.shape[0] * (keep.shape[1] - removed):
        at = scores == threshold
        room = removed - (scores < threshold).sum(dim=1, keepdim=True)
        keep |= at & (at.cumsum(dim=1, dtype=torch.int32) > room)
    return keep


def _kth_smallest(scores: torch.Tensor, rank: int) -> torch.Tensor:
    """The `rank`-th smallest of each row, [rows, 1]; numpy's is ten times as fast as torch's on a host with wide vectors."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.partition(scores.numpy(force=True), rank - 1, axis=1)[:, rank - 1 : rank].copy())
    return torch.kthvalue(scores, rank, dim=1, keepdim=True).values


def keep_nm(scores: torch.Tensor, target: NM) -> torch.Tensor:
    keep = torch.empty_like(scores, dtype=torch.bool)
    for rows in _row_chunks(scores):
        groups = scores[rows].reshape(-1, target.of).t().contiguous()
        keep[rows] = keep_in_groups(groups, target).t().reshape(scores[rows].shape)
    return keep


def keep_in_groups(groups: torch.Tensor, target: NM) -> torch.Tensor:
    """Which entries of highest score stay in each group of an N:M target, [M, groups] as the scores; nothing is checked.

    Each entry is ranked by counting who is smaller: M(M-1)/2 comparisons of whole rows, no sort, no wait for the device.
    """
    rank = torch.zeros(groups.shape, dtype=torch.uint8 if target.of <= 256 else torch.int32, device=groups.device)
    for later in range(1, target.of):
        smaller = groups[later] < groups[:later]
        rank[:later].add_(smaller)  # `+=` would copy the slice back onto itself
        torch.sum(~smaller, dim=0, dtype=rank.dtype, out=rank[later])
    return rank >= target.of - target.keep


def keep_together(matrices: Sequence[torch.Tensor], target: Unstructured) -> list[torch.Tensor]:
    """Over all entries of all matrices: the k-th smallest by its binary digits, so nothing is sorted or copied whole."""
    removed = target.removed(sum(matrix.numel() for matrix in matrices))
    if removed == 0:
        return [torch.ones_like(matrix, dtype=torch.bool) for matrix in matrices]
    if len(matrices) == 1 and matrices[0].numel() <= CHUNK_ENTRIES:
        stored = matrices[0] if matrices[0].is_contiguous() else matrices[0].t()  # any order will do, so the one in memory
        threshold = _kth_smallest(stored.reshape(1, -1), removed)
        keep = matrices[0] > threshold
        if int(keep.sum()) == keep.numel() - removed:
            return [keep]
        return [_above(matrices[0].reshape(1, -1), threshold, removed).view(keep.shape)]
    cut, room = _select(matrices, removed)
    masks = []
    for matrix in matrices:
        keep = torch.empty_like(matrix, dtype=torch.bool)
        for rows in _row_chunks(matrix):
            keys = _ordered(matrix[rows])
            keep[rows] = keys > cut
            at = keys == cut
            ties = int(at.sum())
            if ties:
                keep[rows] |= at & (at.flatten().cumsum(0, dtype=torch.int64).view_as(at) > room)
                room = max(0, room - ties)
        masks.append(keep)
    return masks


def _select(matrices: Sequence[torch.Tensor], rank: int) -> tuple[int, int]:
    """The key of the `rank`-th smallest entry, and how many entries with that key are among the `rank` smallest."""
    bits = 8 * matrices[0].element_size()
    prefix, low = None, rank
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for matrix in matrices:
            for rows in _row_chunks(matrix):
                keys = _ordered(matrix[rows])
                if prefix is not None:
                    keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
                digits = (keys.flatten() >> shift) & ((1 << _DIGIT_BITS) - 1)
                if prefix is None:
                    digits = digits ^ (1 << (_DIGIT_BITS - 1))  # the top digit carries the sign
                counts += torch.bincount(digits, minlength=counts.numel()).cpu()
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, low))
        low -= int(below[digit] - counts[digit])
        signed = digit - (1 << (_DIGIT_BITS - 1))
        prefix = signed if prefix is None else (prefix << _DIGIT_BITS) | digit
    assert prefix is not None
    return prefix, low


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats: the bits, with the magnitude of negative numbers turned round."""
    whole = torch.int32 if scores.dtype == torch.float32 else torch.int64
    bits = (scores + 0.0).contiguous().view(whole)  # + 0.0 makes -0.0 equal to 0.0
    return bits ^ ((bits >> (8 * scores.element_size() - 1)) & torch.iinfo(whole).max)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """A boolean tensor as bytes in C order, the first entry in the highest bit (numpy's `packbits`), on the host."""
    flat = mask.flatten().view(torch.uint8)
    padded = (torch.nn.functional.pad(flat, (0, -len(flat) % 8)) if len(flat) % 8 else flat).view(-1, 8)
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)  # made there: nothing is sent
    return (padded << shifts).sum(dim=1, dtype=torch.uint8).cpu()


def unpack_bits(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The boolean tensor that `pack_bits` made bytes of."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (packed[:, None] >> shifts) & 1
    return bits.flatten()[: shape[0] * shape[1]].view(shape).bool()

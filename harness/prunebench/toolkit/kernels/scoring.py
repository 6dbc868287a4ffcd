"""What kernels share: scores made from weights on the chip, and floats as integers in the same order."""

import torch
import triton
import triton.language as tl

from prunebench.toolkit.kernels import fits

GIVEN, NORMS, GRADIENTS = 0, 1, 2
"""Kinds of scores: as they are in memory; `|W| norm`; `|W| (norm + alpha G)`. Products and sums in float32, each rounded."""

PRECISE = {"enable_fp_fusion": False}
"""For launches: a product and a sum rounded once, as the compiler would have it, are not what PyTorch finds."""


@triton.jit
def load_scores(source, norms, gradients, alpha, offsets, gradient_offsets, columns, inside, KIND: tl.constexpr):
    """A tile of scores in float32; zero outside. `columns` has the tile's shape, or one that broadcasts to it."""
    found = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    if KIND != 0:
        factor = tl.load(norms + columns, mask=inside, other=0.0)
        if KIND == 2:
            factor = factor + alpha * tl.load(gradients + gradient_offsets, mask=inside, other=0.0).to(tl.float32)
        found = tl.abs(found) * factor
    return found


@triton.jit
def ordered(scores):
    """Integers in the order of float32 numbers: the bits, with the magnitude of negative ones turned round; -0.0 is 0.0."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def taken(scores: torch.Tensor, norms: torch.Tensor | None, gradients: torch.Tensor | None) -> bool:
    """Whether kernels take these: float32 scores, or with float32 norms and gradients on the same device weights of any of
    three dtypes; as many entries as 32 bits tell apart."""
    others = [tensor for tensor in (norms, gradients) if tensor is not None]
    dtypes = (torch.float32,) if norms is None else (torch.float32, torch.bfloat16, torch.float16)
    alike = all(other.device == scores.device and other.dtype == torch.float32 for other in others)
    shaped = norms is None or (norms.shape == scores.shape[1:] and norms.is_contiguous())
    shaped &= gradients is None or gradients.shape == scores.shape
    return scores.ndim == 2 and scores.numel() > 0 and scores.dtype in dtypes and alike and shaped and fits(scores, *others)


def power_of_two(number: int) -> int:
    """The least power of two that is not below it."""
    return 1 << max(0, number - 1).bit_length()


def warps(entries: int, each: int = 16) -> int:
    """Warps for a tile of so many entries, about `each` of them a thread."""
    return max(1, min(32, power_of_two(entries // (32 * each))))

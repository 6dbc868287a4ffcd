"""Float32 products on tensor cores, which read ten bits of a fraction: as they are, and in three products to float32's own.

Plain TF32 is no choice for what masks are made of: with operands rounded so, gblm's masks of stories260K differ in 9e-4 of the
entries at 2:4 from those of float32, nine times what golden masks are held to. A number is therefore cut into what TF32 holds
and the rest, and a product is made of three: of both heads, and of each head with the other's rest. What is left out is the
product of both rests, 2^-22 of the whole. On an H200 three products take less than half as long as one in float32.

One product is enough where what it rounds leaves no trace: in Wanda++'s training, whose steps are too small for their last
digits to matter. Of a float32 model it is not for the gradients of single samples (made so of exact operands, 2e-4 of gblm's
entries are others), nor for norms of inputs (two entries become hundreds in later blocks). Of a model in 16 bits it is for all
float32 copies of its blocks: TF32 holds its weights and hidden states to the bit, and rounds what comes between no coarser than
the model does, in bfloat16 an eighth as much. `tests/test_precision.py` shows both by rounding on a host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

_HEAD = ~0x1FFF
"""The bits of a float32 that TF32 holds."""


@contextmanager
def single_precision(device: torch.device) -> Iterator[None]:
    """On CUDA, products of float32 matrices are in TF32 here, with sums in float32; elsewhere nothing changes.

    The newer of PyTorch's two interfaces is used, for products alone; convolutions keep what they had. In the context the
    older one cannot be read.
    """
    if device.type != "cuda":
        yield
        return
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        yield
    finally:
        setting.fp32_precision = before


def working(model: torch.dtype, hidden: torch.Tensor) -> AbstractContextManager[None]:
    """What a block, or a copy of it, is to multiply in: a float32 copy of a block of a 16-bit model in TF32.

    Layers that run in it multiply so on the way back too (`products.quick`).

    Args:
        model: dtype of the model.
        hidden: what is to go through the block.
    """
    return single_precision(hidden.device) if model.itemsize == 2 and hidden.dtype == torch.float32 else nullcontext()


def is_single(device: torch.device) -> bool:
    """Whether products of float32 matrices are in TF32 there, now."""
    return device.type == "cuda" and str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def suits_three(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a product of the two is faster in three: float32 on a device whose tensor cores have TF32, which is not on."""
    if one.device.type != "cuda" or not one.dtype == other.dtype == torch.float32 or not _has_tf32(one.device):
        return False
    return not is_single(one.device)


def in_three(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The product of two float32 matrices, by three in TF32, the small ones first."""
    with single_precision(one.device):
        head, other_head = _head(one), _head(other)
        found = torch.mm(one - head, other_head)
        found.addmm_(head, other - other_head)
        return found.addmm_(head, other_head)


def _head(tensor: torch.Tensor) -> torch.Tensor:
    """The part that TF32 holds; `tensor` may be a transposed view."""
    return (tensor.view(torch.int32) & _HEAD).view(torch.float32)


@cache
def _has_tf32(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)

"""Float32 products on tensor cores: TF32, where a test shows that masks stay within what is promised of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_precision(device: torch.device) -> Iterator[None]:
    """On CUDA, products of float32 tensors read ten bits of their fractions here, and add up in float32; elsewhere nothing.

    Seven times the rate on an H200. `tests/test_precision.py` rounds operands in the same way on a host: the masks of gblm and
    wanda++ stay within the bound that golden masks are held to. The newer of PyTorch's two interfaces is used, for products
    alone: convolutions keep what they had.
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

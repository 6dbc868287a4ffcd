"""Products of 16-bit matrices with sums in float32, by the vendor's library: `torch.mm` with `out_dtype`, on CUDA only.

A product of two bfloat16 or float16 numbers is exact in float32, so nothing is lost against a copy of the inputs in float32 but
the order of sums; half the bytes are read, by units that are many times as fast.
"""

import torch

from prunebench.toolkit.kernels import Mismatch


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """`left @ right` in float32, of matrices in bfloat16 or float16; None for others."""
    if left.dtype not in (torch.bfloat16, torch.float16) or not left.numel():
        return None
    found: torch.Tensor = torch.mm(left, right, out_dtype=torch.float32)
    return found


def check(device: torch.device) -> None:
    """Compare with float64, on as many tokens as show a sum that is kept in 16 bits somewhere."""
    generator = torch.Generator().manual_seed(4)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = torch.randn(4096, 96, generator=generator).to(dtype).to(device)
        found, wanted = product(inputs[:, 32:].t(), inputs), inputs[:, 32:].double().t() @ inputs.double()
        if found is None or not torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())):
            raise Mismatch(f"a product of {dtype} is not summed in float32")

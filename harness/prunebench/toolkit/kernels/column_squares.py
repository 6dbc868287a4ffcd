"""Sums of squares by columns of inputs in 16 or 32 bits, each read once: float32 over some tokens, float64 over these sums."""

import torch
import triton
import triton.language as tl

from prunebench.toolkit.kernels import Mismatch, fits

_TOKENS, _COLUMNS, _STEPS = 64, 64, 16
"""A tile, and tiles that a program adds up in float32: 1024 tokens."""


@triton.jit
def _column_squares(
    inputs, sums, tokens, width, token_step, column_step, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * TOKENS * STEPS + tl.arange(0, TOKENS)
    squares = tl.full([TOKENS, COLUMNS], 0.0, tl.float32)
    for step in range(0, STEPS):
        token = first + step * TOKENS
        inside = (token < tokens)[:, None] & (column < width)[None, :]
        where = token[:, None] * token_step + column[None, :] * column_step
        values = tl.load(inputs + where, mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    tl.store(sums + tl.program_id(1) * width + column, tl.sum(squares, axis=0), mask=column < width)


def column_squares(inputs: torch.Tensor) -> torch.Tensor | None:
    """`sum over tokens of x_j²`, [width] in float64, of inputs [tokens, width]; None where there are too many of them."""
    tokens, width = inputs.shape
    if not inputs.numel() or not fits(inputs) or inputs.dtype == torch.float64:
        return None
    chunks = triton.cdiv(tokens, _TOKENS * _STEPS)
    sums = torch.empty(chunks, width, dtype=torch.float32, device=inputs.device)
    _column_squares[(triton.cdiv(width, _COLUMNS), chunks)](
        inputs,
        sums,
        tokens,
        width,
        *inputs.stride(),
        TOKENS=_TOKENS,
        COLUMNS=_COLUMNS,
        STEPS=_STEPS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return sums.sum(dim=0, dtype=torch.float64)


def check(device: torch.device) -> None:
    """Compare with float64."""
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        inputs = torch.randn(1300, 70, generator=generator).to(dtype).to(device)
        wanted, found = inputs.double().square().sum(dim=0), column_squares(inputs)
        if found is None or not torch.allclose(found, wanted, rtol=1e-6, atol=0.0):
            raise Mismatch(f"sums of squares of {dtype} are more than 1e-6 from those in float64")

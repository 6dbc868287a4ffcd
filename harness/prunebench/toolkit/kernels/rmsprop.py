"""A step of RMSprop in one pass over memory: 20 bytes an entry, where separate operations move 52."""

import torch
import triton
import triton.language as tl

from prunebench.toolkit.kernels import Mismatch, fits

_ENTRIES = 1024
"""Of a program."""


@triton.jit
def _step(values, squares, gradients, size, rate, stays, comes, epsilon, ENTRIES: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = at < size
    value, square = tl.load(values + at, mask=inside), tl.load(squares + at, mask=inside, other=0.0)
    gradient = tl.load(gradients + at, mask=inside, other=0.0)
    square = square * stays + comes * gradient * gradient
    tl.store(squares + at, square, mask=inside)
    tl.store(values + at, value - rate * tl.div_rn(gradient, tl.sqrt_rn(square) + epsilon), mask=inside)


def step(
    value: torch.Tensor, square: torch.Tensor, gradient: torch.Tensor, rate: float, smoothing: float, epsilon: float
) -> torch.Tensor | None:
    """`square = smoothing square + (1 - smoothing) gradient²`, `value -= rate gradient / (sqrt(square) + epsilon)`, in place.

    Args:
        value: a weight, float32, contiguous.
        square: the mean of squares of its gradients, of the same shape.
        gradient: of the same shape.
        rate: of learning.
        smoothing: what stays of the mean.
        epsilon: added to the root.

    Returns:
        `value`; None, and nothing is written, where they are stored otherwise.
    """
    tensors = (value, square, gradient)
    if not all(t.dtype == torch.float32 and t.is_contiguous() and t.shape == value.shape for t in tensors) or not fits(value):
        return None
    if value.numel():
        numbers = (rate, smoothing, 1 - smoothing, epsilon)
        programs = (triton.cdiv(value.numel(), _ENTRIES),)
        _step[programs](*tensors, value.numel(), *numbers, ENTRIES=_ENTRIES, num_warps=4, enable_fp_fusion=True)
    return value


def check(device: torch.device) -> None:
    """Compare three steps with those in float64."""
    generator = torch.Generator().manual_seed(5)
    exact, exact_square = torch.randn(70, 33, generator=generator).double(), torch.zeros(70, 33).double()
    value, square = exact.float().to(device), exact_square.float().to(device)
    for _ in range(3):
        gradient = torch.randn(70, 33, generator=generator)
        if step(value, square, gradient.to(device), 0.01, 0.99, 1e-8) is None:
            raise Mismatch("no step was made")
        exact_square = 0.99 * exact_square + 0.01 * gradient.double().square()
        exact -= 0.01 * gradient.double() / (exact_square.sqrt() + 1e-8)
    for name, found, wanted in (("weights", value, exact), ("means of squares", square, exact_square)):
        if not torch.allclose(found.cpu().double(), wanted, rtol=1e-6, atol=1e-6):
            raise Mismatch(f"{name} are not those of steps in float64")

"""Small inputs on which kernels are compared with the PyTorch versions before they are used, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from prunebench.toolkit.kernels import Mismatch


def samples(device: torch.device, columns: int) -> Iterator[torch.Tensor]:
    """Scores [rows, columns] that tell kernels apart: many ties, infinities, zeros of both signs, transposed storage."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([-torch.inf, torch.inf, -0.0, 0.0, 1.0, 1e-45, -1e-45, 3.4e38])
    yield torch.rand(5, columns, generator=generator).to(device)
    yield torch.randint(-2, 3, (3, columns), generator=generator).float().to(device)
    yield special[torch.randint(0, 8, (columns, 4), generator=generator)].to(device).t()


def weights(device: torch.device, columns: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Weights [rows, columns] of several dtypes, norms and gradients for scores that are made on the chip."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):  # few: each is compiled anew
        weight = torch.randn(6, columns, generator=generator).to(dtype)
        norms, gradients = torch.rand(columns, generator=generator), torch.rand(columns, 6, generator=generator).t()
        yield weight.to(device), norms.to(device), gradients.to(device)


def compare(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise a Mismatch where masks are not the same."""
    if not torch.equal(found, wanted):
        differing = int((found != wanted).sum())
        raise Mismatch(f"{name}: {differing} of {wanted.numel()} entries are not those of the PyTorch version")


def made(found: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """The mask of a mask and a count of NaN."""
    if found is None:
        raise Mismatch("no mask was made")
    return found[0]


def compare_sweeps(device: torch.device, sweep_slab: Callable[..., torch.Tensor | None]) -> None:
    """Raise a Mismatch where a kernel's sweep over a slab is not that in float64, column by column."""
    generator = torch.Generator().manual_seed(3)
    for columns, outputs, keeps, of in ((40, 9, 0, 0), (128, 17, 2, 4), (24, 9, 4, 8)):
        square = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator).triu() / columns**0.5
        weight = torch.randn(columns, outputs, generator=generator)
        removed = torch.rand(outputs, columns, generator=generator) < 0.1 if of == 8 else None
        keep = torch.rand(columns, outputs, generator=generator) < 0.5
        wanted, wanted_keep, wanted_errors = _swept(weight, keep, square, keeps, of, removed)
        work, mask = weight.to(device).clone(), keep.to(device).clone()
        inverse = square.diagonal().reciprocal()[:, None]
        gone = None if removed is None else removed.to(device)
        errors = sweep_slab(work, mask, square.to(device), inverse.to(device), keeps, of, gone)
        if errors is None:
            raise Mismatch("no sweep was made")
        compare(f"a sweep of {columns} columns", mask.cpu(), wanted_keep)
        compare_numbers(f"weights of {columns} columns", work, wanted)
        compare_numbers(f"errors of {columns} columns", errors, wanted_errors)


def compare_numbers(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise a Mismatch where float32 numbers are not those in float64, but for rounding."""
    if not torch.allclose(found.cpu().double(), wanted, rtol=1e-4, atol=1e-5):
        raise Mismatch(f"{name} are not those of a sweep in float64")


def _swept(
    weight: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, keeps: int, of: int, removed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, mask and errors in float64, on the host."""
    weight, keep, upper = weight.double(), keep.clone(), upper.double()
    errors = torch.empty_like(weight)
    for at in range(len(weight)):
        if of and at % of == 0:
            part = slice(at, at + of)
            scores = (weight[part] / upper.diagonal()[part, None]).square()
            scores = scores if removed is None else scores.masked_fill(removed[:, part].t(), -1)
            places = scores.argsort(dim=0, stable=True).argsort(dim=0)
            keep[part] = places >= of - keeps
            if removed is not None:
                keep[part] &= ~removed[:, part].t()
        errors[at] = weight[at] / upper[at, at] * ~keep[at]
        weight[at + 1 :] -= upper[at, at + 1 :, None] * errors[at]
    return weight * keep, keep, errors

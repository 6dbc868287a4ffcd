"""Kernels that multiply by a pruned weight faster than the dense product does, or claim to: a table that others may add to.

`KERNELS.append(Kernel(...))` in a module that a plugin imports adds one, for instance macko_spmv's for unstructured masks. What
a kernel is for is said by the patterns it takes; whether it runs on a device is found by trying (`missing`); whether it takes a
weight of some shape it says itself, by raising. The 2:4 kernels are those of PyTorch's own `torch.sparse`, cuSPARSELt's and
CUTLASS's (`SparseSemiStructuredTensor`): they keep 2 of 4 values and 2 bits for the place of each, 9/16 of 16-bit weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from prunebench.handles import Matrix
from prunebench.toolkit.memory import is_out_of_memory

Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""`product(inputs, bias)`: [..., inputs] times the weight [outputs, inputs] transposed, plus the bias [outputs] if any."""

DENSE = "dense"
MOSTLY_DENSE = 0.01
"""A weight of which less is zero counts as dense."""

TOLERANCE = 0.02
"""Relative error, in the Euclidean norm, up to which a product in a 16-bit type is right."""

_PROBE = 256


@dataclass(frozen=True)
class Kernel:
    """A way to multiply by pruned weights."""

    name: str
    patterns: frozenset[str]
    """Of weights that it takes: `2:4`, `4:8`, `unstructured`, as `pattern_of` names them."""
    missing: Callable[[torch.device, torch.dtype], str]
    """Why it does not run on a device, in a few words; empty where it does."""
    make: Callable[[torch.Tensor], Product]
    """From a weight [outputs, inputs] to its product; raises RuntimeError, ValueError or NotImplementedError where it does not
    take the shape."""


def pattern_of(weight: torch.Tensor) -> str:
    """The pattern of a weight's zeros: `dense`, `2:4`, `4:8` or `unstructured`, the narrowest that holds of every row.

    Args:
        weight: [outputs, inputs]; sparser ones than 2:4, as 1:4, are 2:4 too.
    """
    kept = weight != 0
    if bool(kept.sum() > (1 - MOSTLY_DENSE) * kept.numel()):
        return DENSE
    for keep, of in ((2, 4), (4, 8)):
        if weight.shape[1] % of == 0 and bool((kept.view(weight.shape[0], -1, of).sum(dim=2) <= keep).all()):
            return f"{keep}:{of}"
    return "unstructured"


def dense_product(weight: torch.Tensor) -> Product:
    """What a linear layer does."""
    return lambda inputs, bias: torch.nn.functional.linear(inputs, weight, bias)


def relative_error(product: Product, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """How far a product is from the dense one, in the Euclidean norm; not a number where it is."""
    expected = dense_product(weight)(inputs, None).double()
    return float((product(inputs, None).double() - expected).norm() / expected.norm())


def short(error: BaseException) -> str:
    """An error's first line, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}".rstrip(": ")


def _semi_structured(name: str, back_end: str) -> Kernel:
    def make(weight: torch.Tensor) -> Product:
        kind = getattr(torch.sparse, f"SparseSemiStructuredTensor{back_end}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says that it is a prototype
            packed = kind.from_dense(weight.contiguous())

        def product(inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            rows = inputs.reshape(-1, inputs.shape[-1])  # it takes matrices only
            return torch.nn.functional.linear(rows, packed, bias).view(*inputs.shape[:-1], -1)

        return product

    @cache
    def missing(device: torch.device, dtype: torch.dtype) -> str:
        if device.type != "cuda":
            return "it needs a CUDA device"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it takes no {str(dtype).removeprefix('torch.')}"
        weight = torch.randn(_PROBE, _PROBE, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        weight.view(_PROBE, -1, 4)[:, :, :2] = 0
        inputs = torch.randn(_PROBE, _PROBE, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        try:
            with torch.inference_mode():  # elsewhere PyTorch takes `linear` apart before these tensors see it
                error = relative_error(make(weight), weight, inputs)
        except Exception as failed:  # noqa: BLE001 - a library that is not there says so in many ways
            return f"it fails with {short(failed)}"
        return "" if error < TOLERANCE else f"its products are wrong by {error:.2g}"

    return Kernel(name, frozenset({"2:4"}), missing, make)


KERNELS = [_semi_structured("cusparselt", "CUSPARSELT"), _semi_structured("cutlass", "CUTLASS")]
"""All there are; of two that are equally fast the first is taken."""


@dataclass(frozen=True)
class Choice:
    """Which kernels may be used for a model, or why none."""

    kernels: tuple[Kernel, ...]
    reason: str
    """Why there is none, for a table."""
    details: str = ""
    """What each one says."""


def kernels_for(pattern: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The kernels that take a pattern and run on a device."""
    takers = [kernel for kernel in KERNELS if pattern in kernel.patterns]
    if not takers:
        return Choice((), f"no kernel for {pattern} masks")
    missing = {kernel.name: kernel.missing(device, dtype) for kernel in takers}
    there = tuple(kernel for kernel in takers if not missing[kernel.name])
    details = "; ".join(f"{name}: {why}" for name, why in missing.items() if why)
    if there:
        return Choice(there, "", details)
    told = set(missing.values())
    why = f": {told.pop()}" if len(told) == 1 else ""
    return Choice((), f"no kernel for {pattern} masks on this device{why}", details)


def made(kernel: Kernel, weight: torch.Tensor) -> Product | str:
    """The product of a kernel with a weight, or why there is none."""
    try:
        return kernel.make(weight)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return short(error)


@contextmanager
def replaced(matrices: Sequence[Matrix], products: Mapping[str, Product]) -> Iterator[None]:
    """Let the modules of these matrices multiply by other products, by the matrix's name, for the time inside.

    Only what the modules do is exchanged: their names, their parameters and the hooks on them stay.
    """
    exchanged = []
    try:
        for matrix in matrices:
            if matrix.name in products:
                matrix.module.forward = _forward(matrix.module, products[matrix.name])
                exchanged.append(matrix.module)
        yield
    finally:
        for module in exchanged:
            del module.forward


def _forward(module: torch.nn.Module, product: Product) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = getattr(module, "bias", None)
    return lambda inputs: product(inputs, bias)

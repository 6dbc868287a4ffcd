"""Products of hidden states and weights: on the fastest float32 kernels of the host, and with weight gradients handed over.

MKL, which PyTorch's `mm` calls on a host, keeps to its AVX2 kernels on processors that Intel did not make; oneDNN, which
PyTorch holds too, takes AVX-512 wherever it is. On a Zen 5 core that is 210 GFLOP/s instead of 97. Sums are then taken in
another order: the last bits differ. Which of the two is used is decided by the processor, never by a measurement. On CUDA a
product is made of three on tensor cores, or of one, and on the way back as on the way forward (`precision.py`).

A `Taker` is shown what each product read and the gradient at its output, and autograd makes no weight gradient of its own: a
sum over all samples of a batch, where the methods want each sample's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunebench.toolkit.precision import in_three, is_single, single_precision, suits_three
from prunebench.toolkit.processor import of_processor

WORTH_IT = 1 << 22
"""Multiplications in a product from which another kernel pays for being asked."""


class Taker(Protocol):
    """Takes over the gradients of weights."""

    def called(self, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        """A product of these inputs [..., inputs] and this weight is part of the graph."""

    def take(self, weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, transposed: bool) -> None:
        """The way back has reached that product; `gradients` [..., outputs] are those at its output.

        `transposed`: the weight is stored as [inputs, outputs].
        """


@contextmanager
def only_these(module: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let these parameters take gradients and no other inside the module; each as it was afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    wanted = {id(weight) for weight in weights}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def quick(module: nn.Module, taker: Taker | None = None) -> Iterator[None]:
    """Let the linear layers inside a module multiply here; their hooks see what they always see.

    Layers of other classes, and those whose forward somebody has replaced, keep their own.

    Args:
        module: its forward runs in the context; the way back may run after it.
        taker: takes over the gradients of the layers' weights, which autograd then does not find.
    """
    layers = [inner for inner in module.modules() if type(inner) in (nn.Linear, Conv1D) and "forward" not in inner.__dict__]
    for layer in layers:
        layer.__dict__["forward"] = partial(_forward, layer, taker)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _forward(layer: nn.Module, taker: Taker | None, inputs: torch.Tensor) -> torch.Tensor:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    if taker is None and torch.is_autocast_enabled(inputs.device.type):  # which casts what the layer's own forward calls
        own: torch.Tensor = type(layer).forward(layer, inputs)
        return own
    transposed = isinstance(layer, Conv1D)
    if not torch.is_grad_enabled():
        return _linear(inputs, weight.t() if transposed else weight, bias)
    if taker is not None:
        taker.called(weight, inputs)
    found: torch.Tensor = _Product.apply(inputs, weight, bias, transposed, taker)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """`X W' + b`, W [outputs, inputs] or stored transposed."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool, taker: Taker | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.transposed, ctx.taker, ctx.own_weight = transposed, taker, weight
        ctx.single = is_single(inputs.device)
        return _linear(inputs, weight.t() if transposed else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        below = own = of_bias = None
        with single_precision(inputs.device) if ctx.single else nullcontext():
            if ctx.needs_input_grad[0]:
                below = _linear(gradients, weight if ctx.transposed else weight.t(), None)
            if ctx.taker is not None:
                ctx.taker.take(ctx.own_weight, inputs, gradients, ctx.transposed)
            elif ctx.needs_input_grad[1]:
                own = weight_gradient(inputs, gradients, ctx.transposed)
        if ctx.needs_input_grad[2]:
            of_bias = gradients.reshape(-1, gradients.shape[-1]).sum(dim=0)
        return below, own, of_bias, None, None


def weight_gradient(inputs: torch.Tensor, gradients: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The gradient of a weight [outputs, inputs], or [inputs, outputs] where it is stored so, summed over all tokens.

    Args:
        inputs: what the product read, [..., inputs].
        gradients: at its output, [..., outputs].
        transposed: of the weight.
    """
    rows, columns = gradients.reshape(-1, gradients.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    if transposed:
        rows, columns = columns, rows
    if _suits_onednn(rows.t(), columns.t()):
        return _onednn(rows.t(), columns.t(), None)
    return in_three(rows.t(), columns) if suits_three(rows, columns) else torch.mm(rows.t(), columns)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`X W' + b` for W [outputs, inputs]."""
    if _suits_onednn(inputs, weight):
        return _onednn(inputs, weight, bias)
    if suits_three(inputs, weight):
        found = in_three(inputs.reshape(-1, inputs.shape[-1]), weight.t()).view(*inputs.shape[:-1], len(weight))
        return found if bias is None else found.add_(bias)
    return nn.functional.linear(inputs, weight, bias)


def _suits_onednn(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a product of inputs [..., inputs] and a weight [outputs, inputs] is faster there."""
    return (
        inputs.device.type == "cpu"
        and inputs.dtype == weight.dtype == torch.float32
        and inputs.numel() * weight.shape[0] >= WORTH_IT
        and _onednn_is_faster()
    )


def _onednn(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(_dense(inputs), _dense(weight), bias, "none", [], "")
    return found


def _dense(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix without gaps in memory, stored by rows or by columns: for any other oneDNN takes hundreds of times as long."""
    dense = matrix.is_contiguous() or (matrix.ndim == 2 and matrix.t().is_contiguous())
    return matrix if dense else matrix.contiguous()


@cache
def _onednn_is_faster() -> bool:
    """Whether the processor has AVX-512 that MKL does not use, and oneDNN is there and right."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):  # type: ignore[no-untyped-call]
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or of_processor("vendor_id") in ("", "GenuineIntel"):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    inputs, weight = torch.linspace(-1, 1, 48).view(6, 8), torch.linspace(-1, 1, 40).view(5, 8)
    return torch.allclose(_onednn(inputs, weight, None), inputs @ weight.t(), rtol=1e-5, atol=1e-5)

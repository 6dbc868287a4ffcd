"""Products on oneDNN's kernels are those of MKL's but for the last bits, and which are used is the processor's matter."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunebench.toolkit import products
from prunebench.toolkit.products import quick, weight_gradient

WIDE = 256
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(WIDE, WIDE), Conv1D(WIDE, WIDE)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(hidden)))


def everything(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output of a pair of layers, with all gradients; 64 tokens make products just large enough."""
    pair = Pair().to(dtype)
    hidden = torch.randn(2, 32, WIDE, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    with quick(pair):
        output = pair(hidden)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [hidden, *pair.parameters()])]


@needs_onednn
@pytest.mark.parametrize("there", [True, False])
def test_last_bits_alone_differ(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: there)
    called, original = [], products._onednn
    monkeypatch.setattr(products, "_onednn", lambda *args: called.append(args) or original(*args))
    for found, exact in zip(everything(), everything(torch.float64), strict=True):
        assert float((found - exact).norm() / exact.norm()) < 1e-6
    assert len(called) == (6 if there else 0), "forward, to inputs, to weights; nothing of the float64 ones"


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    inputs, gradients = torch.randn(96, WIDE), torch.randn(96, 2 * WIDE)
    wanted = gradients.double().t() @ inputs.double()
    found = weight_gradient(inputs.view(2, 48, WIDE), gradients.view(2, 48, -1), transposed)
    torch.testing.assert_close(found, (wanted.t() if transposed else wanted).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("maker", "capability", "wanted"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("GenuineIntel", "AVX512", False),
        ("AuthenticAMD", "AVX2", False),
        ("", "AVX512", False),
    ],
)
def test_the_processor_decides(maker: str, capability: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "of_processor", lambda field: maker)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert products._onednn_is_faster.__wrapped__() == (wanted and there)


def test_onednn_is_given_nothing_with_gaps() -> None:
    """Of a slice of columns it makes a product hundreds of times as slowly as of a copy."""
    matrix, batch = torch.randn(6, 8), torch.randn(2, 3, 8)
    for dense in (matrix, matrix.t(), matrix[2:], matrix[2:].t(), batch):
        assert products._dense(dense) is dense
    for gaps in (matrix[:, :5], matrix[:, 3:].t(), matrix[::2], batch[..., :5], batch.transpose(0, 1)):
        assert products._dense(gaps).is_contiguous()
        assert torch.equal(products._dense(gaps), gaps)


def test_small_products_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: 1 / 0)
    layer, hidden = nn.Linear(16, 24), torch.randn(2, 7, 16)
    with quick(layer), torch.no_grad():
        assert torch.equal(layer(hidden), nn.functional.linear(hidden, layer.weight, layer.bias))


def test_under_autocast_layers_multiply_as_they_would() -> None:
    """What is cast there is the layer's own affair, on the way back too; large enough for either library."""
    layer = nn.Linear(256, 128)
    inputs = torch.randn(160, 256, generator=torch.Generator().manual_seed(0))
    found = []
    for context in (nullcontext, lambda: quick(layer)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), context():
            output = layer(inputs)
            output.float().square().sum().backward()
        assert output.dtype == torch.bfloat16
        assert layer.weight.grad is not None
        found.append((output.detach(), layer.weight.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

"""Gradients folded on the way back are those of autograd, sample by sample, however a block reads its matrices."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from support import EXACT, FAMILIES, cases, make_job, tiny, tokens_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunebench.toolkit import sample_gradients, walk
from prunebench.toolkit.products import only_these, quick, weight_gradient
from prunebench.toolkit.sample_gradients import Reduce, SampleGradients, together

SAMPLES, LENGTH, WIDTH = 5, 4, 6


class Odd(nn.Module):
    """Two layers, one as GPT-2 stores it, and what may be done with them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(WIDTH, 8), Conv1D(WIDTH, 8)
            nn.init.normal_(self.first.bias)
            nn.init.normal_(self.second.bias)
        self.double()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.second(torch.tanh(self.first(hidden)))


class Twice(Odd):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.sin(super().forward(hidden)))


class Shared(Odd):
    """A layer that has its weight from another."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(WIDTH, 8).double()
        self.third.weight = self.first.weight
        nn.init.ones_(self.third.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + self.third(hidden).cos().sum(dim=-1, keepdim=True)


class Idle(Odd):
    """A layer that nobody calls."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.first(hidden)[..., :WIDTH]


class Beside(Odd):
    """A weight that is read by its layer and past it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + torch.sin(hidden @ self.first.weight.t()) @ self.first.weight


class Flat(Odd):
    """Tokens without a dimension of samples, and in another order."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.flatten(0, 1)
        return super().forward(tokens.flip(0)).flip(0).view_as(hidden)


class Routed(Odd):
    """A layer for tokens that lean one way, which the first sample may have none of."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen = hidden.sum(dim=-1) > 3
        outputs = hidden + self.first(hidden)[..., :WIDTH]
        return outputs.index_put((chosen,), self.second(self.first(hidden[chosen]))) if bool(chosen.any()) else outputs


def inputs() -> torch.Tensor:
    return torch.randn(SAMPLES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def losses(outputs: torch.Tensor) -> torch.Tensor:
    """Of each sample its own."""
    return torch.stack([torch.linalg.vector_norm(own) for own in outputs])


def folded(block: nn.Module, reduce: Reduce, at_once: int) -> tuple[list[torch.Tensor], list[int]]:
    """What is found, and how many samples went together."""
    found, sizes = SampleGradients([block.first.weight, block.second.weight], reduce), []
    for part in found.parts([inputs()], at_once):
        sizes.append(len(part))
        with found.taking(block):
            found.backward(len(part), losses(block(part)).sum())
    return found.reduced(), sizes


def plain(block: nn.Module, reduce: Reduce) -> list[torch.Tensor]:
    """A backward pass a sample."""
    weights = [block.first.weight, block.second.weight]
    each = [torch.autograd.grad(losses(block(x[None])).sum(), weights, materialize_grads=True) for x in inputs()]
    stacked = [torch.stack(of) for of in zip(*each, strict=True)]
    if reduce == "l1":
        return [of.abs().sum(dim=0) for of in stacked]
    return [(of.square().mean(dim=0) if reduce == "rms" else of.square().sum(dim=0)).sqrt() for of in stacked]


BLOCKS = [Odd, Twice, Shared, Idle, Beside, Flat, Routed]
APART = {Odd, Twice, Shared}
"""Of which several samples may go through together."""


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reduce", ["l1", "l2", "rms"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_are_autograds_own(block: type[Odd], reduce: Reduce, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_gradients, "together", lambda device, batch_size, length: batch_size)
    found, sizes = folded(block(), reduce, at_once)
    for own, wanted in zip(found, plain(block(), reduce), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-14)
    several = block in APART and at_once > 1
    assert sizes == ({2: [1, 2, 2], 5: [1, 4]}[at_once] if several else [1] * SAMPLES)


def test_the_plain_gradients_see_what_is_odd() -> None:
    """Each block's are others, so that a fold which missed the oddity would be seen."""
    for one, other in pairwise([plain(block(), "rms")[0] for block in BLOCKS if block not in (Flat, Routed)]):
        assert not torch.allclose(one, other, rtol=1e-3)


def test_samples_that_cannot_be_taken_apart_after_all_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_gradients, "together", lambda device, batch_size, length: batch_size)
    block = Odd()
    found = SampleGradients([block.first.weight, block.second.weight], "l1")
    with found.taking(block):
        found.backward(1, losses(block(inputs()[:1])).sum())
        with pytest.raises(RuntimeError, match="cannot be taken apart"):
            found.backward(2, losses(block.first(inputs()[:2])).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_of_a_replica_do_not_depend_on_the_batch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for size in (1, 2, 4):
        monkeypatch.setattr(sample_gradients, "together", lambda device, batch_size, length: batch_size)
        job = make_job(tiny(family, torch.float64), tokens_of(samples=5), batch_size=size)
        for block in walk(job):
            for matrix, gradient in block.replica().gradients(torch.linalg.vector_norm).items():
                torch.testing.assert_close(gradient, wanted.setdefault(matrix.name, gradient), **EXACT)
                assert not gradient.requires_grad


def test_no_more_than_one_matrix_of_one_sample_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient of the whole model, nor of a whole block: each is folded before the next is made."""
    alive, most = [0], [0]

    def counted(*args: Any) -> torch.Tensor:
        made = weight_gradient(*args)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(made, lambda: alive.__setitem__(0, alive[0] - 1))
        return made

    monkeypatch.setattr(sample_gradients, "weight_gradient", counted)
    folded(Odd(), "l1", 1)
    assert (alive, most) == ([0], [1])


def test_flags_hooks_and_forwards_are_as_before() -> None:
    block, seen = Odd(), []
    block.first.bias.requires_grad_(False)
    block.first.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    before = [parameter.requires_grad for parameter in block.parameters()]
    folded(block, "l1", 1)
    assert [parameter.requires_grad for parameter in block.parameters()] == before
    assert all(
        "forward" not in module.__dict__ and parameter.grad is None
        for module in block.modules()
        for parameter in module.parameters()
    )
    assert len(seen) == SAMPLES
    with pytest.raises(ZeroDivisionError), only_these(block, []), quick(block):
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in block.parameters()] == before
    assert "forward" not in block.first.__dict__


@pytest.mark.parametrize("block", [Odd, Twice, Shared])
def test_without_a_taker_autograd_finds_all_gradients(block: type[Odd]) -> None:
    """Of biases and inputs too."""
    found = []
    for context in (quick, lambda module: torch.enable_grad()):
        own, hidden = block(), inputs().requires_grad_()
        with context(own):  # type: ignore[operator]
            outputs = own(hidden)
        found.append([outputs, *torch.autograd.grad(losses(outputs).sum(), [hidden, *own.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_replaced_forward_is_left_alone() -> None:
    block = Odd()
    block.first.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], 8).double()  # type: ignore[method-assign]
    mine = block.first.forward
    with quick(block), torch.no_grad():
        assert block.first.forward is mine
        assert torch.equal(block(inputs()), inputs() + block.second.bias)
    assert block.first.forward is mine


@pytest.mark.parametrize(
    ("device", "length", "size"), cases({"host": ("cpu", 512, 1), "device": ("cuda", 512, 8), "long": ("cuda", 2048, 2)})
)
def test_how_many_go_together(device: str, length: int, size: int) -> None:
    assert together(torch.device(device), 8, length) == size

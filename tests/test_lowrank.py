"""Low-rank changes of a matrix against their formulas in plain autograd, in float64; and that they leave nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import EXACT, fingerprint, same_bits, traces
from torch import nn
from transformers.pytorch_utils import Conv1D

from prunebench.toolkit.lowrank import Kind, LowRank

OUTPUTS, INPUTS, RANK, ALPHA = 6, 10, 3, 12.0
KINDS: tuple[Kind, ...] = ("lora", "lora_prune", "mask_lora", "scale_lora")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_layer = pytest.mark.parametrize("layer", ["plain", "bias", "conv1d"])


def random_layer(layer: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    module: nn.Module = Conv1D(OUTPUTS, INPUTS) if layer == "conv1d" else nn.Linear(INPUTS, OUTPUTS, bias=layer == "bias")
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return module.requires_grad_(False)


def oriented(module: nn.Module) -> torch.Tensor:
    weight = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def change_of(module: nn.Module, kind: Kind, rank: int = RANK) -> LowRank:
    """With a mask of about half, which the weight does not show, and factors somewhere on their way."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(OUTPUTS, INPUTS, generator=generator) > 0.5
    found = LowRank(module, oriented(module), kind, rank, ALPHA, generator, None if kind == "lora" else mask)
    with torch.no_grad():
        for factor in found.parameters:
            factor += 0.3 * torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor.dtype)
    return found


def formula(change: LowRank, module: nn.Module, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The weight in training, [outputs, inputs]."""
    weight, product = oriented(module).to(down.dtype), up @ down
    if change.kind == "scale_lora":
        return weight * product
    mask = change._mask if change.kind == "mask_lora" else torch.ones_like(weight)
    return weight + ALPHA / RANK * mask * product


def plain(change: LowRank, module: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output and leaves (inputs, down, up) of the formula in float64."""
    leaves = [tensor.detach().double().requires_grad_(True) for tensor in (inputs, change.down, change.up)]
    bias = 0.0 if module.bias is None else module.bias.double()
    return leaves[0] @ formula(change, module, *leaves[1:]).t() + bias, leaves


def random_inputs(*leading: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*leading, INPUTS, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@every_kind
@every_layer
@pytest.mark.parametrize("leading", [(5,), (2, 3)], ids=["2-D", "3-D"])
def test_values_and_gradients_are_those_of_the_formula(kind: Kind, layer: str, leading: tuple[int, ...]) -> None:
    module = random_layer(layer)
    change, inputs = change_of(module, kind), random_inputs(*leading).requires_grad_(True)
    with change.installed():
        output = module(inputs)
        output.pow(3).sum().backward()
    wanted, leaves = plain(change, module, inputs)
    wanted.pow(3).sum().backward()
    torch.testing.assert_close(output, wanted, **EXACT)
    for found, leaf in zip((inputs, change.down, change.up), leaves, strict=True):
        torch.testing.assert_close(found.grad, leaf.grad, **EXACT)
    torch.testing.assert_close(change.changed_weight(), formula(change, module, change.down, change.up).detach(), **EXACT)


@every_kind
def test_gradients_add_up_over_backward_passes(kind: Kind) -> None:
    """And inputs that want no gradient get none."""
    module = random_layer("bias")
    change, inputs = change_of(module, kind), random_inputs(4)
    with change.installed():
        for piece in inputs.split(1):
            module(piece).pow(2).sum().backward()
    wanted, leaves = plain(change, module, inputs)
    wanted.pow(2).sum().backward()
    assert inputs.grad is None
    for found, leaf in zip(change.parameters, leaves[1:], strict=True):
        torch.testing.assert_close(found.grad, leaf.grad, **EXACT)


@every_kind
@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roughly_so_in_bfloat16(kind: Kind, layer: str, dtype: torch.dtype) -> None:
    """By autocast in a float32 layer, and in a layer of 16 bits; the factors and their gradients stay float32."""
    module = random_layer(layer, dtype)
    change, inputs = change_of(module, kind), random_inputs(2, 3, dtype=dtype).requires_grad_(True)
    with change.installed(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        output = module(inputs)
    output.float().pow(2).sum().backward()
    wanted, leaves = plain(change, module, inputs)
    wanted.pow(2).sum().backward()
    assert output.dtype == torch.bfloat16
    assert inputs.grad.dtype == inputs.dtype == dtype
    assert {factor.grad.dtype for factor in change.parameters} == {torch.float32}
    gradients = [(found.grad, leaf.grad) for found, leaf in zip((inputs, *change.parameters), leaves, strict=True)]
    for found, right in [(output.detach(), wanted.detach()), *gradients]:
        assert float((found.double() - right).abs().max()) < 0.02 * float(right.abs().max())


@every_kind
@every_layer
def test_merged(kind: Kind, layer: str) -> None:
    """As in training, and zero where the mask removes, whatever the weight has there."""
    module = random_layer(layer)
    change = change_of(module, kind)
    merged, wanted = change.merged_weight(), formula(change, module, change.down, change.up).detach()
    if kind == "lora":
        torch.testing.assert_close(merged, wanted, **EXACT)
    else:
        mask = change._mask
        torch.testing.assert_close(merged, wanted * mask, **EXACT)
        assert bool((merged[mask] != 0).all())


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_where_training_is_under_the_mask_merging_changes_nothing(kind: Kind) -> None:
    """For a weight that is zero where the mask removes."""
    module = random_layer("plain")
    change = change_of(module, kind)
    oriented(module).masked_fill_(~change._mask, 0)
    assert torch.equal(change.merged_weight(), change.changed_weight())


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_at_the_start_nothing_changes(kind: Kind, dtype: torch.dtype) -> None:
    """To the bit for every rank whose root is short; and the first step can move it."""
    module, inputs = random_layer("bias", dtype), random_inputs(3, dtype=dtype)
    change = LowRank(module, oriented(module), kind, 16, 32.0, torch.Generator().manual_seed(0))
    assert {factor.dtype for factor in change.parameters} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert (change.down.shape, change.up.shape) == ((16, INPUTS), (OUTPUTS, 16))
    with change.installed():
        output = module(inputs)
        output.double().pow(2).sum().backward()
    assert torch.equal(output, module(inputs))
    assert torch.equal(change.merged_weight().to(dtype), oriented(module))
    assert bool(change.up.grad.any())


def test_scale_lora_starts_at_one_for_any_rank() -> None:
    module = random_layer("plain", torch.float32)
    change = LowRank(module, oriented(module), "scale_lora", 7, 1.0, torch.Generator())
    torch.testing.assert_close(change.merged_weight(), oriented(module), rtol=1e-6, atol=0)


def test_the_start_is_drawn_from_the_generator() -> None:
    """Within Kaiming's bound, and alike for one seed whatever the weight."""
    first, again, other = (
        LowRank(module, oriented(module), "lora", 200, 1.0, torch.Generator().manual_seed(seed)).down.detach()
        for module, seed in [(random_layer("plain"), 0), (random_layer("conv1d"), 0), (random_layer("plain"), 1)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    bound = INPUTS**-0.5
    assert 0.99 * bound < float(first.abs().max()) <= bound
    assert abs(float(first.mean())) < 0.05 * bound


@every_kind
@every_layer
def test_nothing_is_left_on_the_module(kind: Kind, layer: str) -> None:
    module = random_layer(layer)
    before, state = fingerprint(module), traces(module)
    change, inputs = change_of(module, kind), random_inputs(3).requires_grad_(True)
    with change.installed():
        module(inputs).sum().backward()
        assert fingerprint(module).keys() == before.keys()  # the factors are no parameters of it
    with pytest.raises(RuntimeError), change.installed():
        module(torch.zeros(3, INPUTS + 1))
    assert "forward" not in vars(module)
    assert traces(module) == state
    assert all(same_bits(tensor, before[name]) for name, tensor in fingerprint(module).items())


def test_a_forward_that_was_there_comes_back() -> None:
    module = random_layer("plain")

    def earlier(inputs: torch.Tensor) -> torch.Tensor:
        return inputs

    module.forward = earlier
    with change_of(module, "lora").installed():
        assert module.forward is not earlier
    assert module.forward is earlier


@every_kind
def test_for_the_backward_pass_only_the_inputs_are_kept(kind: Kind) -> None:
    """Nothing as large as the matrix: a deep model would keep that many."""
    module = random_layer("bias")
    change, inputs, kept = change_of(module, kind), random_inputs(4).requires_grad_(True), []

    def keep(tensor: torch.Tensor) -> Any:
        kept.append(tuple(tensor.shape))
        return tensor

    with change.installed(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(inputs)
    assert sorted(kept) == sorted([(4, INPUTS), (RANK, INPUTS), (OUTPUTS, RANK)])


@pytest.mark.parametrize(("kind", "gradient"), [("mask_lora", False), ("scale_lora", False), ("lora_prune", True)])
def test_what_the_mask_removes_has_no_part_in_training(kind: Kind, gradient: bool) -> None:
    """Rank one in a single column: its gradient is zero exactly where the column is removed (but in `lora_prune`)."""
    module = random_layer("plain")
    change = change_of(module, kind, rank=1)
    change._mask[:, 4] = False
    oriented(module).masked_fill_(~change._mask, 0)
    with change.installed():
        module(random_inputs(5)).pow(2).sum().backward()
    assert bool(change.down.grad[0, 4]) == gradient
    assert bool(change.down.grad[0].any())

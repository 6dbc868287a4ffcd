"""The training loop: learning rates, batches, steps against AdamW by hand, what each subset trains, and what it declines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from support import PlainModel, fingerprint, traces
from torch import nn

from prunebench.errors import NonFiniteError, OptionError, RunError
from prunebench.options import build, canonical, parse_step
from prunebench.spec import Changes, Job
from prunebench.testing import make_job, random_tokens, tiny_model
from prunebench.toolkit import Retraining
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.lowrank import LowRank
from prunebench.toolkit.recovery import next_token_loss, shuffled
from prunebench.toolkit.retrain import (
    CURVE_POINTS,
    Cast,
    OwnParameters,
    Part,
    Scope,
    Trained,
    frozen,
    parts_of,
    train,
    whole_model,
)
from prunebench_pruners.perp import Perp


class PlainAdam:
    """AdamW without decay (Kingma & Ba 2015, algorithm 1) after clipping to a norm of 1, number by number."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self.values, self.steps = list(values), 0
        self.first = [torch.zeros_like(value) for value in values]
        self.second = [torch.zeros_like(value) for value in values]

    def step(self, gradients: Sequence[torch.Tensor], rate: float) -> None:
        self.steps += 1
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))
        for value, gradient, m, v in zip(self.values, gradients, self.first, self.second, strict=True):
            clipped = gradient * min(1.0, 1.0 / (norm + 1e-6))
            m.copy_(0.9 * m + 0.1 * clipped)
            v.copy_(0.999 * v + 0.001 * clipped**2)
            value -= rate * (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)


# Learning rates


@pytest.mark.parametrize(
    ("schedule", "later"),
    [("llr", [k / 18 for k in range(18, 0, -1)]), ("clr", [(1 + math.cos(math.pi * k / 18)) / 2 for k in range(18)])],
)
def test_rates_of_twenty_steps(schedule: Any, later: list[float]) -> None:
    """Two of warm-up, the second at the top; eighteen down, the last above zero."""
    settings = Retraining(steps=20, learning_rate=0.3, schedule=schedule)
    assert [settings.rate(step) for step in range(20)] == pytest.approx([0.3 * share for share in [0.5, 1.0, *later]])


@pytest.mark.parametrize("schedule", ["llr", "clr"])
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 40, 1000])
def test_rates_rise_for_a_tenth_and_then_fall(schedule: Any, steps: int) -> None:
    settings = Retraining(steps=steps, learning_rate=2.0, schedule=schedule)
    rates, top = [settings.rate(step) for step in range(steps)], math.ceil(steps / 10)
    assert max(rates) == rates[top - 1] == 2.0
    assert min(rates) > 0
    assert rates[:top] == sorted(rates[:top])
    assert rates[top - 1 :] == sorted(rates[top - 1 :], reverse=True)
    assert steps < 10 or rates[-1] < 0.25 * 2.0
    if top > 1:
        assert rates[0] == pytest.approx(1 - math.cos(math.pi / top))


def test_default_rates() -> None:
    """Ours, by subset (issue 3); one that is given counts, also zero."""
    wanted = {"biases": 5e-4, "norms": 5e-4, "biases+norms": 5e-4, "all": 1e-5, "head": 1e-4, "mask_lora": 1e-4}
    for subset, rate in wanted.items():
        assert Retraining(cast(Any, subset)).highest_rate() == rate
    assert Retraining("all", learning_rate=0.0).highest_rate() == 0.0


# Batches


def test_every_window_is_seen_once_an_epoch_in_a_new_order() -> None:
    windows = torch.arange(7).unsqueeze(1).expand(7, 4)
    batches = list(itertools.islice(shuffled(windows, 3, torch.Generator().manual_seed(0), torch.device("cpu")), 14))
    assert {batch.shape for batch in batches} == {(3, 4)}
    seen = torch.cat(batches)[:, 0].view(6, 7).tolist()
    assert all(sorted(epoch) == list(range(7)) for epoch in seen)
    assert len({tuple(epoch) for epoch in seen}) == 6
    assert seen[0] != list(range(7))


def test_a_batch_may_be_larger_than_the_text_and_seeds_differ() -> None:
    windows = torch.arange(4).unsqueeze(1)
    first, again, other = (
        next(shuffled(windows, 10, torch.Generator().manual_seed(seed), torch.device("cpu"))).flatten().tolist()
        for seed in (0, 0, 1)
    )
    assert sorted(first[:4]) == sorted(first[4:8]) == [0, 1, 2, 3]
    assert first == again != other


# Steps


def some_job(batch_size: int = 2) -> Job:
    return make_job(Perp(), tiny_model(), batch_size=batch_size)


def layer_scope(*, kept: torch.Tensor | None = None) -> tuple[Scope, nn.Linear, Part]:
    """A linear layer in float64 that trains its weight, under a mask if given."""
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    layer.weight.data = torch.arange(12.0, dtype=torch.float64).view(3, 4) / 10
    masks = {} if kept is None else {id(layer.weight): kept}
    return Scope(layer, {}, {}), layer, OwnParameters([layer.weight], masks)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3], ids="times {:g}".format)
def test_steps_are_those_of_adamw_after_clipping(size: float) -> None:
    """Gradients far below, around and far above the norm at which they are cut, different in each step."""
    generator = torch.Generator().manual_seed(0)
    directions = size * torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    scope, layer, part = layer_scope()
    mine = PlainAdam([layer.weight.detach().clone()])
    settings = Retraining(steps=5, learning_rate=0.1)
    train(settings, scope, [part], iter(directions.unsqueeze(1)), lambda piece: (layer.weight * piece[0]).sum(), some_job())
    for step, direction in enumerate(directions):
        mine.step([direction], [0.1, 0.1, 0.075, 0.05, 0.025][step])
    torch.testing.assert_close(layer.weight.detach(), mine.values[0], rtol=1e-12, atol=1e-13)


def test_cutting_counts_all_parts_together() -> None:
    """Else each part's own norm would be cut to 1; the second step tells, as Adam's first forgets the size."""
    layers = [nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in range(2)]
    parts = [OwnParameters([layer.weight]) for layer in layers]
    mine = PlainAdam([layer.weight.detach().clone() for layer in layers])
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 9.0]).view(2, 1, 1, 1)

    def loss(piece: torch.Tensor) -> torch.Tensor:
        return sum((layer.weight * part).sum() for layer, part in zip(layers, piece[0], strict=True))

    settings = Retraining(steps=2, learning_rate=0.1)
    train(settings, Scope(nn.ModuleList(layers), {}, {}), parts, iter(directions.unsqueeze(1)), loss, some_job())
    for direction in directions:
        mine.step(list(direction), 0.1)
    for layer, value in zip(layers, mine.values, strict=True):
        torch.testing.assert_close(layer.weight.detach(), value, rtol=1e-12, atol=1e-13)


def test_what_the_mask_removes_neither_moves_nor_counts_for_the_norm() -> None:
    """With gradients everywhere, and far larger ones where it removes."""
    kept = torch.tensor([[True, False, True, False]] * 3)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64).masked_fill(~kept, 1e6)
    scope, layer, part = layer_scope(kept=kept)
    layer.weight.data[~kept] = 0
    part = OwnParameters([layer.weight], {id(layer.weight): kept})
    mine = PlainAdam([layer.weight.detach().clone()])
    settings = Retraining(steps=4, learning_rate=0.1)
    train(settings, scope, [part], iter(directions.unsqueeze(1)), lambda piece: (layer.weight * piece[0]).sum(), some_job())
    for step, direction in enumerate(directions):
        mine.step([direction * kept], settings.rate(step))
    assert not bool(layer.weight[~kept].any())
    torch.testing.assert_close(layer.weight.detach(), mine.values[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("subset", ["mask_lora", "all", "norms", "head"])
def test_pieces_of_any_size_give_the_same(subset: Any) -> None:
    """Also one that does not divide the batch."""
    found = []
    for batch_size in (5, 1, 2, 3):
        model = tiny_model("gpt2", dtype=torch.float64)
        method = Perp(subset, steps=3, batch=5, learning_rate=0.01)
        notes: dict[str, Any] = {}
        method.prune(make_job(method, model, batch_size=batch_size, notes=notes))
        found.append((notes["loss_curve"], fingerprint(model)))
    (whole_curve, whole), *others = found
    for curve, values in others:
        assert curve == pytest.approx(whole_curve, rel=1e-5)
        for name, value in whole.items():
            torch.testing.assert_close(values[name], value, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_of_sixteen_bits_add_up_in_thirty_two() -> None:
    """In bfloat16, 1 + 1/512 is 1."""
    owned = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    part = OwnParameters([owned])
    for gradient in (1.0, 1 / 512, 1 / 512):
        owned.grad = torch.full_like(owned, gradient)
        part.collect_gradients()
        assert owned.grad is None
    assert part.parameters[0].grad.tolist() == [1 + 1 / 256] * 3
    assert part.parameters[0].dtype == torch.float32


def test_steps_too_small_for_sixteen_bits_add_up() -> None:
    """100 steps of 1/1000 from 1: each alone vanishes in bfloat16."""
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data.fill_(1.0)
    part = OwnParameters([layer.weight])
    settings = Retraining(steps=100, learning_rate=1e-3)
    train(settings, Scope(layer, {}, {}), [part], iter(torch.ones(100, 1, 1)), lambda piece: -layer.weight.sum(), some_job())
    expected = 1 + sum(settings.rate(step) for step in range(100))
    assert float(part.parameters[0].detach()) == pytest.approx(expected, rel=1e-4)
    assert float(layer.weight.detach()) == pytest.approx(expected, rel=1 / 256)
    assert float(layer.weight.detach()) > 1.04


def test_no_steps_touch_nothing_and_read_nothing() -> None:
    scope, layer, part = layer_scope()
    before = layer.weight.detach().clone()

    def never(piece: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked for a loss")

    found = train(Retraining(steps=0), scope, [part], iter(()), never, some_job())
    assert found == Trained(12, ())
    assert found.curve() == []
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("subset", ["all", "mask_lora", "head", "biases+norms"])
def test_the_model_is_left_as_it_was_but_for_numbers(subset: Any) -> None:
    """No hook, no replaced forward, no gradient, flags as found; also when the loss raises."""
    model = tiny_model("qwen2")
    model.get_input_embeddings().weight.requires_grad_(False)
    job = make_job(Perp(subset), model)
    before = traces(model)
    scope, settings = whole_model(job), Retraining(subset, steps=2, batch=2)
    parts = parts_of(settings, scope, torch.Generator())
    batches = shuffled(job.training, 2, torch.Generator(), job.device)
    train(settings, scope, parts, batches, next_token_loss(model), job)
    assert traces(model) == before

    def broken(piece: torch.Tensor) -> torch.Tensor:
        next_token_loss(model)(piece).backward()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train(settings, scope, parts, batches, broken, job)
    assert traces(model) == before
    assert not any(name for name, p in model.named_parameters() if p.grad is not None)


def test_a_loss_that_is_no_number_says_at_which_step() -> None:
    scope, layer, part = layer_scope()
    factors = iter(torch.tensor([1.0, 1.0, math.nan, 1.0], dtype=torch.float64).view(4, 1))
    with pytest.raises(NonFiniteError, match="nan at step 3 of 4"):
        train(Retraining(steps=4), scope, [part], factors, lambda piece: (layer.weight * piece[0]).sum(), some_job())


def test_the_loss_is_the_mean_over_later_tokens() -> None:
    """Against the model's own; in float32 where the model has 16 bits."""
    model = tiny_model("llama", dtype=torch.float64)
    tokens = random_tokens(model)
    with torch.no_grad():
        own = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        assert float(next_token_loss(model)(tokens)) == pytest.approx(float(own), rel=1e-6)
        assert next_token_loss(model.to(torch.bfloat16))(tokens).dtype == torch.float32


def test_precision_is_that_of_the_products() -> None:
    """By autocast: another curve, near the first; what is trained stays float32."""
    curves = []
    for precision in ("model", "bfloat16"):
        notes: dict[str, Any] = {}
        method = Perp("mask_lora", steps=3, batch=4, learning_rate=0.01, precision=cast(Any, precision))
        model = tiny_model()
        method.prune(make_job(method, model, notes=notes))
        assert model.dtype == torch.float32
        curves.append(notes["loss_curve"])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


def test_the_curve_has_at_most_fifty_points() -> None:
    assert Trained(1, (3.0, 2.0, 1.123456)).curve() == [3.0, 2.0, 1.12346]
    many = Trained(1, tuple(float(i) for i in range(120))).curve()
    assert len(many) == 40 <= CURVE_POINTS
    assert many[:2] == [1.0, 4.0]
    assert len(Trained(1, (1.0,) * 1001).curve()) <= CURVE_POINTS


def test_what_survives_the_cast() -> None:
    before = torch.ones(4, dtype=torch.bfloat16)
    cast_ = Cast()
    cast_.count(torch.tensor([1.0, 1.0001, 1.1, 2.0]), before)
    assert (cast_.changed, cast_.survived) == (3, 2)
    cast_.count(torch.tensor([1.0, 1.0001, 1.0, 1.0]), before)
    assert cast_.share == 0.5
    assert Cast().share == 1.0


# What moves


def trained_names(family: str, subset: Any) -> set[str]:
    model = tiny_model(family)
    job = make_job(Perp(subset), model)
    (part,) = parts_of(Retraining(subset), whole_model(job), torch.Generator())
    assert isinstance(part, OwnParameters)
    owned = {id(parameter) for parameter in part._owned}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "opt", "gpt2", "gpt-neox", "falcon"])
def test_subsets_by_name(family: str) -> None:
    """Norms by their weights, biases everywhere (those of norms too), never embeddings or the head."""
    model = tiny_model(family)
    every = {name for name, _ in model.named_parameters()}
    matrices = {f"{matrix.name}.weight" for matrix in find_anatomy(model).matrices}
    embeddings = {name for name in every if any(part in name for part in ("embed", "wte", "wpe", "lm_head"))}
    biases = {name for name in every if name.endswith(".bias")}
    norms = every - matrices - embeddings - biases
    assert norms
    assert trained_names(family, "norms") == norms
    assert trained_names(family, "biases+norms") == biases | norms
    assert trained_names(family, "all") == biases | norms | matrices
    if biases:
        assert trained_names(family, "biases") == biases


@pytest.mark.parametrize("subset", ["mask_lora", "scale_lora", "lora_prune"])
def test_low_rank_subsets_are_every_prunable_matrix(subset: Any) -> None:
    model = tiny_model("gpt2")
    job = make_job(Perp(subset), model)
    parts = parts_of(Retraining(subset, rank=3), whole_model(job), torch.Generator())
    assert all(isinstance(part, LowRank) and part.kind == subset for part in parts)
    shapes = [(part.up.shape[0], part.down.shape[1]) for part in parts if isinstance(part, LowRank)]
    assert shapes == [matrix.shape for matrix in job.anatomy.matrices]
    assert {part.down.shape[0] for part in parts if isinstance(part, LowRank)} == {3}


def test_what_is_declared() -> None:
    assert Retraining("biases").changed() == Changes.BIASES
    assert Retraining("norms").changed() == Changes.NORMS
    assert Retraining("biases+norms").changed() == Changes.BIASES | Changes.NORMS
    assert Retraining("head").changed() == Changes.HEAD
    assert Retraining("all").changed() == Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS
    for subset in ("mask_lora", "scale_lora", "lora_prune"):
        assert Retraining(cast(Any, subset)).changed() == Changes.KEPT_WEIGHTS


def test_a_subset_that_is_not_there() -> None:
    """Biases by the facts, before anything starts; a model without norms when they are looked for."""
    facts = find_anatomy(tiny_model("llama")).facts(make_job(Perp(), tiny_model()).target)
    assert Retraining("biases").misfit(facts) == (
        "a llama model has no biases, so there is nothing that subset=biases could train."
    )
    assert Retraining("biases+norms").misfit(facts) is None
    assert Retraining("biases").misfit(find_anatomy(tiny_model("opt")).facts(facts.target)) is None
    model = PlainModel()
    with pytest.raises(RunError, match="nothing that subset=norms could train"):
        parts_of(Retraining("norms"), Scope(model, {}, {}), torch.Generator())


@pytest.mark.parametrize("wrong", ["steps=-1", "batch=0", "rank=0", "learning_rate=-1", "subset=embedding", "schedule=ft"])
def test_numbers_that_mean_nothing(wrong: str) -> None:
    with pytest.raises(OptionError):
        build(Perp, parse_step(f"perp[{wrong}]"))


def test_written_as_options() -> None:
    step = "perp[subset=biases+norms,steps=60,batch=4,learning_rate=0.0003,schedule=clr]"
    assert canonical("perp", build(Perp, parse_step(step))) == step
    assert canonical("perp", build(Perp, parse_step("perp[learning_rate=none,rank=16]"))) == "perp"


def test_frozen_gives_each_parameter_its_flag_back() -> None:
    model = tiny_model()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    with frozen(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == [
        index % 2 == 0 for index, _ in enumerate(model.parameters())
    ]

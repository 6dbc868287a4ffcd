"""Wanda++ against slow formulas in float64, against Wanda where it must be Wanda, and on a trained model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from support import EXACT, changed, fingerprint, make_job, masks_of, same_bits, tiny, tokens_of
from test_golden import GOLDEN, golden_job
from torch import nn
from transformers import PreTrainedModel

from prunebench.errors import OptionError
from prunebench.options import build, parse_step
from prunebench.spec import Changes, Job, Needs
from prunebench.targets import NM, Dense, Target, Unstructured
from prunebench.testing.lanes import LateLane
from prunebench.toolkit import InputNorm, keep_mask, regional, walk
from prunebench.toolkit.placement import HostActivations, Resident
from prunebench.toolkit.regional import RmsProp
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

TARGETS: list[Target] = [Unstructured(0.5), NM(2, 4)]
SMALL = {"rounds": 2, "ro_samples": 3}
"""RO that is quick."""


def pruned(
    options: dict[str, Any],
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    target: Target = TARGETS[0],
    samples: int = 5,
    **job_options: Any,
) -> tuple[Job, dict[str, Any]]:
    """A tiny model after wanda++, and what was noted."""
    job = make_job(tiny(family, dtype), tokens_of(samples), target=target, **job_options)
    notes: dict[str, Any] = {}
    job.note = notes.__setitem__
    WandaPlusPlus(**options).prune(job)
    return job, notes


def same_masks(one: Job, other: Job) -> bool:
    first, second = masks_of(one), masks_of(other)
    assert first.keys() == second.keys()
    return all(torch.equal(mask, second[name]) for name, mask in first.items())


def same_weights(one: Job, other: Job) -> bool:
    return all(same_bits(a.weight, b.weight) for a, b in zip(one.anatomy.matrices, other.anatomy.matrices, strict=True))


# Where it is something simpler


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{"alpha": 0.0, "ro": False}, {"rgs": False, "ro": False}], ids=str)
def test_without_gradients_and_optimisation_it_is_wanda(
    family: str, target: Target, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    job, notes = pruned(options, family, dtype, target)
    wanda = make_job(tiny(family, dtype), tokens_of(), target=target)
    Wanda().prune(wanda)
    assert same_masks(job, wanda)
    assert same_weights(job, wanda)
    assert not notes


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("options", [{}, {"rgs": False}, {"restart": "dense"}, {"act_norm": "mean"}], ids=str)
def test_a_learning_rate_of_zero_is_the_scoring_alone(target: Target, options: dict[str, Any]) -> None:
    still, _ = pruned({"learning_rate": 0.0, **options}, dtype=torch.float32, target=target)
    alone, _ = pruned({"ro": False, **options}, dtype=torch.float32, target=target)
    assert same_weights(still, alone)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_so_is_one_that_moves_nothing_when_every_sample_is_drawn(target: Target) -> None:
    """The rounds themselves, scored on the block as it is, lay the mask of the scoring alone and keep it."""
    still, notes = pruned({"learning_rate": 1e-40}, target=target)
    alone, _ = pruned({"ro": False}, target=target)
    assert same_masks(still, alone)
    assert notes["held_out_samples"] == [0, 0, 0]
    assert "every calibration sample" in notes["block_error"]


@pytest.mark.parametrize("target", [Unstructured(0.0), Dense()], ids=str)
def test_where_nothing_is_removed_nothing_is_trained(target: Target) -> None:
    """The block is its own teacher: there is nothing to learn but rounding errors, which RMSprop would scale up."""
    model = tiny(dtype=torch.float32)
    before = fingerprint(model)
    WandaPlusPlus(learning_rate=0.1).prune(make_job(model, tokens_of(), target=target))
    assert not changed(model, before)


def test_alpha_and_the_norms_weigh_as_written() -> None:
    """Summed norms are sqrt(samples) times the mean ones, so they take an alpha as much larger."""
    plain, _ = pruned({"ro": False, "act_norm": "mean", "alpha": 3.0})
    summed, _ = pruned({"ro": False, "act_norm": "sum", "alpha": 3.0 * 5**0.5})
    other, _ = pruned({"ro": False, "act_norm": "sum", "alpha": 3.0})
    assert same_masks(plain, summed)
    assert not same_masks(plain, other)


# Against slow formulas


def kept(scores: torch.Tensor, target: Target) -> torch.Tensor:
    """A keep mask by a stable sort, row by row or group by group."""
    columns = scores.shape[1]
    groups = scores.reshape(-1, target.of) if isinstance(target, NM) else scores
    count = target.of - target.keep if isinstance(target, NM) else int(columns * target.sparsity)
    order = groups.argsort(dim=1, stable=True)
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order[:, :count], False)
    return mask.view(scores.shape)


class SlowBlock:
    """A Llama block as a function of its weights, one sample at a time."""

    def __init__(self, model: PreTrainedModel, index: int, tokens: torch.Tensor) -> None:
        seen: dict[str, Any] = {}
        layer = model.model.layers[index]
        handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        with torch.no_grad():
            states = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
        handle.remove()
        self.inputs = states[index].detach()
        self.kwargs = {"position_embeddings": tuple(part[:1] for part in seen["position_embeddings"])}
        self.module = copy.deepcopy(layer)
        self.names = [name for name, inner in layer.named_modules() if isinstance(inner, nn.Linear)]
        self.dense = {name: layer.get_submodule(name).weight.detach().clone() for name in self.names}

    def __call__(self, weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        return torch.func.functional_call(self.module, named, (sample[None],), self.kwargs)

    def gradients(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        each = [torch.func.grad(lambda w, x: self(w, x).square().sum().sqrt())(weights, sample) for sample in self.inputs]
        return {name: torch.stack([of[name] for of in each]).square().mean(dim=0).sqrt() for name in self.names}

    def norms(self, weights: dict[str, torch.Tensor], samples: list[int]) -> dict[str, torch.Tensor]:
        """`||X_j||_2` over all tokens of the samples."""
        squares: dict[str, torch.Tensor] = {}

        def see(name: str, _: nn.Module, args: tuple[torch.Tensor]) -> None:
            squares[name] = squares.get(name, torch.zeros(())) + args[0].square().flatten(0, -2).sum(dim=0)

        handles = [self.module.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in self.names]
        for sample in samples:
            self(weights, self.inputs[sample])
        for handle in handles:
            handle.remove()
        return {name: of.detach().sqrt() for name, of in squares.items()}


def slow_wanda_plus_plus(job: Job, pruner: WandaPlusPlus) -> None:
    """The method from its definition, for a float64 Llama model."""
    generator = torch.Generator().manual_seed(job.seed)
    everything = list(range(len(job.calibration)))
    for index, layer in enumerate(job.model.model.layers):
        block = SlowBlock(job.model, index, job.calibration)
        values = {name: weight.clone() for name, weight in block.dense.items()}
        shown = values
        squares = {name: torch.zeros_like(weight) for name, weight in values.items()}
        gradients = block.gradients(shown)
        draws = [
            torch.randperm(len(everything), generator=generator)[: pruner.ro_samples].tolist() for _ in range(pruner.rounds)
        ]

        def masks(samples: list[int]) -> dict[str, torch.Tensor]:
            divisor = len(samples) ** 0.5 if pruner.act_norm == "mean" else 1.0
            norms = block.norms(shown, samples)  # noqa: B023 - called within the loop's turn
            return {
                name: kept((pruner.alpha * gradients[name] + norms[name] / divisor) * values[name].abs(), job.target)  # noqa: B023
                for name in block.names  # noqa: B023
            }

        for drawn in draws:
            mask = masks(drawn)
            if pruner.restart == "zero":
                shown = values = {name: weight * mask[name] for name, weight in values.items()}
            else:
                shown = {name: weight * mask[name] for name, weight in values.items()}
            for sample in drawn:
                hidden = block.inputs[sample]
                found = torch.func.grad(lambda w, x: (block(w, x) - block(block.dense, x)).square().sum())(shown, hidden)  # noqa: B023
                for name, gradient in found.items():
                    squares[name] = 0.99 * squares[name] + 0.01 * gradient.square()
                    values[name] = values[name] - pruner.learning_rate * gradient / (squares[name].sqrt() + 1e-8)
                if pruner.restart == "dense":
                    shown = {name: weight * mask[name] for name, weight in values.items()}
        if pruner.refresh_gradient:
            gradients = block.gradients(shown)
        for name, mask_of in masks(everything).items():
            layer.get_submodule(name).weight.data.copy_(values[name] * mask_of)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-2, "act_norm": "mean", "refresh_gradient": True},
        {"learning_rate": 1e-2, "restart": "dense"},
        {"learning_rate": 1e-2, "restart": "dense", "refresh_gradient": True, "rounds": 3},
    ],
    ids=str,
)
def test_it_is_what_its_definition_says(target: Target, options: dict[str, Any]) -> None:
    options = SMALL | options
    job, _ = pruned(options, target=target, seed=3)
    slow = make_job(tiny(dtype=torch.float64), tokens_of(), target=target, seed=3)
    slow_wanda_plus_plus(slow, WandaPlusPlus(**options))
    for ours, wanted in zip(job.anatomy.matrices, slow.anatomy.matrices, strict=True):
        assert torch.equal(ours.weight != 0, wanted.weight != 0), ours.name
        torch.testing.assert_close(ours.weight, wanted.weight, rtol=1e-7, atol=1e-9)
    alone, _ = pruned({"ro": False}, target=target)
    assert not same_masks(job, alone), "the test would not see a mask that does not move"


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_score_has_the_gradients_of_torch_func(target: Target) -> None:
    """Of each sample by itself; with an alpha that leaves little to the norms."""
    job, _ = pruned({"ro": False, "alpha": 1e6, "act_norm": "mean"}, target=target)
    plain = make_job(tiny(dtype=torch.float64), tokens_of(), target=target)
    block = SlowBlock(plain.model, 0, plain.calibration)
    gradients = block.gradients(block.dense)
    for name in block.names:
        mask = masks_of(job)[f"model.layers.0.{name}"]
        assert torch.equal(mask, kept(gradients[name] * block.dense[name].abs(), target)), name


# What a replica and a block give


def test_statistics_of_a_replica_on_chosen_samples() -> None:
    job = make_job(tiny(dtype=torch.float64), tokens_of())
    for block in walk(job):
        chosen = [3, 0, 3]
        inputs = block.inputs(chosen)
        everything = torch.cat(list(block.batches()))
        assert torch.equal(inputs, everything[chosen])
        inputs.zero_()
        assert torch.equal(block.inputs(chosen), everything[chosen]), "what is given is a copy"
        replica = block.replica()
        matrix = block.matrices[-1]
        with torch.no_grad():
            replica.parameter(block.matrices[0]).zero_()
        reads: list[torch.Tensor] = []
        handle = replica.inner(matrix).register_forward_pre_hook(lambda _, args: reads.append(args[0]))  # noqa: B023
        for sample in everything[chosen]:
            replica.forward(sample[None])
        handle.remove()
        wanted = (torch.stack(reads).flatten(0, -2).square().sum(dim=0) / 3).sqrt()
        found = replica.collect(InputNorm, inputs=everything[chosen])
        assert list(found) == block.matrices
        torch.testing.assert_close(found[matrix], wanted.detach(), **EXACT)
        assert not torch.allclose(block.collect(InputNorm)[matrix], replica.collect(InputNorm)[matrix])


# What RO leaves


@pytest.mark.parametrize("restart", ["zero", "dense"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [Unstructured(0.6), NM(2, 4), NM(1, 4)], ids=str)
def test_the_target_is_met_exactly(restart: str, family: str, target: Target) -> None:
    job, _ = pruned({"learning_rate": 0.03, "restart": restart, **SMALL}, family, torch.float32, target)
    for matrix in job.anatomy.matrices:
        zeros = matrix.weight == 0
        if isinstance(target, NM):
            assert bool((zeros.reshape(len(zeros), -1, target.of).sum(dim=-1) == target.of - target.keep).all())
        else:
            assert zeros.sum(dim=1).tolist() == [int(zeros.shape[1] * 0.6)] * len(zeros)


@pytest.mark.parametrize("restart", ["zero", "dense"])
def test_what_an_earlier_step_removed_stays_removed(restart: str) -> None:
    job = make_job(tiny("gpt2"), tokens_of())
    for matrix in job.anatomy.matrices:
        noise = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(2))
        matrix.keep(keep_mask(noise, Unstructured(0.3)))
    gone = {matrix.name: matrix.weight == 0 for matrix in job.anatomy.matrices}
    job.masks = job.anatomy.masks.copy()  # type: ignore[attr-defined]
    WandaPlusPlus(learning_rate=0.03, restart=restart, **SMALL).prune(job)  # type: ignore[arg-type]
    for matrix in job.anatomy.matrices:
        zeros = matrix.weight == 0
        assert bool(zeros[gone[matrix.name]].all())
        assert zeros.sum(dim=1).tolist() == [zeros.shape[1] // 2] * len(zeros)


def test_the_draws_are_the_seeds_alone() -> None:
    found = []
    for stir, seed in [(1, 0), (2, 0), (1, 4)]:
        with torch.random.fork_rng([]):
            torch.manual_seed(stir)
            state = torch.get_rng_state()
            job, _ = pruned({"learning_rate": 1e-3, **SMALL}, dtype=torch.float32, seed=seed)
            assert torch.equal(state, torch.get_rng_state())
        found.append(job)
    assert same_weights(found[0], found[1])
    assert not same_weights(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_small_changes_vanish_in_the_cast_and_that_is_seen(dtype: torch.dtype) -> None:
    shares = {}
    for learning_rate in (3e-7, 3e-3):
        job, notes = pruned({"learning_rate": learning_rate, "ro_samples": 2}, dtype=dtype)
        assert {matrix.weight.dtype for matrix in job.anatomy.matrices} == {dtype}
        shares[learning_rate] = notes["kept_weights_changed"], notes["kept_weights_changed_after_cast"]
    assert shares[3e-7][0] > 0.5, "the student is in float32"
    assert shares[3e-7][1] < 0.1
    assert shares[3e-3][1] > 0.5
    job, notes = pruned({"learning_rate": 3e-7, "ro_samples": 2}, dtype=torch.float32)
    assert notes["kept_weights_changed"] == notes["kept_weights_changed_after_cast"] > 0.9


def test_the_share_that_survives_is_that_of_the_model() -> None:
    """Counted anew from the weights before and after."""
    dense = {matrix.name: matrix.weight.clone() for matrix in make_job(tiny(dtype=torch.bfloat16)).anatomy.matrices}
    job, notes = pruned({"learning_rate": 1e-4, **SMALL}, dtype=torch.bfloat16)
    survivors = sum(int((matrix.weight != 0).sum()) for matrix in job.anatomy.matrices)
    moved = sum(int(((m.weight != 0) & (m.weight != dense[m.name])).sum()) for m in job.anatomy.matrices)
    assert notes["kept_weights_changed_after_cast"] == pytest.approx(moved / survivors)
    assert 0 < moved < survivors


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no trained model: {GOLDEN} is not there")
@pytest.mark.parametrize(("target", "restart"), [("0.5", "dense"), ("2:4", "zero")])
def test_optimisation_lowers_the_error_of_each_block_on_samples_it_has_not_seen(target: str, restart: str) -> None:
    job = golden_job("stories260K", target)
    job.calibration_tokens = job.calibration[:16, :128]
    notes: dict[str, Any] = {}
    job.note = notes.__setitem__
    WandaPlusPlus(learning_rate=3e-4, rounds=3, ro_samples=4, restart=restart).prune(job)  # type: ignore[arg-type]
    assert all(1 <= count <= 8 for count in notes["held_out_samples"])
    before, after = notes["block_error_before"], notes["block_error_after"]
    assert len(before) == len(after) == len(job.anatomy.blocks)
    assert all(0 < later < 0.9 * earlier for earlier, later in zip(before, after, strict=True)), (before, after)
    assert notes["kept_weights_changed"] > 0.99


def test_the_noted_errors_are_those_of_the_block() -> None:
    """Of the first block, whose inputs no pruning changes: before with the mask of the scoring alone, after as it is left."""
    options = {"learning_rate": 1e-2, "rounds": 1, "ro_samples": 2}
    draw = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:2].tolist()
    held_out = [sample for sample in range(5) if sample not in draw]
    job, notes = pruned(options)
    alone, _ = pruned({"ro": False})
    assert notes["held_out_samples"] == [3, 3, 3]
    dense = make_job(tiny(dtype=torch.float64), tokens_of())

    def outputs(of: Job) -> torch.Tensor:
        with torch.no_grad():
            return of.model(of.calibration[held_out], use_cache=False, output_hidden_states=True).hidden_states[1]

    for other, key in [(alone, "block_error_before"), (job, "block_error_after")]:
        assert notes[key][0] == pytest.approx(float((outputs(other) - outputs(dense)).square().mean()), rel=1e-9)


# Options and what is declared


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("wanda++[rounds=0]", "at least 1"),
        ("wanda++[ro_samples=0]", "at least 1"),
        ("wanda++[alpha=-1]", "must not be negative"),
        ("wanda++[learning_rate=-1e-5]", "must not be negative"),
        ("wanda++[restart=one]", "zero | dense"),
    ],
)
def test_options_that_mean_nothing(step: str, says: str) -> None:
    with pytest.raises(OptionError, match=says.replace("|", r"\|")):
        build(WandaPlusPlus, parse_step(step))


@pytest.mark.parametrize(
    ("options", "needs", "changes"),
    [
        ({}, Needs.GRADIENTS | Needs.SEED, Changes.KEPT_WEIGHTS),
        ({"rgs": False}, Needs.GRADIENTS | Needs.SEED, Changes.KEPT_WEIGHTS),
        ({"ro": False}, Needs.GRADIENTS, Changes.NOTHING),
        ({"learning_rate": 0.0}, Needs.GRADIENTS, Changes.NOTHING),
        ({"rgs": False, "ro": False}, Needs(0), Changes.NOTHING),
    ],
    ids=str,
)
def test_what_is_declared(options: dict[str, Any], needs: Needs, changes: Changes) -> None:
    pruner = WandaPlusPlus(**options)
    assert pruner.needs() == Needs.WEIGHTS | Needs.CALIBRATION | needs
    assert pruner.changes() == Changes.MASK_GROWS | changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(24, 16), (300, 300)])
def test_steps_are_those_of_torch_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [
        torch.randn(shape, generator=generator, dtype=dtype),
        torch.randn(shape[::-1], generator=generator, dtype=dtype).t(),
    ]
    ours, theirs = [value.clone() for value in values], [value.clone() for value in values]
    mine, reference = RmsProp(ours, 0.01), torch.optim.RMSprop(theirs, lr=0.01)
    for _ in range(4):
        for index, value in enumerate(theirs):
            value.grad = torch.randn(value.shape, generator=generator, dtype=dtype)
            mine.step(index, value.grad)
        reference.step()
    assert all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))


def test_what_a_block_is_to_learn_may_rest_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever copies are late; no bit is another."""
    on_the_device, _ = pruned(SMALL, dtype=torch.bfloat16)
    monkeypatch.setattr(regional, "_place", lambda *_: HostActivations("cpu", LateLane))
    on_the_host, _ = pruned(SMALL, dtype=torch.bfloat16)
    assert same_weights(on_the_device, on_the_host)


class AtTheHost(HostActivations):
    """Without a stream of CUDA's."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__(device, lambda _: LateLane(torch.device("cpu")))


@pytest.mark.parametrize(
    ("placement", "size", "moves"),
    [
        (Resident("cuda"), 2 << 30, False),
        (Resident("cuda"), (2 << 30) + 1, True),
        (Resident("cpu"), 1 << 40, False),
        (AtTheHost("cuda"), 1 << 40, False),
    ],
)
def test_it_does_where_a_gpu_would_hold_too_much_of_it(
    placement: Resident, size: int, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regional, "HostActivations", AtTheHost)
    found = regional._place(placement, size)
    assert (found is not placement) == moves
    assert isinstance(found, AtTheHost) == (moves or isinstance(placement, AtTheHost))

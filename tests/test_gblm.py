"""GBLM's masks by an independent slow formula, and where the score must be Wanda's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from support import make_job, masks_of, tiny, tokens_of
from test_gradients import plain_gradients

from prunebench.errors import OptionError
from prunebench.options import build, parse_step
from prunebench.spec import Job
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import gradient_scores, loss_gradients, wanda_scores
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.wanda import Wanda

Norm = Literal["l1", "l2"]
Masks = dict[str, torch.Tensor]


def pruned(pruner: Gblm | Wanda, tokens: torch.Tensor, family: str = "llama", dtype: torch.dtype = torch.float64) -> Masks:
    job = make_job(tiny(family, dtype), tokens)
    pruner.prune(job)
    return masks_of(job)


def differing(one: Masks, other: Masks) -> int:
    assert one.keys() == other.keys()
    return sum(int((mask != other[name]).sum()) for name, mask in one.items())


@contextmanager
def squares_of_inputs(job: Job) -> Iterator[dict[str, torch.Tensor]]:
    """The sums of squares of every matrix's inputs over all tokens that pass while it is open."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, inputs: torch.Tensor) -> None:
        found[name] = found.get(name, 0) + inputs.detach().square().flatten(0, -2).sum(dim=0)

    def hook_for(name: str) -> Any:
        return lambda _module, args: see(name, args[0])

    handles = [matrix.module.register_forward_pre_hook(hook_for(matrix.name)) for matrix in job.anatomy.matrices]
    yield found
    for handle in handles:
        handle.remove()


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Keep mask of a row, or a group, without its `count` lowest; ties go to the lower column."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    for column in sorted(range(len(scores)), key=lambda j: (float(scores[j]), j))[:count]:
        keep[column] = False
    return keep


def slow_masks(job: Job, norm: Norm, alpha: float) -> Masks:
    """Row by row, with the whole model run anew for each block and a plain backward for the gradients."""
    gradients, samples = plain_gradients(job, norm), len(job.calibration)
    masks: Masks = {}
    for block in job.anatomy.blocks:
        with squares_of_inputs(job) as squares, torch.no_grad():
            for sample in job.calibration:
                job.model(sample[None], use_cache=False)
        for matrix in block.matrices:
            weight = matrix.weight
            norms = (squares[matrix.name] / samples).sqrt()
            scores = weight.abs() * norms + alpha * weight.abs() * gradients[matrix.name]
            if isinstance(job.target, NM):
                groups = scores.reshape(-1, job.target.of)
                mask = torch.stack([lowest(group, job.target.of - job.target.keep) for group in groups]).reshape(scores.shape)
            else:
                assert isinstance(job.target, Unstructured)
                mask = torch.stack([lowest(row, int(len(row) * job.target.sparsity)) for row in scores])
            masks[matrix.name] = mask
            weight[~mask] = 0
    return masks


@pytest.mark.parametrize("target", [Unstructured(0.6), NM(2, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize(("norm", "alpha"), [("l1", 100.0), ("l2", 100.0), ("l2", 0.5)])
def test_masks_are_those_of_the_slow_formula(family: str, target: Target, norm: Norm, alpha: float) -> None:
    tokens = tokens_of(samples=4)
    slow = slow_masks(make_job(tiny(family, torch.float64), tokens, target=target), norm, alpha)
    job = make_job(tiny(family, torch.float64), tokens, target=target)
    Gblm(norm=norm, alpha=alpha).prune(job)
    assert differing(masks_of(job), slow) == 0
    wanda = make_job(tiny(family, torch.float64), tokens, target=target)
    Wanda().prune(wanda)
    assert differing(masks_of(wanda), slow) > 0, "the gradients must have been seen to count"


def test_options_that_mean_nothing() -> None:
    for options in ("alpha=-1", "norm=l3"):
        with pytest.raises(OptionError, match=r"must not be negative|is l1 \| l2"):
            build(Gblm, parse_step(f"gblm[{options}]"))


def test_without_weight_on_the_gradients_it_is_wanda() -> None:
    wanda = pruned(Wanda(), tokens_of(), dtype=torch.float32)
    assert differing(pruned(Gblm(alpha=0.0), tokens_of(), dtype=torch.float32), wanda) == 0


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_with_gradients_of_zero_it_is_wanda(norm: Norm) -> None:
    job = make_job(tiny(), tokens_of())
    job.artefact = lambda name, make: {key: torch.zeros_like(value) for key, value in make().items()}
    Gblm(norm=norm).prune(job)
    assert differing(masks_of(job), pruned(Wanda(), tokens_of(), dtype=torch.float32)) == 0


def test_scores_without_gradients_are_wandas_to_the_bit() -> None:
    weight, norms = torch.randn(6, 8), torch.rand(8)
    wanted = wanda_scores(weight, norms)
    assert torch.equal(gradient_scores(weight, norms, torch.zeros(6, 8), 100.0), wanted)
    assert torch.equal(gradient_scores(weight, norms, torch.rand(6, 8), 0.0), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_are_float32(dtype: torch.dtype) -> None:
    """In float16 they would underflow, or overflow."""
    weight = torch.tensor([[1e-3, 1.0]], dtype=dtype)
    scores = gradient_scores(weight, torch.tensor([0.0, 1e5]), torch.tensor([[1e-8, 0.0]]), 100.0)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[pytest.approx(1e-9, rel=1e-2), pytest.approx(1e5)]]


@pytest.mark.parametrize(("norm", "growth"), [("l1", 2.0), ("l2", 2**0.5)])
def test_more_samples_weigh_more_beside_the_activations(norm: Norm, growth: float) -> None:
    """The gradients are summed over samples and the squared norms averaged: only alpha can make up for another number."""
    tokens = tokens_of(samples=4)
    twice = torch.cat([tokens, tokens])
    once, doubled = pruned(Gblm(norm=norm, alpha=1.0), tokens), pruned(Gblm(norm=norm, alpha=1.0), twice)
    assert differing(once, doubled) > 0
    assert differing(once, pruned(Gblm(norm=norm, alpha=1.0 / growth), twice)) == 0
    assert differing(pruned(Wanda(), tokens), pruned(Wanda(), twice)) == 0


def test_gradients_are_those_before_the_step_and_after_the_steps_before() -> None:
    job = make_job(tiny(dtype=torch.float64), tokens_of())
    dense = loss_gradients(job)
    Magnitude(group="row").prune(job)
    halved, found = loss_gradients(job), []
    job.artefact = lambda name, make: found.append((name, make())) or found[-1][1]
    Gblm().prune(job)
    [(name, gradients)] = found
    assert name == "loss gradients l1"
    for matrix, wanted in halved.items():
        assert torch.equal(gradients[matrix], wanted)
        assert not torch.allclose(gradients[matrix], dense[matrix])


def test_an_artefact_is_named_by_all_that_changes_it() -> None:
    job, names = make_job(tiny(), tokens_of()), []
    job.artefact = lambda name, make: names.append(name) or make()
    for pruner in (Gblm(), Gblm(norm="l2"), Gblm(alpha=3.0)):
        pruner.prune(job)
    assert names == ["loss gradients l1", "loss gradients l2", "loss gradients l1"]

"""RIA and DSnoT against slow formulas in float64, and the conformance kit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from prunebench_ria import Dsnot, InputSum, InputVariance, Ria

from prunebench.spec import Job, Pruner
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing import make_job, parametrize_with_checks, random_tokens, tiny_model
from prunebench.toolkit import InputNorm, keep_mask, walk

TARGETS: list[Target] = [Unstructured(0.5), Unstructured(0.6), NM(2, 4), NM(1, 4), NM(4, 8)]
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS, ids=str)
EAGER = {"skip": "", "threshold": 0.0}


@parametrize_with_checks([Ria, partial(Ria, group="matrix"), Dsnot, partial(Dsnot, **EAGER)])
def test_conformance(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


def job_for(pruner: Pruner, target: Target, family: str = "llama", **options: Any) -> Job:
    return make_job(pruner, tiny_model(family, dtype=torch.float64), target, **options)


def inputs_of(job: Job, name: str) -> torch.Tensor:
    """What the first block's matrix reads, [sequences, length, inputs], by a hook of our own on the model as it is."""
    seen: list[torch.Tensor] = []
    with job.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0])), torch.no_grad():
        job.model(job.calibration_tokens)
    return seen[0]


# RIA


@EVERY_TARGET
@pytest.mark.parametrize("group", ["row", "matrix"])
@pytest.mark.parametrize("a", [0.0, 0.5, 2.0])
def test_ria_against_the_formula(target: Target, group: Any, a: float) -> None:
    pruner = Ria(a=a, group=group)
    job = job_for(pruner, target)
    first = list(job.anatomy.blocks[0].matrices)
    wanted = {}
    for matrix in first:
        inputs, weight = inputs_of(job, matrix.name).flatten(0, 1).tolist(), matrix.weight.abs().tolist()
        rows, columns = [sum(row) for row in weight], [sum(column) for column in zip(*weight, strict=True)]
        norms = [math.sqrt(sum(x * x for x in feature)) for feature in zip(*inputs, strict=True)]
        scores = [[(w / rows[i] + w / columns[j]) * norms[j] ** a for j, w in enumerate(row)] for i, row in enumerate(weight)]
        wanted[matrix.name] = keep_mask(torch.tensor(scores, dtype=torch.float64), target, group)
    pruner.prune(job)
    for matrix in first:
        assert torch.equal(matrix.weight != 0, wanted[matrix.name]), matrix.name


def test_ria_takes_dead_rows_and_columns() -> None:
    pruner = Ria(group="matrix")
    job = job_for(pruner, Unstructured(0.5))
    matrix = job.anatomy.matrices[0]
    matrix.weight[0] = 0
    matrix.weight[:, 3] = 0
    pruner.prune(job)
    assert torch.isfinite(matrix.weight).all()
    assert int((matrix.weight == 0).sum()) == matrix.weight.numel() // 2


# DSnoT


def test_statistics() -> None:
    model = tiny_model(dtype=torch.float64)
    pruner = Ria()
    job = make_job(pruner, model, tokens=random_tokens(model, 5, 6), batch_size=2)
    name = job.anatomy.matrices[-1].name
    inputs = inputs_of(job, name)
    for block in walk(job):
        sums, variances = block.collect(InputSum, InputVariance)
    matrix = job.anatomy.matrices[-1]
    torch.testing.assert_close(sums[matrix], inputs.sum(1).mean(0))
    torch.testing.assert_close(variances[matrix], ((inputs - inputs.mean(1, keepdim=True)) ** 2).mean(1).mean(0))


def slow_row(
    pruner: Dsnot, keep: list[bool], dense: list[float], norms: list[float], sums: list[float], variances: list[float], of: int
) -> list[bool]:
    """One row's swaps, candidate by candidate."""
    keep, once = list(keep), set[int]()
    error = math.fsum(dense[j] * sums[j] for j, kept in enumerate(keep) if not kept)
    first = math.copysign(1, error)
    for _ in range(pruner.max_cycles):
        if abs(error) <= pruner.threshold:
            break
        sign = math.copysign(1, error)

        gone = [j for j, kept in enumerate(keep) if not kept and j not in once and dense[j] * sums[j] * sign > 0]
        there = [j for j, kept in enumerate(keep) if kept and j not in once]
        if of:
            gone = [j for j in gone if any(k // of == j // of for k in there)]
        if not gone:
            break
        back = max(gone, key=lambda j: abs(dense[j] * sums[j]) / variances[j] ** pruner.variance_power)
        there = [j for j in there if (j // of == back // of if of else dense[j] * sums[j] * sign < 0)]
        if not there:
            break
        away = min(there, key=lambda j: abs(dense[j]) * norms[j])
        after = error - dense[back] * sums[back] + dense[away] * sums[away]
        if (of or pruner.keep_sign) and math.copysign(1, after) != first:
            break
        keep[back], keep[away], error = True, False, after
        once |= {back, away}
    return keep


OPTIONS = [
    Dsnot(skip=""),
    Dsnot(**EAGER),
    Dsnot(**EAGER, variance_power=0.0),
    Dsnot(**EAGER, keep_sign=True),
    Dsnot(skip="", max_cycles=2),
    Dsnot(skip="", threshold=1.0),
]


@EVERY_TARGET
@pytest.mark.parametrize("pruner", OPTIONS, ids=str)
def test_dsnot_against_a_slow_loop(target: Target, pruner: Dsnot) -> None:
    job = job_for(pruner, target)
    dense = {matrix.name: matrix.weight.clone() for matrix in job.anatomy.matrices}
    first = list(job.anatomy.blocks[0].matrices)
    inputs = {matrix.name: inputs_of(job, matrix.name) for matrix in first}
    before, job = after_wanda(job, target)
    pruner.prune(job)
    of = target.of if isinstance(target, NM) else 0
    moved = 0
    for matrix in first:
        seen = inputs[matrix.name]
        statistics = (
            seen.flatten(0, 1).norm(dim=0).tolist(),
            seen.sum(1).mean(0).tolist(),
            seen.var(dim=1, correction=0).mean(0).tolist(),
        )
        wanted = [
            slow_row(pruner, keep, row, *statistics, of)
            for keep, row in zip(before[matrix.name].tolist(), dense[matrix.name].tolist(), strict=True)
        ]
        assert (matrix.weight != 0).tolist() == wanted, matrix.name
        assert torch.equal(matrix.weight, dense[matrix.name] * torch.tensor(wanted)), matrix.name
        moved += int(((matrix.weight != 0) != before[matrix.name]).sum())
    assert moved > 0


def after_wanda(job: Job, target: Target) -> tuple[dict[str, torch.Tensor], Job]:
    """The masks of a first step, and the job of the second."""
    for block in walk(job):
        norms = block.collect(InputNorm)
        for matrix in block.matrices:
            matrix.keep(keep_mask(matrix.weight.abs() * norms[matrix], target, "row"))
    before = {matrix.name: matrix.weight != 0 for matrix in job.anatomy.matrices}
    job.masks = before
    return before, job


@EVERY_TARGET
def test_dsnot_lowers_the_error_and_keeps_the_counts(target: Target) -> None:
    """Without a change of sign; swaps that are free to overshoot may not, nor may groups of M, where what goes has any sign."""
    pruner = Dsnot(**EAGER, keep_sign=True)
    job = job_for(pruner, target)
    dense = {matrix.name: matrix.weight.clone() for matrix in job.anatomy.matrices}
    sums = {matrix.name: inputs_of(job, matrix.name).sum(1).mean(0) for matrix in job.anatomy.blocks[0].matrices}
    before, job = after_wanda(job, target)
    pruner.prune(job)
    for matrix in job.anatomy.matrices:
        keep = matrix.weight != 0
        of = target.of if isinstance(target, NM) else matrix.shape[1]
        assert torch.equal(keep.unflatten(1, (-1, of)).sum(2), before[matrix.name].unflatten(1, (-1, of)).sum(2))
        if matrix.name in sums and not isinstance(target, NM):
            was, now = ((dense[matrix.name] * ~mask) @ sums[matrix.name] for mask in (before[matrix.name], keep))
            assert bool((now.abs() <= was.abs() + 1e-12).all())
            assert now.abs().mean() < was.abs().mean()


@pytest.mark.parametrize("pruner", [Dsnot(max_cycles=0), Dsnot(max_cycles=0, skip=""), Dsnot(skip="", threshold=1e9)], ids=str)
@EVERY_TARGET
def test_dsnot_that_does_nothing(target: Target, pruner: Dsnot) -> None:
    _, job = after_wanda(job_for(pruner, target), target)
    before = {matrix.name: matrix.weight.clone() for matrix in job.anatomy.matrices}
    pruner.prune(job)
    assert all(torch.equal(matrix.weight, before[matrix.name]) for matrix in job.anatomy.matrices)


def test_dsnot_skips() -> None:
    pruner = Dsnot(skip="mlp", threshold=0.0)
    before, job = after_wanda(job_for(pruner, TARGETS[0]), TARGETS[0])
    pruner.prune(job)
    moved = {matrix.name for matrix in job.anatomy.matrices if not torch.equal(matrix.weight != 0, before[matrix.name])}
    assert moved
    assert not any("mlp" in name for name in moved)


def test_dsnot_leaves_changed_survivors_alone() -> None:
    """After a step that changes what survives: what stays keeps its new value, what returns has its dense one."""
    pruner = Dsnot(**EAGER)
    job = job_for(pruner, TARGETS[0])
    dense = {matrix.name: matrix.weight.clone() for matrix in job.anatomy.matrices}
    before, job = after_wanda(job, TARGETS[0])
    for matrix in job.anatomy.matrices:
        matrix.weight.mul_(1.5)
    pruner.prune(job)
    for matrix in job.anatomy.matrices:
        keep = matrix.weight != 0
        wanted = torch.where(before[matrix.name], 1.5 * dense[matrix.name], dense[matrix.name]) * keep
        assert torch.equal(matrix.weight, wanted)


@pytest.mark.parametrize("options", [{"max_cycles": -1}, {"threshold": -0.1}, {"variance_power": -1.0}])
def test_what_means_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Dsnot(**options)
    with pytest.raises(ValueError, match="at least 0"):
        Ria(a=-1)

"""SparseGPT against slow formulas of its own definition, in float64; its masks, slabs, retries and dead inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import EXACT, make_job, masks_of, tiny, tokens_of

from prunebench.errors import NonFiniteError, OptionError, RunError
from prunebench.options import build, parse_step
from prunebench.spec import Job
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import Gram, keep_mask, magnitude_scores, walk
from prunebench.toolkit.audit import Before, audit
from prunebench.toolkit.least_squares import (
    ThresholdRule,
    choose_given,
    choose_groups,
    choose_slabs,
    inverse_factor,
    sweep,
)
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda

HALF = Unstructured(0.5)
DAMPING = 0.01


def never(damping: float) -> None:
    pytest.fail(f"tried again with a damping of {damping}")


def gram_of(inputs: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """A Gram matrix of correlated inputs in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    mixed = mixed @ (torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)).double()
    return 2 / 5 * mixed.t() @ mixed


def weight_of(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries of a flat tensor a stable ascending sort puts first."""
    found = torch.zeros(len(scores), dtype=torch.bool)
    found[scores.sort(stable=True).indices[:count]] = True
    return found


def by_the_book(weight: torch.Tensor, gram: torch.Tensor, target: Target, slab: int, given: torch.Tensor | None = None) -> Any:
    """Column by column with the inverse of what remains of the Gram matrix, taken anew each time; returns weights and loss."""
    weight = weight.clone()
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    inverses = [torch.linalg.inv(damped[j:, j:]) for j in range(len(gram))]
    importance = torch.stack([inverse[0, 0] for inverse in inverses])
    gone = torch.zeros_like(weight, dtype=torch.bool) if given is None else ~given
    loss = 0.0
    for column in range(len(gram)):
        if given is None and isinstance(target, Unstructured) and column % slab == 0:
            part = slice(column, min(column + slab, len(gram)))
            scores = weight[:, part] ** 2 / importance[part]
            gone[:, part] = lowest(scores.flatten(), int(scores.numel() * target.sparsity)).view(scores.shape)
        if given is None and isinstance(target, NM) and column % target.of == 0:
            part = slice(column, column + target.of)
            for row, scores in enumerate(weight[:, part] ** 2 / importance[part]):
                gone[row, part] = lowest(scores, target.of - target.keep)
        error = torch.where(gone[:, column], weight[:, column], 0.0)
        weight[:, column:] -= error[:, None] * inverses[column][0] / importance[column]
        weight[gone[:, column], column] = 0
        loss += float((error**2 / importance[column]).sum()) / 2
    return weight, loss


@pytest.mark.parametrize("slab", [8, 20, 64])
@pytest.mark.parametrize("target", [HALF, Unstructured(0.7), NM(2, 4), NM(1, 4)], ids=str)
@pytest.mark.parametrize("leaf", [1, 3, 8])
def test_sweep_by_the_book(slab: int, target: Target, leaf: int) -> None:
    """Slabs that end evenly, or narrower, or are wider than the matrix."""
    weight, gram = weight_of(12, 48), gram_of(48)
    wanted, loss = by_the_book(weight, gram, target, slab)
    nm = isinstance(target, NM)
    choose = choose_groups(target, None) if isinstance(target, NM) else choose_slabs(target, None)
    before = weight.clone()
    swept = sweep(weight, inverse_factor(gram, DAMPING, never), choose, slab, target.of if nm else 0, leaf)
    torch.testing.assert_close(swept.weight, wanted, rtol=1e-9, atol=1e-11)
    assert torch.equal(swept.keep, wanted != 0)
    assert float(swept.loss) == pytest.approx(loss, rel=1e-9)
    assert torch.equal(weight, before)
    assert not bool(torch.signbit(swept.weight[~swept.keep]).any())


@pytest.mark.parametrize("slab", [8, 20, 64])
def test_given_mask_by_the_book(slab: int) -> None:
    """Where slabs decide nothing, they change nothing."""
    weight, gram = weight_of(12, 48), gram_of(48)
    keep = weight_of(12, 48, seed=2) > 0
    wanted, loss = by_the_book(weight, gram, HALF, slab, keep)
    swept = sweep(weight, inverse_factor(gram, DAMPING, never), choose_given(keep), slab)
    torch.testing.assert_close(swept.weight, wanted, rtol=1e-9, atol=1e-11)
    assert torch.equal(swept.keep, keep)
    assert float(swept.loss) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("inputs", [1, 7, 130, 300])
def test_inverse_factor(inputs: int) -> None:
    """Sizes on both sides of where it is taken by halves."""
    gram = gram_of(inputs, tokens=2 * inputs)
    before = gram.clone()
    upper = inverse_factor(gram, DAMPING, never).upper
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(inputs, dtype=gram.dtype)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(inputs, dtype=gram.dtype), rtol=1e-8, atol=1e-8)
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    assert torch.equal(gram, before)


@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
def test_multiple_of_the_identity_is_magnitude(target: Target) -> None:
    """Slab by slab, and no weight changes."""
    weight = weight_of(10, 40).float()
    factor = inverse_factor(3.7 * torch.eye(40), DAMPING, never)
    choose = choose_groups(target, None) if isinstance(target, NM) else choose_slabs(target, None)
    swept = sweep(weight, factor, choose, 16, target.of if isinstance(target, NM) else 0)
    slabs = torch.split(magnitude_scores(weight), 16, dim=1)
    keep = torch.cat([keep_mask(slab.contiguous(), target, "matrix") for slab in slabs], dim=1)
    assert torch.equal(swept.keep, keep)
    assert torch.equal(swept.weight, weight * keep)


@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
def test_removed_entries_go_first(target: Target) -> None:
    weight, gram = weight_of(8, 24), gram_of(24)
    removed = torch.zeros(8, 24, dtype=torch.bool)
    removed[:, ::4] = True
    removed[3, 4:7] = True  # more than 2:4 asks for
    weight[removed] = 100.0
    factor = inverse_factor(gram, DAMPING, never)
    if isinstance(target, NM):
        swept = sweep(weight, factor, choose_groups(target, removed), 8, target.of)
    else:
        swept = sweep(weight, factor, choose_slabs(target, removed), 8)
        assert int((~swept.keep).sum()) == 8 * 24 // 2
    assert not bool((swept.keep & removed).any())
    assert not bool(swept.weight[removed].any())


def test_damping_is_raised() -> None:
    """A matrix with a negative eigenvalue, as rounding makes them: -0.03 of a mean diagonal of 1."""
    gram = torch.ones(6, 6).double() * 1.03 - 0.03 * torch.eye(6)
    tried: list[float] = []
    with_tenth = inverse_factor(gram, DAMPING, tried.append).upper
    assert tried == [0.1]
    torch.testing.assert_close(with_tenth, inverse_factor(gram, 0.1, never).upper)
    tried.clear()
    with pytest.raises(RunError, match="a Gram matrix of 6 inputs is not positive definite, even with a damping of 1;"):
        inverse_factor(gram - 3 * torch.eye(6), 0.03, tried.append)
    assert tried == [0.3, 1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gram_matrix_that_is_none(value: float) -> None:
    gram = gram_of(6)
    gram[2, 3] = value
    with pytest.raises(NonFiniteError, match=r"^1 of 36 entries of a Gram matrix are not finite"):
        inverse_factor(gram, DAMPING, never)


def test_dead_inputs() -> None:
    """Their weights become zero, they go first, and the others are as if they were not there but for the mean diagonal."""
    gram, weight = gram_of(16), weight_of(6, 16)
    dead = [3, 4, 9]
    gram[dead], gram[:, dead] = 0, 0
    factor = inverse_factor(gram, DAMPING, never)
    assert factor.dead.nonzero().flatten().tolist() == dead
    swept = sweep(weight, factor, choose_slabs(Unstructured(0.25), None))
    assert not bool(swept.weight[:, dead].any())
    assert not bool(swept.keep[:, dead].any())
    assert int((~swept.keep).sum()) == 24
    few = sweep(weight, factor, choose_slabs(Unstructured(0.1), None))
    assert int((~few.keep).sum()) == 9
    assert not bool(few.weight[:, dead].any())


def test_threshold_rule() -> None:
    """One entry more, and ties; the exact mask is remembered."""
    scores = torch.tensor([[1.0, 2.0, 3.0, 3.0], [3.0, 5.0, 6.0, 7.0]])
    rule = ThresholdRule(HALF, None, scores)
    assert rule(scores, slice(0, 4)).tolist() == [[False, False, False, False], [False, True, True, True]]
    assert rule.exact.tolist() == [[False, False, False, False], [True, True, True, True]]
    nothing = ThresholdRule(Unstructured(0.0), None, scores)
    assert bool(nothing(scores, slice(0, 4)).all())


@pytest.mark.parametrize("width", [5, 128, 300])
def test_gram_is_the_running_mean(width: int) -> None:
    """Over sequences in batches of unequal size; widths of one panel and of several."""
    batches = [torch.randn(n, 4, width, generator=torch.Generator().manual_seed(n)).double() for n in (3, 1, 2)]
    gram = Gram(width, torch.device("cpu"), torch.float64)
    for batch in batches:
        gram.add(batch.flatten(0, 1), len(batch))
    every = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(gram.value(), 2 / 6 * every.t() @ every, **EXACT)
    gram.add(batches[0].flatten(0, 1), 3)
    again = torch.cat([every, batches[0].flatten(0, 1)])
    torch.testing.assert_close(gram.value(), 2 / 9 * again.t() @ again, **EXACT)


# The method


def job_of(target: Target = HALF, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Job, dict[str, Any]]:
    notes: dict[str, Any] = {}
    job = make_job(tiny(dtype=dtype, **options), tokens_of(), target=target)
    job.note = notes.__setitem__
    return job, notes


def step(job: Job, pruner: Any, notes: dict[str, Any], group: str | None = None) -> None:
    """Take a step and audit it, as the runner does."""
    before = Before(job.anatomy, job.dense, survivors_changed=False)  # type: ignore[arg-type]
    job.masks = dict(job.anatomy.masks)  # type: ignore[attr-defined]
    pruner.prune(job)
    before.check_masks(pruner.changes())
    before.check_declared(pruner.changes())
    audit(job.anatomy, job.target, group or pruner.audit_group(), "extra_zeros" in notes)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
def test_method_by_the_book(target: Target) -> None:
    """Each block with the inputs that the pruned blocks before it give, collected from the block while it is dense."""
    job, notes = job_of(target)
    twin, _ = job_of(target)
    step(job, SparseGpt(block_size=8), notes)
    for block in walk(twin):
        grams = block.collect(Gram)
        for matrix in block.matrices:
            wanted, _ = by_the_book(matrix.weight, grams[matrix], target, 8)
            matrix.write(wanted, wanted != 0)
    for matrix, other in zip(job.anatomy.matrices, twin.anatomy.matrices, strict=True):
        torch.testing.assert_close(matrix.weight, other.weight, rtol=1e-7, atol=1e-9)
    assert len(notes["losses of the blocks"]) == len(job.anatomy.blocks)
    assert "extra_zeros" not in notes


@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize(("first", "group"), [(Wanda(), "row"), (Magnitude(), "matrix"), (SparseGpt(), "columns:128")])
def test_given_mask_is_kept(target: Target, first: Any, group: str) -> None:
    job, notes = job_of(target, torch.float32)
    step(job, first, notes)
    given, pruned = masks_of(job), {m.name: m.weight.clone() for m in job.anatomy.matrices}
    step(job, SparseGpt(mask="given"), notes, group)
    assert all(torch.equal(mask, given[name]) for name, mask in masks_of(job).items())
    if not isinstance(first, SparseGpt):
        assert all(not torch.equal(m.weight, pruned[m.name]) for m in job.anatomy.matrices)


def test_given_starts_from_the_dense_weights() -> None:
    """After its own mask of the first block nothing is left to change there."""
    job, notes = job_of()
    step(job, SparseGpt(), notes)
    own = {m.name: m.weight.clone() for m in job.anatomy.matrices}
    step(job, SparseGpt(mask="given"), notes, "columns:128")
    for matrix in job.anatomy.matrices:
        torch.testing.assert_close(matrix.weight, own[matrix.name], rtol=1e-9, atol=1e-11)


def test_wanda_mask() -> None:
    """In the first block, whose inputs no pruning has changed, it is Wanda's; the weights are other than Wanda's."""
    job, notes = job_of()
    step(job, SparseGpt(mask="wanda"), notes)
    other, more = job_of()
    step(other, Wanda(), more)
    for matrix, twin in zip(job.anatomy.blocks[0].matrices, other.anatomy.blocks[0].matrices, strict=True):
        assert torch.equal(masks_of(job)[matrix.name], masks_of(other)[twin.name])
        assert not torch.equal(matrix.weight, twin.weight)


def test_reference_counts() -> None:
    """One zero more a slab than the mask removes, noted; the audit accepts it."""
    job, notes = job_of()
    step(job, SparseGpt(block_size=8, counts="reference"), notes)
    slabs = sum(-(-matrix.shape[1] // 8) for matrix in job.anatomy.matrices)
    assert notes["extra_zeros"] == {"threshold rule": slabs}
    for matrix in job.anatomy.matrices:
        for weight, keep in zip(
            torch.split(matrix.weight, 8, dim=1), torch.split(masks_of(job)[matrix.name], 8, dim=1), strict=True
        ):
            assert int((weight == 0).sum()) == int((~keep).sum()) + 1 == weight.numel() // 2 + 1


@pytest.mark.parametrize("options", [{}, {"mask": "wanda"}, {"mask": "given"}], ids=str)
def test_dead_inputs_are_noted(options: dict[str, Any]) -> None:
    """A norm that makes half of the inputs of q, k and v zero, where a quarter is to go."""
    job, notes = job_of(Unstructured(0.25))
    job.anatomy.blocks[0].module.input_layernorm.weight.data[::2] = 0
    if options.get("mask") == "given":
        step(job, Magnitude(), notes)
    step(job, SparseGpt(**options), notes, "matrix" if options.get("mask") == "given" else None)
    assert notes["extra_zeros"]["dead inputs"] >= sum(m.parameter.numel() // 4 for m in job.anatomy.matrices[:3])
    assert all(not bool(m.weight[:, ::2].any()) for m in job.anatomy.matrices[:3])


def test_retries_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    value = Gram.value
    monkeypatch.setattr(Gram, "value", lambda gram: value(gram) - 0.5 * value(gram).diagonal().mean() * torch.eye(gram.width))
    job, notes = job_of()
    step(job, SparseGpt(), notes)
    retried = notes["damping tried again"]
    assert "model.layers.0.self_attn.q_proj" in retried
    assert "model.layers.0.self_attn.k_proj" not in retried  # it shares the factor
    assert {tuple(dampings) for dampings in retried.values()} <= {(0.1,), (0.1, 1.0)}


def test_what_is_refused() -> None:
    def reason(target: Target, *earlier: str, **options: Any) -> str | None:
        return SparseGpt(**options).refuses(job_of()[0].anatomy.facts(target, earlier))  # type: ignore[attr-defined]

    assert reason(HALF) is reason(NM(2, 4)) is reason(HALF, "wanda", mask="given") is None
    assert reason(NM(2, 4), block_size=6, mask="wanda") is reason(HALF, block_size=6) is None
    assert "there is none" in str(reason(HALF, mask="given"))
    assert "not a multiple of 4" in str(reason(NM(2, 4), block_size=6))


def test_options_that_mean_nothing() -> None:
    for options in ("block_size=0", "damping=0", "damping=2", "mask=wanda,counts=reference"):
        with pytest.raises(OptionError, match=r"must be at least 1|is a rule for mask=own"):
            build(SparseGpt, parse_step(f"sparsegpt[{options}]"))


def test_masks_that_do_not_fit() -> None:
    job, notes = job_of()
    with pytest.raises(RunError, match=r"mask=given finds no mask of model\.layers\.0\.self_attn\.q_proj"):
        SparseGpt(mask="given").prune(job)
    job, notes = job_of()
    step(job, Wanda(), notes)
    job.masks, job.target = masks_of(job), Unstructured(0.25)
    for options in ({}, {"mask": "wanda"}):
        with pytest.raises(RunError, match=r"that are compared with each other, and 0\.25 asks for"):
            SparseGpt(**options).prune(job)

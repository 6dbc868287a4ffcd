"""Block by block, the gradients of the loss are those of a plain backward pass, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from support import (
    DEPTH,
    EXACT,
    FAMILIES,
    Rescaling,
    changed,
    fingerprint,
    make_job,
    same_bits,
    tiny,
    tokens_of,
    traces,
)
from test_streaming import SAMPLES, streaming_job
from transformers import PreTrainedModel

from prunebench.errors import Refused
from prunebench.spec import Job
from prunebench.toolkit import gradients, loss_gradients
from prunebench.toolkit.phases import PhaseClock


def plain_gradients(job: Job, reduce: str) -> dict[str, torch.Tensor]:
    """One backward pass of the whole model a sample; the loss in the model's dtype, not float32 as transformers."""
    totals: dict[str, torch.Tensor] = {}
    parameters = [matrix.module.weight for matrix in job.anatomy.matrices]
    for sample in job.calibration:
        logits = job.model(sample[None], use_cache=False).logits[0, :-1]
        found = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, sample[1:]), parameters)
        for matrix, gradient in zip(job.anatomy.matrices, found, strict=True):
            folded = gradient.abs() if reduce == "l1" else gradient.square()
            totals[matrix.name] = totals.get(matrix.name, 0) + matrix.oriented(folded)
    return totals if reduce == "l1" else {name: total.sqrt() for name, total in totals.items()}


def check_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        assert float(gradient.mean()) > 1e-4
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol)


def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the model were too large to go through at once."""
    monkeypatch.setattr(gradients, "_fits_at_once", lambda job: False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reduce", ["l1", "l2"])
@pytest.mark.parametrize("large", [False, True])
def test_are_those_of_a_plain_backward(family: str, reduce: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        by_blocks(monkeypatch)
    job = make_job(tiny(family, torch.float64), tokens_of(samples=3))
    check_same(loss_gradients(job, reduce), plain_gradients(job, reduce), **EXACT)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
def test_a_tied_head_is_the_same_to_them(family: str, tied: bool) -> None:
    job = make_job(tiny(family, torch.float64, tie_word_embeddings=tied), tokens_of(samples=2))
    assert (job.model.get_input_embeddings().weight is job.model.get_output_embeddings().weight) == tied
    check_same(loss_gradients(job), plain_gradients(job, "l1"), **EXACT)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_are_in_float32_whatever_the_model(dtype: torch.dtype, rtol: float) -> None:
    """Blocks go backward in float32, so half precision shows in the inputs and the head alone."""
    job = make_job(tiny("llama", dtype), tokens_of(samples=2))
    found = loss_gradients(job)
    exact = plain_gradients(make_job(tiny("llama").to(dtype).float(), tokens_of(samples=2)), "l1")
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert float((found[name] - gradient).norm() / gradient.norm()) < rtol, name


def test_a_loss_too_small_for_float16_is_not_lost() -> None:
    """The mean over a sequence divides every gradient by its length; a small head makes up for the short sequences here."""

    def faint(dtype: torch.dtype) -> Job:
        model = tiny("llama", torch.float16)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(2**-12)
        return make_job(model.to(dtype), tokens_of(samples=2, length=32))

    wanted = plain_gradients(faint(torch.float32), "l1")
    for name, gradient in loss_gradients(faint(torch.float16)).items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 0.02, name


def test_count_what_adapters_add() -> None:
    job = make_job(tiny("llama", torch.float64), tokens_of(samples=2))
    without = loss_gradients(job)
    matrix = job.anatomy.matrices[3]
    outputs, inputs = matrix.shape
    job.attach(matrix, torch.ones(2, inputs, dtype=torch.float64), torch.ones(outputs, 2, dtype=torch.float64), 0.1)
    found = loss_gradients(job)
    check_same(found, plain_gradients(job, "l1"), **EXACT)
    assert not torch.allclose(found[matrix.name], without[matrix.name])


def test_streaming_gives_the_same_bits_within_one_block() -> None:
    wanted = loss_gradients(make_job(tiny("gemma3"), tokens_of(SAMPLES)))
    job, placement = streaming_job(tiny("gemma3"))
    found = loss_gradients(job)
    assert all(same_bits(gradient, found[name]) for name, gradient in wanted.items())
    assert placement.most_blocks <= 2
    placement.check_all_is_back()


@pytest.mark.parametrize(("free", "place"), [(100, "cuda"), (99, "cpu")])
def test_inputs_that_would_fill_the_device_are_kept_on_the_host(free: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1000))
    assert gradients._resting_place(torch.device("cuda", 1), 50).type == place
    assert gradients._resting_place(torch.device("cpu"), 50).type == "cpu"


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_where_inputs_are_kept_changes_no_bit(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copies in any case: the walk's own are overwritten. What is kept elsewhere is kept on the host."""
    asked: list[int] = []
    job = make_job(tiny(), tokens_of())
    wanted = loss_gradients(job)  # at once
    by_blocks(monkeypatch)
    monkeypatch.setattr(gradients, "_resting_place", lambda device, wanted: asked.append(wanted) or torch.device(place))
    found = loss_gradients(job)
    assert all(same_bits(gradient, found[name]) for name, gradient in wanted.items())
    size = job.calibration.numel() * 16 * 4
    assert asked == [size * DEPTH]


def check_untouched(model: PreTrainedModel, before: dict[str, torch.Tensor], left: object) -> None:
    assert not changed(model, before)
    assert traces(model) == left


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("trained", [True, False])
def test_nothing_is_left_and_no_mode_matters(family: str, trained: bool) -> None:
    job = make_job(tiny(family), tokens_of())
    wanted = loss_gradients(job)
    job.model.train(trained)
    job.model.requires_grad_(trained)
    before, left = fingerprint(job.model), traces(job.model)
    with torch.no_grad():
        found = loss_gradients(job)
    check_untouched(job.model, before, left)
    assert all(same_bits(gradient, found[name]) and not gradient.requires_grad for name, gradient in wanted.items())


def test_nothing_is_left_after_a_failure() -> None:
    job, placement = streaming_job(tiny())
    head = job.model.get_output_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
    before, left = fingerprint(job.model), traces(job.model)
    with pytest.raises(ZeroDivisionError):
        loss_gradients(job)
    check_untouched(job.model, before, left)
    head.remove()
    placement.check_all_is_back()


def test_what_the_walk_cannot_follow_is_refused() -> None:
    job, placement = streaming_job(Rescaling().eval())
    with pytest.raises(Refused):
        loss_gradients(job)
    placement.check_all_is_back()


def test_progress_at_once() -> None:
    job, seen = make_job(tiny(), tokens_of(samples=2)), list[tuple[str, int, int]]()
    job.progress = lambda *call: seen.append(call)
    clock = PhaseClock(torch.device("cpu"))
    with clock.running():
        loss_gradients(job)
    assert seen == [("gradients", index, 2) for index in range(3)]
    assert clock.seconds().keys() == {"statistics", "other"}


def test_progress_and_phases_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    by_blocks(monkeypatch)
    job = make_job(tiny(), tokens_of())
    seen: list[tuple[str, int, int]] = []
    job.progress = lambda *call: seen.append(call)
    clock = PhaseClock(torch.device("cpu"))
    with clock.running():
        loss_gradients(job)
    assert seen == [
        *(("forward", index, DEPTH) for index in range(DEPTH)),
        *(("backward", index, DEPTH) for index in range(DEPTH + 1)),
    ]
    assert clock.seconds().keys() == {"calibration", "propagation", "statistics", "other"}
    assert clock.seconds()["other"] < 0.5 * sum(clock.seconds().values())

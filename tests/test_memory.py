"""Memory runs out at any place of any pass: the pass starts again with half the batch, and nothing is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import EXACT, cases, fingerprint, halve, make_job, masks_of, tiny, tokens_of, visit_all

from prunebench.spec import Job
from prunebench.targets import NM
from prunebench.toolkit import (
    Gram,
    InputNorm,
    Retraining,
    Statistic,
    gradients,
    keep_mask,
    loss_gradients,
    walk,
    wanda_scores,
)
from prunebench.toolkit.memory import is_out_of_memory
from prunebench.toolkit.placement import Resident
from prunebench.toolkit.recovery import next_token_loss
from prunebench.toolkit.regional import Lesson, Student
from prunebench.toolkit.retrain import parts_of, train, whole_model
from prunebench.toolkit.walk import Replica

DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")
SAMPLES, BATCH, BLOCKS = 8, 4, 3

PASSES = [("recording", 0)] * 3  # the empty buffer, and both batches
for _block in range(BLOCKS):
    PASSES += [("statistics", _block)] * 2 + [("gradients", _block)] * 2
    PASSES += [("propagation", _block)] * 2 + [("rest of a propagation", _block)] * 2 if _block < BLOCKS - 1 else []
"""The pass of each batch that is brought over or stored by `everything`, in order: the places at which memory can run out."""


class Scarce(Resident):
    """A device on which memory runs out once, at the n-th batch, or for every batch above some size."""

    def __init__(self, at: int = -1, most: int = SAMPLES, error: Exception = DEVICE) -> None:
        super().__init__("cpu")
        self.at, self.most, self.error = at, most, error
        self.seen = 0

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self._take(tensor)
        return super().fetch(tensor)

    def rest(self, tensor: torch.Tensor) -> torch.Tensor:
        self._take(tensor)
        return super().rest(tensor)

    def _take(self, tensor: torch.Tensor) -> None:
        self.seen += 1
        if self.seen == self.at + 1 or len(tensor) > self.most:
            raise self.error


def scarce_job(dtype: torch.dtype = torch.float32, **scarcity: Any) -> tuple[Job, dict[str, Any]]:
    """A job on such a device, and its notes."""
    notes: dict[str, Any] = {}
    placement = Scarce(**scarcity)
    job = make_job(tiny(dtype=dtype), tokens_of(SAMPLES), placement=placement, batch_size=BATCH, target=NM(2, 4))
    job.note = notes.__setitem__
    return job, notes


def everything(job: Job, halved_at: tuple[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Statistics, gradients and masks of every block, pruned on the way; from `halved_at` on with half the batch."""
    found: dict[str, torch.Tensor] = {}

    def start(name: str, block: int) -> None:
        if (name, block) == halved_at:
            job.batch_size = BATCH // 2

    start("recording", 0)
    for block in walk(job):
        start("statistics", block.index)
        norms, grams = block.collect(InputNorm, Gram)
        start("gradients", block.index)
        gradients = block.gradients(torch.linalg.vector_norm)
        for m in block.matrices:
            found |= {f"norm {m.name}": norms[m], f"gram {m.name}": grams[m], f"gradient {m.name}": gradients[m]}
            m.keep(keep_mask(wanda_scores(m.weight, norms[m]), job.target))
        start("propagation", block.index)
    return found | {f"mask {name}": mask for name, mask in masks_of(job).items()}


def test_the_places_are_all_there_are() -> None:
    job, notes = scarce_job()
    everything(job)
    assert job.placement.seen == len(PASSES)  # type: ignore[attr-defined]
    assert notes == {}


@pytest.mark.parametrize("place", range(len(PASSES)))
def test_nothing_is_counted_twice(place: int) -> None:
    job, notes = scarce_job(torch.float64, at=place)
    found, expected = everything(job), everything(scarce_job(torch.float64)[0])
    name, block = PASSES[place]
    where = "the model's first pass" if name == "recording" else f"block {block}"
    assert notes == {"batch size halved to 2": f"out of memory in {where}"}
    assert job.batch_size == BATCH // 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("place", range(len(PASSES)))
def test_the_bits_are_those_of_half_the_batch_from_that_pass_on(place: int) -> None:
    found = everything(scarce_job(at=place)[0])
    full, halved = everything(scarce_job()[0]), everything(scarce_job()[0], halved_at=PASSES[place])
    for name, value in full.items():
        if name.startswith("mask"):
            assert int((found[name] != value).sum()) <= 2
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    if PASSES[place][0] != "rest of a propagation":  # its first batch was of the full size
        assert all(torch.equal(found[name], value) for name, value in halved.items())


def test_the_batch_is_halved_until_it_fits() -> None:
    job, notes = scarce_job(torch.float64, most=1)
    found = everything(job)
    assert list(notes) == ["batch size halved to 2", "batch size halved to 1"]
    for name, value in everything(scarce_job(torch.float64)[0]).items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("error", cases({"device": DEVICE, "host": HOST, "Python": MemoryError(), "other": ValueError("no")}))
def test_one_sequence_that_does_not_fit_ends_the_walk(error: Exception) -> None:
    job, notes = scarce_job(most=0, error=error)
    with pytest.raises(type(error)) as raised:
        everything(job)
    assert raised.value is error
    assert len(notes) == (0 if isinstance(error, ValueError) else 2)


@pytest.mark.parametrize("place", [1, 4, 7, 10])
def test_gradients_of_the_whole_model_survive_it(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "together", lambda device, batch_size, length: batch_size)  # as on a device
    job, notes = scarce_job(torch.float64, at=place)
    found = loss_gradients(job)
    assert list(notes) == ["batch size halved to 2"]
    for name, value in loss_gradients(scarce_job(torch.float64)[0]).items():
        torch.testing.assert_close(found[name], value, **EXACT)


class Fragile(Statistic):
    """Runs out of memory after it has taken in a batch, once."""

    failures = 1

    def __init__(self, *shape: Any) -> None:
        super().__init__(*shape)
        self.sequences = 0

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        self.sequences += sequences
        if self.sequences == SAMPLES and Fragile.failures:
            Fragile.failures = 0
            raise DEVICE

    def value(self) -> torch.Tensor:
        return torch.tensor(self.sequences)


@pytest.mark.parametrize("of", cases({"block": lambda block: block, "replica": lambda block: block.replica()}))
def test_a_statistic_starts_from_nothing_again(of: Callable[[Any], Any]) -> None:
    Fragile.failures = 1
    job, notes = scarce_job()
    for block in walk(job):
        assert {int(count) for count in of(block).collect(Fragile).values()} == {SAMPLES}
    assert notes == {"batch size halved to 2": "out of memory in block 0"}
    assert not any(module._forward_pre_hooks for module in job.model.modules())


def test_chosen_inputs_are_gathered_again_too() -> None:
    Fragile.failures = 1
    job, _ = scarce_job()
    for block in walk(job):
        inputs = block.inputs(list(range(SAMPLES)))
        assert {int(count) for count in block.replica().collect(Fragile, inputs=inputs).values()} == {SAMPLES}
    assert job.batch_size == 2


# Training


def trained(
    subset: Any, failing: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], tuple[float, ...], dict[str, Any], int]:
    """A model after three steps of four windows, its losses, notes and final batch size; memory runs out once, where said."""
    job, notes = scarce_job(torch.float64)
    visit_all(job, halve)
    job.masks, calls = job.anatomy.masks.copy(), {"loss": 0, "collecting": 0}  # type: ignore[attr-defined]
    settings = Retraining(subset, steps=3, batch=4, learning_rate=0.1, rank=2)
    scope = whole_model(job)
    parts = parts_of(settings, scope, torch.Generator().manual_seed(0))
    plain = next_token_loss(job.model)

    def count(place: str) -> None:
        calls[place] += 1
        if (place, calls[place]) == failing:
            raise DEVICE

    def loss(piece: torch.Tensor) -> torch.Tensor:
        count("loss")
        return plain(piece)

    def collecting(collect: Callable[[], None]) -> Callable[[], None]:
        return lambda: (collect(), count("collecting"))[0]

    monkeypatch.setattr(parts[0], "collect_gradients", collecting(parts[0].collect_gradients))
    job.batch_size = 2
    found = train(settings, scope, parts, iter(torch.split(tokens_of(12), 4)), loss, job)
    numbers = {str(i): x.detach() for i, x in enumerate(x for part in parts for x in part.parameters)}
    return numbers | fingerprint(job.model), found.losses, notes, job.batch_size


@pytest.mark.parametrize("place", ["loss", "collecting"])
@pytest.mark.parametrize("at", range(1, 7))  # two pieces a step
@pytest.mark.parametrize("subset", ["all", "mask_lora"])
def test_a_step_of_training_starts_again(subset: str, at: int, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, losses, none, _ = trained(subset, None, monkeypatch)
    found, again, notes, size = trained(subset, (place, at), monkeypatch)
    assert none == {}
    assert notes == {"batch size halved to 1": f"out of memory in training step {(at + 1) // 2}"}
    assert (size, len(again)) == (1, 3)
    assert again == pytest.approx(losses, rel=1e-6)  # told in float32
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


def test_one_sequence_that_cannot_be_trained_on_ends_it() -> None:
    job, notes = scarce_job()
    job.batch_size = 2
    settings = Retraining("norms", steps=1, batch=2)
    parts = parts_of(settings, whole_model(job), torch.Generator())

    def loss(piece: torch.Tensor) -> torch.Tensor:
        raise HOST

    with pytest.raises(RuntimeError, match="allocate memory"):
        train(settings, whole_model(job), parts, iter([tokens_of(2)]), loss, job)
    assert list(notes) == ["batch size halved to 1"]


def test_what_a_student_learns_is_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense outputs, where no pass for gradients gave them; training itself takes one sample at a time."""
    found = []
    for scarce in (True, False):
        job, notes = scarce_job(torch.float64)
        for block in walk(job):
            replica = block.replica()
            lesson = Lesson(job, replica, range(BATCH))
            with monkeypatch.context() as shortage:
                if scarce:
                    shortage.setattr(Replica, "forward", short_of_memory(Replica.forward))
                lesson.work_out()
            student = Student(job, block, replica, lesson, 0.001, latent=False)
            student.prune({m: keep_mask(m.weight.abs(), job.target) for m in block.matrices})
            student.train(range(BATCH))
            error = student.error(range(BATCH), {m: student.weight(m) for m in block.matrices})
            found.append([error, *(student.weight(m).detach().clone() for m in block.matrices)])
        assert list(notes) == (["batch size halved to 2"] if scarce else [])
    for one, other in zip(found[:BLOCKS], found[BLOCKS:], strict=True):
        for value, expected in zip(one, other, strict=True):
            torch.testing.assert_close(value, expected, **EXACT)


def short_of_memory(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def scarce(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) > 2:
            raise DEVICE
        return forward(self, hidden)

    return scarce


@pytest.mark.parametrize(
    ("error", "expected"),
    cases(
        {
            "device": (DEVICE, True),
            "host": (HOST, True),
            "Python": (MemoryError(), True),
            "runtime": (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
            "library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
            "shapes": (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), False),
            "somebody's words": (ValueError("can't allocate memory"), False),
        }
    ),
)
def test_out_of_memory_is_told_from_the_rest(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_host_that_has_no_room_says_so_in_these_words() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)

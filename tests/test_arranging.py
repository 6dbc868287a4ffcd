"""Batch sizes and where things rest, chosen from what is free: with made-up numbers, and what a run records of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import Bench, cases, make_job, tiny, tokens_of
from transformers import LlamaConfig, LlamaForCausalLM

from prunebench.bench import runner
from prunebench.bench.measure import free_bytes
from prunebench.bench.plan import Planner
from prunebench.bench.suite import load_suite
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.spec import Eval, EvalFacts, EvalJob, Score
from prunebench.targets import NM
from prunebench.toolkit import InputNorm, walk
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.arranging import Arrangement, Footprint, arrange, footprint
from prunebench.toolkit.placement import HostActivations, Resident, Streaming

GIB = 1 << 30
LLAMA_7B = Footprint(weights=13 * GIB, outside=GIB, activations=2 * GIB, block=3 * GIB, sequence=GIB // 2)
"""Roughly; with a batch of 8 it takes 22 GiB in all."""
ALL: list[type[Resident]] = [Resident, HostActivations, Streaming]


@pytest.mark.parametrize(
    ("free", "expected"),
    cases(
        {
            "ample": (1000, (8, Resident)),
            "room": (25, (8, Resident)),
            "not for activations": (23, (8, HostActivations)),
            "nor for the whole batch": (21, (4, HostActivations)),
            "for two": (19.5, (2, HostActivations)),
            "for one": (18.6, (1, HostActivations)),
            "not for the model": (18, (8, Streaming)),
            "for a part of it": (7, (4, Streaming)),
            "for hardly anything": (5.2, (1, Streaming)),
            "for nothing": (0, (1, Streaming)),
        }
    ),
)
def test_what_fits_is_taken_and_the_batch_is_the_last_to_go(free: float, expected: tuple[int, type[Resident]]) -> None:
    assert arrange(LLAMA_7B, int(free * GIB), ALL) == Arrangement(*expected)


def test_with_room_what_is_free_decides_nothing() -> None:
    assert len({arrange(LLAMA_7B, free * GIB, ALL) for free in range(25, 2000, 7)}) == 1


@pytest.mark.parametrize(("free", "place"), [(1000, Resident), (23, HostActivations), (18, Streaming), (0, Streaming)])
def test_a_batch_that_was_asked_for_is_kept(free: int, place: type[Resident]) -> None:
    assert arrange(LLAMA_7B, free * GIB, ALL, batch_size=6) == Arrangement(6, place)


@pytest.mark.parametrize(("free", "size"), [(1000, 8), (22.5, 4), (0, 1)])
def test_a_host_has_one_place_only(free: float, size: int) -> None:
    assert arrange(LLAMA_7B, int(free * GIB), [Resident]) == Arrangement(size, Resident)


def test_the_footprint_of_a_model_is_that_of_its_numbers() -> None:
    model = tiny(tie_word_embeddings=True)
    anatomy = find_anatomy(model)
    found = footprint(model, anatomy.blocks, samples=5, length=7, hidden=16)
    embedding = model.get_input_embeddings().weight.nbytes
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert found.outside == embedding + 16 * 4  # and the final norm
    assert found.activations == 5 * 7 * 16 * 4
    assert found.block > 3 * (found.weights - found.outside) // 3
    assert footprint(model, anatomy.blocks, 5, 7, 16, gradients=False).sequence < found.sequence / 2
    assert found.blocks == tuple(sum(parameter.nbytes for parameter in block.module.parameters()) for block in anatomy.blocks)
    longer = footprint(model, anatomy.blocks, samples=5, length=14, hidden=16)
    assert longer.sequence == 2 * found.sequence
    assert footprint(model.double(), anatomy.blocks, 5, 7, 16).weights == 2 * found.weights


def test_activations_on_the_host_change_no_bit() -> None:
    jobs = [make_job(tiny(), tokens_of(), placement=place("cpu"), target=NM(2, 4)) for place in (Resident, HostActivations)]
    found = [[norms for block in walk(job) for norms in block.collect(InputNorm).values()] for job in jobs]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_host_has_what_is_available_or_what_is_allowed() -> None:
    assert free_bytes(torch.device("cpu")) > 50 << 20
    assert free_bytes(torch.device("cpu"), limit=1.0) < 0


LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
"""Of a model on the meta device: nothing is allocated."""


@pytest.fixture(scope="module")
def seven_billion() -> Callable[[bool], Footprint]:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B, **heads)).to(torch.bfloat16)
    anatomy = find_anatomy(model)
    return lambda gradients: footprint(model, anatomy.blocks, 128, 2048, 4096, gradients)


@pytest.mark.parametrize("gradients", [False, True])
def test_seven_billion_weights_stay_on_a_large_device_with_the_whole_batch(
    seven_billion: Callable[[bool], Footprint], gradients: bool
) -> None:
    assert arrange(seven_billion(gradients), 139 * GIB, ALL) == Arrangement(8, Resident)


def test_seven_billion_weights_are_streamed_with_the_whole_batch_through_8_gib(
    seven_billion: Callable[[bool], Footprint],
) -> None:
    found = seven_billion(False)
    assert arrange(found, 8 * GIB, ALL) == Arrangement(8, Streaming)
    taken = found.outside + max(found.blocks) + found.block + 8 * (found.sequence + found.passing)
    assert 6.0 * GIB < taken < 7.2 * GIB


# Runs


def planned(bench: Bench, folder: Path, register: Callable[..., None], *classes: type, **options: Any) -> Any:
    register(*classes)
    (request,) = bench.requests(folder, "wanda", **options)
    return replace(request, batch_size=0)


@pytest.mark.parametrize(("free", "size"), [(1 << 40, 8), (0, 1)])
def test_a_run_chooses_and_records(
    bench: Bench, tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, free: int, size: int
) -> None:
    monkeypatch.setattr(runner, "free_bytes", lambda device, limit: free)
    record = runner.run(planned(bench, tmp_path, register), lambda *_: None, "inline")
    assert (record.status, record.provenance.batch_size) == ("ok", size)
    assert record.steps[0].notes == {}


def test_a_limit_on_the_device_is_planned_and_recorded(bench: Bench, tmp_path: Path, register: Callable[..., None]) -> None:
    request = replace(planned(bench, tmp_path, register), batch_size=4)
    record = runner.run(replace(request, device_memory=float(3 * GIB)), lambda *_: None, "inline")
    assert (record.status, record.steps[0].notes) == ("ok", {"device memory limited to": "3 GiB, when the batch was chosen"})
    suite = tmp_path / "limited.toml"
    suite.write_text(bench.suite_text("wanda").replace("threads = 1", "threads = 1\ndevice_memory = 3.0"))
    planner = Planner(load_suite(str(suite)), load_registry(), "here", "prunebench run limited.toml", "cpu")
    assert [found.device_memory for found in planner.requests()] == [3 * GIB]


def test_a_setting_of_kernels_that_cannot_be_read_is_told_before_work(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "typo")
    with pytest.raises(RequestError, match="'typo', and none of on, off and interpret"):
        bench.requests(tmp_path, "wanda")


@dataclass
class Hungry(Eval):
    """Has room for two at a time."""

    name: ClassVar[str] = "hungry"
    begun: ClassVar[list[int]] = []
    error: ClassVar[Exception] = torch.OutOfMemoryError("CUDA out of memory.")
    most: ClassVar[int] = 2

    def conditions(self, facts: EvalFacts) -> dict[str, Any]:
        return {"eval": "hungry"}

    def measure(self, job: EvalJob) -> Score:
        self.begun.append(job.batch_size)
        if job.batch_size > self.most:
            raise self.error
        return Score(float(job.batch_size), "sequences", True)


@pytest.fixture
def hungry(bench: Bench, tmp_path: Path, register: Callable[..., None]) -> Any:
    Hungry.begun, Hungry.most = [], 2
    Hungry.error = torch.OutOfMemoryError("CUDA out of memory.")
    register(Hungry)
    (request,) = bench.requests(tmp_path, "wanda", evals=["hungry"])
    return replace(request, batch_size=8)


def test_an_evaluation_begins_anew_with_half_the_batch(hungry: Any) -> None:
    record = runner.run(hungry, lambda *_: None, "inline")
    assert Hungry.begun == [8, 4, 2]
    assert record.scores["hungry"].value == 2
    assert record.steps[0].notes == {"hungry: batch size halved to 2": "out of memory"}


def test_that_it_did_is_known_after_a_kill(hungry: Any, bench: Bench, tmp_path: Path) -> None:
    (request,) = bench.requests(tmp_path, "wanda", evals=["hungry", bench.perplexity])
    request = replace(request, batch_size=8, checkpoint_every=1, checkpoints=str(tmp_path / "kept"))

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("eval perplexity"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(request, kill, "inline")
    (step,) = runner.run(request, lambda *_: None, "inline").steps
    assert Hungry.begun == [8, 4, 2]
    assert step.notes == {"hungry: batch size halved to 2": "out of memory", "resumed": "after step 1 of 1"}


@pytest.mark.parametrize(
    "error",
    cases(
        {
            "device": torch.OutOfMemoryError("CUDA out of memory."),
            "host": RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            "Python": MemoryError(),
        }
    ),
)
def test_what_does_not_fit_at_all_fails_as_out_of_memory(hungry: Any, error: Exception) -> None:
    Hungry.error, Hungry.most = error, 0
    record = runner.run(hungry, lambda *_: None, "inline")
    assert Hungry.begun == [8, 4, 2, 1]
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type) == ("oom", type(error).__name__)


def test_a_step_whose_block_does_not_fit_notes_the_halvings_and_goes_on(
    bench: Bench, tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, failed = Resident.fetch, [0]

    def scarce(self: Resident, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) > 2:
            failed[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fetch(self, tensor)

    monkeypatch.setattr(Resident, "fetch", scarce)
    (request,) = bench.requests(tmp_path, "wanda")
    record = runner.run(request, lambda *_: None, "inline")
    assert record.status == "ok"
    assert record.steps[0].notes == {"batch size halved to 2": "out of memory in block 0"}
    assert failed == [1]

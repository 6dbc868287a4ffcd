"""What one run makes and later ones take: the same bits, the cost of making them, and nothing that is not theirs."""

from __future__ import annotations

import dataclasses
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Bench, cases, same_bits
from test_runner import halve, stranger
from transformers import PreTrainedModel

from prunebench.bench import artefacts as artefacts_module
from prunebench.bench import runner
from prunebench.bench.artefacts import LIMIT, Artefacts
from prunebench.bench.measure import Cost
from prunebench.bench.plan import RunRequest
from prunebench.results.records import RunRecord, StepRecord
from prunebench.spec import Job, Needs, Pruner
from prunebench.toolkit import InputNorm, phase, walk
from prunebench.toolkit.cache import save_arrays
from prunebench.toolkit.placement import Resident
from prunebench_pruners.gblm import Gblm

MAKING = 0.2
"""Seconds that the slow artefact takes."""

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def request_(bench: Bench, tmp_path: Path) -> RunRequest:
    (found,) = bench.requests(tmp_path, "wanda")
    return found


@pytest.fixture
def kept(own_cache: Path) -> Callable[[], list[Path]]:
    """The files of the cache, oldest first."""
    return lambda: sorted((own_cache / "artefacts").glob("*"), key=lambda path: path.stat().st_mtime_ns)


def ran(request: RunRequest) -> RunRecord:
    record = runner.run(request, lambda *call: None, "inline")
    assert record.status == "ok", record.reason
    assert RunRecord.model_validate_json(record.model_dump_json(by_alias=True)) == record
    return record


def step_of(record: RunRecord) -> StepRecord:
    (step,) = record.steps
    return step


class Maker:
    """Makes one tensor a call, and counts them."""

    def __init__(self, size: int = 3, dtype: torch.dtype = torch.float32) -> None:
        self.size, self.dtype, self.calls = size, dtype, 0

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return {"model.layers.0": torch.full((self.size,), float(self.calls), dtype=self.dtype), "file": torch.tensor([7])}


def asked(request: RunRequest, make: Maker, name: str = "thing", pruner: Pruner | None = None, first: bool = True) -> Artefacts:
    """A step that asks for one artefact."""
    found = Artefacts(request, pruner or Gblm(), first)
    assert found(name, make).keys() == {"model.layers.0", "file"}
    return found


# Through the runner


def test_gblm_takes_its_gradients_once_for_all_targets(
    bench: Bench, tmp_path: Path, kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[PreTrainedModel] = []
    load = runner.load_model
    monkeypatch.setattr(runner, "load_model", lambda *args: models.append(load(*args)) or models[-1])
    first, other = bench.requests(tmp_path, "gblm", targets=["0.5", "2:4"])
    (by_l2,) = bench.requests(tmp_path, "gblm[norm=l2]")
    records = [ran(request) for request in (first, other, by_l2, first)]
    reused = [step_of(record).reused for record in records]
    assert reused == [[], ["loss gradients l1"], [], ["loss gradients l1"]]
    assert len(kept()) == 2
    made, again = step_of(records[0]), step_of(records[3])
    assert made.phases.keys() == again.phases.keys()
    assert records[0].scores["perplexity"].value == records[3].scores["perplexity"].value
    assert all(same_bits(one, two) for one, two in zip(models[0].parameters(), models[3].parameters(), strict=True))
    assert again.peak_host_bytes is not None


def slow_step(pruned: list[dict[str, torch.Tensor]]) -> type[Pruner]:
    def make() -> dict[str, torch.Tensor]:
        with phase("statistics"):
            time.sleep(MAKING)
        return {"made": torch.rand(3)}

    def prune(job: Job) -> None:
        pruned.append(job.artefact("thing", make))
        halve(job)

    return stranger(prune, needs=Needs.CALIBRATION)


def test_a_reused_one_costs_what_it_had_cost_but_not_its_loading(
    bench: Bench, tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_load", "_save"):
        plain = getattr(artefacts_module, name)
        monkeypatch.setattr(artefacts_module, name, lambda *args, plain=plain: (time.sleep(3 * MAKING), plain(*args))[1])
    found: list[dict[str, torch.Tensor]] = []
    register(slow_step(found))
    (request,) = bench.requests(tmp_path, "stranger")
    made, reused = step_of(ran(request)), step_of(ran(request))
    assert (made.reused, reused.reused) == ([], ["thing"])
    for step in (made, reused):
        assert MAKING <= step.phases["statistics"] < 2 * MAKING
        assert step.seconds < 2.5 * MAKING
        assert "" not in step.phases
    assert reused.phases["statistics"] == pytest.approx(made.phases["statistics"], abs=1e-3)
    assert same_bits(found[0]["made"], found[1]["made"])


def walking_step(job: Job) -> None:
    """Makes its artefact of batches."""

    def make() -> dict[str, torch.Tensor]:
        for block in walk(job):
            block.collect(InputNorm)
        return {"made": torch.ones(3)}

    job.artefact("thing", make)
    halve(job)


def test_what_half_the_batch_made_is_not_kept(
    bench: Bench,
    tmp_path: Path,
    kept: Callable[[], list[Path]],
    register: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fetch = Resident.fetch

    def scarce(self: Resident, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return fetch(self, tensor)

    register(stranger(walking_step, needs=Needs.CALIBRATION))
    (request,) = bench.requests(tmp_path, "stranger")
    with monkeypatch.context() as scarcity:
        scarcity.setattr(Resident, "fetch", scarce)
        assert "batch size halved to 1" in step_of(ran(request)).notes
    assert kept() == []
    assert step_of(ran(request)).reused == []
    assert step_of(ran(request)).reused == ["thing"]


def test_a_later_step_finds_nothing(
    bench: Bench, tmp_path: Path, register: Callable[..., None], kept: Callable[[], list[Path]]
) -> None:
    """Its model is what the steps before it left."""
    make = Maker()
    register(stranger(lambda job: (job.artefact("thing", make), halve(job)), name="later", needs=Needs.CALIBRATION))
    (request,) = bench.requests(tmp_path, "magnitude[group=row] + later")
    for _ in range(2):
        assert [step.reused for step in ran(request).steps] == [[], []]
    assert (make.calls, kept()) == (2, [])


# What belongs to whom


def test_kept_tensors_are_the_same_and_on_the_host(request_: RunRequest) -> None:
    wide = {
        "transposed": torch.randn(3, 5, dtype=torch.float64).t(),
        "whole": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 2),
    }
    Artefacts(request_, Gblm(), True)("thing", lambda: wide)
    found = Artefacts(request_, Gblm(), True)("thing", lambda: pytest.fail("it is there"))
    assert list(found) == list(wide)
    for name, tensor in wide.items():
        assert (found[name].dtype, found[name].device.type) == (tensor.dtype, "cpu")
        assert torch.equal(found[name], tensor)
    found["whole"] += 1  # not read-only


def replaced_spec(**changes: Any) -> Callable[[RunRequest], RunRequest]:
    return lambda request: dataclasses.replace(request, spec=request.spec.model_copy(update=changes))


def replaced_model(**changes: Any) -> Callable[[RunRequest], RunRequest]:
    return lambda request: replaced_spec(model=request.spec.model.model_copy(update=changes))(request)


@pytest.mark.parametrize(
    ("change", "serves"),
    cases(
        {
            "another target": (replaced_spec(target="2:4"), True),
            "another seed": (replaced_spec(seed=9), True),
            "other evaluations": (replaced_spec(evals=()), True),
            "the same model by another name": (replaced_model(name="its cousin"), True),
            "another folder": (lambda request: dataclasses.replace(request, folder="elsewhere"), True),
            "other weights": (replaced_model(weights="0" * 16), False),
            "another dtype": (replaced_model(dtype="bfloat16"), False),
            "other tokens": (replaced_spec(calibration_tokens="0" * 16), False),
            "no tokens": (replaced_spec(calibration_tokens=None), False),
            "another batch size": (lambda request: dataclasses.replace(request, batch_size=3), False),
            "other threads": (lambda request: dataclasses.replace(request, threads=7), False),
            "another machine": (lambda request: dataclasses.replace(request, machine="there"), False),
            "another device": (lambda request: dataclasses.replace(request, device="meta"), False),
        }
    ),
)
def test_only_what_the_bits_depend_on_counts(
    change: Callable[[RunRequest], RunRequest], serves: bool, request_: RunRequest
) -> None:
    make = Maker()
    asked(request_, make)
    other = asked(change(request_), make)
    assert (other.reused, make.calls) == ((["thing"], 1) if serves else ([], 2))


def test_another_method_revision_or_name_gets_its_own(request_: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    asked(request_, make)
    assert asked(request_, make, pruner=Gblm(norm="l2", alpha=3.0)).reused == ["thing"], "its name says all that counts"
    assert asked(request_, make, "another thing").reused == []
    assert asked(request_, make, pruner=stranger()()).reused == []
    monkeypatch.setattr(Gblm, "revision", 99)
    assert asked(request_, make).reused == []
    assert make.calls == 4


def test_asked_twice_in_one_step_it_is_made_twice(request_: RunRequest) -> None:
    """A run without a cache would pay twice."""
    make = Maker()
    asked(request_, make)
    step = asked(request_, make)
    assert (step.reused, make.calls) == (["thing"], 1)
    step("thing", make)
    assert (step.reused, make.calls) == (["thing"], 2)


# What can go wrong


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "not ours", "no cost"])
def test_a_damaged_file_is_made_again(damage: str, request_: RunRequest, kept: Callable[[], list[Path]]) -> None:
    make = Maker(size=1000)
    asked(request_, make)
    [path] = kept()
    good = path.read_bytes()
    if damage == "not ours":
        save_arrays("artefacts", path.stem, {"tensor a": np.arange(3), "cost": np.arange(9, dtype=np.uint8)})
    elif damage == "no cost":
        save_arrays("artefacts", path.stem, {"tensor a": np.arange(3)})
    else:
        middle = len(good) // 3
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        path.write_bytes({"emptied": b"", "cut": good[:-9], "flipped": flipped}[damage])
    assert asked(request_, make).reused == []
    assert asked(request_, make).reused == ["thing"]
    assert (make.calls, kept()) == (2, [path])


def test_what_numpy_cannot_hold_is_kept_by_its_bits(request_: RunRequest) -> None:
    make = Maker(dtype=torch.bfloat16)
    asked(request_, make)
    found = Artefacts(request_, Gblm(), True)("thing", lambda: pytest.fail("it is there"))
    assert found["model.layers.0"].dtype == torch.bfloat16
    assert same_bits(found["model.layers.0"], torch.full((3,), 1.0, dtype=torch.bfloat16))
    assert torch.equal(found["file"], torch.tensor([7]))


def test_a_cache_that_cannot_be_written_is_merely_slow(request_: RunRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEBENCH_CACHE", __file__)
    make = Maker()
    for _ in range(2):
        assert asked(request_, make).reused == []


# Space


def test_the_oldest_make_room(request_: RunRequest, kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, str(20_000 / 2**30))
    make = Maker(size=2000)  # 8000 bytes, and the file's own
    for index, name in enumerate("abc"):
        asked(request_, make, name)
        os.utime(kept()[-1], ns=(index, index))
    assert len(kept()) == 2
    assert sum(path.stat().st_size for path in kept()) <= 20_000
    assert [asked(request_, make, name).reused for name in "cb"] == [["c"], ["b"]]
    asked(request_, make, "a")
    assert asked(request_, make, "b").reused == [], "it was the oldest"


def test_what_a_killed_run_left_makes_room_too(
    request_: RunRequest, kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.setenv(LIMIT, str(20_000 / 2**30))
    (own_cache / "artefacts").mkdir(parents=True)
    (own_cache / "artefacts" / "tmpk1ll3d").write_bytes(bytes(19_950))
    asked(request_, Maker())
    [path] = kept()
    assert path.suffix == ".npz"


@pytest.mark.parametrize("limit", ["0", "0.000001"])
def test_what_is_larger_than_all_room_is_not_kept_and_drives_nothing_out(
    limit: str, request_: RunRequest, kept: Callable[[], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(request_, Maker(), "small")
    monkeypatch.setenv(LIMIT, limit)
    make = Maker(size=1000)
    for _ in range(2):
        assert asked(request_, make).reused == []
    assert len(kept()) == 1


@pytest.mark.parametrize("limit", ["much", "-1", "nan"])
def test_a_limit_that_is_none_is_told(
    limit: str, bench: Bench, tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LIMIT, limit)
    register(slow_step([]))
    (request,) = bench.requests(tmp_path, "stranger")
    record = runner.run(request, lambda *call: None, "inline")
    assert record.reason == f"PRUNEBENCH_ARTEFACTS_GIB is a number of GiB, not {limit!r}."


def test_a_large_one_is_not_held_twice(request_: RunRequest) -> None:
    made = {"large": torch.ones(24 << 20)}
    tracemalloc.start()
    try:
        Artefacts(request_, Gblm(), True)("thing", lambda: made)
        assert tracemalloc.get_traced_memory()[1] < made["large"].nbytes / 2
        tracemalloc.reset_peak()
        found = Artefacts(request_, Gblm(), True)("thing", lambda: pytest.fail("it is there"))
        assert tracemalloc.get_traced_memory()[1] < 1.5 * made["large"].nbytes
    finally:
        tracemalloc.stop()
    assert same_bits(found["large"], made["large"])


def test_costs_add_up_and_peaks_do_not() -> None:
    cost = Cost({"statistics": 1.0, "other": 2.0}, None, 100)
    cost.include(Cost({"statistics": 4.0, "calibration": 8.0}, 70, 300))
    cost.include(Cost({}, 50, 200))
    assert cost == Cost({"statistics": 5.0, "other": 2.0, "calibration": 8.0}, 70, 300)
    cost.include(Cost(crowded=True))
    cost.include(Cost())
    assert cost.crowded

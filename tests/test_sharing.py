"""What the runs of a sweep share: made once, waited for, taken bit for bit; and the page that counts it."""

from __future__ import annotations

import dataclasses
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, cases, same_bits, speed_script
from test_artefacts import Maker, replaced_model, replaced_spec
from test_runner import halve, stranger

from prunebench.bench import lodging, runner
from prunebench.bench.artefacts import LIMIT, Artefacts, making
from prunebench.bench.dense_states import DenseStates
from prunebench.bench.evals.blockwise import Passage
from prunebench.bench.plan import RunRequest
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Job
from prunebench.toolkit.phases import PhaseClock, phase
from prunebench_pruners.gblm import Gblm

pytestmark = pytest.mark.usefixtures("own_cache")

REUSED = "divergence: the dense model"


@pytest.fixture
def request_(bench: Bench, tmp_path: Path) -> RunRequest:
    (found,) = bench.requests(tmp_path, "wanda", evals=[f"divergence[data={bench.evaluation},window=16,windows=9]"])
    return found


@pytest.fixture
def passages(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that windows are taken through a model's blocks."""
    whole, found = Passage.last_hidden, list[int]()
    monkeypatch.setattr(Passage, "last_hidden", lambda self, *args: (found.append(1), whole(self, *args))[1])
    return found


def ran(request: RunRequest) -> RunRecord:
    record = runner.run(request, lambda *call: None, "inline")
    assert record.status == "ok", record.reason
    return record


def states(request: RunRequest, progress: Callable[..., None] = lambda *_: None) -> DenseStates:
    return DenseStates(request, progress)


class Counting:
    """Makes one tensor a call, and counts them."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 1000) -> None:
        self.calls, self.dtype, self.size = 0, dtype, size

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return torch.randn(self.size, 4, 2, generator=torch.Generator().manual_seed(self.calls)).to(self.dtype)


# The dense model's last hidden states


def test_runs_on_one_model_take_its_windows_through_the_dense_blocks_once(
    bench: Bench, tmp_path: Path, passages: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"divergence[data={bench.evaluation},window=16,windows=9]"]
    requests = bench.requests(tmp_path, "wanda", targets=["0.5", "2:4", "4:8"], evals=asked)
    shared = [ran(request) for request in requests]
    assert len(passages) == 1
    assert [REUSED in record.steps[-1].notes for record in shared] == [False, True, True]
    monkeypatch.setenv(LIMIT, "0")
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "another cache"))
    apart = [ran(request) for request in requests]
    assert len(passages) == 1 + len(requests)
    monkeypatch.setattr("prunebench.bench.evaluation.DenseStates", lambda *_: None)
    plain = [ran(request) for request in requests]
    assert len(passages) == 1 + len(requests)
    for one, other, third in zip(shared, apart, plain, strict=True):
        assert one.scores["divergence"].value == other.scores["divergence"].value == third.scores["divergence"].value
        assert one.scores["divergence"].items == other.scores["divergence"].items == third.scores["divergence"].items


def test_the_dense_model_is_loaded_only_where_something_of_it_is_needed(
    bench: Bench, tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    load = lodging.load_model
    monkeypatch.setattr(lodging, "load_model", lambda *args: (loads.append(1), load(*args))[1])

    def scale_the_last_norm(job: Job) -> None:
        halve(job)
        with torch.no_grad():
            job.model.model.norm.weight.mul_(1.5)

    register(stranger(scale_the_last_norm, changes=Changes.MASK_GROWS | Changes.NORMS))
    text = f"data={bench.evaluation},window=16,windows=9"
    asked = [f"divergence[{text}]"]
    first, second = bench.requests(tmp_path, "wanda", targets=["0.5", "2:4"], evals=asked)
    (other,) = bench.requests(tmp_path, "stranger", evals=asked)
    found = []
    for request, so_far in ((first, 1), (second, 1), (other, 2)):
        found.append(ran(request).scores["divergence"])
        assert len(loads) == so_far
    monkeypatch.setattr("prunebench.bench.evaluation.DenseStates", lambda *_: None)
    for request, score in zip((first, second, other), found, strict=True):
        assert ran(request).scores["divergence"].items == score.items


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_kept_states_are_the_same_bits(dtype: torch.dtype, request_: RunRequest) -> None:
    make = Counting(dtype)
    made = states(request_)("windows", make)
    found = states(request_)("windows", make)
    assert make.calls == 1
    assert same_bits(made, found)
    assert found.dtype == dtype


def test_they_are_mapped_and_not_read_into_memory(request_: RunRequest) -> None:
    make = Counting(size=1 << 18)
    size = states(request_)("windows", make).nbytes
    tracemalloc.start()
    try:
        found = states(request_)("windows", make)
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()
    assert found.nbytes == size
    assert make.calls == 1


@pytest.mark.parametrize(
    ("change", "serves"),
    cases(
        {
            "another target": (replaced_spec(target="2:4"), True),
            "another seed": (replaced_spec(seed=9), True),
            "other calibration": (replaced_spec(calibration_tokens="0" * 16), True),
            "the same model by another name": (replaced_model(name="its cousin"), True),
            "other weights": (replaced_model(weights="0" * 16), False),
            "another dtype": (replaced_model(dtype="bfloat16"), False),
            "other threads": (lambda request: dataclasses.replace(request, threads=7), False),
            "another machine": (lambda request: dataclasses.replace(request, machine="there"), False),
            "another device": (lambda request: dataclasses.replace(request, device="meta"), False),
        }
    ),
)
def test_only_what_their_bits_depend_on_counts(
    change: Callable[[RunRequest], RunRequest], serves: bool, request_: RunRequest
) -> None:
    make = Counting()
    states(request_)("windows", make)
    states(change(request_))("windows", make)
    assert make.calls == (1 if serves else 2)
    states(request_)("other windows", make)
    assert make.calls == (2 if serves else 3)


def test_another_batch_or_other_windows_have_their_own(bench: Bench, tmp_path: Path, passages: list[int]) -> None:
    text = f"divergence[data={bench.evaluation},window=16"
    (one,) = bench.requests(tmp_path, "wanda", evals=[f"{text},windows=9]"])
    (other,) = bench.requests(tmp_path, "wanda", evals=[f"{text},windows=8]"])
    for request in (one, other, dataclasses.replace(one, batch_size=3), one):
        ran(request)
    assert len(passages) == 3


@pytest.mark.parametrize("damage", ["emptied", "cut", "flipped", "not ours"])
def test_a_damaged_file_is_made_again(damage: str, request_: RunRequest, own_cache: Path) -> None:
    make = Counting()
    states(request_)("windows", make)
    [path] = (own_cache / "artefacts").glob("*")
    good = path.read_bytes()
    flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
    path.write_bytes({"emptied": b"", "cut": good[:-9], "flipped": flipped, "not ours": b"no array"}[damage])
    states(request_)("windows", make)
    states(request_)("windows", make)
    assert make.calls == 2
    assert len(list((own_cache / "artefacts").glob("*"))) == 1


@pytest.mark.parametrize("cache", ["no room", "no folder"])
def test_where_nothing_can_be_kept_they_are_made_each_time(
    cache: str, request_: RunRequest, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cache == "no room":
        monkeypatch.setenv(LIMIT, "0.00001")
    else:
        monkeypatch.setenv("PRUNEBENCH_CACHE", __file__)
    make = Counting()
    for _ in range(2):
        states(request_)("windows", make)
    assert make.calls == 2
    assert list((own_cache / "artefacts").glob("*")) == []


# Several at once


class Slow:
    """What another run makes, as long as it is told to."""

    def __init__(self, fails: bool = False) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self.fails = fails

    def __call__(self) -> Any:
        self.begun.set()
        assert self.let.wait(20)
        if self.fails:
            raise ZeroDivisionError
        return Maker()()


@pytest.mark.parametrize("fails", [False, True], ids=["made", "failed"])
def test_the_second_waits_for_the_first_in_no_phase(fails: bool, request_: RunRequest) -> None:
    slow, told = Slow(fails), list[str]()

    def first() -> None:
        try:
            Artefacts(request_, Gblm(), True)("thing", slow)
        except ZeroDivisionError:
            assert fails

    class Job:
        batch_size = request_.batch_size

        def progress(self, what: str, done: int, total: int) -> None:
            told.append(what)
            threading.Timer(0.3, slow.let.set).start()

    other = threading.Thread(target=first)
    other.start()
    assert slow.begun.wait(20)
    second, make = Artefacts(request_, Gblm(), True), Maker()
    second.job = Job()  # type: ignore[assignment]
    clock = PhaseClock(torch.device("cpu"))
    with clock.running(), phase("statistics"):
        found = second("thing", make)
    other.join()
    assert told == ["wait for another run's thing"]
    assert (second.reused, make.calls) == (([], 1) if fails else (["thing"], 0))
    assert torch.equal(found["file"], torch.tensor([7]))
    assert sum(clock.seconds().values()) < 0.2


def test_evaluations_wait_too_and_the_wait_is_told(request_: RunRequest) -> None:
    begun, let, make = threading.Event(), threading.Event(), Counting()

    def slowly() -> torch.Tensor:
        begun.set()
        assert let.wait(20)
        return make()

    def waits(what: str, done: int, total: int) -> None:
        assert "another run" in what
        threading.Timer(0.2, let.set).start()

    other = threading.Thread(target=lambda: states(request_)("windows", slowly))
    other.start()
    assert begun.wait(20)
    second, notes = states(request_, waits), dict[str, str]()
    found = second("windows", lambda: pytest.fail("the other makes it"))
    other.join()
    assert make.calls == 1
    assert second.settle(notes.__setitem__) >= 0.15
    assert list(notes) == ["the dense model"]
    assert second.settle(notes.__setitem__) == 0
    assert same_bits(found, Counting()())


def test_different_things_are_made_at_once() -> None:
    with making("a", lambda: pytest.fail("nobody is there")), making("b", lambda: pytest.fail("nobody is there")):
        pass


# The page that counts it

sharing = speed_script("sharing")


def test_the_matrix_together_and_apart(bench: Bench, tmp_path: Path) -> None:
    matrix = sharing.Matrix(
        model=str(bench.model),
        methods=("magnitude", "gblm"),
        targets=("0.5", "2:4"),
        texts=bench.folder,
        samples=4,
        length=16,
        windows=9,
        threads=1,
    )
    suite = tmp_path / "sharing.toml"
    suite.write_text(matrix.suite())
    one, other = sharing.together(suite, ""), sharing.apart(suite, "")
    assert [(r.spec.method, r.spec.target) for r in one.records] == [(r.spec.method, r.spec.target) for r in other.records]
    assert len(one.records) == 4
    assert one.reused() == {"gblm: loss gradients l1": 1, "divergence: the dense model's last hidden states": 3}
    assert other.reused() == {}
    assert sharing.differing(one, other) == []
    shown = sharing.table((one, other), 2.0)
    assert "reused 3x: divergence: the dense model's last hidden states" in shown
    assert "all scores are the same, bit for bit" in shown
    other.records[2] = other.records[0]
    assert "2 scores differ" in sharing.table((one, other), None)


def test_only_some_of_the_matrix(bench: Bench, tmp_path: Path) -> None:
    matrix = sharing.Matrix(model=str(bench.model), texts=bench.folder, samples=4, length=16, windows=9, threads=1)
    assert len(matrix.methods) * len(matrix.targets) == 24
    suite = tmp_path / "sharing.toml"
    suite.write_text(matrix.suite())
    [record] = sharing.together(suite, "magnitude 2:4").records
    assert (record.spec.method, record.spec.target) == ("magnitude", "2:4")

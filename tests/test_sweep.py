"""Many runs: what is settled is left out, what failed is tried again, and no run is done twice."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import Bench, Ran, install_plugin, start_command, tree

from prunebench.bench import sweep as bench_sweep
from prunebench.bench.checkpoint_files import MANIFEST
from prunebench.bench.executors import Listener
from prunebench.bench.plan import Prediction, RunRequest
from prunebench.bench.runner import Outcome, make_record
from prunebench.bench.sweep import Summary, split_settled, sweep
from prunebench.errors import StoreError, WriteError
from prunebench.results.journal import Claim, Journal
from prunebench.results.records import Failure, RunRecord
from prunebench.results.store import ResultStore

FAILURE = Failure(kind="error", type="ValueError", message="no", step=None)


class Scripted:
    """An executor whose runs end as told, at once; in the order they were handed over, or the last first."""

    name = "scripted"

    def __init__(self, slots: int = 1, keeps_records: bool = False, last_first: bool = False, **endings: str) -> None:
        self.slots, self.keeps_records, self.last_first, self.endings = slots, keeps_records, last_first, endings
        self.queue: list[RunRequest] = []
        self.handed: list[list[str]] = []
        self.done: list[str] = []

    def check(self, requests: Sequence[RunRequest]) -> None: ...

    def room(self) -> int:
        return self.slots - len(self.queue)

    def start(self, requests: Sequence[RunRequest]) -> None:
        assert self.keeps_records or len(requests) <= self.room()
        self.queue += requests
        self.handed.append([request.spec.method for request in requests])

    def wait(self, listener: Listener, seconds: float) -> None:
        assert 0 < seconds < 5
        if not self.queue:
            return
        request = self.queue.pop(-1 if self.last_first else 0)
        run, method = request.spec.id, request.spec.method
        self.done.append(method)
        listener.began(run, "here")
        if self.endings.get(method) == "interrupted":
            raise KeyboardInterrupt
        listener.progress(run, "step x", 0, 1)
        listener.progress(run, "block", 1, 2)
        listener.ended(run, self.record(request), b"what it wrote")

    def record(self, request: RunRequest) -> RunRecord:
        ending = self.endings.get(request.spec.method, "ok")
        return make_record(
            request,
            Outcome(),
            self.name,
            refused="not this one." if ending == "refused" else None,
            failure=FAILURE if ending == "failed" else None,
        )

    def close(self) -> None: ...


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def run_began(self, number: int, request: RunRequest, where: str) -> None:
        self.calls.append(("run_began", number, request.spec.method, where))

    def progress(self, number: int, what: str, done: int, total: int) -> None:
        self.calls.append(("progress", number, what, done, total))

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        self.calls.append(("run_ended", number, record.spec.method, record.status, log, path and path.suffix))

    def run_taken(self, number: int, request: RunRequest) -> None:
        self.calls.append(("run_taken", number, request.spec.method))

    def run_done_elsewhere(self, number: int) -> None:
        self.calls.append(("run_done_elsewhere", number))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ResultStore]:
    complaints: list[str] = []
    yield ResultStore(tmp_path / "results", complaints.append)
    assert complaints == []


@pytest.fixture
def requests(bench: Bench, tmp_path: Path) -> list[RunRequest]:
    return bench.requests(tmp_path, "dense", "magnitude", "random", "wanda")


def do(requests: list[RunRequest], store: ResultStore, again: bool = False, **endings: str) -> tuple[Scripted, Summary]:
    """One command: what is settled is left out, the rest is swept."""
    executor = Scripted(**endings)
    todo, _ = parted(requests, store, "here", again)
    return executor, sweep(todo, store, executor, Watcher(), again)


def parted(
    requests: list[RunRequest], store: ResultStore, machine: str, again: bool, endings: Sequence[str] = ()
) -> tuple[list[RunRequest], list[RunRequest]]:
    """The runs to do, and those found done, by the records there are now."""
    return split_settled(requests, [stored.record for stored in store.latest()], machine, again, endings)


def files(store: ResultStore) -> list[str]:
    return sorted(path for path in tree(store.folder) if path.endswith(".json"))


def test_runs_are_done_in_order_and_told(requests: list[RunRequest], store: ResultStore) -> None:
    executor, watcher = Scripted(random="refused", wanda="failed"), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.done == ["dense", "magnitude", "random", "wanda"]
    assert [record.status for record in summary.records] == ["ok", "ok", "refused", "failed"]
    assert [summary.count(status) for status in ("ok", "refused", "failed")] == [2, 1, 1]
    assert summary.elsewhere == 0
    assert watcher.calls[:4] == [
        ("run_began", 1, "dense", "here"),
        ("progress", 1, "step x", 0, 1),
        ("progress", 1, "block", 1, 2),
        ("run_ended", 1, "dense", "ok", b"what it wrote", ".json"),
    ]
    assert watcher.calls[-1] == ("run_ended", 4, "wanda", "failed", b"what it wrote", ".json")
    assert len(store.all()) == 4


def test_what_is_settled_is_left_out(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests[:2], store)
    before = tree(store.folder)
    executor, summary = do(requests, store)
    assert executor.done == ["random", "wanda"]
    assert len(summary.records) == 2
    executor, summary = do(requests, store)
    assert (executor.done, summary.records) == ([], [])
    assert {name: content for name, content in tree(store.folder).items() if name in before} == before


def test_the_parting_keeps_the_order(requests: list[RunRequest], store: ResultStore) -> None:
    do([requests[2], requests[0]], store)
    todo, done = parted(requests, store, "here", again=False)
    assert [request.spec.method for request in todo] == ["magnitude", "wanda"]
    assert [request.spec.method for request in done] == ["dense", "random"]


def test_a_failed_run_is_tried_again_and_its_record_kept(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests, store, wanda="failed")
    (failed,) = [stored for stored in store.all() if stored.record.status == "failed"]
    before = tree(store.folder)
    executor, _ = do(requests, store)
    assert executor.done == ["wanda"]
    assert {name: content for name, content in tree(store.folder).items() if name in before} == before
    assert failed.path.replace(".json", ".2.json") in files(store)
    assert len(files(store)) == 5
    assert {stored.record.status for stored in store.latest()} == {"ok"}
    assert do(requests, store)[0].done == []


def test_a_run_may_fail_again_and_again(requests: list[RunRequest], store: ResultStore) -> None:
    for attempt in range(1, 4):
        assert do(requests[:1], store, dense="failed")[0].done == ["dense"]
        assert len(files(store)) == attempt
    assert len(store.latest()) == 1


def test_a_refusal_is_an_answer(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests, store, random="refused")
    assert do(requests, store)[0].done == []


def test_again_writes_beside(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests, store)
    before = tree(store.folder)
    executor, summary = do(requests, store, again=True)
    assert executor.done == ["dense", "magnitude", "random", "wanda"]
    assert len(summary.records) == 4
    assert {name: content for name, content in tree(store.folder).items() if name in before} == before
    assert len(files(store)) == 8
    assert sum(name.endswith(".2.json") for name in files(store)) == 4
    assert len(store.latest()) == 4


def test_a_later_failure_does_not_undo_what_is_settled(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests[:1], store)
    do(requests[:1], store, again=True, dense="failed")
    assert do(requests[:1], store)[0].done == []


def test_another_machines_records_are_not_taken_as_done(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests, store)
    todo, done = parted(requests, store, "there", again=False)
    assert (len(todo), len(done)) == (4, 0)


def test_another_revision_is_another_run(
    requests: list[RunRequest], store: ResultStore, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    do(requests, store)
    from prunebench_pruners.magnitude import Magnitude

    monkeypatch.setattr(Magnitude, "revision", Magnitude.revision + 1)
    planned = bench.requests(tmp_path, "dense", "magnitude", "random", "wanda")
    assert do(planned, store)[0].done == ["magnitude"]


def test_an_interruption_gets_through_and_keeps_what_is_done(requests: list[RunRequest], store: ResultStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        do(requests, store, random="interrupted")
    assert [stored.record.spec.method for stored in store.all()] == ["dense", "magnitude"]
    assert do(requests, store)[0].done == ["random", "wanda"]


# Two commands on one folder


class Meanwhile(Scripted):
    """Does something while wanda is at work."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__()
        self.what = what

    def record(self, request: RunRequest) -> RunRecord:
        if request.spec.method == "wanda":
            self.what()
        return super().record(request)


def held(store: ResultStore, request: RunRequest) -> Claim:
    """The claim of another command on a run."""
    claim = Journal(store.folder).claim("here", request.spec.id, "a run")
    assert claim is not None
    return claim


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_sweep, "LOOK_AGAIN_SECONDS", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_run_that_another_holds_is_taken_as_done(requests: list[RunRequest], store: ResultStore) -> None:
    """The other command ends it while this one does the rest."""
    claim = held(store, requests[0])

    def end() -> None:
        store.write(Scripted().record(requests[0]))
        claim.release()

    executor, watcher = Meanwhile(end), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.done == ["magnitude", "random", "wanda"]
    assert watcher.calls[0] == ("run_taken", 1, "dense")
    assert [call[0] for call in watcher.calls].count("run_taken") == 1, "told once, however often it is looked at"
    assert summary.elsewhere == 1
    assert watcher.calls[-1] == ("run_done_elsewhere", 1)
    assert len(files(store)) == 4


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("again", [False, True])
def test_what_failed_in_another_command_is_not_done_at_once_again(
    again: bool, requests: list[RunRequest], store: ResultStore
) -> None:
    """Neither where it was waited for, nor where this command came to it later; asked for again, both are done once."""
    if again:
        do(requests, store)
    claim = held(store, requests[0])

    def end() -> None:
        for request in requests[:2]:
            store.write(Scripted(dense="failed", magnitude="failed").record(request))
        claim.release()

    executor = Meanwhile(end)
    summary = sweep([requests[0], requests[3], requests[1]], store, executor, Watcher(), again=again)
    assert executor.done == ["wanda"]
    assert summary.elsewhere == 2


@pytest.mark.usefixtures("impatient")
def test_asked_for_again_a_run_that_another_gave_up_is_done_here(requests: list[RunRequest], store: ResultStore) -> None:
    """Its old record does not count."""
    do(requests, store)
    executor = Meanwhile(held(store, requests[0]).release)
    sweep(requests, store, executor, Watcher(), again=True)
    assert executor.done == ["magnitude", "random", "wanda", "dense"]


def test_runs_are_ended_before_their_claims_are_let_go(requests: list[RunRequest], store: ResultStore) -> None:
    free = []

    class Ending(Scripted):
        def close(self) -> None:
            free.append(Journal(store.folder).claim("here", requests[0].spec.id, "a rival"))

    with pytest.raises(KeyboardInterrupt):
        sweep(requests, store, Ending(dense="interrupted"), Watcher(), again=False)
    assert free == [None]


@pytest.mark.usefixtures("impatient")
def test_a_run_that_another_gave_up_is_done_here(requests: list[RunRequest], store: ResultStore) -> None:
    executor = Meanwhile(held(store, requests[0]).release)
    summary = sweep(requests, store, executor, Watcher(), again=False)
    assert executor.done == ["magnitude", "random", "wanda", "dense"]
    assert (summary.elsewhere, len(files(store))) == (0, 4)


def test_a_run_that_was_settled_since_the_plan_is_not_done(requests: list[RunRequest], store: ResultStore) -> None:
    todo, _ = parted(requests, store, "here", again=False)
    do(requests[:2], store)
    executor = Scripted()
    summary = sweep(todo, store, executor, Watcher(), again=False)
    assert executor.done == ["random", "wanda"]
    assert summary.elsewhere == 2


def test_the_lock_is_let_go_after_every_run(requests: list[RunRequest], store: ResultStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        do(requests, store, random="interrupted")
    for request in requests:
        held(store, request).release()
    assert (Journal(store.folder).runs(), Journal(store.folder).sweeps()) == ([], [])


def test_a_folder_that_cannot_be_written_is_found_before_any_work(requests: list[RunRequest], store: ResultStore) -> None:
    store.folder.mkdir()
    (store.folder / ".journal").touch()
    executor = Scripted()
    with pytest.raises(StoreError, match=r"^the results folder .* cannot be written: File exists\.$"):
        sweep(requests, store, executor, Watcher(), again=False)
    assert executor.handed == []


def test_a_folder_that_cannot_be_written_any_more_is_no_wrong_request(requests: list[RunRequest], store: ResultStore) -> None:
    class Sealing(Scripted):
        """After its first run nothing can be claimed."""

        def wait(self, listener: Listener, seconds: float) -> None:
            super().wait(listener, seconds)
            shutil.rmtree(store.folder / ".journal")
            (store.folder / ".journal").touch()

    executor = Sealing()
    with pytest.raises(WriteError, match=r"^the results folder .* cannot be written: File exists\.$"):
        sweep(requests, store, executor, Watcher(), again=False)
    assert (executor.done, len(store.all())) == (["dense"], 1)


def test_what_is_told_is_what_was_written(
    requests: list[RunRequest], store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record that nobody could read again is kept as a failure."""
    monkeypatch.setattr("prunebench.results.store.MAX_RECORD_BYTES", 1000)
    watcher = Watcher()
    summary = sweep(requests[:1], store, Scripted(), watcher, again=False)
    assert (summary.count("ok"), summary.count("failed")) == (0, 1)
    assert watcher.calls[-1] == ("run_ended", 1, "dense", "failed", b"what it wrote", ".json")
    assert "cannot be kept: it is larger than" in str(summary.records[0].reason)


# Several at a time


def test_as_many_as_there_is_room_for(requests: list[RunRequest], store: ResultStore) -> None:
    executor, watcher = Scripted(slots=3, last_first=True), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.handed == [["dense"], ["magnitude"], ["random"], ["wanda"]]
    assert executor.done == ["random", "wanda", "magnitude", "dense"]
    assert [call[1] for call in watcher.calls if call[0] == "run_ended"] == [3, 4, 2, 1]
    assert len(summary.records) == len(files(store)) == 4


def test_runs_that_keep_their_records_are_handed_over_at_once(requests: list[RunRequest], store: ResultStore) -> None:
    """And neither claimed nor written here."""

    class Elsewhere(Scripted):
        def record(self, request: RunRequest) -> RunRecord:
            held(store, request).release()
            return super().record(request)

    executor, watcher = Elsewhere(keeps_records=True), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.handed == [["dense", "magnitude", "random", "wanda"]]
    assert len(summary.records) == 4
    assert files(store) == []
    assert watcher.calls[-1][-1] is None


def test_what_goes_on_is_in_the_journal(requests: list[RunRequest], store: ResultStore) -> None:
    journal, seen = Journal(store.folder), []

    class Looking(Scripted):
        def wait(self, listener: Listener, seconds: float) -> None:
            seen.append((journal.sweeps(), journal.runs()))
            super().wait(listener, seconds)

    requests[2] = dataclasses.replace(requests[2], predicted=Prediction(20.0, 1))
    sweep(requests, store, Looking(slots=2), Watcher(), again=False, settled=5)
    ((first_sweep,), first_runs), ((_,), second_runs) = seen[0], seen[1]
    assert first_sweep.alive
    page = first_sweep.page
    assert (page.machine, page.jobs, page.settled, page.process) == ("here", 2, 5, os.getpid())
    assert [(run.id, run.predicted_seconds) for run in page.runs] == [
        (request.spec.id, 20.0 if number == 2 else None) for number, request in enumerate(requests)
    ]
    assert {entry.page.id for entry in first_runs} == {request.spec.id for request in requests[:2]}
    assert {entry.page.id for entry in second_runs} == {request.spec.id for request in requests[1:3]}
    assert all(entry.alive and entry.page.machine == "here" for entry in first_runs)
    assert (journal.sweeps(), journal.runs()) == ([], [])


# What failed


def retried(requests: list[RunRequest], store: ResultStore, *endings: str) -> list[str]:
    return [request.spec.method for request in parted(requests, store, "here", False, endings)[0]]


def test_only_what_ended_so_is_tried_again(requests: list[RunRequest], store: ResultStore) -> None:
    do(requests[:3], store, magnitude="failed", random="refused")
    assert retried(requests, store, "failed") == ["magnitude"]
    assert retried(requests, store, "error") == ["magnitude"]
    assert retried(requests, store, "oom", "timeout") == []
    assert retried(requests, store, "refused", "error") == ["magnitude", "random"]
    assert parted(requests, store, "there", False, ["failed"]) == ([], [])
    assert [request.spec.method for request in parted(requests, store, "here", False)[0]] == ["magnitude", "wanda"]


def test_a_checkpoint_goes_when_the_run_is_done(requests: list[RunRequest], store: ResultStore, tmp_path: Path) -> None:
    folders = [tmp_path / request.spec.method for request in requests]
    for folder in folders:
        folder.mkdir()
        (folder / "blocks.safetensors").touch()
    asked = [dataclasses.replace(r, checkpoints=str(folder)) for r, folder in zip(requests, folders, strict=True)]
    do(asked, store, random="failed", wanda="refused")
    assert [folder.exists() for folder in folders] == [False, False, True, False]


def test_asked_for_again_a_run_does_not_go_on_from_an_old_checkpoint(
    requests: list[RunRequest], store: ResultStore, tmp_path: Path
) -> None:
    """From one that was left behind before the run was settled; one of a run again that was killed counts."""
    there = []

    class Looking(Scripted):
        def record(self, request: RunRequest) -> RunRecord:
            there.append((request.spec.method, manifest(request).exists()))
            return super().record(request)

    def manifest(request: RunRequest) -> Path:
        return Path(request.checkpoints or "") / MANIFEST

    asked = [dataclasses.replace(r, checkpoints=str(tmp_path / r.spec.method)) for r in requests[:2]]
    do(asked, store)
    for request, hours in zip(asked, (-1, 1), strict=True):
        manifest(request).parent.mkdir()
        manifest(request).touch()
        os.utime(manifest(request), times=(time.time() + 3600 * hours,) * 2)
    sweep(asked, store, Looking(), Watcher(), again=True)
    assert there == [("dense", False), ("magnitude", True)]


MEETING = '''
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunebench.spec import Pruner, hookimpl, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk


@dataclass
class Meeting(Pruner):
    """Waits in its first run until another command is in a run too, and writes down who did what."""

    name: ClassVar[str] = "meeting"

    place: str = option("", "a folder")
    number: int = option(0, "tells runs apart")

    def prune(self, job):
        place = Path(self.place)
        (place / f"{os.getpid()}-{self.number}").touch()
        for _ in range(6000):
            if len({path.name.partition("-")[0] for path in place.iterdir()}) > 1:
                break
            time.sleep(0.01)
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))


@hookimpl
def prunebench_pruners():
    return [Meeting]
'''


@pytest.mark.slow
def test_two_commands_at_once_never_do_a_run_twice(bench: Bench, tmp_path: Path) -> None:
    plugin = install_plugin(tmp_path / "site", MEETING)
    place = tmp_path / "place"
    place.mkdir()
    suite = tmp_path / "small.toml"
    suite.write_text(bench.suite_text(*(f"meeting[place={place},number={number}]" for number in range(1, 9))))
    arguments = ("run", suite, "--results", tmp_path / "results", "--machine", "here", "--executor", "inline")
    commands = [start_command(*arguments, path=plugin) for _ in range(2)]
    answers = []
    for command in commands:
        out, err = command.communicate(timeout=240)
        answers.append(Ran(command.returncode, out, err))
    assert [(ran.code, ran.err) for ran in answers] == [(0, ""), (0, "")]
    took_part = {path.name.partition("-")[0] for path in place.iterdir()}
    assert len(took_part) == 2, "the commands did not meet, so this shows nothing"
    assert sorted(path.name.partition("-")[2] for path in place.iterdir()) == [str(number) for number in range(1, 9)]
    records = ResultStore(tmp_path / "results", print).all()
    assert len(records) == len({stored.record.id for stored in records}) == 8 + 1, "and the dense model"
    assert {stored.record.status for stored in records} == {"ok"}
    told = " ".join((answers[0].out + answers[1].out).split())
    assert "running in another command" in told
    assert told.count("] ok ") == 8 + 1

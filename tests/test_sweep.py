"""Many runs: what is settled is left out, what failed is tried again, and no run is done twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Bench, Ran, install_plugin, start_command, tree

from prunebench.bench.plan import RunRequest
from prunebench.bench.runner import Outcome, make_record
from prunebench.bench.sweep import Summary, split_settled, sweep
from prunebench.results.records import Failure, RunRecord
from prunebench.results.store import ResultStore

FAILURE = Failure(kind="error", type="ValueError", message="no", step=None)


class Scripted:
    """An executor whose runs end as told, at once."""

    name = "scripted"

    def __init__(self, **endings: str) -> None:
        self.endings = endings
        self.done: list[str] = []

    def execute(self, request: RunRequest, progress: Callable[[str, int, int], None]) -> RunRecord:
        method = request.spec.method
        self.done.append(method)
        ending = self.endings.get(method, "ok")
        if ending == "interrupted":
            raise KeyboardInterrupt
        progress("block", 1, 2)
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

    def started(self, total: int, settled: int) -> None:
        self.calls.append(("started", total, settled))

    def run_started(self, number: int, request: RunRequest) -> None:
        self.calls.append(("run_started", number, request.spec.method))

    def progress(self, what: str, done: int, total: int) -> None:
        self.calls.append(("progress", what, done, total))

    def run_ended(self, number: int, record: RunRecord, seconds: float) -> None:
        self.calls.append(("run_ended", number, record.spec.method, record.status))

    def run_taken(self, number: int, request: RunRequest) -> None:
        self.calls.append(("run_taken", number, request.spec.method))


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
    todo, _ = split_settled(requests, store, "here", again)
    return executor, sweep(todo, store, executor, Watcher(), again)


def files(store: ResultStore) -> list[str]:
    return sorted(path for path in tree(store.folder) if path.endswith(".json"))


def test_runs_are_done_in_order_and_told(requests: list[RunRequest], store: ResultStore) -> None:
    executor, watcher = Scripted(random="refused", wanda="failed"), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.done == ["dense", "magnitude", "random", "wanda"]
    assert [record.status for record in summary.records] == ["ok", "ok", "refused", "failed"]
    assert [summary.count(status) for status in ("ok", "refused", "failed")] == [2, 1, 1]
    assert summary.elsewhere == 0
    assert watcher.calls[:3] == [("run_started", 1, "dense"), ("progress", "block", 1, 2), ("run_ended", 1, "dense", "ok")]
    assert watcher.calls[-1] == ("run_ended", 4, "wanda", "failed")
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
    todo, done = split_settled(requests, store, "here", again=False)
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
    todo, done = split_settled(requests, store, "there", again=False)
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


def test_a_run_that_another_holds_comes_last_and_is_taken_as_done(requests: list[RunRequest], store: ResultStore) -> None:
    """The other command ends it while this one does the rest."""
    other = Scripted()

    class Meanwhile(Scripted):
        def execute(self, request: RunRequest, progress: Callable[[str, int, int], None]) -> RunRecord:
            if request.spec.method == "wanda":
                store.write(other.execute(requests[0], progress))
                claim.__exit__(None, None, None)
            return super().execute(request, progress)

    claim = store.claim("here", requests[0].spec.id, wait=False)
    assert claim.__enter__() is True
    executor, watcher = Meanwhile(), Watcher()
    summary = sweep(requests, store, executor, watcher, again=False)
    assert executor.done == ["magnitude", "random", "wanda"]
    assert watcher.calls[0] == ("run_taken", 1, "dense")
    assert summary.elsewhere == 1
    assert len(files(store)) == 4


def test_a_run_that_another_gave_up_is_done_here(requests: list[RunRequest], store: ResultStore) -> None:
    class Meanwhile(Scripted):
        def execute(self, request: RunRequest, progress: Callable[[str, int, int], None]) -> RunRecord:
            if request.spec.method == "wanda":
                claim.__exit__(None, None, None)
            return super().execute(request, progress)

    claim = store.claim("here", requests[0].spec.id, wait=False)
    assert claim.__enter__() is True
    executor = Meanwhile()
    summary = sweep(requests, store, executor, Watcher(), again=False)
    assert executor.done == ["magnitude", "random", "wanda", "dense"]
    assert (summary.elsewhere, len(files(store))) == (0, 4)


def test_a_run_that_was_settled_since_the_plan_is_not_done(requests: list[RunRequest], store: ResultStore) -> None:
    todo, _ = split_settled(requests, store, "here", again=False)
    do(requests[:2], store)
    executor = Scripted()
    summary = sweep(todo, store, executor, Watcher(), again=False)
    assert executor.done == ["random", "wanda"]
    assert summary.elsewhere == 2


def test_the_lock_is_let_go_after_every_run(requests: list[RunRequest], store: ResultStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        do(requests, store, random="interrupted")
    for request in requests:
        with store.claim("here", request.spec.id, wait=False) as mine:
            assert mine


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

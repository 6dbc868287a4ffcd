"""Where runs happen: what kills a run leaves a record, what kills the command leaves nothing half done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing.forkserver
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Bench, cases, install_plugin, python_path, run_command, start_command, tree

from prunebench.bench import executors
from prunebench.bench.executors import InlineExecutor, SubprocessExecutor, make_executor
from prunebench.bench.plan import RunRequest
from prunebench.bench.sweep import sweep
from prunebench.errors import UnknownNameError
from prunebench.plugins import load_registry
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

HOSTILE = '''
import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunebench.errors import Refused
from prunebench.spec import Pruner, hookimpl, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk


@dataclass
class Hostile(Pruner):
    """Does what no pruner should."""

    name: ClassVar[str] = "hostile"

    how: str = option("well", "what it does before it prunes")
    mark: str = option("", "a file that gets the number of the process")

    def prune(self, job):
        if self.mark:
            aside = Path(self.mark + ".new")
            aside.write_text(str(os.getpid()))
            aside.rename(self.mark)
        getattr(self, "do_" + self.how)(job)
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))

    def do_well(self, job):
        pass

    def do_exit(self, job):
        os._exit(3)

    def do_exit_as_if_well(self, job):
        os._exit(0)

    def do_kill(self, job):
        os.kill(os.getpid(), signal.SIGKILL)

    def do_terminate(self, job):
        os.kill(os.getpid(), signal.SIGTERM)

    def do_segfault(self, job):
        ctypes.string_at(0)

    def do_talk(self, job):
        for number in range(50):
            print("line", number)
        print("the last word, unflushed", file=sys.stdout)
        print("and a complaint", file=sys.stderr)
        os.write(2, b"from below: \\xff\\xfe\\n")
        os._exit(4)

    def do_raise(self, job):
        raise ValueError("only an error")

    def do_refuse(self, job):
        raise Refused("not today.")

    def do_sleep(self, job):
        time.sleep(60)

    def do_cling(self, job):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)

    def do_spin(self, job):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass

    def do_chatter(self, job):
        for number in range(60_000):
            job.progress(("this", "that")[number % 2], number, 60_000)
            time.sleep(0.001)

    def do_linger(self, job):
        threading.Thread(target=time.sleep, args=(60,)).start()

    def do_wait(self, job):
        for _ in range(6000):
            if Path(self.mark + ".go").exists():
                return
            time.sleep(0.01)
        raise TimeoutError("nobody said go")


@hookimpl
def prunebench_pruners():
    return [Hostile]
'''


class Silent:
    """A watcher that remembers progress."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def started(self, total: int, settled: int) -> None: ...

    def run_started(self, number: int, request: RunRequest) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))

    def run_ended(self, number: int, record: RunRecord, seconds: float) -> None: ...

    def run_taken(self, number: int, request: RunRequest) -> None: ...


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stranger's distribution."""
    return install_plugin(tmp_path_factory.mktemp("site"), HOSTILE)


@pytest.fixture(scope="module")
def installed(plugin: Path) -> Iterator[None]:
    """Here and in the fork server, which starts anew: it may run already, without the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(plugin))
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # it would hide that what is printed waits in a buffer
        patch.setattr(sys, "path", [str(plugin), *sys.path])
        load_registry.cache_clear()
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
        yield
    load_registry.cache_clear()


def alive(process: int) -> bool:
    """Whether a process runs; one that merely waits to be buried does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Until it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def readable(results: Path) -> list[RunRecord]:
    """The records in a folder; none may be broken, and nothing half-written may lie beside them."""
    complaints: list[str] = []
    stored = ResultStore(results, complaints.append).all()
    assert complaints == []
    assert not [path for path in results.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock")]
    return [item.record for item in stored]


# In a process of its own

DEATHS = {
    "exit": ("killed", "ProcessExit", "the process ended with exit code 3 and no record."),
    "exit_as_if_well": ("killed", "ProcessExit", "the process ended with exit code 0 and no record."),
    "kill": ("killed", "SIGKILL", "the process was ended by SIGKILL."),
    "terminate": ("killed", "SIGTERM", "the process was ended by SIGTERM."),
    "segfault": ("killed", "SIGSEGV", "the process was ended by SIGSEGV."),
    "raise": ("error", "ValueError", "only an error"),
}
ENDLESS = ("sleep", "spin", "chatter")
STRANGE = [*DEATHS, "talk", "refuse", "linger", *ENDLESS]


@dataclasses.dataclass
class Swept:
    records: dict[str, RunRecord]
    stored: list[RunRecord]
    seen: list[tuple[str, int, int]]
    left: list[str]
    marks: Path


@pytest.fixture(scope="module")
def swept(installed: None, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """One sweep over everything that can go wrong, with good runs between."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tmp").mkdir()
    steps = [f"hostile[how={how},mark={folder / how}]" for how in STRANGE]
    requests = bench.requests(folder, *steps, "magnitude")
    requests = [
        dataclasses.replace(request, timeout=1.5 if how in ENDLESS else 120)
        for how, request in zip([*STRANGE, "magnitude"], requests, strict=True)
    ]
    store, watcher, executor = ResultStore(folder / "results", print), Silent(), SubprocessExecutor()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        summary = sweep(requests, store, executor, watcher, again=False)
        executor.close()
    left = [path.name for path in (folder / "tmp").iterdir() if path.name.startswith("prunebench-")]
    records = dict(zip([*STRANGE, "magnitude"], summary.records, strict=True))
    return Swept(records, readable(folder / "results"), watcher.seen, left, folder)


def test_every_run_has_its_record_and_the_sweep_goes_on(swept: Swept) -> None:
    assert sorted(record.id for record in swept.stored) == sorted(record.id for record in swept.records.values())
    last = swept.records["magnitude"]
    assert (last.status, last.provenance.executor) == ("ok", "subprocess")
    assert last.scores["perplexity"].value > 1
    assert {record.status for how, record in swept.records.items() if how not in ("refuse", "linger", "magnitude")} == {
        "failed"
    }


@pytest.mark.parametrize(("how", "kind", "name", "message"), cases({how: (how, *told) for how, told in DEATHS.items()}))
def test_a_dead_run_is_a_failed_record(how: str, kind: str, name: str, message: str, swept: Swept) -> None:
    record = swept.records[how]
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type, record.failure.message) == (kind, name, message)
    assert record.reason == message
    assert record.provenance.seconds > 0
    assert record.provenance.executor == "subprocess"


def test_the_last_lines_are_in_the_reason(swept: Swept) -> None:
    """Also those that were never flushed, and those that are no text."""
    reason = swept.records["talk"].reason
    assert reason is not None
    assert reason.startswith("the process ended with exit code 4 and no record. Its last lines: line 41 | line 42 | ")
    for part in ("line 49 | the last word, unflushed", "and a complaint", "from below: \ufffd\ufffd"):
        assert part in reason


def test_a_refusal_comes_through(swept: Swept) -> None:
    assert (swept.records["refuse"].status, swept.records["refuse"].reason) == ("refused", "not today.")


def test_what_lingers_after_its_record_is_ended(swept: Swept) -> None:
    assert swept.records["linger"].status == "ok"


@pytest.mark.parametrize("how", ENDLESS)
def test_a_run_beyond_its_limit(how: str, swept: Swept) -> None:
    """Also one that never stops telling how far it has come."""
    record = swept.records[how]
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type) == ("timeout", "TimeoutError")
    assert record.failure.message == "the run took longer than its limit of 1.5 seconds."
    assert 1.5 <= record.provenance.seconds < 30


def test_no_process_and_no_file_is_left(swept: Swept) -> None:
    pids = [int((swept.marks / how).read_text()) for how in STRANGE]
    assert len(set(pids)) == len(STRANGE)
    assert os.getpid() not in pids
    assert [pid for pid in pids if alive(pid)] == []
    assert swept.left == []


def test_progress_comes_through(swept: Swept) -> None:
    subjects = {what.partition("[")[0] for what, _, _ in swept.seen}
    assert {"load", "step hostile", "step magnitude", "block", "eval perplexity", "window"} <= subjects
    assert sum(what in ("this", "that") for what, _, _ in swept.seen) > 100


def test_a_run_that_ignores_the_request_to_end(
    installed: None, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "GRACE_SECONDS", 0.3)
    (request,) = bench.requests(tmp_path, f"hostile[how=cling,mark={tmp_path / 'mark'}]")
    record = SubprocessExecutor().execute(dataclasses.replace(request, timeout=1.5), Silent().progress)
    assert record.failure is not None
    assert record.failure.kind == "timeout"
    assert not alive(int((tmp_path / "mark").read_text()))


def test_here_and_there_the_same_bits(installed: None, bench: Bench, tmp_path: Path) -> None:
    for request in bench.requests(tmp_path, "wanda", "hostile", "random + magnitude[group=row]", targets=["0.3"], seeds=[2]):
        here = InlineExecutor().execute(request, Silent().progress)
        there = SubprocessExecutor().execute(request, Silent().progress)
        assert (here.status, there.status) == ("ok", "ok")
        assert (here.id, here.spec) == (there.id, there.spec)
        assert here.audit == there.audit
        assert here.scores["perplexity"].value == there.scores["perplexity"].value
        assert here.scores["perplexity"].items == there.scores["perplexity"].items
        assert [step.pruner for step in here.steps] == [step.pruner for step in there.steps]
        assert (here.provenance.executor, there.provenance.executor) == ("inline", "subprocess")


def test_a_kill_while_the_system_is_out_of_memory_is_told_apart(
    installed: None, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([3, 4])
    monkeypatch.setattr(executors, "_out_of_memory_kills", lambda: next(kills))
    (request,) = bench.requests(tmp_path, "hostile[how=kill]")
    record = SubprocessExecutor().execute(request, Silent().progress)
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type) == ("oom", "SIGKILL")
    assert "out of memory" in record.failure.message


def test_an_unknown_executor_names_those_there_are() -> None:
    with pytest.raises(
        UnknownNameError, match=r"there is no executor 'sub-process'; did you mean 'subprocess'\? Known: inline"
    ):
        make_executor("sub-process")
    assert isinstance(make_executor("inline"), InlineExecutor)
    assert isinstance(make_executor("subprocess"), SubprocessExecutor)


# The real command


def write_waiting_suite(bench: Bench, folder: Path) -> tuple[Path, Path]:
    """Two quick runs, one that waits for a word, one more; and the file that the third run's process marks."""
    mark = folder / "mark"
    suite = folder / "small.toml"
    suite.write_text(bench.suite_text("dense", "magnitude", f"hostile[how=wait,mark={mark}]", "wanda"))
    return suite, mark


@pytest.mark.slow
def test_an_interruption_keeps_what_is_done_and_the_next_call_goes_on(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    suite, mark = write_waiting_suite(bench, tmp_path)
    arguments = ("run", suite, "--results", tmp_path / "results", "--machine", "here")
    with start_command(*arguments, path=plugin) as process:
        wait_for(mark.exists)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; finished runs are kept, and the same command goes on from here.\n"
    assert out.count("] ok ") == 2
    assert not alive(int(mark.read_text()))
    kept = tree(tmp_path / "results")
    assert sorted(record.spec.method for record in readable(tmp_path / "results")) == ["dense", "magnitude"]

    mark.with_suffix(".go").touch()
    ran = run_command(*arguments, path=plugin)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("2 runs to do; 2 found done.\n")
    records = readable(tmp_path / "results")
    assert [record.status for record in records] == ["ok"] * 4
    assert {name: content for name, content in tree(tmp_path / "results").items() if name in kept} == kept


@pytest.mark.slow
def test_a_killed_command_takes_its_run_with_it_and_the_next_one_completes(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    suite, mark = write_waiting_suite(bench, tmp_path)
    arguments = ("run", suite, "--results", tmp_path / "results", "--machine", "here")
    with start_command(*arguments, path=plugin) as process:
        wait_for(mark.exists)
        child = int(mark.read_text())
        assert alive(child)
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not alive(child), 10)
    assert sorted(record.spec.method for record in readable(tmp_path / "results")) == ["dense", "magnitude"]

    mark.with_suffix(".go").touch()
    ran = run_command(*arguments, "--executor", "inline", path=plugin)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("2 runs to do; 2 found done.\n")
    assert [record.status for record in readable(tmp_path / "results")] == ["ok"] * 4


@pytest.mark.slow
def test_an_interruption_at_the_start_is_as_quiet(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    """While the fork server still loads the libraries."""
    suite, _ = write_waiting_suite(bench, tmp_path)
    with start_command("run", suite, "--results", tmp_path / "results", path=plugin) as process:
        assert process.stdout.readline() == "4 runs to do.\n"
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; finished runs are kept, and the same command goes on from here.\n"
    assert out == ""
    assert readable(tmp_path / "results") == []


@pytest.mark.soak
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    suite = tmp_path / "small.toml"
    suite.write_text(bench.suite_text("dense", "magnitude", "random", "wanda", targets=["0.5", "2:4"], seeds=[0, 1, 2]))
    results = tmp_path / "results"
    arguments = ("run", suite, "--results", results, "--machine", "here")
    draw = random.Random(0)
    for number in range(20):
        before = tree(results) if results.exists() else {}
        with start_command(*arguments, path=plugin) as process:
            time.sleep(draw.uniform(0.5, 10))
            if number % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=60)
        complaints: list[str] = []
        stored = ResultStore(results, complaints.append).all() if results.exists() else []
        assert complaints == []
        assert len({item.record.id for item in stored}) == len(stored)
        after = tree(results) if results.exists() else {}
        assert {name: after[name] for name in before if name.endswith(".json")} == {
            name: content for name, content in before.items() if name.endswith(".json")
        }
    ran = run_command(*arguments, path=plugin)
    assert (ran.code, ran.err) == (0, "")
    records = ResultStore(results, print).all()
    assert len(records) == len({item.record.id for item in records}) == 1 + 2 + 6 + 6
    assert {item.record.status for item in records} == {"ok"}
    assert json.loads((results / records[0].path).read_text())["schema"] == 3

"""Where runs happen: what kills a run leaves a record, what kills the command leaves nothing half done."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.forkserver
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Bench, cases, install_plugin, python_path, run_command, start_command, tree

from prunebench.bench import subprocesses as subprocesses_module
from prunebench.bench.executors import Executor, InlineExecutor, make_executor
from prunebench.bench.plan import Keeping, RunRequest
from prunebench.bench.subprocesses import SubprocessExecutor, leases
from prunebench.bench.sweep import sweep
from prunebench.errors import RequestError, UnknownNameError
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

    def do_hoard(self, job):
        kept = []
        for _ in range(600):
            kept.append(bytearray(os.urandom(1 << 10)) * (8 << 10))
            time.sleep(0.005)

    def do_flood(self, job):
        for _ in range(300):
            print("x" * (1 << 10))
        print("the end")

    def do_spin(self, job):
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass

    def do_chatter(self, job):
        for number in range(60_000):
            job.progress(("this", "that")[number % 2], number, 60_000)
            time.sleep(0.001)

    def do_meet(self, job):
        for _ in range(6000):
            if len(list(Path(self.mark).parent.glob("mark?"))) == 3:
                return
            time.sleep(0.01)
        raise TimeoutError("the others did not come")

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
        self.ended: list[tuple[int, bytes]] = []

    def run_began(self, number: int, request: RunRequest, where: str) -> None: ...

    def progress(self, number: int, what: str, done: int, total: int) -> None:
        self.seen.append((what, done, total))

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        self.ended.append((number, log))

    def run_taken(self, number: int, request: RunRequest) -> None: ...

    def run_done_elsewhere(self, number: int) -> None: ...


def swept_one(executor: Executor, request: RunRequest, folder: Path) -> RunRecord:
    """What a run of its own comes to."""
    (record,) = sweep([request], ResultStore(folder / "results", print), executor, Silent(), again=True).records
    executor.close()
    return record


def subprocesses(folder: Path, jobs: int = 1) -> SubprocessExecutor:
    return SubprocessExecutor(jobs, "cpu", folder / "results")


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
    assert not [path for path in results.rglob("*") if path.is_file() and path.suffix not in (".json", ".lock", ".log")]
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
LIMIT = 4.0
"""Seconds for those; on a busy machine a run takes two to get to where it hangs."""
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
    steps = [f"hostile[how={how},mark={folder / how}]" for how in STRANGE]
    requests = bench.requests(folder, *steps, "magnitude")
    requests = [
        dataclasses.replace(request, timeout=LIMIT if how in ENDLESS else 120)
        for how, request in zip([*STRANGE, "magnitude"], requests, strict=True)
    ]
    store, watcher, executor = ResultStore(folder / "results", print), Silent(), subprocesses(folder)
    summary = sweep(requests, store, executor, watcher, again=False)
    executor.close()
    left = [path.name for path in (folder / "results" / ".journal").iterdir() if path.suffix != ".lock"]
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
    assert record.failure.message == "the run took longer than its limit of 4 seconds."
    assert LIMIT <= record.provenance.seconds < 30


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
    monkeypatch.setattr(subprocesses_module, "GRACE_SECONDS", 0.3)
    (request,) = bench.requests(tmp_path, f"hostile[how=cling,mark={tmp_path / 'mark'}]")
    record = swept_one(subprocesses(tmp_path), dataclasses.replace(request, timeout=1.5), tmp_path)
    assert record.failure is not None
    assert record.failure.kind == "timeout"
    assert not alive(int((tmp_path / "mark").read_text()))


def test_here_and_there_the_same_bits(installed: None, bench: Bench, tmp_path: Path) -> None:
    keep = Keeping(str(tmp_path / "results"))
    for request in bench.requests(tmp_path, "wanda", "hostile", "random + magnitude[group=row]", targets=["0.3"], seeds=[2]):
        request = dataclasses.replace(request, keep=keep)
        here = swept_one(InlineExecutor(), request, tmp_path)
        there = swept_one(subprocesses(tmp_path), request, tmp_path)
        assert (here.status, there.status) == ("ok", "ok")
        assert (here.id, here.spec) == (there.id, there.spec)
        assert here.audit == there.audit
        assert here.scores["perplexity"].value == there.scores["perplexity"].value
        assert here.scores["perplexity"].items == there.scores["perplexity"].items
        assert here.masks == there.masks is not None
        assert [step.pruner for step in here.steps] == [step.pruner for step in there.steps]
        assert (here.provenance.executor, there.provenance.executor) == ("inline", "subprocess")


def test_a_kill_while_the_system_is_out_of_memory_is_told_apart(
    installed: None, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter([3, 4])
    monkeypatch.setattr(subprocesses_module, "_out_of_memory_kills", lambda: next(kills))
    (request,) = bench.requests(tmp_path, "hostile[how=kill]")
    record = swept_one(subprocesses(tmp_path), request, tmp_path)
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type) == ("oom", "SIGKILL")
    assert "out of memory" in record.failure.message


def test_a_run_beyond_its_memory_is_ended(installed: None, bench: Bench, tmp_path: Path) -> None:
    hoarding, good = bench.requests(tmp_path, "hostile[how=hoard]", "magnitude")
    limited = [dataclasses.replace(request, memory=1.5 * 2**30) for request in (hoarding, good)]
    executor = subprocesses(tmp_path)
    records = sweep(limited, ResultStore(tmp_path / "results", print), executor, Silent(), again=False).records
    executor.close()
    assert records[0].failure is not None
    assert (records[0].failure.kind, records[0].failure.type) == ("oom", "MemoryLimit")
    assert records[0].failure.message == "the run used more memory than its limit of 1.5 GiB."
    assert records[1].status == "ok", "and the next starts clean"


# What a run wrote


def test_what_a_run_wrote_lies_beside_its_record(swept: Swept) -> None:
    logs = {path.stem: path.read_bytes() for path in (swept.marks / "results").glob("*/*/*.log")}
    talk, magnitude = (logs.get(swept.records[how].spec.file_stem, b"") for how in ("talk", "magnitude"))
    assert b"line 0\n" in talk
    assert b"from below: \xff\xfe\n" in talk
    assert magnitude == b"", "where a run was silent there is no file"


def test_the_traceback_of_an_error_is_in_the_log(swept: Swept) -> None:
    (log,) = (swept.marks / "results").glob(f"*/*/{swept.records['raise'].spec.file_stem}.log")
    text = log.read_text()
    assert text.startswith("the run failed\nTraceback (most recent call last):")
    assert text.endswith("ValueError: only an error\n")


def test_a_flood_of_words_is_cut_to_its_end(
    installed: None, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocesses_module, "LOG_BYTES", 10_000)
    monkeypatch.setattr(subprocesses_module, "LONGEST_LOG", 50_000)
    (request,) = bench.requests(tmp_path, "hostile[how=flood]")
    assert swept_one(subprocesses(tmp_path), request, tmp_path).status == "ok"
    (log,) = (tmp_path / "results").glob("*/*/*.log")
    assert log.stat().st_size <= 10_000
    assert log.read_bytes().endswith(b"x\nthe end\n")
    assert b"\0" not in log.read_bytes()


# Several at a time


def test_several_at_a_time_the_same_bits(installed: None, bench: Bench, tmp_path: Path) -> None:
    """Each of three runs waits until the others are at work too; their costs are marked."""
    marks = [tmp_path / f"mark{number}" for number in range(3)]
    requests = bench.requests(tmp_path, *(f"hostile[how=meet,mark={mark}]" for mark in marks), "magnitude")
    store, executor = ResultStore(tmp_path / "results", print), subprocesses(tmp_path, jobs=3)
    records = sweep(requests, store, executor, Silent(), again=False).records
    executor.close()
    assert [record.status for record in records] == ["ok"] * 4
    by_method = {record.spec.method: record for record in records}
    together = [record for method, record in by_method.items() if method != "magnitude"]
    assert all(record.provenance.shared_machine for record in together)
    assert {record.provenance.threads for record in records} == {requests[0].threads}
    assert {str(record.audit) for record in together} == {str(by_method["magnitude"].audit)}
    alone = swept_one(subprocesses(tmp_path), requests[3], tmp_path)
    assert alone.scores["perplexity"].items == by_method["magnitude"].scores["perplexity"].items


@pytest.mark.parametrize(
    ("device", "jobs", "expected"),
    cases(
        {
            "on a CPU as many as asked for": ("cpu", 3, ["cpu"] * 3),
            "one is where it was asked to be": ("cuda", 1, ["cuda"]),
            "one of several": ("cuda:1", 1, ["cuda:1"]),
            "one for each GPU": ("cuda", 2, ["cuda:0", "cuda:1"]),
        }
    ),
)
def test_leases(device: str, jobs: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert leases(device, jobs) == expected


@pytest.mark.parametrize(("device", "jobs"), [("cuda", 4), ("cuda:1", 2)])
def test_more_jobs_than_gpus(device: str, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    with pytest.raises(RequestError, match=rf"--jobs {jobs} needs as many GPUs, one for each run at work, and "):
        leases(device, jobs)


def test_one_process_does_one_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--jobs 2 needs another --executor than inline"):
        make_executor("inline", 2, "cpu", tmp_path)
    with pytest.raises(RequestError, match="--ray-address needs --executor ray"):
        make_executor("subprocess", 1, "cpu", tmp_path, "auto")


def test_an_unknown_executor_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"there is no executor 'sub-process'; did you mean 'subprocess'\? Known: inline"
    ):
        make_executor("sub-process", 1, "cpu", tmp_path)
    assert isinstance(make_executor("inline", 1, "cpu", tmp_path), InlineExecutor)
    assert isinstance(make_executor("subprocess", 3, "cpu", tmp_path), SubprocessExecutor)


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
        told = run_command("status", "--results", tmp_path / "results").out
        assert re.search(r"^small on here, for \d+ s: 2 of 4 done, 1 at work, 1 to come\.$", told, re.MULTILINE)
        assert re.search(rf"hostile\[.*: step hostile; process {child}, for \d+ s$", told, re.MULTILINE)
        assert re.search(r"^  about \d+ s left, until \d\d:\d\d$", told, re.MULTILINE)
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: not alive(child), 10)
    told = run_command("status", "--results", tmp_path / "results").out
    assert "small on here: its process died with 2 of 4 to do." in told
    assert "Left behind by a process that died; the same `prunebench run` takes them up again:\n  " in told
    assert sorted(record.spec.method for record in readable(tmp_path / "results")) == ["dense", "magnitude"]

    mark.with_suffix(".go").touch()
    ran = run_command(*arguments, "--executor", "inline", path=plugin)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("2 runs to do; 2 found done.\n")
    assert [record.status for record in readable(tmp_path / "results")] == ["ok"] * 4
    assert run_command("status", "--results", tmp_path / "results").out == f"Nothing is running in {tmp_path / 'results'}.\n"


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

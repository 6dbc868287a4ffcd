"""Runs as jobs: real ones of this machine, and a Slurm of four small programs that remember what they were told."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Bench, install_plugin, python_path
from test_executors import HOSTILE, alive, wait_for
from test_ray import Heard

from prunebench.bench import slurm_executor, slurm_job
from prunebench.bench.executors import InlineExecutor
from prunebench.bench.plan import Keeping, RunRequest, RunResources
from prunebench.bench.slurm_executor import SlurmExecutor, parameters
from prunebench.bench.slurm_job import OneRun, deaf_children
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.results.journal import Journal
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

PATIENCE = 300.0
"""Seconds that a job may take to start, on a machine that is busy."""

needs_submitit = pytest.mark.skipif(not slurm_executor.is_installed(), reason="the extra `slurm` is not installed")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_executor, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(slurm_executor, "PATIENCE_SECONDS", 0.0)


def records(results: Path) -> list[RunRecord]:
    return [stored.record for stored in ResultStore(results, print).all()]


# Real jobs


@dataclasses.dataclass
class Done:
    """What became of real jobs, by what their runs do."""

    heard: Heard
    requests: dict[str, RunRequest]
    results: Path
    pids: dict[str, list[int]]
    """The processes that a job and its run had."""

    def record(self, how: str) -> RunRecord:
        return self.heard.records[self.requests[how].spec.id]


@pytest.fixture(scope="module")
def done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Three jobs at once: a good run, one that is preempted while it is at work, one whose job is killed."""
    folder = tmp_path_factory.mktemp("slurm")
    plugin = install_plugin(folder / "site", HOSTILE)
    methods = {"good": "wanda", **{how: f"hostile[how=wait,mark={folder / how}]" for how in ("preempted", "killed")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm_executor, "LOOK_SECONDS", 0.0)
        patch.setattr(slurm_executor, "PATIENCE_SECONDS", 0.5)
        patch.setenv("PYTHONPATH", python_path(plugin))
        patch.setattr(sys, "path", [str(plugin), *sys.path])
        load_registry.cache_clear()
        planned = bench.requests(folder, *methods.values())
        short = RunResources(minutes=8.0)  # of less than ten submitit takes a preemption for the end of time
        keep = Keeping(str(folder / "results"))
        requests = {how: dataclasses.replace(r, resources=short, keep=keep) for how, r in zip(methods, planned, strict=True)}
        heard, executor = Heard(), SlurmExecutor(2, folder / "results", cluster="local")
        executor.start(list(requests.values()))
        pids: dict[str, list[int]] = {"preempted": [], "killed": []}
        while len(heard.records) < len(requests):
            executor.wait(heard, 0.1)
            for how, signum in (("preempted", signal.SIGUSR2), ("killed", signal.SIGKILL)):
                mark = folder / how
                if mark.exists() and not pids[how]:
                    job = at_work(folder / "results")[requests[how].spec.id]
                    pids[how] = [job, int(mark.read_text())]
                    mark.unlink()
                    os.kill(job, signum)
                elif mark.exists():
                    mark.with_suffix(".go").touch()
        executor.close()
    load_registry.cache_clear()
    return Done(heard, requests, folder / "results", pids)


def at_work(results: Path) -> dict[str, int]:
    """The processes that hold runs, by run."""
    pages = [json.loads(path.read_text()) for path in (results / ".journal").glob("here-*.json")]
    return {page["id"]: page["process"] for page in pages}


@pytest.mark.slow
@needs_submitit
class TestRealJobs:
    """All at once, because a job's start takes seconds."""

    def test_the_same_bits_as_here(self, done: Done) -> None:
        listener, executor = Heard(), InlineExecutor()
        executor.start([done.requests["good"]])
        executor.wait(listener, 0)
        [here], there = listener.records.values(), done.record("good")
        assert (here.reason, there.reason) == (None, None)
        assert (here.id, here.spec, here.audit) == (there.id, there.spec, there.audit)
        assert here.scores["perplexity"].value == there.scores["perplexity"].value
        assert here.masks == there.masks is not None
        assert ResultStore(done.results, print).masks(there) is not None

    def test_every_job_wrote_its_own_record(self, done: Done) -> None:
        stored = {record.id: record for record in records(done.results)}
        assert len(stored) == 3
        assert stored == done.heard.records

    def test_a_preempted_run_is_begun_anew(self, done: Done) -> None:
        assert done.record("preempted").status == "ok"
        assert not any(map(alive, done.pids["preempted"]))

    def test_a_job_that_died_is_a_record_that_names_its_log(self, done: Done) -> None:
        record = done.record("killed")
        assert record.failure is not None
        assert (record.failure.kind, record.provenance.executor) == ("killed", "slurm")
        assert record.provenance.seconds > 0
        said = r"the job (\d+) ended as \w+ and left no record; what it printed is in (\S+)\."
        found = re.match(said, record.failure.message)
        assert found is not None, record.failure.message
        assert found[2] == f".journal/slurm/{found[1]}_0_log.out"
        assert "1 run to do." in (done.results / found[2]).read_text()
        assert not any(map(alive, done.pids["killed"]))

    def test_where_a_run_is_comes_from_the_journal(self, done: Done) -> None:
        place = done.heard.places[done.record("preempted").id][0]
        assert re.fullmatch(r"job \d+, process \d+", place)
        assert "step hostile" in done.heard.subjects[done.record("preempted").id]

    def test_what_submitit_needed_is_gone(self, done: Done) -> None:
        left = [path.name for path in (done.results / ".journal" / "slurm").iterdir()]
        job = re.search(r"the job (\d+)", done.record("killed").reason or "")
        assert job is not None
        assert sorted(left) == [f"{job[1]}_0_log.err", f"{job[1]}_0_log.out"], "what the one printed that left no record"
        assert (done.results / ".journal" / "slurm").stat().st_mode & 0o77 == 0


# What a job does, in this process


@pytest.fixture
def request_(bench: Bench, tmp_path: Path) -> RunRequest:
    [request] = bench.requests(tmp_path, "magnitude")
    return dataclasses.replace(request, timeout=60.0)


def test_a_job_leaves_a_run_that_another_holds(request_: RunRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    claim = Journal(results).claim("here", request_.spec.id, "a run")
    assert claim is not None
    monkeypatch.setattr(slurm_job, "CLAIM_SECONDS", 0.2)
    OneRun(request_, results, again=False, minutes=11)()
    claim.release()
    assert records(results) == []


@needs_submitit
def test_a_job_tries_again_for_a_run_that_was_held_for_a_moment(
    request_: RunRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is by whoever asks what is at work."""
    claim = Journal(tmp_path / "results").claim("here", request_.spec.id, "a look")
    assert claim is not None
    swept: list[object] = []
    monkeypatch.setattr("prunebench.bench.sweep.sweep", lambda *args, **options: swept.append(args))
    monkeypatch.setattr("time.sleep", lambda seconds: claim.release())
    OneRun(request_, tmp_path / "results", again=False, minutes=11)()
    assert len(swept) == 1


def test_processes_of_a_job_do_not_hear_what_is_for_the_job() -> None:
    with deaf_children():
        child = subprocess.Popen([sys.executable, "-c", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"],
                                 stdout=subprocess.PIPE, text=True)  # fmt: skip
    out, _ = child.communicate(timeout=60)
    assert {"SIGUSR2", "SIGTERM"} <= set(re.findall(r"SIG\w+", out))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGUSR2, signal.SIGTERM}


# A Slurm that remembers


@dataclasses.dataclass
class FakeSlurm:
    """`sbatch`, `srun`, `sacct` and `scancel` on the path."""

    folder: Path

    def says(self, **states: str) -> None:
        """What `sacct` answers, by the number of the task."""
        rows = "".join(f"4711_{number.removeprefix('task')}|{state}|node7\n" for number, state in states.items())
        (self.folder / "states").write_text(f"JobID|State|NodeList\n{rows}")

    @property
    def scripts(self) -> list[str]:
        """What `sbatch` was given."""
        return [path.read_text() for path in sorted(self.folder.glob("script.*"))]

    @property
    def cancelled(self) -> list[str]:
        path = self.folder / "cancelled"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    from submitit.slurm.slurm import SlurmJob

    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "sbatch": f'n=$(ls {folder} | grep -c script); cp "$1" {folder}/script.$n; echo Submitted batch job $((4711 + n))',
        "srun": "exit 1",
        "sacct": f"cat {folder}/states",
        "scancel": f'echo "$1" >>{folder}/cancelled',
    }
    for name, line in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    SlurmJob.watcher.clear()
    SlurmJob.watcher._registered.clear()
    fake = FakeSlurm(folder)
    fake.says()
    yield fake
    SlurmJob.watcher.clear()
    SlurmJob.watcher._registered.clear()


@pytest.fixture
def submitted(bench: Bench, tmp_path: Path, slurm: FakeSlurm) -> Callable[..., tuple[SlurmExecutor, list[RunRequest]]]:
    """Hands runs to Slurm, one by one."""

    def submit(*changes: dict[str, Any], jobs: int = 2, again: bool = False) -> tuple[SlurmExecutor, list[RunRequest]]:
        planned = bench.requests(tmp_path, "random", seeds=list(range(len(changes))))
        requests = [dataclasses.replace(r, **{"timeout": 60.0, **c}) for r, c in zip(planned, changes, strict=True)]
        executor = SlurmExecutor(jobs, tmp_path / "results", again)
        for request in requests:
            executor.start([request])
        executor._submit(Heard())  # `wait` would look at once what became of them
        return executor, requests

    return submit


def flags(script: str) -> dict[str, str]:
    """The options of a batch script."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE)
    return dict(found)


@needs_submitit
def test_runs_of_equal_resources_are_one_array(submitted: Any, slurm: FakeSlurm, tmp_path: Path) -> None:
    more = (("partition", "a|b"), ("exclusive", True), ("reservation", "ours"))
    large = RunResources(gpus=1, cpus=8, memory=40.5 * (1 << 30), minutes=90.0, slurm=more)
    executor, requests = submitted({}, {"resources": large, "device": "cuda:3"}, {}, {"resources": large, "device": "cuda"})
    small, big = map(flags, slurm.scripts)
    assert (small["array"], big["array"]) == ("0-1%2", "0-1%2")
    assert (small["time"], small["cpus-per-task"]) == ("11", "1")
    assert {"mem", "gpus-per-node", "partition"}.isdisjoint(small)
    assert {"time": "90", "cpus-per-task": "8", "mem": "41472MB", "gpus-per-node": "1"}.items() <= big.items()
    assert {"partition": "'a|b'", "exclusive": "", "reservation": "ours"}.items() <= big.items()
    assert executor.batch_scripts(requests) == slurm.scripts
    pickles = list((tmp_path / "results" / ".journal" / "slurm").glob("*_submitted.pkl"))
    names = [f"{number}_{task}_submitted.pkl" for number in (4711, 4712) for task in (0, 1)]
    assert sorted(path.name for path in pickles) == names


@needs_submitit
def test_a_dry_run_shows_the_script_where_there_is_no_slurm(bench: Bench, tmp_path: Path) -> None:
    requests = [dataclasses.replace(r, timeout=90.0) for r in bench.requests(tmp_path, "magnitude", "wanda")]
    [script] = SlurmExecutor(64, tmp_path / "results").batch_scripts(requests)
    assert (flags(script)["array"], flags(script)["time"]) == ("0-1%2", "12")
    assert script.startswith("#!/bin/bash\n")
    assert not (tmp_path / "results").exists()


STATES = {
    "TIMEOUT": ("timeout", "TIMEOUT"),
    "OUT_OF_MEMORY": ("oom", "OUT_OF_MEMORY"),
    "NODE_FAIL": ("killed", "NODE_FAIL"),
    "CANCELLED by 1000": ("killed", "CANCELLED"),
    "FAILED": ("killed", "FAILED"),
}


@needs_submitit
def test_what_slurm_ended_is_a_record(submitted: Any, slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.says(**{f"task{number}": state for number, state in enumerate(STATES)}, task5="RUNNING")
    executor, requests = submitted(*[{}] * 6)
    heard = Heard()
    executor.wait(heard, 0)
    found = [heard.records[request.spec.id].failure for request in requests[:5]]
    assert [(failure.kind, failure.type) for failure in found if failure] == list(STATES.values())
    assert found[0] is not None
    said = "the job 4711_0 ended as TIMEOUT and left no record; what it printed is in .journal/slurm/4711_0_0_log.out."
    assert found[0].message == said
    assert len(heard.records) == 5, "one is still at work"
    assert sorted(record.id for record in records(tmp_path / "results")) == sorted(heard.records)
    executor.close()
    assert slurm.cancelled == ["4711_5"]


@needs_submitit
def test_a_preempted_job_has_time_to_be_queued_anew(submitted: Any, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.says(task0="PREEMPTED", task1="PREEMPTED")
    executor, _ = submitted({}, {})
    heard = Heard()
    executor.wait(heard, 0)
    assert heard.records == {}
    monkeypatch.setattr(slurm_executor, "PREEMPTED_SECONDS", 0.0)
    executor.wait(heard, 0)
    assert [record.failure.kind for record in heard.records.values() if record.failure] == ["killed", "killed"]


@needs_submitit
@pytest.mark.parametrize("again", [False, True])
def test_records_are_found_whoever_wrote_them(
    again: bool, submitted: Any, slurm: FakeSlurm, bench: Bench, tmp_path: Path
) -> None:
    """The job's own; where it left the run to another command, that one's. With `--again` only a new one counts."""
    slurm.says(task0="COMPLETED", task1="COMPLETED")
    listener, inline = Heard(), InlineExecutor()
    store = ResultStore(tmp_path / "results", print)
    inline.start(bench.requests(tmp_path, "random", seeds=[0]))
    inline.wait(listener, 0)
    [record] = listener.records.values()
    store.write(record)
    executor, requests = submitted({}, {}, again=again)
    assert requests[0].spec.id == record.id
    claim = Journal(store.folder).claim("here", requests[1].spec.id, "another command's")
    assert claim is not None
    heard = Heard()
    executor.wait(heard, 0)
    assert requests[1].spec.id not in heard.records, "another command has it"
    assert heard.records[record.id].status == ("failed" if again else "ok")
    claim.release()
    executor.wait(heard, 0)
    assert heard.records[requests[1].spec.id].status == "failed"


@pytest.fixture
def told_to_end(
    request_: RunRequest, tmp_path: Path, slurm: FakeSlurm, submitted: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float, float], list[str]]]:
    """What happens, in order, when Slurm tells the job of a run to end after so many minutes of its time."""
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import DelayedSubmission, JobPaths

    from prunebench.bench.subprocesses import SubprocessExecutor

    done: list[str] = []

    def swept(*args: object, **options: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        finally:
            done.append("claim let go")

    def told(minutes: float, limit: float) -> list[str]:
        submitted({"resources": RunResources(minutes=limit)})
        [pickle] = (tmp_path / "results" / ".journal" / "slurm").glob("*_submitted.pkl")
        delayed, environment = DelayedSubmission.load(pickle), SimpleNamespace(global_rank=0)
        environment._requeue = lambda countdown: done.append(f"queued anew, {countdown} left")
        handler: Any = SignalHandler(environment, JobPaths(pickle.parent, "4711"), delayed)  # type: ignore[arg-type]
        handler._start_time = time.time() - 60 * minutes
        signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
        monkeypatch.setattr(slurm_job, "elapsed_seconds", lambda: 60 * minutes)
        with contextlib.suppress(SystemExit):
            delayed.function()
        return done

    monkeypatch.setattr("prunebench.bench.sweep.sweep", swept)
    monkeypatch.setattr(SubprocessExecutor, "close", lambda self: done.append("run ended"))
    before = signal.getsignal(signal.SIGUSR2)
    yield told
    signal.signal(signal.SIGUSR2, before)


@needs_submitit
@pytest.mark.parametrize(("minutes", "limit", "left"), [(1.0, 8.0, 9), (50.0, 60.0, 9), (10.0, 60.0, 10)])
def test_a_preempted_job_is_queued_anew_after_its_run_ended(
    minutes: float, limit: float, left: int, told_to_end: Any, tmp_path: Path
) -> None:
    """Also one of a few minutes, or late in its time, which submitit takes for the end of it."""
    assert told_to_end(minutes, limit) == ["run ended", f"queued anew, {left} left", "claim let go", "run ended"]
    assert records(tmp_path / "results") == []


@needs_submitit
@pytest.mark.parametrize(
    ("minutes", "limit", "queued", "failure"),
    [
        (9.5, 11.0, 10, ("timeout", "TIMEOUT", "after 9.5 of its 11 minutes, as it does near their end.")),
        (
            2.0,
            8.0,
            0,
            ("killed", "PREEMPTED", "after 2.0 of its 8 minutes, and it is not queued anew. submitit says: Job"),
        ),
    ],
    ids=["near the end of its time", "too often"],
)
def test_a_job_that_is_not_queued_anew_is_a_record(
    minutes: float,
    limit: float,
    queued: int,
    failure: tuple[str, str, str],
    told_to_end: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slurm_executor, "QUEUED_ANEW", queued)
    assert told_to_end(minutes, limit)[:2] == ["run ended", "claim let go"]
    [record] = records(tmp_path / "results")
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type) == failure[:2]
    assert record.failure.message.startswith(f"Slurm told the job to end {failure[2]}")


@needs_submitit
def test_a_failure_takes_the_time_that_its_run_was_at_work(submitted: Any, slurm: FakeSlurm, tmp_path: Path) -> None:
    """Not the time in the queue; and not that of a page which a dead process left."""
    executor, [ran, queued] = submitted({}, {})
    heard, journal = Heard(), Journal(tmp_path / "results")
    for request in (ran, queued):
        claim = journal.claim("here", request.spec.id, "a run")
        assert claim is not None
        claim.tell(where="node7, process 7", doing="step random")
        if request is queued:
            page = (journal.folder / f"here-{request.spec.id}.json").read_text()
            claim.release()
            (journal.folder / f"here-{request.spec.id}.json").write_text(page)
        else:
            at_work = claim
    executor.wait(heard, 0)
    assert heard.places == {ran.spec.id: ["job 4711_0, node7, process 7"]}
    assert set(heard.subjects) == {ran.spec.id}
    executor._submitted[ran.spec.id].began -= 30.0
    at_work.release()
    slurm.says(task0="NODE_FAIL", task1="NODE_FAIL")
    submitted_to = next(iter(executor._submitted.values())).job
    submitted_to.watcher.update()
    executor.wait(heard, 0)
    took = [heard.records[request.spec.id].provenance.seconds for request in (ran, queued)]
    assert 30 <= took[0] < 60
    assert took[1] < 5


@needs_submitit
def test_no_failure_is_written_while_somebody_settles_the_run(
    submitted: Any, slurm: FakeSlurm, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that had it wrote its record after this one had looked for it."""
    slurm.says(task0="COMPLETED", task1="RUNNING")
    inline, listener = InlineExecutor(), Heard()
    inline.start(bench.requests(tmp_path, "random", seeds=[0]))
    inline.wait(listener, 0)
    [record] = listener.records.values()
    executor, _ = submitted({}, {})
    store, heard = ResultStore(tmp_path / "results", print), Heard()
    states = slurm_executor._state

    def settled_meanwhile(job: Any) -> str:
        if not records(tmp_path / "results"):
            store.write(record)
        return states(job)

    monkeypatch.setattr(slurm_executor, "_state", settled_meanwhile)
    executor.wait(heard, 0)
    assert [found.status for found in records(tmp_path / "results")] == ["ok"]
    assert heard.records[record.id].status == "ok"


@needs_submitit
def test_an_array_that_is_not_taken_after_another_was(
    submitted: Any, slurm: FakeSlurm, request_: RunRequest, tmp_path: Path
) -> None:
    """Something was started, so this is no wrong request any more."""
    executor, _ = submitted({})
    (slurm.folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: over the limit' >&2; exit 1\n")
    more = dataclasses.replace(request_, resources=RunResources(minutes=5.0))
    heard = Heard()
    executor.start([more])
    executor.wait(heard, 0)
    failure = heard.records[more.spec.id].failure
    assert failure is not None
    assert (failure.kind, failure.type) == ("error", "FailedJobError")
    assert failure.message == "Slurm did not take the job: sbatch: error: over the limit."
    assert [record.id for record in records(tmp_path / "results")] == [more.spec.id]


@needs_submitit
def test_an_interruption_leaves_no_pickle(submitted: Any, slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.says(task0="RUNNING", task1="FAILED")
    executor, _ = submitted({}, {})
    folder = tmp_path / "results" / ".journal" / "slurm"
    for task in (0, 1):
        (folder / f"4711_{task}_0_log.out").write_text("hello")
    executor.close()
    assert slurm.cancelled == ["4711_0"]
    assert list(folder.glob("*.pkl")) == []
    assert [path.name for path in folder.glob("*.out")] == ["4711_1_0_log.out"], "what failed by itself may be looked at"


def test_what_all_runs_need_is_asked_before_the_first(request_: RunRequest, tmp_path: Path) -> None:
    executor = SlurmExecutor(1, tmp_path / "results")
    executor.check([request_])
    with pytest.raises(RequestError, match=r"^Slurm needs to know how long a run may take"):
        executor.check([request_, dataclasses.replace(request_, timeout=None)])


def test_nobody_said_how_long(request_: RunRequest) -> None:
    with pytest.raises(RequestError, match=r"^Slurm needs to know how long a run may take: give --timeout, or minutes in"):
        parameters(dataclasses.replace(request_, timeout=None))
    given = dataclasses.replace(request_, timeout=None, resources=RunResources(minutes=1.5), memory=3.0 * (1 << 30))
    assert (parameters(given)["timeout_min"], parameters(given)["mem_gb"]) == (2, 5.0)


@needs_submitit
def test_where_there_is_no_slurm(request_: RunRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    executor = SlurmExecutor(1, tmp_path / "results")
    executor.start([request_])
    with pytest.raises(RequestError, match=r"^Slurm takes no jobs here: Could not detect \"srun\""):
        executor.wait(Heard(), 0)


def test_without_submitit_one_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_executor, "is_installed", lambda: False)
    said = r"^--executor slurm needs submitit, which is not installed: pip install 'prunebench\[slurm\]'\.$"
    with pytest.raises(RequestError, match=said):
        SlurmExecutor(1, tmp_path)


@needs_submitit
@pytest.mark.slow
def test_an_interruption_ends_the_jobs(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = install_plugin(tmp_path / "site", HOSTILE)
    monkeypatch.setenv("PYTHONPATH", python_path(plugin))
    monkeypatch.syspath_prepend(str(plugin))
    load_registry.cache_clear()
    [request] = bench.requests(tmp_path, f"hostile[how=wait,mark={tmp_path / 'mark'}]")
    load_registry.cache_clear()
    executor, heard = SlurmExecutor(1, tmp_path / "results", cluster="local"), Heard()
    # submitit interrupts local jobs, which would not hear it where the shell has these tests in the background.
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    executor.start([dataclasses.replace(request, timeout=PATIENCE)])
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "mark").exists() and time.monotonic() < end:
            executor.wait(heard, 0.1)
        family = [*at_work(tmp_path / "results").values(), int((tmp_path / "mark").read_text())]
    finally:
        signal.signal(signal.SIGINT, earlier)
        jobs = [submitted.job for submitted in executor._submitted.values()]
        executor.close()
    wait_for(lambda: not any(map(alive, family)), 30)
    wait_for(lambda: all(job.done() for job in jobs), 30)  # or Python complains that nobody waited for the process
    assert (heard.records, records(tmp_path / "results")) == ({}, [])

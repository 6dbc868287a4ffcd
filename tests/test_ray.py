"""Runs as tasks of a real Ray on this machine: workers that die, limits, interruptions."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from support import Bench, cases, install_plugin, python_path, start_command
from test_executors import HOSTILE, alive, wait_for

from prunebench.bench import ray_executor, ray_worker
from prunebench.bench.executors import InlineExecutor
from prunebench.bench.plan import Keeping, RunRequest, RunResources
from prunebench.bench.ray_executor import RayExecutor, Task, explained
from prunebench.bench.ray_worker import Mailbox, watch_memory
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

needs_ray = pytest.mark.skipif(not ray_executor.is_installed(), reason="the extra `ray` is not installed")


@dataclasses.dataclass
class Heard:
    """A listener that remembers."""

    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    subjects: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    records: dict[str, RunRecord] = dataclasses.field(default_factory=dict)
    logs: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def began(self, run: str, where: str) -> None:
        self.places.setdefault(run, []).append(where)

    def progress(self, run: str, what: str, done: int, total: int) -> None:
        self.subjects.setdefault(run, set()).add(what.partition("[")[0])

    def ended(self, run: str, record: RunRecord, log: bytes = b"") -> None:
        assert run not in self.records
        self.records[run], self.logs[run] = record, log


@dataclasses.dataclass
class Done:
    """What became of the runs of one Ray, by what they do."""

    heard: Heard
    requests: dict[str, RunRequest]
    most: int
    """Runs that Ray had at a time."""
    killed: int
    """The worker that was killed from outside."""
    lives: list[bool]
    """What the node says of a process that is there, and of one that is not; and a node that is not there."""
    left: list[int]
    folder: Path | None

    def record(self, how: str) -> RunRecord:
        return self.heard.records[self.requests[how].spec.id]


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_plugin(tmp_path_factory.mktemp("site"), HOSTILE)


@pytest.fixture(scope="module")
def done(plugin: Path, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """Two workers at a time; one run's worker is killed from outside while it is at work, one run kills every worker."""
    folder = tmp_path_factory.mktemp("ray")
    mark = folder / "mark"
    methods = {
        "good": "wanda",
        "hurt": f"hostile[how=wait,mark={mark}]",
        "kill": "hostile[how=kill]",
        "late": "hostile[how=sleep]",
        "raise": "hostile[how=raise]",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(plugin))
        patch.setattr(sys, "path", [str(plugin), *sys.path])
        load_registry.cache_clear()
        keep = Keeping(str(folder / "results"))
        planned = [dataclasses.replace(request, keep=keep) for request in bench.requests(folder, *methods.values())]
        requests = dict(zip(methods, planned, strict=True))
        requests["late"] = dataclasses.replace(requests["late"], timeout=1.5)
        heard, executor, queue, most, killed = Heard(), RayExecutor(2), list(requests.values()), 0, 0
        while len(heard.records) < len(requests):
            while queue and executor.room():
                executor.start([queue.pop(0)])
            most = max(most, len(executor._tasks))
            executor.wait(heard, 0.1)
            if mark.exists() and not killed:
                killed = int(mark.read_text())
                mark.unlink()
                os.kill(killed, signal.SIGKILL)
            elif mark.exists():
                mark.with_suffix(".go").touch()
        session = [child.pid for child in psutil.Process().children(recursive=True) if "ray" in " ".join(child.cmdline())]
        assert session
        node, places = executor._ray.get_runtime_context().get_node_id(), ((os.getpid(), None), (killed, None), (1, "ab" * 28))
        asked = [Task(requests["late"], None, node=other or node, process=process) for process, other in places]
        lives = [executor._node_says(task) for task in asked]
        temporary = executor._folder
        executor.close()
    load_registry.cache_clear()
    end = time.monotonic() + 15
    while any(map(alive, session)) and time.monotonic() < end:
        time.sleep(0.1)
    return Done(heard, requests, most, killed, lives, [pid for pid in session if alive(pid)], temporary)


@pytest.mark.slow
@needs_ray
class TestOneRay:
    """One Ray for all, because its start and each worker's take seconds."""

    def test_the_same_bits_as_here(self, done: Done) -> None:
        listener = Heard()
        executor = InlineExecutor()
        executor.start([done.requests["good"]])
        executor.wait(listener, 0)
        [here], there = listener.records.values(), done.record("good")
        assert (here.reason, there.reason, there.provenance.executor) == (None, None, "ray")
        assert (here.id, here.spec, here.audit) == (there.id, there.spec, there.audit)
        assert here.scores["perplexity"].value == there.scores["perplexity"].value
        assert here.scores["perplexity"].items == there.scores["perplexity"].items
        assert here.masks == there.masks is not None

    def test_a_run_whose_worker_was_killed_is_begun_anew(self, done: Done) -> None:
        record = done.record("hurt")
        assert record.status == "ok"
        first, second = done.heard.places[record.id]
        assert f"process {done.killed}" in first
        assert f"process {done.killed}" not in second

    def test_a_run_that_kills_every_worker_is_given_up(self, done: Done) -> None:
        record = done.record("kill")
        assert record.failure is not None
        assert (record.failure.kind, record.failure.type) == ("killed", "WorkerCrashedError")
        assert record.failure.message.startswith(
            "the run's worker died, and so did those of 2 further attempts. Ray says: The worker died"
        )
        assert len(set(done.heard.places[record.id])) == 3, "each in a process of its own"

    def test_a_run_beyond_its_limit_is_ended(self, done: Done) -> None:
        """Time in the queue does not count: others were at work before."""
        record = done.record("late")
        assert record.failure is not None
        assert (record.failure.kind, record.failure.message) == (
            "timeout",
            "the run took longer than its limit of 1.5 seconds.",
        )
        assert 1.5 <= record.provenance.seconds < 15
        assert len(done.heard.places[record.id]) == 1, "Ray does not try it again"

    def test_a_node_knows_which_of_its_processes_live(self, done: Done) -> None:
        assert done.lives == [True, False, False]

    def test_what_a_failed_run_raised_is_in_its_log(self, done: Done) -> None:
        record = done.record("raise")
        assert record.reason == "only an error"
        log = done.heard.logs[record.id].decode()
        assert log.startswith("the run failed\nTraceback (most recent call last):\n")
        assert log.endswith("ValueError: only an error\n")

    def test_no_more_than_asked_for_at_a_time(self, done: Done) -> None:
        assert done.most == 2

    def test_progress_comes_through(self, done: Done) -> None:
        assert {"load", "step wanda", "eval perplexity"} <= done.heard.subjects[done.record("good").id]

    def test_nothing_is_left(self, done: Done) -> None:
        assert done.left == []
        assert done.folder is not None
        assert not done.folder.exists()


@pytest.mark.slow
@needs_ray
def test_an_interruption_leaves_no_process(bench: Bench, plugin: Path, tmp_path: Path) -> None:
    suite, mark = tmp_path / "small.toml", tmp_path / "mark"
    suite.write_text(bench.suite_text(f"hostile[how=wait,mark={mark}]"))
    words = ("run", suite, "--results", tmp_path / "results", "--machine", "here", "--executor", "ray", "--only", "hostile")
    with start_command(*words, path=plugin) as process:
        wait_for(mark.exists, 300)
        family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert int(mark.read_text()) in family
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted; finished runs are kept, and the same command goes on from here.\n")
    wait_for(lambda: not any(map(alive, family)), 15)
    assert ResultStore(tmp_path / "results", print).all() == []


# Without a Ray


class Pretended:
    """A Ray with so much free."""

    def __init__(self, **free: float) -> None:
        self.free = free

    def available_resources(self) -> dict[str, float]:
        return self.free

    cluster_resources = available_resources


def with_tasks(free: dict[str, float], request: RunRequest, jobs: int | None, began: int, waiting: int) -> RayExecutor:
    executor = RayExecutor(jobs, "10.0.0.1:6379")
    executor._ray = Pretended(**free)
    for number in range(began + waiting):
        executor._tasks[str(number)] = Task(request, None, began=1.0 if number < began else None)
    return executor


ROOM = {
    "one waits for the next place": ({"CPU": 0.0}, None, 2, 0, 1),
    "one waits already": ({"CPU": 0.0}, None, 2, 1, 0),
    "as many as fit, and one": ({"CPU": 6.0}, None, 1, 0, 4),
    "those that wait are counted": ({"CPU": 6.0}, None, 1, 2, 2),
    "what is scarcest": ({"CPU": 64.0, "GPU": 1.0}, None, 1, 0, 2, 1),
    "not more than asked for": ({"CPU": 6.0}, 3, 1, 1, 1),
    "never less than none": ({"CPU": 0.0}, 1, 1, 3, 0),
}


@needs_ray
@pytest.mark.parametrize(
    ("free", "jobs", "began", "waiting", "room", "gpus"), cases({name: (*case, 0)[:6] for name, case in ROOM.items()})
)
def test_ray_is_given_no_more_than_can_soon_run(
    free: dict[str, float], jobs: int | None, began: int, waiting: int, room: int, gpus: int, bench: Bench, tmp_path: Path
) -> None:
    [request] = bench.requests(tmp_path, "magnitude")
    request = dataclasses.replace(request, resources=RunResources(gpus=gpus, cpus=2))
    assert with_tasks(free, request, jobs, began, waiting).room() == room


@needs_ray
def test_a_run_books_no_more_cores_than_this_machine_has(bench: Bench, tmp_path: Path) -> None:
    [request] = bench.requests(tmp_path, "magnitude")
    request = dataclasses.replace(request, resources=RunResources(cpus=64, memory=3.0))
    here, there = RayExecutor(1), RayExecutor(1, "10.0.0.1:6379")
    here._ray = there._ray = Pretended(CPU=2.0)
    assert here._needs(request) == {"CPU": 2, "GPU": 0, "memory": 3}
    assert there._needs(request) == {"CPU": 64, "GPU": 0, "memory": 3}


@needs_ray
def test_what_all_runs_need_is_asked_before_the_first(bench: Bench, tmp_path: Path) -> None:
    modest, greedy = bench.requests(tmp_path, "magnitude", "wanda")
    greedy = dataclasses.replace(greedy, resources=RunResources(gpus=2))
    here = RayExecutor(1)
    here._ray = Pretended(CPU=2.0)
    here.check([modest])
    with pytest.raises(RequestError, match=r"^a run asks for 2 GPUs, and this machine has 0\.$"):
        here.check([modest, greedy])


def test_nothing_to_do_starts_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "is_installed", lambda: True)
    executor = RayExecutor(1)
    executor.check([])
    assert executor._ray is None


def ray_error(name: str, *arguments: Any) -> Exception:
    from ray import exceptions

    found = getattr(exceptions, name)(*arguments)
    assert isinstance(found, Exception)
    return found


NO_MODULE = "No module named 'prunebench'"
ERRORS = {
    "memory": (
        ("OutOfMemoryError", "low on memory\n  on the node"),
        "oom",
        "node was out of memory. Ray says: low on memory on the",
    ),
    "node": (("NodeDiedError", "gone"), "killed", "and so did those of 2 further attempts. Ray says: gone"),
    "other": (("RuntimeEnvSetupError", "no space"), "killed", "Ray gave the run up. Ray says: Failed to set up"),
    "import": (
        ("RayTaskError", "work", "Traceback …", ModuleNotFoundError(NO_MODULE)),
        "error",
        f"could not be begun on its worker: ModuleNotFoundError: {NO_MODULE}",
    ),
}


@needs_ray
@pytest.mark.parametrize(("error", "kind", "said"), cases(ERRORS))
def test_why_a_task_came_to_nothing(error: tuple[Any, ...], kind: str, said: str) -> None:
    failure = explained(ray_error(*error))
    assert failure.kind == kind
    assert failure.type == (error[0] if kind != "error" else "ModuleNotFoundError")
    assert said in failure.message


def test_the_mailbox_gives_each_letter_once() -> None:
    mailbox = Mailbox()
    mailbox.put(("a", "began", ("node", "process 1")))
    mailbox.put(("a", "progress", ("load", 0, 1)))
    assert [letter[1] for letter in mailbox.take()] == ["began", "progress"]
    assert mailbox.take() == []


def test_a_run_beyond_its_memory_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([1 << 20, 2 << 30, 3 << 30])
    monkeypatch.setattr("prunebench.bench.subprocesses.used_bytes", lambda process: next(used))
    monkeypatch.setattr(ray_worker, "MEMORY_SECONDS", 0)
    letters: list[Any] = []
    watch_memory(1.5 * (1 << 30), letters.append)
    assert letters == [("beyond", (1.5 * (1 << 30),))]


@needs_ray
def test_a_run_that_says_it_is_beyond_its_memory_is_ended(bench: Bench, tmp_path: Path) -> None:
    [request] = bench.requests(tmp_path, "magnitude")
    run, cancelled, heard = request.spec.id, [], Heard()
    executor = with_tasks({}, request, 1, 0, 0)
    executor._tasks[run] = Task(request, "reference", began=time.monotonic())
    beyond = (run, "beyond", (1.5 * (1 << 30),))
    letters = [("stranger", "progress", ("load", 0, 1)), beyond, (run, "progress", ("load", 0, 1))]
    executor._ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=OSError),
        get=lambda asked: asked,
        cancel=lambda reference, force: cancelled.append((reference, force)),
    )
    executor._mailbox = SimpleNamespace(take=SimpleNamespace(remote=lambda: letters))
    executor._read_mail(heard)
    failure = heard.records[run].failure
    assert failure is not None
    said = "the run used more memory than its limit of 1.5 GiB."
    assert (failure.kind, failure.message, cancelled) == ("oom", said, [("reference", True)])


@needs_ray
@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("here", [True, False], ids=["here", "elsewhere"])
def test_only_a_run_at_work_is_late(
    lives: bool, here: bool, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose worker died waits for another, however long."""
    [request] = bench.requests(tmp_path, "magnitude")
    request = dataclasses.replace(request, timeout=5.0)
    executor, heard = with_tasks({}, request, 1, 0, 0), Heard()
    task = executor._tasks[request.spec.id] = Task(request, "reference", began=time.monotonic() - 6.0, node="node")
    task.process = os.getpid() if lives and here else 0
    letters: list[Any] = []
    executor._ray = SimpleNamespace(
        exceptions=SimpleNamespace(RayError=OSError),
        wait=lambda references, **options: ([], references),
        get=lambda asked: [letters.pop() for _ in letters],
        cancel=lambda reference, force: None,
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "node" if here else "another"),
    )
    executor._mailbox = SimpleNamespace(take=SimpleNamespace(remote=lambda: None))
    monkeypatch.setattr(RayExecutor, "_node_says", lambda self, task: lives)
    executor.wait(heard, 0)
    if lives:
        assert [record.failure.kind for record in heard.records.values() if record.failure] == ["timeout"]
        return
    assert heard.records == {}
    executor.wait(heard, 0)
    assert task.began is None
    letters.append((request.spec.id, "began", ("node", 7, "there, process 7")))
    executor.wait(heard, 0)
    assert (heard.records, heard.places) == ({}, {request.spec.id: ["there, process 7"]})
    assert (task.began is not None, task.process) == (True, 7)


def test_without_ray_one_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "is_installed", lambda: False)
    with pytest.raises(
        RequestError, match=r"^--executor ray needs Ray, which is not installed: pip install 'prunebench\[ray\]'\.$"
    ):
        RayExecutor(1)


def test_nobody_imports_ray_before_it_is_asked_for() -> None:
    """Also not the module of the executor; what the mailbox's process imports has no torch either."""
    modules = "sys, prunebench.cli, prunebench.bench.ray_executor, prunebench.bench.ray_worker"
    program = f"import {modules}; print({{'ray', 'torch', 'submitit'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


def test_no_token_is_handed_to_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "PRUNEBENCH_MIRROR"):
        monkeypatch.setenv(name, "x")
    told = ray_executor.told_to_workers()
    assert {"HF_HOME", "PRUNEBENCH_MIRROR"} <= set(told)
    assert not [name for name in told if "TOKEN" in name]


def test_the_folder_of_sockets_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, found in (("/var/tmp", "/var/tmp"), (str(tmp_path / ("x" * 60)), "/tmp")):
        monkeypatch.setattr("tempfile.gettempdir", lambda folder=folder: folder)
        assert ray_executor.short_folder() == found

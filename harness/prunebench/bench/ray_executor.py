"""Runs as tasks of Ray: on a Ray of this machine that the command starts, or on a cluster that is there.

A run is one task with the suite's resources, in a worker process of its own. Ray begins a task anew when its worker or its node
died, at most twice; what a method raises is in the record that the task returns, and is not tried again. Records are written by
the command.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from prunebench.bench.ray_worker import EXECUTOR, Letter, Mailbox, work
from prunebench.errors import RequestError, first_line
from prunebench.results.records import Failure, RunRecord

if TYPE_CHECKING:
    from prunebench.bench.executors import Listener
    from prunebench.bench.plan import RunRequest

RETRIES = 2
"""How often a run is begun anew whose worker died."""

STORE_BYTES = 256 << 20
"""Of the local Ray's object store: requests with their tokens, and records, a few MiB each."""

LONGEST_FOLDER = 40
"""Characters of the temporary folder: Ray adds about 65, and the path of a socket ends at 107."""

END_SECONDS, POLL_SECONDS = 10.0, 0.1
"""To wait for tasks that were told to end; between two looks at the mailbox."""

ANSWER_SECONDS = 60.0
"""To wait for a node's answer: longer than Ray takes to find that a node is gone."""


@dataclass
class Task:
    """A run that was handed to Ray."""

    request: RunRequest
    reference: Any
    handed: float = field(default_factory=time.monotonic)
    """When it began to wait for a worker."""
    began: float | None = None
    """When its present worker began; None while it waits for one, as far as is known."""
    node: str = ""
    process: int = 0
    shared: bool = False
    """Another run was at work on its node at the same time."""

    def is_late(self) -> bool:
        """Whether it has been at work longer than it may; waiting for a place does not count."""
        timeout = self.request.timeout
        return self.began is not None and timeout is not None and time.monotonic() - self.began > timeout


class RayExecutor:
    """Hands runs to Ray as there is room for them."""

    name = EXECUTOR
    keeps_records = False

    def __init__(self, jobs: int | None, address: str | None = None) -> None:
        """Ray is started, or asked, once the first run is there.

        Args:
            jobs: runs at a time, at most; None for as many as there are resources for.
            address: of a cluster; None starts a Ray on this machine.

        Raises:
            RequestError: ray is not installed.
        """
        if not is_installed():
            raise RequestError("--executor ray needs Ray, which is not installed: pip install 'prunebench[ray]'.")
        self._jobs, self._address = jobs, address
        self._ray: Any = None
        self._mailbox: Any = None
        self._work: Any = None
        self._folder: Path | None = None
        self._tasks: dict[str, Task] = {}

    def room(self) -> int:
        """As many runs as fit into what is free, and one to wait for the next place; runs are taken to be like the last one."""
        if self._ray is None or not self._tasks:
            return self._jobs or 1
        free, needs = self._ray.available_resources(), self._needs(list(self._tasks.values())[-1].request)
        fitting = min((int(free.get(name, 0) // amount) for name, amount in needs.items() if amount), default=1)
        waiting = sum(task.began is None for task in self._tasks.values())
        room = fitting + 1 - waiting
        return max(0, room if self._jobs is None else min(room, self._jobs - len(self._tasks)))

    def check(self, requests: Sequence[RunRequest]) -> None:
        """Whether all runs have what they need, before the first is begun; starts Ray, or joins the cluster.

        Raises:
            RequestError: Ray does not start, no cluster answers, or a local run asks for GPUs that are not here.
        """
        if requests and self._ray is None:
            self._connect()
        for request in requests:
            self._needs(request)

    def start(self, requests: Sequence[RunRequest]) -> None:
        """Hand the runs over. Raises what `check` does, for runs that nobody checked."""
        self.check(requests)
        for request in requests:
            needs = self._needs(request)
            amounts: dict[str, Any] = {"num_cpus": needs["CPU"], "num_gpus": needs["GPU"]}
            if needs["memory"]:
                amounts["memory"] = needs["memory"]
            if request.resources.gpus and request.device.startswith("cuda"):
                request = request.on_any()  # Ray says which by CUDA_VISIBLE_DEVICES
            task = self._work.options(name=f"prunebench {request.spec.id}", **amounts)
            self._tasks[request.spec.id] = Task(request, task.remote(request, self._mailbox))

    def wait(self, listener: Listener, seconds: float) -> None:
        """Pass on what the workers say, and take the records of those that are done."""
        from prunebench.bench.executors import beyond_time

        if not self._tasks:
            return
        references = [task.reference for task in self._tasks.values()]
        ready, _ = self._ray.wait(references, num_returns=1, timeout=min(seconds, POLL_SECONDS))
        self._read_mail(listener)
        for run, task in list(self._tasks.items()):
            if task.reference in ready:
                self._take(run, task, listener)
            elif task.is_late() and not self._lives(task):
                task.began, task.handed = None, time.monotonic()
            elif task.is_late():
                self._give_up(run, beyond_time(task.request.timeout or 0), listener)

    def close(self) -> None:
        """End the tasks; a Ray that was started here ends, a cluster stays."""
        if self._ray is None:
            return
        for task in self._tasks.values():
            self._ray.cancel(task.reference, force=True)
        references = [task.reference for task in self._tasks.values()]
        with suppress(self._ray.exceptions.RayError):
            if references:
                self._ray.wait(references, num_returns=len(references), timeout=END_SECONDS)
        self._tasks = {}
        self._ray.shutdown()
        self._ray._private.worker._worker_logs_enabled = True
        self._ray = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _connect(self) -> None:
        """Start Ray or join the cluster; quietly, and without telling anybody."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what will be the default; unset, it warns
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise, and a run's costs would be those of the meek
        os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # without end otherwise
        import ray

        self._ray = ray  # from here on there is something to close
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is not None:
            where = f"the Ray cluster {self._address} cannot be used"
            options: dict[str, Any] = {"address": self._address, "runtime_env": {"env_vars": told_to_workers()}}
        else:
            where = "Ray cannot be started on this machine"
            self._folder = Path(tempfile.mkdtemp(prefix="prunebench-ray-", dir=short_folder()))
            options = {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": len(os.sched_getaffinity(0)),
                "object_store_memory": STORE_BYTES,
                "_temp_dir": str(self._folder),
            }
        try:
            ray.init(**options, **quiet)
        except (ConnectionError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise RequestError(f"{where}: {first_line(error).rstrip('.')}.") from None
        ray._private.worker._worker_logs_enabled = False  # what it prints of dying workers is in records, or made good
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        # It lives where the command does, so that a node that dies takes no letters with it.
        self._mailbox = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Mailbox).remote()
        self._work = ray.remote(max_calls=1, max_retries=RETRIES, retry_exceptions=False)(work)

    def _needs(self, request: RunRequest) -> dict[str, int]:
        """What a run books. On this machine never more cores than there are: a run may have more threads than cores."""
        resources = request.resources
        there = self._ray.cluster_resources()
        cpus = resources.cpus
        if self._address is None:
            cpus = min(cpus, int(there.get("CPU", 1)))
            if resources.gpus > there.get("GPU", 0):
                raise RequestError(f"a run asks for {resources.gpus} GPUs, and this machine has {int(there.get('GPU', 0))}.")
        return {"CPU": cpus, "GPU": resources.gpus, "memory": int(resources.memory or request.memory or 0)}

    def _read_mail(self, listener: Listener) -> None:
        from prunebench.bench.executors import beyond_memory

        letters: list[Letter] = []
        with suppress(self._ray.exceptions.RayError):  # what was in a mailbox that died was progress only
            letters = self._ray.get(self._mailbox.take.remote())
        for run, kind, content in letters:
            task = self._tasks.get(run)
            if task is None:
                continue  # of a worker that was told to end
            if kind == "began":
                self._begin(task, *content[:2])
                listener.began(run, content[2])
            elif kind == "progress":
                listener.progress(run, *content)
            else:
                self._give_up(run, beyond_memory(*content), listener)

    def _begin(self, task: Task, node: str, process: int) -> None:
        task.began, task.node, task.process = time.monotonic(), node, process
        for other in self._tasks.values():
            if other is not task and other.began is not None and other.node == node:
                other.shared = task.shared = True

    def _lives(self, task: Task) -> bool:
        """Whether a task's worker is there: of one that died Ray says nothing while it looks for another."""
        if task.node == self._ray.get_runtime_context().get_node_id():
            return psutil.pid_exists(task.process)
        return self._node_says(task)

    def _node_says(self, task: Task) -> bool:
        """The same, asked on the node by a small task."""
        on_node = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(task.node, soft=False)
        ask = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_node)(psutil.pid_exists)
        try:
            return bool(self._ray.get(ask.remote(task.process), timeout=ANSWER_SECONDS))
        except self._ray.exceptions.GetTimeoutError:
            return True  # the node is there, and too busy to answer
        except self._ray.exceptions.RayError:
            return False

    def _take(self, run: str, task: Task, listener: Listener) -> None:
        """The record of a task that is done, or of how it died."""
        from prunebench.bench.executors import failed_record

        try:
            content, log = self._ray.get(task.reference)
            record = RunRecord.model_validate_json(content)
        except self._ray.exceptions.RayError as error:
            record, log = failed_record(task.request, explained(error), self.name, task.began or task.handed), b""
        del self._tasks[run]
        listener.ended(run, record.on_shared_machine() if task.shared else record, log)

    def _give_up(self, run: str, failure: Failure, listener: Listener) -> None:
        """End a run that is beyond a limit; Ray gives its place away once its worker is gone."""
        from prunebench.bench.executors import failed_record

        task = self._tasks.pop(run)
        self._ray.cancel(task.reference, force=True)
        listener.ended(run, failed_record(task.request, failure, self.name, task.began or task.handed))


def explained(error: Exception) -> Failure:
    """Why a task came to no record, as Ray says it."""
    from ray import exceptions

    said, name = " ".join(str(error).split()), type(error).__name__
    if isinstance(error, exceptions.OutOfMemoryError):
        message = f"the worker was ended by Ray, whose node was out of memory. Ray says: {said}"
        return Failure(kind="oom", type=name, message=message, step=None)
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        message = f"the run could not be begun on its worker: {type(cause).__name__}: {first_line(cause)}"
        return Failure(kind="error", type=type(cause).__name__, message=message, step=None)
    message = f"Ray gave the run up. Ray says: {said}"
    if isinstance(error, exceptions.WorkerCrashedError | exceptions.NodeDiedError):
        message = f"the run's worker died, and so did those of {RETRIES} further attempts. Ray says: {said}"
    return Failure(kind="killed", type=name, message=message, step=None)


def is_installed() -> bool:
    """Whether the extra `ray` is there, without importing it."""
    return importlib.util.find_spec("ray") is not None


def told_to_workers() -> dict[str, str]:
    """Settings of this shell that the workers of a cluster need too; no token is among them."""
    names = {"HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"}
    return {name: value for name, value in os.environ.items() if name in names or name.startswith("PRUNEBENCH_")}


def short_folder() -> str:
    """Where the local Ray keeps its sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_FOLDER else "/tmp"

"""Where runs happen: in this process, or each in a fresh one, here or on a cluster.

An executor is driven by one loop in one thread (`sweep.py`): it says how much room it has, takes runs, and tells a
listener what became of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from prunebench.bench.machine import portable
from prunebench.bench.plan import RunRequest
from prunebench.errors import RequestError, UnknownNameError
from prunebench.results.records import Failure, RunRecord

LONGEST_MESSAGE = 2000
"""Characters of a failure's message that a record keeps."""


class Listener(Protocol):
    """Hears how runs are getting on; a run is named by its id, `request.spec.id`."""

    def began(self, run: str, where: str) -> None:
        """It left the queue, and is at work in this process or on this device."""

    def progress(self, run: str, what: str, done: int, total: int) -> None:
        """It has come so far."""

    def ended(self, run: str, record: RunRecord, log: bytes = b"") -> None:
        """It came to this record, and its process wrote this."""


class Executor(Protocol):
    """Does runs."""

    name: str
    keeps_records: bool
    """Each run claims its place in the journal and writes its record where it happens; otherwise the sweep does both."""

    def check(self, requests: Sequence[RunRequest]) -> None:
        """Raise a RequestError where one of the runs to come asks for what there is not; before any is handed over."""

    def room(self) -> int:
        """How many more runs may be handed over now."""

    def start(self, requests: Sequence[RunRequest]) -> None:
        """Begin runs, at most as many as there is room for; returns at once."""

    def wait(self, listener: Listener, seconds: float) -> None:
        """Tell what happened since the last call; where nothing did, wait for it, at most so long.

        Whatever happens to a run becomes its record; only KeyboardInterrupt gets through.
        """

    def close(self) -> None:
        """End every run that is still at work, and let go of what is held."""


class InlineExecutor:
    """Runs in this process: simple to debug, but a crash ends the sweep."""

    name = "inline"
    keeps_records = False

    def __init__(self) -> None:
        self._queue: deque[RunRequest] = deque()

    def check(self, requests: Sequence[RunRequest]) -> None:
        """Nothing is asked for."""

    def room(self) -> int:
        """One at a time."""
        return 1 - len(self._queue)

    def start(self, requests: Sequence[RunRequest]) -> None:
        """Keep the run for `wait`."""
        self._queue.extend(requests)

    def wait(self, listener: Listener, seconds: float) -> None:  # noqa: ARG002 - the signature is the protocol
        """Do the run, however long it takes."""
        from prunebench.bench.runner import run

        if not self._queue:
            return
        request = self._queue[0]
        run_id = request.spec.id
        listener.began(run_id, "this process")
        record = run(request, lambda *call: listener.progress(run_id, *call), self.name)
        self._queue.popleft()
        listener.ended(run_id, record)

    def close(self) -> None:
        """Nothing is held."""


EXECUTORS = ("inline", "subprocess", "ray", "slurm")


def make_executor(
    name: str, jobs: int | None, device: str, results: Path, ray_address: str | None = None, again: bool = False
) -> Executor:
    """An executor by name.

    Args:
        name: one of `EXECUTORS`.
        jobs: runs at a time; without it one, and with Ray or Slurm as many as there are places for.
        device: what runs were asked to work on.
        results: the folder of records; logs of runs at work are kept in its journal.
        ray_address: of a Ray cluster that is there already.
        again: do also what is settled, for an executor whose runs look for that themselves.

    Raises:
        UnknownNameError: there is none of that name.
        RequestError: more jobs than it can do at a time, or its library is not installed.
    """
    if name not in EXECUTORS:
        raise UnknownNameError.among("executor", name, EXECUTORS)
    if ray_address is not None and name != "ray":
        raise RequestError("--ray-address needs --executor ray.")
    if name == "ray":
        from prunebench.bench.ray_executor import RayExecutor

        return RayExecutor(jobs, ray_address)
    if name == "slurm":
        from prunebench.bench.slurm_executor import SlurmExecutor

        return SlurmExecutor(jobs, results, again)
    if name == "subprocess":
        from prunebench.bench.subprocesses import SubprocessExecutor

        return SubprocessExecutor(jobs or 1, device, results)
    if jobs is not None and jobs > 1:
        raise RequestError(f"--jobs {jobs} needs another --executor than inline, which has one process.")
    return InlineExecutor()


def beyond_time(limit: float) -> Failure:
    """Of a run that took longer than so many seconds."""
    message = f"the run took longer than its limit of {limit:g} seconds."
    return Failure(kind="timeout", type="TimeoutError", message=message, step=None)


def beyond_memory(limit: float) -> Failure:
    """Of a run that used more than so many bytes."""
    message = f"the run used more memory than its limit of {limit / (1 << 30):g} GiB."
    return Failure(kind="oom", type="MemoryLimit", message=message, step=None)


def failed_record(request: RunRequest, failure: Failure, executor: str, started: float) -> RunRecord:
    """The record of a run that left none itself; `started` is `time.monotonic()` of then."""
    from prunebench.bench.runner import Outcome, make_record

    message = portable(failure.message)[:LONGEST_MESSAGE]
    outcome, seconds = Outcome(), time.monotonic() - started
    outcome.clock -= seconds
    outcome.started -= timedelta(seconds=seconds)
    return make_record(request, outcome, executor, failure=failure.model_copy(update={"message": message}))

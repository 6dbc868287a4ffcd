"""What a job of Slurm does on its node: one run, until Slurm tells it to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from rich.console import Console

from prunebench.bench.executors import Executor, failed_record
from prunebench.bench.plan import RunRequest
from prunebench.bench.specs import run_label
from prunebench.children import POLL_SECONDS, start_server
from prunebench.errors import first_line
from prunebench.results.journal import Journal
from prunebench.results.records import Failure, FailureKind
from prunebench.results.store import ResultStore

EXECUTOR = "slurm"
"""As records name it."""

WIDTH = 120
"""Columns of what a job prints."""

CLAIM_SECONDS = 10.0
"""How long a job tries for its run: whoever only asks what is at work, or what is settled, holds a lock for a moment."""

LAST_SECONDS = 180.0
"""Before the end of a job's time: submitit has Slurm signal 90 s before it, Slurm up to 60 s earlier than it is told, and the
job's process begins after the job."""


class Stopped(Exception):
    """Slurm told the job to end, and it is not queued anew."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class OneRun:
    """What a task of the array does."""

    request: RunRequest
    results: Path
    again: bool
    minutes: int
    """The job's time."""

    def __call__(self) -> None:
        """Sweep over the one run, unless another command has it: a node is not for waiting."""
        from prunebench.bench.display import SweepDisplay
        from prunebench.bench.subprocesses import SubprocessExecutor
        from prunebench.bench.sweep import sweep

        if not self._is_free():
            return
        with deaf_children():
            start_server("prunebench.bench.preload")
        started, store = time.monotonic(), ResultStore(self.results, lambda _: None)
        executor, display = SubprocessExecutor(1, self.request.on_text, self.results), SweepDisplay(Console(width=WIDTH))
        display.started([self.request], 0, 1)
        try:
            with self._heeding(executor):
                sweep([self.request], store, executor, display, self.again, announce=False)
        except Stopped as stopped:
            store.write(failed_record(self.request, stopped.failure, EXECUTOR, started))
        finally:
            executor.close()
            display.close()

    def checkpoint(self) -> Any:
        """What is queued anew after a preemption: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)

    def _is_free(self) -> bool:
        """Whether nobody else has the run; the sweep claims it."""
        journal, end = Journal(self.results), time.monotonic() + CLAIM_SECONDS
        while True:
            claim = journal.claim(self.request.machine, self.request.spec.id, run_label(self.request.spec))
            if claim is not None:
                claim.release()
                return True
            if time.monotonic() > end:
                return False
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _heeding(self, executor: Executor) -> Iterator[None]:
        """When Slurm tells the job to end: first its run, while the claim is held, then submitit may queue the job anew.

        Submitit takes whatever comes after 80% of a job's time, or in its last ten minutes, for the end of its time; a
        preemption then is nothing that it would go on from, or not often. So what the time is, is asked here.
        """
        import submitit

        queue_anew: Any = signal.getsignal(signal.SIGUSR2)

        def end(signum: int, frame: FrameType | None) -> None:
            executor.close()
            seconds = elapsed_seconds()
            after = f"after {seconds / 60:.1f} of its {self.minutes} minutes"
            if seconds > 60 * self.minutes - LAST_SECONDS:
                raise Stopped(_failure("timeout", "TIMEOUT", f"Slurm told the job to end {after}, as it does near their end."))
            try:
                queue_anew(signum, frame)  # and leave
            except submitit.core.utils.UncompletedJobError as error:
                said = f"Slurm told the job to end {after}, and it is not queued anew. submitit says: {first_line(error)}"
                raise Stopped(_failure("killed", "PREEMPTED", said)) from None

        signal.signal(signal.SIGUSR2, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR2, queue_anew)


def elapsed_seconds() -> float:
    """How long this process has been there: about as long as its job."""
    return time.time() - float(psutil.Process().create_time())


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started inside do not hear the signals that Slurm sends to all of a job's: the job decides."""
    signals = {signal.SIGTERM, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _failure(kind: FailureKind, name: str, message: str) -> Failure:
    return Failure(kind=kind, type=name, message=message, step=None)

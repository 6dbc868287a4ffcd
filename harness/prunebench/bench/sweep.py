"""Many runs: leave out what is settled, hold one lock a run, write each record as it comes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from prunebench.bench.executors import Executor
from prunebench.bench.plan import RunRequest
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore


class Watcher(Protocol):
    """Shows a sweep to its user."""

    def started(self, total: int, settled: int) -> None:
        """The sweep begins: so many runs to do, so many found done."""

    def run_started(self, number: int, request: RunRequest) -> None:
        """A run begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """The present run has come so far."""

    def run_ended(self, number: int, record: RunRecord, seconds: float) -> None:
        """A run ended."""

    def run_taken(self, number: int, request: RunRequest) -> None:
        """Another command has this run; it is looked at again at the end."""


@dataclass
class Summary:
    """What a sweep came to."""

    settled: int = 0
    elsewhere: int = 0
    records: list[RunRecord] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Runs of this call that ended so."""
        return sum(record.status == status for record in self.records)


def split_settled(
    requests: list[RunRequest], store: ResultStore, machine: str, again: bool
) -> tuple[list[RunRequest], list[RunRequest]]:
    """The runs to do, and those found done."""
    settled = {} if again else store.settled(machine)
    return (
        [request for request in requests if request.spec.id not in settled],
        [request for request in requests if request.spec.id in settled],
    )


def sweep(todo: list[RunRequest], store: ResultStore, executor: Executor, watcher: Watcher, again: bool) -> Summary:
    """Do the runs in order; those that another command holds come last, and are taken as done if it finished them."""
    summary = Summary()
    waiting: list[tuple[int, RunRequest]] = []
    for number, request in enumerate(todo, start=1):
        if not _attempt(number, request, store, executor, watcher, summary, again=again, wait=False):
            watcher.run_taken(number, request)
            waiting.append((number, request))
    for number, request in waiting:
        _attempt(number, request, store, executor, watcher, summary, again=False, wait=True)
    return summary


def _attempt(
    number: int,
    request: RunRequest,
    store: ResultStore,
    executor: Executor,
    watcher: Watcher,
    summary: Summary,
    *,
    again: bool,
    wait: bool,
) -> bool:
    """Do one run under its lock; False where another command holds it."""
    with store.claim(request.machine, request.spec.id, wait=wait) as mine:
        if not mine:
            return False
        if not again and store.is_settled(request.machine, request.spec.id):
            summary.elsewhere += 1
            return True
        watcher.run_started(number, request)
        started = time.monotonic()
        record = executor.execute(request, watcher.progress)
        store.write(record)
        summary.records.append(record)
        watcher.run_ended(number, record, time.monotonic() - started)
        return True

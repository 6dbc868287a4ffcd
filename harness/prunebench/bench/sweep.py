"""Many runs: leave out what is settled, claim each in the journal, write each record as it comes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from prunebench.bench.checkpoints import clear, clear_older
from prunebench.bench.executors import Executor
from prunebench.bench.mask_bank import only_what_is_here, remove_half_written
from prunebench.bench.plan import RunRequest
from prunebench.bench.specs import run_label
from prunebench.children import POLL_SECONDS
from prunebench.errors import StoreError, WriteError
from prunebench.results.journal import Claim, Journal, SweepRun
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

LOOK_AGAIN_SECONDS = 1.0
"""Between two looks at the runs that other commands have."""


PARTS = ("step ", "eval ", "load", "audit")
"""How progress begins that names a part of a run; the rest counts within a part."""


class Watcher(Protocol):
    """Shows a sweep to its user. Runs are named by their numbers, from 1 on."""

    def run_began(self, number: int, request: RunRequest, where: str) -> None:
        """A run left the queue."""

    def progress(self, number: int, what: str, done: int, total: int) -> None:
        """A run has come so far."""

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        """A run ended; what its process wrote, and the record's file where this command wrote it."""

    def run_taken(self, number: int, request: RunRequest) -> None:
        """Another command has this run; it is looked at again."""

    def run_done_elsewhere(self, number: int) -> None:
        """Another command did this run since the sweep began."""


@dataclass
class Summary:
    """What a sweep came to."""

    elsewhere: int = 0
    records: list[RunRecord] = field(default_factory=list)

    def count(self, status: str) -> int:
        """Runs of this call that ended so."""
        return sum(record.status == status for record in self.records)


def split_settled(
    requests: list[RunRequest], records: Iterable[RunRecord], machine: str, again: bool, retry: Collection[str] = ()
) -> tuple[list[RunRequest], list[RunRequest]]:
    """The runs to do, and those found done.

    Args:
        requests: all of a suite.
        records: the latest of each run, of any machine.
        machine: whose records count.
        again: do also what is done.
        retry: do only runs whose latest record is of one of these: `failed`, `refused`, or a kind of failure.
    """
    own = [record for record in records if record.machine == machine]
    if retry:
        found = {record.id for record in own if _endings(record) & set(retry)}
        return [request for request in requests if request.spec.id in found], []
    settled = set() if again else {record.id for record in own if record.status != "failed"}
    return (
        [request for request in requests if request.spec.id not in settled],
        [request for request in requests if request.spec.id in settled],
    )


def _endings(record: RunRecord) -> set[str]:
    return {record.status} | ({record.failure.kind} if record.failure else set())


def sweep(
    todo: list[RunRequest],
    store: ResultStore,
    executor: Executor,
    watcher: Watcher,
    again: bool,
    settled: int = 0,
    announce: bool = True,
) -> Summary:
    """Do the runs, in order as far as there is room; those that another command holds are taken as done if it finished them.

    Args:
        todo: the runs.
        store: where their records go.
        executor: does them; whoever made it closes it, and an error or an interruption does too.
        watcher: is told.
        again: do also those that were settled since.
        settled: how many were found done before, for those who ask what is going on.
        announce: say in the journal that a sweep is going on; False in a job that is a part of one.

    Raises:
        StoreError: the results folder cannot be written; nothing was started.
        WriteError: it cannot be written any more; the runs that are at work are for the executor to end.
    """
    if not todo:
        return Summary()
    before = {request.spec.id: store.paths_of_run(request.machine, request.spec.id) for request in todo}
    runs = [
        SweepRun(
            id=request.spec.id,
            label=run_label(request.spec),
            predicted_seconds=request.predicted.seconds if request.predicted else None,
            records=len(before[request.spec.id]),
        )
        for request in todo
    ]
    first = todo[0]
    journal, jobs = Journal(store.folder), max(1, executor.room())
    announced = journal.announce(first.machine, first.command, first.suite or "", jobs, settled, runs) if announce else None
    try:
        return _Sweep(todo, store, executor, watcher, again, before).run()
    finally:
        if announced is not None:
            announced.release()


@dataclass
class _Held:
    """A run that was handed to the executor."""

    number: int
    request: RunRequest
    claim: Claim | None
    began: float = field(default_factory=time.monotonic)


class _Sweep:
    """The listener of the executor."""

    def __init__(
        self,
        todo: list[RunRequest],
        store: ResultStore,
        executor: Executor,
        watcher: Watcher,
        again: bool,
        before: Mapping[str, frozenset[str]],
    ) -> None:
        """`before` has the files of each run that were there already."""
        self._store, self._journal = store, Journal(store.folder)
        self._executor, self._watcher, self._again = executor, watcher, again
        self._queue = deque(enumerate(todo, start=1))
        self._before = before
        self._taken: list[tuple[int, RunRequest]] = []
        self._looked = time.monotonic()
        self._held: dict[str, _Held] = {}
        self._summary = Summary()

    def run(self) -> Summary:
        try:
            while self._queue or self._taken or self._held:
                self._fill()
                if self._held:
                    self._executor.wait(self, POLL_SECONDS)
                elif self._taken:
                    time.sleep(POLL_SECONDS)
        except StoreError as error:  # it could be written when the sweep began
            raise WriteError(str(error)) from None
        finally:
            if self._held:  # the runs first, then their claims: nobody may begin one that is still alive
                self._executor.close()
            for held in self._held.values():
                if held.claim:
                    held.claim.release()
        return self._summary

    def _fill(self) -> None:
        """Hand over as many runs as there is room for."""
        if self._executor.keeps_records and self._queue:
            self._hand_over([(number, request, None) for number, request in self._queue])
            self._queue.clear()
        while self._queue and self._executor.room():
            self._attempt(*self._queue.popleft(), told=False)
        if self._taken and time.monotonic() - self._looked > LOOK_AGAIN_SECONDS:
            self._looked, taken, self._taken = time.monotonic(), self._taken, []
            for number, request in taken:
                if self._executor.room():
                    self._attempt(number, request, told=True)
                else:
                    self._taken.append((number, request))

    def _attempt(self, number: int, request: RunRequest, *, told: bool) -> None:
        """Begin a run under its claim, unless another command has it or did it."""
        claim = self._journal.claim(request.machine, request.spec.id, run_label(request.spec))
        if claim is None:
            self._taken.append((number, request))
            if not told:
                self._watcher.run_taken(number, request)
        elif self._is_done_elsewhere(request):
            claim.release()
            self._summary.elsewhere += 1
            self._watcher.run_done_elsewhere(number)
        else:
            if self._again:  # a measurement of its own, and not what an earlier one left behind
                found = self._store.of_run(request.machine, request.spec.id)
                clear_older(request, [stored.record for stored in found if stored.record.status != "failed"])
            self._hand_over([(number, request, claim)])

    def _is_done_elsewhere(self, request: RunRequest) -> bool:
        """Another command came to a record of it, be it a failure, since this sweep began; or it was settled before, if that
        is enough."""
        machine, run = request.machine, request.spec.id
        if self._store.paths_of_run(machine, run) - self._before[run]:
            return True
        return not self._again and self._store.is_settled(machine, run)

    def _hand_over(self, runs: list[tuple[int, RunRequest, Claim | None]]) -> None:
        for number, request, claim in runs:
            self._held[request.spec.id] = _Held(number, request, claim)
        self._executor.start([request for _, request, _ in runs])

    def began(self, run: str, where: str) -> None:
        """See `Listener`."""
        held = self._held[run]
        held.began = time.monotonic()
        if held.claim:
            held.claim.tell(where=where)
        self._watcher.run_began(held.number, held.request, where)

    def progress(self, run: str, what: str, done: int, total: int) -> None:
        """See `Listener`."""
        held = self._held[run]
        if held.claim:
            is_part = what.startswith(PARTS)
            held.claim.tell(**({"doing": what} if is_part else {"what": what}), done=done, total=total)
        self._watcher.progress(held.number, what, done, total)

    def ended(self, run: str, record: RunRecord, log: bytes = b"") -> None:
        """See `Listener`."""
        held = self._held[run]
        path = None
        if not self._executor.keeps_records:
            kept = self._store.keep(only_what_is_here(record, self._store.folder), log)
            path, record = self._store.folder / kept.path, kept.record
            if record.status != "failed":
                clear(held.request)
            else:
                remove_half_written(held.request)
        del self._held[run]
        if held.claim:
            held.claim.release()
        self._summary.records.append(record)
        self._watcher.run_ended(held.number, record, time.monotonic() - held.began, log, path)

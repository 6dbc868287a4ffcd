"""How far sweeps have come, by the journal and the records: what `status` shows of commands that run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from prunebench.results.journal import Entry, Journal, RunPage, SweepPage, seconds_left
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore


@dataclass(frozen=True)
class SweepState:
    """One sweep."""

    page: SweepPage
    alive: bool
    """Its command is going on; otherwise it died, and running it again takes up what is left."""
    running: list[RunPage]
    done: int
    """Of its runs: those that are `ok` or refused."""
    failed: int
    """Of its runs: those that have failed since it began."""
    left: int
    """Of its runs: those that are at work or to come."""
    seconds_left: float | None
    """None where nothing tells."""


@dataclass(frozen=True)
class Status:
    """All that goes on in a results folder."""

    sweeps: list[SweepState]
    others: list[RunPage]
    """Runs at work that belong to no sweep that is going on: those of a cluster whose command ended."""
    abandoned: list[RunPage]
    """Runs that were at work when their process died."""


def status(store: ResultStore) -> Status:
    """What goes on in a results folder."""
    journal = Journal(store.folder)
    runs, sweeps = journal.runs(), journal.sweeps()
    records = {(stored.record.machine, stored.record.id): stored.record for stored in store.latest()}
    running = [entry.page for entry in runs if entry.alive]
    swept = {(sweep.page.machine, run.id) for sweep in sweeps for run in sweep.page.runs}
    return Status(
        sweeps=[_state(entry, running, records) for entry in sweeps],
        others=[page for page in running if (page.machine, page.id) not in swept],
        abandoned=[entry.page for entry in runs if not entry.alive],
    )


def _state(entry: Entry[SweepPage], running: Sequence[RunPage], records: dict[tuple[str, str], RunRecord]) -> SweepState:
    page = entry.page
    ids = {run.id for run in page.runs}
    found = {run.id: records[page.machine, run.id] for run in page.runs if (page.machine, run.id) in records}
    done = {run_id for run_id, record in found.items() if record.status != "failed"}
    failed = {run_id for run_id, record in found.items() if run_id not in done and record.provenance.started >= page.started}
    at_work = {run.id: run for run in running if run.machine == page.machine and run.id in ids} if entry.alive else {}
    ended = (done | failed) - at_work.keys()
    times, left = [], []
    for run in page.runs:
        if run.id in ended:
            times.append((run.predicted_seconds, found[run.id].provenance.seconds))
        else:
            spent = _seconds_since(at_work[run.id].started) if run.id in at_work else 0.0
            left.append((run.predicted_seconds, spent))
    return SweepState(
        page=page,
        alive=entry.alive,
        running=list(at_work.values()),
        done=len(done - at_work.keys()),
        failed=len(failed - at_work.keys()),
        left=len(left),
        seconds_left=seconds_left(times, left, page.jobs),
    )


def _seconds_since(started: str) -> float:
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds())

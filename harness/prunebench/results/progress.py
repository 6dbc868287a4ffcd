"""How far sweeps have come, by the journal and the records: what `status` shows of commands that run elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    records: dict[tuple[str, str], list[RunRecord]] = {}
    for stored in store.all():
        records.setdefault((stored.record.machine, stored.record.id), []).append(stored.record)
    running = [entry.page for entry in runs if entry.alive]
    states = [_state(entry, running, records) for entry in sweeps]
    swept = {(state.page.machine, run.id) for state in states if state.alive for run in state.page.runs}
    settled = {key for key, found in records.items() if any(record.status != "failed" for record in found)}
    return Status(
        sweeps=[state for state in states if state.alive or state.left],
        others=[page for page in running if (page.machine, page.id) not in swept],
        # A page whose run is settled was left by a process that died just after it had written the record.
        abandoned=[entry.page for entry in runs if not entry.alive and (entry.page.machine, entry.page.id) not in settled],
    )


def _state(
    entry: Entry[SweepPage], running: Sequence[RunPage], records: Mapping[tuple[str, str], Sequence[RunRecord]]
) -> SweepState:
    page = entry.page
    ids = {run.id for run in page.runs}
    at_work = {run.id: run for run in running if run.machine == page.machine and run.id in ids} if entry.alive else {}
    ended: list[RunRecord] = []
    times: list[tuple[float | None, float]] = []
    left: list[tuple[float | None, float]] = []
    for run in page.runs:
        found = records.get((page.machine, run.id), ())
        if run.id in at_work:
            left.append((run.predicted_seconds, _seconds_since(at_work[run.id].started)))
        elif len(found) > run.records:  # by number, because clocks of machines differ, and a resumed run began long ago
            ended.append(found[-1])
            times.append((run.predicted_seconds, found[-1].provenance.seconds))
        else:
            left.append((run.predicted_seconds, 0.0))
    failed = sum(record.status == "failed" for record in ended)
    return SweepState(
        page=page,
        alive=entry.alive,
        running=list(at_work.values()),
        done=len(ended) - failed,
        failed=failed,
        left=len(left),
        seconds_left=seconds_left(times, left, len(at_work) or page.jobs),
    )


def _seconds_since(started: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - started).total_seconds())

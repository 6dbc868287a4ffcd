"""What `status` says of sweeps, by the journal and the records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import make_record, make_spec
from typer.testing import CliRunner

from prunebench.cli.program import app
from prunebench.results.journal import Claim, Journal, SweepRun
from prunebench.results.progress import status
from prunebench.results.records import RunRecord, RunSpec
from prunebench.results.store import ResultStore

SPECS = [make_spec(f"wanda[x={number}]") for number in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "results", print)


@pytest.fixture
def announced(store: ResultStore) -> Iterator[Claim]:
    """A sweep of six runs, of which each is expected to take 100 seconds; the fourth failed before."""
    store.write(record(SPECS[3], "failed"))
    runs = [
        SweepRun(id=spec.id, label=f"run {number}", predicted_seconds=100.0, records=int(number == 3))
        for number, spec in enumerate(SPECS)
    ]
    claim = Journal(store.folder).announce("box", "prunebench run small", "small", 2, 3, runs)
    yield claim
    claim.release()


def record(spec: RunSpec, status: str = "ok", seconds: float = 150.0) -> RunRecord:
    made = make_record(spec, status=status, reason="no." if status != "ok" else None)
    return made.model_copy(update={"provenance": made.provenance.model_copy(update={"seconds": seconds})})


def at_work(store: ResultStore, spec: RunSpec, machine: str = "box") -> Claim:
    claim = Journal(store.folder).claim(machine, spec.id, "a run")
    assert claim is not None
    return claim


def test_runs_are_counted_once(store: ResultStore, announced: Claim) -> None:
    """By the number of their records, not by clocks, which differ."""
    for number, ending in enumerate(["ok", "refused", "failed"]):
        store.write(record(SPECS[number], ending))
    claim = at_work(store, SPECS[4])
    (sweep,) = status(store).sweeps
    assert sweep.alive
    assert (sweep.done, sweep.failed, sweep.left) == (2, 1, 3), "what failed before the sweep began is to do"
    assert [run.id for run in sweep.running] == [SPECS[4].id]
    claim.release()


def test_a_run_that_is_done_again_is_at_work(store: ResultStore, announced: Claim) -> None:
    store.write(record(SPECS[0], "failed"))
    claim = at_work(store, SPECS[0])
    (sweep,) = status(store).sweeps
    assert (sweep.done, sweep.failed, sweep.left, len(sweep.running)) == (0, 0, 6, 1)
    claim.release()


def test_how_long_it_will_take(store: ResultStore, announced: Claim) -> None:
    """Runs take one and a half times what was expected so far, and two are done at a time."""
    store.write(record(SPECS[0], seconds=140.0))
    store.write(record(SPECS[1], seconds=160.0))
    (sweep,) = status(store).sweeps
    assert sweep.seconds_left == pytest.approx(4 * 150 / 2)


def test_records_and_runs_of_other_machines_do_not_count(store: ResultStore, announced: Claim) -> None:
    store.write(record(SPECS[0]).model_copy(update={"machine": "another"}))
    claim = at_work(store, SPECS[1], machine="another")
    found = status(store)
    assert (found.sweeps[0].done, found.sweeps[0].running, found.sweeps[0].left) == (0, [], 6)
    assert [run.id for run in found.others] == [SPECS[1].id], "which belongs to a command that has ended"
    claim.release()


def test_runs_of_a_dead_sweep_that_are_at_work_are_shown(store: ResultStore) -> None:
    """Slurm's jobs go on when the command that submitted them dies."""
    claim = Journal(store.folder).announce("box", "prunebench run x", "small", 1, 0, [SweepRun(id=SPECS[0].id, label="a run")])
    claim._lock.release()
    job = at_work(store, SPECS[0])
    found = status(store)
    assert [run.id for run in found.others] == [SPECS[0].id]
    store.write(record(SPECS[0]))
    job._lock.release()  # killed between its record and the end
    found = status(store)
    assert (found.sweeps, found.others, found.abandoned) == ([], [], []), "nothing is left to do"


def test_a_lock_that_may_not_be_looked_at_is_held(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = at_work(store, SPECS[0])

    def refused(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("filelock.FileLock.acquire", refused)
    assert [run.id for run in status(store).others] == [SPECS[0].id]
    monkeypatch.undo()
    claim.release()


@pytest.mark.parametrize(
    "damage", [("started", "yesterday"), ("started", "2026-01-01T00:00:00"), ("predicted_seconds", float("inf"))]
)
def test_damaged_pages_are_passed_over(store: ResultStore, announced: Claim, damage: tuple[str, object]) -> None:
    (path,) = Journal(store.folder).folder.glob("sweep-*.json")
    page = json.loads(path.read_text())
    key, value = damage
    (page["runs"][0] if key == "predicted_seconds" else page)[key] = value
    path.write_text(json.dumps(page))
    assert status(store).sweeps == []


def test_a_new_sweep_takes_the_place_of_a_dead_one(store: ResultStore) -> None:
    journal = Journal(store.folder)
    for suite in ("small", "other"):
        claim = journal.announce("box", "prunebench run x", suite, 1, 0, [SweepRun(id=SPECS[0].id, label="a run")])
        claim._lock.release()  # as the system does when its process dies
    assert [sweep.alive for sweep in status(store).sweeps] == [False, False]
    claim = journal.announce("box", "prunebench run x", "small", 1, 0, [])
    assert {(sweep.page.suite, sweep.alive) for sweep in status(store).sweeps} == {("small", True), ("other", False)}
    claim.release()


def test_as_json(store: ResultStore, announced: Claim) -> None:
    store.write(record(SPECS[0]))
    claim = at_work(store, SPECS[1])
    claim.tell(doing="step wanda", done=0, total=1)
    ran = CliRunner().invoke(app, ["status", "--results", str(store.folder), "--json"])
    found = json.loads(ran.stdout)
    (sweep,) = found["sweeps"]
    assert (sweep["done"], sweep["left"], sweep["page"]["suite"]) == (1, 5, "small")
    assert sweep["running"][0]["doing"] == "step wanda"
    claim.release()


def test_what_is_shown_of_strangers_is_harmless(store: ResultStore) -> None:
    journal = Journal(store.folder)
    claims = [
        journal.announce("box", "x", "\x1b[31mred[bold]", 1, 0, [SweepRun(id=SPECS[0].id, label="a")]),
        journal.claim("box", SPECS[0].id, "a\x1b]0;title\x07 [link=x]run[/]\u202e"),
    ]
    ran = CliRunner().invoke(app, ["status", "--results", str(store.folder)])
    assert ran.exit_code == 0
    assert not {"\x1b", "\x07", "\u202e"} & set(ran.stdout)
    assert "\\x1b]0;title\\x07 [link=x]run[/]\\u202e" in ran.stdout
    for claim in claims:
        assert claim is not None
        claim.release()

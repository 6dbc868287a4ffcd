"""The journal: one command has a run, a dead one lets go, and pages say what is going on."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Process, heard, programs

from prunebench.errors import StoreError
from prunebench.results.journal import Claim, Journal, SweepRun, seconds_left

RUN = "0123456789ab"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "results")


def claimed(journal: Journal, machine: str = "box", run: str = RUN) -> Claim:
    claim = journal.claim(machine, run, "model wanda 0.5, seed 1")
    assert claim is not None
    return claim


# One has it

PROGRAM = """
import sys
from pathlib import Path
from prunebench.results.journal import Journal

claim = Journal(Path(sys.argv[1])).claim("box", "0123456789ab", "a run")
print("mine" if claim else "taken", flush=True)
sys.stdin.readline()
if claim:
    claim.release()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Process]]:
    """Starts a process that claims the run, says whether it has it, and goes on when it gets a line."""
    with programs() as begin:
        yield lambda: begin(PROGRAM, tmp_path / "results")


def test_one_of_several_gets_a_run(start: Callable[[], Process]) -> None:
    assert sorted(heard(process) for process in [start() for _ in range(3)]) == ["mine", "taken", "taken"]


def test_the_run_of_a_killed_command_is_free_at_once(journal: Journal, start: Callable[[], Process]) -> None:
    holder = start()
    assert heard(holder) == "mine"
    assert journal.claim("box", RUN, "a run") is None
    (entry,) = journal.runs()
    assert (entry.alive, entry.page.process) == (True, holder.pid)
    holder.kill()
    holder.wait()
    (entry,) = journal.runs()
    assert (entry.alive, entry.page.process) == (False, holder.pid), "the page was left behind, and says so"
    claim = claimed(journal)
    (entry,) = journal.runs()
    assert (entry.alive, entry.page.process) == (True, os.getpid())
    claim.release()
    assert journal.runs() == []


def test_a_claim_excludes_also_in_one_process(journal: Journal) -> None:
    claim = claimed(journal)
    assert journal.claim("box", RUN, "a run") is None
    claim.release()
    claimed(journal).release()


def test_claims_of_other_runs_and_machines_are_apart(journal: Journal) -> None:
    claims = [claimed(journal), claimed(journal, run="0123456789ac"), claimed(journal, machine="another box")]
    assert len(journal.runs()) == 3
    for claim in claims:
        claim.release()


def test_only_its_owner_may_touch_a_lock(journal: Journal) -> None:
    claim = claimed(journal)
    (lock,) = journal.folder.glob("*.lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    claim.release()


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "", "\n", "x" * 3000, "a/b"])
def test_names_stay_inside(journal: Journal, tmp_path: Path, name: str) -> None:
    claim = claimed(journal, machine=name, run=name)
    journal.scratch(name, name, "log").touch()
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {journal.folder}
    claim.release()


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(journal: Journal) -> None:
    journal.folder.parent.mkdir()
    journal.folder.touch()
    with pytest.raises(StoreError, match=r"^the results folder .* cannot be written: "):
        journal.claim("box", RUN, "a run")


# What the pages say


def test_a_page_says_what_a_run_does(journal: Journal) -> None:
    claim = claimed(journal)
    claim.tell(where="process 12")
    claim.tell(doing="step wanda", done=0, total=1)
    page = journal.runs()[0].page
    assert (page.id, page.label, page.machine) == (RUN, "model wanda 0.5, seed 1", "box")
    assert (page.where, page.doing) == ("process 12", "step wanda")
    claim.release()


def test_pages_are_not_written_at_every_block(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("prunebench.results.journal.time.monotonic", lambda: clock[0])
    claim = claimed(journal)
    claim.tell(doing="step wanda", done=0, total=1)
    for block in range(5):
        claim.tell(what="block", done=block, total=5)
    assert journal.runs()[0].page.what == "", "what is counted is not so urgent"
    clock[0] += 2.0
    claim.tell(what="block", done=4, total=5)
    page = journal.runs()[0].page
    assert (page.doing, page.what, page.done, page.total) == ("step wanda", "block", 4, 5)
    claim.tell(doing="eval perplexity", done=0, total=2)
    assert journal.runs()[0].page.doing == "eval perplexity", "what is done now is"
    claim.release()


def test_a_reader_never_finds_half_a_page(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunebench.results.journal.TELL_SECONDS", 0.0)
    claim, stop = claimed(journal), threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            claim.tell(doing="x" * (number % 5000), done=number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(len(journal.runs()) == 1 for _ in range(200))
    finally:
        stop.set()
        writer.join()
        claim.release()


def test_a_full_disk_stops_no_run(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    claim = claimed(journal)
    monkeypatch.setattr("prunebench.results.journal.write_aside", full)
    claim.tell(doing="step wanda")
    assert journal.runs()[0].page.doing == ""
    claim.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"id": 3}', b"\xff\xfe", b"[" * 100_000])
def test_strange_pages_are_passed_over(journal: Journal, content: bytes) -> None:
    claim = claimed(journal)
    (journal.folder / "box-other.json").write_bytes(content)
    (journal.folder / "sweep-other.json").write_bytes(content)
    assert [entry.page.id for entry in journal.runs()] == [RUN]
    assert journal.sweeps() == []
    claim.release()


@pytest.mark.parametrize("prefix", ["box-", "sweep-"])
def test_what_is_no_page_holds_nobody_up(journal: Journal, tmp_path: Path, prefix: str) -> None:
    """A pipe would wait for a writer for ever; a link leads to what is no business of this folder's readers."""
    claim, sweep = claimed(journal), journal.announce("box", "prunebench run x", "x", 1, 0, [])
    (page,) = [path for path in journal.folder.glob("*.json") if path.name.startswith(prefix)]
    (tmp_path / "outside.json").write_bytes(page.read_bytes())
    (journal.folder / f"{prefix}link.json").symlink_to(tmp_path / "outside.json")
    os.mkfifo(journal.folder / f"{prefix}pipe.json")
    (journal.folder / f"{prefix}folder.json").mkdir()
    assert (len(journal.runs()), len(journal.sweeps())) == (1, 1)
    claim.release()
    sweep.release()


def test_a_journal_elsewhere_is_not_used(journal: Journal, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    journal.folder.parent.mkdir()
    journal.folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=r"^the journal .* is a link that leads out of the results folder\.$"):
        journal.claim("box", RUN, "a run")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_page_being_written_has_a_name_that_nobody_guesses(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    claim, names = claimed(journal), set()
    replace = Path.replace

    def seen(self: Path, target: Path) -> Path:
        assert stat.S_ISREG(self.lstat().st_mode)
        names.add(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", seen)
    claim.tell(doing="step wanda")
    claim.tell(doing="eval perplexity")
    assert len(names) == 2
    claim.release()


def test_what_a_killed_writer_left_of_a_page_is_removed(journal: Journal) -> None:
    claim = claimed(journal)
    claim.release()
    remains = [journal.folder / f"box-{RUN}.abcdefgh.tmp", journal.folder / "box-0123456789ac.abcdefgh.tmp"]
    for path in remains:
        path.touch()
    claimed(journal).release()
    assert [path.exists() for path in remains] == [False, True], "the other is another's"


def test_a_sweep_announces_itself(journal: Journal) -> None:
    runs = [SweepRun(id=RUN, label="a run", predicted_seconds=3.0)]
    claim = journal.announce("box", "prunebench run x", "x", 2, 7, runs)
    (entry,) = journal.sweeps()
    assert entry.alive
    assert (entry.page.suite, entry.page.jobs, entry.page.settled, list(entry.page.runs)) == ("x", 2, 7, runs)
    assert journal.runs() == []
    other = journal.announce("box", "prunebench run x", "x", 2, 7, runs)
    assert len(journal.sweeps()) == 2
    claim.release()
    other.release()
    assert journal.sweeps() == []


@pytest.mark.parametrize(
    ("ended", "left", "jobs", "expected"),
    [
        ([], [], 1, 0.0),
        ([], [(None, 0.0)], 1, None),
        ([(None, 10.0), (None, 20.0)], [(None, 0.0), (None, 0.0)], 1, 30.0),
        ([], [(10.0, 0.0), (20.0, 0.0)], 1, 30.0),
        ([(10.0, 20.0)], [(10.0, 0.0), (20.0, 0.0)], 1, 60.0),
        ([(10.0, 20.0)], [(10.0, 0.0), (20.0, 0.0)], 2, 30.0),
        ([(10.0, 20.0)], [(10.0, 0.0)], 4, 20.0),
        ([(10.0, 20.0)], [(10.0, 0.0), (None, 0.0)], 1, 40.0),
        ([(None, 10.0)], [(None, 4.0), (None, 30.0), (None, 0.0)], 1, 16.0),
    ],
)
def test_how_long_it_will_take(
    ended: list[tuple[float | None, float]], left: list[tuple[float | None, float]], jobs: int, expected: float | None
) -> None:
    assert seconds_left(ended, left, jobs) == expected

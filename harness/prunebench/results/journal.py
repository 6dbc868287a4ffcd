"""What is going on in a results folder: a lock and a page for every run at work, and for every command that sweeps.

The lock says whether somebody is at work, the page what at. The operating system lets go of the lock of a process that died
(`filelock`: flock, or a lock file that names its owner where a file system has no flock; on a shared disk it must be carried
between machines, as NFS 4 and Lustre with `-o flock` do), so a page without a held lock was left behind, and the run is free.
Pages are for reading: whatever goes wrong with one stops nobody.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

import filelock
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from prunebench.errors import StoreError
from prunebench.results.content import slug
from prunebench.results.files import is_within, read_file, write_aside

TELL_SECONDS = 1.0
"""A page is written anew at most so often, and at once when what is done changes."""

MAX_PAGE_BYTES = 8 << 20


class _Page(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    machine: str
    process: int
    started: AwareDatetime


class RunPage(_Page):
    """A run that is at work."""

    id: str
    label: str
    where: str = ""
    """The process or device, once it left the queue."""
    doing: str = ""
    """The step or evaluation."""
    what: str = ""
    """What is counted there: blocks, windows, questions."""
    done: int = 0
    total: int = 0


class SweepRun(BaseModel):
    """A run that a sweep is to do."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    id: str
    label: str
    predicted_seconds: float | None = None
    records: int = 0
    """How many there were of it when the sweep began."""


class SweepPage(_Page):
    """A command that sweeps."""

    command: str
    suite: str
    jobs: int
    settled: int
    """Runs that were found done."""
    runs: tuple[SweepRun, ...]


Page = TypeVar("Page", RunPage, SweepPage)


@dataclass(frozen=True)
class Entry(Generic[Page]):
    """A page, and whether its writer lives."""

    page: Page
    alive: bool


class Claim:
    """A held lock with its page."""

    def __init__(self, lock: filelock.BaseFileLock, path: Path, page: RunPage | SweepPage) -> None:
        self._lock, self._path, self._page, self._told = lock, path, page, 0.0
        _remove_unfinished(path)
        self._write()

    def tell(self, **changes: str | int) -> None:
        """Change the page."""
        page = self._page.model_copy(update=changes)
        new_subject = isinstance(page, RunPage) and isinstance(self._page, RunPage) and page.doing != self._page.doing
        self._page = page
        if new_subject or time.monotonic() - self._told > TELL_SECONDS:
            self._write()

    def release(self) -> None:
        """Take the page away and let go of the lock."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            if isinstance(self._page, SweepPage):  # nobody else ever asks for this lock
                self._path.with_suffix(".lock").unlink(missing_ok=True)
        self._lock.release()

    def _write(self) -> None:
        """A reader finds the earlier page or this one; on a full disk, the earlier one."""
        self._told = time.monotonic()
        with suppress(OSError):
            content = self._page.model_dump_json()
            aside = write_aside(self._path.parent, content, prefix=f"{self._path.stem}.", durable=False)
            try:
                aside.replace(self._path)
            except OSError:
                aside.unlink(missing_ok=True)


class Journal:
    """The journal of one results folder."""

    def __init__(self, results: Path) -> None:
        self.folder = results / ".journal"

    def claim(self, machine: str, run_id: str, label: str) -> Claim | None:
        """Take the one lock of a run, so that two commands on one folder never do it twice; None where another has it.

        Raises:
            StoreError: the folder cannot be written.
        """
        page = RunPage(id=run_id, label=label, machine=machine, process=os.getpid(), started=now())
        return self._claim(run_stem(machine, run_id), page)

    def announce(self, machine: str, command: str, suite: str, jobs: int, settled: int, runs: Sequence[SweepRun]) -> Claim:
        """Say that a sweep is going on, so that `status` knows what remains of it; takes the place of dead ones of its suite.

        Raises:
            StoreError: the folder cannot be written.
        """
        page = SweepPage(
            machine=machine,
            process=os.getpid(),
            started=now(),
            command=command,
            suite=suite,
            jobs=jobs,
            settled=settled,
            runs=tuple(runs),
        )
        claim = self._claim(f"sweep-{uuid.uuid4().hex[:12]}", page)
        assert claim is not None  # nobody else has such a name
        for path, entry in self._read("sweep-*.json", SweepPage):
            if not entry.alive and (entry.page.machine, entry.page.suite) == (machine, suite):
                _remove_unfinished(path)
                with suppress(OSError):
                    path.unlink()
                    path.with_suffix(".lock").unlink()
        return claim

    def runs(self) -> list[Entry[RunPage]]:
        """Every run that is at work, or was when its process died; the one that began first comes first."""
        return sorted((entry for _, entry in self._read("*.json", RunPage)), key=lambda entry: entry.page.started)

    def sweeps(self) -> list[Entry[SweepPage]]:
        """Every sweep that is going on, or was when its process died."""
        return sorted((entry for _, entry in self._read("sweep-*.json", SweepPage)), key=lambda entry: entry.page.started)

    def scratch(self, machine: str, run_id: str, ending: str) -> Path:
        """Where what belongs to a run at work is kept: its log, its checkpoint. The folder is there once a run was claimed."""
        return self.folder / f"{run_stem(machine, run_id)}.{ending}"

    def _make_folder(self) -> None:
        """Raise a StoreError where it cannot be made, or is a link that leads out of the results."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from None
        if not is_within(self.folder, self.folder.parent):
            raise StoreError(f"the journal {self.folder} cannot be used: it is a link that leads out of the results folder.")

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"the results folder {self.folder.parent} cannot be written: {error.strerror}.")

    def _claim(self, stem: str, page: RunPage | SweepPage) -> Claim | None:
        self._make_folder()
        try:
            lock = filelock.FileLock(self.folder / f"{stem}.lock", mode=0o600)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        except OSError as error:
            raise self._unwritable(error) from None
        return Claim(lock, self.folder / f"{stem}.json", page)

    def _read(self, pattern: str, kind: type[Page]) -> Iterator[tuple[Path, Entry[Page]]]:
        for path in self.folder.glob(pattern):
            if path.name.startswith("sweep-") != (kind is SweepPage):
                continue
            with suppress(OSError, ValueError, RecursionError, ValidationError):
                page = kind.model_validate(json.loads(read_file(path, self.folder.parent, MAX_PAGE_BYTES)))
                yield path, Entry(page, self._is_held(path.with_suffix(".lock")))

    @staticmethod
    def _is_held(path: Path) -> bool:
        """Whether somebody has the lock; also where it is somebody else's and may not be looked at."""
        if not path.exists():
            return False
        lock = filelock.FileLock(path, mode=0o600)
        try:
            lock.acquire(timeout=0)
        except (filelock.Timeout, OSError):
            return True
        lock.release()
        return False


def _remove_unfinished(page: Path) -> None:
    """Remove what a killed process left of a page that it was writing; for whoever has its lock, or outlived who had."""
    for aside in page.parent.glob(f"{page.stem}.*.tmp"):
        with suppress(OSError):
            aside.unlink()


def run_stem(machine: str, run_id: str) -> str:
    """The name of a run's files in the journal."""
    return f"{slug(machine)}-{slug(run_id)}"


def now() -> datetime:
    """UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def seconds_left(
    ended: Sequence[tuple[float | None, float]], left: Sequence[tuple[float | None, float]], jobs: int
) -> float | None:
    """How long a sweep will still take; None where nothing is known.

    Args:
        ended: predicted and found seconds of runs that have ended.
        left: predicted seconds of those that have not, and how long each has been at work.
        jobs: runs at a time.

    Where all runs have predictions, these times what runs have taken of theirs so far; otherwise as long as those that ended.
    """
    known = [(predicted, found) for predicted, found in ended if predicted]
    expected = [predicted for predicted, _ in left if predicted is not None]
    if len(expected) == len(left):
        factor = sum(found for _, found in known) / sum(predicted for predicted, _ in known) if known else 1.0
        whole = [factor * predicted for predicted in expected]
    elif ended:
        whole = [sum(found for _, found in ended) / len(ended)] * len(left)
    else:
        return None
    rest = [max(0.0, each - spent) for each, (_, spent) in zip(whole, left, strict=True)]
    return sum(rest) / max(1, min(jobs, len(left)))

"""The results folder: `<machine>/<model>/<method>-<target>-<id>.json`.

Writing is aside, fsync, rename; nothing is ever overwritten: a run repeated with `--again`, or retried after a failure, is
written beside the earlier record (`….2.json`), and the latest counts. A truncated, foreign or newer file is skipped with a
warning that names it; so is what is no file, or leads out of the folder by a link. Raw answers by the thousand are kept beside
the record (`items.py`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from prunebench.errors import PrunebenchError, StoreError, WriteError
from prunebench.plain import plain
from prunebench.results.content import checksum, slug
from prunebench.results.files import is_within, read_file, sync_folder, write_aside
from prunebench.results.items import Columns, apart, read_items
from prunebench.results.mask_files import MaskFile, read_masks
from prunebench.results.records import MASKS, SCHEMA, Failure, RunRecord, ScoreRecord, upgraded
from prunebench.targets import parse_target

MAX_RECORD_BYTES = 32 << 20
"""A larger file is no record."""

MOST_PARTS = 500_000
"""Lists and objects: more of them are no record, and take a hundred times their text in memory."""

ROOM = 1 << 20
"""Bytes that there must be room for when a sweep begins."""

MOST_DIGITS = 30
"""Of a whole number: more than any count or seed has, and few enough for every calculation."""

MOST_REASON = 300
"""Characters that a warning tells of what is wrong with a file."""

PUBLISHED = "published"
"""Where the papers' numbers are."""

VERDICTS = "verdicts"
"""Where is kept what was found of records when they were looked at again."""

NO_MACHINES = (PUBLISHED, MASKS, VERDICTS)
"""Folders in which there are no records."""

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Stored:
    """A record and its file, relative to the results folder."""

    path: str
    record: RunRecord


class ResultStore:
    """Records in a folder."""

    def __init__(self, folder: Path, warn: Warn) -> None:
        self.folder, self._warn = folder, warn

    def check_writable(self) -> None:
        """Find out before any work whether records can be written.

        Raises:
            StoreError: they cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(bytes(ROOM))
                file.flush()
        except OSError as error:
            raise StoreError(f"the results folder {self.folder} cannot be written: {error.strerror}.") from None

    def all(self) -> list[Stored]:
        """Every readable record, in the order of their paths."""
        found = []
        for path in sorted(self.folder.glob("*/*/*.json")):
            top = path.relative_to(self.folder).parts[0]
            if top in NO_MACHINES or top.startswith("."):
                continue
            record = self._read(path)
            if record is not None:
                found.append(Stored(path.relative_to(self.folder).as_posix(), record))
        return found

    def latest(self) -> list[Stored]:
        """For each machine and id the latest record; an `ok` or refused one is not undone by a later failure.

        Of those in one folder it is the one written last, whatever the clock said; of a model that had several names, and so
        has several folders, the one that began last.
        """
        in_folder = _best(self.all(), lambda stored: (*_run_of(stored), Path(stored.path).parent), _attempt)
        chosen = _best(in_folder, _run_of, lambda stored: stored.record.provenance.started)
        return sorted(chosen, key=lambda stored: stored.path)

    def is_settled(self, machine: str, run_id: str) -> bool:
        """Whether a run need not be repeated: it is `ok`, or refused, which is an answer too; reads only its own files."""
        return any(stored.record.status != "failed" for stored in self.of_run(machine, run_id))

    def of_run(self, machine: str, run_id: str) -> list[Stored]:
        """The records of one run, the one written last comes last; reads only the files that bear its id."""
        found = []
        for path in self._files_of_run(machine, run_id):
            record = self._read(path)
            if record is not None and (record.machine, record.id) == (machine, run_id):
                found.append(Stored(path.relative_to(self.folder).as_posix(), record))
        return sorted(found, key=_attempt)

    def paths_of_run(self, machine: str, run_id: str) -> frozenset[str]:
        """The files that bear a run's id, relative to the results folder; none is read."""
        return frozenset(path.relative_to(self.folder).as_posix() for path in self._files_of_run(machine, run_id))

    def folder_of_machine(self, machine: str) -> Path:
        """Where a machine's records are, and what it can do (`machines.py`)."""
        return self.folder / _machine_folder(machine)

    def write(self, record: RunRecord, log: bytes = b"") -> Path:
        """Write a record, and give its file; see `keep`."""
        return self.folder / self.keep(record, log).path

    def keep(self, record: RunRecord, log: bytes = b"", *, split: bool = True) -> Stored:
        """Write a record under a name that nothing has yet, and what its process wrote beside it, as `….log`.

        Of a record that would be too large to be read again there remains that it failed, and why. Without `split` long raw
        answers stay inside it: whoever knows the record by its content finds it again.

        Returns:
            What is in the file.

        Raises:
            WriteError: it cannot be written.
        """
        folder = self._folder_of(record)
        if not is_within(folder, self.folder):
            raise WriteError(
                f"the record {record.id} cannot be written: {folder} is a link that leads out of the results folder."
            )
        try:
            record, files = apart(record) if split else (record, {})
            record = _readable(record)
            for name, content in files.items():
                write_aside(folder, content).replace(folder / name)  # named by its content, so that nothing is lost
            written = write_aside(folder, record.to_json())
            try:
                path = self._settle(written, folder, record.spec.file_stem)
            finally:
                written.unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"the record {record.id} cannot be written to {folder}: {error.strerror}.") from error
        if log:
            with suppress(OSError):  # the record is safe, and says the most important of it
                write_aside(folder, log).replace(path.with_suffix(".log"))
        return Stored(path.relative_to(self.folder).as_posix(), record)

    def items(self, record: RunRecord, score: ScoreRecord) -> Columns:
        """A score's raw answers as columns, from the record or from the file beside it.

        Raises:
            StoreError: the file is missing, or not the one the record was written with.
        """
        return read_items(self._folder_of(record), score)

    def masks(self, record: RunRecord) -> MaskFile | None:
        """The keep masks of a run; None where none were kept.

        Raises:
            StoreError: the file is missing, or not the one the record was written with.
        """
        return read_masks(self.folder / record.masks.file, record.masks.hash) if record.masks else None

    def _files_of_run(self, machine: str, run_id: str) -> Iterator[Path]:
        return self.folder.glob(f"{_machine_folder(machine)}/*/*-{slug(run_id)}*.json")

    def _folder_of(self, record: RunRecord) -> Path:
        return self.folder_of_machine(record.machine) / slug(record.spec.model.name)

    def _settle(self, written: Path, folder: Path, stem: str) -> Path:
        attempts = [_attempt_in(path.name) for path in folder.glob(f"{stem}*.json")]
        for attempt in count(max(attempts, default=0) + 1):  # never a gap: the numbers tell the order
            path = folder / (f"{stem}.json" if attempt == 1 else f"{stem}.{attempt}.json")
            try:
                os.link(written, path)  # unlike a rename, a link never replaces
            except FileExistsError:
                continue
            sync_folder(folder)
            return path
        raise AssertionError("numbers end nowhere")

    def _read(self, path: Path) -> RunRecord | None:
        try:
            return parse_record(read_file(path, self.folder, MAX_RECORD_BYTES))
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"its field {'.'.join(map(str, first['loc']))} does not fit: {first['msg']}"
        except (OSError, ValueError, RecursionError, PrunebenchError) as error:
            reason = str(error) or type(error).__name__
        self._warn(plain(f"skipped {path.relative_to(self.folder)}: {reason[:MOST_REASON].rstrip('.')}."))
        return None


def parse_record(content: bytes) -> RunRecord:
    """A record out of a file that anybody may have written, or cut short.

    Raises:
        ValueError: it is none, or is not whole; the message says what is wrong.
        RequestError: its target is none.
    """
    if len(content) > MAX_RECORD_BYTES:
        raise ValueError(f"it is larger than {MAX_RECORD_BYTES >> 20} MiB")
    if content.count(b"[") + content.count(b"{") > MOST_PARTS:
        raise ValueError(f"it has more than {MOST_PARTS:,} lists and objects")
    data = json.loads(content.decode(), parse_int=_whole)
    if not isinstance(data, dict) or "schema" not in data:
        raise ValueError("it is no record of prunebench")
    if not isinstance(data["schema"], int) or data["schema"] > SCHEMA:
        raise ValueError(f"its schema {data['schema']!r} is newer than {SCHEMA}; update prunebench to read it")
    if data.pop("checksum", None) != checksum(data):
        raise ValueError("its checksum does not match, so it was cut short or changed")
    record = RunRecord.model_validate(upgraded(data))
    if record.id != record.spec.id:
        raise ValueError("its id does not belong to its spec")
    parse_target(record.spec.target)
    return record


def _whole(digits: str) -> int:
    """A number that every calculation takes.

    Raises:
        ValueError: it has too many digits.
    """
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _readable(record: RunRecord) -> RunRecord:
    """The record; where nobody could read it again, one that says so."""
    try:
        parse_record(record.to_json().encode())
    except (ValueError, RecursionError, PrunebenchError) as error:
        problem = plain(str(error) or type(error).__name__)[:MOST_REASON]
        message = f"the record of this run cannot be kept: {problem}; look at its notes and at the parts of its scores."
        failure = Failure(kind="error", type="ValueError", message=message, step=None)
        changes = {"status": "failed", "reason": message, "failure": failure, "steps": [], "audit": None, "scores": {}}
        return record.model_copy(update=changes)
    return record


def _machine_folder(machine: str) -> str:
    """A machine's folder, which is none of those without records, whatever the machine is called."""
    name = slug(machine)
    return f"{name}.machine" if name in NO_MACHINES else name


def _run_of(stored: Stored) -> tuple[str, str]:
    return (stored.record.machine, stored.record.id)


def _attempt(stored: Stored) -> int:
    return _attempt_in(stored.path)


def _attempt_in(name: str) -> int:
    """The how-manieth of its run a record is, by its file's name."""
    found = re.search(r"\.(\d{1,9})\.json$", name)
    return int(found[1]) if found else 1


def _best(found: Iterable[Stored], key: Callable[[Stored], Hashable], order: Callable[[Stored], Any]) -> list[Stored]:
    """For each key the highest by order, the last of equals; a failed one only where all are."""
    chosen: dict[Hashable, Stored] = {}
    for stored in sorted(found, key=lambda stored: (stored.record.status != "failed", order(stored))):
        chosen[key(stored)] = stored
    return list(chosen.values())

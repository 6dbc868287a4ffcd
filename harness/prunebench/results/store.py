"""The results folder: `<machine>/<model>/<method>-<target>-<id>.json`.

Writing is aside, fsync, rename; nothing is ever overwritten: a run repeated with `--again`, or retried after a failure, is
written beside the earlier record (`….2.json`), and the latest counts. A truncated, foreign or newer file is skipped with a
warning that names it. Raw answers by the thousand are kept beside the record (`items.py`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from prunebench.errors import StoreError
from prunebench.results.files import write_aside
from prunebench.results.items import Columns, apart, read_items
from prunebench.results.records import SCHEMA, RunRecord, ScoreRecord, checksum, slug, upgraded

MAX_RECORD_BYTES = 64 << 20
"""A larger file is no record."""

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
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise StoreError(f"the results folder {self.folder} cannot be written: {error.strerror}.") from None

    def all(self) -> list[Stored]:
        """Every readable record, in the order of their paths."""
        found = []
        for path in sorted(self.folder.glob("*/*/*.json")):
            if path.is_relative_to(self.folder / "published"):
                continue
            record = self._read(path)
            if record is not None:
                found.append(Stored(path.relative_to(self.folder).as_posix(), record))
        return found

    def latest(self) -> list[Stored]:
        """For each machine and id the latest record; an `ok` or refused one is not undone by a later failure."""
        chosen: dict[tuple[str, str], Stored] = {}
        for stored in self.all():
            key = (stored.record.machine, stored.record.id)
            if key not in chosen or _weight(stored) >= _weight(chosen[key]):
                chosen[key] = stored
        return sorted(chosen.values(), key=lambda stored: stored.path)

    def settled(self, machine: str) -> dict[str, RunRecord]:
        """Runs of a machine that need not be repeated, by id: those that are `ok`, and refusals, which are answers too."""
        return {s.record.id: s.record for s in self.latest() if s.record.machine == machine and s.record.status != "failed"}

    def is_settled(self, machine: str, run_id: str) -> bool:
        """Whether one run need not be repeated; reads only the files that bear its id."""
        paths = self.folder.glob(f"{slug(machine)}/*/*-{slug(run_id)}*.json")
        records = [self._read(path) for path in paths]
        return any(r is not None and r.machine == machine and r.id == run_id and r.status != "failed" for r in records)

    def write(self, record: RunRecord, log: bytes = b"") -> Path:
        """Write a record under a name that nothing has yet, and what its process wrote beside it, as `….log`.

        Raises:
            StoreError: it cannot be written.
        """
        folder = self._folder_of(record)
        try:
            record, files = apart(record)
            for name, content in files.items():
                write_aside(folder, content).replace(folder / name)  # named by its content, so that nothing is lost
            written = write_aside(folder, record.to_json())
            try:
                path = self._settle(written, folder, record.spec.file_stem)
            finally:
                written.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"the record {record.id} cannot be written to {folder}: {error.strerror}.") from error
        if log:
            with suppress(OSError):  # the record is safe, and says the most important of it
                write_aside(folder, log).replace(path.with_suffix(".log"))
        return path

    def items(self, record: RunRecord, score: ScoreRecord) -> Columns:
        """A score's raw answers as columns, from the record or from the file beside it.

        Raises:
            StoreError: the file is missing, or not the one the record was written with.
        """
        return read_items(self._folder_of(record), score)

    def _folder_of(self, record: RunRecord) -> Path:
        return self.folder / slug(record.machine) / slug(record.spec.model.name)

    def _settle(self, written: Path, folder: Path, stem: str) -> Path:
        for attempt in range(1, 10_000):
            path = folder / (f"{stem}.json" if attempt == 1 else f"{stem}.{attempt}.json")
            try:
                os.link(written, path)  # unlike a rename, a link never replaces
            except FileExistsError:
                continue
            _sync_folder(folder)
            return path
        raise StoreError(f"there are too many records of {stem} in {folder}.")

    def _read(self, path: Path) -> RunRecord | None:
        name = path.relative_to(self.folder)
        try:
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise ValueError(f"it is larger than {MAX_RECORD_BYTES >> 20} MiB")
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or "schema" not in data:
                raise ValueError("it is no record of prunebench")
            if not isinstance(data["schema"], int) or data["schema"] > SCHEMA:
                raise ValueError(f"its schema {data['schema']!r} is newer than {SCHEMA}; update prunebench to read it")
            if data.pop("checksum", None) != checksum(data):
                raise ValueError("its checksum does not match, so it was cut short or changed")
            record = RunRecord.model_validate(upgraded(data))
            if record.id != record.spec.id:
                raise ValueError("its id does not belong to its spec")
            return record
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"its field {'.'.join(map(str, first['loc']))} does not fit: {first['msg']}"
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error) or type(error).__name__
        self._warn(f"skipped {name}: {reason}.")
        return None


def _weight(stored: Stored) -> tuple[bool, str, int]:
    record = stored.record
    attempt = re.search(r"\.(\d+)\.json$", stored.path)
    return (record.status != "failed", record.provenance.started, int(attempt[1]) if attempt else 1)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Taking records that were examined into a results folder: nothing there is overwritten, and a verdict says what was found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from prunebench.errors import RequestError, WriteError
from prunebench.results.bundle import names_beside
from prunebench.results.files import is_within, opened, sync_folder, write_aside
from prunebench.results.findings import Entry
from prunebench.results.inspection import Examination
from prunebench.results.store import ResultStore, Stored
from prunebench.results.tensor_files import MAX_FILE_BYTES
from prunebench.results.verdicts import GRADES, Verdict, Verdicts, content_checksum, write_verdict

CHUNK_BYTES = 1 << 20


def accept(examined: Examination, store: ResultStore, seed: int | None, version: str) -> list[Stored]:
    """Copy the examined records with all that belongs to them, unless they are there, and keep the verdicts.

    Args:
        examined: nothing in it is wrong.
        store: the results folder that gets them.
        seed: by which a replay drew.
        version: of prunebench, which found it.

    Returns:
        The records that were not there before, as they are there now.

    Raises:
        WriteError: another file of the same name is there, or something cannot be written.
    """
    added = []
    for entry in examined.entries:
        if not is_there(store, entry):
            for name in names_beside(entry.path, entry.record):
                _copy(entry.store.folder, store.folder, name)
            added.append(store.keep(entry.record, split=False))
    keep_verdicts(examined, store.folder, seed, version)
    return added


def check_place(folder: Path) -> None:
    """Find out before any work whether records can be taken into a folder; it is not made yet.

    Raises:
        RequestError: they cannot.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise RequestError(f"records cannot be taken into {folder}: {there} is no folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"records cannot be taken into {folder}: {there} cannot be written.")


def is_there(store: ResultStore, entry: Entry) -> bool:
    """Whether a results folder has this very record."""
    mine = content_checksum(entry.record)
    return any(content_checksum(s.record) == mine for s in store.of_run(entry.record.machine, entry.record.id))


def keep_verdicts(examined: Examination, folder: Path, seed: int | None, version: str) -> int:
    """Write what was found of each record; how many verdicts are new.

    What was replayed before stays so when it is only checked now; what is found wrong does not.
    """
    known, written = Verdicts.of(folder), 0
    for entry in examined.entries:
        verdict = verdict_of(examined, entry, seed, version)
        earlier = known.find(entry.record)
        kept = earlier is not None and verdict.grade != "reported" and _higher(earlier, verdict)
        if not kept and (earlier is not None or verdict.grade != "reported"):
            write_verdict(folder, verdict)
            written += 1
    return written


def verdict_of(examined: Examination, entry: Entry, seed: int | None, version: str) -> Verdict:
    """What was found of one record."""
    grade = examined.grade(entry)
    return Verdict(
        checksum=content_checksum(entry.record),
        id=entry.record.id,
        machine=entry.record.machine,
        grade=grade,
        looked_at=[*_checks(examined, entry), *([examined.replayed[entry.path]] if entry.path in examined.replayed else [])],
        left_out=examined.unseen.get(entry.path, []),
        seed=seed if entry.path in examined.replayed else None,
        version=version,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _checks(examined: Examination, entry: Entry) -> Sequence[str]:
    """Names of the checks that looked at a record."""
    return [name for name in examined.looked if not name.startswith("replayed") and (name != "masks" or entry.record.masks)]


def _higher(earlier: Verdict, now: Verdict) -> bool:
    """Whether the earlier verdict trusts as much or more."""
    return GRADES.index(earlier.grade) >= GRADES.index(now.grade)


def _copy(source: Path, target: Path, name: str) -> None:
    """Copy a file into a results folder, where it is named by its content.

    Raises:
        WriteError: another file has its name, or it cannot be written.
    """
    path = target / name
    if not is_within(path, target):
        raise WriteError(f"{name} cannot be written: it would be outside the results folder.")
    try:
        if path.exists():
            if _hash(path, target) != _hash(source / name, source):
                raise WriteError(f"{name} is there already with another content; nothing was overwritten.")
            return
        with opened(source / name, source, MAX_FILE_BYTES) as file:
            written = write_aside(path.parent, iter(lambda: file.read(CHUNK_BYTES), b""))
        try:
            os.link(written, path)  # unlike a rename, a link never replaces
        finally:
            written.unlink(missing_ok=True)
        sync_folder(path.parent)
    except (OSError, ValueError) as error:
        raise WriteError(f"{name} cannot be written: {_reason(error)}.") from None


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)


def _hash(path: Path, within: Path) -> str:
    with opened(path, within, MAX_FILE_BYTES) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

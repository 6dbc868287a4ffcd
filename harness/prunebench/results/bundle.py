"""Bundles: records with their raw answers and masks in one file, for handing in.

A bundle is a zip archive laid out as a results folder, with `manifest.json`, which has the SHA-256 and the size of every other
file. Equal records give equal bytes: names are sorted, dates fixed. Whoever unpacks one did not write it: see `unpacking.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from prunebench.errors import StoreError, WriteError
from prunebench.results.files import opened
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore, Stored
from prunebench.results.tensor_files import MAX_FILE_BYTES

FORMAT = "prunebench-bundle-1"
MANIFEST = "manifest.json"
DATE = (1980, 1, 1, 0, 0, 0)
"""The first that the format knows."""

CHUNK_BYTES = 1 << 20


@dataclass
class Contents:
    """What is in a bundle, and what is not."""

    records: list[str] = field(default_factory=list)
    """Their files."""
    answers: int = 0
    """Files of raw answers; few answers are in the records themselves."""
    masks: int = 0
    """Files of masks and of kept weights."""
    bytes: int = 0
    """Unpacked."""
    missing: list[str] = field(default_factory=list)
    """What records in the bundle lack, a sentence each."""
    left_out: list[str] = field(default_factory=list)
    """Records that were asked for and are not in the bundle, a sentence each."""


def write_bundle(store: ResultStore, chosen: Iterable[Stored], out: Path, outdated: Sequence[str] = ()) -> Contents:
    """Write a bundle of records, each with all that belongs to it.

    Args:
        store: where they are.
        chosen: records, the latest of their runs.
        out: the file; it is there only when it is whole.
        outdated: ids of records of other revisions than the present; they are left out.

    Raises:
        StoreError: there is nothing to put in, or the file cannot be written there.
        WriteError: it cannot be written to the end.
    """
    contents, files = Contents(), dict[str, Path]()
    for stored in sorted(chosen, key=lambda stored: stored.path):
        if stored.record.id in outdated:
            contents.left_out.append(f"{stored.path} was measured with another revision of its method or an evaluation.")
            continue
        try:
            own = belonging(store, stored)
        except StoreError as error:
            contents.left_out.append(f"{stored.path} is not whole: {error}")
            continue
        files |= own
        contents.records.append(stored.path)
        if stored.record.status == "ok" and stored.record.spec.target != "dense" and stored.record.masks is None:
            contents.missing.append(f"{stored.path} has no masks: its zeros cannot be counted again, nor its answers replayed.")
    if not contents.records:
        raise StoreError(" ".join(["there is no record to put into a bundle.", *contents.left_out[:1]]))
    contents.answers = sum(name.endswith(".parquet") for name in files)
    contents.masks = sum(name.endswith(".safetensors") for name in files)
    contents.bytes = sum(path.stat().st_size for path in files.values())
    _write(out, files, store.folder)
    return contents


def belonging(store: ResultStore, stored: Stored) -> dict[str, Path]:
    """A record's files by their names in a bundle: its own, its raw answers', its masks'.

    Raises:
        StoreError: one is missing, or another than the record was written with.
    """
    files = {stored.path: store.folder / stored.path}
    store.masks(stored.record)
    for score in stored.record.scores.values():
        store.items(stored.record, score)
    for name in names_beside(stored.path, stored.record):
        files[name] = store.folder / name
        if not files[name].is_file():
            raise StoreError(f"{name} is missing.")
    return files


def names_beside(path: str, record: RunRecord) -> list[str]:
    """Names of the files that a record names, relative to the results folder."""
    folder = PurePosixPath(path).parent
    found = [(folder / PurePosixPath(score.items_file).name).as_posix() for score in record.scores.values() if score.items_file]
    if record.masks is not None:
        found += [name for name in (record.masks.file, record.masks.weights_file) if name]
    return found


def manifest_of(files: Mapping[str, tuple[str, int]]) -> bytes:
    """The manifest, of hashes and sizes by name."""
    listed = {name: {"sha256": digest, "bytes": size} for name, (digest, size) in sorted(files.items())}
    return (json.dumps({"format": FORMAT, "files": listed}, indent=1, ensure_ascii=False) + "\n").encode()


def _write(out: Path, files: Mapping[str, Path], within: Path) -> None:
    if out.is_dir():
        raise StoreError(f"the bundle {out} is a folder; name a file.")
    if os.path.lexists(out) and not _is_bundle(out):
        raise StoreError(f"{out} is there already and is no bundle, so it is not replaced; name another file.")
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix="bundle", suffix=".tmp", delete=False) as aside:
            path = Path(aside.name)
    except OSError as error:
        raise StoreError(f"the bundle {out} cannot be written: {error.strerror}.") from None
    try:
        listed = {}
        with zipfile.ZipFile(path, "w") as archive:
            for name in sorted(files):
                listed[name] = _add(archive, name, files[name], within)
            archive.writestr(_info(MANIFEST), manifest_of(listed))
        path.chmod(0o644)
        path.replace(out)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise WriteError(f"the bundle {out} cannot be written: {reason}.") from None
    finally:
        path.unlink(missing_ok=True)


def _is_bundle(path: Path) -> bool:
    """Whether a file is a bundle, as far as its manifest's first line says."""
    if not path.is_file():  # to open a pipe might never end
        return False
    try:
        with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as manifest:
            return FORMAT.encode() in manifest.read(2 * len(FORMAT) + 16)
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def _add(archive: zipfile.ZipFile, name: str, path: Path, within: Path) -> tuple[str, int]:
    """Copy a file into the archive; its hash and its size."""
    digest, size = hashlib.sha256(), 0
    with opened(path, within, MAX_FILE_BYTES) as source, archive.open(_info(name), "w", force_zip64=True) as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            size += target.write(chunk)
    return digest.hexdigest(), size


def _info(name: str) -> zipfile.ZipInfo:
    """An entry that says nothing of when and by whom it was written."""
    info = zipfile.ZipInfo(name, DATE)
    info.compress_type = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
    info.create_system = 3
    info.external_attr = 0o100644 << 16
    return info

"""Unpacking a bundle that a stranger wrote: what its archive and its manifest claim is checked before anything is believed.

Nothing is unpacked unless every entry is a plain file with a name that a results folder could have, and all of them together
have a size that they may have. What an entry holds beyond the size it claims is not read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prunebench.errors import StoreError
from prunebench.plain import plain
from prunebench.results.bundle import CHUNK_BYTES, FORMAT, MANIFEST
from prunebench.results.findings import Finding
from prunebench.results.store import NO_MACHINES

MOST_FILES = 20_000
MOST_BYTES = 64 << 30
"""Unpacked: the masks of seventy models of seven billion weights."""

MOST_RATIO = 200
"""Unpacked over packed, of what is larger than `SMALL`: records pack to a tenth."""

SMALL = 1 << 20
MOST_MANIFEST_BYTES = 32 << 20

_NAME = re.compile(
    r"(?:(?P<machine>[a-z0-9][a-z0-9.+-]*)/[a-z0-9][a-z0-9.+-]*/[a-z0-9][a-z0-9.+-]*\.(?:json|parquet)"
    r"|masks/[0-9a-f]{64}\.safetensors|manifest\.json)"
)
"""What a results folder may hold of a run; parts begin with a letter or digit, so that none leads upwards or is hidden."""

MOST_NAME = 400


def unpack(bundle: Path, folder: Path) -> list[Finding]:
    """Unpack a bundle into an empty, private folder, if it is sound.

    Returns:
        What is wrong with it. Findings of the check `archive` mean that nothing was unpacked.

    Raises:
        StoreError: it is no bundle, or there is no room for it.
    """
    try:
        with zipfile.ZipFile(bundle) as archive:
            infos = archive.infolist()
            found = list(_unsafe(infos))
            if found:
                return found
            total = sum(info.file_size for info in infos)
            if total > shutil.disk_usage(folder).free:
                raise StoreError(f"the bundle {bundle} holds {total:,} bytes, for which there is no room in {folder}.")
            try:
                hashes = {info.filename: _extract(archive, info, folder) for info in infos}
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                return [Finding("archive", plain(bundle.name), "content", f"cannot be unpacked: {plain(str(error))}")]
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise StoreError(plain(f"the bundle {bundle} cannot be read: {reason.rstrip('.')}.")) from None
    return list(_against_manifest(folder, hashes))


def _unsafe(infos: list[zipfile.ZipInfo]) -> Iterator[Finding]:
    """Entries that must not be unpacked."""
    if len(infos) > MOST_FILES:
        yield Finding("archive", "archive", "entries", f"are {len(infos)}, more than {MOST_FILES}")
        return
    total = sum(info.file_size for info in infos)
    if total > MOST_BYTES:
        yield Finding("archive", "archive", "size", f"is {total:,} bytes unpacked, more than {MOST_BYTES:,}")
    seen: set[str] = set()
    for info in infos:
        problem = _problem(info)
        if info.filename.casefold() in seen:
            problem = "is there twice"
        seen.add(info.filename.casefold())
        if problem:
            yield Finding("archive", "archive", plain(info.filename[:MOST_NAME]), problem)


def _problem(info: zipfile.ZipInfo) -> str | None:
    """Why an entry must not be unpacked."""
    named = _NAME.fullmatch(info.filename) if len(info.filename) <= MOST_NAME else None
    if named is None or named["machine"] in NO_MACHINES or info.filename != info.orig_filename:
        return "is no name that a file of a bundle may have"
    if any(len(part) > 255 for part in info.filename.split("/")):
        return "is too long a name"
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        return "is a link, or another thing that is no plain file"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is encrypted, or packed in a way that bundles are not"
    if info.file_size > SMALL and info.file_size > MOST_RATIO * max(1, info.compress_size):
        return f"unpacks to {info.file_size:,} bytes out of {info.compress_size:,}, as no record does"
    return None


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, folder: Path) -> tuple[str, int]:
    """Unpack an entry as a plain file, no further than the size it claims; its hash and its size.

    Raises:
        BadZipFile: it holds another number of bytes, or others than it claims.
    """
    path, digest, size = folder / info.filename, hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(info) as source, path.open("xb") as target:
        while chunk := source.read(min(CHUNK_BYTES, info.file_size - size + 1)):
            size += len(chunk)
            if size > info.file_size:
                raise zipfile.BadZipFile(f"{info.filename} holds more than it claims")
            digest.update(chunk)
            target.write(chunk)
    if size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} holds less than it claims")
    return digest.hexdigest(), size


def _against_manifest(folder: Path, hashes: Mapping[str, tuple[str, int]]) -> Iterator[Finding]:
    """Nothing missing, nothing extra, and every file the one that was packed."""
    listed = _listed(folder)
    if isinstance(listed, str):
        yield Finding("manifest", MANIFEST, "files", listed)
        return
    there = {name: hashed for name, hashed in hashes.items() if name != MANIFEST}
    for name in sorted(listed.keys() - there.keys()):
        yield Finding("manifest", MANIFEST, plain(f"files.{name}"[:MOST_NAME]), "is listed, and is not in the bundle")
    for name in sorted(there.keys() - listed.keys()):
        yield Finding("manifest", name, "file", "is in the bundle, and the manifest does not list it")
    for name in sorted(there.keys() & listed.keys()):
        said, (digest, size) = listed[name], there[name]
        if said.get("sha256") != digest or said.get("bytes") != size:
            yield Finding(
                "manifest", name, "sha256", f"is {digest[:16]}…, and the manifest says {str(said.get('sha256'))[:16]}…"
            )


def _listed(folder: Path) -> dict[str, dict[str, Any]] | str:
    """The files of the manifest; or what is wrong with it."""
    path = folder / MANIFEST
    if not path.is_file():
        return "cannot be known: there is no manifest"
    if path.stat().st_size > MOST_MANIFEST_BYTES:
        return "cannot be known: the manifest is too large to be one"
    try:
        said = json.loads(path.read_bytes())
        if said["format"] != FORMAT:
            return f"cannot be known: the manifest's format is {plain(str(said['format'])[:40])!r}, not {FORMAT!r}"
        listed = said["files"]
        if not isinstance(listed, dict) or not all(isinstance(value, dict) for value in listed.values()):
            return "are not listed as a manifest lists them"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "cannot be known: the manifest cannot be read"
    return listed

"""Files that can always be made again, kept by content: hashes of large files, token arrays.

The folder is `$PRUNEBENCH_CACHE`, or the user's cache folder. Writing is atomic, reading never trusts a half-written file, and
a cache that cannot be written is merely slower.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import platformdirs

Arrays = dict[str, np.ndarray[Any, Any]]


def cache_folder() -> Path:
    """Where cached files live."""
    return Path(os.environ.get("PRUNEBENCH_CACHE") or platformdirs.user_cache_dir("prunebench"))


def digest(parts: Iterable[bytes | str]) -> str:
    """Sixteen hex digits of the SHA-256 of parts, each prefixed by its length so that they cannot run together."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:16]


def digest_array(array: np.ndarray[Any, Any]) -> str:
    """The digest of an integer array: its shape and its values as int64."""
    whole = np.ascontiguousarray(array, dtype=np.int64)
    return digest([json.dumps(whole.shape), whole.tobytes()])


def digest_file(path: Path) -> str:
    """The digest of a file's bytes; remembered by path, size and times (of change too: a copy may keep the other one)."""
    stat = path.stat()
    key = digest([str(path.resolve()), *map(str, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))])
    note = cache_folder() / "hashes" / key
    try:
        remembered = note.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{16}", remembered):
            return remembered
    except (OSError, UnicodeDecodeError):
        pass  # not remembered yet, or no longer readable
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    found = state.hexdigest()[:16]
    write_file(note, lambda file: file.write(found.encode("ascii")))
    return found


def load_arrays(kind: str, key: str) -> Arrays | None:
    """Arrays kept under a key, or None."""
    path = cache_folder() / kind / f"{key}.npz"
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # noqa: BLE001 - absent, cut short or changed, of which zipfile alone raises five kinds: made again
        return None


def save_arrays(kind: str, key: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Keep arrays under a key."""
    # Straight into the file, array by array: they may be as large as a model.
    write_file(cache_folder() / kind / f"{key}.npz", lambda file: np.savez(file, **dict(arrays)))  # type: ignore[arg-type]


def load_json(kind: str, key: str) -> Any:
    """What was kept under a key, or None."""
    try:
        return json.loads((cache_folder() / kind / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def save_json(kind: str, key: str, data: Any) -> None:
    """Keep data under a key."""
    write_file(cache_folder() / kind / f"{key}.json", lambda file: file.write(json.dumps(data, allow_nan=False).encode()))


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """A file that is there whole or not at all; where nothing can be written there is none.

    Args:
        path: in the cache folder.
        fill: writes what it holds.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            aside = Path(file.name)
            fill(file)
        aside.replace(path)
    except OSError:  # a read-only or full disk: the work is done again next time
        if aside is not None:
            aside.unlink(missing_ok=True)

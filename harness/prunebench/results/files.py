"""Writing files that are never half there, and reading files that anybody may have put there."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from prunebench.errors import StoreError


def read_file(path: Path, within: Path, most: int) -> bytes:
    """The content of a file; see `opened` for arguments and errors."""
    with opened(path, within, most) as file:
        return file.read(most)


@contextmanager
def opened(path: Path, within: Path, most: int) -> Iterator[BufferedReader]:
    """A file to read, if it is a file: neither a pipe, which might never end, nor outside its folder, nor too large.

    Args:
        path: the file; links are followed as far as they stay inside.
        within: the folder that links may not lead out of.
        most: bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else; the message says what.
    """
    if not is_within(path, within):
        raise ValueError(f"it is a link that leads out of {within}")
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which opens a pipe without a writer too
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no file")
        if status.st_size > most:
            raise ValueError(f"it is larger than {most >> 20} MiB")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def is_within(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, is inside a folder. What is not there yet counts where it would be."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, make it durable, and move it into place.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        write_aside(path.parent, text).replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from None


def write_aside(folder: Path, content: str | bytes | Iterable[bytes], *, prefix: str = "tmp", durable: bool = True) -> Path:
    """Write a file under a passing name in `folder`, to be moved or linked into place; made if it is not there.

    Until it is whole only its owner may read it, and nobody can guess its name.

    Args:
        folder: where it will stay.
        content: all of it, or its parts one after the other.
        prefix: how its name begins, by which whoever left it is known.
        durable: wait until it is on the disk; for what is soon written anew that is too long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=prefix, suffix=".tmp", delete=False) as file:
        path = Path(file.name)
        try:
            content = content.encode() if isinstance(content, str) else content
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            path.chmod(0o644)
        except BaseException:  # an interruption too
            path.unlink(missing_ok=True)
            raise
    return path


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: what was moved or linked into it stays there when the machine dies."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

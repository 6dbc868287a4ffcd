"""Writing files that are never half there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from prunebench.errors import StoreError


def write_text(path: Path, text: str) -> None:
    """Write a text file aside, make it durable, and move it into place.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        write_aside(path.parent, text).replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from None


def write_aside(folder: Path, content: str | bytes) -> Path:
    """Write a durable file under a passing name in `folder`, to be moved or linked into place; made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=folder, suffix=".tmp", delete=False) as file:
        path = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            path.chmod(0o644)
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return path

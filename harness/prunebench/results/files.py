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
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}.") from None

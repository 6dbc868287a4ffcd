"""Files of a run's checkpoint: durable, checked by content, never half there; the manifest comes last and names the others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prunebench.results.files import sync_folder, write_aside
from prunebench.spec import JsonDict

MANIFEST = "manifest.json"
MOST_MANIFEST_BYTES = 1 << 28

Sums = dict[str, tuple[int, str]]
"""Size and SHA-256 by file name."""


class CheckpointFolder:
    """A folder of tensors in safetensors files and one manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sums: Sums = {}

    def read(self) -> JsonDict | None:
        """What the manifest says; None where there is none.

        Raises:
            ValueError: it cannot be read, or a file is not as it was written; says which.
        """
        path = self._folder / MANIFEST
        try:
            if path.stat().st_size > MOST_MANIFEST_BYTES:
                raise ValueError("its manifest is too large to be one")
            data = json.loads(path.read_text(encoding="utf-8"))
            sums = {str(name): (int(size), str(digest)) for name, (size, digest) in data["files"].items()}
            said: JsonDict = data["said"]
            if data["sum"] != _digest_json(said):
                raise ValueError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("its manifest cannot be read") from None
        for name, (size, digest) in sums.items():
            if not self._is_whole(name, size, digest):
                raise ValueError(f"its file {name} is not as it was written")
        self._sums = sums
        return said

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """The tensors of some files, read when they are asked for."""
        return _Tensors([self._folder / name for name in names])

    def store(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write tensors; nothing points to them before the next manifest.

        Raises:
            OSError: they cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside, path = self._folder / f"{name}.tmp", self._folder / name
        try:
            save_file(_apart(tensors), aside)
        except SafetensorError as error:  # what the system said is inside
            raise OSError(str(error)) from error
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        self._sums[name] = (aside.stat().st_size, _digest_file(aside))
        aside.replace(path)

    def commit(self, said: JsonDict, files: Sequence[str]) -> None:
        """Write the manifest, which names these files, and then remove all others.

        Raises:
            OSError: it cannot be written; the one before it stands.
        """
        sums = {name: self._sums[name] for name in files}
        said = json.loads(json.dumps(said))  # as it will be read
        text = json.dumps({"files": sums, "said": said, "sum": _digest_json(said)})
        sync_folder(self._folder)
        write_aside(self._folder, text).replace(self._folder / MANIFEST)
        sync_folder(self._folder)
        self._sums = sums
        self._remove(keep={MANIFEST, *files})

    def clear(self) -> None:
        """Remove all of it, the manifest first."""
        (self._folder / MANIFEST).unlink(missing_ok=True)
        self._sums = {}
        if self._folder.is_dir():
            self._remove(keep=set())
            with suppress(OSError):  # somebody has put something into it
                self._folder.rmdir()

    def _remove(self, keep: set[str]) -> None:
        for path in self._folder.iterdir():
            if path.name not in keep and path.suffix in (".safetensors", ".tmp", ".json"):
                path.unlink(missing_ok=True)

    def _is_whole(self, name: str, size: int, digest: str) -> bool:
        path = self._folder / name
        try:
            return path.parent == self._folder and path.stat().st_size == size and _digest_file(path) == digest
        except OSError:
            return False


class _Tensors(Mapping[str, torch.Tensor]):
    """Tensors of several files by name; each is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            file: Any = safe_open(str(path), framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the host, as the format takes them: contiguous, no two in one storage; copied only where it must be."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        found[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return found


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_json(data: JsonDict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

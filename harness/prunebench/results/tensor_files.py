"""Files of named tensors in the safetensors format, written and read without torch.

Eight bytes with the length of a header, the header as JSON (each tensor's dtype, shape and place, texts under
`__metadata__`), then the tensors one after the other. See https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError, WriteError
from prunebench.plain import plain
from prunebench.results.files import opened, sync_folder, write_aside

MAX_FILE_BYTES = 1 << 40
"""A larger file is none of ours: the weights of the largest open models are as large."""

MAX_HEADER_BYTES = 16 << 20
"""A header of 100,000 matrices is about as long."""

MOST_TENSORS = 100_000

MOST_SIDES = 8
"""Of a tensor; more numbers take long to multiply."""

BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Bytes of an entry, by the format's names of dtypes; others are in none of our files."""


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    dtype: str
    """As in `BYTES`."""
    shape: tuple[int, ...]
    content: Callable[[], bytes]
    """Its entries in C order, little-endian; asked for when it is written."""


@dataclass(frozen=True)
class Found:
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]
    content: NDArray[np.uint8]
    """Its bytes, as they are on the disk: nothing is read before it is looked at."""


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str = "tmp"
) -> tuple[Path, str]:
    """Write a file that is named by its content, `<SHA-256>.safetensors`; a second one of the same content is the same file.

    It is written aside, private until it is whole, made durable and moved into place.

    Args:
        folder: where it is to be; made if it is not there.
        tensors: by name, in the order in which they are written.
        metadata: texts for the header.
        prefix: how the passing name begins, by which is known whose it was when it is left behind by a kill.

    Returns:
        The file, and its hash.

    Raises:
        WriteError: it cannot be written.
    """
    digest = hashlib.sha256()
    try:
        aside = write_aside(folder, _hashed(tensor_parts(tensors, metadata), digest.update), prefix=prefix)
        try:
            path = folder / f"{digest.hexdigest()}.safetensors"
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync_folder(folder)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror or error}.") from None
    return path, digest.hexdigest()


def tensor_parts(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The parts of a file, one after the other: its header, then each tensor.

    Raises:
        ValueError: a tensor's content is not as long as its shape says.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    place = 0
    for name, tensor in tensors.items():
        end = place + prod(tensor.shape) * BYTES[tensor.dtype]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight
    yield len(text).to_bytes(8, "little") + text
    for name, tensor in tensors.items():
        content = tensor.content()
        if len(content) != prod(tensor.shape) * BYTES[tensor.dtype]:
            raise ValueError(f"{name} has {len(content)} bytes, which are not those of {list(tensor.shape)}")
        yield content


def read_tensors(path: Path, digest: str | None, what: str) -> tuple[dict[str, Found], dict[str, str]]:
    """The tensors of a file, which stay on the disk, and its metadata.

    Args:
        path: the file; it must be in the folder it seems to be in.
        digest: SHA-256 that it must have; None takes it as it is.
        what: what the file is called in messages.

    Raises:
        StoreError: it is missing, was cut short or changed, or is another kind of file.
    """
    try:
        with opened(path, path.parent, MAX_FILE_BYTES) as file:
            if digest is not None and hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError("it was cut short or changed after its record was written")
            content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        return _parsed(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise StoreError(plain(f"{what} {path.name} cannot be read: {reason[:300].rstrip('.')}.")) from None


def _hashed(parts: Iterable[bytes], update: Callable[[bytes], None]) -> Iterator[bytes]:
    for part in parts:
        update(part)
        yield part


def _parsed(content: NDArray[np.uint8]) -> tuple[dict[str, Found], dict[str, str]]:
    """The tensors and the metadata.

    Raises:
        ValueError: the header is none, or says what the file does not hold.
    """
    length = int.from_bytes(content[:8].tobytes(), "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, len(content) - 8):
        raise ValueError("it has no header, so it was cut short or is another kind of file")
    header = json.loads(content[8 : 8 + length].tobytes())
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ValueError("its header is none")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts")
    body, place, found = content[8 + length :], 0, {}
    for name, (dtype, shape, begin, end) in sorted(_claims(header), key=lambda claim: claim[1][2:]):
        if begin != place or end - begin != prod(shape) * BYTES[dtype] or end > len(body):
            raise ValueError(f"its header does not fit its content at {name[:100]}")
        found[name] = Found(dtype, shape, body[begin:end])
        place = end
    if place != len(body):
        raise ValueError(f"it holds {len(body) - place} bytes beside its tensors")
    return found, metadata


def _claims(header: Mapping[str, object]) -> Sequence[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """What a header says of each tensor: dtype, shape, begin and end.

    Raises:
        ValueError: it says it in another way.
    """
    claims = []
    for name, claim in header.items():
        if not isinstance(claim, dict) or set(claim) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"its header does not say what {name[:100]} is")
        dtype, shape, offsets = claim["dtype"], claim["shape"], claim["data_offsets"]
        if not (isinstance(dtype, str) and dtype in BYTES and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise ValueError(f"its header does not say what {name[:100]} is")
        claims.append((name, (dtype, tuple(shape), offsets[0], offsets[1])))
    return claims


def _are_sizes(numbers: object) -> bool:
    """Whether these are a few whole numbers such as a file can have."""
    if not isinstance(numbers, list) or len(numbers) > MOST_SIDES:
        return False
    return all(type(number) is int and 0 <= number <= MAX_FILE_BYTES for number in numbers)

"""Keep masks as files: a bit for each weight, a sixteenth of 16-bit weights, with a manifest that says whose they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunebench.errors import StoreError
from prunebench.plain import plain
from prunebench.results.tensor_files import Found, Tensor, read_tensors

MASK_FORMAT = "prunebench-mask-1"

CHUNK = 1 << 20
"""Words of eight bytes whose bits are counted at a time."""


@dataclass(frozen=True)
class MaskFile:
    """Keep masks on the disk; each is read when it is asked for."""

    shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of each matrix, by its name."""
    manifest: Mapping[str, str]
    """Of whom the masks are: `weights` (hash of the model they belong to), `target`, `method`, `recipe`, `seed`, `prunebench`
    (its version); empty in files of before schema 4."""
    _packed: Mapping[str, NDArray[np.uint8]]

    def packed(self, name: str) -> NDArray[np.uint8]:
        """A matrix's mask as bytes in C order, the first entry in the highest bit; 1 survives."""
        return self._packed[name]

    def keep(self, name: str) -> NDArray[np.bool_]:
        """A matrix's keep mask [outputs, inputs]."""
        rows, columns = self.shapes[name]
        return np.unpackbits(self._packed[name], count=rows * columns).reshape(rows, columns).astype(np.bool_)

    def removed(self, name: str) -> int:
        """Entries of a matrix that the mask removes."""
        rows, columns = self.shapes[name]
        return rows * columns - count_bits(self._packed[name])


def read_masks(path: Path, digest: str | None = None) -> MaskFile:
    """The keep masks of a file.

    Args:
        path: the file.
        digest: SHA-256 that it must have; None takes it as it is.

    Raises:
        StoreError: it is missing, was cut short or changed, or holds no masks.
    """
    found, metadata = read_tensors(path, digest, "the mask file")
    try:
        shapes = _shapes(found, metadata)
    except (ValueError, RecursionError) as error:
        raise StoreError(plain(f"the mask file {path.name} cannot be read: {error}.")) from None
    manifest = {key: value for key, value in metadata.items() if key not in ("format", "shapes")}
    return MaskFile(shapes, manifest, {name: found[name].content for name in shapes})


def mask_tensors(packed: Mapping[str, NDArray[np.uint8]]) -> dict[str, Tensor]:
    """Bit-packed masks as `tensor_files` writes them."""
    return {name: Tensor("U8", bits.shape, bits.tobytes) for name, bits in packed.items()}


def mask_metadata(shapes: Mapping[str, tuple[int, int]], manifest: Mapping[str, str]) -> dict[str, str]:
    """What stands in a mask file's header."""
    return {**manifest, "format": MASK_FORMAT, "shapes": json.dumps(dict(shapes))}


def mask_bytes(shape: tuple[int, int]) -> int:
    """Bytes of a matrix's bit-packed mask."""
    return -(-shape[0] * shape[1] // 8)


def count_bits(packed: NDArray[np.uint8], other: NDArray[np.uint8] | None = None) -> int:
    """Bits that are set: in `packed`, or both there and in `other`, which is as long."""
    whole = len(packed) // 8 * 8
    words = [bits[:whole].view(np.uint64) for bits in (packed, other) if bits is not None]
    rests = [bits[whole:] for bits in (packed, other) if bits is not None]
    total = int(np.bitwise_count(np.bitwise_and.reduce(rests)).sum())
    for start in range(0, whole // 8, CHUNK):
        parts = [array[start : start + CHUNK] for array in words]
        both = parts[0] if len(parts) == 1 else parts[0] & parts[1]
        total += int(np.bitwise_count(both).sum(dtype=np.int64))
    return total


def _shapes(found: Mapping[str, Found], metadata: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """The shapes of the matrices, in the file's order.

    Raises:
        ValueError: the file holds no masks, or others than it says.
    """
    if metadata.get("format") != MASK_FORMAT:
        raise ValueError(f"it is not in the format {MASK_FORMAT}")
    shapes = json.loads(metadata.get("shapes", ""))
    if not isinstance(shapes, dict) or shapes.keys() != found.keys():
        raise ValueError("its shapes are not those of its matrices")
    for name, shape in shapes.items():
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
            raise ValueError(f"the shape of {name[:100]} is none")
        tensor, rest = found[name], shape[0] * shape[1] % 8
        if tensor.dtype != "U8" or tensor.shape != (mask_bytes((shape[0], shape[1])),):
            raise ValueError(f"the mask of {name[:100]} is not of its shape")
        if rest and tensor.content[-1] & (0xFF >> rest):
            raise ValueError(f"the mask of {name[:100]} says more than there are weights")
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}

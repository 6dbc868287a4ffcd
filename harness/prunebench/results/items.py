"""Raw answers by the thousand: kept beside the record in a Parquet file that the record names by its hash."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet

from prunebench.errors import StoreError, described
from prunebench.results.content import slug
from prunebench.results.files import read_file
from prunebench.results.records import RunRecord, ScoreRecord

MOST_INSIDE = 512
"""Items that a record keeps itself, where they can be read."""

MAX_ITEMS_BYTES = 256 << 20
"""A larger file holds no raw answers."""

MOST_VALUES = 50_000_000
"""In all columns of a file: a small file may claim any number."""

Columns = dict[str, list[float | int | str]]


def apart(record: RunRecord) -> tuple[RunRecord, dict[str, bytes]]:
    """The record without the long columns of its scores, and the files for those, by name."""
    files, scores = {}, {}
    for name, score in record.scores.items():
        if max(map(len, score.items.values()), default=0) > MOST_INSIDE:
            content = _to_parquet(score.items)
            digest = hashlib.sha256(content).hexdigest()
            file = f"{record.spec.file_stem}.{slug(name)[:40]}.{digest[:8]}.parquet"
            files[file] = content
            score = score.model_copy(update={"items": {}, "items_file": file, "items_hash": digest})
        scores[name] = score
    return record.model_copy(update={"scores": scores}), files


def read_items(folder: Path, score: ScoreRecord) -> Columns:
    """A score's columns.

    Args:
        folder: where the record is.
        score: of the record.

    Raises:
        StoreError: the file is missing, or not the one the record was written with.
    """
    if score.items_file is None:
        return score.items
    name = Path(score.items_file).name[:255]
    try:
        content = read_file(folder / name, folder, MAX_ITEMS_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"the raw answers {name} cannot be read: {reason}.") from None
    if hashlib.sha256(content).hexdigest() != score.items_hash:
        raise StoreError(f"the raw answers {name} were changed after their record was written.")
    try:
        return _from_parquet(content)
    except Exception as error:  # noqa: BLE001 - the record was made for this file, but not by us: pyarrow raises a dozen kinds
        raise StoreError(f"the raw answers {name} are none: {described(error)}.") from None


def _from_parquet(content: bytes) -> Columns:
    """Columns of numbers and of texts.

    Raises:
        ValueError: they are too many, or of another kind; pyarrow's own where it is no Parquet.
    """
    claimed = pyarrow.parquet.read_metadata(io.BytesIO(content))
    unpacked = sum(claimed.row_group(index).total_byte_size for index in range(claimed.num_row_groups))
    if claimed.num_rows * claimed.num_columns > MOST_VALUES or unpacked > 8 * MOST_VALUES:
        raise ValueError(f"{claimed.num_rows} rows of {claimed.num_columns} columns are too many")
    columns: Columns = {}
    for name, column in pd.read_parquet(io.BytesIO(content)).items():
        values = column.to_numpy()
        numbers = values.dtype.kind in "iuf" and bool(np.isfinite(values).all())
        if not numbers and not all(isinstance(value, str) for value in values):
            raise ValueError(f"the column {name} holds neither numbers nor texts")
        columns[str(name)] = values.tolist()
    return columns


def _to_parquet(columns: Columns) -> bytes:
    """Compressed, whole numbers in as few bytes as they need, others in single precision."""
    frame = pd.DataFrame(columns)
    for name, column in frame.items():
        if pd.api.types.is_integer_dtype(column):
            frame[name] = pd.to_numeric(column, downcast="integer")
        elif pd.api.types.is_float_dtype(column):
            frame[name] = column.astype("float32")
    return bytes(frame.to_parquet(engine="pyarrow", compression="zstd", index=False))

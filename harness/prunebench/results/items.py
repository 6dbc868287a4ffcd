"""Raw answers by the thousand: kept beside the record in a Parquet file that the record names by its hash."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pandas as pd

from prunebench.errors import StoreError
from prunebench.results.records import RunRecord, ScoreRecord, slug

MOST_INSIDE = 512
"""Items that a record keeps itself, where they can be read."""

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
    path = folder / Path(score.items_file).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StoreError(f"the raw answers {score.items_file} cannot be read: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() != score.items_hash:
        raise StoreError(f"the raw answers {score.items_file} were changed after their record was written.")
    return {str(name): column.tolist() for name, column in pd.read_parquet(io.BytesIO(content)).items()}


def _to_parquet(columns: Columns) -> bytes:
    """Compressed, whole numbers in as few bytes as they need, others in single precision."""
    frame = pd.DataFrame(columns)
    for name, column in frame.items():
        if pd.api.types.is_integer_dtype(column):
            frame[name] = pd.to_numeric(column, downcast="integer")
        elif pd.api.types.is_float_dtype(column):
            frame[name] = column.astype("float32")
    return bytes(frame.to_parquet(engine="pyarrow", compression="zstd", index=False))

"""How far a record may be trusted: what somebody found who looked at it again, kept beside the records.

`reported`: as it was handed in. `checked`: it is whole, agrees with itself, with its raw answers, its masks and what else is
known. `replayed`: besides, a sample of its answers and of its masks was made again with the model and came out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunebench.errors import WriteError
from prunebench.results.content import canonical_json
from prunebench.results.files import read_file, write_aside
from prunebench.results.records import RunRecord
from prunebench.results.store import VERDICTS

Grade = Literal["reported", "checked", "replayed"]
GRADES: tuple[Grade, ...] = ("reported", "checked", "replayed")
"""From the least trusted on."""

MAX_VERDICT_BYTES = 1 << 20
DIGITS = 16
"""Of the checksum, in a verdict's file name."""


class Verdict(BaseModel):
    """What was found of one record."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    checksum: str = Field(description="of the record it is about: `content_checksum`")
    id: str
    machine: str
    grade: Grade
    looked_at: list[str] = Field(description="the checks that were made")
    left_out: list[str] = Field(default_factory=list, description="what could not be looked at, and why")
    seed: int | None = Field(default=None, description="by which a replay drew what it made again")
    version: str = Field(description="of prunebench")
    when: str = Field(description="UTC, ISO 8601")


class Verdicts:
    """The verdicts of a results folder."""

    def __init__(self, found: Mapping[str, Verdict]) -> None:
        """By the whole checksums of the records they are about."""
        self._found = found

    @classmethod
    def of(cls, folder: Path) -> Verdicts:
        """Those that can be read; whatever else is there counts for nothing."""
        found = {}
        for path in sorted((folder / VERDICTS).glob("*.json")):
            try:
                verdict = Verdict.model_validate_json(read_file(path, folder, MAX_VERDICT_BYTES))
            except (OSError, ValueError, ValidationError, RecursionError):
                continue
            if path.name == _name(verdict.checksum):
                found[verdict.checksum] = verdict
        return cls(found)

    def grade(self, record: RunRecord) -> Grade:
        """How far a record may be trusted; one that was changed since it was looked at is as it was handed in."""
        verdict = self.find(record)
        return verdict.grade if verdict else "reported"

    def find(self, record: RunRecord) -> Verdict | None:
        """The verdict on a record, if there is one."""
        return self._found.get(content_checksum(record)) if self._found else None


def content_checksum(record: RunRecord) -> str:
    """SHA-256 of what a record says, without what every record says unless told otherwise.

    The checksum in a record's file is of its bytes; this one outlives the upgrade to a newer schema, of which new fields are
    empty.
    """
    said = record.model_dump(mode="json", by_alias=True, exclude={"schema_"}, exclude_defaults=True)
    return hashlib.sha256(canonical_json(said).encode()).hexdigest()


def lowest(grades: Iterable[Grade]) -> Grade:
    """The grade of what rests on several records."""
    return min(grades, key=GRADES.index, default="reported")


def write_verdict(folder: Path, verdict: Verdict) -> Path:
    """Keep a verdict, in place of an earlier one on the same record.

    Raises:
        WriteError: it cannot be written.
    """
    path = folder / VERDICTS / _name(verdict.checksum)
    try:
        write_aside(path.parent, verdict.model_dump_json(indent=1) + "\n").replace(path)
    except OSError as error:
        raise WriteError(f"the verdict {path.name} cannot be written: {error.strerror}.") from None
    return path


def _name(checksum: str) -> str:
    return f"{checksum[:DIGITS]}.json"

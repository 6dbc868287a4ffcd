"""What an examination of records works on, and what it says: each finding names a record, the field, and what is wrong with it.

An examination believes nothing but bytes: a record says what it says, and what can be worked out again is worked out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from prunebench.errors import StoreError
from prunebench.results.items import Columns
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore, Stored

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that somebody should explain."""

    check: str
    """Which check found it."""
    where: str
    """The file it is about, relative to the bundle or the results folder."""
    field: str
    """The field of the record, dotted, or what of the file."""
    message: str
    """What was said, and what was found: the rest of a sentence that begins with the field."""
    level: Level = "error"

    def sentence(self) -> str:
        """In one sentence."""
        return f"{self.where}: {self.field} {self.message.rstrip('.')}."


class Entry:
    """A record that is examined, with the raw answers that belong to it."""

    def __init__(self, stored: Stored, store: ResultStore) -> None:
        self.path, self.record, self.store = stored.path, stored.record, store

    def finding(self, check: str, field: str, message: str, level: Level = "error") -> Finding:
        """One about this record."""
        return Finding(check, self.path, field, message, level)

    @property
    def label(self) -> str:
        """The record in a few letters, for findings about another."""
        return f"{self.record.machine}/{self.record.id}"

    @cached_property
    def answers(self) -> dict[str, Columns]:
        """The raw answers of each score; of one that cannot be read none."""
        return self._read[0]

    @cached_property
    def unreadable(self) -> dict[str, str]:
        """Scores whose raw answers cannot be read, and why."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, Columns], dict[str, str]]:
        found: dict[str, Columns] = {}
        failed: dict[str, str] = {}
        for name, score in self.record.scores.items():
            try:
                found[name] = self.store.items(self.record, score)
            except StoreError as error:
                failed[name] = str(error)
        return found, failed

    def forget(self) -> None:
        """Let go of the raw answers, of which a folder may have millions."""
        for name in ("answers", "unreadable", "_read"):
            self.__dict__.pop(name, None)


Check = Callable[[Entry], Iterator[Finding]]
"""Looks at one record."""


def is_pruned(record: RunRecord) -> bool:
    """Whether something was removed."""
    return record.spec.target != "dense"


def is_trained(record: RunRecord) -> bool:
    """Whether a step was trained on text of its own."""
    recipe = record.spec.recipe
    return recipe.training is not None or recipe.training_tokens is not None

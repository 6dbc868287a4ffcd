"""Everything that can be found out about records without their model: check after check, what it looked at and what it found.

What this cannot see: a record that was left out. Who hands in three seeds of five, or no failed run, hands in true records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from prunebench.errors import PrunebenchError, described
from prunebench.plain import plain
from prunebench.results import consistency, plausible, recomputed, recounted
from prunebench.results.bundle import MANIFEST, names_beside
from prunebench.results.files import read_file
from prunebench.results.findings import Check, Entry, Finding
from prunebench.results.plausible import Neighbours
from prunebench.results.store import MAX_RECORD_BYTES, NO_MACHINES, ResultStore, Stored, parse_record
from prunebench.results.verdicts import Grade, content_checksum

_T = TypeVar("_T")

ALONE: dict[str, tuple[Check, ...]] = {
    "place": (consistency.place,),
    "steps": (consistency.steps,),
    "conditions": (consistency.conditions, consistency.making, consistency.counts),
    "tokens": (consistency.recipe, consistency.shape),
    "arithmetic": (recomputed.scores,),
    "answers": (recomputed.answers,),
    "audit": (recomputed.audit,),
    "masks": (recounted.masks,),
    "costs": (consistency.costs,),
}
"""Checks of one record by itself."""

TOGETHER: dict[str, tuple[Callable[[Neighbours], Iterator[Finding]], ...]] = {
    "tokens": (plausible.tokens,),
    "twins": (plausible.twins,),
    "plausible": (plausible.dense, plausible.repeated, plausible.questions, plausible.matrices),
    "odd": (plausible.better_than_dense, plausible.costs),
}
"""Checks of records among each other and beside known ones."""

ABOUT = {
    "archive": "names, sizes and kinds of the files",
    "manifest": "every file there, none other, each the one that was packed",
    "schema": "fields, checksum and id",
    "place": "file and folder are those of the record",
    "steps": "what was done is what the spec says",
    "conditions": "each score has those of the spec, whole; as many answers as they say",
    "tokens": "the same recipe and seed has the same tokens, another seed others",
    "arithmetic": "scores and their parts out of the raw answers",
    "answers": "raw answers agree with each other",
    "audit": "sums, shares, and counts against the target",
    "masks": "removed weights counted again in the kept masks",
    "costs": "seconds add up, and the peak holds the weights",
    "twins": "other tokens gave other answers and masks",
    "plausible": "dense scores, repeated runs, questions and shapes as known",
    "odd": "better than dense, or far quicker or slower than known",
    "replayed answers": "segments and questions answered again by the pruned model",
    "replayed block": "a block pruned again by the method",
}
"""What each check looks at, in the order in which they are shown."""


@dataclass
class Examination:
    """What was looked at, and what was found."""

    entries: list[Entry]
    findings: list[Finding] = field(default_factory=list)
    looked: Counter[str] = field(default_factory=Counter)
    """How many records or files each check looked at."""
    unseen: dict[str, list[str]] = field(default_factory=dict)
    """What could not be looked at, by the record's file: a sentence each."""
    replayed: dict[str, str] = field(default_factory=dict)
    """Records of which all that there is to replay was replayed, by file, and what that was."""
    alone: str | None = None
    """Why there were no known records to compare with: a sentence."""

    @property
    def failed(self) -> bool:
        """Whether anything is wrong, not merely odd."""
        return any(finding.level == "error" for finding in self.findings)

    def grade(self, entry: Entry) -> Grade:
        """How far a record may be trusted: not at all where it, or the bundle it came in, is not sound."""
        wrong = {finding.where for finding in self.findings if finding.level == "error"}
        own = {entry.path, *names_beside(entry.path, entry.record)}
        whole = not any(finding.check in ("archive", "manifest") for finding in self.findings)
        if wrong & own or not whole or any(said.startswith(_UNKNOWN) for said in self.unseen.get(entry.path, [])):
            return "reported"
        return "replayed" if entry.path in self.replayed else "checked"


_UNKNOWN = "the value of "
"""How it begins when a score cannot be worked out again, which a checked one is."""


def examine(
    entries: Sequence[Entry],
    known: Sequence[Entry] = (),
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Examination:
    """Make every check that needs no model.

    Args:
        entries: records to examine.
        known: others, which are believed.
        progress: told how far it is.
    """
    found = Examination(list(entries))
    near = Neighbours(entries, known)
    for number, entry in enumerate(entries):
        progress("record", number, len(entries))
        for name, checks in ALONE.items():
            if name == "masks" and entry.record.masks is None:
                continue
            found.looked[name] += 1
            found.findings += [finding for check in checks for finding in _guarded(name, entry.path, check, entry)]
        found.unseen[entry.path] = [] if any(f.where == entry.path for f in found.findings) else list(_unseen(entry))
        for name in entry.record.scores:
            near.digests(entry, name)
        entry.forget()
    for name, together in TOGETHER.items():
        progress(name, 0, 1)
        found.looked[name] = len(entries)
        found.findings += [finding for check in together for finding in _guarded(name, "records", check, near)]
    found.findings += _twice(entries)
    return found


def _guarded(name: str, where: str, check: Callable[[_T], Iterator[Finding]], looked_at: _T) -> list[Finding]:
    """What a check finds; what it stumbles over is wrong too: no answer that was measured is no number."""
    found = []
    try:
        found += list(check(looked_at))
    except Exception as error:  # noqa: BLE001 - a stranger wrote what is looked at
        found.append(Finding(name, where, "content", f"cannot be looked at: {plain(described(error))}"))
    return found


def read_entries(folder: Path, store: ResultStore) -> tuple[list[Entry], list[Finding]]:
    """Every record of an unpacked bundle, and what is wrong with those that are none."""
    entries, findings = [], []
    for path in sorted(folder.glob("*/*/*.json")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in NO_MACHINES:
            continue
        try:
            record = parse_record(read_file(path, folder, MAX_RECORD_BYTES))
        except (OSError, ValueError, RecursionError, PrunebenchError) as error:
            findings.append(_schema_finding(name, error))
        else:
            entries.append(Entry(Stored(name, record), store))
    if findings:
        return entries, findings  # other files may belong to those
    named = {MANIFEST, *(name for entry in entries for name in (entry.path, *names_beside(entry.path, entry.record)))}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return entries, [Finding("schema", name, "file", "belongs to no record") for name in sorted(there - named)]


def _schema_finding(name: str, error: Exception) -> Finding:
    """What of a file makes it no record."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return Finding("schema", name, plain(".".join(map(str, first["loc"]))), f"does not fit: {plain(first['msg'])}")
    said = plain(str(error) or type(error).__name__)
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return Finding("schema", name, "content", f"is no JSON: {said}")
    fields = {"its checksum": "checksum", "its id": "id", "its schema": "schema", "the target": "spec.target"}
    field_ = next((field for begin, field in fields.items() if said.startswith(begin)), "content")
    return Finding("schema", name, field_, f"is wrong: {said}")


def _twice(entries: Sequence[Entry]) -> Iterator[Finding]:
    """One record under two names."""
    first: dict[str, Entry] = {}
    for entry in entries:
        other = first.setdefault(content_checksum(entry.record), entry)
        if other is not entry:
            yield entry.finding("place", "id", f"is {entry.record.id}, and {other.path} is the same record")


def _unseen(entry: Entry) -> Iterator[str]:
    """What cannot be looked at in a record."""
    record = entry.record
    for name, score in record.scores.items():
        if name not in entry.answers:
            continue
        if score.value is not None and recomputed.value_of(entry.answers[name], score) is None:
            yield f"{_UNKNOWN}{name} cannot be worked out of its raw answers: it does not say how it is made of them."
            continue
        unknown = sorted(score.parts.keys() - recomputed.parts_of(entry.answers[name], score).keys())
        if unknown:
            yield f"parts of {name} cannot be worked out: {', '.join(unknown)}."
    if record.status == "ok" and record.spec.target != "dense" and record.masks is None:
        yield "no masks were kept, so zeros were not counted again and nothing can be replayed."

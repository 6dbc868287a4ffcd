"""Runs by the beginning of their ids, and how a command introduces them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prunebench.cli.program import terminal
from prunebench.errors import RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.results.records import RunRecord
    from prunebench.results.store import Stored


def named(results: Path, latest: list[Stored], *ids: str) -> list[RunRecord]:
    """The runs with these ids among the latest of a folder.

    Raises:
        RequestError: there is none, or more than one, or it has no scores.
    """
    records, found = [stored.record for stored in latest], []
    for run_id in ids:
        matching = [r for r in records if r.id.startswith(run_id) or f"{r.machine}/{r.id}".startswith(run_id)]
        if len(matching) != 1:
            more = f": {', '.join(f'{record.machine}/{record.id}' for record in matching)}" if 1 < len(matching) <= 4 else ""
            raise RequestError(f"{len(matching) or 'no'} runs in {results} have an id that begins with {run_id!r}{more}.")
        if matching[0].status != "ok":
            raise RequestError(f"the run {run_id} has no scores: it is {matching[0].status}.")
        found.append(matching[0])
    return found


def introduce(records: list[RunRecord]) -> None:
    """Say which runs are A and B."""
    from prunebench.results.leaderboard import describe

    for name, record in zip("AB", records, strict=True):
        terminal.print(f"{name}: {escape(describe(record))}")

"""What a sweep shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunebench.bench.plan import RunRequest
from prunebench.bench.specs import run_label
from prunebench.bench.sweep import PARTS
from prunebench.plain import duration_text, escape
from prunebench.results.journal import seconds_left
from prunebench.results.leaderboard import number
from prunebench.results.records import RunRecord

MARKS = {"ok": "[green]ok[/]", "refused": "[yellow]refused[/]", "failed": "[red]failed[/]"}

LOG_LINES = 8
"""Of what a failed run wrote, its last."""

MOST_LINES = 16
"""Runs at work that a terminal shows one by one."""


class SweepDisplay:
    """Which runs are at work, at which step and block, and how long the rest will take."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._overall: TaskID | None = None
        self._lines: dict[int, TaskID] = {}
        self._parts: dict[int, str] = {}
        self._left: dict[int, RunRequest] = {}
        self._began: dict[int, float] = {}
        self._ended: list[tuple[float | None, float]] = []
        self._total, self._jobs, self._most = 0, 1, 0

    def started(self, todo: Sequence[RunRequest], settled: int, jobs: int) -> None:
        """Say what is to do, and start the display."""
        self._total, self._jobs = len(todo), jobs
        self._left = dict(enumerate(todo, start=1))
        found = f"; {settled} found done" if settled else ""
        at_a_time = f", {jobs} at a time" if jobs > 1 and self._total > 1 else ""
        self._console.print(f"{self._total} {'run' if self._total == 1 else 'runs'} to do{at_a_time}{found}.")
        if todo and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._overall = self._live.add_task("sweep", total=self._total, state="starting")
            self._live.start()

    def run_began(self, number: int, request: RunRequest, where: str) -> None:
        """A line for the run, for as long as it is at work; a run whose worker died may begin again."""
        self._began[number] = time.monotonic()
        self._most = max(self._most, len(self._began.keys() & self._left.keys()))
        if self._live and number not in self._lines and len(self._lines) < MOST_LINES:
            on = f" on {where}" if "," in where else ""  # one of several devices or nodes
            description = escape(f"{number:>3} {run_label(request.spec)[:48]}{on}")
            self._lines[number] = self._live.add_task(description, total=1, state="starting")
            self._show_overall()

    def progress(self, number: int, what: str, done: int, total: int) -> None:
        """Show how far the run is."""
        if self._live is None or number not in self._lines:
            return
        if what.startswith(PARTS):
            part = self._parts[number] = what.partition("[")[0]  # the options would fill the line
            state = part if total < 2 else f"{part} ({done + 1} of {total})"
            self._live.update(self._lines[number], state=escape(state), total=1, completed=0)
        else:
            state = f"{self._parts.get(number, '')}, {what} {min(done + 1, total)} of {total}"
            self._live.update(self._lines[number], state=escape(state), total=total, completed=done)

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        """Lines for the run, which stay."""
        request = self._left.pop(number)
        self._ended.append((request.predicted.seconds if request.predicted else None, seconds))
        if self._live and number in self._lines:
            self._live.remove_task(self._lines.pop(number))
            self._show_overall()
        self._console.print(f"[{number:>3}/{self._total}]".replace("[", "\\["), self._line(record, seconds), highlight=False)
        if record.failure and log and "Its last lines: " not in record.failure.message:
            for line in log.decode(errors="replace").splitlines()[-LOG_LINES:]:
                self._console.print(f"          {escape(line)}", style="dim", highlight=False)
            if path is not None:
                self._console.print(f"          the rest is in {escape(path.with_suffix('.log').name)}", style="dim")

    def run_taken(self, number: int, request: RunRequest) -> None:
        """Say that another command has the run."""
        self._console.print(f"\\[{number:>3}/{self._total}] {escape(run_label(request.spec))}: running in another command")

    def run_done_elsewhere(self, number: int) -> None:
        """It is no longer to do."""
        del self._left[number]

    def close(self) -> None:
        """End the live display."""
        if self._live:
            for line in self._lines.values():
                self._live.remove_task(line)
            if self._overall is not None and not self._left:
                self._live.update(self._overall, completed=self._total, state="done")
            self._live.stop()
            self._live = None

    def _show_overall(self) -> None:
        if self._live and self._overall is not None:
            done = self._total - len(self._left)
            self._live.update(self._overall, completed=done, state=f"{done} of {self._total}{self._remaining()}")

    def _line(self, record: RunRecord, seconds: float) -> str:
        found = ", ".join(f"{name} {number(score.value)}" for name, score in record.scores.items())
        detail = found or record.reason or f"pruned in {duration_text(record.prune_seconds)}"
        text = f"{MARKS[record.status]} {escape(run_label(record.spec))}: {escape(detail)}  ({seconds:.1f} s)"
        return text if self._live else f"{text}{escape(self._remaining())}"

    def _remaining(self) -> str:
        """The time that the runs which have not ended will take."""
        now = time.monotonic()
        left = [
            (request.predicted.seconds if request.predicted else None, now - self._began.get(number, now))
            for number, request in self._left.items()
        ]
        seconds = seconds_left(self._ended, left, self._most or self._jobs) if self._ended else None
        if not seconds:
            return ""
        return f", about {duration_text(seconds)} left"

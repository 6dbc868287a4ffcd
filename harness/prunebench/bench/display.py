"""What a sweep shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunebench.bench.plan import RunRequest
from prunebench.bench.preview import Work
from prunebench.results.leaderboard import number
from prunebench.results.records import RunRecord, RunSpec

_MARKS = {"ok": "[green]ok[/]", "refused": "[yellow]refused[/]", "failed": "[red]failed[/]"}


class SweepDisplay:
    """Which run of how many, which step, which block, how long it will still take."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Progress | None = None
        self._overall: TaskID | None = None
        self._inner: TaskID | None = None
        self._total, self._seconds = 0, [0.0]
        self._step = ""

    def started(self, total: int, settled: int) -> None:
        """Say what is to do, and start the display."""
        self._total, self._seconds = total, []
        found = f"; {settled} found done" if settled else ""
        self._console.print(f"{total} {'run' if total == 1 else 'runs'} to do{found}.")
        if total and self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            self._overall = self._live.add_task("sweep", total=total, state="")
            self._inner = self._live.add_task("", total=1, state="")
            self._live.start()

    def run_started(self, number: int, request: RunRequest) -> None:
        """Show the run's name."""
        if self._live and self._overall is not None and self._inner is not None:
            state = f"run {number} of {self._total}{self._left()}"
            self._live.update(self._overall, state=state, completed=number - 1)
            self._live.reset(self._inner, description=escape(run_label(request.spec)[:48]), state="starting")

    def progress(self, what: str, done: int, total: int) -> None:
        """Show how far the run is."""
        if self._live and self._inner is not None:
            if what.startswith(("step ", "eval ", "load", "audit")):
                self._step = what.partition("[")[0]  # the options would fill the line
                state = self._step if total < 2 else f"{self._step} ({done + 1} of {total})"
                self._live.update(self._inner, state=escape(state), total=1, completed=0)
            else:
                at = f"{what} {min(done + 1, total)} of {total}"
                self._live.update(self._inner, state=escape(f"{self._step}, {at}"), total=total, completed=done)

    def run_ended(self, number: int, record: RunRecord, seconds: float) -> None:
        """A line for the run, which stays."""
        self._seconds.append(seconds)
        self._console.print(f"[{number:>3}/{self._total}]".replace("[", "\\["), self._line(record, seconds), highlight=False)

    def run_taken(self, number: int, request: RunRequest) -> None:
        """Say that another command has the run."""
        self._console.print(f"\\[{number:>3}/{self._total}] {escape(run_label(request.spec))}: running in another command")

    def close(self) -> None:
        """End the live display."""
        if self._live:
            if self._overall is not None and len(self._seconds) == self._total:
                self._live.update(self._overall, completed=self._total, state="done")
            if self._inner is not None:
                self._live.remove_task(self._inner)
            self._live.stop()
            self._live = None

    def _line(self, record: RunRecord, seconds: float) -> str:
        found = ", ".join(f"{name} {number(score.value)}" for name, score in record.scores.items())
        detail = found or record.reason or ""
        text = f"{_MARKS[record.status]} {escape(run_label(record.spec))}: {escape(detail)}  ({seconds:.1f} s)"
        return text if self._live else f"{text}{escape(self._left())}"

    def _left(self) -> str:
        """The time the remaining runs will take if they are like those that ended."""
        remaining = self._total - len(self._seconds)
        if not self._seconds or not remaining:
            return ""
        seconds = remaining * sum(self._seconds) / len(self._seconds)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"


def run_label(spec: RunSpec | Work) -> str:
    """A run in a few words."""
    seed = "" if spec.seed is None else f", seed {spec.seed}"
    target = "" if spec.method == spec.target else f" {spec.target}"
    return f"{spec.model.name} {spec.method}{target}{seed}"

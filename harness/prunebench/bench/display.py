"""What a sweep shows before it runs, and while: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunebench.bench.plan import RunRequest
from prunebench.bench.preview import Cost, Preview, Work
from prunebench.results.leaderboard import difference_size, number
from prunebench.results.planning import ANSWERS_DIFFER, WINDOW_DEVIATION, Figure
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


def print_preview(preview: Preview, console: Console) -> None:
    """The runs, what they would download and cost, and what they could show."""
    if any(work.id is None for work in preview.todo):
        labels = Counter(run_label(replace(work, seed=None)) for work in preview.todo)
        for label, count in labels.items():
            console.print(f" to do  {count:>3} x  {escape(label)}")
        console.print(f"{len(preview.todo)} runs; which of them are done is known when the data are here. Nothing was run.")
    else:
        for mark, works in (("done", preview.done), ("to do", preview.todo)):
            for work in works:
                console.print(f"{mark:>6}  {work.id}  {escape(run_label(work))}")
        console.print(f"{len(preview.todo)} to do, {len(preview.done)} done; nothing was run.")
    _print_downloads(preview, console)
    if preview.todo:
        _print_costs(preview, console)
    console.print("\nDifferences of two methods that would be found four times of five, before the correction for many pairs:")
    several = len({name for name, _, _ in preview.figures}) > 1
    for name, text, found in preview.figures:
        console.print(f"  {escape(f'{name} {text}' if several else text)}: {_figure_text(found)}", soft_wrap=True)


def _print_downloads(preview: Preview, console: Console) -> None:
    if not preview.downloads:
        console.print("\nNothing would be downloaded.")
        return
    console.print("\nWould be downloaded:")
    for download in preview.downloads:
        size = "size not known" if download.size is None else size_text(download.size)
        console.print(f"  {download.kind} {escape(download.name)}: {size}", soft_wrap=True)
    sizes = [download.size for download in preview.downloads if download.size is not None]
    more = " and what the Hub does not say" if len(sizes) < len(preview.downloads) else ""
    console.print(f"  in all {size_text(sum(sizes))}{more}")


def _print_costs(preview: Preview, console: Console) -> None:
    console.print("\nWould take about:")
    where = "on the device" if preview.planner.device.startswith("cuda") else "on the host"
    for cost in preview.costs:
        console.print(f"  {escape(cost.model)}: {_cost_text(cost, where)}", soft_wrap=True)
    if len(preview.costs) > 1:
        peak = size_text(max(cost.peak_bytes for cost in preview.costs))
        runs, seconds = sum(cost.runs for cost in preview.costs), sum(cost.seconds for cost in preview.costs)
        console.print(f"  in all: {runs} runs, {duration_text(seconds)}, peak {peak} {where}")
    if preview.rates:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in preview.rates.items())
        limits = "mostly within a factor of 3, far too little for methods that optimise block by block"
        console.print(f"  rough: operations at the measured rate, {rates}; {limits}", soft_wrap=True)


def _cost_text(cost: Cost, where: str) -> str:
    runs = f"{cost.runs} {'run' if cost.runs == 1 else 'runs'}"
    basis = "rough" if not cost.records else f"from {cost.records} records"
    if cost.records and cost.assumed:
        basis += f", {cost.assumed} runs in part rough"
    return f"{runs}, {duration_text(cost.seconds)}, peak {size_text(cost.peak_bytes)} {where} ({basis})"


def _figure_text(found: Figure | None) -> str:
    """What an evaluation could show, and what that rests on."""
    if found is None:
        return "not known before there are records of it"
    items = f"{found.items:,} {'questions' if found.share else 'windows'}"
    basis = f"from {found.pairs} pairs in records"
    if not found.pairs:
        basis = (
            f"assumed: {ANSWERS_DIFFER:.0%} of answers differ" if found.share else f"assumed deviation {WINDOW_DEVIATION} nats"
        )
    if math.isinf(found.difference):
        return f"no difference would show, {items} are too few"
    size = difference_size(found.difference, found.exponential, found.share)
    unit = "" if found.exponential or found.share else " nats"
    return f"differences from about {size}{unit} on would show ({items}; {basis})"


def duration_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, to two figures or so."""
    for size, below, unit, smaller in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / below), size // below)
            return f"{whole} {unit} {rest} {smaller}" if rest and whole < 10 else f"{whole} {unit}"
    return f"{seconds:.0f} s"


def size_text(count: int) -> str:
    """Bytes in the unit that suits."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}" if count < 1000 << power else f"{count / (1 << power):.0f} {unit}"
    return f"{count} bytes"

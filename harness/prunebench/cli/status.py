"""`prunebench status`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.plain import duration_text, escape

if TYPE_CHECKING:
    from prunebench.results.journal import RunPage
    from prunebench.results.progress import SweepState


@app.command()
def status(
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show what runs into a results folder, here or on another machine: done, at work, failed, remaining, and until when.

    Example: prunebench status
    """
    import json
    from dataclasses import asdict

    from prunebench.results.progress import status as found_in

    found = found_in(open_store(results))
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1, default=lambda page: page.model_dump(mode="json")))
        return
    if not (found.sweeps or found.others or found.abandoned):
        terminal.print(f"Nothing is running in {escape(str(results))}.")
    for sweep in found.sweeps:
        _print_sweep(sweep)
    if found.others:
        terminal.print("At work, though the command that began them has ended:")
        for run in found.others:
            _print_run(run)
    if found.abandoned:
        terminal.print("Left behind by a process that died; the same `prunebench run` takes them up again:")
        for run in found.abandoned:
            terminal.print(f"  {escape(run.id)}  {escape(run.label)}, {escape(_since(run.started))}", soft_wrap=True)


def _print_sweep(sweep: SweepState) -> None:
    page = sweep.page
    name = escape(page.suite or page.command)
    if not sweep.alive:
        terminal.print(
            f"[bold]{name}[/] on {escape(page.machine)}: its process died with {sweep.left} of {len(page.runs)} to do."
        )
        return
    parts = [f"{sweep.done} of {len(page.runs)} done", f"{len(sweep.running)} at work"]
    parts += [f"{sweep.failed} failed"] if sweep.failed else []
    parts += [f"{sweep.left - len(sweep.running)} to come"]
    terminal.print(f"[bold]{name}[/] on {escape(page.machine)}, {escape(_since(page.started))}: {', '.join(parts)}.")
    for run in sweep.running:
        _print_run(run)
    if sweep.seconds_left is not None:
        end = datetime.now().astimezone() + timedelta(seconds=sweep.seconds_left)
        today = end.date() == datetime.now().astimezone().date()
        terminal.print(f"  about {_duration(sweep.seconds_left)} left, until {end:%H:%M}{'' if today else f' on {end:%d %B}'}")


def _print_run(run: RunPage) -> None:
    doing = run.doing.partition("[")[0] or "starting"
    place = f", {run.what} {min(run.done + 1, run.total)} of {run.total}" if run.what and run.total > 1 else ""
    terminal.print(
        f"  {escape(run.id)}  {escape(run.label)}: {escape(doing)}{escape(place)}; "
        f"{escape(run.where or 'queued')}, {escape(_since(run.started))}",
        soft_wrap=True,
    )


def _since(started: datetime) -> str:
    return f"for {_duration((datetime.now(UTC) - started).total_seconds())}"


def _duration(seconds: float) -> str:
    return duration_text(max(0.0, seconds))

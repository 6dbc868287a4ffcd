"""`prunebench list` and `run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from prunebench.cli.program import Device, Machine, Results, app, command_line, open_store, terminal
from prunebench.errors import RequestError

if TYPE_CHECKING:
    from prunebench.bench.plan import RunRequest


@app.command("list")
def list_command(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List pruners with their options, evaluations, suites, and plugins that failed to load.

    Example: prunebench list
    """
    from prunebench.bench.suite import shipped_suites
    from prunebench.plugins import load_registry
    from prunebench.show import print_listing

    registry = load_registry()
    listing = {
        "pruners": registry.describe_pruners(),
        "evals": registry.describe_evals(),
        "suites": sorted(shipped_suites()),
        "broken": [vars(item) for item in registry.broken],
    }
    if as_json:
        typer.echo(json.dumps(listing, indent=1))
    else:
        print_listing(listing, terminal)


@app.command()
def run(
    suite: Annotated[str, typer.Argument(help="A suite's path, or a shipped name such as quickstart.")],
    model: Annotated[list[str] | None, typer.Option("--model", help="Run on this model instead of the suite's.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", help="Run 'step[…] + step' instead of the suite's.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only runs whose model, method or target contains this.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Run also what is done; earlier records are kept.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and stop.")] = False,
    results: Results = Path("results"),
    machine: Machine = None,
    executor: Annotated[str, typer.Option("--executor", help="subprocess (a fresh process a run) or inline.")] = "subprocess",
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds a run may take.")] = None,
    device: Device = None,
) -> None:
    """Run a suite: what has a record on this machine is left out.

    Example: prunebench run quickstart --only wanda
    """
    from prunebench.bench.display import SweepDisplay
    from prunebench.bench.executors import make_executor
    from prunebench.bench.sweep import split_settled, sweep

    chosen = make_executor(executor)
    store = open_store(results)
    requests = _plan(suite, model, method, only, machine, device, timeout)
    todo, done = split_settled(requests, store, requests[0].machine, again)
    if dry_run:
        _print_plan(todo, done)
        return
    store.check_writable()
    display = SweepDisplay(terminal)
    display.started(len(todo), len(done))
    try:
        summary = sweep(todo, store, chosen, display, again)
    finally:
        display.close()
        chosen.close()
    failed, refused = summary.count("failed"), summary.count("refused")
    if todo:
        elsewhere = f", {summary.elsewhere} done by another command" if summary.elsewhere else ""
        terminal.print(
            f"{summary.count('ok')} ok, {refused} refused, {failed} failed{elsewhere}; records in {escape(str(results))}."
        )
    if failed:
        raise typer.Exit(1)


def _plan(
    suite: str,
    models: list[str] | None,
    methods: list[str] | None,
    only: str | None,
    machine: str | None,
    device: str | None,
    timeout: float | None,
) -> list[RunRequest]:
    from dataclasses import replace

    from prunebench.bench.commands import narrowed
    from prunebench.bench.display import run_label
    from prunebench.bench.machine import machine_slug
    from prunebench.bench.plan import Planner, pick_device
    from prunebench.bench.suite import load_suite, with_dense
    from prunebench.plugins import load_registry
    from prunebench.results.records import slug

    chosen = narrowed(load_suite(suite), models or [], methods or [])
    name = slug(machine) if machine else machine_slug()
    planner = Planner(with_dense(chosen), load_registry(), name, command_line(), pick_device(device))
    requests = planner.requests()
    for found in planner.overlaps:
        share = f"{found.share:.2%} of the 13-grams of {found.evaluation} are in the training text {found.training}."
        terminal.print(escape(share), style="dim" if found.share < 0.01 else "yellow")
    labels = [run_label(request.spec) for request in requests]
    if only is not None:
        requests = [request for request, label in zip(requests, labels, strict=True) if only in label]
    if not requests:
        raise RequestError(f"no run of {suite} contains {only!r}; runs are called, for example, {labels[-1]!r}.")
    return [replace(request, timeout=timeout or request.timeout) for request in requests]


def _print_plan(todo: list[RunRequest], done: list[RunRequest]) -> None:
    from prunebench.bench.display import run_label

    for mark, requests in (("done", done), ("to do", todo)):
        for request in requests:
            terminal.print(f"{mark:>6}  {request.spec.id}  {escape(run_label(request.spec))}")
    terminal.print(f"{len(todo)} to do, {len(done)} done; nothing was run.")

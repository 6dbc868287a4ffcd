"""`prunebench list` and `run`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from prunebench.cli.program import Device, Machine, Results, app, command_line, open_store, terminal, warn
from prunebench.errors import RequestError, UnknownNameError
from prunebench.plain import escape, size_text

if TYPE_CHECKING:
    from prunebench.bench.costs import Work
    from prunebench.bench.executors import Executor
    from prunebench.bench.plan import Keeping, Planner, RunRequest
    from prunebench.results.records import EvalSpec, RunRecord
    from prunebench.results.store import ResultStore

_Run = TypeVar("_Run")

ENDINGS = ("failed", "refused", "error", "oom", "timeout", "killed", "nan", "audit")
"""How a run can have ended that is done again: its status, or the kind of its failure."""


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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, downloaded and spent, and stop.")] = False,
    results: Results = Path("results"),
    machine: Machine = None,
    executor: Annotated[
        str, typer.Option("--executor", help="subprocess (a fresh process a run), inline, ray or slurm.")
    ] = "subprocess",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs", min=1, help="Runs at a time; on CUDA one for each GPU.", show_default="1, on a cluster what fits"
        ),
    ] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.001, help="Seconds a run may take.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", min=0.001, help="GiB a run may use on the host.")] = None,
    retry: Annotated[list[str] | None, typer.Option("--retry", help=f"Only runs that ended so: {', '.join(ENDINGS)}.")] = None,
    keep_masks: Annotated[bool, typer.Option("--keep-masks", help="Keep the masks, to score them again.")] = False,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep also what else a method changes: whole tensors.")
    ] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option("--checkpoint-every", min=1, help="Blocks after which a killed run can go on.")
    ] = None,
    ray_address: Annotated[str | None, typer.Option("--ray-address", help="A Ray cluster that is there already.")] = None,
    device: Device = None,
) -> None:
    """Run a suite: what has a record on this machine is left out.

    Example: prunebench run quickstart --only wanda
    """
    from functools import partial

    from prunebench.bench.cost_only import refuse_kept_weights
    from prunebench.bench.estimate import known_work, with_predictions
    from prunebench.bench.executors import make_executor
    from prunebench.bench.plan import Keeping
    from prunebench.bench.sweep import split_settled

    endings = frozenset(retry or ())
    cluster = executor == "slurm" or ray_address is not None
    _check_options(executor, timeout, memory, endings, cluster and not (machine and device))
    store = open_store(results)
    planner = _planner(suite, model, method, machine, device, cluster)
    if keep_weights:
        refuse_kept_weights(planner.suite)
    again = again or "refused" in endings
    chosen = make_executor(executor, jobs, planner.device, results, ray_address, again)
    keep = Keeping(str(results.resolve()), keep_weights) if keep_masks or keep_weights else None
    limited = partial(_limited, store=store, timeout=timeout, memory=memory, checkpoint_every=checkpoint_every, keep=keep)
    if dry_run:
        requests = _show_plan(planner, suite, only, store, again, endings, here=not cluster, keep=keep)
        if executor == "slurm":
            _show_scripts(chosen, limited(requests))
        return
    requests = limited(_requests(planner, suite, only))
    records = [stored.record for stored in store.latest()]
    todo, done = split_settled(requests, records, planner.machine, again, endings)
    if keep:
        _tell_kept(keep, known_work(todo, planner.registry), [run.spec.id for run in done], records, planner.machine, results)
    folder = store.folder_of_machine(planner.machine)
    predict = None if cluster else partial(with_predictions, records=records, planner=planner, folder=folder)
    swept(todo, len(done), store, chosen, again, predict)


def swept(
    todo: list[RunRequest],
    done: int,
    store: ResultStore,
    executor: Executor,
    again: bool,
    predict: Callable[[list[RunRequest]], list[RunRequest]] | None = None,
) -> None:
    """Do runs, show how far they are and what they came to; exit code 1 where one failed.

    Args:
        todo: the runs.
        done: how many others were found done.
        store: where their records go.
        executor: does them, and is closed.
        again: do also what is settled.
        predict: adds what each run is expected to take, once it is known that they can be done.
    """
    from prunebench.bench.display import SweepDisplay
    from prunebench.bench.sweep import sweep
    from prunebench.bench.telling import Telling
    from prunebench.plugins import load_registry

    store.check_writable()
    display = SweepDisplay(terminal)
    try:
        executor.check(todo)
        if todo and predict is not None:
            todo = predict(todo)
        display.started(todo, done, min(executor.room(), len(todo)))
        told = Telling(display, load_registry().listeners, warn)
        summary = sweep(todo, store, executor, told, again, done)
    finally:
        display.close()
        executor.close()
    failed, refused = summary.count("failed"), summary.count("refused")
    if todo:
        elsewhere = f", {summary.elsewhere} done by another command" if summary.elsewhere else ""
        where = escape(str(store.folder))
        terminal.print(f"{summary.count('ok')} ok, {refused} refused, {failed} failed{elsewhere}; records in {where}.")
    if failed:
        raise typer.Exit(1)


def _tell_kept(
    keep: Keeping, todo: Sequence[Work], done: Collection[str], records: Iterable[RunRecord], machine: str, folder: Path
) -> None:
    """Say what will be kept and what was not; a RequestError where there is no room for it."""
    from prunebench.bench.room import check_room, expected_bytes, without_masks
    from prunebench.results.records import MASKS

    settled = [record for record in records if record.machine == machine and record.id in done]
    if lacking := without_masks(settled, keep.weights):
        runs = "1 run done has" if lacking == 1 else f"{lacking} runs done have"
        what = "masks, or not the weights that go with them" if keep.weights else "masks"
        terminal.print(f"{runs} no {what}; --again makes them.")
    needed = expected_bytes(todo, keep.weights)
    if todo:
        terminal.print(f"Up to {size_text(needed)} will be kept in {escape(str(folder / MASKS))}.")
    check_room(folder, needed)


def _check_options(
    executor: str, timeout: float | None, memory: float | None, endings: Collection[str], nameless: bool
) -> None:
    """Raise a RequestError where options do not go together."""
    if nameless:
        raise RequestError(
            "runs on a cluster need --machine, a name for its nodes, and --device, cpu or cuda: neither can be seen from here."
        )
    if unknown := sorted(set(endings) - set(ENDINGS)):
        raise UnknownNameError.among("ending", unknown[0], ENDINGS)
    for option, value in (("--timeout", timeout), ("--memory", memory)):
        if value is not None and executor == "inline":
            raise RequestError(f"{option} needs --executor subprocess: nothing can stop a run that shares this process.")


def _limited(
    requests: list[RunRequest],
    store: ResultStore,
    timeout: float | None,
    memory: float | None,
    checkpoint_every: int | None,
    keep: Keeping | None,
) -> list[RunRequest]:
    """The runs, with the limits of the command line."""
    from dataclasses import replace

    from prunebench.results.journal import Journal

    journal = Journal(store.folder.resolve())  # whoever does a run may be in another folder
    return [
        replace(
            request,
            timeout=timeout or request.timeout,
            memory=memory and memory * (1 << 30),
            checkpoint_every=checkpoint_every,
            keep=keep,
            checkpoints=str(journal.scratch(request.machine, request.spec.id, "checkpoint")),
        )
        for request in requests
    ]


def _planner(
    suite: str, models: list[str] | None, methods: list[str] | None, machine: str | None, device: str | None, cluster: bool
) -> Planner:
    from prunebench.bench.commands import narrowed
    from prunebench.bench.machine import machine_slug
    from prunebench.bench.plan import Planner, pick_device
    from prunebench.bench.suite import load_suite, with_dense
    from prunebench.plugins import load_registry
    from prunebench.results.content import slug

    chosen = narrowed(load_suite(suite), models or [], methods or [])
    name = slug(machine) if machine else machine_slug()
    found = device if cluster and device in ("cpu", "cuda") else pick_device(device, several=True)
    return Planner(with_dense(chosen), load_registry(), name, command_line(), found)


def _requests(planner: Planner, suite: str, only: str | None) -> list[RunRequest]:
    """The runs asked for; text that is both trained on and evaluated is named."""
    from prunebench.bench.specs import run_label

    requests = planner.requests()
    for evaluation, tasks in sorted({_missing(spec) for request in requests for spec in request.spec.evals}):
        if tasks:
            said = f"{evaluation}: the data of {tasks} are not here, so it will have no mean."
            terminal.print(escape(said), style="yellow")
    for found in planner.overlaps:
        share = f"{found.share:.2%} of the 13-grams of {found.evaluation} are in the training text {found.training}."
        terminal.print(escape(share), style="dim" if found.share < 0.01 else "yellow")
    return _with_text(requests, [run_label(request.spec) for request in requests], suite, only)


def _missing(spec: EvalSpec) -> tuple[str, str]:
    """An evaluation, and the tasks of its set that cannot be had."""
    names = spec.conditions.get("missing")
    return spec.text, ", ".join(map(str, names)) if isinstance(names, list) else ""


def _with_text(runs: list[_Run], labels: list[str], suite: str, only: str | None) -> list[_Run]:
    """The runs that `--only` leaves."""
    if only is None:
        return runs
    found = [run for run, label in zip(runs, labels, strict=True) if only in label]
    if not found:
        raise RequestError(f"no run of {suite} contains {only!r}; runs are called, for example, {labels[-1]!r}.")
    return found


def _show_plan(
    planner: Planner,
    suite: str,
    only: str | None,
    store: ResultStore,
    again: bool,
    endings: Collection[str],
    here: bool,
    keep: Keeping | None,
) -> list[RunRequest]:
    """Print what would be run, without changing or downloading anything that takes long, and give the runs, where known."""
    from prunebench.bench.estimate import known_work
    from prunebench.bench.outline import downloads, outlined_work
    from prunebench.bench.preview import Preview
    from prunebench.bench.preview_text import print_preview
    from prunebench.bench.specs import run_label
    from prunebench.bench.sweep import split_settled

    requests: list[RunRequest] = []
    wanted, records = downloads(planner), [stored.record for stored in store.latest()]
    if wanted:
        outlined = outlined_work(planner)
        todo, done = _with_text(outlined, [run_label(work) for work in outlined], suite, only), []
    else:
        requests, settled = split_settled(_requests(planner, suite, only), records, planner.machine, again, endings)
        todo, done = (known_work(runs, planner.registry) for runs in (requests, settled))
    print_preview(Preview(planner, records, store.items, wanted, todo, done, here), terminal)
    if keep:
        _tell_kept(keep, todo, [work.id for work in done if work.id], records, planner.machine, store.folder)
    return requests


def _show_scripts(executor: Executor, requests: list[RunRequest]) -> None:
    """Print what Slurm would be given."""
    from prunebench.bench.slurm_executor import SlurmExecutor

    assert isinstance(executor, SlurmExecutor)
    if not requests:
        terminal.print("\nNothing would be submitted now: nothing is to do, or what it needs has to be downloaded first.")
    for script in executor.batch_scripts(requests):
        terminal.print("\nWould be submitted:")
        typer.echo(script)

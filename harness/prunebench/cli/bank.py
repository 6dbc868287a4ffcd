"""`prunebench rescore`, and what `run --keep-masks` says of what it will keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.program import Allow, Device, Machine, Results, app, command_line, open_store, terminal
from prunebench.cli.running import swept
from prunebench.errors import RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.results.records import RunRecord

MOST_IDS = 6
"""Runs that are named with the reason why they cannot be scored again."""


@app.command()
def rescore(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of runs, or their first digits.")] = None,
    evals: Annotated[list[str] | None, typer.Option("--eval", help="NAME[opt=value,…]; may be given several times.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every run that kept what it takes.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure also what is there; earlier records are kept.")] = False,
    results: Results = Path("results"),
    model: Annotated[str | None, typer.Option("--model", help="The dense model's folder, where it has moved.")] = None,
    machine: Machine = None,
    device: Device = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Sequences at a time.", show_default="as the run had")
    ] = None,
    executor: Annotated[str, typer.Option("--executor", help="subprocess (a fresh process a run) or inline.")] = "subprocess",
    allow: Allow = None,
) -> None:
    """Evaluate the masks of earlier runs under new conditions, without pruning again.

    Example: prunebench rescore 3f2a --eval 'perplexity[data=text.txt,window=256]'
    """
    from prunebench.bench.commands import checked_allowed
    from prunebench.bench.executors import make_executor
    from prunebench.bench.machine import machine_slug
    from prunebench.bench.plan import pick_device
    from prunebench.bench.rescorings import Rescorer, chosen
    from prunebench.plugins import load_registry
    from prunebench.results.content import slug

    if bool(ids) == everything or not evals:
        raise RequestError("rescore takes the ids of runs, or --all, and what to measure with --eval.")
    if executor not in ("subprocess", "inline"):
        raise RequestError(f"--executor of rescore is subprocess or inline, not {executor!r}.")
    store, name = open_store(results), slug(machine) if machine else machine_slug()
    allowed = checked_allowed(tuple(allow or ()))
    rescorer = Rescorer(
        store, load_registry(), tuple(evals), name, command_line(), pick_device(device), model, batch_size, allowed
    )
    stored = store.all()
    plan = rescorer.plan(chosen(stored, ids or (), name), [item.record for item in stored], again)
    if plan.left_out and not everything:
        record, reason = plan.left_out[0]
        raise RequestError(f"the run {record.id} cannot be scored again: {reason}.")
    _tell_left_out(plan.left_out)
    if not plan.todo and not plan.done:
        raise RequestError(f"no run in {results} can be scored again.")
    swept(list(plan.todo), plan.done, store, make_executor(executor, None, rescorer.device, results), again)


def _tell_left_out(left_out: Sequence[tuple[RunRecord, str]]) -> None:
    """A line for each reason why runs cannot be scored again."""
    reasons: dict[str, list[str]] = {}
    for record, reason in left_out:
        reasons.setdefault(reason, []).append(record.id)
    for reason, found in reasons.items():
        more = f" and {len(found) - MOST_IDS} more" if len(found) > MOST_IDS else ""
        terminal.print(
            escape(f"cannot be scored again: {', '.join(found[:MOST_IDS])}{more}: {reason}."), style="yellow", soft_wrap=True
        )

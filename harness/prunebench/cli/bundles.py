"""`prunebench submit` and `verify`."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.program import Device, Results, app, complaints, open_store, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.results.store import Stored


@app.command()
def submit(
    out: Annotated[Path, typer.Option("--out", help="The bundle to write, a zip file.")],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Ids of runs, or their first digits; all without.")
    ] = None,
    results: Results = Path("results"),
    only: Annotated[str | None, typer.Option("--only", help="Only runs whose label contains this.")] = None,
    suite: Annotated[str | None, typer.Option("--suite", help="Only runs of this suite.")] = None,
) -> None:
    """Pack records with their raw answers and masks into one file, for handing in.

    Example: prunebench submit --suite small --out bundle.zip
    """
    from prunebench.plugins import load_registry
    from prunebench.results.board import is_outdated
    from prunebench.results.bundle import write_bundle
    from prunebench.show_examination import print_contents

    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to hand in.")
    store = open_store(results)
    latest = store.latest()
    chosen = _chosen(latest, tuple(ids or ()), only, suite)
    if not chosen:
        raise RequestError(f"no run in {results} is one of those asked for.")
    revisions = load_registry().revisions()
    outdated = [stored.record.id for stored in chosen if is_outdated(stored.record, revisions)]
    print_contents(write_bundle(store, chosen, out, outdated), str(out), terminal)


def _chosen(latest: list[Stored], ids: tuple[str, ...], only: str | None, suite: str | None) -> list[Stored]:
    """The runs that were asked for.

    Raises:
        RequestError: an id is of none.
    """
    from prunebench.results.leaderboard import describe

    for run_id in ids:
        if not any(stored.record.id.startswith(run_id) for stored in latest):
            raise RequestError(f"no run has an id that begins with {run_id!r}.")
    return [
        stored
        for stored in latest
        if (not ids or stored.record.id.startswith(ids))
        and (only is None or only in describe(stored.record))
        and (suite is None or stored.record.provenance.suite == suite)
    ]


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a folder of results.")],
    results: Results = Path("results"),
    model: Annotated[list[str] | None, typer.Option("--model", help="A dense model's folder, for replaying.")] = None,
    data: Annotated[list[Path] | None, typer.Option("--data", help="A folder with texts and tasks that runs used.")] = None,
    replay: Annotated[bool, typer.Option("--replay/--no-replay", help="Answer and prune a sample again.")] = True,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="What to replay is drawn by it.", show_default="drawn")
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Take what is sound into --results, with a verdict.")] = False,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Check records that somebody hands in: checksums, conditions, arithmetic, masks, plausibility, and a sample made again.

    The exit code is 1 where something is wrong. What is merely odd is said, and somebody should explain it.

    Example: prunebench verify bundle.zip
    """
    from prunebench import __version__
    from prunebench.bench.plan import pick_device
    from prunebench.bench.verifying import Request, verified
    from prunebench.results.accepting import accept as accepted
    from prunebench.results.accepting import check_place
    from prunebench.show_examination import examination_json, print_examination

    drawn = secrets.randbelow(1 << 32) if seed is None else seed
    into = bundle if bundle.is_dir() else results
    if accept:
        check_place(into)
    request = Request(bundle, results, tuple(model or ()), tuple(data or ()), replay, drawn, pick_device(device))
    with complaints.status("reading") as status:

        def show(what: str, done: int, total: int) -> None:
            status.update(escape(f"{what} {done} of {total}"))

        with verified(request, open_store, show) as found:
            status.stop()
            if as_json:
                typer.echo(json.dumps(examination_json(found, drawn), indent=1))
            else:
                print_examination(found, terminal)
                if replay and model:
                    terminal.print(f"What to replay was drawn by --seed {drawn}.", style="dim")
            if accept and not found.failed:
                added = accepted(found, open_store(into), drawn, __version__)
                if not as_json:
                    verdicts = f"the verdicts on all {len(found.entries)}"
                    terminal.print(f"Accepted into {escape(str(into))}: {len(added)} new records, and {verdicts}.")
            if found.failed:
                raise typer.Exit(1)

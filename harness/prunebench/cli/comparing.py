"""`prunebench compare` and `advise`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.naming import introduce, named
from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError

STANDARD = "standard-1"
"""The suite whose methods anybody can run on any model."""


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run's id or its first digits, or a folder of results.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another's, or the folder as it is now.")],
    results: Results = Path("results"),
    costs: Annotated[bool, typer.Option("--costs", help="Of folders: slower or larger counts as worsened.")] = False,
    least: Annotated[
        float, typer.Option("--least", min=0, help="Of folders: per cent, of accuracies points, below which a change is none.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Of folders: everything, as JSON.")] = False,
) -> None:
    """Compare two rows of the board item by item, or two folders: what worsened, improved, vanished and appeared.

    Of two folders the exit code is 1 where something worsened beyond noise.

    Example: prunebench compare 3f2a 91bc
    """
    folders = [bool(name) and Path(name).is_dir() for name in (first, second)]
    if any(folders):
        if not all(folders):
            other = second if folders[0] else first
            raise RequestError(f"{other!r} is no folder, and the other is: compare two folders, or two ids.")
        _compare_folders(Path(first), Path(second), costs, least, as_json)
        return
    if costs or least or as_json:
        raise RequestError(f"--costs, --least and --json are for two folders, and neither {first!r} nor {second!r} is one.")
    _compare_rows(first, second, results)


def _compare_folders(before: Path, after: Path, costs: bool, least: float, as_json: bool) -> None:
    from prunebench.results.folders import changes
    from prunebench.results.matching import Folder
    from prunebench.show_changes import print_changes

    folders = []
    for path in (before, after):
        store = open_store(path)
        records = [stored.record for stored in store.latest()]
        if not records:
            raise RequestError(f"the folder {path} holds no records: name a results folder, which has one folder a machine.")
        folders.append(Folder(records, store.items))
    found = changes(folders[0], folders[1], least)
    if not any(change.before and change.after for change in found.rows):
        raise RequestError(
            f"{before} and {after} have no row in common that was measured under the same conditions: "
            "`prunebench explain` says of two runs why."
        )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_changes(found, costs, terminal)
    if found.worsened(costs):
        raise typer.Exit(1)


def _compare_rows(first: str, second: str, results: Path) -> None:
    from prunebench.results.contest import contests, row_key, row_of
    from prunebench.show import print_contests

    store = open_store(results)
    latest = store.latest()
    records = named(results, latest, first, second)
    if row_key(records[0]) == row_key(records[1]):
        raise RequestError(f"{first} and {second} are of one row, which all seeds of a method are; name a run of another row.")
    everything = [stored.record for stored in latest]
    found = contests(row_of(records[0], everything), row_of(records[1], everything), store.items)
    if not found:
        raise RequestError(
            f"they share no score measured under the same conditions: see `prunebench explain {first} {second}`."
        )
    introduce(records)
    print_contests(found, terminal)


@app.command()
def advise(
    model: Annotated[str, typer.Option("--model", help="A model on the board, a folder, or a name on the Hub.")],
    target: Annotated[str, typer.Option("--target", help="0.5, 2:4, …")],
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", min=0, help="Pruning may take no longer.")] = None,
    max_memory: Annotated[float | None, typer.Option("--max-memory", min=0, help="GiB that pruning may take.")] = None,
    no_training: Annotated[bool, typer.Option("--no-training", help="Nothing that was retrained on text.")] = False,
    machine: Annotated[str | None, typer.Option("--machine", help="Only what was measured on this machine.")] = None,
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say which pruning methods the records speak for, with the evidence, or that there is none.

    Example: prunebench advise --model wiki7m --target 2:4 --no-training
    """
    from prunebench.plugins import load_registry
    from prunebench.results.advice import Question, to_json
    from prunebench.results.advice import advise as advised
    from prunebench.results.dominance import Limits
    from prunebench.show_advice import print_advice
    from prunebench.targets import parse_target

    wanted = str(parse_target(target))
    if wanted == "dense":
        raise RequestError("the target dense prunes nothing, so no method is better than another.")
    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to ask.")
    store = open_store(results)
    question = Question(
        model=model,
        target=wanted,
        weights=_weights_of(model),
        limits=Limits(max_seconds, None if max_memory is None else max_memory * (1 << 30), no_training),
        machine=machine,
    )
    found = advised(question, store.latest(), load_registry().revisions(), store.items)
    methods, commands = _to_run(model, wanted)
    missing = found.missing(methods)
    if as_json:
        typer.echo(json.dumps(to_json(found, missing), indent=1, allow_nan=False))
    else:
        print_advice(found, [commands[method] for method in missing if method in commands], terminal)


def _weights_of(model: str) -> str | None:
    """The hash of a model's weights where its folder is at hand."""
    if not (Path(model) / "config.json").is_file():
        return None
    from prunebench.toolkit.loading import identify, resolve_model

    # A pickle is hashed here, and not opened.
    return identify(resolve_model(model, [Path()], allowed=frozenset({"pickle"}))).weights


def _to_run(model: str, target: str) -> tuple[list[str], dict[str, str]]:
    """The methods that the standard suite measures, and for each what would show the cost of measuring it on this model; no
    commands where the suite has no such target."""
    from prunebench.bench.suite import load_suite
    from prunebench.show_advice import command_for
    from prunebench.targets import parse_target

    suite = load_suite(STANDARD)
    methods = [method for entry in suite.method if (method := " + ".join(entry.steps)) != "dense"]
    if target not in {str(parse_target(text)) for text in suite.grid.targets}:
        return methods, {}
    return methods, {method: command_for(STANDARD, model, method) for method in methods}

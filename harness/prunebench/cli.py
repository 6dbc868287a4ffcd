"""The `prunebench` command. Heavy modules are imported inside the commands, so that `--help` is instant."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from prunebench.errors import PluginError, PrunebenchError, RequestError

if TYPE_CHECKING:
    from prunebench.bench.plan import RunRequest
    from prunebench.results.store import ResultStore

app = typer.Typer(
    name="prunebench",
    help="Benchmark pruning methods for language models: one protocol, every method a plugin, every number with its evidence.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",  # in rich's own markup, NAME[opt=value] would lose its brackets
    pretty_exceptions_enable=False,
)

Results = Annotated[Path, typer.Option("--results", help="The folder of records.", show_default=True)]
Machine = Annotated[str | None, typer.Option("--machine", help="Record under this machine's name (default: the hardware's).")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 on CPU and bfloat16 on CUDA by default.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time.")]
Allow = Annotated[list[str] | None, typer.Option("--allow", help="Allow `pickle` or `remote-code` for this model.")]

INTERRUPTED = 130

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""What Typer raises for a wrong command line; its own name for it is not public."""

_out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
_err = Console(stderr=True, highlight=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        import prunebench

        typer.echo(prunebench.__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Show the version and stop.", callback=_show_version, is_eager=True)]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,  # read by `main`
    version: Version = False,  # its callback has shown it
) -> None:
    """The options before the command."""


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
        print_listing(listing, _out)


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
    store = _store(results)
    requests = _plan(suite, model, method, only, machine, device, timeout)
    todo, done = split_settled(requests, store, requests[0].machine, again)
    if dry_run:
        _print_plan(todo, done)
        return
    store.check_writable()
    display = SweepDisplay(_out)
    display.started(len(todo), len(done))
    try:
        summary = sweep(todo, store, chosen, display, again)
    finally:
        display.close()
        chosen.close()
    failed, refused = summary.count("failed"), summary.count("refused")
    if todo:
        elsewhere = f", {summary.elsewhere} done by another command" if summary.elsewhere else ""
        _out.print(
            f"{summary.count('ok')} ok, {refused} refused, {failed} failed{elsewhere}; records in {escape(str(results))}."
        )
    if failed:
        raise typer.Exit(1)


@app.command()
def show(
    record_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a run, or its first digits.")],
    results: Results = Path("results"),
) -> None:
    """Show one record, readable.

    Example: prunebench show 3f2a
    """
    from prunebench.show import print_record

    found = [stored for stored in _store(results).all() if stored.record.id.startswith(record_id)]
    if not found:
        raise RequestError(f"no record in {results} has an id that begins with {record_id!r}.")
    for stored in found:
        print_record(stored.record, stored.path, _out)


@app.command()
def report(
    results: Results = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", help="Write the board as Markdown to this file.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the board as an SVG picture.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only sections whose title contains this.")] = None,
) -> None:
    """Make the leaderboard from the records.

    Example: prunebench report --out leaderboard.md
    """
    from prunebench.plugins import load_registry
    from prunebench.results.board import build_board
    from prunebench.results.files import write_text
    from prunebench.results.leaderboard import to_markdown
    from prunebench.show import draw_board, print_board

    revisions = {name: entry.cls.revision for name, entry in load_registry().pruners.items()}
    store = _store(results)
    board = build_board(store.latest(), revisions, store.items).only(only or "")
    print_board(board, _out)
    for path, text in ((out, to_markdown), (picture, draw_board)):
        if path is not None:
            write_text(path, text(board))
            _out.print(f"\nWritten to {escape(str(path))}.")


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name.")],
    step: Annotated[list[str], typer.Option("--step", help="NAME[opt=value,…]; several are taken in order.")],
    target: Annotated[str, typer.Option("--target", help="0.5 (share of zeros), or 2:4 (survivors:group).")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must be empty or absent.")],
    calibration: Annotated[str, typer.Option("--calibration", help="c4, wikitext2, OWNER/NAME or FILE.txt.")] = "c4",
    calibration_tokens: Annotated[Path | None, typer.Option("--calibration-tokens", help="FILE.npy, used as it is.")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Calibration sequences.")] = 128,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens a sequence (default: the context, up to 2048).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="For sampling, and for methods that draw.")] = 0,
    training: Annotated[str | None, typer.Option("--training", help="Training text, for steps that train.")] = None,
    training_tokens: Annotated[int, typer.Option("--training-tokens", min=1, help="Tokens of training text.")] = 409_600,
    revision: Annotated[str | None, typer.Option("--revision", help="The commit of a Hub model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: BatchSize = 8,
    allow: Allow = None,
) -> None:
    """Prune a model and write it as a normal Hugging Face folder, with its record and its masks.

    Example: prunebench prune quickstart/wiki7m --step wanda --target 2:4 --calibration text.txt --length 256 --out pruned
    """
    from prunebench.bench.commands import PruneOptions, prune_to_folder
    from prunebench.show import print_record

    if calibration_tokens is not None and calibration_tokens.suffix != ".npy":
        raise RequestError(f"--calibration-tokens takes a file whose name ends with .npy, not {str(calibration_tokens)!r}.")
    options = PruneOptions(
        model=model,
        steps=tuple(step),
        target=target,
        out=out,
        calibration=str(calibration_tokens) if calibration_tokens else calibration,
        samples=samples,
        length=length,
        seed=seed,
        training=training,
        training_tokens=training_tokens,
        revision=revision,
        dtype=dtype,
        device=device,
        batch_size=batch_size,
        allowed=tuple(allow or ()),
        command=_command(),
    )
    with _out.status("pruning") as status:
        record = prune_to_folder(options, lambda what, done, total: status.update(escape(f"{what} {done} of {total}")))
    print_record(record, str(out / "prunebench.json"), _out)
    if record.status == "refused":
        raise RequestError(f"{record.reason} Nothing was written.")
    if record.status == "failed":
        reason = " ".join((record.reason or "the run failed").split()).rstrip(".")
        _err.print(f"error: {escape(reason)}. Nothing was written.", soft_wrap=True)
        raise typer.Exit(1)


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name.")],
    evals: Annotated[list[str] | None, typer.Option("--eval", help="NAME[opt=value,…]; may be given several times.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The commit of a Hub model.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    batch_size: BatchSize = 8,
    allow: Allow = None,
) -> None:
    """Evaluate a model, pruned or not.

    Example: prunebench eval pruned --eval 'perplexity[data=text.txt,window=256]' --json
    """
    from prunebench.bench.commands import evaluate_model

    scores = evaluate_model(model, evals or ["perplexity"], revision, dtype, device, batch_size, tuple(allow or ()))
    if as_json:
        kept = {"items", "items_file", "items_hash"}
        plain = {name: score.model_dump(mode="json", exclude=kept) for name, score in scores.items()}
        typer.echo(json.dumps({"scores": plain}, indent=1))
        return
    for name, score in scores.items():
        shown = "no mean" if score.value is None else f"{score.value:.6g}"
        _out.print(f"{escape(name)}: {shown}  ({score.seconds:.1f} s)")
        for part, value in score.parts.items():
            _out.print(f"  {escape(part)}: {value:.4g}")
        _out.print("  " + escape(", ".join(f"{key}={value}" for key, value in score.conditions.items())), style="dim")


def main() -> None:
    """Run the command; a user's mistake is one sentence and exit code 2."""
    debug = "--debug" in sys.argv
    try:
        code = app(standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    except PrunebenchError as error:
        if debug:
            traceback.print_exc()
        _err.print(f"error: {escape(str(error))}", soft_wrap=True)
        sys.exit(2 if isinstance(error, RequestError | PluginError) else 1)
    if code == INTERRUPTED:
        _err.print("interrupted; finished runs are kept, and the same command goes on from here.")
    sys.exit(code if isinstance(code, int) else 0)


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
    planner = Planner(with_dense(chosen), load_registry(), name, _command(), pick_device(device))
    requests = planner.requests()
    for found in planner.overlaps:
        share = f"{found.share:.2%} of the 13-grams of {found.evaluation} are in the training text {found.training}."
        _out.print(escape(share), style="dim" if found.share < 0.01 else "yellow")
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
            _out.print(f"{mark:>6}  {request.spec.id}  {escape(run_label(request.spec))}")
    _out.print(f"{len(todo)} to do, {len(done)} done; nothing was run.")


def _store(results: Path) -> ResultStore:
    from prunebench.results.store import ResultStore

    return ResultStore(results, lambda message: _err.print(f"warning: {escape(message)}", soft_wrap=True))


def _command() -> str:
    return shlex.join(["prunebench", *sys.argv[1:]])


if __name__ == "__main__":
    main()

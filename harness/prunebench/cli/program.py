"""What the commands share: the program, its options, where it prints, and how it ends."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from prunebench.errors import PluginError, PrunebenchError, RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
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
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, cuda:0+1 (default: cuda where there is one).")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 on CPU and bfloat16 on CUDA by default.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Sequences at a time.")]
Allow = Annotated[list[str] | None, typer.Option("--allow", help="Allow `pickle` or `remote-code` for this model.")]

INTERRUPTED = 130

_UsageError: type[Exception] = typer.BadParameter.__mro__[2]
"""What Typer raises for a wrong command line; its own name for it is not public."""

terminal = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 120)
complaints = Console(stderr=True, highlight=False, emoji=False)


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
        complaints.print(f"error: {escape(str(error))}", soft_wrap=True)
        sys.exit(2 if isinstance(error, RequestError | PluginError) else 1)
    if code == INTERRUPTED:
        complaints.print("interrupted; finished runs are kept, and the same command goes on from here.")
    sys.exit(code if isinstance(code, int) else 0)


def open_store(results: Path) -> ResultStore:
    """The folder of records; what cannot be read there is named."""
    from prunebench.results.store import ResultStore

    return ResultStore(results, warn)


def warn(message: str) -> None:
    """Say on stderr what is wrong and stops nothing."""
    complaints.print(f"warning: {escape(message)}", soft_wrap=True)


def command_line() -> str:
    """What was typed, for the record."""
    return shlex.join(["prunebench", *sys.argv[1:]])

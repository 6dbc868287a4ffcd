"""`prunebench check` and `new`: for those who write a pruner."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from prunebench.cli.program import app, terminal
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.checking import Report

_STYLES = {"passed": "green", "failed": "bold red", "excused": "yellow", "declined": "dim"}
FEW = 3
"""Families that a law was kept on, and that are still named."""

_WORDS = {"declined": "not asked"}


@app.command()
def check(
    pruner: Annotated[str, typer.Argument(metavar="NAME", help="NAME[opt=value,…] of a pruner, or module:Class.")],
    family: Annotated[list[str] | None, typer.Option("--family", help="Only on this family of tiny models.")] = None,
    law: Annotated[list[str] | None, typer.Option("--check", help="Only this law.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds a law may take on one family.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Put a pruner to the laws of the conformance kit: exit code 1 when it breaks one that it does not excuse.

    Example: prunebench check wanda
    """
    from prunebench.children import PRELOAD, start_server

    start_server(*PRELOAD)  # it imports torch while this process does
    from prunebench.checking import check as checked

    with terminal.status("loading") as status:

        def started(name: str, on: str, done: int, total: int) -> None:
            status.update(escape(f"{name} on {on}, {done + 1} of {total}"))

        report = checked(pruner, family or None, law or None, timeout, started)
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(report), "counts": report.counts}, indent=1))
    else:
        _print_report(report)
    if report.counts["failed"]:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The pruner's name, and its package's.")],
    folder: Annotated[Path, typer.Option("--dir", help="The folder that gets the package's.", show_default=True)] = Path(),
) -> None:
    """Write a small installable package with a pruner that works, its tests, and what to type next.

    Example: prunebench new my-pruner
    """
    from prunebench.scaffold import write_package

    written = write_package(name, folder)
    terminal.print(f"Written to {escape(str(written.folder))}:")
    for file in written.files:
        terminal.print(f"  {escape(file)}")
    terminal.print("\nNext:", style="bold")
    for command in (f"cd {shlex.quote(str(written.folder))}", *written.commands):
        terminal.print(f"  {escape(command)}", soft_wrap=True)


def _print_report(report: Report) -> None:
    """One line for a law and an outcome, with the families that share it; then the totals."""
    origin = f"{report.distribution} {report.version}, revision {report.revision}"
    terminal.print(f"[bold]{escape(report.pruner)}[/]  [dim]{escape(origin)}[/]\n")
    shared: dict[tuple[str, str, str], list[tuple[str, float]]] = {}
    for result in report.results:
        key = (result.check, result.outcome, result.message)
        shared.setdefault(key, []).append((result.family, result.seconds))
    grid = Table.grid(padding=(0, 2))
    for name in ("law", "outcome", "seconds", "families and reason"):
        grid.add_column(justify="right" if name == "seconds" else "left", no_wrap=not name.startswith("families"))
    laws = list(dict.fromkeys(result.check for result in report.results))
    for (name, outcome, message), on in sorted(shared.items(), key=lambda item: laws.index(item[0][0])):
        many = outcome == "passed" and len(on) > FEW
        style, families = _STYLES[outcome], f"{len(on)} families" if many else ", ".join(family for family, _ in on)
        seconds = f"{sum(taken for _, taken in on):.1f} s"
        said = f"[dim]{escape(families)}[/]" + (f": {escape(message)}" if message else "")
        grid.add_row(escape(name), f"[{style}]{_WORDS.get(outcome, outcome)}[/]", seconds, said)
    terminal.print(grid)
    totals = ", ".join(f"{count} {_WORDS.get(outcome, outcome)}" for outcome, count in report.counts.items())
    terminal.print(f"\n{totals}; {report.seconds:.1f} s")

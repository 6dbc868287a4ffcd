"""`prunebench show` and `explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.naming import introduce, named
from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError


@app.command()
def show(
    record_id: Annotated[str, typer.Argument(metavar="ID", help="The id of a run, or its first digits.")],
    results: Results = Path("results"),
) -> None:
    """Show one record, readable.

    Example: prunebench show 3f2a
    """
    from prunebench.show import print_record

    found = [stored for stored in open_store(results).all() if stored.record.id.startswith(record_id)]
    if not found:
        raise RequestError(f"no record in {results} has an id that begins with {record_id!r}.")
    for stored in found:
        print_record(stored.record, stored.path, terminal)


@app.command()
def explain(
    first: Annotated[str, typer.Argument(metavar="A", help="The id of a run, or its first digits; or MACHINE/ID.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another's.")],
    results: Results = Path("results"),
) -> None:
    """Say field by field why the scores of two runs may or may not be compared.

    Example: prunebench explain 3f2a 91bc
    """
    from prunebench.results.explain import explain as explained
    from prunebench.show import print_explanations

    records = named(results, open_store(results).latest(), first, second)
    found = explained(*records)
    introduce(records)
    if not found:
        terminal.print("They share no evaluation, so there is nothing to compare.")
    print_explanations(found, terminal)

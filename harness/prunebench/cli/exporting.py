"""`prunebench export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder, or one of an earlier export.")],
    results: Results = Path("results"),
) -> None:
    """Write the records as a data set: Parquet files with a card, for `datasets.load_dataset(DIR)` and data frames.

    Example: prunebench export records
    """
    from prunebench.plugins import load_registry
    from prunebench.results.dataset import check_folder, write_dataset
    from prunebench.results.verdicts import Verdicts

    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to export.")
    check_folder(folder)
    records = [stored.record for stored in open_store(results).latest()]
    counts = write_dataset(folder, records, load_registry().revisions(), Verdicts.of(results).grade)
    rows = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    terminal.print(f"Written to {escape(str(folder))}; rows: {rows}.", soft_wrap=True)

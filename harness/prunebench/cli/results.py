"""`prunebench show`, `explain`, `compare` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.results.records import RunRecord
    from prunebench.results.store import Stored


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

    records = _named(results, open_store(results).latest(), first, second)
    found = explained(*records)
    _introduce(records)
    if not found:
        terminal.print("They share no evaluation, so there is nothing to compare.")
    print_explanations(found, terminal)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The id of a run, or its first digits; all its seeds count.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another's.")],
    results: Results = Path("results"),
) -> None:
    """Compare two rows of the board item by item: difference, interval, p, flips, and what could have been shown.

    Example: prunebench compare 3f2a 91bc
    """
    from prunebench.results.contest import contests, row_key, row_of
    from prunebench.show import print_contests

    store = open_store(results)
    latest = store.latest()
    records = _named(results, latest, first, second)
    if row_key(records[0]) == row_key(records[1]):
        raise RequestError(f"{first} and {second} are of one row, which all seeds of a method are; name a run of another row.")
    everything = [stored.record for stored in latest]
    found = contests(row_of(records[0], everything), row_of(records[1], everything), store.items)
    if not found:
        raise RequestError(
            f"they share no score measured under the same conditions: see `prunebench explain {first} {second}`."
        )
    _introduce(records)
    print_contests(found, terminal)


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
    from prunebench.results.beside import beside, counts
    from prunebench.results.board import build_board
    from prunebench.results.files import write_text
    from prunebench.results.leaderboard import to_markdown
    from prunebench.results.published import load_published
    from prunebench.show import draw_board, print_board

    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to make a board of.")
    revisions = load_registry().revisions()
    store = open_store(results)
    latest = store.latest()
    whole = build_board(latest, revisions, store.items)
    board = whole.only(only or "")
    if whole.sections and not board.sections:
        raise RequestError(f"no section's title contains {only!r}; titles are, for example, {whole.sections[0].title!r}.")
    papers, old = results / "published", {record.id for record in board.outdated}
    present = [stored.record for stored in latest if stored.record.id not in old]
    placed = beside(load_published(papers), present) if papers.is_dir() else []
    print_board(board, terminal)
    if placed and not only:
        terminal.print(f"\n{counts(placed)}")
    for path, text in ((out, lambda board: to_markdown(board, placed)), (picture, draw_board)):
        if path is not None:
            write_text(path, text(board))
            terminal.print(f"\nWritten to {escape(str(path))}.")


def _named(results: Path, latest: list[Stored], *ids: str) -> list[RunRecord]:
    """The runs with these ids among the latest of a folder.

    Raises:
        RequestError: there is none, or more than one, or it has no scores.
    """
    records, found = [stored.record for stored in latest], []
    for run_id in ids:
        matching = [r for r in records if r.id.startswith(run_id) or f"{r.machine}/{r.id}".startswith(run_id)]
        if len(matching) != 1:
            more = f": {', '.join(f'{record.machine}/{record.id}' for record in matching)}" if 1 < len(matching) <= 4 else ""
            raise RequestError(f"{len(matching) or 'no'} runs in {results} have an id that begins with {run_id!r}{more}.")
        if matching[0].status != "ok":
            raise RequestError(f"the run {run_id} has no scores: it is {matching[0].status}.")
        found.append(matching[0])
    return found


def _introduce(records: list[RunRecord]) -> None:
    from prunebench.results.leaderboard import describe

    for name, record in zip("AB", records, strict=True):
        terminal.print(f"{name}: {escape(describe(record))}")

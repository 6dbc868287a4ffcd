"""`prunebench show`, `explain` and `report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from prunebench.cli.naming import introduce, named
from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape


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


@app.command()
def report(
    results: Results = Path("results"),
    out: Annotated[Path | None, typer.Option("--out", help="Write the board as Markdown to this file.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the board as an SVG picture.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write all rows as CSV, a line each.")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="Write LaTeX tables (booktabs), ready for a paper.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the board as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write one HTML file that opens offline.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Draw all figures into this folder, as SVG and PNG.")] = None,
    covers: Annotated[Path | None, typer.Option("--covers", help="Draw the README's two into this folder.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Only sections whose title contains this.")] = None,
) -> None:
    """Make the leaderboard from the records.

    Example: prunebench report --out leaderboard.md
    """
    from prunebench.plugins import load_registry
    from prunebench.results.beside import about, beside, counts
    from prunebench.results.board import build_board
    from prunebench.results.exports import to_json
    from prunebench.results.files import write_text
    from prunebench.results.latex import to_latex
    from prunebench.results.leaderboard import to_markdown
    from prunebench.results.published import load_published
    from prunebench.results.sheet import to_csv
    from prunebench.results.verdicts import Verdicts
    from prunebench.show import draw_board, print_board

    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to make a board of.")
    revisions = load_registry().revisions()
    store = open_store(results)
    latest = store.latest()
    grade = Verdicts.of(results).grade
    whole = build_board(latest, revisions, store.items, grade)
    board = whole.only(only or "")
    if whole.sections and not board.sections:
        raise RequestError(f"no section's title contains {only!r}; titles are, for example, {whole.sections[0].title!r}.")
    papers, old = results / "published", {record.id for record in board.outdated}
    present = [stored.record for stored in latest if stored.record.id not in old]
    placed = beside(load_published(papers), present) if papers.is_dir() else []
    if only:
        placed = about(placed, [section.conditions for section in board.sections])
    print_board(board, terminal)
    if placed:
        terminal.print(f"\n{counts(placed)}")
    writers: tuple[tuple[Path | None, Callable[[], str]], ...] = (
        (out, lambda: to_markdown(board, placed)),
        (picture, lambda: draw_board(board)),
        (csv, lambda: to_csv(board)),
        (latex, lambda: to_latex(board)),
        (as_json, lambda: to_json(board, placed)),
    )
    for path, text in writers:
        if path is not None:
            write_text(path, text())
            terminal.print(f"\nWritten to {escape(str(path))}.")
    if html is not None or plots is not None or covers is not None:
        from prunebench.report.figures import figures_of
        from prunebench.report.page import to_html
        from prunebench.report.plots import write_covers, write_plots

        figures = figures_of(board, present, placed, store.masks, store.items)
        if html is not None:
            records = [stored.record for stored in latest]
            write_text(html, to_html(board, records, figures, placed, grade))
            terminal.print(f"\nWritten to {escape(str(html))}.")
        if plots is not None:
            _list(plots, write_plots(figures, plots))
        if covers is not None:
            _list(covers, write_covers(figures, covers))


def _list(folder: Path, written: list[Path]) -> None:
    """Say what was drawn."""
    terminal.print(f"\nDrawn into {escape(str(folder))}: {len(written)} files.")
    for path in written:
        terminal.print(f"  {escape(path.name)}", soft_wrap=True)

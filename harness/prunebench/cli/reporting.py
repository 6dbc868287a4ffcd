"""`prunebench report`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prunebench.cli.program import Results, app, open_store, terminal
from prunebench.errors import RequestError
from prunebench.plain import escape

if TYPE_CHECKING:
    from prunebench.report.figures import Figures
    from prunebench.results.beside import Beside
    from prunebench.results.board import Board
    from prunebench.results.records import RunRecord
    from prunebench.results.store import ResultStore
    from prunebench.results.verdicts import Verdicts


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
    from prunebench.results.beside import counts
    from prunebench.results.files import write_text
    from prunebench.show import print_board

    if not results.is_dir():
        raise RequestError(f"there is no folder {results}, so there are no records to make a board of.")
    _check_places((out, picture, csv, latex, as_json, html), (plots, covers))
    made = _made(results, only)
    print_board(made.board, terminal)
    if made.placed:
        terminal.print(f"\n{counts(made.placed)}")
    files = {made.markdown: out, made.picture: picture, made.csv: csv, made.latex: latex, made.json: as_json, made.html: html}
    if made.board.costs:
        files[made.costs] = csv and csv.with_suffix(f".costs{csv.suffix}")
    for text, path in files.items():
        if path is not None:
            write_text(path, text())
            terminal.print(f"\nWritten to {escape(str(path))}.")
    for drawn, folder in {made.plots: plots, made.covers: covers}.items():
        if folder is not None:
            _list(folder, drawn(folder))


@dataclass(frozen=True, eq=False)
class _Made:
    """A board, and what it is written as; each form imports what it takes only when it is asked for."""

    board: Board
    placed: list[Beside]
    """Published numbers of what the board shows."""
    records: list[RunRecord]
    """The latest of each run."""
    store: ResultStore
    verdicts: Verdicts

    @cached_property
    def figures(self) -> Figures:
        from prunebench.report.figures import figures_of

        present = [record for record in self.board.present(self.records) if not record.spec.model.is_shape]
        return figures_of(self.board, present, self.placed, self.store.masks, self.store.items)

    def markdown(self) -> str:
        from prunebench.results.leaderboard import to_markdown

        return to_markdown(self.board, self.placed)

    def picture(self) -> str:
        from prunebench.show import draw_board

        return draw_board(self.board)

    def csv(self) -> str:
        from prunebench.results.sheet import to_csv

        return to_csv(self.board)

    def costs(self) -> str:
        from prunebench.results.costs_export import costs_to_csv

        return costs_to_csv(self.board.costs)

    def latex(self) -> str:
        from prunebench.results.latex import to_latex

        return to_latex(self.board)

    def json(self) -> str:
        from prunebench.results.exports import to_json

        return to_json(self.board, self.placed)

    def html(self) -> str:
        from prunebench.report.page import to_html

        return to_html(self.board, self.records, self.figures, self.placed, self.verdicts.grade)

    def plots(self, folder: Path) -> list[Path]:
        from prunebench.report.plots import write_plots

        return write_plots(self.figures, folder)

    def covers(self, folder: Path) -> list[Path]:
        from prunebench.report.plots import write_covers

        return write_covers(self.figures, folder)


def _made(results: Path, only: str | None) -> _Made:
    """The board of a folder; a RequestError where no section has the text that is asked for in its title."""
    from prunebench.plugins import load_registry
    from prunebench.results.beside import about, beside
    from prunebench.results.board import build_board
    from prunebench.results.published import load_published
    from prunebench.results.published_costs import load_costs
    from prunebench.results.verdicts import Verdicts

    store, verdicts, papers = open_store(results), Verdicts.of(results), results / "published"
    latest = store.latest()
    published = load_costs(papers)
    whole = build_board(latest, load_registry().revisions(), store.items, verdicts.grade, published)
    board = whole.only(only or "")
    if whole.titles and not board.titles:
        raise RequestError(f"no section's title contains {only!r}; titles are, for example, {whole.titles[0]!r}.")
    records = [stored.record for stored in latest]
    placed = beside(load_published(papers), board.present(records)) if papers.is_dir() else []
    if only:
        placed = about(placed, [section.conditions for section in board.sections])
    return _Made(board, placed, records, store, verdicts)


def _check_places(files: Collection[Path | None], folders: Collection[Path | None]) -> None:
    """Raise a RequestError where something could not be written, before the board is made."""
    for path in files:
        if path is not None and path.is_dir():
            raise RequestError(f"{path} cannot be written: it is a folder.")
    for path in (*(path.parent for path in files if path is not None), *(folder for folder in folders if folder is not None)):
        there = next(above for above in (path.absolute(), *path.absolute().parents) if above.exists())
        if not there.is_dir():
            raise RequestError(f"nothing can be written to {path}: {there.name} is no folder.")


def _list(folder: Path, written: list[Path]) -> None:
    """Say what was drawn."""
    terminal.print(f"\nDrawn into {escape(str(folder))}: {len(written)} files.")
    for path in written:
        terminal.print(f"  {escape(path.name)}", soft_wrap=True)

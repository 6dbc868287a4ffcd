"""Pages that are made when the site is built: the commands from the Typer program, methods and evaluations from the registry,
decisions and the map from the library's folder.

MkDocs calls `on_files` (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
HIDDEN = {"install_completion", "show_completion"}
"""Typer's own."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for name, make in PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files


def commands_page() -> str:
    """Every command with its arguments and options, as the program knows them."""
    parts = ["# Commands", "What `prunebench COMMAND --help` says, for every command.", "## prunebench"]
    program = _program()
    parts += [program.help, *_tables(program)]
    for name, command in program.commands.items():
        about, _, example = command.help.partition("Example: ")
        parts += [f"## prunebench {name}", about.strip(), f"```sh\n{example.strip()}\n```", *_tables(command)]
    return "\n\n".join(parts) + "\n"


def methods_page() -> str:
    """The methods and evaluations that prunebench brings, with their options."""
    from prunebench.plugins import load_registry

    registry = load_registry()
    parts = [
        "# Methods and evaluations",
        "What `prunebench list` says of those that come with prunebench. Options are written in brackets: "
        "`wanda`, `magnitude[group=row]`, `perp[subset=norms,steps=200]`.",
    ]
    for title, listing in (("Methods", registry.describe_pruners()), ("Evaluations", registry.describe_evals())):
        parts.append(f"## {title}")
        for name, entry in listing.items():
            if entry["distribution"] != "prunebench":
                continue
            parts += [f"### {name}", _plain(entry["summary"]), f"Revision {entry['revision']}."]
            rows = [(_code(o["name"]), _code(o["default"]), _code(o["type"]), _plain(o["doc"])) for o in entry["options"]]
            parts += _table(("option", "default", "values", "meaning"), rows)
    return "\n\n".join(parts) + "\n"


def files_page() -> str:
    """What stands in the files that `report` and `export` write."""
    from prunebench.results import dataset, exports, sheet

    parts = [
        "# Files of the board and of the records",
        "Numbers are raw: shares and not per cent, seconds, bytes, nothing rounded. Equal records give equal bytes, and "
        "`report --only` applies to all of the board's files.",
        "## CSV",
        "`prunebench report --csv FILE`: a line a row, all sections. A text that begins with `=`, `+`, `-`, `@`, `'` or white "
        "space has an apostrophe in front, so that no spreadsheet computes it; a program removes one.",
        *_table(("column", "meaning"), [(_code(name), _plain(meaning)) for name, meaning in sheet.COLUMNS.items()]),
        "## LaTeX",
        "`prunebench report --latex FILE`: tables that need `booktabs` and nothing else. Bold: nobody is significantly better "
        "at that target, by paired tests with Holm's correction; a dagger marks those of them that have not the best mean.",
        "## JSON",
        f"`prunebench report --json FILE`: the whole board, schema {exports.EXPORT_SCHEMA}; "
        "`prunebench.results.exports.ExportedBoard.model_json_schema()` gives it as JSON Schema.",
    ]
    schema = exports.ExportedBoard.model_json_schema()
    for name, about in {"Board": schema, **schema["$defs"]}.items():
        fields = [(_code(field), _plain(fact["description"])) for field, fact in about.get("properties", {}).items()]
        if fields:
            title = name.removeprefix("Exported")
            parts += [f"### {title}", _plain(about["description"]), *_table(("field", "meaning"), fields)]
    parts.append("## Data set")
    parts.append("`prunebench export DIR`: Parquet files that `datasets.load_dataset(DIR, NAME)` reads, with a card.")
    for name, columns in dataset.TABLES.items():
        rows = [(_code(column.name), column.type, _plain(column.unit), _plain(column.meaning)) for column in columns]
        parts += [f"### `{name}`", *_table(("column", "type", "unit", "meaning"), rows)]
    return "\n\n".join(parts) + "\n"


def map_page() -> str:
    """The map of the library."""
    return (ROOT / "harness" / "README.md").read_text(encoding="utf-8")


def decisions_page() -> str:
    """All decisions, one after the other."""
    pages = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "harness" / "decisions").glob("*.md"))]
    lower = [re.sub(r"^#", "##", page, flags=re.MULTILINE) for page in pages]
    return "\n\n".join(["# Decisions", "Choices that were argued, also what did not work.", *lower]) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/methods.md": methods_page,
    "reference/files.md": files_page,
    "explanation/map.md": map_page,
    "explanation/decisions.md": decisions_page,
}


def _program() -> Any:
    """The program as Typer builds it; its classes have no public names."""
    import typer.main

    from prunebench.cli import program  # with the package, whose modules add their commands

    return typer.main.get_command(program.app)


def _tables(command: Any) -> Iterator[str]:
    """A command's arguments and its options."""
    given = [parameter for parameter in command.params if parameter.name not in HIDDEN]
    for kind in ("argument", "option"):
        chosen = [parameter for parameter in given if parameter.param_type_name == kind]
        rows = [(_code(_spelling(parameter)), _default(parameter), _plain(parameter.help or "")) for parameter in chosen]
        yield from _table((kind, "default", "meaning"), rows)


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return ", ".join(parameter.opts) + (" …" if parameter.multiple else "")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False) else _code(str(parameter.default))


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table in Markdown, or nothing without rows."""
    lines = [headings, ("---",) * len(headings), *rows]
    return ["\n".join(f"| {' | '.join(line)} |" for line in lines)] if len(lines) > 2 else []


def _code(text: str) -> str:
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def _plain(text: str) -> str:
    """A text whose brackets are no links and whose strokes end no cell."""
    return re.sub(r"([\[\]<>])", r"\\\1", " ".join(text.split())).replace("|", "&#124;")

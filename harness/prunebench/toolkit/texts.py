"""Texts by name: data sets of the Hub, the local mirror, text files and token files.

Names: `c4`, `wikitext2`, `owner/name[/config]`, each with an optional `:split`; `FILE.txt`; `FILE.npy`.
Data sets are loaded with `datasets`. Where `PRUNEBENCH_MIRROR` names a folder, the same names resolve there by layout alone
(`datasets/<owner>/<name>/<config, or default>/<split>.jsonl`) and nothing touches the network; what the mirror holds may be an
excerpt, so a source says that it came from there, and its content hash tells it from the full set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

from prunebench.errors import DataError, UnknownNameError, first_line
from prunebench.shipped import suites_folder
from prunebench.spec import JsonDict
from prunebench.toolkit.cache import digest

_HEADING = re.compile(r"^ ?= [^=\n]+ = ?$", re.MULTILINE)


@dataclass(frozen=True)
class _Known:
    """A data set with a short name: where it is, how the field joins its rows, which file is its first shard."""

    repo: str
    config: str
    joining: str
    articles: bool
    shards: tuple[tuple[str, str], ...] = ()
    whole: frozenset[str] = frozenset()
    """Content hashes of complete splits, so that the mirror's copy of one is not called an excerpt."""


KNOWN = {
    "c4": _Known(
        "allenai/c4",
        "en",
        " ",
        False,
        # The first shard only, as every reference does (`methods.md` 1.2); the whole set is 300 GB.
        (("train", "en/c4-train.00000-of-01024.json.gz"), ("validation", "en/c4-validation.00000-of-00008.json.gz")),
    ),
    "wikitext2": _Known("Salesforce/wikitext", "wikitext-2-raw-v1", "\n\n", True, whole=frozenset({"5bb09df7b3f1625d"})),
}


@dataclass(frozen=True)
class DataSet:
    """A split of a data set, as the Hub and the mirror name it, and how its rows become a text."""

    repo: str
    config: str
    split: str
    joining: str
    articles: bool
    shard: str | None = None
    """The one file that is read of it."""


@dataclass(frozen=True)
class Source:
    """Where a text comes from, as a record states it."""

    name: str
    """As the Hub names it (`allenai/c4`), or a file's name."""
    config: str
    split: str
    origin: str
    """`hub`, `mirror` (perhaps an excerpt) or `file`."""
    content: str
    """Hash of the rows."""
    complete: bool
    """False where it may be an excerpt of what the name stands for: the mirror's data, unless the content is known whole."""


@dataclass(frozen=True)
class Text:
    """Rows of text and how they are joined for perplexity."""

    rows: Sequence[str]
    joining: str
    articles: bool
    """Whether headings (`= Title =`) mark the documents, as in WikiText; otherwise a row is a document."""
    source: Source

    def joined(self, limit: int | None = None) -> str:
        """The first `limit` rows as one string."""
        return self.joining.join(self.rows[:limit])

    def document_starts(self, limit: int | None = None) -> list[int]:
        """Where the documents of the first `limit` rows begin in the joined text."""
        rows = self.rows[:limit]
        starts = [0, *accumulate(len(row) + len(self.joining) for row in rows)][: len(rows)]
        if not self.articles:
            return starts
        if len(rows) == 1:  # a file: its headings are lines
            headings = [match.start() for match in _HEADING.finditer(rows[0])]
        else:
            headings = [start for index, start in enumerate(starts) if _is_heading(rows, index)]
        return [0, *headings[1:]]

    def documents(self) -> list[str]:
        """The documents, as they stand in the joined text."""
        if not self.articles:
            return list(self.rows)
        whole, starts = self.joined(), self.document_starts()
        return [whole[start:end] for start, end in zip(starts, [*starts[1:], len(whole)], strict=True)]


def _is_heading(rows: Sequence[str], index: int) -> bool:
    """Whether a row of WikiText opens an article: in 29 articles of its training text a line of a formula looks like one."""
    around = [*rows[max(index - 1, 0) : index], *rows[index + 1 : index + 2]]
    return _HEADING.fullmatch(rows[index].rstrip("\n")) is not None and not any(row.strip() for row in around)


def load_text(name: str, split: str, folder: Path) -> Text:
    """Find a text by name.

    Args:
        name: as in the module's description; a `:split` in it wins over `split`.
        split: the split to take where the name has none.
        folder: where relative file names start.

    Raises:
        DataError: the text is not there, empty, or not readable as UTF-8.
    """
    if name.endswith(".txt"):
        return _load_file(name, folder)
    return _load_dataset(mirror(), find_set(name, split))


def find_set(name: str, split: str) -> DataSet:
    """The data set that a name stands for, and the split of it, whether it is there or not.

    Args:
        name: as in the module's description, no file; a `:split` in it wins over `split`.
        split: the split to take where the name has none.

    Raises:
        UnknownNameError: it is no such name.
    """
    base, _, named_split = name.partition(":")
    split = named_split or split
    base = next((short for short, known in KNOWN.items() if base == f"{known.repo}/{known.config}"), base)
    if base in KNOWN:
        known = KNOWN[base]
        shard = dict(known.shards).get(split)
        return DataSet(known.repo, known.config, split, known.joining, known.articles, shard)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?", base)
    if match is None or name.endswith(".npy"):
        raise UnknownNameError.among("text source", name, [*KNOWN, "OWNER/NAME[/CONFIG]", "FILE.txt", "FILE.npy"])
    articles = match[1] == KNOWN["wikitext2"].repo
    return DataSet(match[1], match[2] or "default", split, "\n\n", articles)


def resolve_file(name: str, folder: Path) -> Path:
    """A file named in a request, relative to `folder`, or shipped: `quickstart/texts/evaluation.txt`.

    Raises:
        DataError: it is not there.
    """
    for place in (folder, suites_folder()):
        path = place / name
        if path.is_file():
            return path
    raise DataError(f"the file {name} does not exist (looked in {folder}).")


def _load_file(name: str, folder: Path) -> Text:
    path = resolve_file(name, folder)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file {name} cannot be read as UTF-8 text: {error}.") from None
    if not content.strip():
        raise DataError(f"the file {name} is empty.")
    return Text([content], "", True, Source(path.name, "", "", "file", digest([content]), True))


def mirror() -> str | None:
    """The folder of the local mirror, or None where data come from the Hub."""
    return os.environ.get("PRUNEBENCH_MIRROR")


@cache
def _load_dataset(mirror: str | None, asked: DataSet) -> Text:
    repo, config, split = asked.repo, asked.config, asked.split
    rows = _from_mirror(Path(mirror), repo, config, split) if mirror else _from_hub(repo, config, split, asked.shard)
    if not any(row.strip() for row in rows):
        raise DataError(f"the data set {repo} ({config}, {split}) holds no text.")
    content = digest(rows)
    whole = not mirror or any(content in known.whole for known in KNOWN.values() if known.repo == repo)
    source = Source(repo, config, split, "mirror" if mirror else "hub", content, whole)
    return Text(rows, asked.joining, asked.articles, source)


def _from_mirror(mirror: Path, repo: str, config: str, split: str) -> list[str]:
    import datasets

    path = mirror / "datasets" / repo / config / f"{split}.jsonl"
    if not path.is_file():
        there = sorted(p.relative_to(mirror / "datasets").as_posix() for p in (mirror / "datasets" / repo).glob("*/*.jsonl"))
        raise DataError(
            f"the mirror holds no {repo}, {config}, {split}: PRUNEBENCH_MIRROR has {', '.join(there[:8]) or 'nothing of it'}."
        )
    try:
        with _QuietDatasets():
            return _text_column(datasets.Dataset.from_json(str(path), keep_in_memory=True), repo)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a cut or foreign file raises one of many kinds, an empty one StopIteration
        reason = str(error.__cause__ or error).strip().splitlines()
        raise DataError(
            f"the mirror's {path.relative_to(mirror / 'datasets').as_posix()} cannot be read as JSON lines: "
            f"{reason[0] if reason else 'it is empty'}."
        ) from None


def _from_hub(repo: str, config: str, split: str, shard: str | None) -> list[str]:
    import datasets

    try:
        with _QuietDatasets():
            if shard:
                table = datasets.load_dataset(repo, data_files={split: shard}, split=split, verification_mode="no_checks")
            else:
                table = datasets.load_dataset(repo, None if config == "default" else config, split=split)
    except Exception as error:  # noqa: BLE001 - the hub's client raises dozens of kinds, all of which mean: not to be had
        raise DataError(
            f"the data set {repo} ({config}, {split}) cannot be loaded from the Hub: {first_line(error)}. "
            "Without a network set PRUNEBENCH_MIRROR to a folder that holds it."
        ) from None
    return _text_column(table, repo)


def _text_column(table: object, repo: str) -> list[str]:
    columns = list(getattr(table, "column_names", []))
    if "text" not in columns:
        raise DataError(f"the data set {repo} has no column 'text'; its columns are {', '.join(columns)}.")
    return ["" if row is None else str(row) for row in table["text"]]  # type: ignore[index]


class _QuietDatasets:
    """Silence the progress bars of `datasets` while loading."""

    def __enter__(self) -> None:
        import datasets

        self._shown = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()

    def __exit__(self, *error: object) -> None:
        import datasets

        if self._shown:
            datasets.enable_progress_bars()


def read_rows(path: Path) -> dict[int, JsonDict]:
    """The rows of a file of JSON lines by the number of their line.

    Raises:
        DataError: it is not there, not such a file, or empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line ends may stand inside a string
    except OSError as error:
        raise DataError(f"the file {path.name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"the file {path.name} is not UTF-8: {error.reason} at byte {error.start}.") from None
    rows = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path.name}, line {number}, is not JSON: {error}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{path.name}, line {number}, is no object with named columns.")
        rows[number] = row
    if not rows:
        raise DataError(f"the file {path.name} is empty.")
    return rows

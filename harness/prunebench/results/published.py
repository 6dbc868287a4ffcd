"""Numbers that papers print, as data: `results/published/*.toml`, read into one typed entry a cell.

A file is a paper, a `[[table]]` one of its tables with what all its cells share, and a row has a value for each column. A
number can be set beside ours (`beside.py`) only where the paper says enough about how it was measured; where it does not, the
entry says what is missing. A cell that repeats another table's is a copy, which confirms nothing.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from prunebench.errors import RequestError, StoreError, did_you_mean
from prunebench.targets import parse_target

MAX_FILE_BYTES = 1 << 20

WHOLE = {
    "wikitext2": {
        "data": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "content": "5bb09df7b3f1625d",
    }
}
"""Complete data sets by the short name that the files use, with the content hash that a run's text must have."""

DATA_FREE = ("dense", "magnitude")
"""Methods that no calibration text reaches, also where a table's other rows have one."""

NO_CELL = "-"

Metric = Literal["perplexity", "accuracy", "mean accuracy"]
Printed = Annotated[StrictInt | StrictStr, Field(union_mode="left_to_right")]
Cells = list[Printed]
Shared = dict[str, Printed | Cells]
"""What all cells of a table have, or a list of one value a column."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishedConditions(_Strict):
    """How a number was measured, as far as its paper or the authors' code says. None is not stated."""

    data: str | None = Field(default=None, description="as the Hub names it")
    config: str | None = None
    split: str | None = None
    content: str | None = Field(default=None, description="hash of the complete data set's rows")
    window: int | None = Field(default=None, description="tokens a window")
    dtype: str | None = None
    harness: str | None = Field(default=None, description="program and version or commit, for tasks")
    task_version: int | None = None
    metric_key: str | None = Field(default=None, description="`acc` or `acc_norm`")
    shots: int | None = None
    limit: int | None = Field(default=None, description="questions a task at most; 0 is all")


class PublishedRecipe(_Strict):
    """What the pruning was given, as far as stated; all None for methods without data."""

    calibration: str | None = Field(default=None, description="as the Hub names it")
    samples: int | None = None
    length: int | None = Field(default=None, description="tokens a sequence")
    seed: int | None = None
    training: str | None = Field(default=None, description="as the Hub names it, for rows that were trained")


class PublishedScore(_Strict):
    """One cell of a table."""

    value: float = Field(description="perplexity, or accuracy in percent")
    printed: str = Field(description="as it stands there, e.g. `6e2`: its last digit says how far it was rounded")
    spread: float | None = Field(default=None, description="standard deviation over calibration seeds, where the table has one")
    seeds: int | None = Field(default=None, description="how many the value is the mean of, where stated")
    metric: Metric
    task: str | None = Field(default=None, description="a task or a set of them, by prunebench's name; None for perplexity")
    paper: str
    source: str = Field(description="the file's name without its ending")
    table: str
    model: str | None = Field(description="on the Hub; None where no checkpoint is known")
    model_label: str
    method: str | None = Field(description="steps as prunebench spells them; None where it has no such method")
    method_label: str
    target: str
    conditions: PublishedConditions
    recipe: PublishedRecipe
    measured_by: str = Field(description="the paper whose authors measured it")
    copied_from: str | None = Field(default=None, description="`source/table` of the number that is repeated here")
    reason: str | None = Field(default=None, description="why it can be set beside no run of ours")
    notes: tuple[str, ...] = ()

    @property
    def comparable(self) -> bool:
        """Whether a run of ours could be set beside it."""
        return self.reason is None

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit."""
        exponent = Decimal(self.printed).as_tuple().exponent
        return 0.5 * 10.0**exponent if isinstance(exponent, int) else 0.0

    @property
    def subject(self) -> tuple[str | None, ...]:
        """What it is a number of; a copy and its original agree in it."""
        return (self.metric, self.task, self.model or self.model_label, self.method or self.method_label, self.target)

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.paper}, table {self.table}"


class _Paper(_Strict):
    name: str
    title: str
    reference: str


class _Model(_Strict):
    label: str
    hub: str | None = None


class _Labels(_Strict):
    """What a table, a row or a note may say of its cells."""

    model: str | None = None
    method: str | None = None
    method_label: str | None = None
    target: str | None = None
    task: str | None = None


class _Note(_Labels):
    text: str


class _Row(_Labels):
    values: Cells
    spreads: Cells = []
    measured_by: str | None = None
    copied_from: str | None = None


class _Table(_Labels):
    number: str
    metric: Metric
    across: Literal["model", "task", "target"]
    columns: Annotated[list[str], Field(min_length=1)]
    conditions: Shared = {}
    recipe: Shared = {}
    seeds: int | None = None
    notes: list[_Note] = []
    rows: Annotated[list[_Row], Field(min_length=1)]


class _File(_Strict):
    paper: _Paper
    models: dict[str, _Model]
    table: Annotated[list[_Table], Field(min_length=1)]


def load_published(folder: Path) -> list[PublishedScore]:
    """Every cell of every file of a folder, in the order of files and tables; none where there is no folder.

    Raises:
        StoreError: a file cannot be read, or an entry does not fit: the message names both.
    """
    scores: list[PublishedScore] = []
    for path in sorted(folder.glob("*.toml")):
        file = _read(path)
        for table in file.table:
            scores += _of_table(path, file, table)
    _refuse_repetition(scores)
    originals = {(f"{s.source}/{s.table}", s.subject): s for s in scores}
    return [_settled(score, originals) for score in scores]


def _read(path: Path) -> _File:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StoreError(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB, which no file of published numbers is.")
        # Fractions stay text, so that the printed digits are kept.
        return _File.model_validate(tomllib.loads(path.read_text(encoding="utf-8"), parse_float=str))
    except ValidationError as error:
        raise StoreError(f"{path.name}, {_explained(error)}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path.name} cannot be read as TOML: {error}") from None


def _explained(error: ValidationError) -> str:
    """The first fault; a misspelt key is often also a missing one, so it comes first."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    where = ".".join(f"{part + 1}" if isinstance(part, int) else str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"at {where}: there is no such key"
    return f"at {where}: {first['msg'].removeprefix('Value error, ').lower()}"


def _of_table(path: Path, file: _File, table: _Table) -> Iterator[PublishedScore]:
    noted: set[int] = set()
    for index, row in enumerate(table.rows):
        place = f"{path.name}, table {table.number}, row {index + 1}"
        for name, values in (("values", row.values), ("spreads", row.spreads or row.values)):
            if len(values) != len(table.columns):
                raise StoreError(f"{place}: {len(values)} {name} stand under {len(table.columns)} columns.")
        for column, label in enumerate(table.columns):
            if row.values[column] != NO_CELL:
                try:
                    yield _score(path.stem, file, table, row, column, noted)
                except ValidationError as error:
                    raise StoreError(f"{place}, column {label}, {_explained(error)}.") from None
                except (RequestError, ValueError) as error:
                    raise StoreError(f"{place}, column {label}: {str(error).rstrip('.')}.") from None
    for index, note in enumerate(table.notes):
        if index not in noted:
            raise StoreError(f"{path.name}, table {table.number}: no cell answers to the note {note.text!r}.")


def _score(source: str, file: _File, table: _Table, row: _Row, column: int, noted: set[int]) -> PublishedScore:
    """One cell.

    Raises:
        ValidationError: a condition is unknown or of the wrong type.
        RequestError: the target is none.
        ValueError: anything else that does not fit.
    """
    said = {key: getattr(row, key) or getattr(table, key) for key in _Labels.model_fields}
    said[table.across] = table.columns[column]
    method_label, target, short = said["method_label"] or said["method"], said["target"], said["model"]
    if method_label is None or target is None or short is None:
        raise ValueError("a cell needs a model, a target, and a method or method_label")
    if short not in file.models:
        raise ValueError(f"there is no model {short!r} in [models]{did_you_mean(short, file.models)}")
    if (table.metric == "perplexity") != (said["task"] is None):
        raise ValueError("a task belongs to accuracy, and to accuracy belongs a task")
    notes = {i: note.text for i, note in enumerate(table.notes) if _answers(note, said)}
    noted.update(notes)
    printed = str(row.values[column])
    conditions = _at(table.conditions, len(table.columns), column)
    if "data" in conditions:
        if conditions["data"] not in WHOLE:
            raise ValueError(f"there is no data set {conditions['data']!r}; known: {', '.join(WHOLE)}")
        conditions |= WHOLE[str(conditions["data"])]
    recipe = {} if said["method"] in DATA_FREE else _at(table.recipe, len(table.columns), column)
    return PublishedScore(
        value=_number(printed),
        printed=printed,
        spread=_number(str(row.spreads[column])) if row.spreads else None,
        seeds=table.seeds,
        metric=table.metric,
        task=said["task"],
        paper=file.paper.name,
        source=source,
        table=table.number,
        model=file.models[short].hub,
        model_label=file.models[short].label,
        method=said["method"],
        method_label=method_label,
        target=str(parse_target(target)),
        conditions=PublishedConditions.model_validate(conditions),
        recipe=PublishedRecipe.model_validate(recipe),
        measured_by=row.measured_by or file.paper.name,
        copied_from=row.copied_from,
        notes=tuple(notes.values()),
    )


def _answers(note: _Note, said: dict[str, Any]) -> bool:
    return all(said[key] == value for key, value in note.model_dump(exclude={"text"}, exclude_none=True).items())


def _at(shared: Shared, columns: int, column: int) -> dict[str, Printed]:
    """What holds for one column; an empty text is nothing stated.

    Raises:
        ValueError: a list is not as long as the columns.
    """
    found = {}
    for key, value in shared.items():
        if isinstance(value, list) and len(value) != columns:
            raise ValueError(f"{key} has {len(value)} values for {columns} columns")
        found[key] = value[column] if isinstance(value, list) else value
    return {key: value for key, value in found.items() if value != ""}


def _number(printed: str) -> float:
    value = float(printed)
    if math.isinf(value) or value < 0:
        raise ValueError(f"{printed} is no value")
    return value


def _refuse_repetition(scores: list[PublishedScore]) -> None:
    seen = set()
    for score in scores:
        key = (score.source, score.table, score.method_label, *score.subject)
        if key in seen:
            label = f"{score.method_label} at {score.target} of {score.model_label}"
            raise StoreError(f"{score.source}.toml, table {score.table}: {label} stands there twice.")
        seen.add(key)


def _settled(score: PublishedScore, originals: dict[tuple[str, tuple[str | None, ...]], PublishedScore]) -> PublishedScore:
    """With the reason why it stands beside nothing, if there is one; a copy with who measured its original."""
    if score.copied_from is None:
        return score.model_copy(update={"reason": _missing(score)})
    original = originals.get((score.copied_from, score.subject))
    label = f"{score.method_label} at {score.target} of {score.model_label}"
    if original is None or original.copied_from or original.value != score.value:
        raise StoreError(
            f"{score.source}.toml, table {score.table}: {label} is copied from {score.copied_from}, which has no such number "
            "of its own."
        )
    return score.model_copy(update={"measured_by": original.measured_by, "reason": f"a copy of {original.place}"})


def _missing(score: PublishedScore) -> str | None:
    """What keeps a number from being set beside a run."""
    needed = ("data", "window") if score.metric == "perplexity" else ("harness", "metric_key", "shots", "limit")
    unsaid = [key.replace("_", " ") for key in needed if getattr(score.conditions, key) is None]
    reasons = [
        f"{', '.join(unsaid)} not stated" if unsaid else "",
        "" if score.model else "no such checkpoint on the Hub",
        "" if score.method else "prunebench has no such method",
        "the value is not a number" if math.isnan(score.value) else "",
    ]
    return "; ".join(filter(None, reasons)) or None

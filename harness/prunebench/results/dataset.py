"""The records as a data set that `datasets.load_dataset(FOLDER)` reads: three Parquet files and a card. Equal records, equal
bytes with equal pyarrow.

`runs` has a row a run, those that failed or refused too; `scores` a row a value, and `matrices` a row a pruned matrix, each
with its run's id and machine. Raw answers and masks stay in the results folder.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from prunebench.errors import RequestError, StoreError
from prunebench.plain import markdown
from prunebench.results.board import is_outdated
from prunebench.results.content import canonical_json, fingerprint
from prunebench.results.files import write_aside
from prunebench.results.leaderboard import reason
from prunebench.results.records import RunRecord, ScoreRecord, eval_revision
from prunebench.results.verdicts import Grade

CARD = "README.md"

_TEXT, _WHOLE, _REAL, _FLAG = "string", "int64", "float64", "bool"


@dataclass(frozen=True)
class Column:
    """A column of a table: what it is called, its type, its unit and meaning."""

    name: str
    type: str
    meaning: str
    unit: str = ""


RUN = (
    Column("id", _TEXT, "twelve hex digits over what the run is made of, by content; with `machine` it names a run"),
    Column("machine", _TEXT, "the hardware: CPU, cores, GPU"),
    Column("model", _TEXT, "what the model is called"),
    Column("method", _TEXT, "steps with the options that differ from their defaults"),
    Column("target", _TEXT, "share of zeros, `keep:of`, or `dense`"),
    Column("seed", _WHOLE, "of calibration and drawing; null where a method uses neither data nor randomness"),
)
"""By which every row of every table is known."""

RUNS = (
    *RUN,
    Column("status", _TEXT, "`ok`, `refused` or `failed`"),
    Column("reason", _TEXT, "why it refused or failed"),
    Column("failure", _TEXT, "`error`, `oom`, `timeout`, `killed`, `nan` or `audit`"),
    Column("outdated", _FLAG, "measured with another revision of the method or an evaluation than the exporting program's"),
    Column("grade", _TEXT, "`reported`, `checked` or `replayed`: how far somebody looked at it again"),
    Column("weights", _TEXT, "hash of the dense weights and the configuration"),
    Column("tokenizer", _TEXT, "hash of the tokenizer's files"),
    Column("dtype", _TEXT, "of the model"),
    Column("source", _TEXT, "hub name and revision, or `local`"),
    Column("recipe", _TEXT, "fingerprint of the calibration text, sampler, samples and length; null without calibration"),
    Column("calibration", _TEXT, "the calibration text"),
    Column("calibration_samples", _WHOLE, "how many sequences", "sequences"),
    Column("calibration_length", _WHOLE, "of each sequence", "tokens"),
    Column("training", _TEXT, "the text that a step trained on; null where none did"),
    Column("training_tokens", _WHOLE, "the budget of training", "tokens"),
    Column("tuned", _TEXT, "the suite by whose records options were chosen, on validation text"),
    Column("suite", _TEXT, "the suite that the run is of"),
    Column("rescored_from", _TEXT, "id of the run whose kept masks were scored; nothing was pruned anew"),
    Column("prune_seconds", _REAL, "all steps, without loading and evaluation, with the original cost of what was reused", "s"),
    Column("phases", _TEXT, "the same by phase, as a JSON object", "s"),
    Column("peak_bytes", _WHOLE, "highest memory while pruning, of the accelerator where there is one", "bytes"),
    Column("shared_machine", _FLAG, "others took cores or memory that the run needed: its costs may not be ranked"),
    Column("sparsity_prunable", _REAL, "zeros over prunable weights", "share"),
    Column("sparsity_total", _REAL, "the same zeros over all parameters", "share"),
    Column("coverage", _REAL, "share of the blocks' parameters in matrices that the method pruned", "share"),
    Column("removed", _WHOLE, "entries that the masks remove", "weights"),
    Column("zeros", _WHOLE, "exact zeros in prunable matrices", "weights"),
    Column("extra_parameters", _WHOLE, "parameters that the method added", "parameters"),
    Column("started", _TEXT, "UTC, ISO 8601"),
    Column("seconds", _REAL, "the whole run, with loading and evaluation", "s"),
    Column("device", _TEXT, "what it ran on"),
    Column("threads", _WHOLE, "of the CPU", "threads"),
    Column("batch_size", _WHOLE, "sequences at a time", "sequences"),
    Column("command", _TEXT, "that was typed"),
    Column("commit", _TEXT, "of the repository it ran from"),
    Column("packages", _TEXT, "versions, as a JSON object"),
)

SCORES = (
    *RUN,
    Column("score", _TEXT, "its name in the record"),
    Column("evaluation", _TEXT, "`perplexity`, `zero_shot`, …"),
    Column("data", _TEXT, "what it was measured on: a data set, or a set of tasks"),
    Column("conditions", _TEXT, "fingerprint of all that makes two values comparable"),
    Column("conditions_json", _TEXT, "the same in full"),
    Column("revision", _WHOLE, "of the evaluation"),
    Column("value", _REAL, "null where no one number stands for the whole", "`unit`"),
    Column("unit", _TEXT, "of `value`: `perplexity`; `accuracy` is a share"),
    Column("higher_is_better", _FLAG, "of `value`"),
    Column("parts", _TEXT, "further numbers as a JSON object, for example each task's accuracy"),
    Column("seconds", _REAL, "the evaluation took", "s"),
)

MATRICES = (
    *RUN,
    Column("matrix", _TEXT, "its name in the model"),
    Column("outputs", _WHOLE, "rows of the weight", "rows"),
    Column("inputs", _WHOLE, "columns of the weight", "columns"),
    Column("removed", _WHOLE, "entries that the mask removes", "weights"),
    Column("zeros", _WHOLE, "exact zeros that were found", "weights"),
    Column("sparsity", _REAL, "zeros over entries", "share"),
)

TABLES: Mapping[str, tuple[Column, ...]] = {"runs": RUNS, "scores": SCORES, "matrices": MATRICES}
"""The data set's configurations."""


def write_dataset(
    folder: Path,
    records: Sequence[RunRecord],
    revisions: Mapping[str, int] | None = None,
    grade: Callable[[RunRecord], Grade] = lambda _: "reported",
) -> dict[str, int]:
    """Write the tables and the card.

    Args:
        folder: made if it is not there; an earlier data set of ours is replaced file by file.
        records: the latest of each run.
        revisions: the present ones, by which records are outdated; see `build_board`.
        grade: how far a record may be trusted.

    Returns:
        How many rows each table has; one without any is left out, since `datasets` reads no empty one.

    Raises:
        RequestError: the folder holds something else, or there are no records.
        StoreError: it cannot be written.
    """
    check_folder(folder)
    if not records:
        raise RequestError("there are no records, and so no data set.")
    ordered = sorted(records, key=lambda record: (record.machine, record.spec.model.name, record.spec.file_stem))
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": [_run(record, is_outdated(record, revisions or {}), grade(record)) for record in ordered],
        "scores": [_score(record, name, score) for record in ordered for name, score in record.scores.items()],
        "matrices": [row for record in ordered for row in _matrices(record)],
    }
    counts = {name: len(found) for name, found in rows.items() if found}
    try:
        for name, columns in TABLES.items():
            path = folder / f"{name}.parquet"
            if name in counts:
                write_aside(folder, _parquet(rows[name], columns)).replace(path)
            else:
                path.unlink(missing_ok=True)  # of an earlier data set
        write_aside(folder, card(ordered, counts)).replace(folder / CARD)
    except OSError as error:
        raise StoreError(f"the data set cannot be written to {folder}: {error.strerror}.") from None
    return counts


def check_folder(folder: Path) -> None:
    """Whether a data set may be written there.

    Raises:
        RequestError: it is no folder, or holds something else than an earlier data set.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is no folder.")
    ours = {CARD, *(f"{name}.parquet" for name in TABLES)}
    others = sorted({path.name for path in folder.iterdir()} - ours) if folder.exists() else []
    if others:
        raise RequestError(f"the folder {folder} holds other things, for example {others[0]}; name a new or an empty one.")


def _parquet(rows: list[dict[str, Any]], columns: Sequence[Column]) -> bytes:
    fields = [pyarrow.field(column.name, column.type, metadata={"description": column.meaning}) for column in columns]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(fields))
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression="zstd")
    return content.getvalue()


def _named(record: RunRecord) -> dict[str, Any]:
    spec = record.spec
    return {
        "id": record.id,
        "machine": record.machine,
        "model": spec.model.name,
        "method": spec.method,
        "target": spec.target,
        "seed": spec.seed,
    }


def _run(record: RunRecord, outdated: bool, grade: Grade) -> dict[str, Any]:
    spec, recipe, came = record.spec, record.spec.recipe, record.provenance
    audit = record.audit
    phases: dict[str, float] = {}
    for step in record.steps:
        for phase, seconds in step.phases.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    ran = record.status == "ok"
    return {
        **_named(record),
        "status": record.status,
        "reason": None if ran else reason(record),
        "failure": record.failure.kind if record.failure else None,
        "outdated": outdated,
        "grade": grade,
        **spec.model.model_dump(include={"weights", "tokenizer", "dtype", "source"}),
        "recipe": fingerprint(recipe.of_calibration) if recipe.of_calibration else None,
        "calibration": recipe.calibration.label() if recipe.calibration else None,
        "calibration_samples": recipe.samples,
        "calibration_length": recipe.length,
        "training": recipe.training.label() if recipe.training else None,
        "training_tokens": recipe.training_tokens,
        "rescored_from": record.rescored_from,
        "prune_seconds": record.prune_seconds if ran else None,
        "phases": canonical_json(phases) if ran else None,
        "peak_bytes": record.peak_bytes,
        **(audit.model_dump(include={column.name for column in RUNS}) if audit else {}),
        "extra_parameters": record.extra_parameters if ran else None,
        **came.model_dump(include={column.name for column in RUNS} - {"packages"}),
        "packages": canonical_json(came.packages),
    }


def _score(record: RunRecord, name: str, score: ScoreRecord) -> dict[str, Any]:
    conditions = score.conditions
    tasks = conditions.get("tasks")
    whole = conditions.get("set") or (", ".join(tasks) if isinstance(tasks, dict) else conditions.get("data"))
    return {
        **_named(record),
        "score": name,
        "evaluation": str(conditions.get("eval", name)),
        "data": None if whole is None else str(whole),
        "conditions": fingerprint(dict(conditions)),
        "conditions_json": canonical_json(conditions),
        "revision": eval_revision(record, score),
        "parts": canonical_json(score.parts),
        **score.model_dump(include={"value", "unit", "higher_is_better", "seconds"}),
    }


def _matrices(record: RunRecord) -> Iterator[dict[str, Any]]:
    for found in record.audit.matrices if record.audit else []:
        outputs, inputs = found.shape
        yield {
            **_named(record),
            "matrix": found.name,
            "outputs": outputs,
            "inputs": inputs,
            "removed": found.removed,
            "zeros": found.zeros,
            "sparsity": found.zeros / max(outputs * inputs, 1),
        }


def card(records: Sequence[RunRecord], counts: Mapping[str, int]) -> str:
    """The data card: what the hub and `datasets` read, and what people should know before they compare."""
    machines, models = _listed(record.machine for record in records), _listed(record.spec.model.name for record in records)
    parts = [
        _front_matter(counts),
        "# Records of prunebench",
        f"{counts['runs']:,} runs that prune language models and measure what is left, on {machines} with {models}. "
        "Made by `prunebench export`.",
        _USE,
        _COMPARE,
        *(_table(name, TABLES[name], count) for name, count in counts.items()),
        _CITE,
    ]
    return "\n\n".join(parts) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(markdown(name) for name in sorted(set(names)))


def _front_matter(counts: Mapping[str, int]) -> str:
    lines = ["---", "license: apache-2.0", "pretty_name: Records of prunebench", "tags:", "- pruning", "- sparsity"]
    lines += ["- language-models", "- benchmark", "configs:"]
    for name in counts:
        lines += [f"- config_name: {name}", *(["  default: true"] if name == "runs" else [])]
        lines += ["  data_files:", "  - split: train", f"    path: {name}.parquet"]
    return "\n".join([*lines, "---"])


def _table(name: str, columns: Sequence[Column], count: int) -> str:
    lines = [f"## `{name}`: {count:,} rows\n", "| column | type | unit | meaning |", "|---|---|---|---|"]
    lines += [f"| `{column.name}` | {column.type} | {column.unit} | {column.meaning} |" for column in columns]
    return "\n".join(lines)


_USE = """```python
from datasets import load_dataset

runs = load_dataset("FOLDER", "runs", split="train")
scores = load_dataset("FOLDER", "scores", split="train")
```

`id` and `machine` together name a run in all tables. The split is called `train` because `datasets` wants one name; nothing is
meant to be trained on it."""

_COMPARE = """## What may not be compared

* **Values of different `conditions`.** Another text, window, dtype, attention kernel, lm-eval or task version is another
  measurement, also where the name of the data set is the same.
* **Prunings of different `recipe`**, unless one of them has none: methods without data match any.
* **Rows with `training` and rows without**, or of other `training_tokens`: training alone helps a dense model too. Its control
  is the run `dense + …` of the same training.
* **Costs of different `machine`s**, and costs with `shared_machine`.
* **Single seeds as if they were means.** Rows that differ in `seed` only are one row of the board. Whether two rows differ is a
  question for paired tests over windows or questions (`prunebench compare`), not for two means.
* **`tuned` and untuned rows** as if both had had the same care.
* **`outdated` rows with present ones.** Refused and failed runs are results too: a mean over the rest is no mean over all."""

_CITE = """## Licence and citation

Records that come with prunebench's repository are under Apache-2.0, as the repository; if you export records of your own, set
the licence above. They hold no text of any data set and no weights.

Cite prunebench (`CITATION.cff` in its repository: "prunebench: a benchmark of pruning methods for language models"), and the
papers of the methods whose rows you use (`pruners/README.md`)."""

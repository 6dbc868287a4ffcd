"""Run specs and run records: typed data with canonical JSON.

A spec says what a run is; its id hashes content (weights, tokens, options that differ from their defaults, revisions) and
never a path. A record says what came out, keeps the raw answers, and carries a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from prunebench.results.content import by_content, canonical_json, checksum, slug

SCHEMA = 5
"""The format of records. A newer record is skipped with a warning; an older one is upgraded on reading."""

MASKS = "masks"
"""The folder of kept masks in a results folder."""

Status = Literal["ok", "refused", "failed"]
FailureKind = Literal["error", "oom", "timeout", "killed", "nan", "audit"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(_Frozen):
    """Which model, by content."""

    name: str = Field(description="what it is called on the board; not part of the id")
    weights: str = Field(description="hash of the weight files and the configuration")
    tokenizer: str = Field(description="hash of the tokenizer's files")
    dtype: str
    source: str = Field(description="hub name and revision, `local`, or `shape:<name>`; not part of the id")

    @property
    def is_shape(self) -> bool:
        """Whether it is an architecture with random weights, of which only costs mean anything."""
        return self.source.startswith("shape:")


class StepSpec(_Frozen):
    """A pruner and its options."""

    text: str = Field(description="name[option=value,...], only options that differ from their defaults")
    revision: int = Field(description="of the pruner")


class TextSpec(_Frozen):
    """A text that was used for pruning or training."""

    name: str
    config: str
    split: str
    origin: str = Field(description="`hub`, `mirror` (perhaps an excerpt), `file`, or `seed`: random tokens of a shape")
    content: str = Field(description="hash of the text's rows, or of the token file")
    complete: bool = Field(description="False where the source may be an excerpt of what the name stands for")

    def label(self) -> str:
        """As the board prints it."""
        where = ", ".join(part for part in (self.config, self.split) if part)
        named = f"{self.name} ({where})" if where else self.name
        return named if self.complete else f"{named} (excerpt)"


class Recipe(_Frozen):
    """What a pruning was given besides the weights. Two rows are ranked together only when recipes agree."""

    calibration: TextSpec | None = None
    sampler: str | None = None
    samples: int | None = None
    length: int | None = Field(default=None, description="tokens a sequence")
    training: TextSpec | None = None
    training_tokens: int | None = None

    @property
    def of_calibration(self) -> Recipe | None:
        """Without training; None where nothing was calibrated, which matches any."""
        return self.model_copy(update={"training": None, "training_tokens": None}) if self.calibration else None


class EvalSpec(_Frozen):
    """An evaluation and the conditions it measures under."""

    text: str
    revision: int
    conditions: dict[str, JsonValue]


class RunSpec(_Frozen):
    """One run: a model, steps, a target, a seed, and what is measured."""

    model: ModelSpec
    steps: tuple[StepSpec, ...]
    target: str
    seed: int | None = Field(description="None where the method uses neither data nor randomness")
    recipe: Recipe
    calibration_tokens: str | None = Field(default=None, description="hash of the calibration token array")
    training_tokens: str | None = Field(default=None, description="hash of the training token array")
    validation_tokens: str | None = Field(default=None, description="hash of the validation token array")
    evals: tuple[EvalSpec, ...]

    @property
    def id(self) -> str:
        """Twelve hex digits over content and revisions; names, sources and spellings of evaluations are left out."""
        data = self.model_dump(mode="json", exclude={"model": {"name", "source"}, "evals": {"__all__": {"text"}}})
        return hashlib.sha256(canonical_json(by_content(data)).encode()).hexdigest()[:12]

    @property
    def method(self) -> str:
        """The steps as one line."""
        return " + ".join(step.text for step in self.steps)

    @property
    def file_stem(self) -> str:
        """`<method>-<target>-<id>`, of `[a-z0-9.+-]`."""
        return f"{slug(self.method)[:60]}-{slug(self.target.replace(':', 'of'))}-{self.id}"


class StepRecord(_Frozen):
    """What one step did and cost."""

    pruner: str
    options: dict[str, JsonValue]
    revision: int
    distribution: str
    version: str
    phases: dict[str, float] = Field(description="seconds by phase; they add up to the step")
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="seconds by phase that no implementation avoids at the machine's measured rates; empty where not known",
    )
    peak_device_bytes: int | None = Field(description="peak allocated on the accelerator during the step; None on CPU")
    peak_host_bytes: int | None = Field(description="peak resident memory of the process during the step")
    host_peak_sampled: bool = Field(description="the host peak was sampled, so a short one may be missing")
    reused: list[str] = Field(default_factory=list, description="artefacts taken from earlier runs")
    notes: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.phases.values())


class MatrixAudit(_Frozen):
    """What was found in one matrix."""

    name: str
    shape: tuple[int, int]
    removed: int
    zeros: int


class AuditRecord(_Frozen):
    """What was found in the pruned model."""

    removed: int = Field(description="entries the masks remove")
    zeros: int = Field(description="exact zeros in prunable matrices")
    extra_zeros: int = Field(description="zeros among the survivors")
    sparsity_prunable: float = Field(description="zeros over prunable weights")
    sparsity_total: float = Field(description="zeros in prunable matrices over all parameters")
    coverage: float = Field(description="share of the blocks' parameters that are in matrices the method pruned")
    matrices: list[MatrixAudit]


class SampleRecord(_Frozen):
    """How a value is made of its items: `prunebench.spec.Sample`."""

    column: str
    exponential: bool = False
    documents: str | None = None
    strata: str | None = None
    tasks: str | None = None


class ScoreRecord(_Frozen):
    """One evaluation's value with its conditions and raw answers."""

    value: float | None = Field(description="None where no one number stands for the whole, or there is none")
    reason: str | None = Field(default=None, description="why there is no value; None where there is one")
    unit: str
    higher_is_better: bool
    seconds: float
    conditions: dict[str, JsonValue]
    parts: dict[str, float] = Field(default_factory=dict, description="further numbers, e.g. each task's accuracy")
    sample: SampleRecord | None = Field(default=None, description="how the value is made of the items")
    items: dict[str, list[float | int | str]] = Field(description="columns of equal length; empty where `items_file` has them")
    items_file: str | None = Field(default=None, description="the file beside the record that keeps the items, as Parquet")
    items_hash: str | None = Field(default=None, description="SHA-256 of that file")

    @property
    def is_share(self) -> bool:
        """Whether the value is a share, shown as a percentage."""
        return self.unit == "accuracy"

    @property
    def is_ratio(self) -> bool:
        """Whether values are compared by their ratio, as perplexities are."""
        return self.sample is not None and self.sample.exponential


class Provenance(_Frozen):
    """How the record came to be."""

    suite: str | None = Field(description="name of the suite, for the command that reproduces a table")
    tuned: str | None = Field(default=None, description="the suite by whose records options were chosen, on validation text")
    command: str
    commit: str | None
    dirty: bool | None = Field(description="whether the working tree had changes")
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    driver: str | None
    threads: int
    batch_size: int
    executor: str
    shared_machine: bool = Field(description="a step shared the machine, or the run went on after a kill; costs are not ranked")
    started: str = Field(description="UTC, ISO 8601")
    seconds: float = Field(description="the whole run, with loading and evaluation")
    predicted_seconds: float | None = Field(default=None, description="what the cost model said before the run of `seconds`")
    predicted_peak_bytes: int | None = Field(
        default=None,
        description="what it said of the peak, evaluation included: on the accelerator, or of the process on a CPU",
    )


class Failure(_Frozen):
    """Why a run failed."""

    kind: FailureKind
    type: str
    message: str
    step: str | None


class KeptMasks(_Frozen):
    """The keep masks of a run, and what else of it was kept: files below the results folder, named by their content."""

    file: str = Field(description="`masks/<hash>.safetensors`, bit-packed; relative to the results folder")
    hash: str = Field(description="SHA-256 of that file")
    bytes: int = Field(description="of all files that were kept")
    weights_file: str | None = Field(default=None, description="the tensors that the method changed beside the masks, likewise")
    weights_hash: str | None = Field(default=None, description="SHA-256 of that file")
    note: str | None = Field(default=None, description="why the masks cannot be scored again; None where they can")

    @model_validator(mode="after")
    def _named_by_content(self) -> Self:
        for file, digest in ((self.file, self.hash), (self.weights_file, self.weights_hash)):
            if file != (digest and f"{MASKS}/{digest}.safetensors") or not re.fullmatch("[0-9a-f]{64}", digest or "0" * 64):
                raise ValueError(f"a file of kept masks is {MASKS}/<its SHA-256>.safetensors")
        return self


def _with_checksum(schema: dict[str, Any]) -> None:
    """The checksum stands in the file only."""
    schema["properties"]["checksum"] = {"type": "string", "description": "SHA-256 of the rest, as canonical JSON"}


class RunRecord(_Frozen):
    """One run and what came out."""

    schema_: Literal[5] = Field(default=5, alias="schema")
    id: str
    machine: str
    spec: RunSpec
    status: Status
    reason: str | None = None
    failure: Failure | None = None
    steps: list[StepRecord] = Field(default_factory=list)
    audit: AuditRecord | None = None
    scores: dict[str, ScoreRecord] = Field(default_factory=dict)
    extra_parameters: int = 0
    masks: KeptMasks | None = Field(default=None, description="what was kept with --keep-masks")
    rescored_from: str | None = Field(
        default=None, description="id of the run whose masks were scored; nothing was pruned anew"
    )
    provenance: Provenance

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, json_schema_extra=_with_checksum
    )

    @property
    def prune_seconds(self) -> float:
        """All steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def peak_bytes(self) -> int | None:
        """The highest peak of any step: on the accelerator where there is one, otherwise of the process."""
        device = [step.peak_device_bytes for step in self.steps if step.peak_device_bytes is not None]
        host = [step.peak_host_bytes for step in self.steps if step.peak_host_bytes is not None]
        return max(device or host, default=None)

    def on_shared_machine(self) -> RunRecord:
        """The same of a run that had others at work beside it: its costs are not ranked."""
        return self.model_copy(update={"provenance": self.provenance.model_copy(update={"shared_machine": True})})

    def to_json(self) -> str:
        """Readable JSON with the checksum at its end."""
        data = self.model_dump(mode="json", by_alias=True)
        data["checksum"] = checksum(data)
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A record's data in the present schema; the file stays as it is.

    Schema 1 did not say how a value is made of its items; there was perplexity only. Schema 2 had no predictions,
    schema 3 kept no masks, schema 4 had no floors and no reasons of scores without a value.
    """
    if data["schema"] == 1:
        for score in data.get("scores", {}).values():
            if score.get("conditions", {}).get("eval") == "perplexity":
                score["sample"] = {"column": "nll", "exponential": True, "documents": "document"}
    return {**data, "schema": SCHEMA} if data["schema"] in (1, 2, 3, 4) else data


def eval_revision(record: RunRecord, score: ScoreRecord) -> int | None:
    """The revision of the evaluation that gave a score."""
    return next((spec.revision for spec in record.spec.evals if spec.conditions == score.conditions), None)

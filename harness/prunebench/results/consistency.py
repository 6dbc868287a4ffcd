"""Whether a record agrees with itself: scores with the evaluations of its spec, steps with the spec, answers with conditions,
costs with each other; and whether it is where its kind is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from prunebench.results.content import slug
from prunebench.results.costs_board import is_quality_of_shape
from prunebench.results.findings import Entry, Finding, is_pruned
from prunebench.results.items import Columns
from prunebench.results.records import EvalSpec, RunRecord, SampleRecord, ScoreRecord, StepRecord

COMMON = ("eval", "weights", "tokenizer", "dtype", "attention", "prunable")
"""Conditions of every evaluation."""

_TEXT = ("data", "config", "split", "content", "joining", "bos", "tokens", "token_hash", "window", "windows")
REQUIRED = {
    "perplexity": _TEXT,
    "divergence": (*_TEXT, "direction"),
    "zero_shot": ("tasks", "missing", "metric", "shots", "limit", "lm_eval"),
    "generation": ("data", "content", "questions", "tasks", "recognition", "production", "new_tokens", "normalisation"),
    "speed": ("device", "driver", "torch", "transformers", "kernels", "batches", "prompt", "written"),
}
"""Further conditions of the built-in evaluations: without one of them two values could not be compared."""

MADE = {
    "perplexity": ("perplexity", False, SampleRecord(column="nll", exponential=True, documents="document")),
    "divergence": ("KL, nats", False, SampleRecord(column="kl", documents="document")),
    "zero_shot": ("accuracy", True, SampleRecord(column="right", strata="stratum", tasks="task")),
    "generation": ("accuracy", True, SampleRecord(column="produced", strata="stratum", tasks="task")),
    "layer_error": ("relative error", False, None),
    "speed": ("speed-up", True, None),
}
"""Unit, direction and making of the values of built-in evaluations: with another column another value would follow from the
answers."""

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

VIRTUAL = "virtual weights"
"""The note of a step on a shape whose blocks were drawn one at a time."""

SLACK = 2.0
"""Seconds by which parts may exceed the whole: clocks are rounded."""

FLOORS_AGREE = 1.05
"""How many times what was found a floor may be: rates are measured."""


def place(entry: Entry) -> Iterator[Finding]:
    """The file's name and folder."""
    record, path = entry.record, PurePosixPath(entry.path)
    folder = slug(record.machine)
    if path.parent.parent.as_posix() not in (folder, f"{folder}.machine"):
        yield entry.finding("place", "machine", f"is {record.machine!r}, which is not kept in {path.parent.parent}")
    if path.parent.name != slug(record.spec.model.name):
        yield entry.finding(
            "place", "spec.model.name", f"is {record.spec.model.name!r}, which is not kept in {path.parent.name}"
        )
    stem, number = record.spec.file_stem, path.name.removesuffix(".json")
    if number != stem and not (number.startswith(f"{stem}.") and number[len(stem) + 1 :].isdecimal()):
        yield entry.finding("place", "id", f"{record.id} belongs in {stem}.json")


def steps(entry: Entry) -> Iterator[Finding]:
    """What was done against what the spec says."""
    record = entry.record
    if record.status == "ok" and len(record.steps) != len(record.spec.steps):
        yield entry.finding("steps", "steps", f"are {len(record.steps)}, and the spec has {len(record.spec.steps)}")
    for number, (done, asked) in enumerate(zip(record.steps, record.spec.steps, strict=False)):
        name = asked.text.partition("[")[0]
        if done.pruner != name:
            yield entry.finding("steps", f"steps.{number}.pruner", f"is {done.pruner!r}, and the spec says {name!r}")
        if done.revision != asked.revision:
            yield entry.finding("steps", f"steps.{number}.revision", f"is {done.revision}, and the spec says {asked.revision}")


def conditions(entry: Entry) -> Iterator[Finding]:
    """Each score has the conditions of one evaluation of the spec, whole, and each evaluation its score."""
    record = entry.record
    left = list(record.spec.evals)
    for name, score in record.scores.items():
        same = next((spec for spec in left if spec.conditions == score.conditions), None)
        if same is not None:
            left.remove(same)
            continue
        field, said = _difference(score, left)
        yield entry.finding("conditions", f"scores.{name}.conditions{field}", said)
    if record.status == "ok":
        lacking = [spec.text for spec in left if not any(spec.text.partition("[")[0] in name for name in record.scores)]
        if lacking:
            yield entry.finding("conditions", "scores", f"lack {lacking[0]!r}, which the spec asks for")
    for number, spec in enumerate(record.spec.evals):
        yield from _complete(entry, f"spec.evals.{number}.conditions", spec)


def making(entry: Entry) -> Iterator[Finding]:
    """A built-in evaluation's value is made of its answers as it makes it, and no other way."""
    for name, score in entry.record.scores.items():
        made = MADE.get(str(score.conditions.get("eval")))
        if made is None or (score.value is None and score.reason):
            continue
        for field, wanted in zip(("unit", "higher_is_better", "sample"), made, strict=True):
            if getattr(score, field) != wanted:
                said = f"is {_short(getattr(score, field))}, and that evaluation's is {_short(wanted)}"
                yield entry.finding("conditions", f"scores.{name}.{field}", said)


def _complete(entry: Entry, where: str, spec: EvalSpec) -> Iterator[Finding]:
    said, model = spec.conditions, entry.record.spec.model
    for key in (*COMMON, *REQUIRED.get(str(said.get("eval")), ())):
        if key not in said:
            yield entry.finding("conditions", f"{where}.{key}", "is absent")
    for key in ("weights", "tokenizer", "dtype"):
        if said.get(key, getattr(model, key)) != getattr(model, key):
            yield entry.finding("conditions", f"{where}.{key}", f"is {said[key]!r}, and the model's is {getattr(model, key)!r}")
    name = spec.text.partition("[")[0]
    if name != said.get("eval"):
        yield entry.finding("conditions", f"{where}.eval", f"is {said.get('eval')!r}, and the evaluation is {name!r}")


def _difference(score: ScoreRecord, evals: list[EvalSpec]) -> tuple[str, str]:
    """In which field a score's conditions differ from the nearest evaluation's, as `.field`, and how."""
    alike = [spec for spec in evals if spec.conditions.get("eval") == score.conditions.get("eval")] or evals
    differing = [_differing(score.conditions, spec.conditions) for spec in alike]
    if not differing:
        return "", "are of no evaluation of the spec"
    keys = min(differing, key=len)
    nearest = alike[differing.index(keys)].conditions
    mine, theirs = (said.get(keys[0], "absent") for said in (score.conditions, nearest))
    more = f" ({len(keys) - 1} more fields differ)" if len(keys) > 1 else ""
    return f".{keys[0]}", f"is {_short(mine)}, and the evaluation in the spec says {_short(theirs)}{more}"


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]


def counts(entry: Entry) -> Iterator[Finding]:
    """As many raw answers as the conditions say were asked for."""
    for name, columns in entry.answers.items():
        said, where = entry.record.scores[name].conditions, f"scores.{name}.items"
        there = len(next(iter(columns.values()), []))
        kind = said.get("eval")
        if kind in ("perplexity", "divergence"):
            yield from _windows(entry, name, said, there)
        elif kind == "generation" and there != said.get("questions"):
            yield entry.finding("conditions", where, f"are {there}, and the conditions say {said.get('questions')} questions")
        elif kind == "zero_shot" and isinstance(said.get("tasks"), dict):
            yield from _questions(entry, name, said, columns)


def _windows(entry: Entry, name: str, said: Mapping[str, Any], there: int) -> Iterator[Finding]:
    window, windows, tokens = said.get("window"), said.get("windows"), said.get("tokens")
    if not all(isinstance(value, int) and value > 0 for value in (window, windows, tokens)):
        yield entry.finding("conditions", f"scores.{name}.conditions.window", f"is {window!r}, of {windows!r} windows")
        return
    assert isinstance(window, int)
    assert isinstance(windows, int)
    assert isinstance(tokens, int)
    if there != windows:
        said_so = f"is {windows}, and there are raw answers of {there}"
        yield entry.finding("conditions", f"scores.{name}.conditions.windows", said_so)
    if windows * window > tokens:
        said_so = f"is {window}, and {windows} such windows are more than the text's {tokens} tokens"
        yield entry.finding("conditions", f"scores.{name}.conditions.window", said_so)
    asked = next((e for e in entry.record.spec.evals if e.conditions == said), None)
    for option in ("window", "windows"):
        given = _option(asked.text if asked else "", option)
        if given and (given < int(said[option]) or (option == "window" and given != window)):
            said_so = f"is {said[option]}, and the evaluation was asked for {given}"
            yield entry.finding("conditions", f"scores.{name}.conditions.{option}", said_so)


def _option(text: str, name: str) -> int | None:
    """A whole number among the options of an evaluation as it was written."""
    inside = text.partition("[")[2].rstrip("]")
    given = dict(part.partition("=")[::2] for part in inside.split(","))
    value = given.get(name, "").strip()
    return int(value) if value.isdecimal() else None


def _questions(entry: Entry, name: str, said: Mapping[str, Any], columns: Columns) -> Iterator[Finding]:
    found, limit = Counter(map(str, columns.get("task", []))), said.get("limit")
    for task, facts in said["tasks"].items():
        items, parts = int(facts.get("items", 0)), int(facts.get("tasks", 1))
        most = items if not limit else min(items, int(limit) * parts)
        exact = not limit or parts == 1
        if (found[task] != most) if exact else not 0 < found[task] <= most:
            said_so = f"is {items} (limit {limit}), and there are {found[task]} raw answers"
            yield entry.finding("conditions", f"scores.{name}.conditions.tasks.{task}.items", said_so)
    for task in sorted(found.keys() - said["tasks"].keys()):
        yield entry.finding("conditions", f"scores.{name}.items.task", f"has {task!r}, which the conditions lack")


def recipe(entry: Entry) -> Iterator[Finding]:
    """Token hashes where text was used, and none where it was not."""
    spec = entry.record.spec
    for kind in ("calibration", "training"):
        text, tokens = getattr(spec.recipe, kind), getattr(spec, f"{kind}_tokens")
        if (text is None) != (tokens is None):
            there = "is absent, and the recipe names a text" if tokens is None else "is there, and the recipe names no text"
            yield entry.finding("tokens", f"spec.{kind}_tokens", there)
    if spec.recipe.calibration is not None and not (spec.recipe.samples and spec.recipe.length and spec.recipe.sampler):
        yield entry.finding("tokens", "spec.recipe.samples", "is absent, and the recipe names a calibration text")
    if spec.calibration_tokens is not None and spec.seed is None:
        yield entry.finding("tokens", "spec.seed", "is absent, and calibration text was sampled")


def shape(entry: Entry) -> Iterator[Finding]:
    """Random weights read random tokens, and nothing else does; they have costs and no quality."""
    spec = entry.record.spec
    is_shape = spec.model.is_shape
    if is_shape != (spec.model.tokenizer == "none"):
        said = "names a shape, and there is a tokenizer" if is_shape else "names no shape, and there is no tokenizer"
        yield entry.finding("tokens", "spec.model.source", said)
    for kind in ("calibration", "training"):
        text = getattr(spec.recipe, kind)
        if text is not None and is_shape != (text.origin == "seed"):
            said = f"is {text.origin!r}, and the model is {'a' if is_shape else 'no'} shape"
            yield entry.finding("tokens", f"spec.recipe.{kind}.origin", said)
    for name, score in entry.record.scores.items():
        if is_quality_of_shape(entry.record, score):
            yield entry.finding("tokens", f"scores.{name}", "is of quality, and the weights are random")


def costs(entry: Entry) -> Iterator[Finding]:
    """Seconds that add up, and a peak that holds at least the weights."""
    record = entry.record
    for number, step in enumerate(record.steps):
        for phase, seconds in step.phases.items():
            if seconds < 0:
                yield entry.finding("costs", f"steps.{number}.phases.{phase}", f"is {seconds} s")
        yield from _floors(entry, number, step)
    for name, score in record.scores.items():
        if score.seconds < 0:
            yield entry.finding("costs", f"scores.{name}.seconds", f"is {score.seconds} s")
    reused = any(step.reused for step in record.steps) or record.rescored_from is not None
    parts = (0.0 if reused else record.prune_seconds) + sum(score.seconds for score in record.scores.values())
    if record.provenance.seconds + SLACK < parts:
        said_so = f"is {record.provenance.seconds}, and steps and evaluations take {parts:.3f} s"
        yield entry.finding("costs", "provenance.seconds", said_so)
    yield from _memory(entry, record)


def _floors(entry: Entry, number: int, step: StepRecord) -> Iterator[Finding]:
    """Below what is said to be unavoidable; rates that were measured while another process had the device do that, too."""
    for phase, floor in step.floors.items():
        field, seconds = f"steps.{number}.floors.{phase}", step.phases.get(phase, 0.0)
        if floor < 0:
            yield entry.finding("costs", field, f"is {floor} s")
        elif floor > FLOORS_AGREE * seconds:
            yield entry.finding("costs", field, f"is {floor} s, and the phase took {seconds:.6g} s", "warning")


def _memory(entry: Entry, record: RunRecord) -> Iterator[Finding]:
    if record.audit is None or not is_pruned(record):
        return
    size = sum(rows * columns for rows, columns in (matrix.shape for matrix in record.audit.matrices))
    least = size * BYTES.get(record.spec.model.dtype, 1)
    for number, step in enumerate(record.steps):
        if record.spec.model.is_shape and VIRTUAL in step.notes:
            continue
        # Weights that are streamed rest on the host, which may map them from the disk only as they are read.
        peaks = [peak for peak in (step.peak_device_bytes, step.peak_host_bytes) if peak is not None]
        if peaks and max(peaks) < least:
            field = f"steps.{number}.peak_{'host' if step.peak_device_bytes is None else 'device'}_bytes"
            yield entry.finding("costs", field, f"is {max(peaks)}, and the prunable weights alone are {least} bytes")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

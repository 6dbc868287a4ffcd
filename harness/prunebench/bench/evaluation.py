"""Measure a model: every evaluation of a spec, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunebench.bench.plan import RunRequest
from prunebench.bench.specs import eval_facts
from prunebench.errors import NonFiniteError, RequestError, RunError
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.records import EvalSpec, SampleRecord, ScoreRecord
from prunebench.spec import Eval, EvalJob, Progress, Score
from prunebench.toolkit.loading import identify, load_model
from prunebench.toolkit.memory import until_it_fits
from prunebench.toolkit.state import guarded
from prunebench.toolkit.stream import evaluating


def evaluate(
    request: RunRequest,
    model: PreTrainedModel,
    progress: Progress,
    scores: dict[str, ScoreRecord],
    kept: Callable[[], None] = lambda: None,
    note: Callable[[str, str], None] = lambda key, value: None,  # noqa: ARG005
) -> None:
    """Run every evaluation of the spec on the pruned model.

    Args:
        request: of the run.
        model: pruned.
        progress: told how far it is.
        scores: gets each score by its name as soon as it is there; what is in it is not measured again.
        kept: called after each.
        note: told, before the score is kept, when memory ran out and an evaluation was begun anew with half the batch.

    Raises:
        NonFiniteError: a value is not a number.
        RunError: an evaluation gives no score, or its items are not what it says they are.
    """
    device = torch.device(request.device)
    model.to(device)  # type: ignore[arg-type]
    registry = load_registry()
    facts = eval_facts(identify(request.model), Path(request.folder))
    dense = DenseModel(request, device)
    names = score_names([spec.text for spec in request.spec.evals])
    for name, text, spec in zip(names, request.eval_texts, request.spec.evals, strict=True):
        if name in scores:
            continue
        evaluation = registry.eval(parse_step(text))
        progress(f"eval {text}", 0, 1)
        started = time.perf_counter()
        job = EvalJob(
            model=model,
            facts=facts,
            conditions=spec.conditions,
            device=device,
            batch_size=request.batch_size,
            progress=progress,
            dense=dense,
        )
        score, size = _measured(evaluation, job)
        if size != job.batch_size:
            note(f"{name}: batch size halved to {size}", "out of memory")
        scores[name] = _score_record(name, score, spec, time.perf_counter() - started)
        kept()


def _measured(evaluation: Eval, job: EvalJob) -> tuple[Score, int]:
    """Evaluate, from the start again with half the batch when memory runs out; the score, and the batch size that it took."""

    def attempt() -> Score:
        with guarded([]), evaluating(job.model):
            return evaluation.measure(job)

    def lower(sequences: int) -> None:
        nonlocal job
        job = replace(job, batch_size=sequences)

    score = until_it_fits(lambda: job.batch_size, attempt, lower)
    return score, job.batch_size


class DenseModel:
    """The model as it was before the first step, loaded when an evaluation first asks for it."""

    def __init__(self, request: RunRequest, device: torch.device) -> None:
        self._request, self._device = request, device
        self._model: PreTrainedModel | None = None

    def __call__(self) -> PreTrainedModel:
        """The model in eval mode on the device.

        Raises:
            RequestError: the model was not pruned here, so that nobody knows what it was before.
        """
        if not self._request.spec.steps:
            raise RequestError("what a model was before it was pruned is known in runs only: give the evaluation to a suite.")
        if self._model is None:
            model = load_model(self._request.model, self._request.spec.model.dtype)
            self._model = model.to(self._device).eval()  # type: ignore[arg-type]
        return self._model


def score_names(texts: list[str]) -> list[str]:
    """What scores are called in a record: the evaluation's name, with its options where several share the name, and a number
    where those are spelt alike too (two files of one name in different folders)."""
    names = [parse_step(text).name for text in texts]
    told = [name if names.count(name) == 1 else text for text, name in zip(texts, names, strict=True)]
    return [f"{name} ({told[:i].count(name) + 1})" if told.count(name) > 1 else name for i, name in enumerate(told)]


def _score_record(name: str, score: Score, spec: EvalSpec, seconds: float) -> ScoreRecord:
    if not isinstance(score, Score):
        raise RunError(f"the evaluation {name} gives {type(score).__name__}, and not a Score.")
    _check_items(name, score)
    for part, value in {"": score.value, **score.parts}.items():
        if value is not None and not math.isfinite(value):
            raise NonFiniteError(f"the evaluation {' '.join((name, part)).strip()} found {value}, which is no number.")
    return ScoreRecord(
        value=score.value,
        reason=(score.reason or None) if score.value is None else None,
        unit=score.unit,
        higher_is_better=score.higher_is_better,
        seconds=round(seconds, 3),
        conditions=spec.conditions,
        parts=dict(score.parts),
        sample=SampleRecord(**asdict(score.sample)) if score.sample else None,
        items={column: list(values) for column, values in score.items.items()},
    )


def _check_items(name: str, score: Score) -> None:
    if len({len(values) for values in score.items.values()}) > 1:
        raise RunError(f"the evaluation {name} gives columns of different lengths.")
    sample = score.sample
    for column in (sample.column, sample.documents, sample.strata, sample.tasks) if sample else ():
        if column is not None and column not in score.items:
            raise RunError(f"the evaluation {name} says that its value is made of {column!r}, which is none of its items.")

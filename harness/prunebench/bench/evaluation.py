"""Measure a model: every evaluation of a spec, one after the other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from prunebench.bench.dense_states import DenseStates
from prunebench.bench.lodging import Lodging, NoRoomError
from prunebench.bench.plan import RunRequest
from prunebench.bench.specs import eval_facts
from prunebench.errors import NonFiniteError, RunError
from prunebench.handles import Placement
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.consistency import MADE
from prunebench.results.records import EvalSpec, SampleRecord, ScoreRecord
from prunebench.spec import Eval, EvalJob, Progress, Score
from prunebench.toolkit.loading import identify
from prunebench.toolkit.memory import is_out_of_memory, until_it_fits
from prunebench.toolkit.state import guarded
from prunebench.toolkit.stream import evaluating


def evaluate(
    request: RunRequest,
    model: PreTrainedModel,
    progress: Progress,
    scores: dict[str, ScoreRecord],
    kept: Callable[[], None] = lambda: None,
    note: Callable[[str, str], None] = lambda key, value: None,  # noqa: ARG005
    placement: Placement | None = None,
) -> None:
    """Run every evaluation of the spec on the pruned model.

    Args:
        request: of the run.
        model: pruned.
        progress: told how far it is.
        scores: gets each score by its name as soon as it is there; what is in it is not measured again.
        kept: called after each.
        note: told, before the score is kept, when memory ran out and an evaluation was begun anew with half the batch, or
            with the blocks on the host.
        placement: where the model's blocks rest, if it is not on the device as a whole.

    Raises:
        NonFiniteError: a value is not a number.
        RunError: an evaluation gives no score, or its items are not what it says they are.
    """
    registry = load_registry()
    facts = eval_facts(identify(request.model), Path(request.folder))
    states = DenseStates(request, progress) if request.spec.steps else None
    names = score_names([spec.text for spec in request.spec.evals])
    with Lodging(request, model, placement) as lodging:
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
                device=lodging.device,
                batch_size=request.batch_size,
                progress=progress,
                dense=lodging.dense,
                artefact=states,
            )
            score = _lodged(evaluation, job, lodging, partial(_noted, name, note))
            seconds = time.perf_counter() - started - (states.settle(partial(_noted, name, note)) if states else 0)
            scores[name] = _score_record(name, score, spec, seconds)
            kept()


def _noted(name: str, note: Callable[[str, str], None], key: str, value: str) -> None:
    note(f"{name}: {key}", value)


def _lodged(evaluation: Eval, job: EvalJob, lodging: Lodging, note: Callable[[str, str], None]) -> Score:
    """Evaluate with the models where they are, and again with their blocks on the host where there is no room for them.

    What was paid for the pruning is not lost where even that runs out of memory: then the score has no value, and says why.
    """
    while True:
        try:
            score, size = _measured(evaluation, replace(job, placement=lodging.placement))
        except NoRoomError:
            pass
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not (lodging.can_leave or lodging.placement):
                raise
            if not lodging.can_leave:
                unit, higher, _ = MADE.get(evaluation.name, (evaluation.name, False, None))
                return Score(None, unit, higher, reason="out of memory, with one block at a time on the device too")
        else:
            if size != job.batch_size:
                note(f"batch size halved to {size}", "out of memory")
            return score
        # Here the error is gone, and with it the frames whose tensors it held.
        lodging.leave_device()
        note("blocks rest on the host", "out of memory")


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

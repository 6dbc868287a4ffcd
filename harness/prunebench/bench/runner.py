"""One run, in this process: load, prune step by step under the clock, audit each step, evaluate, and make the record."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunebench.answers import ask
from prunebench.bench import machine
from prunebench.bench.artefacts import Artefacts
from prunebench.bench.evaluation import evaluate
from prunebench.bench.export import write_model
from prunebench.bench.measure import Cost, measured
from prunebench.bench.plan import RunRequest
from prunebench.errors import AuditError, ContractError, NonFiniteError, Refused
from prunebench.options import option_values, parse_step
from prunebench.plugins import Registry, load_registry
from prunebench.results.records import (
    AuditRecord,
    Failure,
    FailureKind,
    MatrixAudit,
    Provenance,
    RunRecord,
    ScoreRecord,
    StepRecord,
)
from prunebench.spec import Changes, Job, JsonDict, Needs, Progress, Pruner
from prunebench.targets import Target, parse_target
from prunebench.toolkit.adapter_files import load_adapters
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.audit import Before, Finding, audit
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.loading import load_model
from prunebench.toolkit.memory import is_out_of_memory
from prunebench.toolkit.placement import Resident, place_model
from prunebench.toolkit.state import guarded
from prunebench.toolkit.stream import evaluating

_log = logging.getLogger(__name__)
"""For those who want tracebacks; nobody hears it unless told to."""


@dataclass
class Outcome:
    """What a run has come to so far; a failure leaves what was reached before it."""

    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock: float = field(default_factory=time.perf_counter)
    steps: list[StepRecord] = field(default_factory=list)
    finding: Finding | None = None
    scores: dict[str, ScoreRecord] = field(default_factory=dict)
    current_step: str | None = None
    anatomy: ModelAnatomy | None = None
    crowded: bool = False
    """Other processes were at work on the cores that a step needed."""
    extra_parameters: int = 0
    """What the model has in the end beside the parameters it came with: an untied head, and all adapters, loaded ones too."""


def run(request: RunRequest, progress: Progress, executor: str) -> RunRecord:
    """Do one run and make its record, whatever happens; only an interruption from the keyboard gets through."""
    outcome = Outcome()
    try:
        with threads(request.threads):
            model = prune(request, progress, outcome)
            if request.reload:
                model = reloaded(request, model, outcome)
            evaluate(request, model, progress, outcome.scores)
    except Refused as refusal:
        return make_record(request, outcome, executor, refused=str(refusal))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a stranger's method may raise anything; it becomes a record
        _log.info("the run failed", exc_info=True)
        return make_record(request, outcome, executor, failure=classify(error, outcome.current_step))
    return make_record(request, outcome, executor)


def prune(request: RunRequest, progress: Progress, outcome: Outcome) -> PreTrainedModel:
    """Load the model and take every step of the spec.

    Raises:
        Refused: a step declines; asked of all before the first starts.
        RunError: a step breaks the contract, or the result is not what the target says.
    """
    registry = load_registry()
    steps = [parse_step(step.text) for step in request.spec.steps]
    pruners = [registry.pruner(step) for step in steps]
    target = parse_target(request.spec.target)
    progress("load", 0, 1)
    model = load_model(request.model, request.spec.model.dtype)
    anatomy = outcome.anatomy = find_anatomy(model)
    load_adapters(anatomy, request.model.folder)
    ask_all(pruners, anatomy, target, [step.text for step in request.spec.steps])
    placement = Resident(request.device)
    place_model(model, [block.module for block in anatomy.blocks], placement)
    dense, own_parameters = DenseWeights(anatomy, request.model.folder), anatomy.total_parameters
    survivors_changed, explained, group = False, False, "row"
    for index, (spec, pruner) in enumerate(zip(request.spec.steps, pruners, strict=True)):
        outcome.current_step = spec.text
        progress(f"step {spec.text}", index, len(pruners))
        notes: JsonDict = {}
        artefacts = Artefacts(request, pruner, first=index == 0)
        job = _job(request, model, anatomy, target, pruner, placement, dense, progress, notes, artefacts)
        before = Before(anatomy, dense, survivors_changed)
        cost = take_step(pruner, job, notes)
        artefacts.settle(cost)
        outcome.crowded |= cost.crowded
        outcome.steps.append(_step_record(pruner, registry, cost, notes, artefacts.reused))
        progress("audit", 0, 1)
        before.check_masks(pruner.changes())
        before.check_declared(pruner.changes())
        if pruner.changes() & Changes.MASKS and pruner.audit_group() != "earlier":
            group = pruner.audit_group()  # a later step without masks of its own is held to the pattern it found
        explained |= "extra_zeros" in notes
        outcome.finding = audit(anatomy, target, group, explained)
        survivors_changed |= bool(pruner.changes() & Changes.KEPT_WEIGHTS)
    outcome.current_step = None
    outcome.extra_parameters = anatomy.total_parameters - own_parameters + anatomy.adapters.parameters
    return model


def reloaded(request: RunRequest, model: PreTrainedModel, outcome: Outcome) -> PreTrainedModel:
    """The pruned model as whoever downloads it would have it: written to disk and read back, adapters too."""
    assert outcome.anatomy is not None
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        write_model(model.to("cpu"), request.model, outcome.anatomy, folder)  # type: ignore[arg-type]
        again = load_model(replace(request.model, folder=folder), request.spec.model.dtype)
        load_adapters(find_anatomy(again), folder)
    return again


def ask_all(pruners: list[Pruner], anatomy: ModelAnatomy, target: Target, steps: list[str]) -> None:
    """Ask every step whether it takes the job, before the first starts.

    Raises:
        Refused: with the first reason given.
        PluginError: a pruner raises when it is asked, or gives no answer.
    """
    for index, pruner in enumerate(pruners):
        facts = anatomy.facts(target, tuple(steps[:index]))
        reason = (facts.misfit() if ask(pruner, "changes") & Changes.MASKS else None) or ask(pruner, "refuses", facts)
        if reason:
            raise Refused(reason)


def take_step(pruner: Pruner, job: Job, notes: JsonDict) -> Cost:
    """Run one step under the clock, with the model in eval mode and the global state guarded."""
    changed: list[str] = []
    with guarded(changed), evaluating(job.model), measured(job.device) as cost:
        pruner.prune(job)
    if changed:
        notes["global state left changed, and restored"] = ", ".join(changed)
    return cost


def make_record(
    request: RunRequest,
    outcome: Outcome,
    executor: str,
    refused: str | None = None,
    failure: Failure | None = None,
) -> RunRecord:
    """The record of a run that ended as the arguments say."""
    if refused is not None:
        refused = machine.portable(refused) or "no reason was given."
    return RunRecord(
        id=request.spec.id,
        machine=request.machine,
        spec=request.spec,
        status="refused" if refused else "failed" if failure else "ok",
        reason=refused or (failure.message if failure else None),
        failure=failure,
        steps=outcome.steps,
        audit=_audit_record(outcome.finding) if outcome.finding else None,
        scores=outcome.scores,
        extra_parameters=outcome.extra_parameters,
        provenance=_provenance(request, outcome, executor),
    )


def classify(error: BaseException, step: str | None) -> Failure:
    """Tell kinds of failure apart."""
    kind: FailureKind = "error"
    if is_out_of_memory(error):
        kind = "oom"
    elif isinstance(error, NonFiniteError):
        kind = "nan"
    elif isinstance(error, AuditError | ContractError):
        kind = "audit"
    name = type(error).__name__
    try:
        message = machine.portable(str(error).strip()) or name
    except Exception:  # noqa: BLE001 - a stranger's exception may fail at telling what it is
        message = name
    if isinstance(error, SystemExit):
        message = f"sys.exit was called, with {message!r}." if error.args else "sys.exit was called."
    return Failure(kind=kind, type=name, message=message[:2000], step=step)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use so many threads for the time inside; 0 leaves the number alone."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _job(
    request: RunRequest,
    model: PreTrainedModel,
    anatomy: ModelAnatomy,
    target: Target,
    pruner: Pruner,
    placement: Resident,
    dense: DenseWeights,
    progress: Progress,
    notes: JsonDict,
    artefacts: Artefacts,
) -> Job:
    needs = pruner.needs()
    tokens = {f"{name}_tokens": None if array is None else torch.from_numpy(array) for name, array in request.tokens.items()}
    return Job(
        model=model,
        anatomy=anatomy,
        target=target,
        needs=needs,
        # A method that does not declare to use the seed gets the same one whatever the run's.
        seed=request.spec.seed or 0 if needs & (Needs.SEED | Needs.TRAINING) else 0,
        placement=placement,
        batch_size=request.batch_size,
        masks=anatomy.masks.copy(),
        dense=dense,
        progress=progress,
        note=notes.__setitem__,
        attach=anatomy.adapters.attach,
        artefact=artefacts,
        **tokens,
    )


def _step_record(pruner: Pruner, registry: Registry, cost: Cost, notes: JsonDict, reused: list[str]) -> StepRecord:
    entry = registry.pruners[pruner.name]
    return StepRecord(
        pruner=pruner.name,
        options=option_values(pruner),
        revision=pruner.revision,
        distribution=entry.distribution,
        version=entry.version,
        phases={name: round(seconds, 6) for name, seconds in sorted(cost.phases.items())},
        peak_device_bytes=cost.peak_device_bytes,
        peak_host_bytes=cost.peak_host_bytes,
        host_peak_sampled=cost.host_peak_sampled,
        reused=reused,
        notes=notes,
    )


def _audit_record(finding: Finding) -> AuditRecord:
    return AuditRecord(
        removed=finding.removed,
        zeros=finding.zeros,
        extra_zeros=finding.extra,
        sparsity_prunable=finding.zeros / finding.prunable_parameters,
        sparsity_total=finding.zeros / finding.total_parameters,
        coverage=finding.coverage,
        matrices=[MatrixAudit(name=m.name, shape=m.shape, removed=m.removed, zeros=m.zeros) for m in finding.matrices],
    )


def _provenance(request: RunRequest, outcome: Outcome, executor: str) -> Provenance:
    commit, dirty = machine.source_commit()
    return Provenance(
        suite=request.suite,
        tuned=request.tuned,
        command=machine.portable(request.command),
        commit=commit,
        dirty=dirty,
        packages=machine.package_versions(),
        python=platform.python_version(),
        platform=machine.platform_name(),
        device=machine.device_name(request.device),
        driver=machine.driver_version(),
        threads=request.threads or torch.get_num_threads(),
        batch_size=request.batch_size,
        executor=executor,
        shared_machine=outcome.crowded,
        started=outcome.started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - outcome.clock, 3),
        predicted_seconds=round(request.predicted.seconds, 3) if request.predicted else None,
        predicted_peak_bytes=request.predicted.peak_bytes if request.predicted else None,
    )

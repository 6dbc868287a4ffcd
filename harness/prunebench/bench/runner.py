"""One run, in this process: load, prune step by step under the clock, audit each step, evaluate, and make the record."""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunebench.answers import ask
from prunebench.bench import machine
from prunebench.bench.artefacts import Artefacts
from prunebench.bench.checkpoints import Checkpoints, Standing
from prunebench.bench.drawn import drawn_model, without_checkpoints
from prunebench.bench.evaluation import evaluate
from prunebench.bench.export import write_model
from prunebench.bench.mask_bank import Bank
from prunebench.bench.measure import Cost, free_bytes, measured
from prunebench.bench.plan import RunRequest
from prunebench.bench.rescoring import rescored
from prunebench.bench.workplace import Workplace, set_up
from prunebench.errors import AuditError, ContractError, NonFiniteError, Refused
from prunebench.handles import Placement
from prunebench.options import option_values, parse_step
from prunebench.plugins import Registry, load_registry
from prunebench.results.records import (
    AuditRecord,
    Failure,
    FailureKind,
    KeptMasks,
    MatrixAudit,
    Provenance,
    RunRecord,
    ScoreRecord,
    StepRecord,
)
from prunebench.spec import Changes, Job, JsonDict, Progress, Pruner
from prunebench.targets import Target, parse_target
from prunebench.toolkit import kernels
from prunebench.toolkit.adapter_files import load_adapters
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.audit import Before, Finding, audit
from prunebench.toolkit.loading import check_unchanged, load_model
from prunebench.toolkit.memory import is_out_of_memory
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
    batch_size: int = 0
    """Sequences at a time: as asked, or as chosen by what was free."""
    placement: Placement | None = None
    """Where the model's blocks rest; None where it was not pruned here, or was read back."""
    checkpoints: Checkpoints | None = None
    bank: Bank | None = None
    changes: Changes = Changes.NOTHING
    """All that the steps declared."""
    masks: KeptMasks | None = None
    extra_parameters: int = 0
    """What the model has in the end beside the parameters it came with: an untied head, and all adapters, loaded ones too."""

    def kept(self) -> None:
        """The scores so far need not be found again."""
        if self.checkpoints is not None:
            self.checkpoints.scored(self.scores, self.steps)

    def note(self, key: str, value: str) -> None:
        """Something that the record should keep of what follows the last step."""
        self.steps[-1].notes[key] = value


def run(request: RunRequest, progress: Progress, executor: str) -> RunRecord:
    """Do one run and make its record, whatever happens; only an interruption from the keyboard gets through."""
    outcome = Outcome()
    try:
        with threads(request.threads):
            model = rescored(request, progress, outcome) if request.rescoring else prune(request, progress, outcome)
            if request.reload:
                model = reloaded(request, model, outcome)
            chosen = replace(request, batch_size=outcome.batch_size)
            if request.spec.evals:
                evaluate(chosen, model, progress, outcome.scores, outcome.kept, outcome.note, outcome.placement)
            _check_model(request)
            if outcome.bank is not None:
                progress("keep masks", 0, 1)
                outcome.masks = outcome.bank.kept(outcome.changes, outcome.note)
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
        ModelError: the model is not the one in the spec.
    """
    registry = load_registry()
    pruners = [registry.pruner(parse_step(step.text)) for step in request.spec.steps]
    target = parse_target(request.spec.target)
    free = int(min(free_bytes(torch.device(request.device), request.memory), request.device_memory or float("inf")))
    progress("load", 0, 1)
    _check_model(request)
    is_shape, dtype = request.model.shape is not None, request.spec.model.dtype
    model = drawn_model(request, pruners, free) if is_shape else load_model(request.model, dtype)
    anatomy = outcome.anatomy = find_anatomy(model)
    if not is_shape:
        load_adapters(anatomy, request.model.folder)
    outcome.bank = Bank(request, anatomy) if request.keep else None
    ask_all(pruners, anatomy, target, [step.text for step in request.spec.steps])
    outcome.checkpoints = checkpoints = Checkpoints(without_checkpoints(request, model), pruners)
    work = set_up(checkpoints.request, model, anatomy, target, pruners, free)
    checkpoints.arranged(work.request)
    outcome.placement = work.placement
    own_parameters, outcome.batch_size = anatomy.total_parameters, work.request.batch_size
    outcome.started, outcome.clock = checkpoints.began(outcome.started, outcome.clock)
    standing = checkpoints.restore(anatomy)
    outcome.steps, outcome.crowded, outcome.scores = standing.steps, standing.crowded, checkpoints.scores
    if standing.steps:
        outcome.finding = audit(anatomy, target, standing.group, standing.explained)
    for index in range(len(standing.steps), len(pruners)):
        outcome.current_step = request.spec.steps[index].text
        progress(f"step {outcome.current_step}", index, len(pruners))
        _next_step(work, registry, pruners[index], standing, outcome, progress)
    _check_model(request)  # the dense weights were read from its files all the while
    outcome.steps[-1].notes.update(checkpoints.notes)
    outcome.current_step, outcome.changes = None, Changes(standing.changes)
    outcome.extra_parameters = anatomy.total_parameters - own_parameters + anatomy.adapters.parameters
    return model


def _check_model(request: RunRequest) -> None:
    """Raise a ModelError where the model is not the one in the spec any more: no record claims what was not measured."""
    check_unchanged(request.model, request.spec.model.weights, request.spec.model.tokenizer)


def _next_step(
    work: Workplace, registry: Registry, pruner: Pruner, standing: Standing, outcome: Outcome, progress: Progress
) -> None:
    """Take a step, compare the model with what it declared, and make its record."""
    notes: JsonDict = {}
    checkpoints, anatomy, changes = outcome.checkpoints, work.anatomy, pruner.changes()
    assert checkpoints is not None
    artefacts, checkpoint = Artefacts(work.request, pruner, first=not standing.steps), checkpoints.of_step(pruner, notes)
    job = work.job(pruner, progress, notes, artefacts, checkpoint)
    before = Before(anatomy, work.dense, standing.survivors_changed, work.looks)
    kernels.begin_report()
    cost = take_step(pruner, job, notes)
    notes |= work.placement.remarks()
    if used := kernels.report():
        notes["kernels"] = dict(used)
    artefacts.settle(cost)
    if checkpoint is not None:
        checkpoint.settle(cost)
    standing.crowded |= cost.crowded
    outcome.crowded = standing.crowded
    floors = work.request.floors[len(standing.steps)] if work.request.floors else {}
    standing.steps.append(_step_record(pruner, registry, cost, notes, artefacts.reused, floors))
    progress("audit", 0, 1)
    before.check_masks(changes)
    before.check_declared(changes)
    if changes & Changes.MASKS and pruner.audit_group() != "earlier":
        standing.group = pruner.audit_group()  # a later step without masks of its own is held to the pattern it found
    standing.explained |= "extra_zeros" in notes
    outcome.finding = audit(anatomy, work.target, standing.group, standing.explained, work.looks)
    standing.changes |= changes.value
    checkpoints.step_done(standing, anatomy)


def reloaded(request: RunRequest, model: PreTrainedModel, outcome: Outcome) -> PreTrainedModel:
    """The pruned model as whoever downloads it would have it: written to disk and read back, adapters too."""
    assert outcome.anatomy is not None
    outcome.placement = None
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
    with guarded(changed), evaluating(job.model), measured(*job.placement.devices) as cost:
        pruner.prune(job)
    if cost.device_peaks:
        notes["peak bytes of each device"] = {**cost.device_peaks, "sum": sum(cost.device_peaks.values())}
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
        masks=outcome.masks,
        rescored_from=request.rescoring.source if request.rescoring else None,
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


def _step_record(
    pruner: Pruner, registry: Registry, cost: Cost, notes: JsonDict, reused: list[str], floors: Mapping[str, float]
) -> StepRecord:
    entry = registry.pruners[pruner.name]
    return StepRecord(
        pruner=pruner.name,
        options=option_values(pruner),
        revision=pruner.revision,
        distribution=entry.distribution,
        version=entry.version,
        phases={name: round(seconds, 6) for name, seconds in sorted(cost.phases.items())},
        floors=dict(floors),
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
        batch_size=outcome.batch_size or request.batch_size,
        executor=executor,
        shared_machine=outcome.crowded,
        started=outcome.started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - outcome.clock, 3),
        predicted_seconds=round(request.predicted.seconds, 3) if request.predicted else None,
        predicted_peak_bytes=request.predicted.peak_bytes if request.predicted else None,
    )

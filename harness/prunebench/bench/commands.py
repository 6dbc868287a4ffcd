"""The work behind `prunebench prune`, `eval` and the options of `run`, without the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prunebench.bench import runner
from prunebench.bench.cost_only import refuse_shape
from prunebench.bench.evaluation import evaluate
from prunebench.bench.export import check_output, save_pruned
from prunebench.bench.machine import default_dtype, machine_slug
from prunebench.bench.plan import Planner, RunRequest, pick_device
from prunebench.bench.specs import AskedEval, eval_specs
from prunebench.bench.suite import (
    Calibration,
    Grid,
    Limits,
    MethodEntry,
    ModelEntry,
    Suite,
    SuiteHead,
    Training,
    check_measured,
)
from prunebench.errors import OptionError, PrunebenchError, Refused, RequestError, RunError, described
from prunebench.options import parse_step, split_steps
from prunebench.plugins import load_registry
from prunebench.results.records import ModelSpec, Recipe, RunRecord, RunSpec, ScoreRecord
from prunebench.shipped import suites_folder
from prunebench.spec import Progress
from prunebench.toolkit.adapter_files import adapter_files, load_adapters
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.loading import ALLOWABLE, DTYPES, identify, load_model, resolve_model
from prunebench.toolkit.shapes import SHAPE


@dataclass(frozen=True)
class PruneOptions:
    """What `prunebench prune` was asked."""

    model: str
    steps: tuple[str, ...]
    target: str
    out: Path
    calibration: str
    samples: int
    length: int | None
    seed: int
    training: str | None
    training_tokens: int
    revision: str | None
    dtype: str | None
    device: str | None
    batch_size: int
    allowed: tuple[str, ...]
    command: str


def narrowed(suite: Suite, models: list[str], methods: list[str]) -> Suite:
    """A suite with its models or methods replaced by those of the command line, where folders are of the working folder."""
    changes: dict[str, object] = {}
    if models:
        dtype = suite.model[0].dtype
        changes["model"] = tuple(_model_entry(_of_working_folder(name), dtype) for name in models)
    if methods:
        changes["method"] = tuple(MethodEntry(steps=tuple(split_steps(method))) for method in methods)
    chosen = suite.model_copy(update=changes)
    check_measured(chosen, chosen.suite.name)
    return chosen


def _of_working_folder(name: str) -> str:
    """A model's folder in full, where there is one."""
    path = Path(name).expanduser().absolute()
    return str(path) if path.is_dir() else name


def prune_to_folder(options: PruneOptions, progress: Progress) -> RunRecord:
    """Prune a model and write it; the record says how it went. Nothing is written unless it went well.

    Raises:
        RequestError: anything in the options that cannot be done; found before any work.
    """
    check_output(options.out)
    request = _prune_request(options)
    outcome = runner.Outcome()
    try:
        with runner.threads(request.threads):
            model = runner.prune(request, progress, outcome)
    except Refused as refusal:
        return runner.make_record(request, outcome, "inline", refused=str(refusal))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a stranger's method may raise anything; it becomes a record
        failure = runner.classify(error, outcome.current_step)
        return runner.make_record(request, outcome, "inline", failure=failure)
    record = runner.make_record(request, outcome, "inline")
    assert outcome.anatomy is not None
    save_pruned(model.to("cpu"), request.model, outcome.anatomy, record, options.out)  # type: ignore[arg-type]
    return record


def evaluate_model(
    name: str,
    evals: list[str],
    revision: str | None,
    dtype: str | None,
    device: str | None,
    batch_size: int,
    allowed: tuple[str, ...],
) -> dict[str, ScoreRecord]:
    """Evaluate a model as it is.

    Raises:
        RequestError: anything that cannot be done; found before the weights are loaded.
        RunError: an evaluation fails.
    """
    registry = load_registry()
    built = [AskedEval(text, registry.eval(parse_step(text))) for text in evals]
    device = pick_device(device)
    dtype = _checked_dtype(dtype) or default_dtype(device)
    source = resolve_model(name, [Path(), suites_folder()], revision, checked_allowed(allowed))
    refuse_shape(source, "to evaluate")
    identity = identify(source)
    folder = Path.cwd()
    model = ModelSpec(
        name=source.name, weights=identity.weights, tokenizer=identity.tokenizer_hash, dtype=dtype, source=source.source
    )
    specs = eval_specs(built, identity, dtype, folder, device=device)
    spec = RunSpec(model=model, steps=(), target="dense", seed=None, recipe=Recipe(), evals=specs)
    request = RunRequest(
        spec=spec,
        model=source,
        folder=str(folder),
        tokens={},
        eval_texts=tuple(evals),
        machine=machine_slug(),
        suite=None,
        command="",
        device=device,
        threads=0,
        batch_size=batch_size,
    ).on(device)
    loaded = load_model(source, dtype)
    if adapter_files(source.folder):
        load_adapters(find_anatomy(loaded), source.folder)
    scores: dict[str, ScoreRecord] = {}
    try:
        evaluate(request, loaded, lambda *_: None, scores)
    except (KeyboardInterrupt, PrunebenchError):
        raise
    except BaseException as error:
        measured = request.eval_texts[len(scores)]
        raise RunError(f"the evaluation {measured} raised {described(error)}.") from error
    return scores


def _prune_request(options: PruneOptions) -> RunRequest:
    device = pick_device(options.device, several=True)
    entry = _model_entry(options.model, _checked_dtype(options.dtype), options.revision, checked_allowed(options.allowed))
    suite = Suite(
        suite=SuiteHead(name="prune"),
        model=(entry,),
        calibration=Calibration(source=options.calibration, samples=options.samples, length=options.length or 0),
        training=Training(source=options.training, tokens=options.training_tokens) if options.training else None,
        method=(MethodEntry(steps=options.steps),),
        grid=Grid(targets=(options.target,), seeds=(options.seed,)),
        limits=Limits(batch_size=options.batch_size),
        folder=Path.cwd(),
    )
    [request] = Planner(suite, load_registry(), machine_slug(), options.command, device).requests()
    refuse_shape(request.model, "to write a pruned")
    if request.spec.target == "dense" and options.target.strip() != "dense":
        raise RequestError(f"the steps {request.spec.method} prune nothing, so the target {options.target} cannot be met.")
    return request


def _model_entry(
    name: str, dtype: str | None, revision: str | None = None, allowed: frozenset[str] = frozenset()
) -> ModelEntry:
    """A model of the command line; a name that is no folder is the Hub's when a revision comes with it, or `shape:NAME`."""
    if name.startswith(SHAPE):
        return ModelEntry(shape=name.removeprefix(SHAPE), dtype=dtype)
    return ModelEntry.model_construct(path=name, hub=None, revision=revision, dtype=dtype, allow=tuple(allowed))


def _checked_dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in DTYPES:
        raise OptionError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    return dtype


def checked_allowed(allowed: tuple[str, ...]) -> frozenset[str]:
    """What the user allows for a model; an OptionError where it is nothing that can be allowed."""
    for item in allowed:
        if item not in ALLOWABLE:
            raise OptionError(f"--allow is one of {', '.join(ALLOWABLE)}, not {item!r}.")
    return frozenset(allowed)

"""Which runs can be scored again from what they kept, and the runs that do it: nothing is pruned, only measured anew."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prunebench.bench.plan import Rescoring, RunRequest
from prunebench.bench.specs import AskedEval, RunTokens, build_method, eval_specs, run_spec
from prunebench.errors import DataError, RequestError, StoreError
from prunebench.options import parse_step
from prunebench.plugins import Registry
from prunebench.results.content import fingerprint
from prunebench.results.records import EvalSpec, RunRecord, RunSpec
from prunebench.results.store import ResultStore, Stored
from prunebench.shipped import suites_folder
from prunebench.targets import Dense, parse_target
from prunebench.toolkit.loading import Allowed, ModelIdentity, ModelSource, identify, resolve_model

DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What `prunebench rescore` comes to."""

    todo: tuple[RunRequest, ...]
    done: int
    """Runs that have all these scores already."""
    left_out: tuple[tuple[RunRecord, str], ...]
    """Runs that cannot be scored again, and why."""


@dataclass
class Rescorer:
    """Plans runs that take their pruning from earlier ones."""

    store: ResultStore
    registry: Registry
    evals: tuple[str, ...]
    machine: str
    command: str
    device: str
    model: str | None = None
    """The folder of the dense model; without it the one that the record names."""
    batch_size: int | None = None
    """As in the earlier run where None: scores are then the same to the last bit."""
    allowed: Allowed = frozenset()
    _models: dict[tuple[str, str | None], tuple[ModelSource, ModelIdentity]] = field(default_factory=dict)
    _specs: dict[tuple[str, str, bool], tuple[EvalSpec, ...]] = field(default_factory=dict)

    def plan(self, records: Sequence[RunRecord], everything: Iterable[RunRecord], again: bool) -> Plan:
        """The runs that measure what is missing, the dense model's first where it is missing too.

        Args:
            records: the runs to score again.
            everything: all records, which say what is there.
            again: measure also what is there.

        Raises:
            RequestError: an evaluation that cannot be built.
        """
        asked = [AskedEval(text, self.registry.eval(parse_step(text))) for text in self.evals]
        known = _known(everything, self.machine)
        dense: dict[str, RunRequest] = {}
        found: dict[str, RunRequest] = {}
        left_out, done = [], 0
        for record in records:
            try:
                request = self._request(record, asked)
            except RequestError as error:
                left_out.append((record, str(error).rstrip(".")))
                continue
            wanted = _only(request, {} if again else known)
            done += wanted is None
            if wanted is not None:
                found.setdefault(wanted.spec.id, wanted)
            control = _only(self._dense(request), known)
            if control is not None:
                dense.setdefault(control.spec.id, control)
        return Plan((*dense.values(), *found.values()), done, tuple(left_out))

    def _request(self, record: RunRecord, asked: Sequence[AskedEval]) -> RunRequest:
        """The run that scores a record's pruned model.

        Raises:
            RequestError: it cannot be done; the message is the reason.
        """
        if record.spec.model.is_shape:
            raise RequestError("the weights of a shape are random, and nothing is scored on them.")
        _check_kept(record, self.store)
        source, identity = self._model_of(record)
        model, folder = record.spec.model, Path.cwd()
        reloaded = any(spec.conditions.get("reloaded") is True for spec in record.spec.evals)
        key = (model.weights, model.dtype, reloaded)
        if key not in self._specs:
            self._specs[key] = eval_specs(asked, identity, model.dtype, folder, reloaded, self.device)
        _check_text(record.spec, self._specs[key])
        made = record.provenance
        return RunRequest(
            spec=record.spec.model_copy(update={"evals": self._specs[key]}),
            model=source,
            folder=str(folder),
            tokens={},
            eval_texts=self.evals,
            machine=self.machine,
            suite=made.suite,
            command=self.command,
            device=self.device,
            threads=made.threads,
            batch_size=self.batch_size or made.batch_size,
            reload=reloaded,
            tuned=made.tuned,
            rescoring=Rescoring(record, str(self.store.folder.resolve())),
        ).on(self.device)

    def _dense(self, request: RunRequest) -> RunRequest:
        """The run of the dense model under the same conditions."""
        method = build_method([DENSE], self.registry)
        spec = run_spec(request.spec.model, method, Dense(), None, RunTokens(), request.spec.evals)
        return replace(request, spec=spec, rescoring=None, tuned=None)

    def _model_of(self, record: RunRecord) -> tuple[ModelSource, ModelIdentity]:
        """The dense model of a record.

        Raises:
            RequestError: it is not there, or is another.
        """
        spec = record.spec.model
        name, revision = self.model or spec.name, None
        if self.model is None and "@" in spec.source:
            name, _, revision = spec.source.rpartition("@")
        elif self.model is None and spec.source.startswith("mirror:"):
            name = spec.source.removeprefix("mirror:")
        if (name, revision) not in self._models:
            try:
                source = resolve_model(name, list(_folders()), revision, self.allowed)
            except RequestError as error:
                raise RequestError(
                    str(error) if self.model else f"{str(error).rstrip('.')}; name its folder with --model"
                ) from None
            self._models[name, revision] = (source, identify(source))
        source, identity = self._models[name, revision]
        if identity.weights != spec.weights or identity.tokenizer_hash != spec.tokenizer:
            what = "weights" if identity.weights != spec.weights else "tokenizer"
            raise RequestError(f"the model {source.name} has another {what} than the record's; name the right one with --model")
        return source, identity


def chosen(stored: Iterable[Stored], ids: Sequence[str], machine: str) -> list[RunRecord]:
    """The runs that the beginnings of ids name; without any all that were pruned, of every machine.

    Of several records of a run the one that can best be scored again counts, of a run on several machines this machine's.

    Raises:
        RequestError: no run has an id that begins so, or several have.
    """
    runs: dict[str, RunRecord] = {}
    for record in sorted((item.record for item in stored), key=lambda record: _worth(record, machine)):
        runs[record.id] = record
    if not ids:
        pruned = [record for record in runs.values() if record.status == "ok" and _is_pruned(record)]
        return [record for record in pruned if record.rescored_from in (None, record.id) or record.rescored_from not in runs]
    found: dict[str, RunRecord] = {}
    for prefix in ids:
        matching = [run for run in runs if run.startswith(prefix)]
        if len(matching) != 1:
            more = f": {', '.join(matching)}" if 1 < len(matching) <= 4 else ""
            many = f"{len(matching)} runs have" if matching else "no run has"
            raise RequestError(f"{many} an id that begins with {prefix!r}{more}.")
        found[matching[0]] = runs[matching[0]]
    return list(found.values())


def _worth(record: RunRecord, machine: str) -> tuple[bool, bool, bool, bool, str]:
    kept = record.masks
    complete = kept is not None and kept.note is None
    return (record.status == "ok", complete, kept is not None, record.machine == machine, record.provenance.started)


def _is_pruned(record: RunRecord) -> bool:
    return parse_target(record.spec.target).sparsity > 0


def _check_kept(record: RunRecord, store: ResultStore) -> None:
    """Raise a RequestError where a record's pruned model cannot be made again from what was kept."""
    if record.status != "ok":
        raise RequestError(f"the run has no pruned model: it is {record.status}")
    if not _is_pruned(record):
        raise RequestError("nothing was pruned; the dense model is measured with any other run")
    if record.masks is None:
        raise RequestError("its masks were not kept; run it with --keep-masks --again")
    if record.masks.note is not None:
        raise RequestError(record.masks.note)
    store.masks(record)
    weights = record.masks.weights_file
    if weights is not None and not (store.folder / weights).is_file():
        raise StoreError(f"the file of kept weights {weights} is missing")


def _check_text(spec: RunSpec, evals: Sequence[EvalSpec]) -> None:
    """Raise a DataError where the model has seen the text on which it would be measured."""
    for purpose, text in (("calibration", spec.recipe.calibration), ("training", spec.recipe.training)):
        if text is not None and any(each.conditions.get("content") == text.content for each in evals):
            raise DataError(f"{text.label()} was its {purpose} text, and would be its evaluation's")


def _known(records: Iterable[RunRecord], machine: str) -> dict[str, set[str]]:
    """Under which conditions a machine has measured each run, as fingerprints; runs whatever else was measured."""
    found: dict[str, set[str]] = {}
    for record in records:
        if record.status == "ok" and record.machine == machine:
            found.setdefault(_bare(record.spec), set()).update(fingerprint(s.conditions) for s in record.scores.values())
    return found


def _bare(spec: RunSpec) -> str:
    """The id of a run without its evaluations."""
    return spec.model_copy(update={"evals": ()}).id


def _only(request: RunRequest, known: Mapping[str, Collection[str]]) -> RunRequest | None:
    """The run with those evaluations that were not measured yet; None where all were."""
    there = known.get(_bare(request.spec), ())
    left = [
        (spec, text)
        for spec, text in zip(request.spec.evals, request.eval_texts, strict=True)
        if fingerprint(spec.conditions) not in there
    ]
    if not left:
        return None
    spec = request.spec.model_copy(update={"evals": tuple(spec for spec, _ in left)})
    return replace(request, spec=spec, eval_texts=tuple(text for _, text in left))


def _folders() -> Iterator[Path]:
    """Where models are looked for by name: here, among the shipped ones."""
    yield Path.cwd()
    yield suites_folder()
    yield from sorted(path for path in suites_folder().iterdir() if path.is_dir())

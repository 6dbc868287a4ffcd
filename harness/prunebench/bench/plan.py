"""From a suite to runs: expand models x methods x targets x seeds, and check every name, option and path before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from prunebench.bench.machine import default_device, default_dtype, portable
from prunebench.bench.suite import Calibration, MethodEntry, ModelEntry, Suite, suites_folder
from prunebench.errors import DataError, RequestError
from prunebench.options import Step, canonical, parse_step
from prunebench.plugins import Registry
from prunebench.results.records import EvalSpec, ModelSpec, Recipe, RunSpec, StepSpec, TextSpec
from prunebench.spec import Changes, Eval, EvalFacts, JsonDict, Needs, Pruner
from prunebench.targets import Dense, Target, parse_target
from prunebench.toolkit.calibration import SAMPLER, TokenArray, Tokens, calibration_tokens, packed_windows
from prunebench.toolkit.loading import ModelIdentity, ModelSource, identify, resolve_model
from prunebench.toolkit.texts import Source


@dataclass(frozen=True)
class RunTokens:
    """The token arrays a run may use."""

    calibration: Tokens | None = None
    training: Tokens | None = None
    validation: Tokens | None = None

    def arrays(self) -> dict[str, TokenArray | None]:
        """The arrays by name, as the runner takes them."""
        return {
            name: tokens.array if tokens else None
            for name, tokens in (
                ("calibration", self.calibration),
                ("training", self.training),
                ("validation", self.validation),
            )
        }


@dataclass(frozen=True)
class RunRequest:
    """All that a process needs to do one run."""

    spec: RunSpec
    model: ModelSource
    folder: str
    """Where relative file names in evaluation options start."""
    tokens: dict[str, TokenArray | None]
    eval_texts: tuple[str, ...]
    """Evaluations as written, for building them again."""
    machine: str
    suite: str | None
    command: str
    device: str
    threads: int
    batch_size: int
    timeout: float | None = None
    reload: bool = False
    """Write the pruned model to disk and read it back before it is evaluated."""
    tuned: str | None = None


@dataclass
class Method:
    """A method's pruners, built and checked."""

    pruners: list[Pruner]
    specs: tuple[StepSpec, ...]
    targets: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    calibration: Calibration | None = None
    tuned: str | None = None

    @property
    def needs(self) -> Needs:
        """What any of its steps reads."""
        found = Needs(0)
        for pruner in self.pruners:
            found |= pruner.needs()
        return found

    @property
    def is_dense(self) -> bool:
        """Whether no step lays a mask, so that the target is `dense`."""
        return not any(pruner.changes() & Changes.MASKS for pruner in self.pruners)

    @property
    def is_seeded(self) -> bool:
        """Whether the seed matters: the method uses sampled text or random numbers."""
        return bool(self.needs & (Needs.CALIBRATION | Needs.GRADIENTS | Needs.TRAINING | Needs.SEED))


def build_method(steps: Sequence[str | Step], registry: Registry) -> Method:
    """Build the pruners of a method.

    Raises:
        RequestError: an unknown name or option, or a value that does not fit.
    """
    parsed = [step if isinstance(step, Step) else parse_step(step) for step in steps]
    pruners = [registry.pruner(step) for step in parsed]
    specs = tuple(StepSpec(text=canonical(pruner.name, pruner), revision=pruner.revision) for pruner in pruners)
    return Method(pruners, specs)


_CALIBRATED = Needs.CALIBRATION | Needs.GRADIENTS


@dataclass
class Planner:
    """Expands a suite; keeps what several runs share (model identities, token arrays, conditions)."""

    suite: Suite
    registry: Registry
    machine: str
    command: str
    device: str = field(default_factory=default_device)
    _tokens: dict[tuple[str, ...], Tokens] = field(default_factory=dict)

    def requests(self) -> list[RunRequest]:
        """Every run of the suite, models outermost, each method's targets and seeds together.

        Raises:
            RequestError: anything in the suite that cannot be done.
        """
        methods = [self._method(entry) for entry in self.suite.method]
        evals = [(entry.use, self.registry.eval(parse_step(entry.use))) for entry in self.suite.eval]
        targets = {text: parse_target(text) for text in self.suite.grid.targets}
        for method in methods:
            targets |= {text: parse_target(text) for text in method.targets or ()}
        found: dict[str, RunRequest] = {}
        for entry in self.suite.model:
            for request in self._of_model(entry, methods, evals, targets):
                found.setdefault(request.spec.id, request)
        return list(found.values())

    def _method(self, entry: MethodEntry) -> Method:
        method = build_method(entry.steps, self.registry)
        method.targets, method.seeds, method.tuned = entry.targets, entry.seeds, entry.tuned
        method.calibration = entry.calibration or self.suite.calibration
        name = " + ".join(spec.text for spec in method.specs)
        wanted = ((_CALIBRATED, "calibration", method.calibration), (Needs.TRAINING, "training", self.suite.training))
        for need, section, found in wanted:
            if method.needs & need and found is None:
                raise RequestError(
                    f"the method {name} needs {section} text, and the suite has no [{section}] (`prune` takes --{section})."
                )
        return method

    def _of_model(
        self,
        entry: ModelEntry,
        methods: list[Method],
        evals: list[tuple[str, Eval]],
        targets: dict[str, Target],
    ) -> list[RunRequest]:
        source = resolve_model(entry.name, [self.suite.folder, suites_folder()], entry.revision, frozenset(entry.allow))
        identity = identify(source)
        dtype = entry.dtype or default_dtype(self.device)
        model = ModelSpec(
            name=source.name,
            weights=identity.weights,
            tokenizer=identity.tokenizer_hash,
            dtype=dtype,
            source=source.source,
        )
        conditions = eval_specs(evals, identity, dtype, self.suite.folder, entry.reload)
        found = []
        for method in methods:
            for target in [Dense()] if method.is_dense else [targets[t] for t in method.targets or self.suite.grid.targets]:
                for seed in (method.seeds or self.suite.grid.seeds) if method.is_seeded else (None,):
                    tokens = self._run_tokens(method, identity, seed or 0)
                    _check_texts(tokens, conditions)
                    spec = run_spec(model, method, target, seed, tokens, conditions)
                    request = self._request(spec, source, tokens, evals)
                    found.append(replace(request, reload=entry.reload, tuned=method.tuned))
        return found

    def _run_tokens(self, method: Method, identity: ModelIdentity, seed: int) -> RunTokens:
        calibration = training = validation = None
        length = self.suite.calibration.length if self.suite.calibration else 512
        if method.needs & _CALIBRATED and method.calibration:
            calibration = self._calibration(method.calibration, identity, seed)
        if method.needs & Needs.TRAINING and self.suite.training:
            training = self._packed(identity, self.suite.training.source, "train", length, self.suite.training.tokens)
            self._check_context(identity, training.array.shape[1], "training")
            if self.suite.validation:
                validation = self._packed(identity, self.suite.validation.source, "validation", length, None)
        return RunTokens(calibration, training, validation)

    def _calibration(self, asked: Calibration, identity: ModelIdentity, seed: int) -> Tokens:
        is_file = asked.source.endswith(".npy")  # then its shape counts, and the suite's numbers are not read
        self._check_context(identity, 0 if is_file else asked.length, "calibration")
        key = ("calibration", identity.tokenizer_hash, str(seed), asked.model_dump_json())
        if key not in self._tokens:
            vocabulary = identity.vocabulary()
            self._tokens[key] = calibration_tokens(
                asked.source, vocabulary, asked.samples, asked.length, seed, self.suite.folder
            )
        self._check_context(identity, self._tokens[key].array.shape[1], "calibration")
        return self._tokens[key]

    def _check_context(self, identity: ModelIdentity, length: int, kind: str) -> None:
        context = getattr(identity.config.get_text_config(), "max_position_embeddings", length)
        if length > context:
            raise DataError(f"{kind} sequences of {length} tokens are longer than the model's context of {context}.")

    def _packed(self, identity: ModelIdentity, source: str, split: str, length: int, tokens: int | None) -> Tokens:
        key = ("packed", identity.tokenizer_hash, source, split)
        if key not in self._tokens:
            self._tokens[key] = packed_windows(source, split, identity.vocabulary(), length, tokens, self.suite.folder)
        return self._tokens[key]

    def _request(self, spec: RunSpec, source: ModelSource, tokens: RunTokens, evals: list[tuple[str, Eval]]) -> RunRequest:
        limits = self.suite.limits
        return RunRequest(
            spec=spec,
            model=source,
            folder=str(self.suite.folder),
            tokens=tokens.arrays(),
            eval_texts=tuple(text for text, _ in evals),
            machine=self.machine,
            suite=self.suite.suite.name,
            command=self.command,
            device=self.device,
            threads=limits.threads or 0,
            batch_size=limits.batch_size,
            timeout=limits.timeout,
        )


def _check_texts(tokens: RunTokens, evals: tuple[EvalSpec, ...]) -> None:
    """Texts that serve two purposes make numbers that mean nothing.

    Raises:
        RequestError: calibration and training, or one of them and an evaluation, are the same text.
    """
    seen = {spec.conditions.get("content"): "evaluation" for spec in evals}
    for purpose, found in (("calibration", tokens.calibration), ("training", tokens.training)):
        if found is not None:
            content, source = found.source.content, found.source
            if content in seen:
                where = f"{source.name} ({source.split})" if source.split else source.name
                raise RequestError(f"{seen[content]} and {purpose} text are both {where}; they may share no document.")
            seen[content] = purpose


def pick_device(asked: str | None) -> str:
    """The device to work on.

    Raises:
        RequestError: it is not there.
    """
    if asked is None:
        return default_device()
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise RequestError(f"--device is cpu, cuda or cuda:N, not {asked!r}.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RequestError(f"the device {asked} is not there: this machine has {torch.cuda.device_count()} CUDA devices.")
    if device.type not in ("cpu", "cuda"):
        raise RequestError(f"--device is cpu, cuda or cuda:N, not {asked!r}.")
    return asked


def run_spec(
    model: ModelSpec,
    method: Method,
    target: Target,
    seed: int | None,
    tokens: RunTokens,
    evals: tuple[EvalSpec, ...],
) -> RunSpec:
    """The spec of one run."""
    calibration, training = tokens.calibration, tokens.training
    from_file = calibration is not None and calibration.source.name.endswith(".npy")
    recipe = Recipe(
        calibration=text_spec(calibration.source) if calibration else None,
        sampler=("as given" if from_file else SAMPLER) if calibration else None,
        samples=calibration.array.shape[0] if calibration else None,
        length=calibration.array.shape[1] if calibration else None,
        training=text_spec(training.source) if training else None,
        training_tokens=training.array.size if training else None,
    )
    return RunSpec(
        model=model,
        steps=method.specs,
        target=str(target),
        seed=seed,
        recipe=recipe,
        calibration_tokens=calibration.content if calibration else None,
        training_tokens=training.content if training else None,
        validation_tokens=tokens.validation.content if tokens.validation else None,
        evals=evals,
    )


def eval_specs(
    evals: list[tuple[str, Eval]], identity: ModelIdentity, dtype: str, folder: Path, reloaded: bool = False
) -> tuple[EvalSpec, ...]:
    """The evaluations with their conditions: what the evaluation says, and what all of them depend on."""
    facts = eval_facts(identity, folder)
    common: JsonDict = {
        "weights": identity.weights,
        "tokenizer": identity.tokenizer_hash,
        "dtype": dtype,
        "attention": identity.attention,
        "prunable": "linear weights of the decoder blocks",
        **({"reloaded": True} if reloaded else {}),
    }
    return tuple(
        EvalSpec(
            text=portable(text),
            revision=evaluation.revision,
            conditions={"eval": evaluation.name, **evaluation.conditions(facts), **common},
        )
        for text, evaluation in evals
    )


def eval_facts(identity: ModelIdentity, folder: Path) -> EvalFacts:
    """What an evaluation may look at."""
    return EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(folder))


def text_spec(source: Source) -> TextSpec:
    """A source as a record keeps it."""
    return TextSpec(**asdict(source))

"""From a suite to runs: expand models x methods x targets x seeds, and check every name, option and path before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from prunebench.bench.cost_only import check_evals, drawn_calibration, drawn_training
from prunebench.bench.machine import default_device, default_dtype
from prunebench.bench.overlap import Overlap, overlaps
from prunebench.bench.specs import (
    CALIBRATED,
    AskedEval,
    Cell,
    Method,
    RunTokens,
    build_method,
    eval_facts,
    eval_specs,
    expand,
    run_spec,
    sequence_length,
)
from prunebench.bench.suite import Calibration, MethodEntry, ModelEntry, Resources, Suite
from prunebench.errors import DataError, RequestError
from prunebench.options import parse_step
from prunebench.plugins import Registry
from prunebench.results.records import EvalSpec, ModelSpec, RunRecord, RunSpec
from prunebench.shipped import suites_folder
from prunebench.spec import Needs
from prunebench.targets import parse_target
from prunebench.toolkit.calibration import TokenArray, Tokens, calibration_tokens, context_of, packed_windows
from prunebench.toolkit.kernels import mode
from prunebench.toolkit.loading import DTYPES, ModelIdentity, ModelSource, identify, resolve_model, shape_of
from prunebench.toolkit.spread import devices_of


@dataclass(frozen=True)
class Prediction:
    """What a run is expected to take."""

    seconds: float
    peak_bytes: int
    """On the device, or of the process on a CPU."""


@dataclass(frozen=True)
class RunResources:
    """What a run is given where a scheduler hands things out."""

    gpus: int = 0
    cpus: int = 1
    memory: float | None = None
    """Bytes on the host."""
    minutes: float | None = None
    slurm: tuple[tuple[str, str | bool], ...] = ()
    """Further options of `sbatch`, by name."""


@dataclass(frozen=True)
class Keeping:
    """What a run keeps beside its record."""

    results: str
    """The results folder, whole; a node that does runs sees it too."""
    weights: bool = False
    """Not only masks, also what else the method changed."""


@dataclass(frozen=True)
class Rescoring:
    """A run whose pruning is taken from an earlier one."""

    record: RunRecord
    results: str
    """The folder where its masks are."""

    @property
    def source(self) -> str:
        """The id of the run that pruned."""
        return self.record.rescored_from or self.record.id


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
    """Sequences at a time; 0: the run chooses, by what is free when it begins."""
    timeout: float | None = None
    memory: float | None = None
    """Bytes that its process may use on the host."""
    resources: RunResources = RunResources()
    predicted: Prediction | None = None
    floors: tuple[Mapping[str, float], ...] = ()
    """Seconds by phase that no implementation avoids, one mapping a step; none where they are not known."""
    reload: bool = False
    """Write the pruned model to disk and read it back before it is evaluated."""
    tuned: str | None = None
    checkpoint_every: int | None = None
    """Blocks after which a run writes down what it needs to go on there; None writes nothing."""
    checkpoints: str | None = None
    """The folder for that, this run's alone."""
    keep: Keeping | None = None
    rescoring: Rescoring | None = None
    """The model is pruned already, and only evaluated."""
    spread: tuple[str, ...] = ()
    """All devices of a run that may use several, `device` first; none where there is only that."""
    device_memory: float | None = None
    """Bytes that it may use of each device."""

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """What it may work on, `device` first."""
        return tuple(map(torch.device, self.spread or (self.device,)))

    @property
    def on_text(self) -> str:
        """The same as a text that `on` takes: `cuda:0+1`."""
        return f"cuda:{'+'.join(name.removeprefix('cuda:') for name in self.spread)}" if self.spread else self.device

    def on(self, text: str) -> RunRequest:
        """The same run on what a text names, `cuda:1` or `cuda:0+1`."""
        first, *others = names = tuple(map(str, devices_of(text)))
        return replace(self, device=first, spread=names if others else ())

    def on_any(self) -> RunRequest:
        """The same run on as many GPUs, the first of those that its process is shown."""
        return self.on(f"cuda:{'+'.join(map(str, range(len(self.spread))))}" if self.spread else "cuda")


@dataclass
class Planner:
    """Expands a suite; keeps what several runs share (model identities, token arrays, conditions)."""

    suite: Suite
    registry: Registry
    machine: str
    command: str
    device: str = field(default_factory=default_device)
    overlaps: list[Overlap] = field(default_factory=list)
    """How much of each evaluation's text was found in training text; filled by `requests`."""
    _tokens: dict[tuple[str, ...], Tokens] = field(default_factory=dict)

    @property
    def folders(self) -> list[Path]:
        """Where models are looked for by name."""
        return [self.suite.folder, suites_folder()]

    def requests(self) -> list[RunRequest]:
        """Every run of the suite, models outermost, each method's targets and seeds together.

        Raises:
            RequestError: anything in the suite that cannot be done, or a setting of the environment that cannot be read.
        """
        mode()  # read here, once, and not by each run first
        cells, evals = self.cells(), self.evals()
        found: dict[str, RunRequest] = {}
        for entry in self.suite.model:
            for request in self._of_model(entry, cells, evals):
                found.setdefault(request.spec.id, request)
        return list(found.values())

    def cells(self) -> list[Cell]:
        """The runs of each model.

        Raises:
            RequestError: a method or target that cannot be read, or text that a method needs and the suite lacks.
        """
        methods = [self._method(entry) for entry in self.suite.method]
        return expand(methods, self.suite.grid.targets, self.suite.grid.seeds)

    def evals(self) -> list[AskedEval]:
        """The suite's evaluations.

        Raises:
            RequestError: one that cannot be built.
        """
        return [
            AskedEval(
                entry.use,
                self.registry.eval(parse_step(entry.use)),
                self._canonical(entry.targets),
                None if entry.seeds is None else frozenset(entry.seeds),
            )
            for entry in self.suite.eval
        ]

    @staticmethod
    def _canonical(targets: tuple[str, ...] | None) -> frozenset[str] | None:
        return None if targets is None else frozenset(str(parse_target(text)) for text in targets)

    def _method(self, entry: MethodEntry) -> Method:
        method = build_method(entry.steps, self.registry)
        method.targets, method.seeds, method.tuned = entry.targets, entry.seeds, entry.tuned
        method.calibration = entry.calibration or self.suite.calibration
        method.resources = self.suite.resources.merged(entry.resources)
        name = " + ".join(spec.text for spec in method.specs)
        wanted = ((CALIBRATED, "calibration", method.calibration), (Needs.TRAINING, "training", self.suite.training))
        for need, section, found in wanted:
            if method.needs & need and found is None:
                raise RequestError(
                    f"the method {name} needs {section} text, and the suite has no [{section}] (`prune` takes --{section})."
                )
        return method

    def _of_model(self, entry: ModelEntry, cells: list[Cell], evals: list[AskedEval]) -> list[RunRequest]:
        source = resolve_model(entry.name, self.folders, entry.revision, frozenset(entry.allow))
        identity = identify(source)
        dtype = entry.dtype or default_dtype(self.device)
        model = ModelSpec(
            name=source.name,
            weights=identity.weights,
            tokenizer=identity.tokenizer_hash,
            dtype=dtype,
            source=source.source,
        )
        check_evals(source, shape_of(source).parameters * DTYPES[dtype].itemsize if source.shape else 0, evals)
        conditions = eval_specs(evals, identity, dtype, self.suite.folder, entry.reload, self.device)
        found = []
        trained: dict[str, Tokens] = {}
        for cell in cells:
            tokens = self._run_tokens(cell.method, identity, cell.seed or 0)
            chosen = [number for number, asked in enumerate(evals) if asked.wanted_at(cell.target, cell.seed)]
            own = tuple(conditions[number] for number in chosen)
            _check_texts(tokens, own)
            spec = run_spec(model, cell.method, cell.target, cell.seed, tokens, own)
            request = self._request(spec, source, tokens, [evals[number].text for number in chosen])
            given = self._resources(cell.method.resources)
            found.append(replace(request, reload=entry.reload, tuned=cell.method.tuned, resources=given))
            if tokens.training is not None:
                trained[tokens.training.content] = tokens.training
        self.overlaps += overlaps(evals, list(trained.values()), eval_facts(identity, self.suite.folder))
        return found

    def _resources(self, asked: Resources) -> RunResources:
        gpus = len(devices_of(self.device)) * self.device.startswith("cuda") if asked.gpus is None else asked.gpus
        memory = None if asked.memory is None else asked.memory * (1 << 30)
        slurm = asked.slurm.model_dump(exclude_none=True)
        return RunResources(gpus, asked.cpus or self.suite.limits.threads or 1, memory, asked.minutes, tuple(slurm.items()))

    def _run_tokens(self, method: Method, identity: ModelIdentity, seed: int) -> RunTokens:
        calibration = training = validation = None
        length = sequence_length(self.suite.calibration, context_of(identity.config))
        if method.needs & CALIBRATED and method.calibration:
            calibration = self._calibration(method.calibration, identity, seed)
        if method.needs & Needs.TRAINING and self.suite.training:
            drawn = drawn_training(identity, self.suite.training, length)
            asked = self.suite.training
            training = drawn or self._packed(identity, asked.source, "train", length, asked.tokens)
            self._check_context(identity, training.array.shape[1], "training")
            if self.suite.validation:
                validation = self._packed(identity, self.suite.validation.source, "validation", length, None)
        return RunTokens(calibration, training, validation)

    def _calibration(self, asked: Calibration, identity: ModelIdentity, seed: int) -> Tokens:
        is_file = asked.source.endswith(".npy")  # then its shape counts, and the suite's numbers are not read
        length = sequence_length(asked, context_of(identity.config))
        self._check_context(identity, 0 if is_file else length, "calibration")
        size = str(identity.vocabulary().size)  # shapes have one tokenizer hash, and random ids of different sizes
        key = ("calibration", identity.tokenizer_hash, size, str(seed), str(length), asked.model_dump_json())
        if key not in self._tokens:
            drawn = drawn_calibration(identity, asked, length, seed)
            vocabulary, folder = identity.vocabulary(), self.suite.folder
            self._tokens[key] = drawn or calibration_tokens(asked.source, vocabulary, asked.samples, length, seed, folder)
        self._check_context(identity, self._tokens[key].array.shape[1], "calibration")
        return self._tokens[key]

    def _check_context(self, identity: ModelIdentity, length: int, kind: str) -> None:
        context = getattr(identity.config.get_text_config(), "max_position_embeddings", length)
        if length > context:
            raise DataError(f"{kind} sequences of {length} tokens are longer than the model's context of {context}.")

    def _packed(self, identity: ModelIdentity, source: str, split: str, length: int, tokens: int | None) -> Tokens:
        key = ("packed", identity.tokenizer_hash, source, split, str(length))
        if key not in self._tokens:
            self._tokens[key] = packed_windows(source, split, identity.vocabulary(), length, tokens, self.suite.folder)
        return self._tokens[key]

    def _request(self, spec: RunSpec, source: ModelSource, tokens: RunTokens, evals: list[str]) -> RunRequest:
        limits = self.suite.limits
        return RunRequest(
            spec=spec,
            model=source,
            folder=str(self.suite.folder),
            tokens=tokens.arrays(),
            eval_texts=tuple(evals),
            machine=self.machine,
            suite=self.suite.suite.name,
            command=self.command,
            device=self.device,
            threads=limits.threads or 0,
            batch_size=limits.batch_size or 0,
            timeout=limits.timeout,
            device_memory=limits.device_memory and limits.device_memory * (1 << 30),
        ).on(self.device)


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


def pick_device(asked: str | None, several: bool = False) -> str:
    """The device to work on; where `several` may serve one run, also a text like `cuda:0+1`, or `cuda+` for all GPUs.

    Raises:
        RequestError: it is not there, or several are named where one is used.
    """
    if asked is None:
        return default_device()
    found, there = devices_of(asked), torch.cuda.device_count()
    if not found or any(device.type == "cuda" and (device.index or 0) >= there for device in found):
        raise RequestError(f"the device {asked} is not there: this machine has {there} CUDA devices.")
    if len(found) > 1 and not several:
        raise RequestError(f"--device {asked} names {len(found)} GPUs, and only runs can be spread over several.")
    return asked

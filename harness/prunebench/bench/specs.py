"""What a run is made of, checked: pruners, token arrays, evaluations with their conditions, and the spec of it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prunebench.answers import ask, ask_all_of
from prunebench.bench.machine import portable
from prunebench.bench.suite import Calibration, Resources
from prunebench.options import Step, canonical, parse_step
from prunebench.plugins import Registry
from prunebench.results.records import EvalSpec, ModelSpec, Recipe, RunSpec, StepSpec, TextSpec
from prunebench.spec import Changes, Eval, EvalFacts, JsonDict, Needs, Pruner
from prunebench.targets import Dense, Target, parse_target
from prunebench.toolkit.calibration import DEFAULT_LENGTH, SAMPLER, TokenArray, Tokens
from prunebench.toolkit.loading import ModelIdentity
from prunebench.toolkit.random_tokens import DRAWN
from prunebench.toolkit.texts import Source

if TYPE_CHECKING:
    from prunebench.bench.costs import Work

CALIBRATED = Needs.CALIBRATION | Needs.GRADIENTS
"""Either: the method reads calibration text."""


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


@dataclass
class Method:
    """A method's pruners, built and checked."""

    pruners: list[Pruner]
    specs: tuple[StepSpec, ...]
    targets: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    calibration: Calibration | None = None
    tuned: str | None = None
    resources: Resources = field(default_factory=Resources)

    @property
    def needs(self) -> Needs:
        """What any of its steps reads."""
        found = Needs(0)
        for pruner in self.pruners:
            found |= ask(pruner, "needs")
        return found

    @property
    def is_dense(self) -> bool:
        """Whether no step lays a mask, so that the target is `dense`."""
        return not any(ask(pruner, "changes") & Changes.MASKS for pruner in self.pruners)

    @property
    def is_seeded(self) -> bool:
        """Whether the seed matters: the method uses sampled text or random numbers."""
        return bool(self.needs & (Needs.CALIBRATION | Needs.GRADIENTS | Needs.TRAINING | Needs.SEED))


def build_method(steps: Sequence[str | Step], registry: Registry) -> Method:
    """Build the pruners of a method.

    Raises:
        RequestError: an unknown name or option, or a value that does not fit.
        PluginError: a pruner says what no pruner says of itself.
    """
    parsed = [step if isinstance(step, Step) else parse_step(step) for step in steps]
    pruners = [registry.pruner(step) for step in parsed]
    for pruner in pruners:
        ask_all_of(pruner)
    specs = tuple(StepSpec(text=canonical(pruner.name, pruner), revision=pruner.revision) for pruner in pruners)
    return Method(pruners, specs)


@dataclass(frozen=True)
class Cell:
    """A run of whatever model: a method at a target, with a seed where that matters."""

    method: Method
    target: Target
    seed: int | None


def expand(methods: Sequence[Method], targets: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All runs of a model, each method's targets and seeds together; `targets` and `seeds` are for methods without their own.

    Raises:
        RequestError: a target that cannot be read, also where no method is for it.
    """
    parsed = {text: parse_target(text) for text in (*targets, *(text for method in methods for text in method.targets or ()))}
    found: dict[tuple[object, ...], Cell] = {}
    for method in methods:
        calibration = method.calibration if method.needs & CALIBRATED else None
        for target in [Dense()] if method.is_dense else [parsed[text] for text in method.targets or targets]:
            for seed in (method.seeds or seeds) if method.is_seeded else (None,):
                found.setdefault((method.specs, str(target), seed, calibration), Cell(method, target, seed))
    return list(found.values())


def sequence_length(asked: Calibration | None, context: int) -> int:
    """Tokens a sequence of calibration and training text: as asked, or the model's context, at most 2048."""
    return (asked.length or min(context, DEFAULT_LENGTH)) if asked else 512


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
    recipe = Recipe(
        calibration=text_spec(calibration.source) if calibration else None,
        sampler=_sampler(calibration) if calibration else None,
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


def _sampler(calibration: Tokens) -> str:
    if calibration.source.origin == "seed":
        return DRAWN
    return "as given" if calibration.source.name.endswith(".npy") else SAMPLER


@dataclass(frozen=True)
class AskedEval:
    """An evaluation of a suite."""

    text: str
    """As written, for building it again."""
    evaluation: Eval
    targets: frozenset[str] | None = None
    """The targets it is for; None for all. The dense model is measured by every one."""
    seeds: frozenset[int] | None = None
    """The seeds it is for, where a method has any; None for all."""

    def wanted_at(self, target: Target, seed: int | None) -> bool:
        """Whether runs at this target, with this seed, are measured by it."""
        at_target = self.targets is None or isinstance(target, Dense) or str(target) in self.targets
        return at_target and (self.seeds is None or seed is None or seed in self.seeds)


def eval_specs(
    evals: Sequence[AskedEval],
    identity: ModelIdentity,
    dtype: str,
    folder: Path,
    reloaded: bool = False,
    device: str = "cpu",
) -> tuple[EvalSpec, ...]:
    """The evaluations with their conditions: what the evaluation says, and what all of them depend on.

    Raises:
        DataError: the data of one cannot be had.
        PluginError: one gives no conditions.
    """
    facts = eval_facts(identity, folder, device)
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
            text=portable(asked.text),
            revision=asked.evaluation.revision,
            conditions={"eval": asked.evaluation.name, **ask(asked.evaluation, "conditions", facts), **common},
        )
        for asked in evals
    )


def eval_facts(identity: ModelIdentity, folder: Path, device: str = "cpu") -> EvalFacts:
    """What an evaluation may look at."""
    return EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(folder), device)


def text_spec(source: Source) -> TextSpec:
    """A source as a record keeps it."""
    return TextSpec(**asdict(source))


def run_label(spec: RunSpec | Work) -> str:
    """A run in a few words."""
    seed = "" if spec.seed is None else f", seed {spec.seed}"
    target = "" if spec.method == spec.target else f" {spec.target}"
    return f"{spec.model.name} {spec.method}{target}{seed}"

"""What a run would take: its efforts, at a model's shape, over a machine's rates.

With W the weights of all blocks, L blocks, d hidden columns, a the width of all queries, n tokens of a sequence, V the
vocabulary, P the prunable weights, and a token's values of b bytes each, an effort takes

    blocks  x  (2 W / products  +  L 4 n a / attention  +  L 34 d b / moved)
    head    x  (2 V d / products  +  16 V / moved)
    grams   x  sum of inputs² / products                     (half of a symmetric matrix, two operations)
    factors x  sum of inputs³ / factored
    sweeps  x  (sum of outputs inputs² / products  +  sum of inputs x 12 launches)
    looks   x  4 P / moved

and never less than its blocks take to be launched, 40 operations a block and call. 17 values a token and hidden column are what
a block computes and keeps for its gradients (Korthikanti et al. 2022, arXiv 2205.05198), each written and read again.
`experience.py` sets right by records what this misses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from prunebench.answers import ask
from prunebench.bench.evals.windows import MAX_LOGITS
from prunebench.bench.rates import Rates
from prunebench.effort import Effort, EffortFacts
from prunebench.results.planning import Asked
from prunebench.results.records import EvalSpec, RunSpec
from prunebench.spec import Needs, Pruner
from prunebench.toolkit.calibration import DEFAULT_LENGTH
from prunebench.toolkit.loading import DTYPES, ModelSource
from prunebench.toolkit.model_shape import ModelShape
from prunebench.toolkit.placement import HOST_TOKENS, MOST_SEQUENCES
from prunebench.toolkit.virtual import is_large

ACTIVATIONS = 17
"""Values that a block keeps of each token and hidden column for its gradients."""

LAUNCHES_A_BLOCK, LAUNCHES_A_COLUMN = 40, 12
"""Small operations in a block's forward pass, and in a sweep over a column."""

LOGIT_COPIES = 4
"""Float32 arrays of the size of a batch's logits while it is trained on: they, their softmax, and the gradients of both."""

START_SECONDS, READ_BYTES, START_BYTES = 0.3, 1e9, 320 << 20
"""Of a run: until the weights are read, bytes of them that are read in a second, and the libraries on the host."""

QUESTION_TOKENS, PAIR_TOKENS = 4 * 64, 2 * 16
"""Assumed: four answers to a question, each read with the question before it; or two sentences, in blimp and in `…pairs`."""

QUESTION_LENGTH = 64
UNKNOWN_TOKENS = 100_000
"""Assumed of an evaluation whose conditions do not say how much it reads."""

RatesFor = Callable[[str], Rates]
"""The machine's rates by dtype."""


@dataclass(frozen=True)
class Work:
    """A run, as far as its cost depends on it."""

    model: ModelSource
    weights: str | None
    """Hash of the weights; None where they are not here."""
    shape: ModelShape
    dtype: str
    steps: tuple[str, ...]
    pruners: tuple[Pruner, ...]
    target: str
    seed: int | None
    facts: EffortFacts
    evals: tuple[EvalSpec, ...]
    """With their conditions, or as much as is known of them."""
    id: str | None = None

    @classmethod
    def of(
        cls,
        spec: RunSpec,
        model: ModelSource,
        shape: ModelShape,
        pruners: Iterable[Pruner],
        training: tuple[int, int],
        batch_size: int,
    ) -> Work:
        """A run that has a spec.

        Args:
            spec: of the run.
            model: what it is called, and where it is if it is here.
            shape: of the model.
            pruners: built from the spec's steps.
            training: windows, and tokens in each.
            batch_size: sequences at a time; 0 where nobody has said how many.
        """
        return cls(
            model=model,
            weights=spec.model.weights,
            shape=shape,
            dtype=spec.model.dtype,
            steps=tuple(step.text for step in spec.steps),
            pruners=tuple(pruners),
            target=spec.target,
            seed=spec.seed,
            facts=EffortFacts(
                samples=spec.recipe.samples or 0,
                length=spec.recipe.length or 0,
                windows=training[0],
                window=training[1],
                batch_size=batch_size or MOST_SEQUENCES,
                layers=shape.layers,
                prunes=spec.target != "dense",
            ),
            evals=spec.evals,
            id=spec.id,
        )

    @property
    def method(self) -> str:
        """The steps as one line."""
        return " + ".join(self.steps)

    @property
    def weight_bytes(self) -> int:
        """In the run's dtype."""
        return self.shape.parameters * DTYPES[self.dtype].itemsize

    @property
    def held_bytes(self) -> int:
        """Of the weights what is there all the time, and one block: all of them, but of a virtual shape."""
        trains = any(ask(pruner, "needs") & Needs.TRAINING for pruner in self.pruners)
        if self.model.shape is None or trains or not is_large(self.weight_bytes):
            return self.weight_bytes
        in_blocks = self.shape.in_blocks
        return (self.shape.parameters - in_blocks + in_blocks // self.shape.layers) * DTYPES[self.dtype].itemsize

    def efforts(self) -> list[list[Effort]]:
        """Of each step.

        Raises:
            PluginError: a pruner gives no answer.
        """
        return [list(ask(pruner, "effort", self.facts)) for pruner in self.pruners]


def step_seconds(
    efforts: Sequence[Effort], shape: ModelShape, dtype: str, facts: EffortFacts, rates: RatesFor
) -> dict[str, float]:
    """Seconds of a step by phase."""
    found: dict[str, float] = {}
    for effort in efforts:
        found[effort.phase] = found.get(effort.phase, 0.0) + effort_seconds(effort, shape, dtype, facts, rates)
    return found


def effort_seconds(effort: Effort, shape: ModelShape, dtype: str, facts: EffortFacts, rates: RatesFor) -> float:
    """Seconds of one effort, as the module's formula says."""
    own, single = rates(effort.dtype or dtype), rates("float32")
    attended = 4 * effort.length * (shape.attention or shape.hidden)
    moved = 2 * ACTIVATIONS * shape.hidden * DTYPES[effort.dtype or dtype].itemsize
    a_block = 2 * block_weights(shape) / own.products + shape.layers * (attended / own.attention + moved / own.moved)
    at_once = effort.at_once or facts.batch_size * (effort.length or DEFAULT_LENGTH)
    launched = effort.blocks / at_once * shape.layers * LAUNCHES_A_BLOCK * own.launch
    squares = sum(width**2 for width in shape.inputs)
    swept = sum(outputs * inputs**2 for outputs, inputs in shape.matrices) / single.products
    columns = LAUNCHES_A_COLUMN * single.launch * sum(inputs for _, inputs in shape.matrices)
    return (
        max(effort.blocks * a_block, launched)
        + effort.head * (2 * shape.vocabulary * shape.hidden / own.products + 16 * shape.vocabulary / own.moved)
        + effort.grams * squares / single.products
        + effort.factors * sum(width**3 for width in shape.inputs) / single.factored
        + effort.sweeps * (swept + columns)
        + effort.looks * 4 * shape.prunable / own.moved
    )


def block_weights(shape: ModelShape) -> int:
    """Weights that a token meets in all blocks; where they were not counted, also experts that it would pass by."""
    return shape.active or shape.in_blocks


def start_seconds(work: Work) -> float:
    """Until the weights are there."""
    return START_SECONDS + work.weight_bytes / READ_BYTES


def eval_effort(conditions: Mapping[str, object]) -> tuple[Effort, bool]:
    """What an evaluation computes, and whether its conditions say so."""
    asked = Asked.by(conditions)
    if asked.windows:
        tokens = asked.windows * asked.window * (2 if reads_dense(conditions) else 1)
        return Effort(phase="evaluation", blocks=tokens, head=tokens, length=asked.window), True
    tokens = sum(
        count * (PAIR_TOKENS if name.startswith("blimp") or name.endswith("pairs") else QUESTION_TOKENS)
        for name, count in asked.questions
    )
    known = tokens or UNKNOWN_TOKENS
    return Effort(phase="evaluation", blocks=known, head=known, length=QUESTION_LENGTH), tokens > 0


def reads_dense(conditions: Mapping[str, object]) -> bool:
    """Whether an evaluation reads the dense model too."""
    return conditions.get("eval") in ("divergence", "layer_error", "speed")


def step_bytes(efforts: Sequence[Effort], work: Work, on_host: bool) -> int:
    """The peak of a step: the model, and what the effort that holds most holds."""
    shape, itemsize = work.shape, DTYPES[work.dtype].itemsize
    inner = ACTIVATIONS * shape.hidden
    gram = sum(width**2 for width in shape.inputs) / max(1, shape.layers)

    def held(effort: Effort) -> float:
        batch = effort.at_once or work.facts.batch_size * effort.length
        passing = min(batch, HOST_TOKENS) if on_host and not effort.graph else batch
        found = effort.held * shape.hidden * itemsize + 4 * effort.graph * inner + 4 * effort.copies * shape.prunable
        found += itemsize * passing * inner if effort.blocks else 0
        found += 4 * LOGIT_COPIES * passing * shape.vocabulary if effort.head else 0
        return found + (3 * 4 * gram if effort.grams or effort.factors else 0)

    return base_bytes(work, on_host) + int(max(map(held, efforts), default=0))


def eval_bytes(work: Work, on_host: bool) -> int:
    """The peak of the evaluations: the model, the dense one where it is read too, and a batch's logits twice."""
    models = 2 if any(reads_dense(spec.conditions) for spec in work.evals) else 1
    length = max((Asked.by(spec.conditions).window or QUESTION_LENGTH for spec in work.evals), default=0)
    batch = min(work.facts.batch_size * length, max(HOST_TOKENS, length)) if on_host else work.facts.batch_size * length
    logits = min(batch * work.shape.vocabulary, max(MAX_LOGITS, length * work.shape.vocabulary))
    return base_bytes(work, on_host) + (models - 1) * work.weight_bytes + 2 * 4 * logits


def base_bytes(work: Work, on_host: bool) -> int:
    """The model, and on a host the libraries."""
    return work.held_bytes + (START_BYTES if on_host else 0)

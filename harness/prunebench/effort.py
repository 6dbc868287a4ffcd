"""What a step computes, so that its cost can be told before it is run: a part of the contract, with numbers only.

A pruner counts tokens through blocks, factorisations, looks at the weights; `bench/costs.py` knows what these cost at a model's
shape on a machine. Nobody has to be exact: of a method with records on a machine the records have the last word.
"""

from __future__ import annotations

from dataclasses import dataclass

TO_INPUTS, TO_WEIGHTS = 2, 3
"""Passes that a token counts for which goes forward and back: to the inputs only, and to inputs and weights. The backward of a
product is one product of the same size for each."""

LOOKS_TO_SCORE, LOOKS_TO_UPDATE = 12, 8
"""At every weight: for the score, a sort that reads several times, and the mask; for the zeros, and the mask packed."""


@dataclass(frozen=True, kw_only=True)
class EffortFacts:
    """How much a step is given to work on."""

    samples: int = 0
    length: int = 0
    """Of the calibration sequences, in tokens; 0 samples where there are none."""
    windows: int = 0
    window: int = 0
    """Training windows, and tokens in each."""
    batch_size: int = 8
    """Sequences at a time."""
    layers: int = 1
    """Decoder blocks."""
    prunes: bool = True
    """Whether the target asks for any zeros."""

    @property
    def tokens(self) -> int:
        """Of the calibration set."""
        return self.samples * self.length


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What a step computes in one phase, and holds meanwhile. All counts are for the whole model and the whole phase."""

    phase: str
    blocks: float = 0.0
    """Tokens that pass every block; one that also comes back counts `TO_INPUTS` or `TO_WEIGHTS` times."""
    head: float = 0.0
    """Tokens that pass the output head, counted the same way."""
    length: int = 0
    """Tokens of a sequence, all of which attend to each other."""
    at_once: int = 0
    """Tokens in one call of a block or of the head; 0 is a batch."""
    grams: float = 0.0
    """Tokens added to the Gram matrix of every matrix's inputs; siblings share one."""
    factors: float = 0.0
    """Factorisations, inversions or the like of every such Gram matrix."""
    sweeps: float = 0.0
    """Walks over every matrix column by column, each column changing those behind it."""
    looks: float = 0.0
    """Times that every prunable weight is read or written, as by an elementwise operation."""
    dtype: str | None = None
    """What products are computed in; None is the model's dtype."""
    held: float = 0.0
    """Hidden states held, in tokens."""
    graph: float = 0.0
    """Tokens x blocks whose inner values wait for the way back."""
    copies: float = 0.0
    """Float32 numbers held for each prunable weight of the model: gradients, moments, copies."""


def usual_effort(facts: EffortFacts, *, calibrated: bool, gradients: bool, trains: bool) -> list[Effort]:
    """What a method of its kind computes: scores from one pass of each block, gradients block by block, an epoch of training.

    Args:
        facts: how much it is given.
        calibrated: it reads calibration text.
        gradients: it takes gradients on that text.
        trains: it reads training text.
    """
    found = pruning_effort()
    if calibrated or gradients:
        found += walking_effort(facts)
    if gradients:
        found.append(gradient_effort(facts))
    if trains:
        found.append(training_effort(facts, facts.windows))
    return found


def pruning_effort(times: int = 1) -> list[Effort]:
    """Scores and masks, so many times."""
    return [Effort(phase="scoring", looks=times * LOOKS_TO_SCORE), Effort(phase="update", looks=times * LOOKS_TO_UPDATE)]


def walking_effort(facts: EffortFacts, collected: bool = True) -> list[Effort]:
    """A walk over the blocks: statistics of each (where collected), then its outputs, of the last block nobody's inputs."""
    statistics = Effort(phase="statistics", blocks=facts.tokens, length=facts.length, held=facts.tokens)
    outputs = facts.tokens * (facts.layers - 1) / facts.layers
    onwards = Effort(phase="propagation", blocks=outputs, length=facts.length, held=facts.tokens)
    return [statistics, onwards] if collected else [onwards]


def gradient_effort(facts: EffortFacts, dtype: str | None = "float32") -> Effort:
    """Gradients of every block, sample by sample, and one block's sums of them."""
    return Effort(
        phase="statistics",
        blocks=TO_WEIGHTS * facts.tokens,
        length=facts.length,
        at_once=facts.length,
        dtype=dtype,
        held=facts.tokens,
        graph=facts.length,
        copies=3 / facts.layers,
    )


def training_effort(
    facts: EffortFacts,
    sequences: float,
    passes: float = TO_WEIGHTS,
    copies: float = 4.0,
    looks: float = 0.0,
    dtype: str | None = None,
) -> Effort:
    """A whole model trained on so many sequences.

    Args:
        facts: how long they are, and how many go at a time.
        sequences: seen in all, one as often as it is seen.
        passes: `TO_WEIGHTS`, or `TO_INPUTS` where no matrix is trained.
        copies: float32 numbers a prunable weight: where all are trained a copy, a gradient and two moments.
        looks: at every weight, in all.
        dtype: of the products.
    """
    tokens, batch = sequences * facts.window, facts.batch_size * facts.window
    return Effort(
        phase="training",
        blocks=passes * tokens,
        head=passes * tokens,
        length=facts.window,
        at_once=batch,
        looks=looks,
        dtype=dtype,
        graph=batch * facts.layers,
        copies=copies,
    )

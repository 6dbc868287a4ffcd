"""Runs of shapes: random weights and random tokens, of which only costs mean anything. What may be asked of them."""

from __future__ import annotations

from collections.abc import Sequence

from prunebench.bench.specs import AskedEval
from prunebench.bench.suite import Calibration, Suite, Training
from prunebench.errors import RequestError
from prunebench.toolkit.calibration import Tokens
from prunebench.toolkit.loading import ModelIdentity, ModelSource
from prunebench.toolkit.random_tokens import RANDOM, random_tokens
from prunebench.toolkit.shapes import NO_TOKENIZER, SHAPE
from prunebench.toolkit.virtual import is_large


def check_evals(source: ModelSource, parameter_bytes: int, evals: Sequence[AskedEval]) -> None:
    """Random weights have no quality, and a model that is never there whole cannot be timed.

    Raises:
        RequestError: an evaluation measures something else than costs, or the shape is virtual here.
    """
    if source.shape is None:
        return
    for asked in evals:
        if not asked.evaluation.measures_cost:
            raise RequestError(f"{asked.text} cannot be measured on {SHAPE}{source.shape}: random weights have costs only.")
    if evals and is_large(parameter_bytes):
        raise RequestError(
            f"{evals[0].text} cannot be measured on {SHAPE}{source.shape}: its weights take more than half of this host's "
            "memory, so they are never there all at once; leave out [[eval]]."
        )


def drawn_calibration(identity: ModelIdentity, asked: Calibration, length: int, seed: int) -> Tokens | None:
    """Random calibration sequences for a shape; None for a model, which takes a text.

    Raises:
        RequestError: a text for a shape, or random tokens for a model.
    """
    if not _is_drawn(identity, asked.source, "calibration"):
        return None
    return random_tokens("calibration", identity.vocabulary().size, asked.samples, length, seed)


def drawn_training(identity: ModelIdentity, asked: Training, length: int) -> Tokens | None:
    """Random training windows for a shape, as many as the budget holds; None for a model, which takes a text.

    Raises:
        RequestError: a text for a shape, random tokens for a model, or fewer tokens than one window.
    """
    if not _is_drawn(identity, asked.source, "training"):
        return None
    if asked.tokens < length:
        raise RequestError(f"{asked.tokens} training tokens are fewer than one window of {length}.")
    return random_tokens("training", identity.vocabulary().size, asked.tokens // length, length, 0)


def _is_drawn(identity: ModelIdentity, source: str, kind: str) -> bool:
    is_shape = identity.tokenizer_hash == NO_TOKENIZER
    if is_shape and source != RANDOM:
        raise RequestError(f"a shape reads no text, as it has no tokenizer: its {kind} source is {RANDOM!r}, not {source!r}.")
    if source == RANDOM and not is_shape:
        raise RequestError(
            f"random tokens are for shapes only, and the {kind} source of this model is {RANDOM!r}: name a text."
        )
    return is_shape


def refuse_shape(source: ModelSource, what: str) -> None:
    """Raise a RequestError where a command that makes or measures a model is given a shape; `what` begins the sentence."""
    if source.shape is not None:
        raise RequestError(
            f"{what} {SHAPE}{source.shape} would mean nothing: its weights are random, and runs of a suite tell what they cost."
        )


def refuse_kept_weights(suite: Suite) -> None:
    """Raise a RequestError where the changed weights of a shape would be kept: they would fill a disk and serve nothing."""
    for entry in suite.model:
        if entry.shape is not None:
            raise RequestError(
                f"--keep-weights is not for {entry.name}: its weights are random, and nothing is scored on them."
            )

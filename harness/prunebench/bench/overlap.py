"""How much of an evaluation's text was trained on: the share of its 13-grams of words that occur in the training text.

The training text is read back from the tokens that are trained on, so that what was left out does not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunebench.answers import ask
from prunebench.bench.specs import AskedEval
from prunebench.spec import EvalFacts
from prunebench.toolkit.cache import digest, load_json, save_json
from prunebench.toolkit.calibration import Tokens

WORDS = 13
"""As GPT-3's paper (arXiv 2005.14165, appendix C) and most since."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """One evaluation and one training text."""

    evaluation: str
    training: str
    share: float
    """Of the evaluation's 13-grams; those that are in the training text."""


def overlaps(evals: Sequence[AskedEval], trained: Sequence[Tokens], facts: EvalFacts) -> list[Overlap]:
    """The share for each evaluation that reads a text, and each training text."""
    found = []
    for tokens in trained:
        # Windows are packed one behind the other, so that a text goes on over their bounds.
        read = "" if facts.tokenizer is None else str(facts.tokenizer.decode(tokens.array.ravel().tolist()))
        for asked in evals:
            text = "\n".join(ask(asked.evaluation, "texts", facts)) if read else ""
            if text:
                name = tokens.source.name if not tokens.source.split else f"{tokens.source.name} ({tokens.source.split})"
                found.append(Overlap(asked.text, name, shared(text, read)))
    return found


def shared(evaluated: str, trained: str) -> float:
    """The share of the 13-grams of words of `evaluated` that occur in `trained`; 0 for a text of fewer words."""
    key = digest(["overlap 1", evaluated, trained])
    kept = load_json("overlaps", key)
    if isinstance(kept, float):
        return kept
    numbers: dict[str, int] = {}
    asked, there = (_hashes(text, numbers) for text in (evaluated, trained))
    share = float(np.isin(asked, there).mean()) if len(asked) else 0.0
    save_json("overlaps", key, share)
    return share


def _hashes(text: str, numbers: dict[str, int]) -> NDArray[np.uint64]:
    """A hash of each run of 13 words, by the numbers that words have in both texts."""
    words = re.findall(r"\w+", text.lower())
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.uint64, len(words))
    mixed = (ids + np.uint64(1)) * _FACTOR
    mixed ^= mixed >> np.uint64(29)
    if len(words) < WORDS:
        return mixed[:0]
    found = np.zeros(len(words) - WORDS + 1, np.uint64)
    for offset in range(WORDS):
        found = found * np.uint64(0x100000001B3) + mixed[offset : offset + len(found)]
    return found

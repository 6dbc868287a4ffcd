"""The share of 13-grams against a slow count."""

from __future__ import annotations

import random
import re

import pytest

from prunebench.bench.overlap import WORDS, shared


def slow(evaluated: str, trained: str) -> float:
    def grams(text: str) -> list[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return [tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)]

    there, asked = set(grams(trained)), grams(evaluated)
    return sum(gram in there for gram in asked) / len(asked) if asked else 0.0


@pytest.mark.parametrize("kept", [0, 5, 12, 13, 14, 200])
def test_the_share_is_that_of_a_slow_count(kept: int) -> None:
    generator = random.Random(kept)
    words = [f"w{number}" for number in range(40)]
    trained = [generator.choice(words) for _ in range(2000)]
    evaluated = [generator.choice(words) for _ in range(300)]
    evaluated[50 : 50 + kept] = trained[700 : 700 + kept]
    texts = " ".join(evaluated), " ".join(trained)
    assert shared(*texts) == pytest.approx(slow(*texts), abs=1e-12)
    assert (shared(*texts) > 0) == (kept >= WORDS)
    assert shared(*texts) == pytest.approx(slow(*texts), abs=1e-12)  # what was kept says the same


def test_case_and_punctuation_do_not_hide_it() -> None:
    text = "The quick brown fox jumps over the lazy dog and then it sleeps in the sun."
    assert shared(text.upper().replace(" ", " - "), f"Before. {text} After.") == 1


@pytest.mark.parametrize("short", ["", "only a few words", " ".join(["word"] * 12)])
def test_a_text_too_short_to_tell(short: str) -> None:
    assert shared(short, "a text of some length " * 10) == 0
    assert shared("a text of some length " * 10, short) == 0

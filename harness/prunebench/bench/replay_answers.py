"""A sample of a run's answers, given again by its pruned model and compared with those that were kept.

Windows may differ by `RELATIVE`: batch sizes and numbers of threads change last bits (none with the quickstart's model on one
CPU), other kernels more; a forger who shifts every window by so much gains 0.4% of a perplexity of 50. In 16-bit types it
is three times as much: that model in bfloat16 instead of float32 moves a window by up to 4e-4, and deeper ones round
more often. Where two answers are as likely as that, either may be chosen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

from prunebench.results.items import Columns
from prunebench.spec import EvalJob

SEGMENTS, QUESTIONS = 16, 64
"""How many windows and questions of a score are answered again."""

RELATIVE = {"float64": 1e-3, "float32": 1e-3}
COARSE = 3e-3
"""Of other dtypes."""

LEAST = 1e-5
"""Nats: a smaller difference is none, also of divergences near zero."""

TURNS = 0.05
"""The share of decoded answers that may go on another way: of two words as likely as each other either is the next."""

FLIPS = 3
"""Predictions of a window of which the most likely token may be another."""

_CHOSEN = ("choice", "right", "recognised")
"""Columns that say which answer is the likeliest."""


@runtime_checkable
class Repeatable(Protocol):
    """An evaluation that can be asked a part of its items again."""

    def again(self, job: EvalJob, chosen: Sequence[int]) -> Mapping[str, Sequence[float | int | str]]:
        """Columns as `measure` finds them, of the chosen items only, in the order given."""


def drawn(count: int, asks_questions: bool, draw: random.Random) -> list[int]:
    """Numbers of the items to ask again, in order."""
    return sorted(draw.sample(range(count), min(count, QUESTIONS if asks_questions else SEGMENTS)))


def differences(
    kept: Columns, again: Mapping[str, Sequence[float | int | str]], chosen: Sequence[int], dtype: str, window: int
) -> Iterator[tuple[str, str]]:
    """Columns in which answers were others, and what was found.

    Args:
        kept: all raw answers of a score.
        again: those of the chosen items.
        chosen: numbers of items.
        dtype: of the model.
        window: tokens of a window, where the items are windows.
    """
    relative = RELATIVE.get(dtype, COARSE)
    turned: dict[str, list[int]] = {}
    for column, values in again.items():
        if column not in kept:
            yield column, "are absent, and the evaluation gives them"
            continue
        for row, now in zip(chosen, values, strict=True):
            then = kept[column][row]
            if _same(column, then, now, relative, window) or (column in _CHOSEN and _near_tie(kept, row, relative)):
                continue
            if column in ("answer", "produced", "empty", "repetitive"):
                turned.setdefault(column, []).append(row)
                continue
            yield column, f"are {_shown(then)} at {row}, and the pruned model gives {_shown(now)}"
            break
    for column, rows in turned.items():
        if len(rows) > max(1, TURNS * len(chosen)):
            row = rows[0]
            now = again[column][list(chosen).index(row)]
            yield (
                column,
                f"are others in {len(rows)} of {len(chosen)}, first {_shown(kept[column][row])} at {row} for {_shown(now)}",
            )


def _same(column: str, then: float | int | str, now: float | int | str, relative: float, window: int) -> bool:
    """Whether two answers are one, as far as rounding goes."""
    if column == "likelihoods":
        both = [[float(value) for value in str(text).split()] for text in (then, now)]
        return len(both[0]) == len(both[1]) and all(_close(a, b, relative) for a, b in zip(*both, strict=True))
    if isinstance(then, str) or isinstance(now, str):
        return then == now
    if column == "agreement":
        return abs(then - now) <= FLIPS / max(1, window - 1) + LEAST
    if column in ("nll", "kl", "margin", "error"):
        least = LEAST if column != "margin" else 10 * relative  # a difference of two sums over an answer's tokens
        return math.isclose(then, now, rel_tol=relative, abs_tol=least)
    return math.isclose(then, now, rel_tol=1e-6)


def _near_tie(kept: Columns, row: int, relative: float) -> bool:
    """Whether what was chosen at a question hangs on rounding."""
    if "likelihoods" in kept:
        values = sorted((float(value) for value in str(kept["likelihoods"][row]).split()), reverse=True)
        return len(values) > 1 and values[0] - values[1] <= 2 * relative * abs(values[0])
    if "margin" in kept:
        return abs(float(kept["margin"][row])) <= 10 * relative
    return False


def _close(then: float, now: float, relative: float) -> bool:
    return math.isclose(then, now, rel_tol=relative, abs_tol=2e-3)  # kept with three decimals


def _shown(value: float | int | str) -> str:
    return repr(value) if isinstance(value, str) else f"{value:.6g}"

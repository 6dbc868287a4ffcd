"""Who is beaten in quality and costs, within one table, and who is left to choose among.

A beats B when

* A's mean is at least as good as B's,
* A costs no more: neither its prune seconds nor its peak memory are more than `COST_FACTOR` times B's,
* and A is significantly better (its whole rank interval lies before B's), or cheaper (one of its two costs, times
  `COST_FACTOR`, is still less than B's).

So whoever is cheaper but not as good beats nobody, and neither does who is better but costs more: both are left. Seconds that
differ by less than `LEAST_SECONDS` count as equal. Where a run shared its machine its seconds, not its memory, lie between what
was measured and that over `SHARED_FACTOR`; A must hold against the least of B's. Who would be beaten only by the seconds as
measured is open, and so is who could not be ranked, who beats nobody either. What limits rule out beats nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from prunebench.results.changes import COST_FACTOR, LEAST_SECONDS
from prunebench.results.rows import Row

Verdict = Literal["choose", "open", "beaten", "ruled out"]
VERDICTS: tuple[Verdict, ...] = ("choose", "open", "beaten", "ruled out")

SHARED_FACTOR = 8.0
"""How many times as long a run is taken to have lasted at most because others shared its machine; found were up to 2."""

UNRANKED = "its answers cannot be compared with the others'"
SHARED = "its machine was shared"


@dataclass(frozen=True)
class Limits:
    """What a method may take."""

    max_seconds: float | None = None
    """Of pruning."""
    max_bytes: float | None = None
    """Peak memory of pruning."""
    no_training: bool = False
    """Whether retraining on text is ruled out."""

    def against(self, row: Row, trained: bool) -> Iterator[str]:
        """What rules a row out."""
        if trained and self.no_training:
            yield "retrained on text"
        if self.max_seconds is not None and row.prune_seconds > self.max_seconds:
            shared = ", on a shared machine" if row.shared_machine else ""
            yield f"{row.prune_seconds:.4g} s{shared}, more than {self.max_seconds:g} s"
        if self.max_bytes is not None and row.peak_bytes is None:
            yield "its peak memory is not known"
        elif self.max_bytes is not None and row.peak_bytes is not None and row.peak_bytes > self.max_bytes:
            yield f"{row.peak_bytes / 2**30:.3g} GiB, more than {self.max_bytes / 2**30:g} GiB"


@dataclass(frozen=True)
class Choice:
    """One row with what is to be said of it."""

    row: Row
    verdict: Verdict
    reasons: tuple[str, ...]
    """By which methods it is beaten, what rules it out, why it is open."""


def weigh(rows: Sequence[Row], higher_is_better: bool, limits: Limits, trained: bool) -> list[Choice]:
    """What is to be said of each row of one table, those worth choosing first, of them the best first.

    Args:
        rows: with means, without the dense model and controls.
        higher_is_better: of their values.
        limits: what rules a row out.
        trained: whether the rows were retrained on text.
    """
    ruled = {row.ids: tuple(limits.against(row, trained)) for row in rows}
    left = [row for row in rows if not ruled[row.ids]]
    found = []
    for row in rows:
        others = [other for other in left if other is not row]
        winners = tuple(other.method for other in others if beats(other, row, higher_is_better))
        if ruled[row.ids]:
            found.append(Choice(row, "ruled out", ruled[row.ids]))
        elif winners:
            found.append(Choice(row, "beaten", winners))
        elif row.rank is None and others:
            found.append(Choice(row, "open", (UNRANKED,)))
        elif any(beats(other, row, higher_is_better, as_measured=True) for other in others):
            found.append(Choice(row, "open", (SHARED,)))
        else:
            found.append(Choice(row, "choose", ()))
    sign = -1 if higher_is_better else 1
    return sorted(found, key=lambda choice: (VERDICTS.index(choice.verdict), sign * choice.row.mean, choice.row.method))


def beats(first: Row, second: Row, higher_is_better: bool, as_measured: bool = False) -> bool:
    """Whether nothing speaks for the second row: see the head of this module.

    Args:
        first: A.
        second: B.
        higher_is_better: of their values.
        as_measured: take B's seconds as they are, though its machine was shared.
    """
    if first.rank is None or second.rank is None or (first.peak_bytes is None) != (second.peak_bytes is None):
        return False
    as_good = first.mean >= second.mean if higher_is_better else first.mean <= second.mean
    least = second.prune_seconds / (SHARED_FACTOR if second.shared_machine and not as_measured else 1.0)
    peaks = (first.peak_bytes or 0, second.peak_bytes or 0)
    no_more = not _exceeds(first.prune_seconds, least, LEAST_SECONDS) and not _exceeds(*peaks)
    cheaper = _exceeds(least, first.prune_seconds, LEAST_SECONDS) or _exceeds(*peaks[::-1])
    return as_good and no_more and (first.rank.last < second.rank.first or cheaper)


def _exceeds(one: float, other: float, margin: float = 0.0) -> bool:
    """Whether a cost is the higher one, by more than what costs of one thing differ by."""
    return one > COST_FACTOR * other and one - other >= margin

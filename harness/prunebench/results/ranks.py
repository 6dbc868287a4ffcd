"""Ranks as intervals: how many are certainly better, and how many certainly worse, after a correction for all pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from prunebench.errors import RequestError, UnknownNameError
from prunebench.results.statistics import Difference


@dataclass(frozen=True)
class RankInterval:
    """The ranks that a row may have."""

    first: int
    last: int

    @property
    def best(self) -> bool:
        """Nobody is significantly better: printed bold."""
        return self.first == 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order (Scandinavian Journal of Statistics 6, 1979).

    The k-th smallest of n is multiplied by `n - k + 1`; none is below a smaller one's, none above 1.

    Raises:
        RequestError: a value is not a probability.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise RequestError(f"p-values lie between 0 and 1, which {list(p_values)} do not.")
    adjusted, running = [0.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = running
    return adjusted


def rank_intervals(names: Sequence[str], better: Iterable[tuple[str, str]]) -> dict[str, RankInterval]:
    """`[1 + number significantly better, n - number significantly worse]` for each name, in the given order.

    Args:
        names: the rows that are ranked together.
        better: pairs (winner, loser) whose difference is significant after correction; it need not be transitive.

    Raises:
        UnknownNameError: a pair names no row.
        RequestError: two rows have one name, or two rows are each better than the other.
    """
    pairs = set(better)
    if len(set(names)) < len(names):
        raise RequestError("two rows of a table have one name.")
    for winner, loser in sorted(pairs):
        for name in (winner, loser):
            if name not in names:
                raise UnknownNameError.among("row", name, names)
        if (loser, winner) in pairs:
            raise RequestError(f"{winner} and {loser} cannot each be better than the other.")
    return {
        name: RankInterval(1 + sum(loser == name for _, loser in pairs), len(names) - sum(won == name for won, _ in pairs))
        for name in names
    }


@dataclass(frozen=True)
class Ranking:
    """The ranks of a table, and what they rest on."""

    ranks: Mapping[str, RankInterval]
    adjusted: Mapping[tuple[str, str], float]
    """Holm's p-value of each pair, under the key it was given with."""


def rank(
    names: Sequence[str],
    differences: Mapping[tuple[str, str], Difference],
    higher_is_better: bool,
    error: float = 0.05,
) -> Ranking:
    """Rank a table from its paired differences.

    Args:
        names: the rows.
        differences: under (A, B), A minus B, each pair of rows once, in either order.
        higher_is_better: of the value that was subtracted (not of a likelihood's negative, for instance).
        error: the probability that any pair without a difference is called significant.

    Raises:
        RequestError: a pair is missing or given twice, or a difference supports no rank (too few seeds).
        UnknownNameError: a pair names no row.
    """
    keys = sorted(differences)
    wanted = {frozenset((a, b)) for a in names for b in names if a != b}
    if {frozenset(key) for key in keys} != wanted or len(keys) != len(wanted):
        unknown = [name for key in keys for name in key if name not in names]
        if unknown:
            raise UnknownNameError.among("row", unknown[0], names)
        raise RequestError(f"{len(names)} rows have {len(wanted)} pairs, and {len(keys)} differences were given for them.")
    weak = [key for key in keys if not differences[key].supports_rank]
    if weak:
        raise RequestError(f"the difference of {weak[0][0]} and {weak[0][1]} rests on too few seeds for a rank.")
    adjusted = dict(zip(keys, holm([differences[key].p_value for key in keys]), strict=True))
    better = [
        (first, second) if (differences[first, second].estimate > 0) == higher_is_better else (second, first)
        for first, second in keys
        if adjusted[first, second] < error
    ]
    return Ranking(rank_intervals(names, better), adjusted)

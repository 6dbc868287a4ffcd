"""Rows of a table: one method at one target, its seeds together, compared with dense and ranked among its like."""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from prunebench.errors import StoreError
from prunebench.results.comparison import Answers, Comparison, LoadItems, Measured, compare
from prunebench.results.ranks import RankInterval, rank
from prunebench.results.records import RunRecord
from prunebench.results.statistics import Difference
from prunebench.results.verdicts import Grade

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One method at one target: its seeds together."""

    method: str
    values: tuple[float, ...]
    seeds: tuple[int | None, ...]
    parts: Mapping[str, float]
    """Further numbers, means over seeds."""
    dense: float | None
    """The dense model's value, or None without such a run, and for that run itself."""
    control: float | None
    """The mean of the dense model after the same training, or None without such a run."""
    tuned: str | None
    """The suite in which options were chosen."""
    extra_parameters: int
    prune_seconds: float
    peak_bytes: int | None
    sparsity_prunable: float
    sparsity_total: float
    coverage: float
    shared_machine: bool
    ids: tuple[str, ...]
    grade: Grade = "reported"
    """How far it may be trusted: as its least trusted record."""
    rank: RankInterval | None = None
    """Among the rows of its table that are not dense; None where no test could be made."""
    versus: Difference | None = None
    """This row minus dense: these seeds, new text. Of perplexities the difference of their logarithms."""
    flipped: tuple[float, float] | None = None
    """Shares of the questions that went from right to wrong and from wrong to right against dense."""
    guesses: frozenset[str] = frozenset()
    """Tasks in which its accuracy cannot be told from that of guessing; the empty name is their mean."""
    unpruned: bool = False
    """The dense model, or one that was trained and not pruned: it stands on top of every table of its training."""
    below_chance: frozenset[str] = frozenset()
    """Tasks in which it is significantly worse than guessing; the empty name is their mean."""
    reason: str | None = None
    """Why there is no value; None where there is one, or nobody says."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds, or None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def seeds_shown(self) -> str:
        """How many seeds, or that there is nothing to repeat."""
        return "deterministic" if self.seeds == (None,) else str(len(self.seeds))


class RowBuilder:
    """Makes the rows of a section; what each run answered is read once."""

    def __init__(self, dense: Sequence[Measured], load: LoadItems) -> None:
        self._load = load
        self.unread: list[str] = []
        """Raw answers that are gone, or not those of their record, and why."""
        self._answers: dict[tuple[str, ...], Answers | None] = {}
        own = [measured for measured in dense if measured.record.spec.method == DENSE]
        self.baseline = value_of(own[0]) if own else None
        """The dense model's value."""
        self._dense = self._of(own) if own else None

    def rows(self, entries: Sequence[Measured], controls: Mapping[str, Sequence[float]]) -> list[Row]:
        """A row for each method, dense first, then by name.

        Args:
            entries: at one target.
            controls: values of dense models that were trained, by method.
        """
        by_method: dict[str, list[Measured]] = {}
        for entry in entries:
            by_method.setdefault(entry.record.spec.method, []).append(entry)
        methods = sorted(by_method, key=lambda method: (method != DENSE, method))
        return [self._row(method, by_seed(by_method[method]), controls) for method in methods]

    def ranked(self, rows: Sequence[Row], higher_is_better: bool) -> tuple[list[Row], float | None]:
        """The rows with their ranks among each other, and the smallest true difference of two of them that would have shown
        with 80% power after correction for all pairs (Bonferroni's level, of which Holm's is the least), the median over pairs.

        A row that cannot be compared with the others has no rank and takes no part; without two that can there are none.
        """
        found: dict[tuple[str, str], Comparison] = {}
        answers = {row.method: self._answers[row.ids] for row in rows if not math.isnan(row.mean)}  # no mean, no order
        names = list(answers)
        for first, second in combinations(names, 2):
            one, other = answers[first], answers[second]
            compared = compare(one, other) if one and other else None
            if compared is not None:
                found[first, second] = compared
        while len(found) < math.comb(len(names), 2):  # leave out who stands beside the fewest
            names.remove(min(names, key=lambda name: sum(name in pair for pair in found)))
            found = {pair: compared for pair, compared in found.items() if set(pair) <= set(names)}
        if len(names) < 2:
            return list(rows), None
        ranks = rank(names, {pair: compared.new_items for pair, compared in found.items()}, higher_is_better).ranks
        shown = statistics.median(compared.detectable(1 - 0.05 / len(found)) for compared in found.values())
        return [replace(row, rank=ranks.get(row.method)) for row in rows], shown

    def _of(self, row: Sequence[Measured]) -> Answers | None:
        key = tuple(measured.record.id for measured in row)
        if key not in self._answers:
            self._answers[key] = None
            try:
                self._answers[key] = Answers.of(row, self._load)
            except StoreError as error:  # the rest of the board stands without them
                self.unread.append(str(error))
        return self._answers[key]

    def _row(self, method: str, entries: Sequence[Measured], controls: Mapping[str, Sequence[float]]) -> Row:
        records = [entry.record for entry in entries]
        values = tuple(value_of(entry) for entry in entries)
        audits = [record.audit for record in records if record.audit is not None]
        peaks = [record.peak_bytes for record in records if record.peak_bytes is not None]
        mean, unpruned = statistics.fmean(values), records[0].spec.target == DENSE
        # `dense + perp[...]` is the control of `wanda + perp[...]`.
        later = [step.text for step in records[0].spec.steps[1:]]
        control = controls.get(" + ".join([DENSE, *later])) if later else None
        answers = self._of(entries)
        whole = not math.isnan(mean)  # what has no mean has no difference of means either
        is_baseline = unpruned and method == DENSE
        versus = compare(answers, self._dense) if answers and self._dense and whole and not is_baseline else None
        # From dense to the row, and not from the row to dense.
        flipped = versus.flipped[::-1] if versus and answers and answers.are_right_or_wrong else None
        return Row(
            method=method,
            values=values,
            seeds=tuple(record.spec.seed for record in records),
            parts={
                part: statistics.fmean(entry.score.parts[part] for entry in entries)
                for part in entries[0].score.parts
                if all(part in entry.score.parts for entry in entries)
            },
            dense=None if is_baseline else self.baseline,
            control=None if not control or unpruned else statistics.fmean(control),
            tuned=next((record.provenance.tuned for record in records if record.provenance.tuned), None),
            extra_parameters=max(record.extra_parameters for record in records),
            prune_seconds=statistics.fmean(record.prune_seconds for record in records),
            peak_bytes=max(peaks, default=None),
            sparsity_prunable=statistics.fmean(a.sparsity_prunable for a in audits) if audits else 0.0,
            sparsity_total=statistics.fmean(a.sparsity_total for a in audits) if audits else 0.0,
            coverage=statistics.fmean(a.coverage for a in audits) if audits else 0.0,
            shared_machine=any(record.provenance.shared_machine for record in records),
            ids=tuple(record.id for record in records),
            versus=versus.new_items if versus else None,
            flipped=flipped,
            guesses=frozenset(name for name in answers.guesses if name or whole) if answers else frozenset(),
            unpruned=unpruned,
            below_chance=frozenset(name for name in answers.below_chance if name or whole) if answers else frozenset(),
            reason=next((entry.score.reason for entry in entries if entry.score.reason), None),
        )


def by_seed(entries: Sequence[Measured]) -> list[Measured]:
    """In the order of their seeds."""
    return sorted(entries, key=lambda entry: seed_order(entry.record))


def seed_order(record: RunRecord) -> int:
    """A key that puts runs in the order of their seeds, those without one first."""
    return -1 if record.spec.seed is None else record.spec.seed


def target_title(target: str) -> str:
    """A target as a heading."""
    return target if ":" in target or target == DENSE else f"{float(target) * 100:g}% unstructured"


def value_of(entry: Measured) -> float:
    """The value, not a number where the score has none."""
    return math.nan if entry.score.value is None else entry.score.value


def command_of(record: RunRecord) -> str:
    """What to type: with the file that was given, or the suite's name, and what took the place of its models and methods."""
    given = re.match(r"prunebench run (\S+\.toml)(?= |$)", record.provenance.command)
    run = f"prunebench run {given[1] if given else record.provenance.suite}"
    try:
        words = shlex.split(record.provenance.command)
    except ValueError:  # written by hand
        return run
    if words[:2] == ["prunebench", "rescore"]:  # what the suite's runs kept
        return shlex.join(words)
    instead = []
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--model", "--method"):
            value = value if equals else " ".join(words[index + 1 : index + 2])
            is_plain = re.fullmatch(r"[$]?[\w./+-]+", value)  # `$MIRROR/model` is for the shell
            instead.append(f"{option} {value if is_plain else shlex.quote(value)}")
    return " ".join([run, *instead])

"""Which pruning method should I use on this model, at this sparsity, on this hardware? What the records say, and no more.

For each set of conditions (evaluation, recipe, machine) the rows of one table are weighed against each other (`dominance.py`).
Rows that were retrained on text are weighed among themselves, as on the board. Tuning suites, outdated runs and evaluations
that the dense model cannot do are no evidence. What is known of another target, machine or model is told only where there is
no evidence, apart from it and under what it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prunebench.results.board import Section, Table, build_board
from prunebench.results.comparison import LoadItems
from prunebench.results.dominance import VERDICTS, Choice, Limits, Verdict, weigh
from prunebench.results.leaderboard import reason
from prunebench.results.records import RunRecord
from prunebench.results.rows import DENSE, Row
from prunebench.results.store import Stored
from prunebench.targets import parse_target

MOST_ELSEWHERE = 4
"""Other targets, and other models, that are told of where there is no evidence."""


@dataclass(frozen=True)
class Question:
    """What is asked."""

    model: str
    """A name on the board, or where the model comes from: its name on the Hub."""
    target: str
    weights: str | None = None
    """The hash of the model's weights, where it is at hand; then its name does not matter."""
    limits: Limits = Limits()
    machine: str | None = None
    tuning: frozenset[str] = frozenset()
    """Suites by which options were chosen: a means, and no evidence."""

    def is_about(self, record: RunRecord) -> bool:
        """Whether a run is of this model."""
        model = record.spec.model
        if self.weights is not None:
            return model.weights == self.weights
        return self.model in (model.name, model.source, model.source.partition("@")[0].removeprefix("mirror:"))

    def is_at(self, record: RunRecord) -> bool:
        """Whether a run is at this target."""
        return str(parse_target(record.spec.target)) == str(parse_target(self.target))


@dataclass(frozen=True)
class Evidence:
    """The rows of one table."""

    section: Section
    table: Table
    weights: str
    parameters: int | None
    """Of the model, where an audit says so."""
    choices: tuple[Choice, ...]
    """Those worth choosing first, the best quality first."""


@dataclass(frozen=True)
class Elsewhere:
    """What is known of something else than what was asked: whoever uses it extrapolates."""

    kind: Literal["another target", "another machine", "another model"]
    what: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Advice:
    """An answer."""

    question: Question
    evidence: tuple[Evidence, ...]
    without: tuple[RunRecord, ...]
    """Runs of this model at this target that failed or were refused."""
    outdated: int
    """How many runs are of another revision, and no evidence."""
    elsewhere: tuple[Elsewhere, ...]
    """Only where there is no evidence."""
    models: tuple[str, ...]
    """What the models on the board are called."""

    def missing(self, methods: Iterable[str]) -> list[str]:
        """Those methods of which nothing is known, not even that they fail."""
        known = {choice.row.method for evidence in self.evidence for choice in evidence.choices}
        known |= {record.spec.method for record in self.without}
        return [method for method in methods if method not in known]


Known = Callable[[Question, Sequence[Stored]], list[Evidence]]
"""What some runs are evidence of."""


@dataclass(frozen=True)
class Tally:
    """One method over several sets of conditions."""

    method: str
    trained: bool
    counts: Mapping[Verdict, int]
    reasons: Mapping[Verdict, tuple[str, ...]]
    """By whom it is beaten, what rules it out, why it is open: each once."""
    choices: tuple[Choice, ...]

    @property
    def measured(self) -> int:
        """In how many sets of conditions."""
        return len(self.choices)

    @property
    def usual_rank(self) -> float:
        """The mean of the best ranks that it may have; infinite where it has none."""
        ranks = [choice.row.rank.first for choice in self.choices if choice.row.rank is not None]
        return statistics.fmean(ranks) if ranks else math.inf


def advise(question: Question, stored: Sequence[Stored], revisions: Mapping[str, int], load: LoadItems) -> Advice:
    """Answer from records.

    Args:
        question: what is asked.
        stored: the latest records, `ResultStore.latest`.
        revisions: the present ones, as `build_board` takes them.
        load: gives raw answers.
    """
    tuned = {one.record.provenance.tuned for one in stored}
    question = replace(question, tuning=frozenset(suite for suite in tuned if suite is not None))
    about = [one for one in stored if question.is_about(one.record)]
    here = [one for one in about if question.machine in (None, one.record.machine)]
    evidence, without, outdated = _weighed(question, here, revisions, load)
    elsewhere: list[Elsewhere] = []
    if not evidence:
        elsewhere = list(_elsewhere(question, about, stored, lambda asked, runs: _weighed(asked, runs, revisions, load)[0]))
    names = sorted({one.record.spec.model.name for one in stored})
    return Advice(question, tuple(evidence), tuple(without), outdated, tuple(elsewhere), tuple(names))


def tally(evidence: Iterable[Evidence]) -> list[Tally]:
    """Each method over all sets of conditions: those that are worth choosing anywhere first, of them the best by rank."""
    by_method: dict[tuple[bool, str], list[Choice]] = {}
    for one in evidence:
        for choice in one.choices:
            by_method.setdefault((one.table.training is not None, choice.row.method), []).append(choice)
    found = [_tally(method, trained, choices) for (trained, method), choices in by_method.items()]
    return sorted(found, key=lambda one: (one.trained, not one.counts["choose"], one.usual_rank, one.method))


def _tally(method: str, trained: bool, choices: Sequence[Choice]) -> Tally:
    alike = {verdict: [choice for choice in choices if choice.verdict == verdict] for verdict in VERDICTS}
    reasons = {
        verdict: tuple(dict.fromkeys(reason for choice in some for reason in choice.reasons)) for verdict, some in alike.items()
    }
    return Tally(method, trained, {verdict: len(some) for verdict, some in alike.items()}, reasons, tuple(choices))


def to_json(advice: Advice, missing: Sequence[str]) -> dict[str, Any]:
    """Everything, as plain data.

    Args:
        advice: the answer.
        missing: methods of which nothing is known, `Advice.missing`.
    """
    return {
        **{name: value for name, value in vars(advice.question).items() if name not in ("limits", "tuning")},
        **vars(advice.question.limits),
        "evidence": [_plain(one) for one in advice.evidence],
        "without_scores": [
            {"id": one.id, "machine": one.machine, "method": one.spec.method, "status": one.status, "reason": reason(one)}
            for one in advice.without
        ],
        "outdated": advice.outdated,
        "no_evidence": list(missing),
        "elsewhere": [
            {"extrapolated_from": other.kind, "what": other.what, "evidence": [_plain(one) for one in other.evidence]}
            for other in advice.elsewhere
        ],
    }


def _plain(evidence: Evidence) -> dict[str, Any]:
    section, table = evidence.section, evidence.table
    return {
        "model": section.model,
        "weights": evidence.weights,
        "parameters": evidence.parameters,
        "target": table.target,
        "machine": section.machine,
        "evaluation": section.title,
        "unit": section.unit,
        "higher_is_better": section.higher_is_better,
        "conditions": dict(section.conditions),
        "recipe": None if section.recipe is None else section.recipe.model_dump(mode="json"),
        "training": None if table.training is None else table.training.model_dump(mode="json"),
        "dense": section.baseline,
        "rows": [
            {
                "method": choice.row.method,
                "verdict": choice.verdict,
                "reasons": list(choice.reasons),
                "value": choice.row.mean,
                "seeds": list(choice.row.seeds),
                "against_dense": None if not _known(choice.row) else [getattr(choice.row.versus, name) for name in _INTERVAL],
                "rank": None if choice.row.rank is None else [choice.row.rank.first, choice.row.rank.last],
                "prune_seconds": choice.row.prune_seconds,
                "peak_bytes": choice.row.peak_bytes,
                "shared_machine": choice.row.shared_machine,
                "ids": list(choice.row.ids),
            }
            for choice in evidence.choices
        ],
    }


_INTERVAL = ("estimate", "low", "high")


def _known(row: Row) -> bool:
    return row.versus is not None and row.versus.is_known


def _weighed(
    question: Question, runs: Sequence[Stored], revisions: Mapping[str, int], load: LoadItems
) -> tuple[list[Evidence], list[RunRecord], int]:
    """The evidence in these runs, those without a score, and how many are outdated."""
    evidence: list[Evidence] = []
    without: list[RunRecord] = []
    outdated = 0
    for weights in sorted({one.record.spec.model.weights for one in runs}):
        mine = [one for one in runs if one.record.spec.model.weights == weights]
        mine = [one for one in mine if question.is_at(one.record) or one.record.spec.target == DENSE]
        by_id = {(one.record.machine, one.record.id): one.record for one in mine}
        board = build_board(mine, revisions, load)
        for section in board.sections:
            if section.silence is None:
                evidence += _of_section(section, by_id, question, weights)
        without += [record for record in (*board.failed, *board.refused) if question.is_at(record)]
        outdated += sum(question.is_at(record) for record in board.outdated)
    return evidence, without, outdated


def _of_section(
    section: Section, by_id: Mapping[tuple[str, str], RunRecord], question: Question, weights: str
) -> Iterator[Evidence]:
    suites = {
        by_id[section.machine, run_id].provenance.suite for table in section.tables for row in table.rows for run_id in row.ids
    }
    if suites <= question.tuning:
        return
    for table in section.tables:
        records = {row.ids: by_id[section.machine, row.ids[0]] for row in table.rows}
        rows = [row for row in table.rows if records[row.ids].spec.target != DENSE and not math.isnan(row.mean)]
        if rows:
            sizes = [size for row in rows if (size := _parameters(records[row.ids])) is not None]
            choices = weigh(rows, section.higher_is_better, question.limits, table.training is not None)
            yield Evidence(section, table, weights, max(sizes, default=None), tuple(choices))


def _parameters(record: RunRecord) -> int | None:
    """Of the whole model: an audit counts zeros, and gives their share of all parameters."""
    audit = record.audit
    return round(audit.zeros / audit.sparsity_total) if audit is not None and audit.sparsity_total > 0 else None


def _elsewhere(question: Question, about: Sequence[Stored], stored: Sequence[Stored], known: Known) -> Iterator[Elsewhere]:
    """The nearest that is known: this model on other machines, at other targets; other models at this target."""
    if question.machine is not None:
        anywhere = replace(question, machine=None)
        for machine in sorted({one.record.machine for one in about} - {question.machine}):
            runs = [one for one in about if one.record.machine == machine]
            if found := known(anywhere, runs):
                yield Elsewhere("another machine", machine, tuple(found))
    here = [one for one in about if question.machine in (None, one.record.machine)]
    targets = {str(parse_target(one.record.spec.target)) for one in here} - {DENSE, str(parse_target(question.target))}
    for target in sorted(targets, key=lambda target: _distance(question.target, target))[:MOST_ELSEWHERE]:
        if found := known(replace(question, target=target), here):
            yield Elsewhere("another target", target, tuple(found))
    others: dict[str, list[Stored]] = {}
    for one in stored:
        if not question.is_about(one.record) and question.machine in (None, one.record.machine):
            others.setdefault(one.record.spec.model.name, []).append(one)
    told = 0
    for name in sorted(others):
        if told < MOST_ELSEWHERE and (found := known(question, others[name])):
            told += 1
            yield Elsewhere("another model", name, tuple(found))


def _distance(asked: str, other: str) -> tuple[bool, float, str]:
    """How far another target is: first those of its kind, then the nearest sparsity."""
    one, two = parse_target(asked), parse_target(other)
    return type(one) is not type(two), abs(one.sparsity - two.sparsity), other

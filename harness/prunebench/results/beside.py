"""Published numbers beside ours, where both are numbers of the same thing.

The model must be the Hub's of that name, method and target the same, every stated condition and the stated recipe must agree,
and our text must be the complete data set by the hash of its content, read to its last whole window. What fails any of these is
`not comparable`, and says why. Our value is the mean over calibration seeds.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prunebench.results.content import fingerprint
from prunebench.results.planning import Asked
from prunebench.results.published import Metric, PublishedScore
from prunebench.results.records import RunRecord, ScoreRecord

Status = Literal["reproduced", "off", "not run", "not comparable", "copy"]

RELATIVE = 0.01
"""How far a perplexity may be from a printed one and reproduce it, as a share: more than seeds of calibration make at 50%."""

HEADINGS = ("paper", "table", "model", "method", "target", "what", "published", "ours", "status")


@dataclass(frozen=True)
class Candidate:
    """One value of a record that a published number could be about."""

    record: RunRecord
    metric: Metric
    subject: str
    """The data set of a perplexity, the task or set of tasks of an accuracy."""
    value: float
    """In the unit of published numbers: perplexity, or percent."""
    conditions: Mapping[str, Any]
    """By the names of `PublishedConditions`."""
    questions: tuple[int, ...] = ()
    """How many each task has."""
    left_out: str | None = None
    """What of the data was not read."""


@dataclass(frozen=True)
class Beside:
    """A published number and what our records say to it."""

    published: PublishedScore
    status: Status
    reason: str | None = None
    """Why it is not comparable."""
    ours: float | None = None
    seeds: int = 0
    """How many of ours the mean is over; 0 without a run, 1 for methods without seeds."""

    @property
    def text(self) -> str:
        """The status in words: `reproduced`, `off by +0.42`, `not comparable: window 2048, published 4096`."""
        if self.status == "off" and self.ours is not None:
            return f"off by {self.ours - self.published.value:+.2f}"
        return f"{self.status}: {self.reason}" if self.reason else self.status

    def cells(self) -> tuple[str, ...]:
        """The row's texts, one a heading."""
        number = self.published
        seeds = f" (mean of {self.seeds} seeds)" if self.seeds > 1 else ""
        return (
            number.paper,
            number.table,
            number.model or number.model_label,
            number.method or number.method_label,
            number.target,
            number.task or number.metric,
            number.printed,
            "" if self.ours is None else f"{self.ours:.2f}{seeds}",
            self.text,
        )


def beside(published: Iterable[PublishedScore], records: Iterable[RunRecord]) -> list[Beside]:
    """Every published number with its status, in the order given.

    Args:
        published: as `load_published` gives them.
        records: the latest ones of present revisions; those that failed or refused count for nothing.
    """
    measured: dict[tuple[str, ...], list[Candidate]] = defaultdict(list)
    for record in records:
        if record.status == "ok":
            for found in measured_in(record):
                measured[found.metric, found.subject, record.spec.method, record.spec.target].append(found)
    placed = []
    for number in published:
        key = (number.metric, number.task or number.conditions.data or "", number.method or "", number.target)
        placed.append(_place(number, measured.get(key, [])))
    return placed


def matched(placed: Iterable[Beside]) -> list[Beside]:
    """The rows of the table `published beside ours`."""
    return [one for one in placed if one.status in ("reproduced", "off")]


def about(placed: Iterable[Beside], measured: Iterable[Mapping[str, Any]]) -> list[Beside]:
    """The published numbers of what was measured under any of these conditions, whatever else agrees: for a part of a board."""
    subjects: set[tuple[Metric, object]] = set()
    for conditions in measured:
        if conditions.get("eval") == "perplexity":
            subjects.add(("perplexity", conditions.get("data")))
        elif conditions.get("eval") == "zero_shot":
            tasks = conditions.get("tasks")
            subjects |= {("accuracy", task) for task in tasks} if isinstance(tasks, dict) else set()
            subjects.add(("mean accuracy", conditions.get("set")))
    return [one for one in placed if (one.published.metric, one.published.task or one.published.conditions.data) in subjects]


def counts(placed: Sequence[Beside]) -> str:
    """`published numbers: 666; reproduced 1, off 0, not run 438, not comparable 185, copies 42`."""
    found = Counter(one.status for one in placed)
    named: tuple[tuple[Status, str], ...] = (
        ("reproduced", "reproduced"),
        ("off", "off"),
        ("not run", "not run"),
        ("not comparable", "not comparable"),
        ("copy", "copies"),
    )
    return f"published numbers: {len(placed)}; " + ", ".join(f"{label} {found[status]}" for status, label in named)


def tolerance(published: PublishedScore, questions: Sequence[int]) -> float:
    """How far ours may be from a published value and reproduce it.

    Perplexity: 1% of it. Accuracy: two binomial standard errors of the printed share over so many questions; of a mean over
    tasks, of the mean of independent tasks that all have the printed share. Never less than half a unit of the last printed
    digit.
    """
    if published.metric == "perplexity":
        return max(RELATIVE * published.value, published.rounding)
    share = published.value / 100
    error = math.sqrt(share * (1 - share) * sum(1 / count for count in questions)) / len(questions)
    return max(2 * 100 * error, published.rounding)


def measured_in(record: RunRecord) -> Iterator[Candidate]:
    """What of a record published numbers could be about: perplexities, and accuracies of tasks and of sets of tasks."""
    for score in record.scores.values():
        if score.conditions.get("eval") == "perplexity" and score.value is not None:
            data, left_out = str(score.conditions.get("data")), _left_out(score.conditions)
            yield Candidate(record, "perplexity", data, score.value, score.conditions, left_out=left_out)
        elif score.conditions.get("eval") == "zero_shot":
            yield from _accuracies(record, score)


def _left_out(conditions: Mapping[str, Any]) -> str | None:
    tokens, window, windows = (conditions.get(key) for key in ("tokens", "window", "windows"))
    if not (isinstance(tokens, int) and isinstance(window, int) and isinstance(windows, int)):
        return "the record does not say how many windows there are"
    return None if windows == tokens // window else f"only {windows} of {tokens // window} windows"


def _accuracies(record: RunRecord, score: ScoreRecord) -> Iterator[Candidate]:
    """Each task's accuracy, and the mean of a named set of which no task is missing."""
    conditions: Mapping[str, Any] = score.conditions
    tasks, questions = conditions.get("tasks"), Asked.by(conditions).questions
    if not isinstance(tasks, dict) or not questions:
        return
    common = {
        "harness": f"lm-eval {conditions.get('lm_eval')}",
        "metric_key": conditions.get("metric"),
        "shots": conditions.get("shots"),
        "limit": conditions.get("limit") or 0,
        "dtype": conditions.get("dtype"),
    }
    shares = score.parts or (dict.fromkeys(tasks, score.value) if len(tasks) == 1 else {})
    for task, asked in questions:
        facts, share = tasks[task], shares.get(task)
        if share is not None:
            told = common | {"task_version": _whole(facts.get("version")), "content": facts.get("content")}
            yield Candidate(record, "accuracy", task, 100 * share, told, (asked,))
    if conditions.get("set") and score.value is not None and shares.keys() >= tasks.keys():
        sizes = tuple(asked for _, asked in questions)
        yield Candidate(record, "mean accuracy", str(conditions["set"]), 100 * score.value, common, sizes)


def _whole(version: object) -> object:
    """Version `1.0` is version 1."""
    return int(float(version)) if isinstance(version, str) and re.fullmatch(r"\d+(\.0+)?", version) else version


def _place(number: PublishedScore, candidates: list[Candidate]) -> Beside:
    if number.copied_from is not None:
        return Beside(number, "copy", number.reason)
    if number.reason is not None or number.model is None:
        return Beside(number, "not comparable", number.reason)
    ours = [one for one in candidates if one.record.spec.model.source.partition("@")[0] == number.model]
    if not ours:
        name = number.model.rpartition("/")[2].lower()
        models = [one.record.spec.model for one in candidates]
        local = any("@" not in model.source and model.name.lower() == name for model in models)
        return Beside(number, "not comparable", "the model is a local folder") if local else Beside(number, "not run")
    found = [(differences(number, one), one) for one in ours]
    agreeing = [one for reasons, one in found if not reasons]
    if not agreeing:
        _, nearest = min((len(reasons), "; ".join(reasons)) for reasons, _ in found)
        return Beside(number, "not comparable", nearest)
    seeds = _one_row(agreeing)
    mean = statistics.fmean(one.value for one in seeds)
    near = abs(mean - number.value) <= tolerance(number, seeds[0].questions)
    return Beside(number, "reproduced" if near else "off", ours=mean, seeds=len(seeds))


def _one_row(agreeing: list[Candidate]) -> list[Candidate]:
    """The seeds of one row: measured alike in what the paper leaves open too, on one machine; the row of most seeds."""
    rows: dict[tuple[str, ...], dict[int | None, Candidate]] = defaultdict(dict)
    for one in sorted(agreeing, key=lambda m: (m.record.provenance.started, m.record.id)):
        spec = one.record.spec
        key = (one.record.machine, spec.model.source, fingerprint(dict(one.conditions)), fingerprint(spec.recipe))
        rows[key][spec.seed] = one
    return list(max(sorted(rows.items()), key=lambda item: len(item[1]))[1].values())


def differences(number: PublishedScore, ours: Candidate) -> list[str]:
    """What keeps a published number and ours, of one model, method and target, from being compared."""
    found = []
    stated = number.conditions.model_dump(exclude={"content"}, exclude_none=True)
    recipe = ours.record.spec.recipe
    given = {
        "calibration": recipe.calibration.name if recipe.calibration else None,
        "samples": recipe.samples,
        "length": recipe.length,
        "training": recipe.training.name if recipe.training else None,
    }
    asked = number.recipe.model_dump(exclude={"seed"}, exclude_none=True)
    for theirs, mine in ((stated, ours.conditions), (asked, given)):
        for key, value in theirs.items():
            if mine.get(key) != value:
                found.append(f"{key.replace('_', ' ')} {mine.get(key)}, published {value}")
    if number.conditions.content is None:
        found.append("no hash of the complete data set is known")
    elif ours.conditions.get("content") != number.conditions.content:
        found.append(f"our data are not the complete set: their hash is {ours.conditions.get('content')}")
    if ours.left_out:
        found.append(ours.left_out)
    if recipe.calibration and not recipe.calibration.complete:
        found.append("our calibration text is an excerpt")
    return found

"""Recognition against production: does the model still say what it still knows?

A question has a beginning, one right answer and wrong ones. It is *recognised* when the right answer is more likely behind the
beginning than every wrong one, and *produced* when greedy decoding begins with it. Pruned models lose the second first.

An answer is *empty* when no word comes before the end of text or of the decoding. It is *repetitive* when a phrase of 1 to 4
words, at least three times in a row, makes up at least half of the words decoded, or when the word produced is the beginning's
last one over again and not the right answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunebench.bench.evals.answering import Reader, continuations, log_likelihoods
from prunebench.bench.evals.questions import NORMALISATION, Question, check_task_names, load_tasks, words
from prunebench.errors import NonFiniteError, OptionError
from prunebench.spec import Eval, EvalFacts, EvalJob, JsonDict, Sample, Score, option
from prunebench.toolkit.cache import digest

NEW_TOKENS, MARGIN = 20, 4
"""Tokens decoded: enough to see a loop, and some more than the longest answer has."""

LEAST_OF_DENSE = 0.1
"""Where the dense model produces less, a board leaves the table out: what pruning changes there cannot be seen."""

LONGEST_PHRASE = 4
TIMES = 3

_ANSWER_LENGTH = 24


@dataclass
class Generation(Eval):
    """Short answers by likelihood and by greedy decoding: what a model recognises, and what it produces."""

    name: ClassVar[str] = "generation"
    revision: ClassVar[int] = 1

    tasks: tuple[str, ...] = option(("lambada",), "lambada (the last word), or FILE.jsonl of pairs; joined by +")
    limit: int = option(0, "use only so many questions of each task, from the start; 0 is all")

    phenomena: tuple[str, ...] = option((), "of pairs only these phenomena, joined by +; none is all")

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise OptionError(f"generation: the number of questions cannot be {self.limit}.")
        check_task_names(self.tasks)

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Each task's data, questions and wrong answers; how answers are decoded and compared."""
        tasks = load_tasks(self.tasks, self.limit, Path(facts.folder), self.phenomena)
        reader = Reader(facts)
        longest = max(len(reader.tokens(f" {question.answer}")) for task in tasks for question in task.questions)
        parts = [task.conditions() for task in tasks]
        return {
            "data": " + ".join(part["data"] for part in parts),
            "content": digest(part["content"] for part in parts),
            "complete": all(part["complete"] for part in parts),
            "questions": sum(part["questions"] for part in parts),
            "tasks": parts,
            "recognition": "log-likelihood of the whole word, its end included, highest of all candidates",
            "production": "greedy, first words",
            "new_tokens": max(NEW_TOKENS, longest + MARGIN),
            "normalisation": NORMALISATION,
            "repetitive": f"a phrase of up to {LONGEST_PHRASE} words, {TIMES} times, half of all; or the prefix's last word",
            "least_of_dense": LEAST_OF_DENSE,
            "prefix": "BOS as the tokenizer adds it; cut on the left to the model's context",
        }

    def measure(self, job: EvalJob) -> Score:
        """Both answers to every question; the value is the mean over tasks of the share produced."""
        tasks = load_tasks(self.tasks, self.limit, Path(job.facts.folder), self.phenomena)
        asked = [(task.name, question) for task in tasks for question in task.questions]
        return _score(self._answered(job, asked), [len(task.questions) for task in tasks])

    def again(self, job: EvalJob, chosen: Sequence[int]) -> dict[str, Sequence[float | int | str]]:
        """Only these questions: columns as `measure` finds them."""
        tasks = load_tasks(self.tasks, self.limit, Path(job.facts.folder), self.phenomena)
        asked = [(task.name, question) for task in tasks for question in task.questions]
        return self._answered(job, [asked[number] for number in chosen])

    def _answered(self, job: EvalJob, asked: Sequence[tuple[str, Question]]) -> dict[str, Sequence[float | int | str]]:
        reader, new_tokens = Reader(job.facts), job.conditions["new_tokens"]
        prompts = [reader.prompt(question, new_tokens) for _, question in asked]
        margins = [values[0] - max(values[1:]) for values in log_likelihoods(job, prompts, reader)]
        bad = [i for i, margin in enumerate(margins) if not math.isfinite(margin)]
        if bad:
            raise NonFiniteError(
                f"the likelihood of {len(bad)} of {len(asked)} answers is not finite, first of question {bad[0]}."
            )
        answers = [
            judge(question, text)
            for (_, question), text in zip(asked, continuations(job, prompts, new_tokens, reader), strict=True)
        ]
        return {
            "task": [task for task, _ in asked],
            "stratum": [question.stratum for _, question in asked],
            "recognised": [int(margin > 0) for margin in margins],
            "produced": [int(answer.right) for answer in answers],
            "empty": [int(answer.empty) for answer in answers],
            "repetitive": [int(answer.repetitive) for answer in answers],
            "answer": [answer.word[:_ANSWER_LENGTH] for answer in answers],
            "margin": [round(margin, 4) for margin in margins],
        }


@dataclass(frozen=True)
class Answer:
    """What a model produced, judged."""

    word: str
    right: bool
    empty: bool
    repetitive: bool


def judge(question: Question, text: str) -> Answer:
    """Compare as many of the first words of a continuation as the right answer has."""
    produced, wanted, before = words(text), words(question.answer), words(question.prefix)
    first = produced[: len(wanted)]
    right = first == wanted
    again = not right and produced[:1] == before[-1:] and bool(produced)
    return Answer(" ".join(first), right, not produced, again or is_loop(produced))


def is_loop(produced: Sequence[str]) -> bool:
    """Whether a phrase of 1 to 4 words, at least three times in a row, makes up at least half of the words."""
    for period in range(1, LONGEST_PHRASE + 1):
        run = period
        for at in range(period, len(produced)):
            run = run + 1 if produced[at] == produced[at - period] else period
            if run >= max(TIMES * period, len(produced) / 2):
                return True
    return False


def _score(items: dict[str, Sequence[float | int | str]], sizes: Sequence[int]) -> Score:
    """Shares as means over tasks, each of which counts equally."""

    def share(column: str) -> float:
        means, start = [], 0
        for size in sizes:
            means.append(sum(map(float, items[column][start : start + size])) / size)
            start += size
        return math.fsum(means) / len(means)

    parts = {column: share(column) for column in ("recognised", "produced", "empty", "repetitive")}
    gap = {"gap": parts["recognised"] - parts["produced"]}
    sample = Sample("produced", strata="stratum", tasks="task")
    return Score(parts["produced"], "accuracy", True, items, parts={**parts, **gap}, sample=sample)

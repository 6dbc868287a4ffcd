"""Questions with one natural short answer: the last word of a passage, or the word in which a pair of sentences differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from prunebench.errors import DataError, UnknownNameError
from prunebench.spec import JsonDict
from prunebench.toolkit.cache import digest, digest_file
from prunebench.toolkit.texts import Source, load_text, read_rows, resolve_file

LAMBADA = "EleutherAI/lambada_openai/default:test"
LAMBADA_WHOLE = "d5cd1104aa85dc29"
"""Content hash of the complete split, so that the mirror's copy of it is not called an excerpt."""

LAMBADA_WRONG = 3
_WRONG_OF = {
    "lambada": f"the last words of the passages behind, the first {LAMBADA_WRONG} unlike the answer and each other, cyclic",
    "pairs": "the pair's other word",
}

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
NORMALISATION = "runs of letters and digits, with single apostrophes and hyphens inside, without case"


@dataclass(frozen=True)
class Question:
    """A beginning and what may come next."""

    stratum: str
    """Its phenomenon, or its task."""
    prefix: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Questions of one kind and where they come from."""

    name: str
    questions: list[Question]
    source: Source
    candidates: str
    """How the wrong answers were found."""

    def conditions(self) -> JsonDict:
        """What makes two results on it comparable."""
        parts = chain.from_iterable((q.stratum, q.prefix, q.answer, *q.wrong) for q in self.questions)
        source = asdict(self.source)
        return {
            "task": self.name,
            "data": source.pop("name"),
            **source,
            "candidates": self.candidates,
            "questions": len(self.questions),
            "question_hash": digest(parts),
        }


def words(text: str) -> list[str]:
    """The words of a text as answers are compared by: see `NORMALISATION`."""
    return [word.replace("’", "'").casefold() for word in _WORD.findall(text)]


def check_task_names(names: Sequence[str]) -> None:
    """See that there are such tasks.

    Raises:
        UnknownNameError: a name is neither a task nor a file of pairs.
    """
    for name in names or [""]:
        if name != "lambada" and not name.endswith(".jsonl"):
            raise UnknownNameError.among("task", name, ["lambada", "FILE.jsonl"])


def load_tasks(names: Sequence[str], limit: int, folder: Path, phenomena: Sequence[str] = ()) -> list[Task]:
    """The tasks by name, each with its first `limit` questions (0: all).

    Args:
        names: `lambada`, or a file of pairs: JSON lines with `prefix`, `good`, `bad` and `phenomenon`.
        limit: does not change a question's wrong answers.
        folder: where relative file names start.
        phenomena: of pairs only these; none is all.

    Raises:
        DataError: the data are not there, a question has no answer, or two tasks have one name.
        UnknownNameError: a file has no pair of a phenomenon.
    """
    tasks = [_lambada(limit) if name == "lambada" else _pairs(name, limit, folder, phenomena) for name in names]
    called = [task.name for task in tasks]
    if twice := next((name for name in called if called.count(name) > 1), None):
        raise DataError(f"two tasks are called {twice}; give each file a name of its own.")
    return tasks


def _lambada(limit: int) -> Task:
    text = load_text(LAMBADA, "test", Path())
    cut = [row.strip().rsplit(maxsplit=1) for row in text.rows]
    bad = next((i for i, parts in enumerate(cut) if len(parts) < 2 or not words(parts[1])), None)
    if bad is not None:
        raise DataError(f"lambada: passage {bad} of {len(cut)} has no last word to ask for.")
    last = [answer for _, answer in cut]
    questions = [
        Question("lambada", prefix, answer, _others(last, i)) for i, (prefix, answer) in enumerate(cut[: limit or None])
    ]
    complete = text.source.complete or text.source.content == LAMBADA_WHOLE
    source = Source(**{**asdict(text.source), "complete": complete})
    return Task("lambada", questions, source, _WRONG_OF["lambada"])


def _others(last: Sequence[str], index: int) -> tuple[str, ...]:
    """Wrong answers for a passage: the last words of those behind it."""
    taken, found = [words(last[index])], []
    for step in range(1, len(last)):
        other = last[(index + step) % len(last)]
        if words(other) not in taken:
            taken.append(words(other))
            found.append(other)
        if len(found) == LAMBADA_WRONG:
            return tuple(found)
    raise DataError(f"lambada: {len(last)} passages have fewer than {LAMBADA_WRONG + 1} different last words.")


def _pairs(name: str, limit: int, folder: Path, phenomena: Sequence[str]) -> Task:
    path = resolve_file(name, folder)
    found = (_pair(row, f"{path.name}, line {number},") for number, row in read_rows(path).items())
    questions = [question for question in found if question is not None]
    if not questions:
        raise DataError(f"the file {name} holds no pair with a prefix.")
    there = {question.stratum for question in questions}
    for phenomenon in phenomena:
        if phenomenon not in there:
            raise UnknownNameError.among(f"phenomenon in {name}", phenomenon, there)
    if phenomena:
        questions = [question for question in questions if question.stratum in phenomena]
    source = Source(path.name, "", "", "file", digest_file(path), True)
    return Task(path.stem, questions[: limit or None], source, _WRONG_OF["pairs"])


def _pair(row: JsonDict, where: str) -> Question | None:
    """A row as a question, or None where nothing comes before the word in which its sentences differ."""
    for field in ("prefix", "good", "bad", "phenomenon"):
        if not isinstance(row.get(field), str):
            raise DataError(f"{where} has no text under {field!r}.")
    if not row["prefix"].strip():
        return None
    for field in ("good", "bad"):
        if not words(row[field]):
            raise DataError(f"{where} has no word under {field!r}, so there is no answer.")
    if words(row["good"]) == words(row["bad"]):
        raise DataError(f"{where} has the same word under 'good' and 'bad'.")
    return Question(row["phenomenon"], row["prefix"].rstrip(), row["good"].strip(), (row["bad"].strip(),))

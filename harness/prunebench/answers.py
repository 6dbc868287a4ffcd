"""What a plugin answers when it is asked before a run: a stranger's answer may be anything, or an exception."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunebench.effort import Effort
from prunebench.errors import PluginError, PrunebenchError, described
from prunebench.plugins import load_registry
from prunebench.spec import Changes, Claims, Eval, Needs, Pruner

GROUPS = re.compile(r"row|matrix|model|columns:[1-9]\d*|earlier")
"""Answers of `Pruner.audit_group`."""


def _is_json(answer: Any) -> bool:
    try:
        json.dumps(answer, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(answer, dict) and all(isinstance(key, str) for key in answer)


def _is_texts(answer: Any) -> bool:
    return isinstance(answer, Sequence) and not isinstance(answer, str) and all(isinstance(text, str) for text in answer)


def _is_effort(answer: Any) -> bool:
    if not isinstance(answer, Sequence) or not all(isinstance(part, Effort) for part in answer):
        return False
    counts = [value for part in answer for name, value in vars(part).items() if name not in ("phase", "dtype")]
    return all(isinstance(count, int | float) and 0 <= count < math.inf for count in counts)


QUESTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "needs": (lambda answer: isinstance(answer, Needs), "a Needs"),
    "changes": (lambda answer: isinstance(answer, Changes), "a Changes"),
    "claims": (lambda answer: isinstance(answer, Claims), "a Claims"),
    "audit_group": (
        lambda answer: isinstance(answer, str) and GROUPS.fullmatch(answer) is not None,
        "row, matrix, model, columns:N or earlier",
    ),
    "refuses": (
        lambda answer: answer is None or (isinstance(answer, str) and bool(answer.strip())),
        "a reason in one sentence, or None",
    ),
    "effort": (_is_effort, "a list of Effort, of numbers that are not negative"),
    "conditions": (_is_json, "a mapping that JSON can hold"),
    "texts": (_is_texts, "a list of texts"),
}
"""For each question what is an answer to it, and how that is called."""


WITHOUT_A_JOB = ("needs", "changes", "claims", "audit_group")
"""What a pruner answers whatever the job."""


def ask(plugin: Pruner | Eval, question: str, *facts: object) -> Any:
    """A pruner's or evaluation's answer to one of `QUESTIONS`.

    Raises:
        PluginError: it raises, or answers what is none of the answers; names the plugin, its distribution and the question.
        PrunebenchError: as the plugin itself raised it: a `DataError` of `conditions` says that the data cannot be had.
    """
    try:
        answer = getattr(plugin, question)(*facts)
    except (KeyboardInterrupt, PrunebenchError):
        raise
    except BaseException as error:
        raise PluginError(f"{question}() of {origin(plugin)} raised {described(error)}.") from error
    fits, wanted = QUESTIONS[question]
    if not fits(answer):
        raise PluginError(f"{question}() of {origin(plugin)} answers {_shown(answer)}, and not {wanted}.")
    return answer


def ask_all_of(pruner: Pruner) -> None:
    """Ask what can be asked of a pruner without a job, so that nonsense is found before any work.

    Raises:
        PluginError: as `ask` does.
    """
    for question in WITHOUT_A_JOB:
        ask(pruner, question)


def origin(plugin: Pruner | Eval) -> str:
    """What a plugin is called in a sentence: kind, name, distribution and version."""
    registry = load_registry()
    kind, table = ("pruner", registry.pruners) if isinstance(plugin, Pruner) else ("evaluation", registry.evals)
    entry = table.get(plugin.name)
    where = f" ({entry.distribution} {entry.version})" if entry is not None and entry.cls is type(plugin) else ""
    return f"the {kind} {plugin.name!r}{where}"


def _shown(answer: object) -> str:
    """A stranger's object in few words; it may fail at telling what it is."""
    try:
        said = repr(answer)
    except Exception:  # noqa: BLE001 - its own `__repr__` raises
        return f"an object of {type(answer).__name__}"
    return said if len(said) <= 60 and "\n" not in said else f"an object of {type(answer).__name__}"

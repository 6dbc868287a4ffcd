"""Tasks of lm-eval with their data: stock definitions, of which only the data may come from elsewhere, and a file's own.

Where `PRUNEBENCH_MIRROR` names a folder, a task's data set is read there by layout alone, as texts are (`toolkit/texts.py`),
and nothing touches the network. A definition's split may be absent there: then the validation split stands in for the test
split, which the conditions say, and few-shot examples cannot be had.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from prunebench.bench.evals.task_index import SETS, TaskIndex, file_index, stock_index
from prunebench.errors import DataError, OptionError, UnknownNameError
from prunebench.spec import JsonDict
from prunebench.toolkit.cache import digest
from prunebench.toolkit.texts import mirror, resolve_file

ANSWERED = ("multiple_choice", "loglikelihood")

_WORDING = (
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "target_delimiter",
    "fewshot_delimiter",
    "process_docs",
)
"""Parts of a definition that a question's wording depends on."""

_SHOWN = 20
"""Questions whose wording goes into a prompt's hash; the definition and the data are hashed whole."""


@dataclass
class Member:
    """A task, or a group of tasks that counts as one."""

    name: str
    tasks: dict[str, Task]


@dataclass
class TaskSet:
    """What was asked for, as far as it can be had."""

    members: list[Member]
    missing: dict[str, str]
    """Members of a named set whose data are not there, with the reason: the set has no mean then."""

    @property
    def tasks(self) -> dict[str, Task]:
        """All tasks by name."""
        return {name: task for member in self.members for name, task in member.tasks.items()}


def load_tasks(asked: str, shots: int, folder: Path) -> TaskSet:
    """Find tasks and their data.

    Args:
        asked: a set, names of tasks and groups joined by `+`, or `FILE.yaml`.
        shots: examples before each question.
        folder: where relative file names start.

    Raises:
        UnknownNameError: there is no such task.
        DataError: data are missing; of a set's members only if all of them are.
        OptionError: a task is not answered by likelihood.
    """
    with quiet():
        if asked.endswith(".yaml"):
            index, names = file_index(resolve_file(asked, folder))
        else:
            index = stock_index()
            names = list(SETS.get(asked) or asked.split("+"))
            for name in names:
                if name not in index.entries:
                    raise UnknownNameError.among("task", name, [*SETS, *index.entries])
        members, missing = [], {}
        for name in names:
            try:
                members.append(Member(name, _built(index, name, shots)))
            except DataError as error:
                if asked not in SETS:
                    raise
                missing[name] = str(error)
        if not members:
            raise DataError(f"no task of {asked} can be had: {'; '.join(missing.values())}")
        return TaskSet(members, missing)


def gold_of(task: Task, doc: Mapping[str, Any]) -> int | None:
    """The number of the right choice, or None where the data do not say; 0 for a task whose answer is a text."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0 if str(gold).strip() else None
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else None
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's warnings and progress bars off the terminal."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "evaluate", "datasets", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _built(index: TaskIndex, name: str, shots: int) -> dict[str, Task]:
    leaves = index.leaves(name)
    folders = sorted({str((index.root / index.entries[leaf]["file"]).parent) for leaf in leaves})
    manager = TaskManager(include_defaults=False, include_path=folders)
    specs = [{"task": leaf, **_data_of(leaf, manager, shots)} for leaf in leaves]
    try:
        loaded = manager.load([{"group": "prunebench", "task": specs}])["tasks"]
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the Hub's client and strangers' definitions raise dozens of kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the task {name} cannot be loaded: {reason}. Without a network set PRUNEBENCH_MIRROR to a folder with its data."
        ) from None
    for leaf, task in loaded.items():
        if task.OUTPUT_TYPE not in ANSWERED:
            raise OptionError(f"zero_shot: {leaf} is a task of kind {task.OUTPUT_TYPE}; it takes {' and '.join(ANSWERED)}.")
    return {leaf: loaded[leaf] for leaf in leaves}


def _data_of(name: str, manager: TaskManager, shots: int) -> JsonDict:
    """What to change in a definition so that its data come from the mirror, or from a file beside it.

    Raises:
        DataError: they are not there.
    """
    entry = manager.task_index[name]
    definition: Mapping[str, Any] = entry.cfg or {}
    path = str(definition.get("dataset_path"))
    files = (definition.get("dataset_kwargs") or {}).get("data_files")
    if path == "json" and isinstance(files, dict):
        beside = Path(entry.yaml_path).parent
        return {"custom_dataset": _reader({split: beside / file for split, file in files.items()})}
    copy = mirror()
    if copy is None:
        return {}
    config = str(definition.get("dataset_name") or "default")
    there = {file.stem: file for file in sorted((Path(copy) / "datasets" / path / config).glob("*.jsonl"))}
    asked = {key: definition.get(f"{key}_split") for key in ("test", "validation", "training", "fewshot")}
    splits = {key: split for key, split in asked.items() if split in there}
    if not {"test", "validation"} & set(splits):
        wanted = asked["test"] or asked["validation"]
        raise DataError(
            f"the task {name} needs {path}/{config}/{wanted}.jsonl, and PRUNEBENCH_MIRROR has "
            f"{', '.join(there) or 'nothing of it'}."
        )
    if shots and not {"fewshot", "training", "validation" if "test" in splits else "training"} & set(splits):
        raise DataError(f"the task {name} needs examples for {shots} shots, and PRUNEBENCH_MIRROR has {', '.join(there)} only.")
    changes: JsonDict = {f"{key}_split": None for key, split in asked.items() if split is not None and key not in splits}
    if asked["test"] and "test" not in splits:
        conversion = f"{asked['validation']} stands in for {asked['test']}"
        changes["metadata"] = {**(definition.get("metadata") or {}), "conversion": conversion}
    return {"custom_dataset": _reader({split: there[split] for split in splits.values()}), **changes}


def _reader(files: Mapping[str, Path]) -> Callable[..., Any]:
    """What lm-eval calls for a data set: its splits, from JSON lines."""

    def read(**_: Any) -> Any:
        import datasets

        found = {}
        for split, path in files.items():
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
            except (OSError, ValueError) as error:
                raise DataError(f"{path.name} cannot be read as JSON lines: {error}.") from None
            found[split] = datasets.Dataset.from_list(rows)
        return found

    return read


def facts_of(member: Member) -> JsonDict:
    """What of a member's definitions and data is a condition of a score.

    Raises:
        DataError: a question has no answer.
    """
    versions, splits, conversions, kinds = set(), set(), set(), set()
    contents, prompts, items = [], [], 0
    for name, task in member.tasks.items():
        docs = task.eval_docs
        _check_gold(name, task, docs)
        definition = task.config
        versions.add(str(task.VERSION))
        kinds.add(str(task.OUTPUT_TYPE))
        splits.add(str(definition.test_split or definition.validation_split))
        if "conversion" in (definition.metadata or {}):
            conversions.add(str(definition.metadata["conversion"]))
        items += len(docs)
        contents.append(digest(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str) for row in docs))
        prompts.append(_prompt_hash(task, docs))
    return {
        "tasks": len(member.tasks),
        "version": _one(versions),
        "kind": _one(kinds),
        "split": _one(splits),
        "items": items,
        "content": digest(contents),
        "prompt": digest(prompts),
        **({"conversion": _one(conversions)} if conversions else {}),
    }


def _check_gold(name: str, task: Task, docs: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(task.config.doc_to_target, int) and not task.multiple_input:
        return
    for number, doc in enumerate(docs):
        try:
            missing = gold_of(task, doc) is None
        except Exception:  # noqa: BLE001 - a template that finds no answer raises whatever its parts raise
            missing = True
        if missing:
            raise DataError(f"the task {name} has no right answer for question {number}, so it cannot be scored.")


def _prompt_hash(task: Task, docs: Sequence[Mapping[str, Any]]) -> str:
    """The hash of a definition: its templates, the source of its functions, and the wording of the first questions."""
    definition = task.config
    parts = []
    for name in _WORDING:
        value = getattr(definition, name)
        parts.append(inspect.getsource(value) if callable(value) else json.dumps(value, default=str))
    for doc in [docs[number] for number in range(min(_SHOWN, len(docs)))]:
        parts.append(json.dumps([task.doc_to_text(doc), task.doc_to_target(doc)], default=str))
        parts.append(json.dumps(task.doc_to_choice(doc) if definition.doc_to_choice is not None else None, default=str))
    return digest(parts)


def _one(values: set[str]) -> str:
    return ", ".join(sorted(values))

"""Tasks of lm-eval with their data: stock definitions, of which only the data may come from elsewhere, and a file's own.

Where `PRUNEBENCH_MIRROR` names a folder, a task's data set is read there by layout alone, as texts are (`toolkit/texts.py`),
and nothing touches the network. A definition's split may be absent there: then the validation split stands in for the test
split, which the conditions say, and few-shot examples cannot be had.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from prunebench.bench.evals.task_index import SETS, TaskIndex, find_definitions, local_files
from prunebench.errors import DataError, OptionError, first_line
from prunebench.spec import JsonDict
from prunebench.toolkit.cache import digest
from prunebench.toolkit.texts import mirror, read_rows

ANSWERED = ("multiple_choice", "loglikelihood")

_WORDING = (
    "description",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "target_delimiter",
    "fewshot_delimiter",
    "gen_prefix",
    "process_docs",
    "process_results",
    "filter_list",
)
"""Parts of a definition that a question's wording, or what counts as right, depends on."""

_SHOWN = 20
"""Questions whose wording goes into a prompt's hash; the definition and the data are hashed whole."""


class RememberingTask(ConfigurableTask):  # type: ignore[misc]
    """A task that fills in its template of choices once a question: lm-eval compiles it anew four times, which takes it longer
    than a small model takes to answer."""

    def __init__(self, config: JsonDict) -> None:
        self._choices: dict[str, list[str]] = {}
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def doc_to_choice(self, doc: Mapping[str, Any], doc_to_choice: Any = None) -> list[str]:
        """The choices of a question."""
        key = repr(doc)
        if doc_to_choice is not None or not isinstance(self.config.doc_to_choice, str):
            return list(super().doc_to_choice(doc, doc_to_choice))
        if key not in self._choices:
            self._choices[key] = super().doc_to_choice(doc)
        return list(self._choices[key])


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
        OptionError: a task is not answered by likelihood, asked twice, or never asked with examples.
    """
    with quiet():
        index, names = find_definitions(asked, folder)
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
        _check_once([*(leaf for member in members for leaf in member.tasks), *missing])
        return TaskSet(members, missing)


def _check_once(names: Sequence[str]) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise OptionError(f"zero_shot: the task {twice} is asked for twice; each counts once.")


def gold_of(task: Task, doc: Mapping[str, Any]) -> int | None:
    """The number of the right choice, the first of several; 0 for an answer that is a text; None where the data do not say."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0 if str(gold).strip() else None
    if gold == task.config.doc_to_target == 0:  # the first of the choices, whatever they are
        return 0
    choices = task.doc_to_choice(doc)
    found = [choices.index(one) if isinstance(one, str) and one in choices else one for one in _listed(gold)]
    if not found or not all(isinstance(one, int) and 0 <= one < len(choices) for one in found):
        return None
    return int(found[0])


def _listed(gold: Any) -> list[Any]:
    return gold if isinstance(gold, list) else [gold]


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


_WITHOUT_NETWORK = " Without a network set PRUNEBENCH_MIRROR to a folder with its data."


def _built(index: TaskIndex, name: str, shots: int) -> dict[str, Task]:
    leaves = index.leaves(name)
    folders = sorted({str((index.root / index.entries[leaf]["file"]).parent) for leaf in leaves})
    manager = TaskManager(include_defaults=False, include_path=folders)
    specs = [{"task": leaf, **_data_of(leaf, manager)} for leaf in leaves]
    for spec in specs:
        if "class" not in (manager.task_index[spec["task"]].cfg or {}):  # as a task in Python has
            spec["class"] = RememberingTask
    try:
        loaded = manager.load([{"group": "prunebench", "task": specs}])["tasks"]
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - the Hub's client and strangers' definitions raise dozens of kinds
        reason = first_line(error).rstrip(".")
        where = "" if all("custom_dataset" in spec for spec in specs) else _WITHOUT_NETWORK
        raise DataError(f"the task {name} cannot be loaded: {type(error).__name__}: {reason}.{where}") from None
    for leaf, task in loaded.items():
        if task.OUTPUT_TYPE not in ANSWERED:
            raise OptionError(f"zero_shot: {leaf} is a task of kind {task.OUTPUT_TYPE}; it takes {' and '.join(ANSWERED)}.")
        if shots:
            _check_examples(leaf, task, shots)
    return {leaf: loaded[leaf] for leaf in leaves}


def _check_examples(name: str, task: Task, shots: int) -> None:
    """See that there are examples that are not the questions themselves: lm-eval would take those where it finds no others.

    Raises:
        OptionError: the definition wants none.
        DataError: there are none.
    """
    definition = task.config
    if definition.num_fewshot == 0:  # lm-eval keeps to that, whatever it is asked
        raise OptionError(f"zero_shot: the definition of {name} forbids examples (num_fewshot: 0), so shots must be 0.")
    asked = definition.test_split or definition.validation_split
    # From the test split it draws others than the question itself, but from no other.
    named = definition.fewshot_split not in (None, asked) or asked == definition.fewshot_split == definition.test_split
    if named or definition.fewshot_config.samples or {definition.training_split, definition.validation_split} - {None, asked}:
        return
    raise DataError(f"the task {name} needs examples for {shots} shots, and of its data only the split {asked} is there.")


def _data_of(name: str, manager: TaskManager) -> JsonDict:
    """What to change in a definition so that its data come from the mirror, or from a file beside it.

    Raises:
        DataError: they are not there.
    """
    entry = manager.task_index[name]
    definition: Mapping[str, Any] = entry.cfg or {}
    files = local_files(definition, Path(str(entry.yaml_path)).parent)
    if files is not None:
        return {"custom_dataset": _reader(files)}
    copy = mirror()
    if copy is None:
        return {}
    path, config = str(definition.get("dataset_path")), definition.get("dataset_name") or "default"
    there = {file.stem: file for file in sorted((Path(copy) / "datasets" / path / config).glob("*.jsonl"))}
    asked = {key: definition.get(f"{key}_split") for key in ("test", "validation", "training", "fewshot")}
    splits = {key: split for key, split in asked.items() if split in there}
    evaluated = splits.get("test") or splits.get("validation")
    if evaluated is None:
        wanted = asked["test"] or asked["validation"]
        raise DataError(
            f"the task {name} needs {path}/{config}/{wanted}.jsonl, and PRUNEBENCH_MIRROR has "
            f"{', '.join(there) or 'nothing of it'}."
        )
    if evaluated != asked["test"] and splits.get("fewshot") == evaluated:
        del splits["fewshot"]  # a question would be its own example
    changes: JsonDict = {f"{key}_split": None for key, split in asked.items() if split is not None and key not in splits}
    if asked["test"] and "test" not in splits:
        conversion = f"{evaluated} stands in for {asked['test']}"
        changes["metadata"] = {**(definition.get("metadata") or {}), "conversion": conversion}
    return {"custom_dataset": _reader({split: there[split] for split in splits.values()}), **changes}


def _reader(files: Mapping[str, Path]) -> Callable[..., Any]:
    """What lm-eval calls for a data set: its splits, from JSON lines."""

    def read(**_: Any) -> Any:
        import datasets

        return {split: datasets.Dataset.from_list(list(read_rows(path).values())) for split, path in files.items()}

    return read


def facts_of(member: Member, shots: int) -> JsonDict:
    """What of a member's definitions and data, and of so many examples before a question, is a condition of a score.

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
        prompts.append(_prompt_hash(task, docs, shots))
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
    same = isinstance(task.config.doc_to_target, int) and not task.multiple_input
    for number in range(1 if same else len(docs)):
        try:
            missing = gold_of(task, docs[number]) is None
        except Exception:  # noqa: BLE001 - a template that finds no answer raises whatever its parts raise
            missing = True
        if missing:
            raise DataError(f"the task {name} has no right answer for question {number}, so it cannot be scored.")


def _prompt_hash(task: Task, docs: Sequence[Mapping[str, Any]], shots: int) -> str:
    """The hash of a definition: its templates, the source of its functions, the wording of the first questions, and all that
    may stand before them as an example."""
    definition = task.config
    parts = [_source(getattr(definition, name)) for name in _WORDING]
    asked = [docs[number] for number in range(min(_SHOWN, len(docs)))]
    for doc in asked:
        parts.append(json.dumps([task.doc_to_text(doc), task.doc_to_target(doc)], default=str))
        parts.append(json.dumps(task.doc_to_choice(doc) if definition.doc_to_choice is not None else None, default=str))
    if shots:
        parts.append(digest(json.dumps(row, sort_keys=True, default=str) for row in task.fewshot_docs()))
        begin(task, shots)
        parts += [json.dumps(task.fewshot_context(doc, shots)) for doc in asked]
    return digest(parts)


def begin(task: Task, shots: int) -> None:
    """Set how many examples stand before a question, drawn as the `lm_eval` command draws them."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _source(value: Any) -> str:
    """A part of a definition as text that is the same in every process."""
    if isinstance(value, functools.partial):
        return json.dumps([_source(value.func), *map(_source, value.args), value.keywords], default=_source)
    if not callable(value):
        return json.dumps(value, default=_source)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return f"{value.__module__}.{value.__qualname__}"


def _one(values: set[str]) -> str:
    return ", ".join(sorted(values))

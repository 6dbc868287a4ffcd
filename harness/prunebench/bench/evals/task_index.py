"""Where lm-eval's task definitions are, and which data they read; lm-eval is imported only to find out.

Reading its 14,000 definitions takes 10 seconds, so what was found is kept in the cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from prunebench.errors import DataError, UnknownNameError
from prunebench.spec import JsonDict
from prunebench.toolkit.cache import digest, digest_file, load_json, save_json
from prunebench.toolkit.texts import mirror, resolve_file

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SETS = {
    # Wanda, section 4 and appendix D.5; PERP.
    "wanda7": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
    # Wanda++, table 2.
    "wanda++9": ("wic", "mrpc", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "boolq", "rte", "mmlu"),
    # SparseGPT, table 3; which edition of StoryCloze is not said.
    "sparsegpt5": ("lambada_openai", "piqa", "arc_easy", "arc_challenge", "storycloze_2016"),
    # Warstadt et al. 2020 (arXiv 1912.00582): 67 phenomena of 1,000 pairs.
    "blimp": ("blimp",),
}
"""The sets of the papers. Members count equally in a mean; a group's own tasks count by their number of items."""


@dataclass(frozen=True)
class TaskIndex:
    """Definitions by name."""

    root: Path
    entries: Mapping[str, JsonDict]
    """`file` relative to the root and `data`, the owner, name and configuration of the data set; `members` of groups, tags."""

    def leaves(self, name: str) -> list[str]:
        """The tasks under a name."""
        members = self.entries[name].get("members")
        return [name] if members is None else [leaf for member in members for leaf in self.leaves(member)]


def data_of(asked: str, folder: Path) -> dict[str, list[str]]:
    """The data sets of the tasks under each name of a request, `OWNER/NAME/CONFIG` for each task; none for files of data.

    Raises:
        UnknownNameError: there is no such task.
        DataError: a file defines none.
    """
    index, names = find_definitions(asked, folder)
    return {name: [str(index.entries[leaf]["data"]) for leaf in index.leaves(name)] for name in names}


def find_definitions(asked: str, folder: Path) -> tuple[TaskIndex, list[str]]:
    """Where the definitions of a request are, and the names asked for: tasks and groups.

    Raises:
        UnknownNameError: there is no such task.
        DataError: a file defines none.
    """
    if asked.endswith(".yaml"):
        return file_index(resolve_file(asked, folder))
    index, names = stock_index(), list(SETS.get(asked) or asked.split("+"))
    for name in names:
        if name not in index.entries:
            raise UnknownNameError.among("task", name, [*SETS, *index.entries])
    return index, names


def lm_eval_version() -> str:
    """The installed version of lm-eval: its prompts and metrics are conditions of a score."""
    return importlib.metadata.version("lm_eval")


def stock_index() -> TaskIndex:
    """The definitions that come with lm-eval."""
    found = importlib.util.find_spec("lm_eval")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent / "tasks"
    entries = load_json("lm_eval", lm_eval_version())
    if not entries:
        from lm_eval.tasks import TaskManager

        entries = _entries(TaskManager(), root)
        save_json("lm_eval", lm_eval_version(), entries)
    return TaskIndex(root, entries)


def file_index(path: Path) -> tuple[TaskIndex, list[str]]:
    """The definitions beside a file, and the names of those in it.

    Raises:
        DataError: it defines none.
    """
    from lm_eval.tasks import TaskManager

    try:
        yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)  # lm-eval passes over what it cannot read
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path.name} cannot be read as a definition of a task: {reason}.") from None
    entries = _entries(TaskManager(include_defaults=False, include_path=str(path.parent)), path.parent)
    names = [name for name, entry in entries.items() if entry.get("file") == path.name]
    if not names:
        raise DataError(f"{path.name} defines no task of lm-eval: it needs a `task:` and what belongs to it.")
    return TaskIndex(path.parent, entries), names


def local_files(definition: Mapping[str, Any], folder: Path) -> dict[str, Path] | None:
    """The files by split that a definition in `folder` names as its data; None where they are a data set of the Hub.

    Raises:
        DataError: it names them in a way that is not understood.
    """
    if definition.get("dataset_path") != "json":
        return None
    files = (definition.get("dataset_kwargs") or {}).get("data_files")
    files = {"train": files} if isinstance(files, str) else files
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise DataError("data in JSON lines are named as dataset_kwargs: data_files: {SPLIT: FILE.jsonl}, a file for a split.")
    return {str(split): folder / file for split, file in files.items()}


def data_key(asked: str, folder: Path) -> str | None:
    """A hash of all local files that tasks are made of; None where data come from the Hub, or not all of them are known."""
    try:
        if asked.endswith(".yaml"):
            places = _places_of_file(resolve_file(asked, folder))
        else:
            places = _places(data for found in data_of(asked, folder).values() for data in found)
        contents = None if places is None else [f"{name} {digest_file(file)}" for name, file in places]
    except (UnknownNameError, DataError, OSError, ValueError, yaml.YAMLError):  # said when the tasks are loaded
        return None
    return digest([lm_eval_version(), *contents]) if contents is not None else None


def _places_of_file(path: Path) -> list[tuple[str, Path]] | None:
    """A definition's file and its data; None where it draws on other definitions or functions."""
    definition = yaml.safe_load(path.read_text(encoding="utf-8"))  # a function is none of the kinds that it knows
    if not isinstance(definition, dict) or "include" in definition or not isinstance(definition.get("task"), str):
        return None
    files = local_files(definition, path.parent)
    places = _places([_data_name(definition)]) if files is None else list(files.items())
    return None if places is None else [("definition", path), *places]


def _places(names: Iterable[str]) -> list[tuple[str, Path]] | None:
    """All files of data sets, with names that do not say where the mirror is."""
    copy = mirror()
    if copy is None:
        return None
    root = Path(copy) / "datasets"
    files = [file for name in sorted(set(names)) for file in sorted((root / name).glob("*.jsonl"))]
    return [(file.relative_to(root).as_posix(), file) for file in files]


def _data_name(definition: Mapping[str, Any]) -> str:
    return f"{definition.get('dataset_path')}/{definition.get('dataset_name') or 'default'}"


def _entries(manager: TaskManager, root: Path) -> dict[str, JsonDict]:
    found: dict[str, JsonDict] = {}
    for name, entry in manager.task_index.items():
        definition = entry.cfg or {}
        if entry.yaml_path is None:  # a tag
            found[name] = {"members": sorted(entry.tags)}
            continue
        found[name] = {"file": Path(entry.yaml_path).relative_to(root).as_posix(), "data": _data_name(definition)}
        listed = definition.get("task")
        if isinstance(listed, list):
            found[name]["members"] = [
                child if isinstance(child, str) else child.get("task") or child.get("group") for child in listed
            ]
    return found

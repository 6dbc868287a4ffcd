"""`prunebench new`: a small installable package with a method that works, from the files in `templates/`."""

from __future__ import annotations

import keyword
import os
import re
import shutil
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path

from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.spec import API_VERSION

_NAME = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")
"""What is both a pruner's name and a distribution's, and gives a module's name."""

LONGEST = 32
"""Characters of a name: lines with the class's name stay within what ruff is told."""

_FILES = {
    "pyproject.toml": "pyproject.toml.txt",
    "{{module}}.py": "method.py.txt",
    "test_{{module}}.py": "test.py.txt",
    "README.md": "readme.md.txt",
}
"""What is written, and from which template."""


@dataclass(frozen=True)
class Scaffold:
    """A new package."""

    folder: Path
    files: tuple[str, ...]
    commands: tuple[str, ...]
    """What to type next, in its folder."""


def write_package(name: str, parent: Path) -> Scaffold:
    """Write the package of a new pruner into a folder of its name; all of it or nothing.

    Args:
        name: of the pruner and of the distribution, `my-pruner`; the module is `my_pruner`, the class `MyPruner`.
        parent: the folder that gets the new one.

    Raises:
        RequestError: the name cannot be used or is taken, or the folder exists or cannot be written.
    """
    module, cls = re.sub("[.-]", "_", name), "".join(part.capitalize() for part in re.split("[._-]", name))
    templates = {target: _template(source) for target, source in _FILES.items()}
    _check_name(name, module, cls, "\n".join(templates.values()))
    folder = parent / name
    if os.path.lexists(folder):
        raise RequestError(f"{str(folder)!r} exists already; take another name, or another folder with --dir.")
    if not parent.is_dir():
        raise RequestError(f"there is no folder {str(parent)!r} to write into.")
    commands = next_commands(name)
    words = {
        "name": name,
        "module": module,
        "class": cls,
        "api_version": str(API_VERSION),
        "prunebench": metadata.version("prunebench"),
        "commands": "\n".join(commands),
    }
    files = {_filled(target, words): _filled(text, words) for target, text in templates.items()}
    _write(folder, files)
    return Scaffold(folder, tuple(files), commands)


def next_commands(name: str) -> tuple[str, ...]:
    """From the package to its first results, in its folder."""
    return "pip install -e .", "pytest", f"prunebench check {name}", f"prunebench run quickstart --method {name}"


def _check_name(name: str, module: str, cls: str, templates: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > LONGEST:
        raise RequestError(
            f"{name!r} cannot name a pruner and its package: write lower case letters and digits, a letter first, parted by "
            f"single '-', '_' or '.', at most {LONGEST} in all."
        )
    if keyword.iskeyword(module) or keyword.iskeyword(cls):
        raise RequestError(f"{name!r} is a word of Python's own; take another name.")
    registry = load_registry()
    if name in registry.pruners or name in {broken.plugin for broken in registry.broken}:
        raise RequestError(f"there is a pruner {name!r} already; take another name.")
    if find_spec(module) is not None:
        raise RequestError(f"there is a module {module!r} already, which the new one would hide; take another name.")
    if _is_installed(name):
        raise RequestError(f"a package {name!r} is installed already; take another name.")
    imported = " ".join(re.findall(r"^(?:from|import) .*", templates, re.MULTILINE))
    if cls in re.findall(r"\w+", imported):
        raise RequestError(f"the class of {name!r} would be called {cls}, as something that it needs is; take another name.")


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _template(source: str) -> str:
    return resources.files("prunebench").joinpath("templates", source).read_text(encoding="utf-8")


def _filled(text: str, words: dict[str, str]) -> str:
    """A template with its words; braces that Python or TOML needs may touch those of a word."""
    for word, value in words.items():
        text = text.replace("{{" + word + "}}", value)
    return text


def _write(folder: Path, files: dict[str, str]) -> None:
    """Write aside and rename.

    Raises:
        RequestError: it cannot be written; nothing is left.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        aside.mkdir()
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        raise RequestError(f"cannot write {str(folder)!r}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)

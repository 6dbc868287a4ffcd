"""`prunebench new`: what it writes works as it is, and a name that cannot be used leaves nothing behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Ran, cases, tree

from prunebench import scaffold
from prunebench.plugins import find_pruner

Command = Callable[..., Ran]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def written(tmp_path: Path, command: Command) -> Path:
    """The folder of a new package."""
    assert command("new", "my-pruner", "--dir", tmp_path).code == 0
    return tmp_path / "my-pruner"


def test_it_says_what_it_wrote_and_what_to_type_next(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command("new", "my-pruner")
    assert (ran.code, ran.err) == (0, "")
    files = ["pyproject.toml", "my_pruner.py", "test_my_pruner.py", "README.md"]
    assert sorted(tree(tmp_path)) == sorted(["my-pruner", *(f"my-pruner/{file}" for file in files)])
    lines = [line.strip() for line in ran.out.splitlines()]
    assert [line for line in lines if line in files] == files
    first = lines.index("cd my-pruner")
    assert lines[first + 1 :] == [
        "pip install -e .",
        "pytest",
        "prunebench check my-pruner",
        "prunebench run quickstart --method my-pruner",
    ]


def test_the_readme_has_the_same_commands(written: Path) -> None:
    [block] = re.findall(r"^```\n(.*?)^```$", (written / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert block.splitlines()[-1] == "prunebench run quickstart --method my-pruner"
    assert len(block.splitlines()) == 4


@pytest.mark.parametrize("name", ["my-pruner", "a", "a1.b2_c3", "a-name-" + "x" * 25])
def test_no_word_is_left_open_and_the_code_is_clean_and_typed(
    name: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("new", name).code == 0
    folder = tmp_path / name
    for path in folder.iterdir():
        assert "{{" not in path.read_text()
        assert path.read_text().endswith("\n")
    for check in (["check"], ["format", "--check"], ["check", "--isolated", "--line-length", "100", "--select", "E,F,I,B,UP"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "--no-cache", "."], cwd=folder, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout
    method = (folder / f"{re.sub('[.-]', '_', name)}.py").read_text()
    assert len(method.splitlines()) <= 60


@pytest.mark.slow
def test_the_code_is_typed(written: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", *map(str, written.glob("*.py"))],
        cwd=ROOT,  # as strict as we are, with what is known of our own files and of torch
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


NAMES = {
    "upper case": ("My-Pruner", "cannot name a pruner"),
    "digit first": ("2fast", "cannot name a pruner"),
    "two dashes": ("my--pruner", "cannot name a pruner"),
    "dash last": ("my-", "cannot name a pruner"),
    "plus": ("wanda++", "cannot name a pruner"),
    "space": ("my pruner", "cannot name a pruner"),
    "nothing": ("", "cannot name a pruner"),
    "path": ("../elsewhere", "cannot name a pruner"),
    "long": ("x" * 33, "at most 32"),
    "keyword": ("class", "a word of Python's own"),
    "the class is a keyword": ("none", "a word of Python's own"),
    "built-in": ("wanda", "there is a pruner 'wanda' already"),
    "standard library": ("json", "there is a module 'json' already"),
    "installed module": ("typer", "there is a module 'typer' already"),
    "this": ("prunebench", "there is a module 'prunebench' already"),
    "a module under another name": ("prunebench-pruners", "there is a module 'prunebench_pruners' already"),
    "installed package": ("scikit-learn", "a package 'scikit-learn' is installed already"),
    "the contract's": ("pruner", "the class of 'pruner' would be called Pruner"),
    "the tests'": ("factory", "the class of 'factory' would be called Factory"),
}


@pytest.mark.parametrize(("name", "said"), cases(NAMES))
def test_a_name_that_cannot_be_used(name: str, said: str, tmp_path: Path, command: Command) -> None:
    ran = command("new", name, "--dir", tmp_path)
    assert said in ran.complaint
    assert tree(tmp_path) == {}


def test_a_folder_that_exists_stays_as_it_is(written: Path, command: Command) -> None:
    before = tree(written)
    assert "exists already" in command("new", "my-pruner", "--dir", written.parent).complaint
    assert tree(written) == before
    (written.parent / "dangling").symlink_to("nowhere")
    assert "exists already" in command("new", "dangling", "--dir", written.parent).complaint


def test_a_folder_that_is_not_there(tmp_path: Path, command: Command) -> None:
    assert "there is no folder" in command("new", "my-pruner", "--dir", tmp_path / "nowhere").complaint
    assert tree(tmp_path) == {}


def test_nothing_is_written_half(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in command("new", "my-pruner", "--dir", tmp_path).complaint
    assert tree(tmp_path) == {}


def test_its_score_lies_between_magnitude_and_wanda(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of 1 removes what wanda removes, and so does a power of 0 what magnitude removes within rows."""
    from prunebench.testing import make_job, random_tokens, tiny_model

    monkeypatch.chdir(written)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "my_pruner", None)  # so that it is forgotten afterwards
    del sys.modules["my_pruner"]
    for power, other in (("1", "wanda"), ("0", "magnitude[group=row]")):
        masks = []
        for text in (f"my_pruner:MyPruner[power={power}]", other):
            pruner, model = find_pruner(text).make(), tiny_model("llama")
            pruner.prune(make_job(pruner, model))
            masks.append([parameter == 0 for parameter in model.parameters()])
        assert all(bool((one == two).all()) for one, two in zip(*masks, strict=True))
    del random_tokens


# In a fresh virtual environment


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A new virtual environment that sees the packages of this one, with commands of its own, and no network."""
    place = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    [site] = place.glob("lib/python*/site-packages")
    ours = sysconfig.get_paths()["purelib"]
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    for name, module in {"pip": "pip", "pytest": "pytest", "prunebench": "prunebench.cli"}.items():
        script = place / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{place / "bin" / "python"}" -m {module} "$@"\n')
        script.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON"))},
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(place),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # so pip spells "without"
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep, or processes starve each other on few cores
    }


@pytest.mark.slow
def test_a_stranger_gets_all_the_way(written: Path, environment: dict[str, str]) -> None:
    """Exactly what is printed, but that the quickstart is cut to one of its runs."""
    commands = scaffold.next_commands("my-pruner")
    line = " && ".join([*commands[:-1], f"{commands[-1]} --only '0.5, seed 0'"])
    ran = subprocess.run(line, shell=True, cwd=written, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
    assert " 0 failed, 0 excused" in ran.stdout
    assert "1 ok, 0 refused, 0 failed" in ran.stdout

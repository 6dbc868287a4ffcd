"""`prunebench check`: what the laws say of a pruner, and that no pruner breaks the command."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Ran, cases

from prunebench import checking
from prunebench.checking import Checked, Report

Command = Callable[..., Ran]

SOURCE = '''
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Pruner, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk

print("loaded")


@dataclass
class Mine(Pruner):
    """By magnitude, or not at all."""

    name: ClassVar[str] = "mine"

    how: str = option("well", "what it does instead")

    def needs(self):
        return 1 / 0 if self.how == "needless" else super().needs()

    def prune(self, job):
        if self.how == "raise":
            raise ValueError("no")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "linger":
            threading.Thread(target=time.sleep, args=(60,)).start()
            sys.exit()
        if self.how == "crash":
            os.write(1, b"the last line\\n")
            os._exit(0)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(600)
        if self.how == "deprecated":
            warnings.warn("prunebench: write this instead of that.", DeprecationWarning)
        if self.how == "draw":
            print("never")
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))


@dataclass
class Excused(Mine):
    """Prints, and says why."""

    name: ClassVar[str] = "excused"
    excuses: ClassVar[dict] = {"silent": "it likes to talk"}

    how: str = option("draw", "what it does instead")


@dataclass
class Misnamed(Mine):
    name: ClassVar[str] = "misnamed"
    excuses: ClassVar[dict] = {"silence": "there is no such law"}


@dataclass
class Listed(Mine):
    name: ClassVar[str] = "listed"
    excuses: ClassVar[list] = ["silent"]


@dataclass
class Abstract(Pruner):
    name: ClassVar[str] = "abstract"
'''
FEW = ("--family", "llama", "--check", "saves", "--check", "refuses_first")
"""Two laws, of which only the first prunes."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with two modules that nobody installed."""
    (tmp_path / "a_module_of_mine.py").write_text(SOURCE)
    (tmp_path / "a_module_that_exits.py").write_text("import sys\nsys.exit('no licence')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("a_module_of_mine", "a_module_that_exits"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def outcomes(ran: Ran) -> dict[str, tuple[str, str]]:
    """Outcome and message by law, of a report as JSON on one family."""
    return {result["check"]: (result["outcome"], result["message"]) for result in json.loads(ran.out)["results"]}


def test_a_registered_pruner(command: Command) -> None:
    ran = command("check", "magnitude[group=row]", *FEW)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("magnitude[group=row]  prunebench ")
    assert [line.split()[:2] for line in lines[2:4]] == [["saves", "passed"], ["refuses_first", "passed"]]
    assert lines[-1].startswith("2 passed, 0 failed, 0 excused, 0 not asked; ")


def test_as_json(command: Command) -> None:
    found: dict[str, Any] = json.loads(command("check", "magnitude", *FEW, "--json").out)
    assert found["pruner"] == "magnitude"
    assert found["distribution"] == "prunebench"
    assert found["counts"] == {"passed": 2, "failed": 0, "excused": 0, "declined": 0}
    assert 0 < sum(result.pop("seconds") for result in found["results"]) <= found["seconds"]
    assert found["results"] == [
        {"check": "saves", "family": "llama", "outcome": "passed", "message": ""},
        {"check": "refuses_first", "family": "llama", "outcome": "passed", "message": ""},
    ]


def test_what_is_not_asked_has_its_reason(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Mine", "--family", "llama", "--check", "nested", "--check", "silent")
    assert ran.code == 0
    assert "not asked" in ran.out
    assert "llama: mine does not claim NESTED." in ran.out
    assert "1 passed, 0 failed, 0 excused, 1 not asked" in ran.out


def test_a_class_that_nobody_registered(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Mine[how=well]", *FEW)
    assert ran.code == 0
    assert ran.err == "loaded\n"  # what a module prints is kept apart from the report
    assert ran.out.startswith("mine  a_module_of_mine:Mine not registered, revision 1\n")


BROKEN = {
    "raise": "prune raised at 0.5: ValueError: no",
    "exit": "it raised SystemExit: 3, which ends the program.",
    "linger": "it raised SystemExit, which ends the program.",
    "crash": "the process ended with exit code 0 in the middle of the law. Its last lines: the last line",
    "kill": "the process was ended by SIGKILL.",
    "hang": "it took longer than the limit of 2 seconds.",
}


@pytest.mark.parametrize(("how", "said"), BROKEN.items())
def test_a_broken_pruner_fails_a_law_and_the_others_go_on(
    how: str, said: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "GRACE_SECONDS", 0.5)
    limit = ("--timeout", "2") if how == "hang" else ()
    started = time.monotonic()
    ran = command("check", f"a_module_of_mine:Mine[how={how}]", *FEW, *limit, "--json")
    assert ran.code == 1
    assert outcomes(ran) == {"saves": ("failed", said), "refuses_first": ("passed", "")}
    assert time.monotonic() - started < 50
    assert multiprocessing.active_children() == []


def test_a_pruner_that_always_hangs_is_given_up(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Mine[how=hang]", "--family", "llama", "--timeout", "0.5", "--json")
    assert ran.code == 1
    found = list(outcomes(ran).values())
    late, rest = "it took longer than the limit of 0.5 seconds.", "3 laws before it ran into the limit of 0.5 seconds."
    assert found[:3] == [("failed", late)] * 3
    assert len(found) > 10
    assert set(found[3:]) == {("declined", rest)}


def test_questions_that_raise_fail_the_laws(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Mine[how=needless]", *FEW, "--json")
    assert ran.code == 1
    assert {outcome for outcome, _ in outcomes(ran).values()} == {"failed"}
    assert all("ZeroDivisionError" in message for _, message in outcomes(ran).values())


def test_what_is_deprecated_is_told_in_its_own_words(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Mine[how=deprecated]", "--family", "llama", "--check", "silent", "--json")
    assert outcomes(ran) == {"silent": ("failed", "the pruner let a warning through: prunebench: write this instead of that.")}


def test_an_excuse_of_the_class_is_shown_and_must_be_true(command: Command) -> None:
    ran = command("check", "a_module_of_mine:Excused", "--family", "llama", "--check", "silent")
    assert ran.code == 0
    assert "excused" in ran.out
    assert "it likes to talk (" in " ".join(ran.out.split())
    ran = command("check", "a_module_of_mine:Excused[how=well]", "--family", "llama", "--check", "silent", "--json")
    assert ran.code == 1
    said = "this law is kept, and yet excused (it likes to talk); take the excuse away."
    assert outcomes(ran) == {"silent": ("failed", said)}


WRONG = {
    "near name": ("magnitud", "there is no pruner 'magnitud'; did you mean 'magnitude'?"),
    "option": ("magnitude[grup=row]", "magnitude has no option 'grup'; did you mean 'group'?"),
    "value": ("magnitude[group=all]", "the option group is"),
    "grammar": ("magnitude[", "cannot read the step"),
    "module": ("a_module_that_nobody_has:Mine", "cannot import the module 'a_module_that_nobody_has': ModuleNotFoundError"),
    "module that exits": (
        "a_module_that_exits:Mine",
        "cannot import the module 'a_module_that_exits': SystemExit: no licence.",
    ),
    "no module": (":Mine", "cannot import the module ''"),
    "class": ("a_module_of_mine:Yours", "has no 'Yours'"),
    "no class": ("a_module_of_mine:", "has no ''"),
    "no pruner": ("a_module_of_mine:os", "is not a Pruner class"),
    "abstract": ("a_module_of_mine:Abstract", "Abstract is abstract: it does not define prune."),
    "excuse": ("a_module_of_mine:Misnamed", "there is no law 'silence'; did you mean 'silent'?"),
    "excuses": ("a_module_of_mine:Listed", "the class variable `excuses` of a pruner maps names of laws to reasons"),
}


@pytest.mark.parametrize(("name", "said"), cases(WRONG))
def test_a_pruner_that_cannot_be_asked(name: str, said: str, command: Command) -> None:
    ran = command("check", name)
    assert said in Ran(ran.code, ran.out, ran.err.removeprefix("loaded\n")).complaint


@pytest.mark.parametrize(
    ("option", "value", "said"), [("--family", "lama", "did you mean 'llama'?"), ("--check", "save", "did you mean 'saves'?")]
)
def test_a_family_or_law_that_there_is_not(option: str, value: str, said: str, command: Command) -> None:
    assert said in command("check", "magnitude", option, value).complaint


@pytest.mark.parametrize("name", ["check", "new"])
def test_help_fits_a_terminal_and_shows_an_example(name: str, command: Command) -> None:
    ran = command(name, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert max(map(len, ran.out.splitlines())) <= 80
    assert f"Example: prunebench {name} " in ran.out


def test_families_that_share_an_answer_share_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(*_: object) -> Report:
        passed = [Checked("saves", family, "passed", "", 1.0) for family in ("a", "b", "c", "d")]
        failed = [Checked("saves", family, "failed", "no [bold]reason", 0.5) for family in ("e", "f")]
        return Report("mine", "theirs", "1.2.3", 4, [*passed, *failed], 5.0)

    monkeypatch.setattr(checking, "check", answered)
    ran = command("check", "mine")
    assert ran.code == 1
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[0] == "mine theirs 1.2.3, revision 4"
    assert lines[2:4] == ["saves passed 4.0 s 4 families", "saves failed 1.0 s e, f: no [bold]reason"]
    assert lines[-1] == "4 passed, 2 failed, 0 excused, 0 not asked; 5.0 s"

"""The shipped suite with its real model, by the real command, in an empty folder; and a stranger's method beside it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Ran, run_command, tree

from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

pytestmark = pytest.mark.slow

STRANGER = '''"""A stranger's method, as the README says to write one."""

from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Job, Pruner, hookimpl, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk


@dataclass
class RootMagnitude(Pruner):
    """Magnitude to some power, row by row: the power changes nothing."""

    name: ClassVar[str] = "root-magnitude"
    revision: ClassVar[int] = 7

    power: float = option(1.0, "the power")

    def prune(self, job: Job) -> None:
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight) ** self.power, job.target, group="row"))


@hookimpl
def prunebench_pruners():
    return [RootMagnitude]
'''


def records(folder: Path) -> dict[str, RunRecord]:
    """By method."""
    complaints: list[str] = []
    found = ResultStore(folder / "results", complaints.append).all()
    assert complaints == []
    assert len({stored.record.spec.method for stored in found}) == len(found)
    return {stored.record.spec.method: stored.record for stored in found}


@pytest.fixture
def call(command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """A command in this process, in a folder."""

    def inside(folder: Path, *args: object) -> Ran:
        monkeypatch.chdir(folder)
        return command(*args)

    return inside


def test_the_quickstart_runs_once_and_gives_the_same_board(tmp_path: Path, call: Callable[..., Ran]) -> None:
    arguments = ("run", "quickstart", "--only", "0.5, seed 0", "--machine", "elsewhere")
    ran = run_command(*arguments, cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert "0.00% of the 13-grams of" in ran.out
    assert "\n4 runs to do.\n" in ran.out
    assert "4 ok, 0 refused, 0 failed; records in results." in ran.out
    found = records(tmp_path)
    assert found.keys() == {"random", "wanda", "gblm", "sparsegpt"}
    for record in found.values():
        assert (record.status, record.machine, record.provenance.executor) == ("ok", "elsewhere", "subprocess")
        assert record.audit is not None
        assert record.audit.removed * 2 == sum(matrix.shape[0] * matrix.shape[1] for matrix in record.audit.matrices)
        score = record.scores["perplexity"]
        assert len(score.items["nll"]) == score.conditions["windows"]
        assert score.conditions["window"] == 256
        assert str(tmp_path) not in record.to_json()
    half = found["wanda"].scores["perplexity"].value
    assert 60 < half < 130
    assert found["random"].scores["perplexity"].value > 2 * half
    assert found["sparsegpt"].scores["perplexity"].value < half
    assert {path.name for path in tmp_path.iterdir()} == {"results"}

    before, started = tree(tmp_path), time.monotonic()
    ran = run_command(*arguments, cwd=tmp_path)
    assert (ran.code, ran.err, ran.out.splitlines()[-1]) == (0, "", "0 runs to do; 4 found done.")
    assert time.monotonic() - started < 60, "it has loaded no model and started no process"
    assert tree(tmp_path) == before

    ran = call(tmp_path, *arguments[:-1], "another", "--dry-run")
    assert "4 to do, 0 done; nothing was run.\n" in ran.out
    ran = call(tmp_path, *arguments, "--dry-run")
    assert "0 to do, 4 done; nothing was run.\n" in ran.out

    assert call(tmp_path, "report", "--out", "one.md").code == 0
    assert call(tmp_path, "report", "--out", "two.md").code == 0
    shutil.copytree(tmp_path / "results", tmp_path / "moved" / "elsewhere")
    assert call(tmp_path, "report", "--results", "moved/elsewhere", "--out", "three.md").code == 0
    board = (tmp_path / "one.md").read_bytes()
    assert (tmp_path / "two.md").read_bytes() == (tmp_path / "three.md").read_bytes() == board
    for part in ("wiki7m", "50% unstructured", "wanda", "random", "elsewhere", "prunebench run quickstart"):
        assert part in board.decode()


def install_wheel(folder: Path) -> Path:
    """Build a stranger's wheel by hand, and install it as pip does, without network."""
    name, info = "their_best-2.0", "their_best-2.0.dist-info"
    wheel = folder / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("their_best.py", STRANGER)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: their-best\nVersion: 2.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/entry_points.txt", "[prunebench]\nbest = their_best\n")
        file.writestr(f"{info}/RECORD", "".join(f"{entry.filename},,\n" for entry in file.filelist) + f"{info}/RECORD,,\n")
    options = "--quiet --disable-pip-version-check --root-user-action ignore --no-index --no-deps --no-compile"
    site = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options.split(), "--target", site, wheel],
        check=True,
        capture_output=True,
        text=True,
    )
    return site


def test_a_strangers_method_is_run_and_ranked_like_the_others(tmp_path: Path, call: Callable[..., Ran]) -> None:
    site = install_wheel(tmp_path)
    method = "root-magnitude[power=0.5]"
    ran = run_command(
        "run", "quickstart", "--method", method, "--method", "magnitude[group=row]", "--only", " 0.5", "--machine", "elsewhere",
        cwd=tmp_path, path=site,
    )  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    found = records(tmp_path)
    theirs, ours = found[method], found["magnitude[group=row]"]
    (step,) = theirs.steps
    assert (step.pruner, step.distribution, step.version, step.revision) == ("root-magnitude", "their-best", "2.0", 7)
    assert step.options == {"power": 0.5}
    assert theirs.spec.seed is None
    assert theirs.scores["perplexity"].items == ours.scores["perplexity"].items, "the same masks by other scores"
    assert theirs.audit == ours.audit
    assert call(tmp_path, "report", "--out", "board.md").code == 0
    board = (tmp_path / "board.md").read_text(encoding="utf-8")
    row = r"^\| +1-2 +\| \*\*root-magnitude\[power=0\.5\]\*\* \| +[\d.]+ \| +\| +deterministic \|"
    assert re.search(row, board, re.MULTILINE), "equal answers share their rank"
    ran = run_command("list", path=site)
    assert "root-magnitude Magnitude to some power" in " ".join(ran.out.split())

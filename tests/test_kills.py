"""Kills at random moments and at every block, through the real command: nothing is lost, nothing is done twice.

A few of each here, all of it in `make soak`.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import Bench, install_plugin, run_command, start_command, tree

from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

DYING = '''
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunebench.spec import Claims, Needs, Pruner, hookimpl, option
from prunebench.toolkit import InputNorm, keep_mask, wanda_scores, walk


@dataclass
class Dying(Pruner):
    """Wanda, which kills its process once, at a block."""

    name: ClassVar[str] = "dying"

    at: int = option(0, "the block")
    mark: str = option("", "a file that says that it has")
    parent: bool = option(False, "kill the command too")

    def needs(self):
        return Needs.CALIBRATION

    def claims(self):
        return Claims.BLOCKWISE

    def prune(self, job):
        for block in walk(job):
            norms = block.collect(InputNorm)
            if block.index == self.at and not Path(self.mark).exists():
                Path(self.mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            for matrix in block.matrices:
                matrix.keep(keep_mask(wanda_scores(matrix.weight, norms[matrix]), job.target, group="row"))


@hookimpl
def prunebench_pruners():
    return [Dying]
'''


def records_of(results: Path) -> list[RunRecord]:
    """Every record there; none may be broken."""
    complaints: list[str] = []
    stored = ResultStore(results, complaints.append).all() if results.exists() else []
    assert complaints == []
    return [item.record for item in stored]


def json_files(results: Path) -> dict[str, bytes | None]:
    """The records' files, not those of what is going on."""
    found = tree(results) if results.exists() else {}
    return {name: content for name, content in found.items() if name.endswith(".json") and not name.startswith(".journal")}


def run_processes(command: Any) -> list[psutil.Process]:
    """The processes of the runs that are at work, by the journal's word: those that the fork server made."""
    found = []
    with suppress(psutil.Error):
        for server in psutil.Process(command.pid).children():
            with suppress(psutil.Error):
                found += server.children()
    return found


def in_journal(results: Path) -> list[str]:
    """What is left there of runs that ended; the page of a sweep that died with nothing to do stays until the next one."""
    left = [path.name for path in (results / ".journal").iterdir() if path.suffix not in (".lock", ".log")]
    return [name for name in left if not name.startswith("sweep-")]


KILLS = [2, pytest.param(50, marks=pytest.mark.soak, id="50")]


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_any_moment_nothing_is_lost_or_done_twice(kills: int, bench: Bench, tmp_path: Path) -> None:
    """The command or one of the two runs that are at work, as the dice say; now and then with a second command beside."""
    suite = tmp_path / "small.toml"
    suite.write_text(bench.suite_text("dense", "magnitude", "random", "wanda", targets=["0.5", "2:4"], seeds=[0, 1, 2]))
    results = tmp_path / "results"
    arguments = ("run", suite, "--results", results, "--machine", "here", "--jobs", "2", "--checkpoint-every", "1")
    draw = random.Random(kills)
    for _ in range(kills):
        before = json_files(results)
        with start_command(*arguments) as command:
            rival = start_command(*arguments) if draw.random() < 0.2 else None
            time.sleep(draw.uniform(1, 10))
            victims = run_processes(command)
            if victims and draw.random() < 0.5:
                with suppress(psutil.Error):
                    draw.choice(victims).kill()
                time.sleep(draw.uniform(0, 1))
            command.kill()
            command.communicate(timeout=60)
            if rival is not None:
                rival.kill()
                rival.communicate(timeout=60)
                rival.__exit__(None, None, None)
        found = records_of(results)
        ok = [record.id for record in found if record.status == "ok"]
        assert len(set(ok)) == len(ok), "a run was done twice"
        assert {record.failure.kind for record in found if record.failure} <= {"killed"}
        after = json_files(results)
        assert {name: after.get(name) for name in before} == before, "a record was lost or changed"
    ran = run_command(*arguments)
    assert (ran.code, ran.err) == (0, "")
    ok = [record for record in records_of(results) if record.status == "ok"]
    assert len(ok) == len({record.id for record in ok}) == 1 + 2 + 6 + 6
    assert run_command("status", "--results", results).out == f"Nothing is running in {results}.\n"
    assert in_journal(results) == []


BLOCKS = [(1,), pytest.param((0, 1), marks=pytest.mark.soak, id="every")]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
def test_killed_at_a_block_a_run_goes_on_there_with_the_same_bits(
    blocks: tuple[int, ...], bench: Bench, tmp_path: Path
) -> None:
    plugin = install_plugin(tmp_path / "site", DYING)
    suite, results = tmp_path / "small.toml", tmp_path / "results"
    steps = [f"dying[at={block},mark={tmp_path / f'mark{block}'}]" for block in blocks]
    suite.write_text(bench.suite_text(f"dying[mark={tmp_path}]", *steps))  # the first finds its mark there
    arguments = ("run", suite, "--results", results, "--machine", "here", "--checkpoint-every", "1", "--only", "dying")
    ran = run_command(*arguments, path=plugin)
    assert ran.code == 1
    assert f"1 ok, 0 refused, {len(blocks)} failed" in ran.out
    ran = run_command(*arguments, path=plugin)
    assert (ran.code, ran.err) == (0, "")
    found = records_of(results)
    (whole,) = (record for record in found if record.spec.steps[0].text == f"dying[mark={tmp_path}]")
    resumed = [record for record in found if record.status == "ok" and record is not whole]
    assert len(resumed) == len(blocks)
    for record in resumed:
        block = int("at=1" in record.spec.method)  # 0 is the default, and not written
        assert record.audit == whole.audit
        assert record.scores["perplexity"].items == whole.scores["perplexity"].items
        notes = record.steps[0].notes
        assert [note for note in notes if "resumed" in note] == ([] if block == 0 else ["resumed"]), notes
    assert in_journal(results) == []

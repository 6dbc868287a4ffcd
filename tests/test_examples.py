"""The example packages, imported from their folders: their own tests, the kit on a few cases, and runs of their steps.

Nothing is installed. Whoever installs a package has the kit in full among its tests.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support import Bench

from prunebench.bench import runner
from prunebench.bench.suite import load_suite
from prunebench.results.records import RunRecord
from prunebench.spec import Job, Pruner
from prunebench.testing import CHECKS, Declined, cases

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
sys.path.extend(map(str, FOLDERS))

MODULES = [import_module(folder.name.replace("-", "_")) for folder in FOLDERS]
PRUNERS: list[type[Pruner]] = [
    cls for module in MODULES if hasattr(module, "prunebench_pruners") for cls in module.prunebench_pruners()
]
DSNOT: Any = next(cls for cls in PRUNERS if cls.name == "dsnot")
QUICK = ["target_met", "declared_changes", "nothing_left", "streaming", "pruned_prefix", "nested", "refuses_first"]
DOOR = {"prunebench.spec", "prunebench.targets", "prunebench.toolkit", "prunebench.testing"}


def test_there_are_four() -> None:
    names = ["prunebench-llmcompressor", "prunebench-mlflow", "prunebench-ria", "prunebench-torch-prune"]
    assert [folder.name for folder in FOLDERS] == names
    assert [cls.name for cls in PRUNERS] == ["llmc-wanda", "llmc-sparsegpt", "ria", "dsnot", "torch-l1"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_packaging(folder: Path) -> None:
    """An entry point that names the module, and a README and tests beside it."""
    about = tomllib.loads((folder / "pyproject.toml").read_text())
    (module,) = about["project"]["entry-points"]["prunebench"].values()
    assert about["project"]["name"] == folder.name
    assert (folder / module).is_dir() or (folder / f"{module}.py").is_file()
    assert (folder / about["project"]["readme"]).is_file()
    assert list(folder.glob("tests/test_*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/**/*.py")), ids=lambda path: path.name)
def test_they_live_by_the_public_door(path: Path) -> None:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    assert {name for name in found if name.split(".")[0] in ("prunebench", "prunebench_pruners")} <= DOOR


@pytest.mark.slow
def test_their_own_tests() -> None:
    """All but the kit, as their users run them, without a peer's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "-k", "not conformance"]
    command += ["--import-mode=importlib", "-o", f"pythonpath={' '.join(map(str, FOLDERS))}", "--rootdir", str(EXAMPLES)]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PRUNEBENCH")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(str(folder / "tests") for folder in FOLDERS)], capture_output=True, text=True, env=alone, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize(("check", "family"), cases(["llama"], QUICK))
@pytest.mark.parametrize("pruner", [cls for cls in PRUNERS if not cls.name.startswith("llmc")], ids=lambda cls: cls.name)
def test_conformance(pruner: Callable[[], Pruner], check: str, family: str) -> None:
    CHECKS[check](pruner, family)


def test_the_kit_gives_a_refiner_masks_to_refine() -> None:
    """A pruner that refuses every job without an earlier step is put to the laws after one."""
    CHECKS["target_met"](DSNOT, "llama")

    class Refuses(DSNOT):  # type: ignore[misc]
        def refuses(self, facts: Any) -> str:
            return "never."

    with pytest.raises(Declined, match=r"dsnot refuses llama: never\."):
        CHECKS["target_met"](Refuses, "llama")


@pytest.fixture
def run(bench: Bench, tmp_path: Path, register: Callable[..., None]) -> Callable[..., RunRecord]:
    """One run of a method, with the examples registered."""

    def once(method: str, *classes: type, **changes: Any) -> RunRecord:
        register(*(cls for cls in PRUNERS if cls.name not in {other.name for other in classes}), *classes)
        (request,) = bench.requests(tmp_path, method, **changes)
        return runner.run(request, lambda *call: None, "inline")

    return once


@pytest.mark.parametrize("target", ["0.5", "2:4"])
@pytest.mark.parametrize("first", ["wanda", "magnitude", "magnitude[group=row]", "sparsegpt", "ria"])
def test_masks_are_refined_in_the_group_they_were_made_in(first: str, target: str, run: Callable[..., RunRecord]) -> None:
    record = run(f"{first} + dsnot[threshold=0,skip=]", targets=[target])
    assert (record.status, record.reason) == ("ok", None)
    assert record.steps[1].notes["entries swapped"] > 0
    assert record.audit
    assert record.audit.removed == sum(matrix.shape[0] * matrix.shape[1] for matrix in record.audit.matrices) // 2


def test_a_refiner_that_loses_entries_is_caught(run: Callable[..., RunRecord]) -> None:
    @dataclass
    class Loses(DSNOT):  # type: ignore[misc]
        def prune(self, job: Job) -> None:
            super().prune(job)
            matrix = job.anatomy.matrices[0]
            keep = matrix.weight != 0
            keep[0] = False
            matrix.keep(keep)

    for first, found in (("wanda", "rows of"), ("magnitude", "entries of")):
        record = run(f"{first} + dsnot", Loses)
        assert record.failure
        assert (record.failure.kind, record.failure.step) == ("audit", "dsnot")
        assert found in record.failure.message


REFUSED = {"dsnot": "0.5", "torch-l1": "2:4", "llmc-wanda": "0.5", "llmc-sparsegpt": "2:4"}
REASONS = {
    "dsnot": "refines the masks of the step before it",
    "torch-l1": "knows no patterns such as 2:4",
    "llmc-wanda": "which is no file",
    "llmc-sparsegpt": "which is no file",
}


def test_a_step_that_has_no_place(run: Callable[..., RunRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEBENCH_LLMCOMPRESSOR_PYTHON", str(Path("nowhere") / "python"))
    reasons = {method: run(method, targets=[target]).reason or "" for method, target in REFUSED.items()}
    assert all(REASONS[method] in reason for method, reason in reasons.items()), reasons


def test_the_suite_of_peers_has_the_quickstarts_conditions() -> None:
    """So that its rows stand in the quickstart's tables."""
    peers, quickstart = load_suite(str(EXAMPLES / "peers.toml")), load_suite("quickstart")
    assert peers.limits == quickstart.limits
    assert [peers.grid.targets, peers.grid.seeds] == [quickstart.grid.targets, quickstart.grid.seeds]
    assert [entry.use.replace("../benchmarks/", "") for entry in peers.eval] == [entry.use for entry in quickstart.eval]
    assert [entry.targets for entry in peers.eval] == [entry.targets for entry in quickstart.eval]
    names = {step.split("[")[0] for method in peers.method for step in method.steps}
    assert {cls.name for cls in PRUNERS} <= names

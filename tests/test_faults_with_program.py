"""Faults while the real command runs: no finished run is lost, no half-written file believed, the next call does the rest."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support import Bench, Ran, files_no_larger_than, install_plugin, run_command, tree

from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

pytestmark = pytest.mark.slow

VANDAL = '''
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prunebench.spec import Pruner, hookimpl, option
from prunebench.toolkit import keep_mask, magnitude_scores, walk

LEAKED = []


def fill(place, spare):
    """All of a disk but so many bytes."""
    with (place / "fill").open("wb", buffering=0) as file:
        size = 1 << 16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
        file.truncate(max(0, file.tell() - spare))


def ruin(model):
    weights = model / "model.safetensors"
    if model.name == "deleted":
        shutil.rmtree(model)
    elif model.name == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif model.name == "swapped":
        (model / "other").replace(weights)


@dataclass
class Vandal(Pruner):
    """Prunes by magnitude, and does something to the world where VANDAL says to what."""

    name: ClassVar[str] = "vandal"

    deed: str = option("none", "what")
    spare: int = option(0, "bytes that it leaves on a disk")

    def prune(self, job):
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, "row"))
        place = Path(os.environ.get("VANDAL", ""))
        if "VANDAL" not in os.environ:
            return
        if self.deed == "fill":
            fill(place, self.spare)
        elif self.deed == "seal":
            for folder in [path for path in place.rglob("*") if path.is_dir()] + [place]:
                folder.chmod(0o555)
        elif self.deed == "chatter":
            job.note("said", "x" * (3 << 20))
        elif self.deed == "leak":
            LEAKED.append(bytearray(b"x") * (400 << 20))
        elif self.deed == "ruin":
            ruin(Path(job.model.name_or_path))


@hookimpl
def prunebench_pruners():
    return [Vandal]
'''


@pytest.fixture
def plugin(tmp_path: Path, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installed for commands, and registered in this process, where it does no harm."""
    monkeypatch.delenv("VANDAL", raising=False)
    found: dict[str, Any] = {"__name__": "plugin_of_vandal"}
    exec(compile(VANDAL, "plugin_of_vandal", "exec", dont_inherit=True), found)
    register(found["Vandal"])
    return install_plugin(tmp_path / "site", VANDAL, "vandal")


class Sweep:
    """A suite of small runs, done by the real command under a fault and completed in this process."""

    def __init__(self, folder: Path, text: str, results: Path, command: Callable[..., Ran]) -> None:
        self.suite, self.results, self._command = folder / "small.toml", results, command
        self.suite.write_text(text)
        self._call = ("run", self.suite, "--results", results, "--machine", "here")

    def run(self, plugin: Path, vandalised: Path, under: Sequence[str] = ()) -> Ran:
        """The real command, to its end, which is no traceback."""
        ran = run_command(*self._call, path=plugin, under=under, VANDAL=str(vandalised))
        assert "Traceback" not in ran.out + ran.err, ran
        return ran

    def again(self) -> Ran:
        """The same call in this process."""
        return self._command(*self._call, "--executor", "inline")

    def records(self) -> list[RunRecord]:
        """Every record; each file of one is whole, and nothing unfinished lies about."""
        assert [path for path in tree(self.results) if path.endswith(".tmp")] == []
        return [stored.record for stored in ResultStore(self.results, pytest.fail).all()]

    def endings(self) -> dict[str, str]:
        """How the latest run of each method ended."""
        latest = ResultStore(self.results, pytest.fail).latest()
        return {stored.record.spec.method: stored.record.status for stored in latest}

    def completed(self) -> None:
        """The next call does what is left, and only that: no record is touched, none is done twice."""
        before = self.files()
        ran = self.again()
        assert (ran.code, ran.err) == (0, ""), ran
        after = self.files()
        assert {name: after.get(name) for name in before} == before
        ok = [record.id for record in self.records() if record.status == "ok"]
        assert len(ok) == len(set(ok))
        assert set(self.endings().values()) == {"ok"}

    def files(self) -> dict[str, bytes | None]:
        """Files of records."""
        found = tree(self.results)
        return {name: content for name, content in found.items() if name.endswith(".json") and not name.startswith(".journal")}


def complaint(ran: Ran) -> str:
    """The one sentence of a sweep that could not write, or of a request that cannot be done."""
    assert re.fullmatch(r"error: [^\n]+\.\n", ran.err), ran
    return ran.err


# The disk is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_while_runs_are_going_on(
    bench: Bench, plugin: Path, small_disk: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    methods = ("dense", "vandal[deed=fill]", "magnitude")
    sweep = Sweep(tmp_path, bench.suite_text(*methods), small_disk / "results", command)
    ran = sweep.run(plugin, small_disk)
    assert (ran.code, complaint(ran).endswith("No space left on device.\n")) == (1, True), ran
    assert sweep.endings() == {"dense": "ok"}, "what had been finished is there"
    assert sweep.records()
    ran = sweep.again()
    assert (ran.code, complaint(ran).endswith("No space left on device.\n")) == (2, True), "found before any work"
    (small_disk / "fill").unlink()
    sweep.completed()


@pytest.mark.soak
def test_a_disk_that_is_full_but_for_some_bytes(
    bench: Bench, plugin: Path, small_disk: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """Whatever can still be written, a page, half a record or a whole one."""
    draw = random.Random(0)
    for number in range(20):
        methods = ("dense", f"vandal[deed=fill,spare={draw.randrange(96 << 10)}]", "magnitude", "random")
        sweep = Sweep(tmp_path, bench.suite_text(*methods), small_disk / f"results{number}", command)
        ran = sweep.run(plugin, small_disk)
        if ran.code:
            assert (ran.code, complaint(ran).endswith("No space left on device.\n")) == (1, True), ran
        assert sweep.records()
        assert set(sweep.endings().values()) == {"ok"}
        (small_disk / "fill").unlink()
        sweep.completed()
        shutil.rmtree(sweep.results)


def test_a_record_beyond_the_largest_file_allowed(
    bench: Bench, plugin: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    methods = ("dense", "vandal[deed=chatter]", "magnitude")
    sweep = Sweep(tmp_path, bench.suite_text(*methods), tmp_path / "results", command)
    with files_no_larger_than(100 << 10):
        ran = sweep.again()
    assert (ran.code, complaint(ran).endswith("File too large.\n")) == (2, True), "found before any work"
    assert sweep.files() == {}
    ran = sweep.run(plugin, tmp_path, under=["bash", "-c", 'ulimit -f 2048; exec "$@"', "bash"])  # KiB
    assert (ran.code, complaint(ran).endswith("File too large.\n")) == (1, True), ran
    assert sweep.endings() == {"dense": "ok"}
    sweep.completed()


# The results are read-only


@pytest.fixture
def bound() -> list[str]:
    """A command under which permissions hold for root too."""
    if os.geteuid():
        return []
    found = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*found, "true"], capture_output=True, check=False).returncode:
        pytest.skip("root can write everywhere, and setpriv cannot change that here")
    return found


def test_results_that_become_read_only_while_runs_are_going_on(
    bench: Bench, plugin: Path, bound: list[str], tmp_path: Path, command: Callable[..., Ran]
) -> None:
    methods = ("dense", "vandal[deed=seal]", "magnitude")
    sweep = Sweep(tmp_path, bench.suite_text(*methods), tmp_path / "results", command)
    ran = sweep.run(plugin, sweep.results, bound)
    folders = [sweep.results, *(path for path in sweep.results.rglob("*") if path.is_dir())]
    assert (ran.code, complaint(ran).endswith("Permission denied.\n")) == (1, True), ran
    assert sweep.endings() == {"dense": "ok"}
    assert sweep.records()
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o555] * len(folders)
    ran = sweep.run(plugin, sweep.results, bound)
    assert (ran.code, complaint(ran).endswith("cannot be written: Permission denied.\n")) == (2, True), "before any work"
    for folder in folders:
        folder.chmod(0o755)
    sweep.completed()


# Models go, or become others


def variant(model: Path, folder: Path, factor: float) -> Path:
    """The model with other weights; a third set of them lies beside as `other`."""
    shutil.copytree(model, folder)
    weights = load_file(model / "model.safetensors")
    for name, scale in (("model.safetensors", factor), ("other", -factor)):
        save_file({key: scale * value for key, value in weights.items()}, folder / name, {"format": "pt"})
    return folder


def test_models_that_go_or_become_others_between_their_runs(
    bench: Bench, plugin: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """The runs of the next model go on, and no record claims a model that it did not measure."""
    names = ("deleted", "cut", "swapped", "staying")
    first, *others = (variant(bench.model, tmp_path / name, 1 + index / 8) for index, name in enumerate(names))
    more = "\n".join(f"[[model]]\npath = {json.dumps(str(other))}" for other in others)
    methods = ("dense", "vandal[deed=ruin]", "magnitude")
    shutil.copytree(tmp_path / "cut", tmp_path / "kept" / "cut")
    shutil.copytree(tmp_path / "deleted", tmp_path / "kept" / "deleted")
    sweep = Sweep(tmp_path, bench.suite_text(*methods, model=first, more=more), tmp_path / "results", command)
    ran = sweep.run(plugin, tmp_path)
    assert (ran.code, ran.err) == (1, "")
    found = sweep.records()
    ended = {name: [r.status for r in sorted(found, key=order) if r.spec.model.name == name] for name in names}
    assert ended == {name: ["ok"] * 3 if name == "staying" else ["ok", "failed", "failed"] for name in names}
    reasons = {record.spec.model.name: record.reason or "" for record in found if record.spec.method == "magnitude"}
    assert reasons["deleted"] == "the folder of deleted holds no .safetensors file."
    assert reasons["cut"].startswith("cut is not the model any more that this run was planned for: ")
    assert reasons["swapped"].startswith("swapped is not the model any more that this run was planned for: ")
    assert len({record.spec.model.weights for record in found}) == len(names)
    for name in ("cut", "deleted"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(tmp_path / "kept" / name, tmp_path / name)
    before = sweep.files()
    ran = sweep.again()
    assert (ran.code, ran.err) == (0, ""), ran
    assert {name: content for name, content in sweep.files().items() if name in before} == before
    good = [(r.spec.model.name, r.spec.method) for r in sweep.records() if r.status == "ok"]
    assert len(good) == len(names) * len(methods) + 1, "the swapped one is another: its dense run was done again"
    assert good.count(("swapped", "dense")) == 2


def order(record: RunRecord) -> int:
    return ["dense", "vandal[deed=ruin]", "magnitude"].index(record.spec.method)


# A plugin leaks


def test_what_one_run_leaks_the_next_does_not_have(
    bench: Bench, plugin: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    methods = ("magnitude", "vandal[deed=leak]", "random")
    sweep = Sweep(tmp_path, bench.suite_text(*methods), tmp_path / "results", command)
    ran = sweep.run(plugin, tmp_path)
    assert (ran.code, ran.err) == (0, "")
    peaks = {record.spec.method: record.steps[0].peak_host_bytes for record in sweep.records() if record.steps}
    leaked, clean = peaks["vandal[deed=leak]"], peaks["magnitude"]
    assert leaked > clean + (300 << 20)
    assert peaks["random"] < clean + (100 << 20)

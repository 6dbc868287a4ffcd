"""The script for a GPU session: its stages, what it makes of suites, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support import SPEED, speed_script

from prunebench.bench.plan import Planner
from prunebench.bench.suite import load_suite
from prunebench.plugins import load_registry

ROOT = Path(__file__).parents[1]
SCRIPT = SPEED / "gpu.sh"
SUITES = ("speed-7b", "speed-30b", "speed-70b", "speed-served")


session: Any = speed_script("session")


def script(*args: str, state: Path, **environment: str) -> subprocess.Popen[str]:
    """Start the script in a process group of its own."""
    own = {**os.environ, "STATE": str(state), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    own.pop("OUT", None)
    return subprocess.Popen(
        ["bash", str(SCRIPT), *args],
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate()
    return process.returncode, said


def records_in(results: Path) -> list[Path]:
    """The files of records: no pages of what is at work, nor the machine's own."""
    return [path for path in results.glob("*/*/*.json") if not path.parts[-3].startswith(".")]


def test_the_readme_names_every_stage_in_order(tmp_path: Path) -> None:
    code, said = ended(script("--list", state=tmp_path))
    table = re.findall(r"(?m)^\| ([\w-]+) \|", (SPEED / "README.md").read_text())
    assert (code, said.split()) == (0, table[1:])
    assert all(f"stage_{name}()" in SCRIPT.read_text() for name in said.split())


def test_what_it_does_not_know_it_says(tmp_path: Path) -> None:
    for asked in (["--stage", "coffee"], ["--brew"]):
        code, said = ended(script(*asked, state=tmp_path))
        assert code == 2
        assert "--list" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["gpu", "wheels"])
def test_the_shell_reads_it(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(SPEED / f"{name}.sh")], check=False).returncode == 0


@pytest.mark.parametrize("name", SUITES)
def test_suites_are_made_small_and_are_the_same_otherwise(name: str, tmp_path: Path) -> None:
    session.small(ROOT / "benchmarks" / f"{name}.toml", tmp_path / "small.toml", "tiny-llama", "float32")
    suite, whole = load_suite(str(tmp_path / "small.toml")), load_suite(name)
    requests = Planner(suite, load_registry(), "here", "", "cpu").requests()
    assert {request.spec.model.source for request in requests} == {"shape:tiny-llama"}
    assert len(suite.method) == len(whole.method)
    assert suite.grid == whole.grid
    assert suite.calibration is None or (suite.calibration.samples, suite.calibration.length) == (4, 32)
    session.limited(tmp_path / "small.toml", tmp_path / "limited.toml", "8")
    assert load_suite(str(tmp_path / "limited.toml")).limits.device_memory == 8


def test_the_clone_becomes_a_distribution(tmp_path: Path) -> None:
    """As where nothing can be built: its entry points are those of the installed one."""
    session.register(tmp_path)
    [found] = metadata.distributions(path=[str(tmp_path)])
    installed = metadata.distribution("prunebench")
    named = lambda about: {(p.group, p.name, p.value) for p in about.entry_points if p.group == "prunebench"}  # noqa: E731
    assert (found.metadata["Name"], found.version) == ("prunebench", installed.version)
    assert named(found) == named(installed) != set()


def test_wheels_are_of_versions_that_are_pinned() -> None:
    text = (SPEED / "wheels.sh").read_text()
    [wheels, sources] = re.findall(r"(?ms)^(?:WHEELS|SOURCES)='([^']*)'", text)
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {name.lower() for name in (wheels + " " + sources).split()} <= pinned


def test_the_method_farthest_above_its_floor_is_profiled(tmp_path: Path) -> None:
    def record(name: str, seconds: float, floor: float, status: str = "ok") -> None:
        step = {"text": name, "phases": {"update": seconds}, "floors": {"update": floor} if floor else {}}
        step |= {"peak_device_bytes": None, "peak_host_bytes": 1 << 30}
        text = {
            "spec": {"model": {"name": "7b"}, "steps": [{"text": name}], "target": "0.5"},
            "steps": [step],
            "status": status,
            "reason": "it broke",
        }
        (tmp_path / "machine" / "model" / f"{name}.json").write_text(json.dumps(text))

    (tmp_path / "machine" / "model").mkdir(parents=True)
    assert session.slowest(tmp_path) is None
    assert session.failed(tmp_path) == 1
    record("long", 100.0, 90.0)
    record("slow", 10.0, 1.0)
    record("unknown", 50.0, 0.0)
    assert session.failed(tmp_path) == 1
    record("broken", 500.0, 1.0, "failed")
    assert session.slowest(tmp_path) == "slow"
    assert session.failed(tmp_path) == 0
    assert session.failed(tmp_path, since=time.time() + 60) == 1  # what failed before explains nothing now
    for name in ("long", "slow", "unknown"):
        os.utime(tmp_path / "machine" / "model" / f"{name}.json", (0, 0))
    assert session.failed(tmp_path, since=1.0) == 1  # where nothing went well


@pytest.mark.soak
def test_every_stage_runs_small_and_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed while a sweep is at work; started again it leaves out what is done, and packs stamps and records."""
    asked = ("--shape", "tiny-llama", "--device", "cpu", "--minutes", "60")
    state = tmp_path / "state"
    first = script(*asked, state=state)
    results, deadline = state / "results", time.monotonic() + 1200
    while len(records_in(results)) < 3:
        assert first.poll() is None, ended(first)
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = {path: path.stat().st_mtime_ns for path in records_in(results)}
    assert (state / "stamps" / "environment").exists()
    code, said = ended(script(*asked, state=state))
    assert code == 0, said
    stamps = {path.name: path.read_text() for path in (state / "stamps").iterdir()}
    assert all(text.startswith("done") for text in stamps.values()), said
    assert set(stamps) == set(ended(script("--list", state=state))[1].split())
    assert "environment: done" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    packed = subprocess.run(["tar", "tzf", str(state / "out" / "state.tar.gz")], capture_output=True, text=True, check=True)
    assert {f"stamps/{name}" for name in stamps} <= set(packed.stdout.split())
    shutil.rmtree(state / "out")
    code, again = ended(script(*asked, state=state))
    assert (state / "out" / "state.tar.gz").exists()
    assert (code, again.count("(before)")) == (0, len(stamps))

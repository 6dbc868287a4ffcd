"""Settings for all tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# No test may reach the network, nor leave anything in the user's cache; set before anything imports these libraries.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="prunebench-datasets-")

import pytest
import torch

# Without a GPU Triton's kernels are interpreted, which it decides when it is imported, by transformers; with one, compiled.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

from support import Bench, Ran, make_bench, write_mirror
from transformers.utils import logging

from prunebench.bench import machine_rates
from prunebench.plugins import Registry, load_registry
from prunebench.results.machines import MachineRates
from prunebench.spec import Pruner

MIRROR = Path(os.environ.get("PRUNEBENCH_MIRROR") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """One thread, so that two workers do not fight for two cores; no advice about tiny vocabularies."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that the user's cache holds is believed, and nothing is left there."""
    os.environ["PRUNEBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    _know_the_machine(tmp_path_factory.mktemp("machine"))
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


def _know_the_machine(folder: Path) -> None:
    """Leave rates in the cache, so that no test's first run waits for a machine to be measured: rates that nothing exceeds."""

    def known(device: torch.device, name: str, driver: str | None, version: str) -> MachineRates:
        products = dict.fromkeys(machine_rates.DTYPES_MEASURED, 1e15)
        threads = int(device.type == "cpu")
        return MachineRates(
            device=name, driver=driver, torch=version, threads=threads, products=products, copied=1e15, measured="2026-01-01"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_rates, "measured_rates", known)
        machine_rates.machine_rates(folder, "tests", "cpu")


@pytest.fixture(autouse=True)
def _no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror only where a test asks for it."""
    monkeypatch.delenv("PRUNEBENCH_MIRROR", raising=False)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "own cache"))
    return tmp_path / "own cache"


@pytest.fixture
def fake_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Sequence[Any]], Path]:
    """Puts data sets into a mirror of the test's own."""
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))
    return lambda name, rows: write_mirror(tmp_path / "mirror", name, rows)


@pytest.fixture
def mirror(_no_mirror: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of real models and texts, set as PRUNEBENCH_MIRROR."""
    if not (MIRROR / "datasets").is_dir():
        pytest.skip(f"{MIRROR} is not there, and PRUNEBENCH_MIRROR names no folder of models and texts")
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(MIRROR))
    return MIRROR


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A tiny model and its texts."""
    return make_bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a stranger's pruners and evaluations for one test, with the checks that every plugin meets."""

    def add(*classes: type) -> None:
        found, known = Registry(), load_registry()
        for cls in classes:
            found.add("pruner" if issubclass(cls, Pruner) else "evaluation", cls, "their-plugin", "1.2.3")
        for name, pruner in found.pruners.items():
            monkeypatch.setitem(known.pruners, name, pruner)
        for name, evaluation in found.evals.items():
            monkeypatch.setitem(known.evals, name, evaluation)

    return add


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs `prunebench …` in this process."""
    from prunebench.cli import main

    monkeypatch.delenv("PRUNEBENCH_MIRROR", raising=False)

    def call(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["prunebench", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Ran(int(stop.value.code or 0), *capsys.readouterr())

    return call

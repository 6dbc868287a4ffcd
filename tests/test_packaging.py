"""The wheel and the source distribution: what is in them, and that the wheel works where there is no clone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_string
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import prunebench

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGED = {
    "prunebench": "harness/prunebench",
    "prunebench_pruners": "pruners/prunebench_pruners",
    "prunebench/benchmarks": "benchmarks",
}
INFO = f"prunebench-{prunebench.__version__}.dist-info"
MOST_BYTES = 20 << 20
"""The quickstart's model is 14 MiB of it; anything else that large came in by mistake."""


@dataclass(frozen=True)
class Built:
    """What `python -m build` makes: a source distribution, and a wheel from it."""

    sdist: Path
    wheel: Path

    @property
    def members(self) -> set[str]:
        """Files of the wheel."""
        with zipfile.ZipFile(self.wheel) as file:
            return set(file.namelist())


def build(folder: Path, *options: str) -> Path:
    """Build without network; the output folder."""
    call = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *options, ROOT]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = build(tmp_path_factory.mktemp("dist"))
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment with the wheel; the running environment lends it the dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=300)
    python = folder / "bin" / "python"
    options = ["--quiet", "--disable-pip-version-check", "--root-user-action", "ignore", "--no-index", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, built.wheel], check=True, timeout=300)
    # A path in a .pth file is searched last, and .pth files there, such as that of the clone's editable install, are not read.
    [site] = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def sources() -> Iterator[str]:
    """Every file of the packages and of the benchmarks, by its name in the wheel."""
    for name, folder in PACKAGED.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{name}/{path.relative_to(ROOT / folder).as_posix()}"


def test_the_wheel_holds_the_packages_and_the_benchmarks_and_nothing_else(built: Built) -> None:
    assert {name for name in built.members if not name.startswith(INFO)} == set(sources())
    for name in (
        "prunebench/py.typed",
        "prunebench_pruners/py.typed",
        "prunebench/benchmarks/quickstart.toml",
        "prunebench/benchmarks/quickstart/wiki7m/model.safetensors",
        "prunebench/benchmarks/quickstart/tasks/pairs.jsonl",
        f"{INFO}/licenses/LICENSE",
        f"{INFO}/entry_points.txt",
    ):
        assert name in built.members
    assert built.wheel.stat().st_size < MOST_BYTES


def test_the_source_distribution_builds_the_same_wheel(built: Built, tmp_path: Path) -> None:
    """`built` has made its wheel from it."""
    [direct] = build(tmp_path, "--wheel").glob("*.whl")
    with zipfile.ZipFile(direct) as one, zipfile.ZipFile(built.wheel) as other:
        assert {item.filename: item.CRC for item in one.infolist()} == {item.filename: item.CRC for item in other.infolist()}


def test_the_source_distribution_holds_what_a_developer_needs(built: Built) -> None:
    with tarfile.open(built.sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = {name.partition("/")[0] for name in names}
    assert {"harness", "pruners", "benchmarks", "tests", "docs", "examples"} <= folders
    assert {
        "pyproject.toml",
        "CONTRIBUTING.md",
        "hatch_build.py",
        "mkdocs.yml",
        "Makefile",
        "constraints.txt",
        "README.md",
        "LICENSE",
    } <= names
    assert "tests/test_packaging.py" in names
    assert folders.isdisjoint({"results", "site", "dist", ".venv", ".git"}), "records have a place of their own"
    assert not [name for name in names if name.endswith(".pyc")]
    assert built.sdist.stat().st_size < MOST_BYTES


def test_an_index_takes_both(built: Built) -> None:
    call = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", built.sdist, built.wheel]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_the_description_on_an_index_has_no_dead_links(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as file:
        fields = message_from_string(file.read(f"{INFO}/METADATA").decode())
    assert fields["Description-Content-Type"] == "text/markdown"
    text = fields.get_payload()
    assert isinstance(text, str)
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert [target for target in targets if not target.startswith("https://")] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "leaderboard.md" in text
    assert "![" not in text
    assert len(text) > 0.9 * len(readme), "it is the README otherwise"


def test_what_is_pinned_runs_on_the_oldest_python_that_is_promised() -> None:
    """pymdown-extensions 13 wants 3.11.5, and Debian's Python is 3.11.2."""
    promised = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    oldest = promised.removeprefix(">=") + ".0"
    names = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    asked = {name: metadata.metadata(name)["Requires-Python"] for name in names if is_installed(name)}
    assert len(asked) > 80
    assert {name: text for name, text in asked.items() if text and oldest not in SpecifierSet(text)} == {}


def is_installed(name: str) -> bool:
    """Whether a distribution is installed here: those of the extra `docs` need not be."""
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def call(installed: Path, folder: Path, *args: str) -> str:
    """A command of the new environment, outside the clone."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PRUNEBENCH", "VIRTUAL"))
    }
    cache = {"PRUNEBENCH_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [installed / args[0], *args[1:]],
        cwd=folder,
        env=environment | cache,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_wheel_is_what_a_new_environment_imports(installed: Path, tmp_path: Path) -> None:
    code = "import prunebench, prunebench_pruners; print(prunebench.__file__, prunebench_pruners.__file__)"
    for place in call(installed, tmp_path, "python", "-c", code).split():
        assert Path(place).is_relative_to(installed.parent)
        assert not Path(place).is_relative_to(ROOT)


def test_the_wheel_lists_methods_evaluations_and_suites(installed: Path, tmp_path: Path) -> None:
    listing = json.loads(call(installed, tmp_path, "prunebench", "list", "--json"))
    assert listing["broken"] == []
    assert {"dense", "magnitude", "wanda", "sparsegpt"} <= listing["pruners"].keys()
    assert {"perplexity", "zero_shot", "divergence", "generation"} <= listing["evals"].keys()
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.toml")} == set(listing["suites"])


def test_the_wheel_writes_a_new_package(installed: Path, tmp_path: Path) -> None:
    """Its templates are there."""
    call(installed, tmp_path, "prunebench", "new", "their-best")
    assert "their-best" in (tmp_path / "their-best" / "pyproject.toml").read_text()


def test_the_wheel_runs_the_quickstart(installed: Path, tmp_path: Path) -> None:
    out = call(installed, tmp_path, "prunebench", "run", "quickstart", "--only", "magnitude 0.5", "--machine", "elsewhere")
    assert "1 ok, 0 refused, 0 failed; records in results." in out
    records = [json.loads(path.read_text()) for path in (tmp_path / "results" / "elsewhere" / "wiki7m").glob("*.json")]
    assert [record["spec"]["target"] for record in records] == ["0.5"]
    assert {record["provenance"]["commit"] for record in records} == {None}, "it knows of no clone"
    board = call(installed, tmp_path, "prunebench", "report", "--out", "board.md", "--html", "board.html")
    assert "Written to board.md." in board
    assert "<table>" in (tmp_path / "board.html").read_text(), "the page's templates are there"
    assert "magnitude" in (tmp_path / "board.md").read_text()

"""Every code block of the documentation and of the README is run, the help of every command fits a terminal, the site builds.

A page is a story: its blocks are run in order, in one folder with a tiny model, its texts and a small mirror. What a page says
of `sh`, `python`, `toml` and `text` blocks is done here; a block of another language fails, and so does one that is marked
`<!-- not run: REASON -->` without a reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
from support import Bench, Ran, write_mirror

from prunebench import spec, testing
from prunebench.bench.suite import Suite, load_suite, shipped_suites
from prunebench.cli import program
from prunebench.plugins import load_registry
from prunebench.results.dataset import TABLES
from prunebench.results.exports import ExportedBoard
from prunebench.results.sheet import COLUMNS
from prunebench.targets import NM
from prunebench.testing import check_pruner

ROOT = Path(__file__).parents[1]
PRUNEBENCH = (sys.executable, "-m", "prunebench.cli")
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [*sorted(DOCS.rglob("*.md")), README, ROOT / "CONTRIBUTING.md"]
WIDTH = 80
FENCE = re.compile(r"^( *)(`{3,})(\w*) *(.*)$")
NOT_RUN = re.compile(r"<!-- not run:(.*)-->")
TITLE = re.compile(r'title="([^"]+)"')
NAMED = re.compile(r"# ([\w.-]+\.(?:py|toml))( of .*)?")
"""A first line that names the file a block belongs to, as the README has it."""
SMALL = """
[suite]
name = "small"
[[model]]
path = "my-model"
[calibration]
source = "calibration.txt"
samples = 4
length = 16
[[method]]
steps = ["tempered[power=0.7]"]
[[eval]]
use = "perplexity[data=evaluation.txt,window=16]"
[grid]
targets = ["0.5"]
"""
"""A suite for the README's pruner."""
SLOW = {"tutorial.md"}
"""Pages that run a trained model, or the conformance kit in processes of its own."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    title: str | None
    text: str
    excuse: str | None
    """Why it is not run."""
    follows: bool
    """Nothing stands between it and the block before it."""


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines, number, last = text.splitlines(), 0, -1
    while number < len(lines):
        opened = FENCE.match(lines[number])
        if opened is None:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == opened[2])
        before = [line for line in lines[last + 1 : number] if line.strip()]
        marked = NOT_RUN.fullmatch(before[-1].strip()) if before else None
        title, body = TITLE.search(opened[4]), lines[number + 1 : end]
        named = NAMED.fullmatch(body[0]) if body and not title else None
        name = title[1] if title else named[1] if named else None
        content = "".join(line.removeprefix(opened[1]) + "\n" for line in body)
        yield Block(number + 1, opened[3], name, content, marked[1].strip() if marked else None, last >= 0 and not before)
        number, last = end + 1, end


@dataclass
class Place:
    """Where a page's blocks are run."""

    folder: Path
    command: Callable[..., Ran]
    monkeypatch: pytest.MonkeyPatch
    printed: str = ""
    """What the last shell block printed."""
    names: dict[str, Any] = field(default_factory=dict)
    """Of the page's Python."""

    def run_all(self, text: str) -> None:
        """A whole page.

        Raises:
            AssertionError: a block does not do what it says; names its line.
        """
        for block in blocks_of(text):
            try:
                self.run(block)
            except Exception as error:
                raise AssertionError(f"line {block.line}: {type(error).__name__}: {error}") from error

    def run(self, block: Block) -> None:
        """Do what a block says."""
        if block.excuse is not None:
            assert block.excuse, "a block that is not run needs a reason"
            if block.language == "sh":
                for words in commands(block.text):
                    parse(words)
        elif block.title:
            (self.folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
            self.check_file(block)
        else:
            {"sh": self.shell, "python": self.python, "toml": self.toml, "text": self.output}[block.language](block)

    def check_file(self, block: Block) -> None:
        """What a file must be to be what its name says."""
        if block.language == "toml":
            data = tomllib.loads(block.text)
            if "suite" in data:
                load_suite(str(self.folder / str(block.title)))
            elif "entry-points" in data.get("project", {}):
                install(self.folder, self.folder / ".site", data["project"])
            else:
                assert {"project", "build-system"} <= data.keys()
        elif block.language == "python":
            compile(block.text, str(block.title), "exec")
        else:
            raise AssertionError(f"no file of {block.language} is known")

    def python(self, block: Block) -> None:
        """Run it with the names of the blocks before it; of a test that the conformance kit makes, run one family."""
        self.monkeypatch.syspath_prepend(str(self.folder))
        exec(compile(block.text, f"line {block.line}", "exec"), self.names)  # what the page tells its readers to run
        for name, found in list(self.names.items()):
            if name.startswith("test_"):
                run_parameters(found)
                del self.names[name]

    def toml(self, block: Block) -> None:
        """A part of a suite; what it lacks is added."""
        rest = {
            "suite": {"name": "part"},
            "model": [{"path": "my-model"}],
            "method": [{"steps": ["dense"]}],
            "eval": [{"use": "perplexity"}],
            "grid": {"targets": ["0.5"]},
        }
        Suite.model_validate({**rest, **tomllib.loads(block.text)})

    def output(self, block: Block) -> None:
        """What the shell block before it printed; `…` stands for anything, and blanks are alike."""
        assert block.follows, "a text block shows what the block before it prints"
        parts = [re.escape(" ".join(part.split())) for part in block.text.split("…")]
        assert re.search(" ?.*? ?".join(parts), " ".join(self.printed.split())), self.printed

    def shell(self, block: Block) -> None:
        """Run every command; those of prunebench in this process."""
        self.printed = ""
        for words in commands(block.text):
            if words[0] == "cd":
                self.folder = (self.folder / words[1]).resolve()
                self.monkeypatch.chdir(self.folder)
            elif words[0] == "export":
                name, _, value = words[1].partition("=")
                self.monkeypatch.setenv(name, value.replace("$PWD", str(self.folder)))
            elif words[:4] == ["pip", "install", "-e", "."]:
                install(self.folder, self.folder.parent / ".site")
                self.see(self.folder.parent / ".site")
            elif words[0] == "pytest":
                [test] = self.folder.glob("test_*.py")
                names: dict[str, Any] = {}
                exec(compile(test.read_text(encoding="utf-8"), str(test), "exec"), names)
                [found] = [names[name] for name in names if name.startswith("test_")]
                run_parameters(found)
            elif words[0] == "prunebench":
                self.prunebench(words[1:])
            else:
                assert words[0] in {"ls", "cp", "python"}, f"nobody said how to run {words[0]}"
                program = [sys.executable] if words[0] == "python" else words[:1]
                done = subprocess.run(
                    [*program, *words[1:]], cwd=self.folder, check=True, capture_output=True, text=True, timeout=60
                )
                self.printed += done.stdout

    def prunebench(self, words: list[str]) -> None:
        """A command in this process. Only what takes minutes is cut: of a shipped suite the plan, of the laws one."""
        more = []
        if words[0] == "run" and words[1] in shipped_suites() and "--dry-run" not in words:
            more = ["--dry-run"]
        elif words[0] in ("run", "rescore"):
            more = ["--executor", "inline"]
        elif words[0] == "check" and "--json" not in words:
            # A process of its own: this one's fork server may have loaded the plugins before this one was there.
            law = ["--family", "llama", "--check", "target_met"]
            done = subprocess.run([*PRUNEBENCH, *words, *law], check=True, capture_output=True, text=True, timeout=120)
            self.printed += done.stdout
            return
        ran = self.command(*words, *more)
        assert (ran.code, ran.err) == (0, ""), ran
        self.printed += ran.out

    def see(self, site: Path) -> None:
        """Find what was installed there, also from the command's own processes."""
        self.monkeypatch.syspath_prepend(str(site))
        self.monkeypatch.setenv("PYTHONPATH", str(site))
        load_registry.cache_clear()


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            assert not {"|", ">", "&&", ";", "&"} & set(words), f"one plain command a line: {line}"
            yield words


def parse(words: list[str]) -> None:
    """Whether the program knows a command's options, without running it."""
    if words[0] == "prunebench":
        name, *rest = words[1:]
        known = app().commands
        assert name in known, f"there is no command {name}"
        known[name].make_context(name, rest)
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(f"\n{target}:" in makefile for target in words[1:]), words
    else:
        assert words[0] in {"pytest", "sbatch", "git"}, words


def install(folder: Path, site: Path, project: dict[str, Any] | None = None) -> None:
    """What `pip install -e .` leaves: the package's metadata, and a path to it."""
    project = project or tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project.get("name", "theirs"), project.get("version", "0")
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    entries = "".join(f"{key} = {value}\n" for key, value in project["entry-points"]["prunebench"].items())
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[prunebench]\n{entries}")
    for module in folder.glob("*.py"):
        with suppress(FileExistsError):
            (site / module.name).symlink_to(module)


def run_parameters(test: Any) -> None:
    """The laws of a test made by the conformance kit, on one family: how long all take is not the documentation's business."""
    [mark] = test.pytestmark
    names, cases = mark.args
    assert names == ("pruner", "check", "family")
    pruners = list(dict.fromkeys(case.values[0] for case in cases))
    laws = {case.values[1] for case in cases}
    assert len(laws) > 7
    for make in pruners:
        results = check_pruner(make, families=["llama"], checks=["target_met", "declared_changes"])
        assert {result.outcome for result in results} <= {"passed", "declined"}, results


@cache
def app() -> Any:
    return typer.main.get_command(program.app)


@pytest.fixture
def place(
    tmp_path: Path, bench: Bench, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> Iterator[Place]:
    """A folder with a model, texts, and a mirror of one data set and one model."""
    folder = tmp_path / "page"
    shutil.copytree(bench.model, folder / "my-model")
    for text in ("calibration", "evaluation", "training"):
        shutil.copy(bench.folder / f"{text}.txt", folder)
    rows = (folder / "calibration.txt").read_text(encoding="utf-8").split("\n\n")
    write_mirror(folder / "mirror", "allenai/c4/en/train", [" ".join(rows)] * 3)
    for split in ("train", "test"):
        write_mirror(folder / "mirror", f"Salesforce/wikitext/wikitext-2-raw-v1/{split}", rows)
    shutil.copytree(bench.model, folder / "mirror" / "models" / "my-model")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    modules = set(sys.modules)
    yield Place(folder, command, monkeypatch)
    for name in set(sys.modules) - modules:
        if not name.startswith(("prunebench", "torch", "transformers")) and str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]
    load_registry.cache_clear()


def page_cases() -> list[Any]:
    pages = [page for page in PAGES if page != README and any(blocks_of(page.read_text(encoding="utf-8")))]
    return [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.name in SLOW else []) for p in pages]


@pytest.mark.parametrize("page", page_cases())
def test_every_block_of_a_page_runs(page: Path, place: Place) -> None:
    place.run_all(page.read_text(encoding="utf-8"))


def test_the_readme_says_what_works(place: Place) -> None:
    """Its unnamed blocks are commands: their options are known, though they take minutes. Its pruner runs on a tiny model."""
    found = {"sh": 0, "python": 0, "toml": 0}
    for block in blocks_of(README.read_text(encoding="utf-8")):
        found[block.language or "sh"] += 1
        if block.language in ("", "sh"):
            for words in commands(block.text):
                parse(words)
                if words[:2] == ["prunebench", "run"]:
                    assert words[2] in shipped_suites()
        else:
            place.run(block)
    assert min(found.values()) >= 1
    place.see(place.folder / ".site")
    assert "tempered" in load_registry().pruners
    (place.folder / "small.toml").write_text(SMALL)
    place.prunebench(["run", "small.toml"])
    assert "tempered[power=0.7] 0.5, seed 0: perplexity" in place.printed


@pytest.mark.parametrize("name", list(app().commands))
def test_the_help_of_a_command_fits_a_terminal(name: str, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    shown = command(name, "--help")
    assert shown.code == 0
    assert max(map(len, shown.out.splitlines())) == WIDTH, "not wider, and it is made for this width"
    words = set(re.sub("[│╭╮╰╯─]", " ", shown.out).split())
    for parameter in app().commands[name].params:
        said = (parameter.help or "").replace("`", "").split()
        assert said, f"{name}: {parameter.name} has no help"
        if parameter.param_type_name == "option":
            assert set(parameter.opts) <= words
        assert [word for word in said if word not in words] == [], f"{name}: the help of {parameter.name} is cut"


@pytest.mark.parametrize("name", list(app().commands))
def test_the_help_of_a_command_has_an_example(name: str) -> None:
    _, found, example = app().commands[name].help.partition("Example: ")
    assert found, f"the docstring of {name} ends with `Example: prunebench {name} …`"
    assert example.split()[:2] == ["prunebench", name]
    [words] = commands(example)
    parse(words)


def test_the_programs_own_help_fits_a_terminal(command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    shown = command("--help").out
    assert max(map(len, shown.splitlines())) == WIDTH
    assert all(re.search(rf"│ {name} ", shown) for name in app().commands)


def test_the_examples_of_the_conformance_kits_page_run(place: Place) -> None:
    """They stand in the docstring that the reference shows."""
    (place.folder / "my_plugin.py").write_text(
        "from prunebench_pruners.magnitude import Magnitude\n\nclass Mine(Magnitude):\n    name = 'mine'\n"
    )
    place.names.update(tiny_model=testing.tiny_model, make_job=testing.make_job, NM=NM)
    blocks = re.findall(r"\n\n((?: {4}.*\n|\n(?= {4}))+)", testing.__doc__ or "")
    assert len(blocks) == 2
    for block in blocks:
        place.run_all(f"```python\n{textwrap.dedent(block)}```\n")
    assert isinstance(place.names["pruner"], place.names["Mine"])


def made_pages() -> dict[str, Callable[[], str]]:
    """The pages that the site makes."""
    found = importlib.util.spec_from_file_location("gen_reference", DOCS / "gen_reference.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    pages: dict[str, Callable[[], str]] = module.PAGES
    return pages


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    present = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} | set(made_pages())
    assert sorted(listed) == sorted(present)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    made = {(DOCS / name).resolve() for name in made_pages()}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target.partition("#")[0]).resolve()
        assert target.startswith(("https://", "#")) or path.exists() or path in made, target


def test_the_commands_page_has_every_option() -> None:
    page = made_pages()["reference/commands.md"]()
    for name, entry in app().commands.items():
        _, _, section = page.partition(f"## prunebench {name}\n")
        section = section.partition("\n## ")[0]
        assert "```sh\nprunebench" in section
        for parameter in entry.params:
            shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name.upper()
            assert f"<code>{shown}" in section, f"{name} {parameter.name}"


def test_the_methods_page_has_every_method_and_no_strangers() -> None:
    page = made_pages()["reference/methods.md"]()
    registry = load_registry()
    ours = [name for name, entry in [*registry.pruners.items(), *registry.evals.items()] if entry.distribution == "prunebench"]
    assert sorted(re.findall(r"^### (\S+)$", page, re.MULTILINE)) == sorted(ours)


def test_the_files_page_has_every_column_and_field() -> None:
    page = made_pages()["reference/files.md"]()
    schema = ExportedBoard.model_json_schema()
    fields = [field for about in (schema, *schema["$defs"].values()) for field in about.get("properties", {})]
    columns = [column.name for table in TABLES.values() for column in table]
    for name in (*COLUMNS, *fields, *columns):
        assert f"| <code>{name}</code> | " in page, name


def test_the_contracts_page_has_every_public_name() -> None:
    page = (DOCS / "reference" / "spec.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: prunebench\.spec\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(spec.__all__)


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed: `make docs` installs it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="((?:https?:)?//[^"]*)"', text)
        assert fetched == [], page.name
    assert "int(size * s)" in (tmp_path / "site" / "reference" / "toolkit.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "```ruby\nputs 1\n```",
        "```\nprunebench list\n```",
        "<!-- not run: -->\n\n```sh\nprunebench list\n```",
        "<!-- not run: takes long -->\n\n```sh\nprunebench run --no-such-option x\n```",
        "```sh\nprunebench prune my-model --step wnda --target 0.5 --out x\n```",
        "```sh\nrm -r /\n```",
        "```python\nassert False\n```",
        '```toml\n[[eval]]\nused = "perplexity"\n```',
        '```toml title="x.toml"\n[suite]\nname = "x"\n```',
        "```text\nnobody printed this\n```",
        "```sh\nls\n```\n\n```text\nno-such-file\n```",
    ],
)
def test_a_wrong_block_is_seen(text: str, place: Place) -> None:
    with pytest.raises(AssertionError, match=r"^line [135]: "):
        place.run_all(text)

"""Who may import whom (design, section 1), and the shape of the files.

Read from the sources, without importing them. Imports inside functions count too, except in the command line, which is
there to import lazily; those under `if TYPE_CHECKING` are told apart.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "prunebench": ROOT / "harness" / "prunebench",
    "prunebench_pruners": ROOT / "pruners" / "prunebench_pruners",
}
FILES = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for package, folder in SOURCES.items()
    for path in sorted(folder.rglob("*.py"))
}
MOST_LINES = 350

PLOTTING = {"matplotlib"}
TABLES = {"numpy", "pandas", "pyarrow", "scipy", "tabulate"} | PLOTTING
TENSORS = {"torch", "transformers", "datasets", "safetensors", "huggingface_hub", "tokenizers", "numpy"}
FILES_AND_FOLDERS = {"filelock", "platformdirs"}


@dataclass(frozen=True)
class Import:
    """One imported module, and where the statement stands."""

    module: str
    line: int
    in_function: bool
    for_types: bool

    @property
    def lazy(self) -> bool:
        """Not executed when the module is imported."""
        return self.in_function or self.for_types


@dataclass(frozen=True)
class Layer:
    """What the modules of a layer may import besides the standard library and their own layer."""

    inside: frozenset[str]
    """Layers of this project."""
    outside: frozenset[str] | None
    """Packages of others; None for any."""
    for_types: frozenset[str] = frozenset()
    """Packages of others that may be imported for type checking."""


CONTRACT = frozenset({"spec", "scoring", "effort", "handles", "hooks", "targets", "errors", "plain"})
LAYERS = {
    "contract": Layer(frozenset(), frozenset({"pluggy"}), frozenset({"torch", "transformers"})),
    "toolkit": Layer(frozenset({"contract", "shipped"}), frozenset(TENSORS | FILES_AND_FOLDERS | {"triton"})),
    "plugins": Layer(frozenset({"contract"}), frozenset({"pluggy", "pydantic"})),
    "results": Layer(frozenset({"contract"}), frozenset(TABLES | FILES_AND_FOLDERS | {"pydantic", "safetensors"})),
    "children": Layer(frozenset(), frozenset()),
    "shipped": Layer(frozenset(), frozenset()),
    "bench": Layer(frozenset({"package", "contract", "toolkit", "plugins", "results", "children", "shipped"}), None),
    "testing": Layer(frozenset({"contract", "toolkit", "plugins", "shipped"}), frozenset(TENSORS | {"pytest"})),
    "scaffold": Layer(frozenset({"contract", "plugins"}), frozenset()),
    "checking": Layer(frozenset({"contract", "plugins", "children", "testing"}), frozenset()),
    "report": Layer(frozenset({"contract", "results"}), frozenset(TABLES | {"jinja2", "plotly"})),
    "show": Layer(frozenset({"contract", "results"}), frozenset({"rich"})),
    "cli": Layer(
        frozenset(
            {"package", "contract", "toolkit", "plugins", "results", "children", "bench"}
            | {"testing", "checking", "scaffold", "report", "show"}
        ),
        None,
    ),
    "package": Layer(frozenset(), frozenset()),
    "pruners": Layer(frozenset({"contract", "toolkit"}), frozenset({"torch", "transformers"})),
}
KERNELS = "prunebench.toolkit.kernels"
LIGHT = {"contract", "package"}
"""Layers that the command line may import before it knows what is asked."""


def layer_of(module: str) -> str:
    """The layer that a module of this project belongs to."""
    package, *rest = module.split(".")
    if package == "prunebench_pruners":
        return "pruners"
    if not rest:
        return "package"
    if rest[0] in CONTRACT:
        return "contract"
    if rest[0].startswith("show_"):
        return "show"
    return "plugins" if rest[0] in {"options", "answers"} else rest[0]


class Imports(ast.NodeVisitor):
    """Collects what a module imports."""

    def __init__(self, module: str, is_package: bool) -> None:
        self.found: list[Import] = []
        self._package = module if is_package else module.rpartition(".")[0]
        self._functions = 0
        self._for_types = 0

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            around = self._package.split(".")
            base = ".".join([*around[: len(around) - node.level + 1], base]).removesuffix(".")
        self._add(base, node.lineno)
        for alias in node.names:
            if f"{base}.{alias.name}" in {*FILES, "rich.markup"}:
                self._add(f"{base}.{alias.name}", node.lineno)

    def visit_Call(self, node: ast.Call) -> None:
        """`import_module("x")` and `__import__("x")` are imports too."""
        called = ast.unparse(node.func).rpartition(".")[2]
        if called in ("import_module", "__import__", "find_spec") and node.args and isinstance(node.args[0], ast.Constant):
            self._add(str(node.args[0].value), node.lineno)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        checking = ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
        self._for_types += checking
        for statement in node.body:
            self.visit(statement)
        self._for_types -= checking
        for statement in node.orelse:
            self.visit(statement)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._functions += 1
        self.generic_visit(node)
        self._functions -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def _add(self, module: str, line: int) -> None:
        self.found.append(Import(module, line, self._functions > 0, self._for_types > 0))


def imports(module: str, source: str, is_package: bool = False) -> list[Import]:
    """All imports of a module, outside the standard library."""
    visitor = Imports(module, is_package)
    visitor.visit(ast.parse(source))
    return [found for found in visitor.found if found.module.split(".")[0] not in sys.stdlib_module_names]


def faults(module: str, found: list[Import]) -> Iterator[str]:
    """What a module imports and may not."""
    own = layer_of(module)
    layer = LAYERS.get(own)
    if layer is None:
        yield f"{module} belongs to no layer: say in this test what it may import"
        return
    for item in found:
        top = item.module.split(".")[0]
        place = f"{module}:{item.line} imports {item.module}"
        if top in SOURCES:
            yield from (f"{place}: {reason}" for reason in fault_inside(module, own, layer, item))
        elif layer.outside is not None and top not in layer.outside and not (item.for_types and top in layer.for_types):
            yield f"{place}: {own} may not use {top}"
        elif item.module == "rich.markup":
            yield f"{place}: what comes from outside is escaped by prunebench.plain, which leaves no way around"
        elif top == "triton" and (module == KERNELS or not module.startswith(f"{KERNELS}.")):
            yield f"{place}: triton is for the modules of {KERNELS}, which are imported when a kernel is asked for"
        elif top == "lm_eval" and not module.startswith("prunebench.bench.evals."):
            yield f"{place}: lm_eval is for bench/evals only"
        elif own == "cli" and not item.lazy and top not in {"typer", "rich", "click"}:
            yield f"{place}: heavy modules are imported in the function that needs them"


def fault_inside(module: str, own: str, layer: Layer, item: Import) -> Iterator[str]:
    other = layer_of(item.module)
    if own == "pruners":
        if other == "pruners" and module != "prunebench_pruners":
            yield "methods never import each other"
        elif other not in {"pruners", *layer.inside}:
            yield f"methods may not use {other}"
    elif other == "pruners":
        yield "prunebench meets its pruners through entry points only"
    elif other != own and other not in layer.inside:
        yield f"{own} may not use {other}"
    elif item.module.startswith(f"{KERNELS}.") and not module.startswith(f"{KERNELS}."):
        yield f"kernels are imported by {KERNELS}, when they are asked for"
    elif own == "cli" and other not in {"cli", *LIGHT} and not item.lazy:
        yield "heavy modules are imported in the function that needs them"


@pytest.mark.parametrize("module", FILES)
def test_imports_follow_the_layers(module: str) -> None:
    path = FILES[module]
    assert list(faults(module, imports(module, path.read_text(), path.name == "__init__.py"))) == []


@pytest.mark.parametrize("module", FILES)
def test_modules_can_be_read_in_one_sitting(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) <= MOST_LINES


def test_no_file_is_a_drawer() -> None:
    assert not [path for path in FILES.values() if path.stem in {"utils", "util", "helpers", "misc", "common"}]


def printing(source: str) -> list[int]:
    """Lines that print to the terminal."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return sorted(call.lineno for call in calls if ast.unparse(call.func) in {"print", "sys.stdout.write", "sys.stderr.write"})


def displays(module: str) -> bool:
    """Whether it is a module's business to show something."""
    return module.startswith("prunebench.cli") or module in {"prunebench.show", "prunebench.bench.display"}


@pytest.mark.parametrize("module", [module for module in FILES if not displays(module)])
def test_the_library_does_not_print(module: str) -> None:
    assert printing(FILES[module].read_text()) == []


def test_every_folder_of_sources_was_read() -> None:
    assert {"prunebench", "prunebench.spec", "prunebench.toolkit.walk", "prunebench_pruners.wanda"} <= set(FILES)
    for folder in SOURCES.values():
        assert all((found / "__init__.py").exists() for found in folder.rglob("*/") if any(found.glob("*.py")))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prunebench.results.store", "import torch"),
        ("prunebench.results.store", "import torch.nn.functional as F"),
        ("prunebench.results.store", "def read():\n    from transformers import AutoModel"),
        ("prunebench.results.store", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("prunebench.results.store", "from prunebench.toolkit import walk"),
        ("prunebench.results.store", "from prunebench import plugins"),
        ("prunebench.results.store", "from ..bench import runner"),
        ("prunebench.results.store", "import importlib\nimportlib.import_module('torch')"),
        ("prunebench.spec", "import torch"),
        ("prunebench.spec", "def f():\n    import torch"),
        ("prunebench.spec", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch"),
        ("prunebench.spec", "import pydantic"),
        ("prunebench.targets", "from prunebench.toolkit.masks import keep_mask"),
        ("prunebench.toolkit.walk", "from prunebench.plugins import load_registry"),
        ("prunebench.toolkit.walk", "import lm_eval"),
        ("prunebench.toolkit.walk", "import pandas"),
        ("prunebench.toolkit.masks", "def f():\n    import triton"),
        ("prunebench.toolkit.kernels", "import triton"),
        ("prunebench.toolkit.masks", "from prunebench.toolkit.kernels import rows"),
        ("prunebench.plugins", "import torch"),
        ("prunebench.options", "from prunebench.toolkit import walk"),
        ("prunebench.bench.runner", "import lm_eval"),
        ("prunebench.bench.runner", "from prunebench.cli import main"),
        ("prunebench.bench.runner", "import prunebench_pruners.wanda"),
        ("prunebench.testing", "from prunebench.bench.evals import perplexity"),
        ("prunebench.testing", "from prunebench.results import records"),
        ("prunebench.cli", "import torch"),
        ("prunebench.cli", "import pandas"),
        ("prunebench.cli", "from prunebench.show import print_listing"),
        ("prunebench.show", "from prunebench.bench import plan"),
        ("prunebench.bench.runner", "from prunebench.show import print_listing"),
        ("prunebench.cli", "from prunebench.bench import runner"),
        ("prunebench.cli", "def f():\n    import prunebench_pruners"),
        ("prunebench", "from prunebench.toolkit import walk"),
        ("prunebench", "import torch"),
        ("prunebench_pruners.wanda", "from prunebench_pruners.magnitude import Magnitude"),
        ("prunebench_pruners.wanda", "from . import magnitude"),
        ("prunebench_pruners.wanda", "from .magnitude import Magnitude"),
        ("prunebench_pruners.wanda", "from prunebench.bench import runner"),
        ("prunebench_pruners.wanda", "from prunebench.results.records import RunRecord"),
        ("prunebench_pruners.wanda", "from prunebench.plugins import load_registry"),
        ("prunebench_pruners.wanda", "import pandas"),
        ("prunebench.show", "from rich.markup import escape"),
        ("prunebench.bench.display", "def f():\n    from rich import markup"),
        ("prunebench.drawer", "import os"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert list(faults(module, imports(module, source))) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("prunebench.results.store", "import json, pydantic\nimport pandas as pd\nfrom prunebench.errors import StoreError"),
        ("prunebench.spec", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("prunebench.spec", "import pluggy\nfrom prunebench.targets import Target"),
        ("prunebench.toolkit.walk", "import torch\nfrom prunebench.spec import Job\nfrom . import masks"),
        ("prunebench.toolkit.kernels.rows", "import triton.language as tl\nfrom prunebench.toolkit.kernels import scoring"),
        ("prunebench.plugins", "import pluggy\nfrom prunebench.options import build"),
        ("prunebench.options", "import pydantic"),
        ("prunebench.bench.evals.zero_shot", "def f():\n    import lm_eval"),
        ("prunebench.bench.runner", "import torch\nfrom prunebench.results.records import RunRecord\nimport psutil"),
        ("prunebench.testing", "import torch\nfrom prunebench.plugins import load_registry"),
        ("prunebench.cli", "import typer\nfrom prunebench.errors import RequestError"),
        ("prunebench.cli", "def f():\n    from prunebench.bench import runner\n    import torch"),
        ("prunebench.cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from prunebench.bench import runner"),
        ("prunebench.show", "from rich.table import Table\nfrom prunebench.results.records import RunRecord"),
        ("prunebench_pruners", "from prunebench_pruners.wanda import Wanda"),
        ("prunebench_pruners.wanda", "import torch\nfrom prunebench.toolkit import walk\nfrom prunebench.spec import Pruner"),
    ],
)
def test_an_allowed_import_is_let_through(module: str, source: str) -> None:
    assert list(faults(module, imports(module, source))) == []


def test_printing_is_seen() -> None:
    assert printing("def f():\n    print(1)\nsys.stderr.write('x')\nself.print(2)") == [2, 3]

"""Plugins as strangers make them: distributions built and installed here, loaded in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import filelock
import pytest

from prunebench.errors import PluginError, UnknownNameError
from prunebench.options import Step, parse_step
from prunebench.plugins import Registry, registry_of
from prunebench.spec import Job, Pruner, hookimpl

HEAD = """
from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Eval, Pruner, hookimpl, option
from prunebench.targets import NM
from prunebench.toolkit import keep_mask, magnitude_scores, walk


class Base(Pruner):
    def prune(self, job):
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="matrix"))
"""


def pruner(name: str) -> str:
    """Source of a plugin with one pruner."""
    return f"""{HEAD}
@dataclass
class Mine(Base):
    name: ClassVar[str] = {name!r}
    strength: float = option(0.5, "how much")


@hookimpl
def prunebench_pruners():
    return [Mine]
"""


GOOD = (
    pruner("stranger")
    + """

@dataclass
class Score(Eval):
    name: ClassVar[str] = "stranger-score"

    def conditions(self, facts):
        return {}

    def measure(self, job):
        raise NotImplementedError


@hookimpl
def prunebench_evals():
    return (Score,)
"""
)

BROKEN = {
    "import-error": "import a_module_that_nobody_has\n",
    "raises": "raise ZeroDivisionError('at import')\n",
    "exits": "import sys\n\nsys.exit('no licence')\n",
    "misspelt": pruner("misspelt").replace("def prunebench_pruners", "def prunebench_pruner"),
    "unmarked": pruner("unmarked").replace("@hookimpl", ""),
    "with-argument": pruner("with-argument").replace("def prunebench_pruners()", "def prunebench_pruners(registry)"),
    "no-list": pruner("no-list").replace("return [Mine]", "return Mine"),
    "no-return": pruner("no-return").replace("return [Mine]", "[Mine]"),
    "no-class": pruner("no-class").replace("return [Mine]", "return ['Mine']"),
    "instance": pruner("instance").replace("return [Mine]", "return [Mine()]"),
    "no-pruner": pruner("no-pruner").replace("return [Mine]", "return [dict]"),
    "hook-raises": pruner("hook-raises").replace("return [Mine]", "return 1 / 0"),
    "abstract": pruner("abstract").replace("class Mine(Base)", "class Mine(Pruner)"),
    "no-dataclass": pruner("no-dataclass").replace("@dataclass\n", ""),
    "no-name": pruner("no-name").replace("    name: ClassVar[str] = 'no-name'\n", ""),
    "bad-name": pruner("bad name"),
    "no-default": pruner("no-default").replace(' = option(0.5, "how much")', ""),
    "unreadable": pruner("unreadable").replace("strength: float", "strength: 'NobodyKnows'"),
    "default-raises": pruner("default-raises").replace(
        "\n\n\n@hookimpl", "\n\n    def __post_init__(self):\n        raise ValueError('never')\n\n\n@hookimpl"
    ),
}

DISTRIBUTIONS = {
    "their-good": {"good": GOOD},
    "their-broken": BROKEN,
    "their-first": {"first": pruner("twin")},
    "their-second": {"second": pruner("twin")},
    "their-third": {"third": pruner("twin")},
    "their-usurper": {"usurper": pruner("wanda")},
}
"""Entry points with their sources, by distribution."""

PROGRAM = """
import json, sys

from prunebench.options import parse_step
from prunebench.plugins import load_registry

registry = load_registry()
asked = {}
for text in json.loads(sys.argv[1]):
    try:
        asked[text] = repr(registry.pruner(parse_step(text)))
    except Exception as error:
        asked[text] = f"{type(error).__name__}: {error}"
table = lambda entries: {name: [entry.distribution, entry.version] for name, entry in entries.items()}
found = {
    "pruners": table(registry.pruners),
    "evals": table(registry.evals),
    "broken": [[broken.plugin, broken.distribution, broken.reason] for broken in registry.broken],
    "asked": asked,
    "same": load_registry() is registry,
}
if "stranger" in registry.pruners:
    from support import make_job, tiny

    job = make_job(tiny())
    registry.pruner(parse_step("stranger")).prune(job)
    found["zeros"] = [int((matrix.weight == 0).sum()) / matrix.weight.numel() for matrix in job.anatomy.matrices]
print(json.dumps(found))
"""

ASKED = ["wanda", "magnitude", "random", "dense", "twin", "stranger[strength=0.25]", "strangr", "magnitude[x=1]"]
BUILT_IN = ("dense", "random", "magnitude")


def install(folder: Path, distributions: Mapping[str, Mapping[str, str]]) -> Path:
    """Build the distributions and install them without network into one folder, which is returned."""
    projects = [folder / "sources" / distribution for distribution in distributions]
    for project, plugins in zip(projects, distributions.values(), strict=True):
        modules = {name: "plugin_" + name.replace("-", "_") for name in plugins}
        for name, module in modules.items():
            (project / module).mkdir(parents=True)
            (project / module / "__init__.py").write_text(plugins[name])
        entries = "\n".join(f'{name} = "{module}"' for name, module in modules.items())
        (project / "pyproject.toml").write_text(
            f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{project.name}"
version = "1.2.3"
[project.entry-points.prunebench]
{entries}
[tool.hatch.build.targets.wheel]
packages = {json.dumps(list(modules.values()))}
"""
        )
    options = "--quiet --disable-pip-version-check --root-user-action ignore"
    offline = "--no-index --no-build-isolation --no-deps --no-compile"
    command = [sys.executable, "-m", "pip", "install", *options.split(), *offline.split()]
    subprocess.run([*command, "--target", folder / "crowd", *projects], check=True, capture_output=True, text=True)
    return folder / "crowd"


def load(installed: Path) -> str:
    """What a process with these distributions on its path finds, as JSON."""
    path = os.pathsep.join([str(installed), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(ASKED)]
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Installed and asked once a test run, whatever the number of its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "plugins"
    with filelock.FileLock(folder.with_suffix(".lock")):
        kept = folder.with_suffix(".json")
        if not kept.exists():
            crowd = install(folder, DISTRIBUTIONS)
            (folder / "alone").mkdir()
            for part in crowd.glob("*_good*"):  # its package and its metadata
                (folder / "alone" / part.name).symlink_to(part)
            kept.write_text(json.dumps({name: json.loads(load(folder / name)) for name in ("alone", "crowd")}))
        return json.loads(kept.read_text())


@pytest.fixture
def alone(answers: dict[str, Any]) -> dict[str, Any]:
    """One good stranger."""
    return answers["alone"]


@pytest.fixture
def crowd(answers: dict[str, Any]) -> dict[str, Any]:
    """All of them at once: none may disturb another."""
    return answers["crowd"]


def strangers(found: dict[str, Any], distribution: str) -> dict[str, str]:
    """Why each plugin of a distribution is broken."""
    return {plugin: reason for plugin, owner, reason in found["broken"] if owner == distribution}


def test_a_good_stranger_is_listed_with_distribution_and_version(alone: dict[str, Any]) -> None:
    assert alone["pruners"]["stranger"] == ["their-good", "1.2.3"]
    assert alone["evals"]["stranger-score"] == ["their-good", "1.2.3"]
    assert {owner for _, owner, _ in alone["broken"]} <= {"prunebench"}
    assert alone["same"]


def test_a_good_stranger_works(alone: dict[str, Any]) -> None:
    assert alone["asked"]["stranger[strength=0.25]"] == "Mine(strength=0.25)"
    assert alone["zeros"] == [0.5] * 21


def test_built_ins_come_through_the_same_door(alone: dict[str, Any]) -> None:
    for name in ("wanda", *BUILT_IN):
        assert alone["pruners"][name][0] == "prunebench"
        assert "Error" not in alone["asked"][name]


def test_a_name_that_nobody_has_gets_the_nearest(alone: dict[str, Any]) -> None:
    assert alone["asked"]["strangr"].startswith(
        "UnknownNameError: there is no pruner 'strangr'; did you mean 'stranger'? Known: "
    )
    assert "magnitude has no option 'x'" in alone["asked"]["magnitude[x=1]"]


def test_broken_strangers_stop_nobody(alone: dict[str, Any], crowd: dict[str, Any]) -> None:
    for name in (*BUILT_IN, "stranger"):
        assert crowd["pruners"][name] == alone["pruners"][name]
    for text in (*BUILT_IN, "stranger[strength=0.25]"):
        assert crowd["asked"][text] == alone["asked"][text]
    assert crowd["evals"] == alone["evals"]
    assert crowd["zeros"] == alone["zeros"]
    assert set(crowd["pruners"]) == set(alone["pruners"]) - {"wanda"}


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "import-error": ["ModuleNotFoundError", "a_module_that_nobody_has"],
        "raises": ["ZeroDivisionError: at import"],
        "exits": ["SystemExit: no licence"],
        "misspelt": ["'misspelt'", "a hook that prunebench does not know", "prunebench_pruner"],
        "unmarked": ["'unmarked'", "implements no hook", "hookimpl"],
        "with-argument": ["'with-argument'", "registry"],
        "no-list": ["prunebench_pruners", "'no-list'", "not a list of classes"],
        "no-return": ["prunebench_pruners", "'no-return'", "NoneType", "not a list of classes"],
        "no-class": ["'Mine' is not a Pruner class"],
        "instance": ["is not a Pruner class"],
        "no-pruner": ["<class 'dict'> is not a Pruner class"],
        "hook-raises": ["ZeroDivisionError"],
        "abstract": ["Mine is abstract", "does not define prune"],
        "no-dataclass": ["Mine is not a dataclass", "@dataclass"],
        "no-name": ["Mine needs a class variable `name`"],
        "bad-name": ["Mine needs a class variable `name`"],
        "no-default": ["'strength'", "has no default"],
        "unreadable": ["NobodyKnows"],
        "default-raises": ["never"],
    }.items(),
)
def test_a_broken_stranger_is_listed_with_its_reason(name: str, parts: list[str], crowd: dict[str, Any]) -> None:
    reason = strangers(crowd, "their-broken")[name]
    for part in parts:
        assert part in reason
    assert name not in crowd["pruners"]


def test_what_is_broken_is_listed_once(crowd: dict[str, Any]) -> None:
    listed = [(plugin, owner) for plugin, owner, _ in crowd["broken"] if owner != "prunebench"]
    disputed = [("twin", "their-third"), ("wanda", "their-usurper")]
    assert sorted(listed) == sorted([*((name, "their-broken") for name in BROKEN), *disputed])


def test_a_name_claimed_twice_names_every_owner(crowd: dict[str, Any]) -> None:
    message = crowd["asked"]["twin"]
    assert message.startswith("PluginError: the pruner name 'twin' is claimed by ")
    for owner in ("their-first 1.2.3", "their-second 1.2.3", "their-third 1.2.3"):
        assert owner in message
    assert "twin" not in crowd["pruners"]
    (reason,) = [reason for plugin, _, reason in crowd["broken"] if plugin == "twin"]
    assert f"PluginError: {reason}" == message


def test_a_built_ins_name_cannot_be_taken_over(crowd: dict[str, Any]) -> None:
    """Which of the two would run is not decided in silence."""
    message = crowd["asked"]["wanda"]
    assert message.startswith("PluginError: the pruner name 'wanda' is claimed by prunebench ")
    assert "their-usurper 1.2.3" in message


@pytest.mark.parametrize("module", ["prunebench", "prunebench.spec", "prunebench.options", "prunebench.plugins"])
def test_importing_the_contract_loads_no_torch_and_says_nothing(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'datasets', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# In this process, without distributions


@dataclass
class One(Pruner):
    """A pruner."""

    name: ClassVar[str] = "one"

    def prune(self, job: Job) -> None:
        """Nothing."""


@dataclass
class Two(One):
    """Another."""

    name: ClassVar[str] = "two"


class Inherited(One):
    """Not decorated itself: its own options would be lost."""

    name: ClassVar[str] = "inherited"
    strength: float = 0.5


@dataclass
class Unannotated(One):
    """Its name is a plain class attribute."""

    name = "unannotated"
    strength: float = 0.5


def plugin(*classes: type) -> Any:
    """A module-like object with one hook."""

    class Module:
        @staticmethod
        @hookimpl
        def prunebench_pruners() -> list[type]:
            return list(classes)

    return Module


def registry(**plugins: Any) -> Registry:
    return registry_of([(name, f"their-{name}", "1", lambda found=found: found) for name, found in plugins.items()])


def test_a_name_needs_no_annotation() -> None:
    found = registry(plain=plugin(Unannotated))
    assert found.broken == []
    assert found.pruner(parse_step("unannotated[strength=1]")) == Unannotated(strength=1.0)


def test_what_stands_before_a_broken_class_stays() -> None:
    found = registry(mixed=plugin(One, Inherited, Two))
    assert "one" in found.pruners
    assert [(broken.plugin, broken.distribution) for broken in found.broken] == [("mixed", "their-mixed")]
    assert "Inherited is not a dataclass" in found.broken[0].reason


def test_a_class_twice_in_one_plugin_is_two_owners() -> None:
    found = registry(double=plugin(One, One))
    with pytest.raises(PluginError, match=r"claimed by their-double 1 .* and their-double 1 "):
        found.pruner(Step("one", {}))


def test_a_dispute_hides_no_other_broken_plugin() -> None:
    """A broken plugin may bear the very name that two others fight about."""
    found = registry(one=plugin(Inherited), first=plugin(One), second=plugin(One), third=plugin(One))
    assert {(broken.plugin, broken.distribution) for broken in found.broken} == {("one", "their-one"), ("one", "their-third")}


def test_pruners_and_evaluations_have_names_of_their_own() -> None:
    found = registry(first=plugin(One))
    assert isinstance(found.pruner(parse_step("one")), One)
    with pytest.raises(UnknownNameError, match=r"there is no evaluation 'one'\. There are none"):
        found.eval(parse_step("one"))


def test_every_build_is_a_new_object() -> None:
    found = registry(first=plugin(One, Two))
    assert found.pruner(parse_step("two")) is not found.pruner(parse_step("two"))

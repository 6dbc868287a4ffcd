"""Plugins that misbehave, installed as strangers install them: none of them breaks the program, or another method's run."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import Bench, Ran, cases, python_path, run_command, tree
from test_plugins import HEAD, install

from prunebench.plugins import load_registry
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

Command = Callable[..., Ran]

HOSTILE = f"""
import os
import signal
import sys
import time
{HEAD}
from prunebench.spec import API_VERSION

api_version = API_VERSION


class Stop(BaseException):
    pass


def misbehave(how):
    if how == "raise":
        raise ZeroDivisionError("on purpose")
    if how == "stop":
        raise Stop("enough")
    if how == "exit":
        sys.exit("no licence")
    if how == "crash":
        os._exit(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        time.sleep(600)
    return {{"none": None, "number": 7, "empty": "", "text": "whatever", "object": object(), "keys": {{1: 2}}}}[how]


@dataclass
class Hostile(Base):
    \"\"\"Does what no pruner should.\"\"\"

    name: ClassVar[str] = "hostile"

    prune_how: str = option("", "in prune")
    needs_how: str = option("", "in needs")
    changes_how: str = option("", "in changes")
    claims_how: str = option("", "in claims")
    audit_group_how: str = option("", "in audit_group")
    refuses_how: str = option("", "in refuses")
    build_how: str = option("", "when it is built")

    def __post_init__(self):
        if self.build_how:
            misbehave(self.build_how)

    def prune(self, job):
        if self.prune_how:
            misbehave(self.prune_how)
        super().prune(job)

    def needs(self):
        return misbehave(self.needs_how) if self.needs_how else super().needs()

    def changes(self):
        return misbehave(self.changes_how) if self.changes_how else super().changes()

    def claims(self):
        return misbehave(self.claims_how) if self.claims_how else super().claims()

    def audit_group(self):
        return misbehave(self.audit_group_how) if self.audit_group_how else "matrix"

    def refuses(self, facts):
        return misbehave(self.refuses_how) if self.refuses_how else None


@dataclass
class Odd(Eval):
    \"\"\"An evaluation like that.\"\"\"

    name: ClassVar[str] = "odd"

    conditions_how: str = option("", "in conditions")
    texts_how: str = option("", "in texts")
    measure_how: str = option("raise", "in measure")

    def conditions(self, facts):
        return misbehave(self.conditions_how) if self.conditions_how else {{}}

    def texts(self, facts):
        return misbehave(self.texts_how) if self.texts_how else []

    def measure(self, job):
        return misbehave(self.measure_how)


@hookimpl
def prunebench_pruners():
    return [Hostile]


@hookimpl
def prunebench_evals():
    return [Odd]
"""


def good(name: str) -> str:
    """A plugin that does its work."""
    return f"""{HEAD}
@dataclass
class Mine(Base):
    name: ClassVar[str] = {name!r}

    def audit_group(self):
        return "matrix"


@hookimpl
def prunebench_pruners():
    return [Mine]
"""


PLUGINS = {
    "hostile": HOSTILE,
    "stops": "class Stop(BaseException):\n    pass\n\n\nraise Stop('at import')\n",
    "mute": "class Mute(Exception):\n    def __str__(self):\n        return 1 / 0\n\n\nraise Mute\n",
    "talks": 'import os, sys\nprint("hello")\nprint("oh", file=sys.stderr)\n' + good("talks"),
    "newer": "api_version = 2\n" + good("newer").replace("def prunebench_pruners", "def prunebench_things"),
    "older": "api_version = 0\n" + good("older"),
    "versioned": 'api_version = "1"\n' + good("versioned"),
    "revised": good("revised").replace("    def audit", '    revision: ClassVar[str] = "two"\n\n    def audit'),
}
"""Entry points of one distribution, with their sources."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the distribution `their-hostile` 1.2.3, built and installed without network."""
    folder = tmp_path_factory.mktemp("hostile")
    return install(folder, {"their-hostile": PLUGINS})


@pytest.fixture(scope="module")
def here(site: Path) -> Iterator[None]:
    """Installed in this process, and in the fork server, which starts anew: it may run already, without the plugin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(site))
        patch.setattr(sys, "path", [str(site), *sys.path])
        load_registry.cache_clear()
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
        load_registry()  # now, as one of them prints
        yield
    load_registry.cache_clear()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def suite(bench: Bench, folder: Path, *methods: str, evals: list[str] | None = None, more: str = "") -> Path:
    """A tiny suite as a file."""
    path = folder / "small.toml"
    path.write_text(bench.suite_text(*methods, evals=evals, more=more))
    return path


# While they are loaded

REASONS = {
    "stops": "Stop: at import",
    "mute": "Mute",
    "newer": "the plugin 'newer' was written for version 2 of the contract, and this prunebench has 1: upgrade prunebench.",
    "older": "the plugin 'older' was written for version 0 of the contract, and this prunebench takes none before 1: upgrade "
    "the plugin.",
    "versioned": "the api_version of the plugin 'versioned' is '1', not a whole number.",
    "revised": "the revision of Mine is 'two', not a whole number.",
}


@pytest.mark.slow
def test_the_listing_names_each_and_stays_whole(site: Path) -> None:
    ran = run_command("list", "--json", path=site)
    assert ran.code == 0
    assert "hello" in ran.err  # what a plugin prints is kept apart from what the command prints
    listing = json.loads(ran.out)
    broken = {item["plugin"]: item["reason"] for item in listing["broken"] if item["distribution"] == "their-hostile"}
    assert broken == REASONS
    assert {"hostile", "talks", "wanda"} <= set(listing["pruners"])
    assert listing["pruners"]["hostile"]["distribution"] == "their-hostile"
    assert "odd" in listing["evals"]


@pytest.mark.parametrize("name", ["newer", "stops"])
def test_asking_for_what_is_broken_says_why(name: str, here: None, bench: Bench, tmp_path: Path, command: Command) -> None:
    ran = command("run", suite(bench, tmp_path, "magnitude", name), "--results", tmp_path / "results")
    assert f"the plugin {name} of their-hostile cannot be used: {REASONS[name]}" in ran.complaint
    assert not (tmp_path / "results").exists()


# While a run is planned

WHO = "the pruner 'hostile' (their-hostile 1.2.3)"
PLANNED = {
    **{
        f"{question} {how}": (f"hostile[{question}_how={how}]", f"{question}() of {WHO} {said}")
        for question in ("needs", "changes", "claims", "audit_group")
        for how, said in {
            "raise": "raised ZeroDivisionError: on purpose.",
            "stop": "raised Stop: enough.",
            "exit": "raised SystemExit: no licence.",
            "none": "answers None, and not ",
            "object": "answers <object object at ",
        }.items()
    },
    "needs number": ("hostile[needs_how=number]", f"needs() of {WHO} answers 7, and not a Needs."),
    "audit_group text": (
        "hostile[audit_group_how=text]",
        f"audit_group() of {WHO} answers 'whatever', and not row, matrix, model, columns:N or earlier.",
    ),
    "build": ("hostile[build_how=raise]", "Hostile, which is hostile, cannot be built: ZeroDivisionError: on purpose."),
}
EVALUATION = "the evaluation 'odd' (their-hostile 1.2.3)"
CONDITIONS = {
    "raise": f"conditions() of {EVALUATION} raised ZeroDivisionError: on purpose.",
    "exit": f"conditions() of {EVALUATION} raised SystemExit: no licence.",
    "none": f"conditions() of {EVALUATION} answers None, and not a mapping that JSON can hold.",
    "keys": f"conditions() of {EVALUATION} answers {{1: 2}}, and not a mapping that JSON can hold.",
}


@pytest.mark.parametrize(("method", "said"), cases(PLANNED))
def test_nonsense_while_a_run_is_planned(
    method: str, said: str, here: None, bench: Bench, tmp_path: Path, command: Command
) -> None:
    for more in ([], ["--dry-run"]):
        ran = command("run", suite(bench, tmp_path, "magnitude", method), "--results", tmp_path / "results", *more)
        assert ran.complaint.startswith(f"error: {said}")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("how", "said"), CONDITIONS.items())
def test_an_evaluation_without_conditions(
    how: str, said: str, here: None, bench: Bench, tmp_path: Path, command: Command
) -> None:
    asked = suite(bench, tmp_path, "magnitude", evals=[bench.perplexity, f"odd[conditions_how={how}]"])
    ran = command("run", asked, "--results", tmp_path / "results")
    assert ran.complaint == f"error: {said}\n"
    assert not (tmp_path / "results").exists()
    ran = command("eval", bench.model, "--eval", f"odd[conditions_how={how}]")
    assert ran.complaint == f"error: {said}\n"


def test_an_evaluation_without_texts(here: None, bench: Bench, tmp_path: Path, command: Command) -> None:
    training = f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 64\n"
    asked = suite(bench, tmp_path, "magnitude + perp[steps=1]", evals=["odd[texts_how=number]"], more=training)
    ran = command("run", asked, "--results", tmp_path / "results")
    assert ran.complaint == f"error: texts() of {EVALUATION} answers 7, and not a list of texts.\n"


# In a run

RUNS = {
    "prune_how=raise": ("error", "ZeroDivisionError", "on purpose"),
    "prune_how=stop": ("error", "Stop", "enough"),
    "prune_how=exit": ("error", "SystemExit", "sys.exit was called, with 'no licence'."),
    "prune_how=crash": ("killed", "ProcessExit", "the process ended with exit code 0 and no record."),
    "prune_how=kill": ("killed", "SIGKILL", "the process was ended by SIGKILL."),
    "prune_how=hang": ("timeout", "TimeoutError", "the run took longer than its limit of 3 seconds."),
    "refuses_how=raise": ("error", "PluginError", f"refuses() of {WHO} raised ZeroDivisionError: on purpose."),
    "refuses_how=exit": ("error", "PluginError", f"refuses() of {WHO} raised SystemExit: no licence."),
    "refuses_how=number": ("error", "PluginError", f"refuses() of {WHO} answers 7, and not a reason in one sentence, or None."),
}


@pytest.fixture(scope="module")
def swept(here: None, bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunRecord]:
    """The records of one sweep by the real command over all of them, by method."""
    folder = tmp_path_factory.mktemp("swept")
    # The limit is for all runs of a command, and a good one may take long on a busy machine: what hangs is run alone.
    quick = [f"hostile[{how}]" for how in RUNS if "hang" not in how]
    ran = run_command("run", suite(bench, folder, *quick, "wanda"), "--results", folder / "results", "--machine", "here")
    assert (ran.code, ran.err.replace("hello\noh\n", "")) == (1, "")
    assert f"2 ok, 0 refused, {len(quick)} failed" in ran.out  # dense is measured too
    limit = ("--only", "hang", "--timeout", "3")
    hanging = suite(bench, folder, "hostile[prune_how=hang]")
    ran = run_command("run", hanging, "--results", folder / "results", "--machine", "here", *limit)
    assert ran.code == 1
    complaints: list[str] = []
    records = [stored.record for stored in ResultStore(folder / "results", complaints.append).all()]
    assert complaints == []
    assert all(content is not None for name, content in tree(folder / "results").items() if name.endswith(".json"))
    return {record.spec.method: record for record in records}


@pytest.mark.slow
def test_other_methods_of_the_suite_run(swept: dict[str, RunRecord]) -> None:
    assert {name for name, record in swept.items() if record.status == "ok"} == {"dense", "wanda"}


@pytest.mark.slow
@pytest.mark.parametrize("how", RUNS)
def test_the_record_says_what_happened(how: str, swept: dict[str, RunRecord]) -> None:
    failure = swept[f"hostile[{how}]"].failure
    assert failure is not None
    assert (failure.kind, failure.type, failure.message) == RUNS[how]


@pytest.mark.parametrize(
    ("how", "said"),
    {
        "raise": "prune raised at 0.5: ZeroDivisionError: on purpose",
        "stop": "it raised Stop: enough, which ends the program.",
        "exit": "it raised SystemExit: no licence, which ends the program.",
        "crash": "the process ended with exit code 0 in the middle of the law.",
        "kill": "the process was ended by SIGKILL.",
        "hang": "it took longer than the limit of 3 seconds.",
    }.items(),
)
def test_check_goes_on(how: str, said: str, here: None, command: Command) -> None:
    limit = ("--timeout", "3") if how == "hang" else ()
    laws = ("--family", "opt", "--check", "silent", "--check", "refuses_first")
    ran = command("check", f"hostile[prune_how={how}]", *laws, *limit, "--json")
    assert ran.code == 1
    found = {result["check"]: (result["outcome"], result["message"]) for result in json.loads(ran.out)["results"]}
    assert found == {"silent": ("failed", said), "refuses_first": ("passed", "")}


def test_an_evaluation_that_gives_no_score(here: None, bench: Bench, tmp_path: Path, command: Command) -> None:
    asked = suite(bench, tmp_path, "magnitude", evals=["odd[measure_how=number]"])
    ran = command("run", asked, "--results", tmp_path / "results", "--executor", "inline")
    assert ran.code == 1
    reasons = {stored.record.reason for stored in ResultStore(tmp_path / "results", print).all()}
    assert reasons == {"the evaluation odd gives int, and not a Score."}


@pytest.mark.parametrize(("how", "said"), {"raise": "ZeroDivisionError: on purpose", "exit": "SystemExit: no licence"}.items())
def test_an_evaluation_that_raises(how: str, said: str, here: None, bench: Bench, command: Command) -> None:
    ran = command("eval", bench.model, "--eval", f"odd[measure_how={how}]")
    assert (ran.code, ran.err) == (1, f"error: the evaluation odd[measure_how={how}] raised {said}.\n")

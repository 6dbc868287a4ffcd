"""Suites: what is read from a good one, and one sentence for each that is not."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support import Bench, cases

from prunebench.bench.commands import narrowed
from prunebench.bench.plan import Planner, RunResources
from prunebench.bench.suite import Suite, load_suite, shipped_suites, suites_folder, with_dense
from prunebench.errors import DataError, ModelError, OptionError, RequestError, UnknownNameError
from prunebench.plugins import load_registry

GOOD = """[suite]
name = "mine"
version = 3

[[model]]
path = "tiny"
dtype = "float32"

[calibration]
source = "calibration.txt"
samples = 4
length = 16

[validation]
source = "validation.txt"

[training]
source = "training.txt"
tokens = 640

[[method]]
steps = ["magnitude"]

[[method]]
steps = ["wanda", "random"]
targets = ["2:4"]

[[eval]]
use = "perplexity[data=evaluation.txt,window=16]"

[grid]
targets = ["0.5", "4:8"]
seeds = [0, 7]

[limits]
threads = 2
batch_size = 3
timeout = 60
"""


def edited(old: str, new: str) -> str:
    """The good suite with one thing changed."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def written(folder: Path, content: str | bytes) -> str:
    path = folder / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def complaint(folder: Path, content: str | bytes) -> str:
    """What is said about a bad suite: one line of at most two sentences that names the file."""
    with pytest.raises(RequestError) as caught:
        load_suite(written(folder, content))
    message = str(caught.value)
    assert message.startswith("the suite mine.toml")
    assert "\n" not in message
    assert len(re.findall(r"[.?!](?=\s|$)", message)) <= 2
    return message


def planned(folder: Path, content: str) -> list[str]:
    """The runs of a suite: method, target and seed."""
    suite = load_suite(written(folder, content))
    requests = Planner(suite, load_registry(), "here", "", "cpu").requests()
    return [f"{request.spec.method} {request.spec.target} {request.spec.seed}" for request in requests]


@pytest.fixture(scope="session")
def suite_bench(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the relative names of the good suite are."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tiny").symlink_to(bench.model)
    for name in ("calibration", "evaluation", "training"):
        shutil.copy(bench.folder / f"{name}.txt", folder)
    shutil.copy(bench.training, folder / "validation.txt")
    return folder


@pytest.fixture
def folder(suite_bench: Path, tmp_path: Path) -> Path:
    for path in suite_bench.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


# Good ones


def test_every_value_is_read(tmp_path: Path) -> None:
    suite = load_suite(written(tmp_path, GOOD))
    assert (suite.suite.name, suite.suite.version) == ("mine", 3)
    assert [(model.path, model.hub, model.dtype, model.name) for model in suite.model] == [("tiny", None, "float32", "tiny")]
    assert suite.calibration is not None
    assert (suite.calibration.source, suite.calibration.samples, suite.calibration.length) == ("calibration.txt", 4, 16)
    assert suite.training is not None
    assert (suite.training.source, suite.training.tokens) == ("training.txt", 640)
    assert suite.validation is not None
    assert suite.validation.source == "validation.txt"
    assert [(method.steps, method.targets) for method in suite.method] == [
        (("magnitude",), None),
        (("wanda", "random"), ("2:4",)),
    ]
    assert [entry.use for entry in suite.eval] == ["perplexity[data=evaluation.txt,window=16]"]
    assert (suite.grid.targets, suite.grid.seeds) == (("0.5", "4:8"), (0, 7))
    assert (suite.limits.threads, suite.limits.batch_size, suite.limits.timeout) == (2, 3, 60)
    assert suite.folder == tmp_path


def test_what_is_left_out_has_the_documented_defaults(tmp_path: Path) -> None:
    short = GOOD.partition("[limits]")[0].replace("version = 3\n", "").replace("seeds = [0, 7]\n", "")
    short = short.replace("samples = 4\nlength = 16\n", "")
    suite = load_suite(written(tmp_path, short))
    assert suite.suite.version == 1
    assert suite.grid.seeds == (0,)
    assert suite.calibration is not None
    assert (suite.calibration.samples, suite.calibration.length) == (128, 2048)
    assert (suite.limits.threads, suite.limits.batch_size, suite.limits.timeout) == (None, None, None)


def test_the_grid_is_models_methods_targets_and_seeds(folder: Path) -> None:
    assert planned(folder, GOOD) == [
        "magnitude 0.5 None",
        "magnitude 4:8 None",
        "wanda + random 2:4 0",
        "wanda + random 2:4 7",
    ]


def test_a_method_may_have_a_calibration_text_of_its_own(folder: Path) -> None:
    """The row it gives is another run, with another recipe; how options were chosen is kept, and is no part of the run."""
    own = 'steps = ["wanda"]\ncalibration = { source = "training.txt", samples = 3, length = 12 }\ntuned = "mine"'
    both = edited('steps = ["magnitude"]', f'steps = ["wanda"]\n\n[[method]]\n{own}')
    suite = load_suite(written(folder, both))
    requests = Planner(suite, load_registry(), "here", "", "cpu").requests()[:8]
    assert len({request.spec.id for request in requests}) == 8
    assert [(r.spec.recipe.samples, r.spec.recipe.length, r.tuned) for r in requests] == [(4, 16, None)] * 4 + [
        (3, 12, "mine")
    ] * 4
    assert {r.spec.recipe.calibration.name for r in requests[4:] if r.spec.recipe.calibration} == {"training.txt"}
    untuned = load_suite(written(folder, both.replace('\ntuned = "mine"', "")))
    again = Planner(untuned, load_registry(), "here", "", "cpu").requests()[:8]
    assert [r.spec.id for r in again] == [r.spec.id for r in requests]


def test_resources_are_the_suites_with_the_methods_own_over_them_and_no_part_of_a_run(folder: Path) -> None:
    own = 'resources = { memory = 1.5, slurm = { partition = "long" } }'
    content = edited('steps = ["wanda", "random"]', f'steps = ["wanda", "random"]\n{own}')
    content += '[resources]\nminutes = 90.5\n[resources.slurm]\npartition = "gpu"\nexclusive = true\n'
    given, plain, cuda = (
        Planner(load_suite(written(folder, text)), load_registry(), "here", "", device).requests()
        for text, device in ((content, "cpu"), (GOOD, "cpu"), (GOOD, "cuda"))
    )
    assert [request.spec.id for request in given] == [request.spec.id for request in plain]
    suites = (("exclusive", True), ("partition", "gpu"))
    assert given[0].resources == RunResources(gpus=0, cpus=2, memory=None, minutes=90.5, slurm=suites)
    methods = (("exclusive", True), ("partition", "long"))
    assert given[-1].resources == RunResources(gpus=0, cpus=2, memory=1.5 * (1 << 30), minutes=90.5, slurm=methods)
    assert plain[0].resources == RunResources(gpus=0, cpus=2)
    assert cuda[0].resources == RunResources(gpus=1, cpus=2)


def test_a_method_may_have_seeds_of_its_own(folder: Path) -> None:
    own = edited('targets = ["2:4"]', 'targets = ["2:4"]\nseeds = [3, 1]')
    assert planned(folder, own)[2:] == ["wanda + random 2:4 3", "wanda + random 2:4 1"]
    assert "at least 1" in complaint(folder, edited('targets = ["2:4"]', 'targets = ["2:4"]\nseeds = []'))


def test_a_model_that_is_read_back_is_measured_under_other_conditions(folder: Path) -> None:
    ids = []
    for content in (GOOD, edited('dtype = "float32"', 'dtype = "float32"\nreload = true')):
        suite = load_suite(written(folder, content))
        request = Planner(suite, load_registry(), "here", "", "cpu").requests()[0]
        ids.append(request.spec.id)
        assert request.reload == request.spec.evals[0].conditions.get("reloaded", False) == suite.model[0].reload
    assert len(set(ids)) == 2


def test_an_evaluation_may_be_for_some_targets_and_always_for_the_dense_model(folder: Path) -> None:
    """A run of another target is the run it would be without that evaluation."""
    second = '[[eval]]\nuse = "perplexity[data=validation.txt,window=16]"\ntargets = ["0.50"]\n\n[grid]'
    content = edited("[grid]", second).replace('steps = ["wanda", "random"]\ntargets = ["2:4"]', 'steps = ["dense"]')
    requests = Planner(load_suite(written(folder, content)), load_registry(), "here", "", "cpu").requests()
    found = {f"{r.spec.method} {r.spec.target}": [s.conditions["data"] for s in r.spec.evals] for r in requests}
    both = ["evaluation.txt", "validation.txt"]
    assert found == {"magnitude 0.5": both, "magnitude 4:8": both[:1], "dense dense": both}
    assert [len(request.eval_texts) for request in requests] == [2, 1, 2]
    seeded = content.replace('steps = ["magnitude"]', 'steps = ["wanda"]').replace('targets = ["0.50"]', "seeds = [7]")
    few = Planner(load_suite(written(folder, seeded)), load_registry(), "here", "", "cpu").requests()
    counts = [(r.spec.target, r.spec.seed, len(r.spec.evals)) for r in few]
    assert counts == [("0.5", 0, 1), ("0.5", 7, 2), ("4:8", 0, 1), ("4:8", 7, 2), ("dense", None, 2)]
    plain = Planner(load_suite(written(folder, GOOD)), load_registry(), "here", "", "cpu").requests()
    assert requests[1].spec.id == plain[1].spec.id
    assert requests[0].spec.id != plain[0].spec.id


def test_a_suite_without_a_dense_run_is_completed_with_one(folder: Path) -> None:
    suite = with_dense(load_suite(written(folder, GOOD)))
    assert [entry.steps for entry in suite.method] == [("dense",), ("magnitude",), ("wanda", "random")]
    assert with_dense(suite) == suite
    retrained = edited('steps = ["magnitude"]', 'steps = ["dense", "perp"]')
    assert with_dense(load_suite(written(folder, retrained))).method[0].steps == ("dense",)


def test_sequences_as_long_as_the_model_takes(folder: Path) -> None:
    suite = load_suite(written(folder, edited("length = 16", "length = 0")))
    requests = Planner(suite, load_registry(), "here", "", "cpu").requests()
    assert requests[-1].spec.recipe.length == 64
    assert "at least 2 tokens (0 is the model's context)" in complaint(folder, edited("length = 16", "length = 1"))


def test_models_of_one_tokenizer_get_sequences_of_their_own_length(folder: Path) -> None:
    shutil.copytree(folder / "tiny", folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    both = edited("length = 16", "length = 0").replace("[calibration]", '[[model]]\npath = "short"\n\n[calibration]', 1)
    retrained = both.replace('steps = ["wanda", "random"]', 'steps = ["wanda", "perp[steps=1,batch=1]"]')
    requests = Planner(load_suite(written(folder, retrained)), load_registry(), "here", "", "cpu").requests()
    lengths = {}
    for request in requests:
        for name, tokens in request.tokens.items():
            if tokens is not None:
                lengths[request.spec.model.name, name] = tokens.shape[1]
    names = ("calibration", "training", "validation")
    assert lengths == {(model, name): length for model, length in (("tiny", 64), ("short", 32)) for name in names}


def test_text_that_was_trained_on_is_found_in_the_evaluation(folder: Path) -> None:
    retrained = edited('steps = ["wanda", "random"]', 'steps = ["magnitude", "perp[steps=1,batch=1]"]').replace(
        "tokens = 640", "tokens = 100000"
    )
    shares = []
    for text in ("evaluation.txt", "mixed.txt"):
        trained = (folder / "training.txt").read_text()
        (folder / "mixed.txt").write_text((folder / "evaluation.txt").read_text() + "\n\n" + trained[: len(trained) // 2])
        suite = load_suite(written(folder, retrained.replace("data=evaluation.txt", f"data={text}")))
        planner = Planner(suite, load_registry(), "here", "", "cpu")
        planner.requests()
        [found] = planner.overlaps
        assert found.training == "training.txt"
        shares.append(found.share)
    assert shares[0] == 0
    assert 0.2 < shares[1] < 0.6


def test_dense_runs_once_whatever_the_targets(folder: Path) -> None:
    assert planned(folder, edited('steps = ["magnitude"]', 'steps = ["dense"]'))[:2] == [
        "dense dense None",
        "wanda + random 2:4 0",
    ]


def test_the_same_run_twice_is_one(folder: Path) -> None:
    doubled = edited('targets = ["0.5", "4:8"]', 'targets = ["0.5", "0.50", "5e-1", "4:8"]')
    assert planned(folder, doubled) == planned(folder, GOOD)


def test_names_are_relative_to_the_suite_and_not_to_where_one_stands(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(planned(folder, GOOD)) == 4


@pytest.mark.parametrize("name", sorted(shipped_suites()))
def test_shipped_suites_are_good_and_say_their_own_name(name: str) -> None:
    suite = load_suite(name)
    assert suite.suite.name == name
    assert suite.folder == suites_folder()
    registry = load_registry()
    assert Planner(suite, registry, "here", "", "cpu")._method(suite.method[-1]).specs


def test_the_standard_benchmark_is_frozen() -> None:
    """A change of what it runs is standard-2; comments may change."""
    content = tomllib.loads(shipped_suites()["standard-1"].read_text(encoding="utf-8"))
    found = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert found == "92b1df86d8adca103a5b0288a964962e213e8f03c1b646fd85c4ceeda61e2dc9"


def test_the_standard_benchmark_takes_anybodys_model_and_method(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = narrowed(load_suite("standard-1"), [str(folder / "tiny")], ["wanda"])
    assert [entry.steps for entry in with_dense(suite).method] == [("dense",), ("wanda",)]
    assert [entry.name for entry in suite.model] == [str(folder / "tiny")]
    assert suite.model[0].dtype is None


def test_a_model_of_the_command_line_is_of_the_working_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    suite = narrowed(load_suite("standard-1"), ["./tiny", "quickstart/wiki7m"], [])
    assert [entry.name for entry in suite.model] == [str(folder / "tiny"), "quickstart/wiki7m"]


def test_a_path_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text(GOOD)
    assert load_suite("quickstart").suite.name == "mine"


def test_line_ends_of_windows(tmp_path: Path) -> None:
    assert load_suite(written(tmp_path, GOOD.replace("\n", "\r\n"))) == load_suite(written(tmp_path, GOOD))


# Bad ones


MISSPELT = {
    "section": (edited("[calibration]", "[calibrationn]"), ["at calibrationn:", "did you mean 'calibration'?"]),
    "list of sections": (edited("[[eval]]", "[[evals]]"), ["at evals:", "did you mean 'eval'?"]),
    "key": (edited("samples = 4", "sampels = 4"), ["at calibration.sampels:", "did you mean 'samples'?"]),
    "needed key": (edited("source", "sorce"), ["at calibration.sorce:", "did you mean 'source'?"]),
    "key of a model": (edited("dtype", "dtyp"), ["at model.0.dtyp:", "did you mean 'dtype'?"]),
    "key of the second method": (edited('steps = ["wanda"', 'step = ["wanda"'), ["at method.1.step:", "did you mean 'steps'?"]),
    "key of an evaluation": (edited("use =", "used ="), ["at eval.0.used:", "did you mean 'use'?"]),
    "key of the grid": (edited("seeds", "seed"), ["at grid.seed:", "did you mean 'seeds'?"]),
    "key of the limits": (edited("threads", "thread"), ["at limits.thread:", "did you mean 'threads'?"]),
    "key of the suite": (edited("version", "verison"), ["at suite.verison:", "did you mean 'version'?"]),
    "key of the resources": ("[resources]\ngpu = 1\n" + GOOD, ["at resources.gpu:", "did you mean 'gpus'?"]),
    "key for Slurm": ("[resources.slurm]\npartitoin = 1\n" + GOOD, ["at resources.slurm.partitoin:", "mean 'partition'?"]),
    "key of a method's resources": (
        edited('steps = ["magnitude"]', 'steps = ["magnitude"]\nresources = { slurm = { setup = "rm" } }'),
        ["at method.0.resources.slurm.setup:", "Known: account, constraint"],
    ),
    "key at the top": ("colour = 1\n" + GOOD, ["at colour:", "Known: calibration, eval, grid"]),
    "field that is no key": ('folder = "/"\n' + GOOD, ["no key 'folder'", "Known: calibration, eval, grid"]),
}


@pytest.mark.parametrize(("content", "said"), cases(MISSPELT))
def test_a_misspelt_key_gets_the_nearest(content: str, said: list[str], tmp_path: Path) -> None:
    message = complaint(tmp_path, content)
    for part in said:
        assert part in message
    with pytest.raises(UnknownNameError):
        load_suite(written(tmp_path, content))


def without(section: str) -> str:
    """The good suite without a section (all of them where it is a list)."""
    parts = re.split(r"(?m)^(?=\[)", GOOD)
    return "".join(part for part in parts if not re.match(rf"\[+{section}\]", part))


WRONG = {
    "no suite": (without("suite"), "lacks suite."),
    "no name": (edited('name = "mine"\n', ""), "lacks suite.name."),
    "no model": (without("model"), "lacks model."),
    "no method": (without("method"), "lacks method."),
    "no grid": (without("grid"), "lacks grid."),
    "no targets": (edited('targets = ["0.5", "4:8"]\n', ""), "lacks grid.targets."),
    "no evaluation": (without("eval"), "lacks [[eval]]"),
    "empty evaluations": ("eval = []\n" + without("eval"), "lacks [[eval]]"),
    "nothing at all": ("", "lacks suite."),
    "no source": (edited('source = "calibration.txt"\n', ""), "lacks calibration.source."),
    "no steps": (edited('steps = ["magnitude"]\n', ""), "lacks method.0.steps."),
    "word for a number": (edited("samples = 4", 'samples = "many"'), "at calibration.samples: input should be a valid integer"),
    "broken number": (edited("length = 16", "length = 16.5"), "at calibration.length: input should be a valid integer"),
    "number for a word": (edited('["0.5", "4:8"]', "[0.5]"), "at grid.targets.0: input should be a valid string"),
    "word for a list": (edited('["0.5", "4:8"]', '"0.5"'), "at grid.targets: input should be a valid list"),
    "one section for a list": (edited("[[model]]", "[model]"), "at model: input should be a valid list"),
    "list for one section": (edited("[grid]", "[[grid]]"), "at grid: input should be"),
    "number in quotes": (edited("samples = 4", 'samples = "4"'), "at calibration.samples: input should be a valid integer"),
    "truth for a number": (edited("samples = 4", "samples = true"), "at calibration.samples: input should be a valid integer"),
    "no samples": (edited("samples = 4", "samples = 0"), "at calibration.samples: input should be greater than or equal to 1"),
    "short sequences": (
        edited("length = 16", "length = 1"),
        "at calibration: a length is at least 2 tokens",
    ),
    "name that is a path": (edited('"mine"', '"../mine"'), "at suite.name:"),
    "version": (edited("version = 3", "version = 0"), "at suite.version: input should be greater than or equal to 1"),
    "dtype": (edited("float32", "float8"), "float32|bfloat16|float16|float64"),
    "allow": (edited('dtype = "float32"', 'allow = ["everything"]'), "at model.0.allow.0:"),
    "hub without revision": (edited('path = "tiny"', 'hub = "o/n"'), "at model.0: a hub model needs its revision, a commit."),
    "path and hub": (
        edited('path = "tiny"', 'path = "tiny"\nhub = "o/n"\nrevision = "c"'),
        "at model.0: name the model by path, by hub or by shape",
    ),
    "neither path nor hub": (
        edited('path = "tiny"\n', ""),
        "at model.0: name the model by path, by hub or by shape, one of them.",
    ),
    "empty steps": (edited('["magnitude"]', "[]"), "at method.0.steps: list should have at least 1 item"),
    "empty targets": (edited('["0.5", "4:8"]', "[]"), "at grid.targets: list should have at least 1 item"),
    "negative seed": (edited("[0, 7]", "[0, -1]"), "at grid.seeds.1: input should be greater than or equal to 0"),
    "no seeds": (edited("[0, 7]", "[]"), "at grid.seeds: list should have at least 1 item"),
    "seed beyond all generators": (edited("[0, 7]", "[4294967296]"), "at grid.seeds.0: input should be less than or equal to"),
    "word for a seed": (edited("[0, 7]", '["first"]'), "at grid.seeds.0: input should be a valid integer"),
    "one seed": (edited("[0, 7]", "7"), "at grid.seeds: input should be a valid list"),
    "broken gpus": ("[resources]\ngpus = 0.5\n" + GOOD, "at resources.gpus: input should be a valid integer"),
    "no minutes": ("[resources]\nminutes = 0\n" + GOOD, "at resources.minutes: input should be greater than 0"),
    "two lines for Slurm": (
        '[resources.slurm]\nqos = "a\\n#SBATCH --x"\n' + GOOD,
        "at resources.slurm.qos: string should match",
    ),
    "quotes for Slurm": ('[resources.slurm]\nqos = "a\'b"\n' + GOOD, "at resources.slurm.qos: string should match"),
    "list for Slurm": ('[resources.slurm]\nqos = ["a"]\n' + GOOD, "at resources.slurm.qos: input should be a valid string"),
    "threads": (edited("threads = 2", "threads = 0"), "at limits.threads: input should be greater than or equal to 1"),
    "batch size": (edited("batch_size = 3", "batch_size = 0"), "at limits.batch_size: input should be greater than or equal"),
    "timeout": (edited("timeout = 60", "timeout = 0"), "at limits.timeout: input should be greater than 0"),
    "endless timeout": (edited("timeout = 60", "timeout = inf"), "at limits.timeout: input should be a finite number"),
    "no number": (edited("timeout = 60", "timeout = nan"), "at limits.timeout: input should be a finite number"),
    "no TOML": (GOOD + "x = [", "cannot be read as TOML: "),
    "key twice": (GOOD + "threads = 2\n", "cannot be read as TOML: "),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe" * 50, "cannot be read as TOML: 'utf-8' codec"),
    "other encoding": (GOOD.encode("utf-16"), "cannot be read as TOML: 'utf-8' codec"),
    "two megabytes": (GOOD + "#" * (2 << 20), "is larger than 1 MiB"),
    "deep lists": ("x = " + "[" * 100_000, "cannot be read as TOML: "),
    "deep tables": ("x = " + "{a=" * 50_000, "cannot be read as TOML: "),
    "long number": (edited("samples = 4", f"samples = {'9' * 5000}"), "cannot be read as TOML: "),
}


@pytest.mark.parametrize(("content", "said"), cases(WRONG))
def test_what_is_wrong_is_said_with_its_place(content: str | bytes, said: str, tmp_path: Path) -> None:
    assert said in complaint(tmp_path, content)


def test_a_deep_key_is_no_danger(tmp_path: Path) -> None:
    assert "has a line of more than 200 dots" in complaint(tmp_path, "x." * 3000 + "y = 1\n" + GOOD)
    assert "no key 'x'" in complaint(tmp_path, "x." * 200 + "y = 1\n" + GOOD)


@pytest.mark.parametrize(
    ("name", "near"), [("quickstrat", "did you mean 'quickstart'?"), ("nobody-has-this-one", "quickstart, ")]
)
def test_an_unknown_suite(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(near)) as caught:
        load_suite(name)
    assert f"there is no suite '{name}'" in str(caught.value)


def test_a_folder_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="there is no suite"):
        load_suite(str(tmp_path))


def test_a_suite_executes_and_expands_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    suite = load_suite(written(tmp_path, edited('"calibration.txt"', '"$SECRET `id` {0.__class__} ~/x.txt"')))
    assert suite.calibration is not None
    assert suite.calibration.source == "$SECRET `id` {0.__class__} ~/x.txt"


# What only planning can find


UNPLANNABLE = {
    "unknown pruner": (edited('["magnitude"]', '["magnitud"]'), UnknownNameError, "did you mean 'magnitude'?"),
    "unknown option": (edited('["magnitude"]', '["magnitude[grup=row]"]'), UnknownNameError, "did you mean 'group'?"),
    "wrong option": (edited('["magnitude"]', '["magnitude[group=x]"]'), OptionError, "matrix | row"),
    "unreadable step": (edited('["magnitude"]', '["magnitude["]'), OptionError, "cannot read the step"),
    "unknown evaluation": (edited("perplexity", "perplexiti"), UnknownNameError, "did you mean 'perplexity'?"),
    "wrong option of an evaluation": (edited("window=16", "window=x"), OptionError, "the option window is int"),
    "target above one": (edited('"0.5"', '"1.5"'), RequestError, "the target 1.5 is out of range"),
    "target that is a word": (edited('"0.5"', '"half"'), RequestError, "the target 'half' is not one"),
    "target of one method": (edited('"2:4"', '"4:2"'), RequestError, "the target 4:2 is out of range"),
    "no calibration section": (
        without("calibration"),
        RequestError,
        "needs calibration text, and the suite has no [calibration]",
    ),
    "one text for calibration and training": (
        edited('["wanda", "random"]', '["wanda", "perp"]').replace('"calibration.txt"', '"training.txt"'),
        RequestError,
        "calibration and training text are both training.txt",
    ),
    "one text for calibration and evaluation": (
        edited('"calibration.txt"', '"evaluation.txt"'),
        RequestError,
        "evaluation and calibration text are both evaluation.txt",
    ),
    "training on the text of evaluation": (
        edited('["wanda", "random"]', '["wanda", "perp"]').replace('"training.txt"', '"evaluation.txt"'),
        RequestError,
        "evaluation and training text are both evaluation.txt",
    ),
    "no model": (edited('"tiny"', '"huge"'), ModelError, "there is no model 'huge'"),
    "no calibration file": (edited("calibration.txt", "missing.txt"), DataError, "the file missing.txt does not exist"),
    "no evaluation file": (edited("data=evaluation.txt", "data=missing.txt"), DataError, "the file missing.txt does not exist"),
    "window beyond the context": (edited("window=16", "window=65"), DataError, "longer than the model's context of 64"),
    "calibration beyond the context": (
        edited("length = 16", "length = 65"),
        DataError,
        "longer than the model's context of 64",
    ),
}


@pytest.mark.parametrize(("content", "kind", "said"), cases(UNPLANNABLE))
def test_what_planning_finds_before_any_work(content: str, kind: type[RequestError], said: str, folder: Path) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        planned(folder, content)


def test_a_method_without_data_needs_no_calibration_section(folder: Path) -> None:
    lone = without("calibration").replace('["wanda", "random"]', '["random"]')
    assert planned(folder, lone)[-1] == "random 2:4 7"


def test_a_token_file_brings_its_own_shape(folder: Path) -> None:
    """The numbers beside it are not read, so their defaults may not stand in the way."""
    np.save(folder / "tokens.npy", np.ones((3, 24), dtype=np.int64))
    given = edited('source = "calibration.txt"\nsamples = 4\nlength = 16', 'source = "tokens.npy"')
    suite = load_suite(written(folder, given))
    (request, _) = Planner(suite, load_registry(), "here", "", "cpu").requests()[2:]
    recipe = request.spec.recipe
    assert (recipe.sampler, recipe.samples, recipe.length) == ("as given", 3, 24)


def test_the_good_suite_is_the_one_that_is_edited() -> None:
    """The cases above would prove nothing if the suite they start from were wrong itself."""
    assert Suite.model_validate(tomllib.loads(GOOD)).suite.name == "mine"

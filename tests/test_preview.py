"""Dry runs: downloads, runs, time, memory and the differences that a suite could show, by a Hub that is a dictionary."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from support import FAMILIES, Bench, Ran, cases, make_record, make_spec, tiny, tree

from prunebench.bench import estimate
from prunebench.bench.costs import PAIR_TOKENS, QUESTION_TOKENS, eval_effort
from prunebench.bench.estimate import known_work
from prunebench.bench.evals import task_index
from prunebench.bench.evals.task_index import TaskIndex
from prunebench.bench.outline import downloads, outlined_work
from prunebench.bench.plan import Planner
from prunebench.bench.preview import Preview
from prunebench.bench.rates import Rates
from prunebench.bench.specs import run_label
from prunebench.bench.suite import load_suite
from prunebench.errors import DataError, ModelError, UnknownNameError
from prunebench.plain import duration_text, size_text
from prunebench.plugins import load_registry
from prunebench.results.planning import Asked, figure
from prunebench.results.records import EvalSpec, RunRecord, SampleRecord
from prunebench.results.store import ResultStore
from prunebench.toolkit.hub import Download, data_download
from prunebench.toolkit.loading import ModelSource, shape_of

MODEL = "owner/small"
REVISION = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": 700, "tokenizer.json": 1 << 20, "model.safetensors": 3 << 20, "README.md": 9000}
METHODS = ("dense", "magnitude", "wanda", "magnitude + wanda", "random")
Command = Callable[..., Ran]


@dataclass
class Hub:
    """Stands for the Hub; what was asked of it is kept."""

    model: Path
    models: dict[str, Mapping[str, int]] = field(default_factory=lambda: {MODEL: FILES})
    data: dict[str, Mapping[str, int]] = field(default_factory=dict)
    error: Exception | None = None
    gate: Exception | None = None
    asked: list[str] = field(default_factory=list)

    def model_info(self, name: str, *, revision: str, files_metadata: bool, timeout: float) -> Any:
        return self._answer(self.models, name, revision)

    def dataset_info(self, name: str, *, files_metadata: bool, timeout: float) -> Any:
        return self._answer(self.data, name, None)

    def _answer(self, there: Mapping[str, Mapping[str, int]], name: str, revision: str | None) -> Any:
        self.asked.append(name)
        assert revision in (None, REVISION)
        if self.error is not None:
            raise self.error
        if name not in there:
            raise refused(RepositoryNotFoundError, 404)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=path, size=size) for path, size in there[name].items()])

    def fetch(self, name: str, file: str, *, revision: str, etag_timeout: float) -> str:
        assert (name, file, revision) == (MODEL, "config.json", REVISION), "of a model only its settings"
        if self.gate is not None:
            raise self.gate
        folder = self.model.parent / "fetched"
        folder.mkdir(exist_ok=True)
        return str(shutil.copy(self.model / file, folder))


def refused(kind: type[Exception], status: int) -> Exception:
    """What the Hub's client raises when the Hub says no."""
    response = SimpleNamespace(
        status_code=status, headers={}, request=SimpleNamespace(url="https://huggingface.co", method="GET")
    )
    return kind("the Hub says no\nin two lines", response=response)  # type: ignore[call-arg]


@pytest.fixture
def hub(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with one model, and an empty cache of its client."""
    found = Hub(Path(shutil.copytree(bench.model, tmp_path / "hub" / "small")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("weights were asked for"))
    return found


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Rates(products=1e9, attention=1e9, moved=1e9, factored=1e9, launch=1e-6)
    monkeypatch.setattr(estimate, "rates_of", lambda *_: found)


def on_the_hub(text: str, allow: str = "") -> str:
    """The suite with its model on the Hub."""
    return re.sub(r"(?m)^path = .*$", f'hub = "{MODEL}"\nrevision = "{REVISION}"{allow}', text, count=1)


def planner_of(folder: Path, text: str) -> Planner:
    (folder / "small.toml").write_text(text)
    return Planner(load_suite(str(folder / "small.toml")), load_registry(), "box", "prunebench run small.toml", "cpu")


def test_without_the_model_the_same_runs_are_found(bench: Bench, tmp_path: Path, hub: Hub) -> None:
    more = '[[method]]\nsteps = ["sparsegpt"]\ntargets = ["4:8"]\nseeds = [5, 6, 7]\n\n[[method]]\nsteps = ["wanda[]"]'
    text = bench.suite_text(*METHODS, targets=["0.5", "0.50", "2:4"], seeds=[0, 1], more=more)
    here = planner_of(tmp_path, text)
    there = planner_of(tmp_path, on_the_hub(text))
    known, outlined = known_work(here.requests(), here.registry), outlined_work(there)
    assert downloads(here) == []
    assert [run_label(work).replace("tiny", "small") for work in known] == [run_label(work) for work in outlined]
    assert len(known) == 1 + 2 + 2 * 2 + 2 * 2 + 2 * 2 + 3
    same = ("shape", "facts", "steps", "seed", "target", "dtype")
    assert [[getattr(work, name) for name in same] for work in known] == [[getattr(w, name) for name in same] for w in outlined]
    assert {work.id for work in outlined} == {None}
    assert {work.model.source for work in outlined} == {f"{MODEL}@{REVISION}"}


@pytest.mark.parametrize(
    ("files", "allow", "size"),
    [
        pytest.param(FILES, "", (4 << 20) + 700, id="what is read"),
        pytest.param(FILES | {"pytorch_model.bin": 5 << 20, "flax_model.msgpack": 7}, "", (4 << 20) + 700, id="one format"),
        pytest.param({"config.json": 1, "pytorch_model.bin": 9}, '\nallow = ["pickle"]', 10, id="pickled, allowed"),
        pytest.param(FILES | {"pytorch_model.bin": 5 << 20}, '\nallow = ["pickle"]', (4 << 20) + 700, id="safe first"),
    ],
)
def test_what_a_model_would_fetch(
    files: Mapping[str, int], allow: str, size: int, bench: Bench, tmp_path: Path, hub: Hub
) -> None:
    hub.models = {MODEL: files}
    found = downloads(planner_of(tmp_path, on_the_hub(bench.suite_text("dense"), allow)))
    assert found == [Download("model", MODEL, size)]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": 1, "pytorch_model.bin": 9}, "has only pickled weights (pytorch_model.bin)"),
        ({"config.json": 1, "onnx/model.safetensors": 1}, "has no weights there"),
    ],
)
def test_weights_that_may_not_be_loaded_are_found_before_they_are_fetched(
    files: Mapping[str, int], reason: str, bench: Bench, tmp_path: Path, hub: Hub
) -> None:
    hub.models = {MODEL: files}
    with pytest.raises(ModelError, match=re.escape(reason)):
        downloads(planner_of(tmp_path, on_the_hub(bench.suite_text("dense"))))


@pytest.mark.parametrize("shards", [(), ("a.safetensors", "b.safetensors")])
def test_a_model_in_the_cache_is_no_download(
    shards: tuple[str, ...], bench: Bench, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings alone are not the model, nor is a part of its shards."""
    planner = planner_of(tmp_path, on_the_hub(bench.suite_text("dense")))
    folder = tmp_path / "hub cache" / "models--owner--small" / "snapshots" / REVISION
    folder.mkdir(parents=True)
    shutil.copy(bench.model / "config.json", folder)
    assert len(downloads(planner)) == 1
    if shards:
        names = ", ".join(f'"{index}": "{shard}"' for index, shard in enumerate(shards))
        (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{names}}}}}')
    for shard in shards[:-1]:
        (folder / shard).touch()
    assert len(downloads(planner)) == 1
    (folder / (shards or ("model.safetensors",))[-1]).touch()
    hub.asked.clear()
    assert downloads(planner) == []
    assert hub.asked == []


@pytest.fixture
def here(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a suite for a model on the Hub, and the working folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "small.toml").write_text(on_the_hub(bench.suite_text(*METHODS, targets=["0.5", "2:4"], seeds=[0, 1])))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("error", "said"),
    cases(
        {
            "unreachable": (
                OSError("no route\nto it"),
                f"the model {MODEL} at {REVISION} cannot be had from the Hub: no route",
            ),
            "gone": (refused(RepositoryNotFoundError, 404), "cannot be had from the Hub: the Hub says no"),
            "gated": (refused(GatedRepoError, 403), f"Accept its licence at https://huggingface.co/{MODEL} and log in"),
            "nobody": (refused(RepositoryNotFoundError, 401), f"the Hub does not give you the model {MODEL}"),
        }
    ),
)
def test_a_model_that_cannot_be_had_is_one_sentence(
    error: Exception, said: str, here: Path, hub: Hub, command: Command
) -> None:
    hub.error, before = error, tree(here)
    ran = command("run", "small.toml", "--dry-run")
    assert said in ran.complaint
    assert (ran.out, tree(here)) == ("", before)


def test_settings_behind_a_gate(here: Path, hub: Hub, command: Command) -> None:
    """The list of files is for everybody, the files are not."""
    hub.gate = refused(GatedRepoError, 401)
    assert "Accept its licence" in command("run", "small.toml", "--dry-run").complaint


def test_a_dry_run_of_a_hub_model(here: Path, hub: Hub, command: Command) -> None:
    before = tree(here)
    ran = command("run", "small.toml", "--dry-run")
    assert (ran.code, ran.err, tree(here)) == (0, "", before)
    for line in (
        "15 runs; which of them are done is known when the data are here. Nothing was run.",
        f"  model {MODEL}: 4 MiB",
        "  in all 4 MiB",
    ):
        assert f"{line}\n" in ran.out
    for times, label in ((1, "small dense"), (1, "small magnitude 2:4"), (2, "small wanda 0.5")):
        assert re.search(rf"(?m)^ to do    {times} x  +\d+ s   3\d\d MiB  {label}$", ran.out)
    assert re.search(r"\n  small: 15 runs, \d+ s, peak 3\d\d MiB on the host\n  rests on this machine's rates alone", ran.out)
    assert "windows=4]: no difference would show, 4 windows are too few\n" in ran.out
    only = command("run", "small.toml", "--dry-run", "--only", "wanda 0.5")
    assert "4 runs; which of them are done" in only.out
    assert "contains 'nothing'" in command("run", "small.toml", "--dry-run", "--only", "nothing").complaint


def test_a_suite_of_two_models_has_a_sum(bench: Bench, here: Path, hub: Hub, command: Command) -> None:
    other = f'[[model]]\npath = "{bench.model}"'
    text = bench.suite_text("dense", more=f'{other}\ndtype = "bfloat16"').replace("[[method]]", f"{other}\n\n[[method]]", 1)
    (here / "small.toml").write_text(on_the_hub(text))
    out = command("run", "small.toml", "--dry-run").out
    assert re.search(r"\n  in all: 3 runs, \d+ s, peak \d+ MiB on the host\n", out)
    assert "1 GFLOP/s at the sizes of tiny in bfloat16" in out
    assert "measured here, by one thread" in out


# Data sets


def test_data_sets_by_configuration_and_shard(hub: Hub) -> None:
    hub.data = {
        "owner/set": {"README.md": 1, "one/test-0.parquet": 10, "one/train-0.parquet": 200, "two/test-0.parquet": 3000},
        "allenai/c4": {"en/c4-train.00000-of-01024.json.gz": 319, "en/c4-train.00001-of-01024.json.gz": 318},
        "owner/flat": {"test.jsonl": 5, "train.jsonl": 60, "picture.png": 700},
    }
    name = "data set"
    assert data_download("owner/set", [("one", None)]) == Download(name, "owner/set (one)", 210)
    assert data_download("owner/set", [("two", None), ("one", None)]) == Download(name, "owner/set (one, two)", 3210)
    assert data_download("owner/set", [("three", None), ("one", None)]) == Download(name, "owner/set (one, three)", None)
    many = [(f"part{index}", None) for index in range(67)]
    hub.asked.clear()
    assert data_download("owner/set", many) == Download(name, "owner/set (67 configurations)", None)
    assert hub.asked == ["owner/set"]
    assert data_download("owner/flat", [("default", None)]) == Download(name, "owner/flat (default)", 65)
    shard = "en/c4-train.00000-of-01024.json.gz"
    assert data_download("allenai/c4", [("en", shard)]) == Download(name, f"allenai/c4 ({Path(shard).name})", 319)
    assert data_download("owner/moved", [("default", None)]) == Download(name, "owner/moved (default)", None)
    hub.error = OSError("no route")
    with pytest.raises(DataError, match=r"owner/set: no route\. Without a network set PRUNEBENCH_MIRROR"):
        data_download("owner/set", [("one", None)])


def test_data_sets_that_were_read_are_no_download(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    hub.data = {"owner/BigSet": {"one/test.parquet": 1, "two/test.parquet": 20}, "allenai/c4": {"en/a.json.gz": 1}}
    both = [("one", None), ("two", None)]
    kept = tmp_path / "datasets" / "owner___big_set" / "one" / "0.0.0" / "abc"
    kept.mkdir(parents=True)
    assert data_download("owner/BigSet", both) == Download("data set", "owner/BigSet (one, two)", 21), "one was cut short"
    (kept / "dataset_info.json").touch()
    assert data_download("owner/BigSet", both) == Download("data set", "owner/BigSet (two)", 20)
    assert data_download("owner/BigSet", both[:1]) is None
    shard = tmp_path / "hub cache" / "datasets--allenai--c4" / "snapshots" / "abc" / "en" / "a.json.gz"
    shard.parent.mkdir(parents=True)
    assert data_download("allenai/c4", [("en", "en/a.json.gz")]) is not None
    shard.touch()
    assert data_download("allenai/c4", [("en", "en/a.json.gz")]) is None


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks instead of lm-eval's 14,000."""
    entries = {
        "boolq": {"file": "a", "data": "aps/super_glue/boolq"},
        "arc": {"file": "b", "data": "allenai/ai2_arc/ARC-Easy"},
        "blimp": {"file": "c", "data": "blimp", "members": ["blimp_1", "blimp_2"]},
        "blimp_1": {"file": "d", "data": "nyu-mll/blimp/one"},
        "blimp_2": {"file": "e", "data": "nyu-mll/blimp/two"},
    }
    monkeypatch.setattr(task_index, "stock_index", lambda: TaskIndex(Path(), entries))


@pytest.mark.usefixtures("tasks")
def test_every_text_and_task_of_a_suite_is_asked_for(
    bench: Bench, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals = ["perplexity[data=c4]", bench.perplexity, "zero_shot[tasks=boolq+arc]", "zero_shot[tasks=blimp]", "generation"]
    more = '[training]\nsource = "owner/own/text:train"\ntokens = 64'
    text = bench.suite_text("dense", "wanda + lora[steps=1]", evals=evals, more=more)
    text = text.replace(f"source = {bench.calibration!s}".replace("= ", '= "') + '"', 'source = "c4"')
    planner = planner_of(tmp_path, text)
    assert {download.name for download in downloads(planner)} == {
        "allenai/c4 (c4-train.00000-of-01024.json.gz, c4-validation.00000-of-00008.json.gz)",
        "EleutherAI/lambada_openai (default)",
        "aps/super_glue (boolq)",
        "allenai/ai2_arc (ARC-Easy)",
        "nyu-mll/blimp (one, two)",
        "owner/own (text)",
    }
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path))
    assert downloads(planner) == []
    monkeypatch.delenv("PRUNEBENCH_MIRROR")
    [dense, *_] = outlined_work(planner)
    own, pairs = 2 * 1000 * QUESTION_TOKENS, 2 * 1000 * PAIR_TOKENS
    found = [eval_effort(spec.conditions)[0].blocks for spec in dense.evals]
    assert found == [256 * 64, 4 * 16, own, pairs, 1000 * QUESTION_TOKENS]


@pytest.mark.usefixtures("tasks")
def test_an_unknown_task_is_named_before_anything_is_fetched(bench: Bench, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(UnknownNameError, match="no task 'bolq'; did you mean 'boolq'"):
        downloads(planner_of(tmp_path, bench.suite_text("dense", evals=["zero_shot[tasks=bolq]"])))


# Time and memory


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_of_the_models(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    shape = shape_of(ModelSource(tmp_path, "tiny", "local"))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert shape.multiplied == shape.parameters - (0 if head is embedding else embedding.numel())


def shown(bench: Bench, folder: Path, store: Path, *methods: str, **changes: Any) -> Preview:
    planner = planner_of(folder, bench.suite_text(*methods, **changes))
    kept = ResultStore(store, pytest.fail)
    records = [stored.record for stored in kept.latest()]
    return Preview(planner, records, kept.items, [], known_work(planner.requests(), planner.registry), [])


def kept(planned: Preview, index: int, folder: Path, machine: str = "box", seconds: float = 100.0) -> RunRecord:
    """A record of a planned run: 1.5 seconds of evaluation, 2 of pruning, the rest until the weights are there."""
    [request] = [r for r in planned.planner.requests() if r.spec.id == planned.todo[index].id]
    made = make_record(request.spec, machine=machine, peak_host_bytes=2 << 30)
    changed = {"seconds": seconds, "threads": 1}
    made = made.model_copy(update={"provenance": made.provenance.model_copy(update=changed)})
    ResultStore(folder, pytest.fail).write(made)
    return made


def test_a_models_cost_is_that_of_its_runs(bench: Bench, tmp_path: Path) -> None:
    found = shown(bench, tmp_path, tmp_path / "none", "magnitude", "wanda", "gblm + wanda")
    predictions = [estimate.prediction for estimate in found.estimates]
    [cost] = found.costs
    assert (cost.model, cost.runs) == ("tiny", 3)
    assert cost.seconds == pytest.approx(sum(prediction.seconds for prediction in predictions))
    assert cost.peak_bytes == max(prediction.peak_bytes for prediction in predictions)
    assert found.bases == {"rates": 1.0}


def test_more_work_is_expected_to_take_longer(bench: Bench, tmp_path: Path) -> None:
    more = f'[training]\nsource = "{bench.training}"\ntokens = 320'
    methods = ("magnitude", "wanda", "gblm", "magnitude + lora[steps=1000]")
    found = [e.prediction for e in shown(bench, tmp_path, tmp_path / "none", *methods, more=more).estimates]
    assert [one.seconds < other.seconds for one, other in itertools.pairwise(found)] == [True] * 3
    assert found[3].peak_bytes > found[0].peak_bytes


def test_records_of_this_machine_come_first(bench: Bench, tmp_path: Path) -> None:
    store = tmp_path / "results"
    planned = shown(bench, tmp_path, store, "magnitude", "wanda", seeds=[0, 1])
    [before] = planned.costs
    kept(planned, 1, store, machine="other")
    [same] = shown(bench, tmp_path, store, "magnitude", "wanda", seeds=[0, 1]).costs
    assert same == before
    kept(planned, 1, store)
    found = shown(bench, tmp_path, store, "magnitude", "wanda", seeds=[0, 1])
    magnitude, *wanda = [estimate.prediction for estimate in found.estimates]
    assert [prediction.seconds for prediction in wanda] == [pytest.approx(100), pytest.approx(100)]
    assert magnitude.seconds > 96.5 + 1.5, "the start and the evaluation are the same"
    assert [prediction.peak_bytes for prediction in wanda] == [2 << 30] * 2
    assert magnitude.peak_bytes < 2 << 30
    assert found.bases["the same"] > 0.9
    kept(planned, 2, store, seconds=400.0)
    [*_, last] = shown(bench, tmp_path, store, "wanda", seeds=[0, 1, 2]).estimates
    assert last.prediction.seconds == pytest.approx(3.5 + math.sqrt(96.5 * 396.5)), "the mean of factors"


def test_a_line_a_run_and_what_it_rests_on(here: Path, bench: Bench, command: Command) -> None:
    (here / "here.toml").write_text(bench.suite_text("dense", "magnitude"))
    assert command("run", "here.toml", "--executor", "inline").code == 0
    out = command("run", "here.toml", "--dry-run").out
    assert re.search(r"\n? *done  [0-9a-f]{12} {22} *tiny dense\n", out)
    out = command("run", "here.toml", "--dry-run", "--again").out
    assert re.search(r"\n to do  [0-9a-f]{12} +\d+ s +[\d.]+ [MG]iB  tiny magnitude 0\.5\n", out)
    assert "\n  rests on records of the same runs 100%\n" in out
    assert "measured here" not in out


# What could be shown


PERPLEXITY = {"eval": "perplexity", "window": 512, "windows": 80, "data": "text"}
QUESTIONS = {
    "eval": "zero_shot",
    "tasks": {"one": {"items": 300, "tasks": 1}, "two": {"items": 500, "tasks": 1}},
    "limit": None,
}


def measured(method: str, seed: int | None, values: Any, conditions: Mapping[str, Any], target: str = "0.5") -> RunRecord:
    made = make_record(make_spec(method, target, seed, conditions=conditions))
    [(name, old)] = made.scores.items()
    items = {"nll": list(values), "document": [index // 4 for index in range(len(values))]}
    sample = SampleRecord(column="nll", exponential=True, documents="document")
    return made.model_copy(update={"scores": {name: old.model_copy(update={"items": items, "sample": sample})}})


def test_without_records_a_deviation_is_assumed() -> None:
    text, answers = figure(PERPLEXITY, [], pytest.fail), figure(QUESTIONS, [], pytest.fail)
    assert text is not None
    assert answers is not None
    assert (text.items, text.exponential, text.share, text.deviation, text.pairs) == (80, True, False, 0.05, 0)
    # (t(0.975) + t(0.8)) with 9 degrees of freedom x 0.05 x sqrt((1 + 7 x 0.2) / 80)
    assert text.difference == pytest.approx((2.262 + 0.883) * 0.05 * math.sqrt(2.4 / 80), rel=1e-3)
    assert (answers.items, answers.exponential, answers.share) == (800, False, True)
    error = math.sqrt(0.15) * math.sqrt((1 / 300 + 1 / 500) / 4)
    assert answers.difference == pytest.approx((1.96 + 0.842) * error, rel=0.01)


def test_few_windows_and_strangers_show_nothing() -> None:
    few = figure(PERPLEXITY | {"windows": 9}, [], pytest.fail)
    assert few is not None
    assert math.isinf(few.difference)
    assert figure({"eval": "theirs", "setting": 3}, [], pytest.fail) is None


def test_records_of_the_same_conditions_give_the_deviation() -> None:
    draw = np.random.default_rng(0)
    text = draw.normal(4, 1, 80)
    runs = [measured("dense", None, text, PERPLEXITY, "dense")]
    runs += [measured("wanda", seed, text + draw.normal(0.1, 0.02, 80), PERPLEXITY) for seed in range(2)]
    runs += [measured("magnitude", None, text + draw.normal(0.3, 0.02, 80), PERPLEXITY)]
    runs += [
        measured("magnitude", None, text + 9, PERPLEXITY | {"windows": 81}),
        measured("random", 0, text * 2, PERPLEXITY, "2:4"),
    ]
    found = figure(PERPLEXITY, runs, lambda _, score: score.items)
    assert found is not None
    assert (found.items, found.pairs, found.exponential) == (80, 1, True)
    assert found.deviation == pytest.approx(0.02 * math.sqrt(1.5), rel=0.25), "the mean of wanda's two seeds"
    assumed = figure(PERPLEXITY, runs[:1], lambda _, score: score.items)
    assert assumed is not None
    assert assumed.pairs == 0


def test_questions_of_a_limit() -> None:
    tasks = {"group": {"items": 900, "tasks": 3}, "one": {"items": 40, "tasks": 1}}
    assert Asked.by({"tasks": tasks, "limit": 100}).questions == (("group", 300), ("one", 40))
    assert Asked.by({"tasks": [{"task": "lambada", "questions": 7}]}).questions == (("lambada", 7),)


@pytest.mark.parametrize("conditions", [{"tasks": ["a", "b"]}, {"tasks": {"a": 3}}, {"windows": "sliding"}, {"tasks": "boolq"}])
def test_conditions_of_strangers_are_no_error(conditions: dict[str, Any]) -> None:
    assert Asked.by(conditions) == Asked(0, 0, ())


def test_figures_are_for_every_evaluation(bench: Bench, tmp_path: Path) -> None:
    found = shown(bench, tmp_path, tmp_path / "none", "dense", "wanda").figures
    [(model, text, value)] = found
    assert (model, text.startswith("perplexity[data=")) == ("tiny", True)
    assert value is not None
    assert math.isinf(value.difference), "four windows are half a block"


# Readable


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (1500, "25 min"),
        (5400, "1 h 30 min"),
        (40000, "11 h"),
        (190000, "2 d 5 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(700, "700 bytes"), (2048, "2 KiB"), (300 << 20, "300 MiB"), (1023 << 20, "1023 MiB"), (int(13.5 * 2**30), "13.5 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_conditions_are_kept_with_a_planned_evaluation(bench: Bench, tmp_path: Path) -> None:
    [work] = shown(bench, tmp_path, tmp_path / "none", "dense").todo
    [spec] = work.evals
    assert isinstance(spec, EvalSpec)
    assert eval_effort(spec.conditions)[0].blocks == 4 * 16

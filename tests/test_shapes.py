"""Shapes: architectures with random weights. What is drawn, what a suite may ask of them, where they are told from models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support import Bench, Ran, cases, make_record, make_spec
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunebench.bench.commands import narrowed
from prunebench.bench.plan import Planner, RunRequest
from prunebench.bench.suite import Suite, load_suite, with_dense
from prunebench.errors import ModelError, RequestError, UnknownNameError
from prunebench.plugins import load_registry
from prunebench.results import consistency
from prunebench.results.board import build_board
from prunebench.results.findings import Entry
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore, Stored
from prunebench.scoring import JsonDict
from prunebench.spec import Eval, EvalFacts, EvalJob, Score
from prunebench.toolkit import shapes
from prunebench.toolkit.loading import check_unchanged, identify, load_model, resolve_model, shape_of
from prunebench.toolkit.random_tokens import random_tokens
from prunebench.toolkit.shapes import ARCHITECTURES, RandomWeights, config_of, content_of, filled, shape_named

Command = Callable[..., Ran]

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "opt-6.7b": 6_658_473_984,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
}
"""As the published models have them."""

SUITE = """
[suite]
name = "costs"

[[model]]
shape = "tiny-llama"
dtype = "float32"

[calibration]
source = "random"
samples = 4
length = 16

[training]
source = "random"
tokens = 100

[[method]]
steps = ["wanda"]

[[method]]
steps = ["magnitude", "perp[steps=2,batch=1]"]

[grid]
targets = ["0.5"]
"""


@dataclass
class Speedy(Eval):
    """Measures what a model costs."""

    name: ClassVar[str] = "speedy"
    measures_cost: ClassVar[bool] = True

    def conditions(self, facts: EvalFacts) -> JsonDict:
        return {"tokenizer there": facts.tokenizer is not None}

    def measure(self, job: EvalJob) -> Score:
        assert not any(parameter.is_meta for parameter in job.model.parameters())
        return Score(2.0, "tokens/s", True)


def empty(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name))  # type: ignore[no-untyped-call]
        return model


def planned(folder: Path, text: str = SUITE) -> list[RunRequest]:
    (folder / "costs.toml").write_text(text)
    suite = with_dense(load_suite(str(folder / "costs.toml")))
    return Planner(suite, load_registry(), "here", "prunebench run costs.toml", "cpu").requests()


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# What is drawn


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str) -> None:
    assert sum(parameter.numel() for parameter in empty(name).parameters()) == PARAMETERS[name]


def test_short_names_are_understood_and_others_are_told_the_nearest() -> None:
    assert [shape_named(name) for name in ("13b", "30b", "65b", "llama-30b")] == [
        "llama-2-13b",
        "llama-30b",
        "llama-65b",
        "llama-30b",
    ]
    with pytest.raises(UnknownNameError, match=r"there is no shape 'lama-2-7b'; did you mean 'llama-2-7b'\? Known: "):
        resolve_model("shape:lama-2-7b", [Path()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_drawn_as_a_model_is_initialised(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    model = filled(empty("small-llama"), dtype, "cpu", lambda _: torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before), "nobody's generator is drawn from"
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.dtype == dtype
    assert not model.training
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert bool((parameter == 1).all())
        else:
            drawn = parameter.detach().float()
            assert abs(float(drawn.std()) - 0.02) < 2e-4, name
            assert abs(float(drawn.mean())) < 2e-4, name
    first, second = (model.get_parameter(f"model.layers.{block}.mlp.up_proj.weight") for block in (0, 1))
    assert not torch.equal(first, second)


def test_biases_are_zero_and_tied_weights_stay_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tied = {**ARCHITECTURES["tiny-llama"], "model_type": "qwen2", "tie_word_embeddings": True}
    monkeypatch.setattr(shapes, "ARCHITECTURES", {"tied": tied})
    model = filled(empty("tied"), torch.float32, "cpu", lambda _: torch.device("cpu"))
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all(bool((bias == 0).all()) for bias in biases)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[no-untyped-call]


def test_any_parameter_can_be_drawn_alone_and_again() -> None:
    whole = bits(load_model(resolve_model("shape:tiny-mixtral", [Path()]), "bfloat16"))
    weights = RandomWeights(empty("tiny-mixtral"), torch.bfloat16, "cpu")
    for name in reversed(whole):
        assert torch.equal(weights.make(name, whole[name]), whole[name]), name


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-0.5b", "mixtral-8x7b", "opt-6.7b"])
def test_buffers_are_those_of_a_model_that_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary frequencies are in no file: on the meta device they would be lost."""
    small = {"num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 8, "ffn_dim": 8, "num_local_experts": 2}
    settings = {key: min(value, small[key]) if key in small else value for key, value in ARCHITECTURES[name].items()}
    monkeypatch.setattr(shapes, "ARCHITECTURES", {"small": settings})
    drawn = filled(empty("small"), torch.bfloat16, "cpu", lambda _: None)
    built = AutoModelForCausalLM.from_config(config_of("small"), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    wanted = dict(built.named_buffers())
    assert bool(wanted) == (name != "opt-6.7b")
    for key, buffer in drawn.named_buffers():
        assert buffer.dtype == wanted[key].dtype
        assert torch.equal(buffer, wanted[key]), key


def test_a_buffer_that_cannot_be_made_is_named() -> None:
    model = empty("tiny-llama")
    model.register_module("odd", torch.nn.BatchNorm1d(3, device="meta"))
    with pytest.raises(ModelError, match="odd has buffers that cannot be made"):
        filled(model, torch.float32, "cpu", lambda _: torch.device("cpu"))


def test_a_shape_is_known_by_its_settings_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve_model("shape:tiny-llama", [Path()])
    assert (source.source, source.shape) == ("shape:tiny-llama", "tiny-llama")
    identity = identify(source)
    assert (identity.tokenizer, identity.tokenizer_hash) == (None, "none")
    assert len({content_of(name) for name in ARCHITECTURES}) == len(ARCHITECTURES)
    assert shape_of(source).parameters == 195_008
    check_unchanged(source, identity.weights, "none")
    monkeypatch.setattr(shapes, "SEED", 1)
    with pytest.raises(ModelError, match="not the model any more"):
        check_unchanged(source, identity.weights, "none")


def test_random_tokens_differ_by_purpose_and_seed_and_stay_in_the_vocabulary() -> None:
    first, again, other = (random_tokens("calibration", 7, 40, 30, seed) for seed in (0, 0, 1))
    training = random_tokens("training", 7, 40, 30, 0)
    assert first.content == again.content
    assert len({first.content, other.content, training.content}) == 3
    assert first.source.content == other.source.content != training.source.content
    assert set(np.unique(first.array)) == set(range(7))
    assert (first.array.shape, first.array.dtype) == ((40, 30), np.int64)


# What a suite may ask


def test_a_suite_of_shapes_has_no_dense_run_and_no_evaluation(tmp_path: Path) -> None:
    wanda, perp = planned(tmp_path)
    assert (wanda.spec.method, perp.spec.method) == ("wanda", "magnitude + perp[steps=2,batch=1]")
    assert wanda.spec.model.is_shape
    assert wanda.spec.model.name == "tiny-llama (random weights)"
    assert (wanda.spec.evals, wanda.spec.recipe.sampler) == ((), "uniform-v1")
    assert wanda.spec.recipe.calibration is not None
    assert wanda.spec.recipe.calibration.label() == "random (calibration)"
    tokens = perp.tokens["training"]
    assert tokens is not None
    assert tokens.shape == (6, 16), "as many windows as the budget holds"


WRONG = {
    "two places": ('shape = "tiny-llama"', 'shape = "tiny-llama"\npath = "tiny"', "by path, by hub or by shape, one of them"),
    "revision": ('shape = "tiny-llama"', 'shape = "tiny-llama"\nrevision = "c"', "a shape has no files"),
    "unknown": ("tiny-llama", "tiny-lama", "there is no shape 'tiny-lama'; did you mean 'tiny-llama'?"),
    "text": ('source = "random"\nsamples', 'source = "c4"\nsamples', "its calibration source is 'random', not 'c4'"),
    "training text": ('source = "random"\ntokens', 'source = "c4"\ntokens', "its training source is 'random', not 'c4'"),
    "few tokens": ("tokens = 100", "tokens = 10", "10 training tokens are fewer than one window of 16"),
    "quality": (
        "[grid]",
        '[[eval]]\nuse = "perplexity[data=wikitext2]"\n[grid]',
        "cannot be measured on shape:tiny-llama: random weights have costs only",
    ),
    "long": ("length = 16", "length = 512", "longer than the model's context of 256"),
}


@pytest.mark.parametrize(("old", "new", "said"), cases(WRONG))
def test_what_means_nothing_for_a_shape_is_said_before_any_work(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in SUITE
    with pytest.raises(RequestError) as raised:
        planned(tmp_path, SUITE.replace(old, new))
    assert said in str(raised.value)


def test_random_tokens_are_for_shapes_only(bench: Bench, tmp_path: Path) -> None:
    text = bench.suite_text("wanda").replace(json.dumps(str(bench.calibration)), '"random"')
    with pytest.raises(RequestError, match="random tokens are for shapes only"):
        planned(tmp_path, text)
    with pytest.raises(RequestError, match="nothing to measure"):
        narrowed(Suite.model_validate(load_suite(str(written(tmp_path))).model_dump()), [str(bench.model)], [])


def written(folder: Path) -> Path:
    (folder / "costs.toml").write_text(SUITE)
    return folder / "costs.toml"


def test_what_a_shape_costs_may_be_measured(tmp_path: Path, register: Callable[..., None]) -> None:
    from prunebench.bench import runner

    register(Speedy)
    wanda, _ = planned(tmp_path, SUITE + '[[eval]]\nuse = "speedy"\n')
    record = runner.run(wanda, lambda *_: None, "inline")
    assert record.status == "ok", record.reason
    assert record.scores["speedy"].value == 2.0
    assert record.scores["speedy"].conditions["tokenizer"] == "none"


def test_a_shape_of_the_command_line() -> None:
    suite = narrowed(load_suite("speed-cpu"), ["shape:tiny-llama", "shape:7b"], ["wanda"])
    assert [entry.shape for entry in suite.model] == ["tiny-llama", "7b"]
    assert with_dense(suite) == suite


# Through the program


def test_runs_of_a_shape_are_done_shown_and_compared_as_others(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path)
    ran = command("run", "costs.toml", "--executor", "inline", "--keep-masks")
    assert ran.code == 0, ran
    assert "tiny-llama (random weights) wanda 0.5" in ran.out
    assert "2 ok, 0 refused, 0 failed" in ran.out
    paths = sorted(Path("results").glob("*/*/*.json"))
    found = [RunRecord.model_validate({k: v for k, v in json.loads(p.read_text()).items() if k != "checksum"}) for p in paths]
    assert [(record.status, record.scores) for record in found] == [("ok", {}), ("ok", {})]
    assert all(record.audit is not None and record.audit.removed == 64512 for record in found)
    shown = command("show", found[0].id)
    assert (shown.code, "of costs only: the weights are random" in shown.out) == (0, True)
    assert "scores them again" not in shown.out
    assert "0 to do, 2 done" in command("run", "costs.toml", "--dry-run").out
    assert "tiny-llama (random weights)" in command("report", "--csv", "rows.csv").out
    assert command("export", "set").code == 0
    assert command("status").code == 0
    assert "they share no score" in command("compare", found[0].id, found[1].id).err
    assert command("submit", "--out", "bundle.zip").code == 0
    ran = command("verify", "bundle.zip", "--results", "elsewhere")
    assert (ran.code, "2 records checked" in ran.out) == (0, True), ran
    ran = command("rescore", "--all", "--eval", "perplexity[data=wikitext2]")
    assert "the weights of a shape are random" in ran.out + ran.err


def test_a_record_that_calls_a_model_a_shape_is_found(tmp_path: Path) -> None:
    """Or the other way round: its scores would be left out of tables, or random weights would be ranked."""
    real, store = make_record(make_spec("wanda")), ResultStore(tmp_path / "results", print)
    named = changed(real, {"source": "shape:tiny-llama"})
    without = changed(real, {"tokenizer": "none"})
    whole = changed(real, {"source": "shape:tiny-llama", "tokenizer": "none"})
    fields = [
        {finding.field for finding in consistency.shape(Entry(Stored("here/m/x.json", record), store))}
        for record in (real, named, without, whole)
    ]
    origin = "spec.recipe.calibration.origin"
    [score] = real.scores
    quality = f"scores.{score}"
    assert fields == [set(), {"spec.model.source", origin, quality}, {"spec.model.source"}, {origin, quality}]
    assert build_board([Stored("here/m/x.json", whole)]).sections == ()
    assert build_board([Stored("here/m/x.json", real)]).sections
    timed = real.scores[score].model_copy(update={"conditions": {"eval": "speed"}})
    assert build_board([Stored("here/m/x.json", whole.model_copy(update={"scores": {"speed": timed}}))]).sections


def test_floors_that_cannot_be_are_found(tmp_path: Path) -> None:
    record, store = make_record(make_spec("wanda")), ResultStore(tmp_path / "results", print)
    said = []
    for floor in (-1.0, 2.0, 2.09, 2.11):
        steps = [record.steps[0].model_copy(update={"phases": {"scoring": 2.0}, "floors": {"scoring": floor}})]
        found = consistency.costs(Entry(Stored("here/m/x.json", record.model_copy(update={"steps": steps})), store))
        said.append([(each.field, each.level) for each in found if "floors" in each.field])
    assert said == [[("steps.0.floors.scoring", "error")], [], [], [("steps.0.floors.scoring", "warning")]]


def test_a_virtual_run_takes_less_than_its_weights(tmp_path: Path) -> None:
    shape = changed(make_record(make_spec("wanda")), {"source": "shape:tiny-llama", "tokenizer": "none"})
    step = shape.steps[0].model_copy(update={"peak_host_bytes": 1, "peak_device_bytes": None})
    drawn = step.model_copy(update={"notes": {consistency.VIRTUAL: "drawn"}})
    store = ResultStore(tmp_path / "results", print)
    said = []
    for each in (step, drawn):
        record = shape.model_copy(update={"steps": [each]})
        said.append([finding.field for finding in consistency.costs(Entry(Stored("here/m/x.json", record), store))])
    assert said == [["steps.0.peak_host_bytes"], []]


def changed(record: RunRecord, model: dict[str, str]) -> RunRecord:
    """A record whose model says something else of itself."""
    spec = record.spec.model_copy(update={"model": record.spec.model.model_copy(update=model)})
    return record.model_copy(update={"spec": spec})


REFUSED = {
    "eval": (["eval", "shape:tiny-llama", "--eval", "generation"], "to evaluate shape:tiny-llama would mean nothing"),
    "prune": (
        ["prune", "shape:tiny-llama", "--step", "magnitude", "--target", "0.5", "--out", "x"],
        "to write a pruned shape:tiny-llama would mean nothing",
    ),
    "keep": (["run", "speed-cpu", "--dry-run", "--keep-weights"], "--keep-weights is not for shape:small-llama"),
    "unknown": (["run", "speed-cpu", "--dry-run", "--model", "shape:llama-7b"], "there is no shape 'llama-7b'"),
    "quality": (["run", "quickstart", "--dry-run", "--model", "shape:tiny-llama"], "random weights have costs only"),
}


@pytest.mark.parametrize(("words", "said"), cases(REFUSED))
def test_what_no_shape_is_for_is_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = command(*words)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())

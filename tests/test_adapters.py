"""Adapters that stay apart: attached, saved in PEFT's format, read back by every command that takes a model."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Bench, Ran
from transformers import AutoModelForCausalLM

from prunebench.errors import ContractError, ModelError
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Job, Pruner, option
from prunebench.testing import FAMILIES, random_tokens, tiny_model
from prunebench.toolkit import keep_mask, magnitude_scores, walk
from prunebench.toolkit.adapter_files import load_adapters, save_adapters
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.loading import identify, resolve_model


@dataclass
class Apart(Pruner):
    """Attaches random factors to every third matrix, of another rank and scale each time."""

    name: ClassVar[str] = "apart"

    prunes: bool = option(True, "whether it removes something too")

    def changes(self) -> Changes:
        return Changes.ADAPTER | (Changes.MASK_GROWS if self.prunes else Changes.NOTHING)

    def prune(self, job: Job) -> None:
        for block in walk(job) if self.prunes else ():
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))
        attach_some(job.anatomy)


def attach_some(anatomy: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index, matrix in enumerate(anatomy.matrices[::3]):
        outputs, inputs = matrix.shape
        rank = 2 if index == 1 else 3
        down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        anatomy.adapters.attach(matrix, down, up, 0.5 if index % 2 else 0.25)


def logits(anatomy: ModelAnatomy) -> torch.Tensor:
    with torch.no_grad():
        return anatomy.model(random_tokens(anatomy.model)).logits


@pytest.fixture
def pruned(bench: Bench, tmp_path: Path, register: Callable[..., None], command: Callable[..., Ran]) -> Path:
    """A pruned model with an adapter, as the command has written it."""
    register(Apart)
    arguments = "--target 0.5 --dtype float32 --device cpu"
    ran = command("prune", bench.model, "--step", "apart", "--out", tmp_path / "out", *arguments.split())
    assert (ran.code, ran.err) == (0, "")
    return tmp_path / "out"


def record_of(path: Path) -> RunRecord:
    data = json.loads((path / "prunebench.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    return RunRecord.model_validate({key: value for key, value in data.items() if key != "checksum"})


def perplexity(command: Callable[..., Ran], model: Path, bench: Bench) -> float:
    evaluation = f"perplexity[data={bench.folder / 'evaluation.txt'},window=32]"
    ran = command("eval", model, "--eval", evaluation, "--json", "--dtype", "float32", "--device", "cpu")
    assert (ran.code, ran.err) == (0, "")
    return float(json.loads(ran.out)["scores"]["perplexity"]["value"])


def test_adapters_add_the_product_of_their_factors() -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    matrix, other = anatomy.matrices[0], anatomy.matrices[4]
    inputs = torch.randn(2, 5, matrix.shape[1], generator=torch.Generator().manual_seed(1))
    before = matrix.module(inputs)
    attach_some(anatomy)
    [adapter] = [adapter for adapter in anatomy.adapters if adapter.matrix == matrix.name]
    expected = before + 0.25 * inputs @ (adapter.up @ adapter.down).t()
    torch.testing.assert_close(matrix.module(inputs), expected)
    assert anatomy.adapters.parameters == sum(a.up.numel() + a.down.numel() for a in anatomy.adapters)
    with pytest.raises(ContractError, match="does not fit"):
        anatomy.adapters.attach(other, adapter.down, adapter.up[:-1], 1.0)
    anatomy.adapters.detach()
    assert torch.equal(matrix.module(inputs), before)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mixtral", "qwen3-moe")])  # experts have no names there
def test_adapters_are_read_back_with_the_same_bits(family: str, tmp_path: Path) -> None:
    first, second = find_anatomy(tiny_model(family)), find_anatomy(tiny_model(family))
    dense = logits(first)
    attach_some(first)
    save_adapters(first, tmp_path)
    load_adapters(second, tmp_path)
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(dense, logits(second))


def test_the_dense_block_has_the_adapters_of_before_the_first_step(tmp_path: Path) -> None:
    anatomy = find_anatomy(tiny_model())
    block, inputs = anatomy.blocks[0], torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1))
    attach_some(anatomy)  # to the last matrix of the block, too
    assert anatomy.matrices[6] in block.matrices
    before, dense = block.module.mlp.down_proj(inputs), DenseWeights(anatomy)
    attach_some(anatomy, seed=1)
    assert not torch.allclose(block.module.mlp.down_proj(inputs), before)
    assert torch.equal(dense.block(block).mlp.down_proj(inputs), before)
    assert len(anatomy.adapters) == 2 * len(anatomy.matrices[::3])


def test_several_adapters_of_a_matrix_are_saved_as_one(tmp_path: Path) -> None:
    first, second = find_anatomy(tiny_model()), find_anatomy(tiny_model())
    attach_some(first)
    attach_some(first, seed=1)
    first.adapters.attach(first.matrices[0], torch.ones(1, 16), torch.ones(24, 1), 3.0)
    save_adapters(first, tmp_path)
    load_adapters(second, tmp_path)
    assert len(second.adapters) == len(first.matrices[::3])
    assert second.adapters.parameters == first.adapters.parameters
    torch.testing.assert_close(logits(first), logits(second))


def test_the_files_are_what_peft_reads(tmp_path: Path) -> None:
    anatomy = find_anatomy(tiny_model("gpt2"))
    attach_some(anatomy)
    save_adapters(anatomy, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = [matrix.name for matrix in anatomy.matrices[::3]]
    assert names == ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_fc"]
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 0.75,
        "lora_dropout": 0.0,
        "target_modules": sorted(names),
        "rank_pattern": {names[1]: 2},
        "alpha_pattern": {names[1]: 1.0},
        "fan_in_fan_out": True,
        "bias": "none",
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (3, 16),
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (48, 3),
        "base_model.model.transformer.h.0.mlp.c_proj.lora_A.weight": (2, 40),
        "base_model.model.transformer.h.0.mlp.c_proj.lora_B.weight": (16, 2),
        "base_model.model.transformer.h.1.mlp.c_fc.lora_A.weight": (3, 16),
        "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight": (40, 3),
    }


def test_prune_writes_what_eval_reads(pruned: Path, bench: Bench, command: Callable[..., Ran]) -> None:
    record = record_of(pruned)
    tensors = load_file(pruned / "adapter" / "adapter_model.safetensors")
    assert record.extra_parameters == sum(tensor.numel() for tensor in tensors.values())
    for path in (pruned / "adapter").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with_adapter = perplexity(command, pruned, bench)
    plain = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)  # what knows nothing of adapters still loads it
    assert isinstance(plain, torch.nn.Module)
    identity = identify(resolve_model(str(pruned), [Path()]))
    (pruned / "adapter").rename(pruned / "apart")
    assert abs(perplexity(command, pruned, bench) / with_adapter - 1) > 0.01
    assert identify(resolve_model(str(pruned), [Path()])).weights != identity.weights


@pytest.mark.parametrize("step", ["apart", "apart[prunes=false]"])
def test_perplexity_in_memory_is_that_of_what_is_read_back(
    step: str, bench: Bench, tmp_path: Path, register: Callable[..., None], command: Callable[..., Ran]
) -> None:
    """In memory: by the record of a run of the same method."""
    register(Apart)
    steps = ["magnitude[group=row]", step] if "false" in step else [step]
    suite = tmp_path / "small.toml"
    suite.write_text(bench.suite_text(" + ".join(steps)))
    ran = command("run", suite, "--results", tmp_path / "results", "--executor", "inline", "--machine", "here")
    assert (ran.code, ran.err) == (0, "")
    [path] = (tmp_path / "results").rglob("*apart*.json")
    record = record_of(path)
    given = [argument for one in steps for argument in ("--step", one)]
    target = record.spec.target
    ran = command("prune", bench.model, *given, "--out", tmp_path / "out", "--target", target, "--dtype", "float32")
    assert (ran.code, ran.err) == (0, "")
    ran = command("eval", tmp_path / "out", "--eval", bench.perplexity, "--json", "--dtype", "float32", "--device", "cpu")
    found = json.loads(ran.out)["scores"]["perplexity"]["value"]
    assert found == pytest.approx(record.scores["perplexity"].value, rel=1e-6)


def test_a_run_on_such_a_model_keeps_and_counts_the_adapter(
    pruned: Path, bench: Bench, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """Another adapter on top of the first, and the two saved as one."""
    extra = record_of(pruned).extra_parameters
    before = perplexity(command, pruned, bench)
    options = ("--target", "0.6", "--dtype", "float32", "--device", "cpu")
    ran = command("prune", pruned, "--step", "apart", "--out", tmp_path / "twice", *options)
    assert (ran.code, ran.err) == (0, "")
    twice = record_of(tmp_path / "twice")
    assert twice.extra_parameters == 2 * extra
    ran = command("prune", pruned, "--step", "dense", "--out", tmp_path / "same", "--target", "dense", "--dtype", "float32")
    assert (ran.code, ran.err) == (0, "")
    assert perplexity(command, tmp_path / "same", bench) == before
    assert perplexity(command, tmp_path / "twice", bench) != before


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "adapter_model.safetensors: "),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "settings cut": (lambda f: (f / "adapter_config.json").write_text('{"peft'), "adapter_config.json: "),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "no JSON object"),
    "another kind": (lambda f: edit(f, peft_type="IA3"), "peft_type is 'IA3', and only 'LORA' is supported"),
    "dora": (lambda f: edit(f, use_dora=True), "use_dora is True, and only plain LoRA"),
    "biases": (lambda f: edit(f, bias="all"), "bias is 'all'"),
    "another rank": (lambda f: edit(f, r=5), "has rank 5, and its factors are otherwise"),
    "no alpha": (lambda f: edit(f, lora_alpha="high", alpha_pattern={}), "has no number as the alpha"),
    "a stranger's pattern": (lambda f: edit(f, alpha_pattern={"conv": 2}), "'conv', which is none of its modules"),
    "a pattern of another shape": (lambda f: edit(f, rank_pattern=[3]), "rank_pattern is no JSON object"),
    "half": (lambda f: replace(f, lambda t: dict(list(t.items())[1:])), "has one factor only"),
    "empty": (lambda f: replace(f, lambda t: {}), "is empty"),
    "another key": (
        lambda f: replace(f, lambda t: t | {"lm_head.weight": torch.ones(1)}),
        "lm_head.weight, which is no factor",
    ),
    "another model's": (
        lambda f: replace(f, lambda t: {k.replace("layers.0", "layers.7"): v for k, v in t.items()}),
        "it belongs to model.layers.7",
    ),
    "another width": (
        lambda f: replace(f, lambda t: {k: v[:, :1].contiguous() if "lora_A" in k else v for k, v in t.items()}),
        "does not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_is_one_sentence(damage: str, tmp_path: Path, bench: Bench, command: Callable[..., Ran]) -> None:
    harm, says = DAMAGES[damage]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in bench.model.iterdir():
        (folder / path.name).symlink_to(path)
    source = resolve_model(str(folder), [Path()])
    anatomy = find_anatomy(AutoModelForCausalLM.from_pretrained(folder))
    attach_some(anatomy)
    save_adapters(anatomy, folder)
    identify(source)
    harm(folder / "adapter")
    with pytest.raises(ModelError) as caught:
        identify(source)
    assert says in str(caught.value)
    assert str(caught.value).startswith("the adapter of model cannot be used: ")
    ran = command("eval", folder, "--eval", f"perplexity[data={bench.folder / 'evaluation.txt'},window=32]")
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err
    assert str(tmp_path) not in ran.err

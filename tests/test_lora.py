"""Low-rank fine-tuning after pruning: what moves, what stays, and that it helps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, Ran
from transformers import PreTrainedModel

from prunebench.errors import OptionError
from prunebench.options import build, canonical, parse_step
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Job
from prunebench.targets import NM
from prunebench.testing import make_job, random_tokens, tiny_model
from prunebench.testing.trial import added, contents, differing
from prunebench.toolkit import keep_mask, magnitude_scores
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.roles import rows_with
from prunebench_pruners.lora import Lora

QUICK: dict[str, Any] = {"steps": 4, "batch": 3, "learning_rate": 0.01, "rank": 3, "alpha": 6.0}
FUSED = {"llama": 2, "opt": 2, "phi3": 1, "gpt2": 1, "gpt-neox": 1, "falcon": 1}
"""Families, and in how many matrices of a block query and value are."""


def pruned(family: str, dtype: torch.dtype = torch.float32) -> ModelAnatomy:
    anatomy = find_anatomy(tiny_model(family, dtype=dtype))
    for matrix in anatomy.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), NM(2, 4), "row"))
    return anatomy


def tuned(anatomy: ModelAnatomy, notes: dict[str, Any] | None = None, batch_size: int = 2, **options: Any) -> Job:
    method = Lora(**QUICK | options)
    job = make_job(method, anatomy.model, NM(2, 4), anatomy=anatomy, notes=notes, batch_size=batch_size)
    method.prune(job)
    return job


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(model), use_cache=False).logits


def loss(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(tokens, labels=tokens, use_cache=False).loss)


@pytest.mark.parametrize("family", FUSED)
def test_apart_leaves_the_weights_and_changes_only_the_rows_asked_for(family: str) -> None:
    anatomy = pruned(family)
    before, found = contents(anatomy.model), logits(anatomy.model)
    tuned(anatomy)
    assert differing(before, contents(anatomy.model)) == []
    assert not torch.allclose(logits(anatomy.model), found, atol=1e-4)
    assert len(anatomy.adapters) == FUSED[family] * len(anatomy.blocks)
    shapes = {matrix.name: matrix for matrix in anatomy.matrices}
    for adapter in anatomy.adapters:
        rows = rows_with(["query", "value"], shapes[adapter.matrix], anatomy.model.config)
        assert bool((adapter.up[rows] != 0).any(dim=1).all())
        assert not bool(adapter.up[~rows].any())
        assert adapter.scale == 2.0
        assert adapter.down.shape[0] == 3


@pytest.mark.parametrize("family", FUSED)
def test_masked_keeps_zeros_and_changes_only_the_rows_asked_for(family: str) -> None:
    anatomy = pruned(family)
    before = {matrix.name: matrix.weight.clone() for matrix in anatomy.matrices}
    everything = contents(anatomy.model)
    tuned(anatomy, merge="masked", roles=("value", "down"))
    assert len(anatomy.adapters) == 0
    weights = set()
    for matrix in anatomy.matrices:
        rows = rows_with(["value", "down"], matrix, anatomy.model.config)
        keep = anatomy.masks[matrix.name]
        assert not bool(matrix.weight[~keep].any())
        moved = matrix.weight != before[matrix.name]
        assert not bool(moved[~rows].any())
        assert bool(moved[rows][keep[rows]].float().mean() > 0.9) or not rows.any()
        weights.add(f"{matrix.name}.weight")
    assert set(differing(everything, contents(anatomy.model))) <= weights


@pytest.mark.parametrize("merge", ["apart", "masked"])
def test_zero_steps_are_the_identity(merge: str) -> None:
    anatomy = pruned("llama")
    before, found = contents(anatomy.model), logits(anatomy.model)
    tuned(anatomy, merge=merge, steps=0)
    assert len(anatomy.adapters) == 0
    assert differing(before, contents(anatomy.model)) == []
    assert torch.equal(logits(anatomy.model), found)


@pytest.mark.parametrize("merge", ["apart", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_falls(merge: str, dtype: torch.dtype) -> None:
    """In 16 bits too, where the adapters are of 32."""
    anatomy, notes = pruned("qwen2", dtype), {}
    options: dict[str, Any] = {"steps": 30, "batch": 7, "learning_rate": 0.02, "roles": ("query", "value", "up")}
    before = loss(anatomy.model, random_tokens(anatomy.model, seed=2))
    job = tuned(anatomy, notes, merge=merge, **options)
    after = loss(anatomy.model, job.training)
    assert after < 0.8 * before
    curve = notes["loss_curve"]
    assert curve[0] == pytest.approx(before, rel=0.02)
    assert curve[-1] < 0.8 * curve[0]
    assert notes["tokens_seen"] == 30 * job.training.numel()
    assert ("merge_logit_change" in notes) == (merge == "masked")
    if merge == "masked" and dtype == torch.float32:
        assert notes["merge_logit_change"] < 1e-5
    assert {adapter.up.dtype for adapter in anatomy.adapters} <= {torch.float32}


def test_the_gradient_is_that_of_the_formula() -> None:
    """One step without warm-up to speak of: Adam's first step is the learning rate along the gradient's sign."""
    anatomy = pruned("gpt2", torch.float64)
    job = tuned(anatomy, steps=1, batch=7, learning_rate=1e-3, roles=("value",))
    twin = pruned("gpt2", torch.float64)
    matrix = twin.matrices[0]
    adapter = next(iter(anatomy.adapters))
    weight = matrix.module.weight
    tokens = job.training
    logits_ = twin.model(tokens, use_cache=False).logits[:, :-1]
    value = torch.nn.functional.cross_entropy(logits_.flatten(0, 1), tokens[:, 1:].flatten())
    gradient = matrix.oriented(torch.autograd.grad(value, weight)[0]) @ adapter.down.t()
    rows = rows_with(["value"], matrix, twin.model.config)
    torch.testing.assert_close(adapter.up[rows], -1e-3 * gradient[rows].sign(), rtol=1e-3, atol=0)


def test_batches_of_the_job_do_not_matter() -> None:
    found = []
    for batch_size in (1, 2, 3):
        anatomy = pruned("gpt-neox", torch.float64)
        tuned(anatomy, batch_size=batch_size)
        found.append(added(anatomy))
    for other in found[1:]:
        for name, product in found[0].items():
            torch.testing.assert_close(other[name], product, rtol=1e-6, atol=1e-9)


def test_what_it_declares_and_refuses() -> None:
    assert Lora().changes() == Changes.ADAPTER
    assert Lora(merge="masked").changes() == Changes.KEPT_WEIGHTS
    facts = find_anatomy(tiny_model("gpt2")).facts(NM(2, 4))
    assert Lora().refuses(facts) is None
    assert "plays the role gate" in (Lora(roles=("gate",)).refuses(facts) or "")
    step = parse_step("lora[roles=query+key,rank=2,merge=masked]")
    assert canonical("lora", build(Lora, step)) == "lora[roles=query+key,rank=2,merge=masked]"
    for wrong in ("roles=", "roles=query+query", "roles=head", "rank=0", "steps=-1", "merge=dense"):
        with pytest.raises(OptionError):
            build(Lora, parse_step(f"lora[{wrong}]"))


@pytest.mark.parametrize("merge", ["apart", "masked"])
def test_by_the_commands(merge: str, bench: Bench, tmp_path: Path, command: Callable[..., Ran]) -> None:
    """Saved and read back, the model has the perplexity that it had in memory, and what is extra is counted."""
    lora = f"lora[steps=3,batch=2,learning_rate=0.02,merge={merge}]"
    training = f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 256\n"
    suite = tmp_path / "small.toml"
    suite.write_text(bench.suite_text(f"magnitude[group=row] + {lora}", "magnitude[group=row]", more=training))
    ran = command("run", suite, "--results", tmp_path / "results", "--executor", "inline", "--machine", "here")
    assert (ran.code, ran.err) == (0, "")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "results").glob("*/*/*.json")]
    for record in records:
        del record["checksum"]
    by_steps = {len(record["steps"]): RunRecord.model_validate(record) for record in records}
    trained, plain = by_steps[2], by_steps[1]
    query, value = 16 + 16, 16 + 8  # outputs and inputs
    assert trained.extra_parameters == (2 * 8 * (query + value) if merge == "apart" else 0)
    given = ["--step", "magnitude[group=row]", "--step", lora, "--training", bench.training, "--training-tokens", 256]
    out = tmp_path / "out"
    ran = command("prune", bench.model, *given, "--out", out, "--target", "0.5", "--length", 16, "--batch-size", 4)
    assert (ran.code, ran.err) == (0, "")
    assert (out / "adapter").is_dir() == (merge == "apart")
    ran = command("eval", out, "--eval", bench.perplexity, "--json")
    found = json.loads(ran.out)["scores"]["perplexity"]["value"]
    assert found == pytest.approx(trained.scores["perplexity"].value, rel=1e-6)
    assert found != pytest.approx(plain.scores["perplexity"].value, rel=1e-6)

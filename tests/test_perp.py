"""PERP against slow loops in float64 with explicit weights, what must stay as it is, and the records it leaves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support import Bench, fingerprint, same_bits
from test_golden import GOLDEN, golden_job
from test_retrain import PlainAdam
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunebench.bench import runner
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Needs
from prunebench.targets import NM
from prunebench.testing import make_job, random_tokens, tiny_model
from prunebench.testing.trial import contents, differing, ties
from prunebench.toolkit import keep_mask, magnitude_scores
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.quiet import quiet_transformers
from prunebench_pruners.perp import Perp

LOW_RANK = ("mask_lora", "scale_lora", "lora_prune")
SUBSETS = ("biases", "norms", "biases+norms", "head", *LOW_RANK, "all")
QUICK: dict[str, Any] = {"steps": 3, "batch": 2, "learning_rate": 0.01, "rank": 3, "alpha": 6.0}
RATES = (0.01, 0.01, 0.005)
"""Of three steps: one of warm-up, then from the top down to zero after the last."""

every_mode_and_subset = pytest.mark.parametrize(
    ("mode", "subset"), [*(("retrain", s) for s in SUBSETS), *(("reconstruct", s) for s in SUBSETS if s != "head")]
)

Weights = dict[str, torch.Tensor]


def pruned(family: str = "llama", dtype: torch.dtype = torch.float64) -> tuple[ModelAnatomy, DenseWeights]:
    """A tiny model at 2:4 with one survivor in each matrix that is zero all the same; and its dense weights."""
    anatomy = find_anatomy(tiny_model(family, dtype=dtype))
    dense = DenseWeights(anatomy)
    for matrix in anatomy.matrices:
        mask = keep_mask(magnitude_scores(matrix.weight), NM(2, 4))
        weight = matrix.weight.clone()
        row, column = mask.nonzero()[3].tolist()
        weight[row, column] = 0
        matrix.write(weight, mask)
    return anatomy, dense


def recovered(anatomy: ModelAnatomy, dense: DenseWeights | None = None, **options: Any) -> dict[str, Any]:
    """Take the step; returns its notes."""
    notes: dict[str, Any] = {}
    method = Perp(**QUICK | options)
    method.prune(make_job(method, anatomy.model, NM(2, 4), anatomy=anatomy, dense=dense, notes=notes))
    return notes


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(model), use_cache=False).logits


# Against slow loops


def plain_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Token by token: minus the log of the probability of what came next."""
    logs = torch.log_softmax(logits.double(), dim=-1)
    return torch.stack([-logs[i, t, tokens[i, t + 1]] for i in range(len(tokens)) for t in range(tokens.shape[1] - 1)]).mean()


class Slow:
    """A model, or a block, whose weights are made of explicit leaves for each call."""

    def __init__(
        self,
        root: nn.Module,
        subset: str,
        matrices: Mapping[str, tuple[bool, torch.Tensor]],
        generator: torch.Generator | None = None,
    ) -> None:
        """`matrices`: by the module's name in the root, whether it is stored transposed, and the mask [outputs, inputs]."""
        self.root, self.subset, self.matrices = root, subset, matrices
        self.generator = generator or torch.Generator().manual_seed(0)
        self.weights: Weights = {name: p.detach().clone() for name, p in root.named_parameters()}
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if subset in LOW_RANK or subset == "head":
            for name in ["lm_head"] if subset == "head" else matrices:
                self.factors[name] = self.start(name)
            self.leaves = [factor for pair in self.factors.values() for factor in pair]
        else:
            self.leaves = [self.weights[name] for name in self.weights if self.trained(name)]
        for leaf in self.leaves:
            leaf.requires_grad_(True)

    def start(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, inputs = self.oriented(name).shape
        if self.subset == "scale_lora":
            return tuple(torch.full(shape, 3**-0.5, dtype=torch.float64) for shape in ((3, inputs), (outputs, 3)))  # type: ignore[return-value]
        drawn = torch.rand(3, inputs, generator=self.generator, dtype=torch.float64)
        return (drawn * 2 - 1) / math.sqrt(inputs), torch.zeros(outputs, 3, dtype=torch.float64)

    def oriented(self, name: str) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return weight.t() if self.matrices.get(name, (False,))[0] else weight

    def trained(self, name: str) -> bool:
        module, _, kind = name.rpartition(".")
        norm = kind == "weight" and ("norm" in module or "ln_" in module)
        matrix = kind == "weight" and module in self.matrices
        wanted = {"biases": kind == "bias", "norms": norm, "biases+norms": kind == "bias" or norm}
        return wanted.get(self.subset, kind == "bias" or norm or matrix)

    def made(self, merged: bool = False) -> Weights:
        """All weights as the call uses them, or as they are kept."""
        found = dict(self.weights)
        for name, (down, up) in self.factors.items():
            transposed, mask = self.matrices.get(name, (False, torch.ones(1, dtype=torch.bool)))
            weight, product = self.oriented(name), up @ down
            if self.subset == "scale_lora":
                changed = weight * product
            else:
                inside = mask if self.subset == "mask_lora" or (merged and self.subset == "lora_prune") else 1.0
                changed = weight + 2.0 * inside * product
            found[f"{name}.weight"] = changed.t() if transposed else changed
        return found

    def learn(self, losses: Iterator[Callable[[Weights], torch.Tensor]]) -> Weights:
        """Three steps; the weights to keep."""
        adam = PlainAdam([leaf.detach() for leaf in self.leaves])
        for rate, loss in zip(RATES, losses, strict=False):
            gradients = list(torch.autograd.grad(loss(self.made()), self.leaves))
            if not self.factors:
                names = [name for name in self.weights if self.trained(name)]
                for index, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                    if name.removesuffix(".weight") in self.matrices:
                        transposed, mask = self.matrices[name.removesuffix(".weight")]
                        gradients[index] = gradient * (mask.t() if transposed else mask)
            adam.step(gradients, rate)
        return {name: weight.detach() for name, weight in self.made(merged=True).items()}


@pytest.mark.parametrize(
    ("family", "subset"), [(f, s) for f in ("llama", "gpt2") for s in SUBSETS if (f, s) != ("llama", "biases")]
)
def test_retraining_is_the_slow_loop(family: str, subset: str) -> None:
    """Three steps of two windows; every number of the model."""
    anatomy, _ = pruned(family)
    twin = copy.deepcopy(anatomy.model)
    matrices = {m.name: (family == "gpt2", anatomy.masks[m.name]) for m in anatomy.matrices}
    if subset == "head":
        twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    before = fingerprint(twin)
    recovered(anatomy, subset=subset)
    slow = Slow(twin, subset, matrices)
    windows = random_tokens(twin, seed=2)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(500))

    def losses() -> Iterator[Callable[[Weights], torch.Tensor]]:
        for chosen in order.split(2):
            batch = windows[chosen]
            yield lambda weights, batch=batch: plain_loss(
                functional_call(twin, weights, (batch,), {"use_cache": False}).logits, batch
            )

    wanted, found = slow.learn(losses()), dict(anatomy.model.named_parameters())
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            found[name].detach(), weight, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = {name for name, weight in wanted.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name, parameter in found.items() if not same_bits(parameter.detach(), before[name])} != set()


def block_calls(model: PreTrainedModel, index: int, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the block reads in the model's own forward: hidden states [samples, length, hidden] and its other arguments."""
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], kwargs))

    handle = model.model.layers[index].register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("subset", ["all", "norms", "mask_lora", "scale_lora", "lora_prune"])
def test_reconstruction_is_the_slow_loop(subset: str) -> None:
    """Inputs from the pruned and reconstructed blocks before, targets from the dense block on the same inputs.

    Three steps of two of the seven samples in order; each block starts again with the first.
    """
    dense = tiny_model("llama", dtype=torch.float64)
    anatomy, weights = pruned()
    twin = copy.deepcopy(anatomy.model)
    recovered(anatomy, weights, subset=subset, mode="reconstruct")
    tokens, generator = random_tokens(twin, seed=1), None
    for index, block in enumerate(twin.model.layers):
        prefix = f"model.layers.{index}."
        masks = {name.removeprefix(prefix): (False, mask) for name, mask in anatomy.masks.items() if name.startswith(prefix)}
        names = {m.name.removeprefix(prefix) for m in anatomy.matrices if m.name.startswith(prefix)}
        slow = Slow(block, subset, {name: masks[name] for name in dict(block.named_modules()) if name in names}, generator)
        generator = slow.generator
        hidden, others = block_calls(twin, index, tokens)
        with torch.no_grad():
            wanted = dense.model.layers[index](hidden, **others)

        def loss(
            weights: Weights, rows: slice, block: nn.Module, hidden: torch.Tensor, wanted: torch.Tensor, others: Any
        ) -> Any:
            found = functional_call(block, weights, (hidden[rows],), others)
            return (found - wanted[rows]).pow(2).mean()

        rows = [slice(0, 2), slice(2, 4), slice(4, 6)]
        made = slow.learn(partial(loss, rows=r, block=block, hidden=hidden, wanted=wanted, others=others) for r in rows)
        before = fingerprint(block)
        block.load_state_dict(made)
        found = dict(anatomy.model.model.layers[index].named_parameters())
        for name, weight in made.items():
            torch.testing.assert_close(
                found[name].detach(), weight, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert {name for name in made if not same_bits(found[name].detach(), before[name])} == {
            name for name in made if not torch.equal(made[name], before[name])
        }


@pytest.mark.parametrize("subset", [subset for subset in SUBSETS if subset not in ("head", "biases")])
def test_reconstruction_comes_nearer_to_the_dense_block(subset: str) -> None:
    """Each step on all samples, so that first and last loss may be compared; no training text is handed over."""
    anatomy, dense = pruned(dtype=torch.float32)
    notes = recovered(anatomy, dense, subset=subset, mode="reconstruct", steps=12, batch=7)
    first, last = notes["block_loss_of_the_first_batch"], notes["block_loss_of_the_last_batch"]
    assert len(first) == len(last) == 2
    assert all(after < 0.95 * before for before, after in zip(first, last, strict=True))
    assert notes["tokens_seen"] == 12 * 7 * 8
    assert notes["epochs"] == 12
    method = Perp(mode="reconstruct")
    assert method.needs() == Needs.WEIGHTS | Needs.SEED | Needs.CALIBRATION
    assert make_job(method, anatomy.model).training_tokens is None


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no real model: {GOLDEN} is not there")
@pytest.mark.parametrize("options", [{"mode": "reconstruct", "batch": 4}, {"batch": 8}], ids=str)
def test_a_trained_model_gets_better_on_other_text(options: dict[str, Any]) -> None:
    """stories260K at 2:4 by magnitude."""
    job = golden_job("stories260K", "2:4")
    others = job.calibration_tokens[24:, :64]
    for matrix in job.anatomy.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), NM(2, 4)))

    def loss() -> float:
        with torch.no_grad():
            return float(job.model(others, labels=others, use_cache=False).loss)

    before, notes = loss(), {}
    method = Perp(steps=25, learning_rate=3e-3, **options)
    method.prune(
        replace(
            job,
            needs=method.needs(),
            masks=job.anatomy.masks.copy(),
            note=notes.__setitem__,
            calibration_tokens=job.calibration_tokens[:16, :64],
            training_tokens=job.calibration_tokens[:24, :64],
            batch_size=8,
        )
    )
    assert loss() < before - 1.0


# What stays


@every_mode_and_subset
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_steps_are_the_identity(subset: str, mode: str, dtype: torch.dtype) -> None:
    """In every bit, and a tied head stays tied."""
    anatomy, dense = pruned("gpt2", dtype)
    before, found, tied = contents(anatomy.model), logits(anatomy.model), ties(anatomy.model)
    notes = recovered(anatomy, dense, subset=subset, mode=mode, steps=0)
    assert differing(before, contents(anatomy.model)) == []
    assert torch.equal(logits(anatomy.model), found)
    assert ties(anatomy.model) == tied != set()
    assert notes["tokens_seen"] == 0


@pytest.mark.parametrize("mode", ["retrain", "reconstruct"])
@pytest.mark.parametrize("subset", [*LOW_RANK, "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_the_recorded_one(subset: str, mode: str, dtype: torch.dtype) -> None:
    """A survivor that happens to be zero may move (but by a factor); what was removed never does."""
    anatomy, dense = pruned("gpt2", dtype)
    before = {matrix.name: matrix.weight.clone() for matrix in anatomy.matrices}
    masks = dict(anatomy.masks)
    recovered(anatomy, dense, subset=subset, mode=mode, learning_rate=0.03)
    for matrix in anatomy.matrices:
        mask, weight = masks[matrix.name], matrix.weight
        assert torch.equal(anatomy.masks[matrix.name], mask)
        assert not bool(weight[~mask].any())
        of_zero = mask & (before[matrix.name] == 0)
        assert int(of_zero.sum()) == 1
        assert bool(weight[of_zero].any()) == (subset != "scale_lora")
        assert float((weight != before[matrix.name])[mask].float().mean()) > 0.9


@pytest.mark.parametrize("mode", ["retrain", "reconstruct"])
@pytest.mark.parametrize("subset", ["norms", "biases", "biases+norms"])
def test_matrices_keep_their_bits(subset: str, mode: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        anatomy, dense = pruned("opt", dtype)
        before = contents(anatomy.model)
        recovered(anatomy, dense, subset=subset, mode=mode)
        names = differing(before, contents(anatomy.model))
        assert {name.rpartition(".")[2] for name in names if "norm" not in name} <= {"bias"}
        assert len(names) >= 4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("subset", ["mask_lora", "scale_lora", "head"])
def test_merging_moves_no_logit(family: str, subset: str) -> None:
    """Beyond 1e-5 of their range, in float32, after a training that moved them far."""
    anatomy, _ = pruned(family, torch.float32)
    before = logits(anatomy.model)
    notes = recovered(anatomy, subset=subset, steps=10, learning_rate=0.03)
    assert float((logits(anatomy.model) - before).abs().max()) > 0.01 * float(before.max() - before.min())
    assert 0 <= notes["merge_logit_change"] < 1e-5
    assert notes["changes_that_survive_the_cast"] > 0.99


def test_merging_under_a_mask_that_training_did_not_have_does() -> None:
    anatomy, _ = pruned(dtype=torch.float32)
    assert recovered(anatomy, subset="lora_prune", steps=10, learning_rate=0.03)["merge_logit_change"] > 1e-3


@every_mode_and_subset
def test_small_changes_are_seen_to_vanish_in_sixteen_bits(subset: str, mode: str) -> None:
    """The share that survives the cast: nearly none at a tiny rate, nearly all at a large one."""
    shares = []
    for rate in (1e-6, 0.03):
        anatomy, dense = pruned("opt", torch.bfloat16)
        before = contents(anatomy.model)
        notes = recovered(anatomy, dense, subset=subset, mode=mode, learning_rate=rate, rank=16)
        moved = sum(int((value != before.get(name, 0)).sum()) for name, value in contents(anatomy.model).items())
        assert (notes["changes_that_survive_the_cast"] > 0) == (moved > 0)
        assert subset == "lora_prune" or notes.get("merge_logit_change", 0.0) < 1e-5
        shares.append(notes["changes_that_survive_the_cast"])
    assert shares[0] < 0.1
    assert shares[1] > 0.7


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "qwen3"])
def test_a_tied_head_gets_a_weight_of_its_own(family: str, tmp_path: Path) -> None:
    """The embedding keeps its bits; saved and read back, the logits are the same."""
    anatomy, _ = pruned(family, torch.float32)
    model, count = anatomy.model, anatomy.total_parameters
    embedding, before = model.get_input_embeddings().weight.detach().clone(), logits(model)
    recovered(anatomy, subset="head")
    head = model.get_output_embeddings().weight
    assert same_bits(model.get_input_embeddings().weight.detach(), embedding)
    assert not torch.equal(head, embedding)
    assert anatomy.total_parameters == count + head.numel()
    found = logits(model)
    assert not torch.equal(found, before)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert ties(again) == set()
    assert torch.equal(logits(again), found)


def test_what_it_declares_and_refuses() -> None:
    assert Perp().needs() == Needs.WEIGHTS | Needs.SEED | Needs.TRAINING
    assert Perp("all").changes() == Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS
    facts = find_anatomy(tiny_model("llama")).facts(NM(2, 4), ("wanda",))
    assert [Perp(cast(Any, subset)).refuses(facts) is None for subset in SUBSETS] == [s != "biases" for s in SUBSETS]
    with pytest.raises(ValueError, match="in no block"):
        Perp("head", mode="reconstruct")
    assert "no biases" in (Perp("biases", mode="reconstruct").refuses(facts) or "")


# Records


def records_of(bench: Bench, folder: Path, *methods: str) -> list[RunRecord]:
    """The runs of a suite with training text, in this process."""
    training = f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 256\n"
    requests = bench.requests(folder, *methods, more=training)
    return [runner.run(request, lambda *_: None, "inline") for request in requests]


def test_biases_of_a_model_without_any_are_a_refusal(bench: Bench, tmp_path: Path) -> None:
    (record,) = records_of(bench, tmp_path, "magnitude + perp[subset=biases,steps=1]")
    assert (record.status, record.failure) == ("refused", None)
    assert record.reason == "a llama model has no biases, so there is nothing that subset=biases could train."
    assert record.steps == []


def test_what_a_record_keeps(bench: Bench, tmp_path: Path) -> None:
    """Of training and of reconstruction; the audit passes."""
    options = "steps=5,batch=3,learning_rate=0.01"
    methods = [f"magnitude + perp[subset={subset},{options}]" for subset in ("mask_lora", "all", "head")]
    records = records_of(bench, tmp_path, *methods, f"magnitude + perp[mode=reconstruct,{options}]")
    assert [record.status for record in records] == ["ok"] * 4, [record.reason for record in records]
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    matrices, total = find_anatomy(model).matrices, sum(parameter.numel() for parameter in model.parameters())
    low_rank = sum(16 * sum(matrix.shape) for matrix in matrices)
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    sizes = [low_rank, sum(math.prod(matrix.shape) for matrix in matrices) + norms, 16 * (300 + 16), low_rank]
    for record, size in zip(records, sizes, strict=True):
        notes = record.steps[1].notes
        assert notes["trained_parameters"] == size
        assert notes["trained_share"] == size / total
        assert notes["tokens_seen"] == 5 * 3 * 16
        assert notes["changes_that_survive_the_cast"] > 0.99
        json.dumps(notes, allow_nan=False)
    for record in records[:3]:
        notes = record.steps[1].notes
        assert notes["epochs"] == 5 * 3 / (256 / 16)
        assert len(notes["loss_curve"]) == 5
        assert all(4 < point < 8 for point in notes["loss_curve"])  # about log(300), of nothing but noise
        assert record.steps[1].phases["training"] > 0
    assert records[3].steps[1].notes["epochs"] == 5 * 3 / 4
    assert len(records[3].steps[1].notes["block_loss_of_the_last_batch"]) == 2

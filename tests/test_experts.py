"""Mixtures of experts: taken apart and put together, what each expert reads, starved ones, and whole runs on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import EXACT, Bench, Ran
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from prunebench.bench.costs import block_weights
from prunebench.bench.export import write_model
from prunebench.errors import Refused, WriteError
from prunebench.plugins import load_registry
from prunebench.results.store import ResultStore
from prunebench.spec import JobFacts, Pruner
from prunebench.targets import NM, Unstructured
from prunebench.testing import make_job, random_tokens, tiny_model
from prunebench.toolkit import Gram, InputNorm, Retraining, keep_mask, sample_gradients, walk, wanda_scores
from prunebench.toolkit.adapter_files import save_adapters
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.arranging import footprint
from prunebench.toolkit.audit import Finding, audit
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.experts import Experts, idle_weights, is_of_expert, names_in_files, take_apart, together
from prunebench.toolkit.loading import ModelSource, load_model, shape_of
from prunebench.toolkit.quiet import quiet_transformers
from prunebench.toolkit.stats import Statistic
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.lora import Lora
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

HALF = Unstructured(0.5)
SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 8},
    "olmoe": {},
    "deepseek_v3": LATENT
    | {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}


def fused(kind: str = "mixtral", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """A random model as transformers makes it, computing expert by expert."""
    with quiet_transformers(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SMALL | KINDS.get(kind, {}) | options)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.25 * torch.randn_like(parameter)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def logits(model: PreTrainedModel, samples: int = 3) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(random_tokens(model, samples)).logits
        return found


# Taking apart


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_apart_and_together_compute_the_same(kind: str, dtype: torch.dtype) -> None:
    model = fused(kind, dtype)
    wanted, state = logits(model), torch.get_rng_state()
    names = {name: tensor.clone() for name, tensor in model.named_parameters()}
    places = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    take_apart(model)
    assert torch.equal(state, torch.get_rng_state())
    assert {tensor.untyped_storage().data_ptr() for tensor in model.parameters()} == places  # views, no copies
    anatomy = find_anatomy(model)
    mine = [matrix for matrix in anatomy.matrices if is_of_expert(matrix.name)]
    assert len(mine) == 2 * 4 * sum(isinstance(module, Experts) for module in model.modules()) > 0
    torch.testing.assert_close(logits(model), wanted, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert torch.equal(logits(model), wanted)
    inside = list(model.parameters())
    with together(model):
        assert {name: tensor.shape for name, tensor in model.named_parameters()} == {n: t.shape for n, t in names.items()}
        assert all(torch.equal(tensor, names[name]) for name, tensor in model.named_parameters())
        assert torch.equal(logits(model), wanted)
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in inside]
    assert torch.equal(logits(model), wanted)


def test_routers_are_not_prunable_and_not_covered() -> None:
    model = fused("qwen2_moe")
    model.model.layers[0].mlp.gate = nn.Linear(16, 4, bias=False)  # as models with code of their own have it
    take_apart(model)
    anatomy = find_anatomy(model)
    last = {matrix.name.removeprefix("model.layers.0.") for matrix in anatomy.blocks[0].matrices}
    experts = {f"mlp.experts.{index}.{matrix}" for index in range(4) for matrix in ("gate_up_proj", "down_proj")}
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert last == experts | shared | {f"self_attn.{name}_proj" for name in "qkvo"}
    for matrix in anatomy.matrices:
        matrix.keep(torch.arange(matrix.shape[1]).expand(matrix.shape) % 2 == 0)
    left = anatomy.block_parameters - anatomy.prunable_parameters
    assert left >= 2 * (16 * 4 + 16)  # routers, and what weighs the shared expert
    finding: Finding = audit(anatomy, HALF, "row")
    assert finding.coverage == pytest.approx(1 - left / anatomy.block_parameters)


def test_a_step_through_the_experts_gives_the_gradients_of_the_fused_ones() -> None:
    model, apart = fused(dtype=torch.float64), fused(dtype=torch.float64)
    take_apart(apart)
    for each in (model, apart):
        each(random_tokens(each, 3)).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if ".experts." in name:
            prefix, _, last = name.rpartition(".")
            parts = [apart.get_parameter(f"{prefix}.{index}.{last}.weight").grad for index in range(4)]
            torch.testing.assert_close(torch.stack([part for part in parts if part is not None]), parameter.grad, **EXACT)
        else:
            torch.testing.assert_close(apart.get_parameter(name).grad, parameter.grad, **EXACT)


def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(MixtralConfig(**{k: SMALL[k] for k in list(SMALL)[:8]}))
        take_apart(model)
    anatomy = find_anatomy(model)
    assert {matrix.parameter.device.type for matrix in anatomy.matrices} == {"meta"}
    assert sum(is_of_expert(matrix.name) for matrix in anatomy.matrices) == 2 * 8 * 2
    taken = footprint(model, anatomy.blocks, 1, 8, 16)
    assert taken.block > 4 * 2 * (8 * (16**2 + 24**2) + 16**2)  # each expert has Gram matrices of its own


class Doubled(MixtralExperts):
    """Computes something else."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = super().forward(*args, **kwargs)
        return 2 * found


class Clamped(MixtralExperts):
    """The same for small inputs."""

    def forward(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        found: torch.Tensor = super().forward(hidden_states.clamp(-40, 40), *args)
        return found


class Biased(MixtralExperts):
    """Has a third parameter."""

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(4, 16))


@pytest.mark.parametrize("kind", [Doubled, Clamped, Biased])
def test_what_computes_something_else_is_still_refused(kind: type[MixtralExperts]) -> None:
    model = fused()
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    take_apart(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    share = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 3) / sum(
        p.numel() for n, p in model.named_parameters() if n.startswith("model.layers.")
    )
    with pytest.raises(Refused) as caught:
        find_anatomy(model)
    assert f"{share:.1%} of the block parameters" in str(caught.value)
    assert "model.layers.0.mlp.experts.gate_up_proj" in str(caught.value)


def test_transposed_layouts_are_still_refused() -> None:
    model = fused("gpt_oss", layer_types=["full_attention"] * 2)
    take_apart(model)
    with pytest.raises(Refused, match=r"model.layers.0.mlp.experts.gate_up_proj"):
        find_anatomy(model)


# Files


def pruned(kind: str, folder: Path) -> tuple[ModelAnatomy, ModelSource]:
    """A model that was saved, loaded and pruned, and where it was saved."""
    with quiet_transformers():
        fused(kind).save_pretrained(folder)
    source = ModelSource(folder, kind, "local")
    model = load_model(source, "float32")
    anatomy = find_anatomy(model)
    Magnitude().prune(make_job(Magnitude(), model, NM(2, 4), anatomy=anatomy))
    return anatomy, source


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_pruned_model_is_written_for_plain_transformers(kind: str, tmp_path: Path) -> None:
    anatomy, source = pruned(kind, tmp_path / "dense")
    model: Any = anatomy.model
    wanted = logits(model)
    write_model(model, source, anatomy, tmp_path / "pruned")
    assert torch.equal(logits(model), wanted)  # the handles are those of the model still
    assert all(matrix.module is model.get_submodule(matrix.name) for matrix in anatomy.matrices)
    with quiet_transformers():
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-5)
    for matrix in anatomy.matrices:
        prefix, _, last = matrix.name.rpartition(".")
        prefix, _, index = prefix.rpartition(".")
        owner = plain.get_submodule(prefix) if is_of_expert(matrix.name) else plain.get_submodule(matrix.name)
        stored = getattr(owner, last)[int(index)] if is_of_expert(matrix.name) else owner.weight
        assert torch.equal(stored, matrix.weight)
        assert int((stored == 0).sum()) >= stored.numel() // 2
    again = load_model(ModelSource(tmp_path / "pruned", "pruned", "local"), "float32")
    assert torch.equal(logits(again), wanted)
    written = {name for path in (tmp_path / "pruned").glob("*.safetensors") for name in load_file(path)}
    assert written == {name for path in (tmp_path / "dense").glob("*.safetensors") for name in load_file(path)}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_dense_weights_are_read_from_the_files(kind: str, tmp_path: Path) -> None:
    """In which experts are apart, and in halves."""
    anatomy, source = pruned(kind, tmp_path)
    dense = DenseWeights(find_anatomy(load_model(source, "float32")), tmp_path)
    assert not dense._copies
    plain = dict(fused(kind).named_parameters())
    found = find_anatomy(load_model(source, "float32"))
    dense = DenseWeights(found, tmp_path)
    for index in range(4):
        [matrix] = [m for m in found.matrices if m.name == f"model.layers.1.mlp.experts.{index}.gate_up_proj"]
        assert torch.equal(dense.weight(matrix), plain["model.layers.1.mlp.experts.gate_up_proj"][index])
        [matrix] = [m for m in found.matrices if m.name == f"model.layers.1.mlp.experts.{index}.down_proj"]
        assert torch.equal(dense.weight(matrix), plain["model.layers.1.mlp.experts.down_proj"][index])
    block = dense.block(found.blocks[1])
    assert torch.equal(block.mlp.gate.weight, plain["model.layers.1.mlp.gate.weight"])
    assert len(anatomy.masks) == len(found.matrices)


def test_names_in_files() -> None:
    assert next(names_in_files("norm.weight")) == (("norm.weight", None),)
    found = list(names_in_files("layers.0.mlp.experts.3.gate_up_proj.weight"))
    assert (("layers.0.mlp.experts.gate_up_proj", 3),) in found
    halves = [f"layers.0.block_sparse_moe.experts.3.{half}.weight" for half in ("w1", "w3")]
    assert ((halves[0], None), (halves[1], None)) in found


def test_a_token_meets_two_of_four_experts(tmp_path: Path) -> None:
    model = fused()
    model.config.save_pretrained(tmp_path)
    shape = shape_of(ModelSource(tmp_path, "mixtral", "local"))
    inside = {n: p.numel() for n, p in model.named_parameters() if n.startswith("model.layers.")}
    experts = sum(size for name, size in inside.items() if "experts" in name)
    rest = shape.multiplied - shape.vocabulary * shape.hidden - experts  # the final norm is counted with the blocks
    assert shape.active == block_weights(shape) == rest + experts // 2
    assert shape.prunable == sum(s for n, s in inside.items() if "norm" not in n and "gate.weight" not in n)
    take_apart(model)
    assert idle_weights(model, None) == experts // 2


# What experts read


class Seen(Statistic):
    """All that a matrix was shown, and in how many sequences."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self.rows, self.sequences = torch.zeros(0, width, dtype=dtype), 0

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        self.rows = torch.cat([self.rows, inputs])
        self.sequences += sequences

    def value(self) -> torch.Tensor:
        return torch.cat([self.rows, torch.full((1, self.width), self.sequences, dtype=self.dtype)])


def routed(model: PreTrainedModel, tokens: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By the router of a fused model: what its experts are given [tokens, hidden], and who each token is sent to."""
    found: list[Any] = []
    experts = model.model.layers[layer].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: found.append(args))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    [(hidden, sent, _)] = found
    return hidden, sent


def inputs_of(
    model: Any, tokens: torch.Tensor, layer: int, expert: int, least: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert's two matrices read: its own tokens, or all where they are fewer than columns."""
    hidden, sent = routed(model, tokens, layer)
    own = hidden[(sent == expert).any(dim=1)]
    first = own if len(own) >= own.shape[1] or not least else hidden
    experts = model.model.layers[layer].mlp.experts

    def inner(rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ experts.gate_up_proj[expert].t()).chunk(2, dim=1)
        product: torch.Tensor = nn.functional.silu(gate) * up
        return product.detach()

    second = inner(own)
    return [first, second if len(own) >= second.shape[1] or not least else inner(hidden)]


class Seeing:
    """Remembers which samples it was shown."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def __call__(self, first: int, outputs: torch.Tensor) -> None:
        self.samples += range(first, first + len(outputs))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_statistics_of_the_same_pass(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both as they are from a pass of their own, with what was seen; experts that read too few tokens get their second one."""
    monkeypatch.setattr(sample_gradients, "together", lambda device, batch_size, length: batch_size)
    notes: dict[str, Any] = {}
    model = tiny_model(family, dtype=torch.float64)
    job = make_job(WandaPlusPlus(), model, tokens=random_tokens(model, 5, 8), batch_size=2, notes=notes)
    for block in walk(job):
        replica, seen = block.replica(), Seeing()
        gradients, norms = replica.gradients_and(InputNorm, torch.linalg.vector_norm, see=seen)
        starved = dict(notes)
        notes.clear()
        for matrix, wanted in replica.gradients(torch.linalg.vector_norm).items():
            assert torch.equal(gradients[matrix], wanted)
        for matrix, wanted in replica.collect(InputNorm).items():
            torch.testing.assert_close(norms[matrix], wanted, **EXACT)
            assert not norms[matrix].requires_grad
        assert seen.samples == [0, 1, 2, 3, 4]
        assert starved == notes
        assert bool(starved) == (family == "mixtral")


@pytest.mark.parametrize("samples", [2, 16])
@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_statistics_are_of_the_routed_tokens(samples: int, batch_size: int) -> None:
    """The sequences that an expert had no part in count too, so norms of experts can be compared."""
    plain, model = fused(dtype=torch.float64), fused(dtype=torch.float64)
    take_apart(model)
    tokens, notes = random_tokens(model, samples, 8), {}
    job = make_job(Wanda(), model, tokens=tokens, batch_size=batch_size, notes=notes)
    starved = {}
    for block in walk(job):
        norms, grams, shown = block.collect(InputNorm, Gram, Seen)
        for index in range(4):
            own = int((routed(plain, tokens, block.index)[1] == index).any(dim=1).sum())
            for last, rows in zip(("gate_up_proj", "down_proj"), inputs_of(plain, tokens, block.index, index), strict=True):
                [matrix] = [m for m in block.matrices if m.name.endswith(f"experts.{index}.{last}")]
                assert len(shown[matrix]) - 1 == len(rows)
                assert bool((shown[matrix][-1] == samples).all())
                torch.testing.assert_close(norms[matrix], (rows.square().sum(0) / samples).sqrt(), **EXACT)
                torch.testing.assert_close(grams[matrix], 2 / samples * rows.t() @ rows, **EXACT)
                if own < matrix.shape[1]:
                    starved[matrix.name] = own
    assert notes.get("starved experts", {}) == starved
    assert bool(starved) == ("statistics of starved experts" in notes)
    assert (len(starved) == 16) == (samples == 2)


class Alone(Seen):
    """The same, of one sequence at a time."""

    by_sequence = True


def test_a_statistic_may_ask_for_one_sequence_at_a_time() -> None:
    """Those of which an expert read nothing are left out, whatever the batches are."""
    plain = fused(dtype=torch.float64)
    tokens = random_tokens(plain, 16, 8)
    hidden, sent = routed(plain, tokens, 0)
    own = (sent == 1).any(dim=1)
    found = []
    for batch_size in (1, 16):
        model = fused(dtype=torch.float64)
        take_apart(model)
        visits = walk(make_job(Wanda(), model, tokens=tokens, batch_size=batch_size))
        block = next(visits)
        [matrix] = [m for m in block.matrices if m.name.endswith("experts.1.gate_up_proj")]
        found.append(block.collect(Alone)[matrix])
    assert int(found[0][-1, 0]) == int(own.view(16, 8).any(dim=1).sum())
    for each in found:
        torch.testing.assert_close(each[-1], found[0][-1])
        torch.testing.assert_close(each[:-1].sum(0), hidden[own].sum(0), **EXACT)


def test_wanda_by_the_book_on_an_expert() -> None:
    plain, model = fused(dtype=torch.float64), fused(dtype=torch.float64)
    take_apart(model)
    tokens = random_tokens(model, 16, 8)
    found = masks_of_run(Wanda(), model, tokens)
    name, (first, second) = "model.layers.0.mlp.experts.1.", inputs_of(plain, tokens, 0, 1, least=False)
    for last, rows in (("gate_up_proj", first), ("down_proj", second)):
        weight = getattr(plain.model.layers[0].mlp.experts, last)[1]
        scores = weight.abs() * rows.square().sum(0).sqrt()
        lowest = scores.sort(dim=1, stable=True).indices[:, : scores.shape[1] // 2]
        assert torch.equal(found[name + last], torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False))


def test_sparsegpt_by_the_book_on_an_expert() -> None:
    """Column by column, with the inverse of what remains of the Gram matrix taken anew each time."""
    plain, model = fused(dtype=torch.float64), fused(dtype=torch.float64)
    take_apart(model)
    tokens = random_tokens(model, 16, 8)
    found = masks_of_run(SparseGpt(), model, tokens)
    rows, _ = inputs_of(plain, tokens, 0, 1, least=False)
    weight = plain.model.layers[0].mlp.experts.gate_up_proj[1].detach().clone()
    gram = 2 / 16 * rows.t() @ rows
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverses = [torch.linalg.inv(gram[column:, column:]) for column in range(len(gram))]
    importance = torch.stack([inverse[0, 0] for inverse in inverses])
    scores = (weight**2 / importance).flatten()
    gone = torch.zeros_like(scores, dtype=torch.bool)
    gone[scores.sort(stable=True).indices[: scores.numel() // 2]] = True
    gone = gone.view(weight.shape)
    for column, inverse in enumerate(inverses):
        error = torch.where(gone[:, column], weight[:, column], 0.0)
        weight[:, column:] -= error[:, None] * inverse[0] / importance[column]
    name = "model.layers.0.mlp.experts.1.gate_up_proj"
    assert torch.equal(found[name], ~gone)
    torch.testing.assert_close(model.get_parameter(f"{name}.weight").detach(), weight * ~gone, rtol=1e-8, atol=1e-10)


def masks_of_run(pruner: Pruner, model: PreTrainedModel, tokens: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    anatomy = find_anatomy(model)
    pruner.prune(make_job(pruner, model, tokens=tokens, anatomy=anatomy, **options))
    audit(anatomy, HALF, pruner.audit_group(), explained=True)
    return dict(anatomy.masks)


def forsaken() -> PreTrainedModel:
    """A model whose routers send every token to the first or the second expert, and none to the others."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
        with torch.no_grad():
            layer.mlp.gate.weight[1] = -layer.mlp.gate.weight[0]
            layer.mlp.gate.weight[2:] = 0
    return model


FEW: dict[str, Any] = {"steps": 1, "batch": 2}
CHEAP: dict[str, dict[str, Any]] = {
    "imp": {"rounds": 1, "retrain": Retraining("all", **FEW)},
    "lora": FEW,
    "perp": FEW,
    "wanda++": {"rounds": 1, "ro_samples": 2},
}


@pytest.mark.parametrize("name", sorted(load_registry().pruners))
def test_experts_without_a_token(name: str) -> None:
    """Every method, first or after magnitude; with all experts met by all tokens where it looks at inputs."""
    cls, model, notes = load_registry().pruners[name].cls, forsaken(), dict[str, Any]()
    recovers = name in ("perp", "lora", "dense")
    pruner = cls(**CHEAP.get(name, {}))
    anatomy = find_anatomy(model)
    if recovers:
        Magnitude().prune(make_job(Magnitude(), model, anatomy=anatomy))
    job = make_job(pruner, model, anatomy=anatomy, notes=notes)
    dense = {matrix.name: matrix.weight.clone() for matrix in anatomy.matrices}
    pruner.prune(job)
    audit(anatomy, HALF, "matrix" if recovers else pruner.audit_group(), explained=True)
    assert all(bool(matrix.weight.isfinite().all()) for matrix in anatomy.matrices)
    assert bool(logits(model).isfinite().all())
    if name in ("wanda", "sparsegpt", "gblm", "wanda++"):
        told = notes["starved experts"]
        assert {told[f"model.layers.0.mlp.experts.{index}.gate_up_proj"] for index in (2, 3)} == {0}
    if name == "wanda":  # the first matrix of the forsaken is scored with all tokens of the block
        other = forsaken()
        with torch.no_grad():
            found: list[torch.Tensor] = []
            other.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: found.append(args[0]))
            other(job.calibration)
        for index in (2, 3):
            matrix = f"model.layers.0.mlp.experts.{index}.gate_up_proj"
            wanted = keep_mask(wanda_scores(dense[matrix], found[0].square().sum(0).sqrt()), HALF, group="row")
            assert torch.equal(anatomy.masks[matrix], wanted)


def test_gradients_of_the_forsaken_are_zero() -> None:
    model = forsaken()
    kept: dict[str, Any] = {}
    job = make_job(Gblm(), model)
    for block in walk(job):
        found = block.gradients(torch.linalg.vector_norm)
        kept |= {matrix.name: float(gradient.abs().max()) for matrix, gradient in found.items()}
    zero = {name for name, most in kept.items() if most == 0}
    assert zero == {
        f"model.layers.{layer}.mlp.experts.{index}.{last}"
        for layer in range(2)
        for index in (2, 3)
        for last in ("gate_up_proj", "down_proj")
    }


def test_what_is_shown_for_statistics_changes_no_output() -> None:
    model = tiny_model("mixtral", dtype=torch.float64)
    [experts] = [module for module in model.model.layers[0].modules() if isinstance(module, Experts)]
    wanted = logits(model)
    with experts.showing([0, 3]):
        torch.testing.assert_close(logits(model), wanted, **EXACT)
    assert torch.equal(logits(model), wanted)


# Adapters


def test_adapters_of_experts_are_refused_before_and_after(tmp_path: Path) -> None:
    anatomy = find_anatomy(tiny_model("mixtral"))
    facts: JobFacts = anatomy.facts(HALF)
    assert Lora().refuses(facts) is None
    assert Lora(roles=("down",), merge="masked").refuses(facts) is None
    reason = Lora(roles=("query", "down")).refuses(facts)
    assert reason is not None
    assert "model.layers.0.mlp.experts.0.down_proj" in reason
    assert "PEFT has no name" in reason
    matrix = anatomy.matrices[-1]
    anatomy.adapters.attach(matrix, torch.zeros(1, matrix.shape[1]), torch.zeros(matrix.shape[0], 1), 1.0)
    with pytest.raises(WriteError, match=r"mlp.experts.3.down_proj cannot be written: PEFT has no name"):
        save_adapters(anatomy, tmp_path)
    assert not list(tmp_path.iterdir())


# Whole runs


def test_runs_on_a_mixture(bench: Bench, command: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, scored again to the same numbers, and written as a folder that scores the same."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mixture"
    shutil.copytree(bench.model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation*"))
    with quiet_transformers():
        fused(vocab_size=300, bos_token_id=0, eos_token_id=0, num_experts_per_tok=1).save_pretrained(folder)
    Path("small.toml").write_text(bench.suite_text("wanda", "sparsegpt + perp[mode=reconstruct,steps=1,batch=2]", model=folder))
    ran = command("run", "small.toml", "--executor", "inline", "--machine", "here", "--keep-weights")
    assert (ran.code, ran.err) == (0, "")
    again = ("--all", "--eval", bench.perplexity, "--model", folder, "--again")
    assert command("rescore", *again, "--executor", "inline", "--machine", "here").code == 0
    found: dict[str, list[float]] = {}
    for record in (stored.record for stored in ResultStore(Path("results"), pytest.fail).all()):
        assert record.status == "ok", record.reason
        [measured] = record.scores.values()
        assert measured.value is not None
        found.setdefault(record.spec.steps[0].text, []).append(measured.value)
        if record.audit is not None and record.spec.target != "dense":
            assert "model.layers.0.mlp.experts.0.down_proj" in str(record.steps[0].notes["starved experts"])
            assert 0.5 < record.audit.coverage < 1
    assert {step: (len(values), len(set(values))) for step, values in found.items()} == {
        "dense": (1, 1),
        "wanda": (2, 1),
        "sparsegpt": (2, 1),
    }
    given = ("--calibration", bench.calibration, "--samples", 4, "--length", 16, "--batch-size", 4)
    ran = command("prune", folder, "--step", "wanda", "--target", "0.5", "--out", "pruned", *given)
    assert (ran.code, ran.err) == (0, "")
    ran = command("eval", "pruned", "--eval", bench.perplexity, "--json", "--batch-size", 4)
    [score] = json.loads(ran.out)["scores"].values()
    assert score["value"] == pytest.approx(found["wanda"].pop(), rel=1e-6)

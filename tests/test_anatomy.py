"""Blocks and matrices are found by structure, and changed only as asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import DEPTH, FAMILIES, PlainBlock, PlainModel, changed, fingerprint, make_job, same_bits, tiny, tokens_of
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from prunebench.errors import ContractError, ModelError, Refused
from prunebench.spec import JobFacts, MatrixFacts
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import keep_mask, magnitude_scores
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.dense import DenseWeights

_LLAMA = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
}
_OPT = {
    "self_attn.k_proj": (16, 16),
    "self_attn.v_proj": (16, 16),
    "self_attn.q_proj": (16, 16),
    "self_attn.out_proj": (16, 16),
    "fc1": (24, 16),
    "fc2": (16, 24),
}
_FALCON = {
    "self_attention.query_key_value": (24, 16),
    "self_attention.dense": (16, 16),
    "mlp.dense_h_to_4h": (24, 16),
    "mlp.dense_4h_to_h": (16, 24),
}
EXPECTED: dict[str, tuple[str, dict[str, tuple[int, int]]]] = {
    "llama": ("model.layers", _LLAMA),
    "qwen2": ("model.layers", _LLAMA),
    "qwen3": (
        "model.layers",
        _LLAMA
        | {
            "self_attn.q_proj": (24, 16),
            "self_attn.k_proj": (12, 16),
            "self_attn.v_proj": (12, 16),
            "self_attn.o_proj": (16, 24),
        },
    ),
    "mistral": ("model.layers", _LLAMA),
    "gemma2": ("model.layers", _LLAMA),
    "gemma3": ("model.layers", _LLAMA),
    "phi3": (
        "model.layers",
        {
            "self_attn.o_proj": (16, 16),
            "self_attn.qkv_proj": (32, 16),
            "mlp.gate_up_proj": (48, 16),
            "mlp.down_proj": (16, 24),
        },
    ),
    "olmo2": ("model.layers", _LLAMA),
    "opt": ("model.decoder.layers", _OPT),
    "opt-350m": ("model.decoder.layers", _OPT),
    "gpt2": (
        "transformer.h",
        {"attn.c_attn": (48, 16), "attn.c_proj": (16, 16), "mlp.c_fc": (24, 16), "mlp.c_proj": (16, 24)},
    ),
    "gpt-neox": (
        "gpt_neox.layers",
        {
            "attention.query_key_value": (48, 16),
            "attention.dense": (16, 16),
            "mlp.dense_h_to_4h": (24, 16),
            "mlp.dense_4h_to_h": (16, 24),
        },
    ),
    "falcon": ("transformer.h", _FALCON),
    "falcon-rw": ("transformer.h", _FALCON | {"self_attention.query_key_value": (48, 16)}),
    "falcon-40b": ("transformer.h", _FALCON | {"self_attention.query_key_value": (32, 16)}),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def halves(anatomy: ModelAnatomy, seed: int = 0) -> Iterator[tuple[Any, torch.Tensor]]:
    """Every matrix with a random keep mask."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in anatomy.matrices:
        yield matrix, torch.rand(matrix.shape, generator=generator) < 0.5


def test_finds_every_block_and_matrix(family: str) -> None:
    model = tiny(family)
    anatomy = find_anatomy(model)
    blocks, matrices = EXPECTED[family]
    assert [block.name for block in anatomy.blocks] == [f"{blocks}.{index}" for index in range(DEPTH)]
    for block in anatomy.blocks:
        assert {m.name.removeprefix(block.name + "."): m.shape for m in block.matrices} == matrices
        assert block.module is model.get_submodule(block.name)
        for matrix in block.matrices:
            assert matrix.module is model.get_submodule(matrix.name)
    assert anatomy.matrices == [matrix for block in anatomy.blocks for matrix in block.matrices]
    assert anatomy.prunable_parameters == DEPTH * sum(rows * columns for rows, columns in matrices.values())


def test_counts_of_parameters(family: str) -> None:
    model = tiny(family)
    anatomy = find_anatomy(model)
    in_blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith(EXPECTED[family][0] + "."))
    assert anatomy.block_parameters == in_blocks
    assert anatomy.total_parameters == model.num_parameters()
    assert anatomy.prunable_parameters < in_blocks < anatomy.total_parameters


def test_a_weight_is_outputs_by_inputs_whatever_the_storage(family: str) -> None:
    """Checked by what the module does with it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in find_anatomy(tiny(family, torch.float64)).matrices:
            inputs = torch.randn(5, matrix.shape[1], generator=generator, dtype=torch.float64)
            bias = matrix.module.bias
            plain = inputs @ matrix.weight.t() + (0 if bias is None else bias)
            torch.testing.assert_close(matrix.module(inputs), plain)
            assert matrix.weight.shape == matrix.shape
            assert not matrix.weight.requires_grad
            assert matrix.oriented(matrix.parameter).shape == matrix.shape
            assert matrix.oriented(matrix.oriented(matrix.parameter)).shape == matrix.parameter.shape


def test_keep_zeroes_what_is_not_kept_and_touches_nothing_else(family: str) -> None:
    model = tiny(family, torch.bfloat16)
    anatomy = find_anatomy(model)
    before = fingerprint(model)
    masks = {}
    for matrix, mask in halves(anatomy):
        dense = matrix.weight.clone()
        matrix.keep(mask)
        assert same_bits(matrix.weight, torch.where(mask, dense, 0.0).to(dense.dtype))  # no -0.0 either
        masks[matrix.name] = mask
    assert changed(model, before) == {f"{name}.weight" for name in masks}
    assert list(anatomy.masks) == list(masks)
    for name, mask in masks.items():
        assert torch.equal(anatomy.masks[name], mask)


def test_write_stores_new_values_under_the_mask(family: str) -> None:
    model = tiny(family, torch.bfloat16)
    anatomy = find_anatomy(model)
    before = fingerprint(model)
    for matrix, mask in halves(anatomy):
        new = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1))
        matrix.write(new, mask)
        assert matrix.weight.dtype == torch.bfloat16
        assert torch.equal(matrix.weight, torch.where(mask, new, 0.0).to(torch.bfloat16))
        assert torch.equal(anatomy.masks[matrix.name], mask)
    assert changed(model, before) == {f"{matrix.name}.weight" for matrix in anatomy.matrices}


def test_parameters_stay_the_objects_they_were(family: str) -> None:
    """Optimisers and hooks of a caller hold on to them."""
    model = tiny(family)
    anatomy = find_anatomy(model)
    parameters = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    for matrix, mask in halves(anatomy):
        matrix.keep(mask)
        matrix.write(matrix.weight.clone(), mask)
        assert matrix.parameter.requires_grad
        assert matrix.parameter.grad is None
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == parameters


def test_the_last_mask_counts_and_copies_are_independent() -> None:
    anatomy = find_anatomy(tiny())
    matrix = anatomy.matrices[0]
    first, second = torch.ones(matrix.shape, dtype=torch.bool), torch.zeros(matrix.shape, dtype=torch.bool)
    matrix.keep(first)
    earlier = anatomy.masks.copy()
    matrix.keep(second)
    assert torch.equal(anatomy.masks[matrix.name], second)
    assert torch.equal(earlier[matrix.name], first)
    assert len(earlier) == 1
    anatomy.masks[matrix.name].fill_(True)
    assert torch.equal(anatomy.masks[matrix.name], second)


def test_masks_that_were_written_are_put_back() -> None:
    one, other = find_anatomy(tiny()), find_anatomy(tiny())
    for matrix, mask in halves(one):
        matrix.keep(mask)
    written = one.masks.written(one.matrices[1:])
    other.masks.put_back(other.matrices, written)
    assert list(other.masks) == [matrix.name for matrix in one.matrices[1:]]
    assert all(torch.equal(other.masks[name], one.masks[name]) for name in other.masks)
    assert not written.keys() & {*dict(one.model.named_parameters()), *dict(one.model.named_buffers())}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_wrong_mask_or_weight_is_declined_and_changes_nothing(family: str) -> None:
    model = tiny(family)
    anatomy = find_anatomy(model)
    before = fingerprint(model)
    matrix = next(matrix for matrix in anatomy.matrices if matrix.shape[0] != matrix.shape[1])
    weight, mask = torch.zeros(matrix.shape), torch.ones(matrix.shape, dtype=torch.bool)
    for wrong in (mask.t(), mask[:-1], mask.float(), mask.to(torch.uint8), mask[None]):
        with pytest.raises(ContractError, match=matrix.name):
            matrix.keep(wrong)
        with pytest.raises(ContractError, match=matrix.name):
            matrix.write(weight, wrong)
    for wrong in (weight.t(), weight[:, :-1]):
        with pytest.raises(ContractError, match=matrix.name):
            matrix.write(wrong, mask)
    assert not changed(model, before)
    assert not anatomy.masks


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2", "gpt-neox"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_stays_tied(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    anatomy = find_anatomy(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {id(p): name for name, p in model.named_parameters()}
    assert (embedding is head) is tied
    groups = [set(group) for group in anatomy.tied()]
    assert len(groups) == int(tied)
    if tied:
        assert names[id(embedding)] in groups[0]
        assert len(groups[0]) == 2
    for matrix, mask in halves(anatomy):
        matrix.keep(mask)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied


def test_linears_around_the_blocks_do_not_count() -> None:
    model = tiny("opt-350m")
    before = fingerprint(model)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {"model.decoder.project_in", "model.decoder.project_out", "lm_head"} <= linears
    anatomy = find_anatomy(model)
    assert linears - {matrix.name for matrix in anatomy.matrices} == {
        "model.decoder.project_in",
        "model.decoder.project_out",
        "lm_head",
    }
    for matrix, mask in halves(anatomy):
        matrix.keep(mask)
    assert all(name.startswith("model.decoder.layers.") for name in changed(model, before))


def facts(target: Target) -> JobFacts:
    model = tiny("opt")
    return find_anatomy(model).facts(target, earlier=("magnitude",))


def test_facts_say_what_there_is() -> None:
    found = facts(Unstructured(0.5))
    assert found.target == Unstructured(0.5)
    assert found.config.model_type == "opt"
    assert found.earlier == ("magnitude",)
    assert found.matrices[4] == MatrixFacts("model.decoder.layers.0.fc1", (24, 16))
    assert len(found.matrices) == 6 * DEPTH
    assert "model.decoder.layers.0.self_attn.q_proj.bias" in found.biases
    assert all(name.endswith(".bias") for name in found.biases)
    assert len(found.biases) == 8 * DEPTH + 1  # six linears and two norms a block, and the final norm
    assert found.tied == (("model.decoder.embed_tokens.weight", "lm_head.weight"),)
    assert find_anatomy(tiny("llama")).facts(Unstructured(0.5)).biases == ()


def test_a_pattern_that_does_not_fit_names_the_first_matrix() -> None:
    assert facts(Unstructured(0.5)).misfit() is None
    assert facts(NM(2, 4)).misfit() is None
    assert facts(NM(4, 8)).misfit() is None
    reason = facts(NM(2, 16)).misfit()
    assert reason is not None
    assert "model.decoder.layers.0.fc2 has 24 input columns" in reason
    assert "2:16" in reason


_EXPERTS = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def test_fused_experts_that_nobody_took_apart_are_refused_with_their_share() -> None:
    for model in (
        MixtralForCausalLM(MixtralConfig(**_EXPERTS, num_local_experts=4)),
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**_EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=4)
        ),
    ):
        inside = {name: p for name, p in model.named_parameters() if name.startswith("model.layers.")}
        share = sum(p.numel() for p in inside.values() if p.ndim == 3) / sum(p.numel() for p in inside.values())
        assert 0.3 < share < 0.9
        with pytest.raises(Refused) as caught:
            find_anatomy(model)
        assert f"{share:.1%} of the block parameters" in str(caught.value)
        assert "model.layers.0.mlp.experts.gate_up_proj" in str(caught.value)


class Shallow(PreTrainedModel):
    """Embeddings and norms only."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig(num_hidden_layers=2))
        self.embedding = nn.Embedding(4, 4)
        self.layers = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.head = nn.Linear(4, 4)


def test_a_model_with_nothing_prunable_says_what_was_looked_for_and_found() -> None:
    with pytest.raises(ModelError) as caught:
        find_anatomy(Shallow())
    message = str(caught.value)
    assert "no decoder blocks in Shallow" in message
    assert "nn.ModuleList whose members hold nn.Linear or Conv1D" in message
    assert "Embedding, LayerNorm, Linear" in message


class Branching(PlainBlock):
    """A block with a list of its own, one linear under two names, and one weight in two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(8, 8) for _ in range(DEPTH)])
        self.again = self.up
        self.tied = nn.Linear(16, 8)
        self.tied.weight = self.down.weight


class Deep(PlainModel):
    """A short list of big linears beside the blocks, as adapters and extra heads are."""

    def __init__(self) -> None:
        super().__init__(Branching)
        self.heads = nn.ModuleList([nn.Linear(8, 4096), nn.Linear(8, 4096)])


def test_lists_inside_blocks_belong_to_their_block_and_lists_beside_them_do_not_count() -> None:
    anatomy = find_anatomy(Deep())
    assert [block.name for block in anatomy.blocks] == [f"blocks.{index}" for index in range(DEPTH)]
    for block in anatomy.blocks:
        assert [m.name.removeprefix(block.name + ".") for m in block.matrices] == [
            "up",
            "down",
            "branches.0",
            "branches.1",
            "branches.2",
        ]


def test_the_outermost_list_is_taken_even_where_an_inner_one_has_the_configs_depth() -> None:
    model = PlainModel(Branching, depth=2)
    model.config.num_hidden_layers = DEPTH
    assert [block.name for block in find_anatomy(model).blocks] == ["blocks.0", "blocks.1"]


class Frozen(PlainBlock):
    """A linear whose weight is stored as integers, as quantised layers keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Linear(8, 8)
        self.whole.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


def test_only_floating_matrices_are_prunable() -> None:
    class Model(PlainModel):
        """Nothing is scattered here: noise does not fit integers."""

    model = Model()
    model.blocks = nn.ModuleList([Frozen() for _ in range(DEPTH)])
    assert {matrix.name.split(".")[-1] for matrix in find_anatomy(model).matrices} == {"up", "down"}


def test_members_that_are_linears_themselves_have_their_own_name() -> None:
    class Model(PlainModel):
        """Blocks without anything around the linear."""

        def __init__(self) -> None:
            super().__init__(lambda: nn.Linear(8, 8))

    model = Model()
    for matrix in find_anatomy(model).matrices:
        assert model.get_submodule(matrix.name) is matrix.module


@pytest.mark.parametrize("source", ["files", "copy"])
def test_dense_weights_are_those_before_the_first_step(family: str, source: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    anatomy = find_anatomy(model)
    before = fingerprint(model)
    dense = DenseWeights(anatomy, tmp_path if source == "files" else None)
    assert bool(dense._copies) is (source == "copy")
    for matrix, mask in halves(anatomy):
        matrix.keep(mask)
        weight = dense.weight(matrix)
        assert weight.shape == matrix.shape
        assert same_bits(matrix.oriented(weight), before[f"{matrix.name}.weight"])
    for block in anatomy.blocks:
        twin = dense.block(block)
        assert twin is not block.module
        for name, parameter in twin.named_parameters():
            assert same_bits(parameter.detach(), before[f"{block.name}.{name}"])
            assert parameter is not block.module.get_parameter(name)


@pytest.mark.parametrize("source", ["files", "copy"])
def test_dense_weights_cannot_be_written_into(source: str, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    anatomy = find_anatomy(model)
    dense = DenseWeights(anatomy, tmp_path if source == "files" else None)
    matrix = anatomy.matrices[0]
    before = matrix.weight.clone()
    dense.weight(matrix).zero_()
    dense.block(anatomy.blocks[0]).get_submodule("self_attn.q_proj").weight.data.zero_()
    assert torch.equal(dense.weight(matrix), before)
    assert torch.equal(matrix.weight, before)


def test_dense_weights_come_in_the_models_dtype(tmp_path: Path) -> None:
    """Files in float32, model loaded in bfloat16: what was dense is what was loaded."""
    tiny("gpt2").save_pretrained(tmp_path)
    model = tiny("gpt2", torch.bfloat16)
    anatomy = find_anatomy(model)
    dense = DenseWeights(anatomy, tmp_path)
    assert not dense._copies
    for matrix in anatomy.matrices:
        assert same_bits(dense.weight(matrix), matrix.weight)


@pytest.mark.parametrize("fault", ["other values", "other shape", "missing", "empty"])
def test_files_that_are_not_the_models_are_not_trusted(fault: str, tmp_path: Path) -> None:
    model = tiny()
    anatomy = find_anatomy(model)
    if fault == "other values":
        tiny(seed=1).save_pretrained(tmp_path)
    elif fault == "other shape":
        # In a later block: only of the first one are the values looked at too.
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(1, 16)
        save_file(tensors, tmp_path / "model.safetensors")
    elif fault == "missing":
        tiny(num_hidden_layers=DEPTH - 1).save_pretrained(tmp_path)
    dense = DenseWeights(anatomy, tmp_path)
    for matrix in anatomy.matrices:
        assert same_bits(dense.weight(matrix), matrix.weight)


def test_steps_see_the_masks_of_the_steps_before() -> None:
    model = tiny()
    job = make_job(model, tokens_of())
    assert not job.masks
    for matrix in job.anatomy.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, "matrix"))
    assert not job.masks

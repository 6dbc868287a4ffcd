"""Which rows are query, key and value: shown by what the models compute, not by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunebench.errors import ModelError
from prunebench.spec import JobFacts, MatrixFacts
from prunebench.targets import Unstructured
from prunebench.testing import FAMILIES, random_tokens, tiny_model
from prunebench.toolkit.anatomy import LinearMatrix, find_anatomy
from prunebench.toolkit.quiet import quiet_transformers
from prunebench.toolkit.roles import ROLES, Role, rows_with, unknown_roles

SMALL = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-heads": ("falcon", {"multi_query": False, "alibi": True}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 4}),
    "persimmon": ("persimmon", {"intermediate_size": 40, "qk_layernorm": False}),
}


def model_of(family: str) -> PreTrainedModel:
    """A tiny model in float64; its MLP's inside is no product of two."""
    if family in FAMILIES:
        return tiny_model(family, dtype=torch.float64)
    kind, settings = MORE[family]
    with quiet_transformers(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | settings), dtype=torch.float64)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(model), use_cache=False).logits


def playing(model: PreTrainedModel, role: Role) -> Iterator[tuple[LinearMatrix, torch.Tensor]]:
    for matrix in find_anatomy(model).matrices:
        rows = rows_with([role], matrix, model.config)
        assert rows.dtype == torch.bool
        assert rows.shape == matrix.shape[:1]
        if rows.any():
            yield matrix, rows


def scale(model: PreTrainedModel, role: Role, factor: float) -> int:
    """Multiply what the rows of a role give out; returns how many matrices have any."""
    found = list(playing(model, role))
    for matrix, rows in found:
        matrix.weight[rows] *= factor
        if matrix.module.bias is not None:
            matrix.module.bias.data[rows] *= factor
    return len(found)


def inputs_of(model: PreTrainedModel, role: Role) -> torch.Tensor:
    """What the matrices of a role read, in the first block."""
    matrix, rows = next(playing(model, role))
    assert rows.all()
    seen: list[torch.Tensor] = []
    handle = matrix.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    logits(model)
    handle.remove()
    return seen[0]


EVERY = pytest.mark.parametrize("family", [*FAMILIES, *MORE])


@EVERY
def test_every_row_plays_one_role(family: str) -> None:
    model = model_of(family)
    for matrix in find_anatomy(model).matrices:
        rows = torch.stack([rows_with([role], matrix, model.config) for role in ROLES])
        assert torch.equal(rows.sum(dim=0), torch.ones(matrix.shape[0], dtype=rows.sum(dim=0).dtype)), matrix.name
        assert rows_with(ROLES, matrix, model.config).all()


@EVERY
def test_values(family: str) -> None:
    """What the output matrix reads is linear in them."""
    model = model_of(family)
    before = inputs_of(model, "output")
    assert scale(model, "value", 3.0) == 2
    torch.testing.assert_close(inputs_of(model, "output"), 3 * before, rtol=1e-9, atol=1e-12)


@EVERY
def test_queries_and_keys(family: str) -> None:
    """Without queries all keys are alike, and without keys all queries."""
    for gone, other in (("query", "key"), ("key", "query")):
        model = model_of(family)
        before = logits(model)
        assert scale(model, gone, 0.0) == 2
        without = logits(model)
        scale(model, other, -7.0)
        torch.testing.assert_close(logits(model), without, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(without, before, rtol=1e-3)


@EVERY
def test_mlp(family: str) -> None:
    """What the down matrix reads is linear in the rows of `up` where there is a gate, and made by them elsewhere."""
    model = model_of(family)
    gated = any(True for _ in playing(model, "gate"))
    before = inputs_of(model, "down")
    of_experts = {"mixtral": 8, "qwen3-moe": 5}  # four experts a block, in one of the two or in both
    assert scale(model, "up", 3.0 if gated else 0.0) == of_experts.get(family, 2)
    after = inputs_of(model, "down")
    if gated:
        torch.testing.assert_close(after, 3 * before, rtol=1e-9, atol=1e-12)
        scale(model, "gate", 0.0)
        after = inputs_of(model, "down")
    torch.testing.assert_close(after, torch.zeros_like(before))


def facts_of(model: PreTrainedModel, rename: Callable[[str], str] = str) -> JobFacts:
    facts = find_anatomy(model).facts(Unstructured(0.5))
    matrices = tuple(MatrixFacts(rename(matrix.name), matrix.shape) for matrix in facts.matrices)
    return JobFacts(facts.target, facts.config, matrices, facts.tied, facts.biases, facts.earlier)


def test_what_is_not_there_is_said() -> None:
    opt = facts_of(tiny_model("opt"))
    assert unknown_roles(["query", "value"], opt) is None
    assert unknown_roles(["query", "gate"], opt) == (
        "no matrix of this model (opt) plays the role gate; those found are query, key, value, output, up, down."
    )
    strange = facts_of(tiny_model(), lambda name: f"{name}_2")
    assert unknown_roles(["query"], strange) == (
        "no matrix of this model (llama) plays the role query; no matrix has a known name."
    )


def test_a_fused_matrix_of_an_unknown_family_is_not_guessed() -> None:
    model = tiny_model("gpt2")
    model.config.model_type = "codegen"
    facts = facts_of(model)
    assert unknown_roles(["query"], facts) == (
        "transformer.h.0.attn.c_attn holds query, key and value, and how a codegen model orders its rows is not known."
    )
    with pytest.raises(ModelError, match="is not known"):
        rows_with(["up"], facts.matrices[0], model.config)

"""Tiny random models of fourteen families, tokens for them, and a step's job as the harness would make it.

Hidden states are 16 wide, attention 24 where the family lets it differ and the inside of the MLP 40, so that no matrix which
could be mistaken for its transpose is square; all are multiples of 8, so that 4:8 fits. `int(size * s)` differs from rounding
at 0.6 in every one of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prunebench.errors import UnknownNameError
from prunebench.spec import Job, JsonDict, Needs, Placement, Pruner
from prunebench.targets import Target, Unstructured
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.experts import take_apart
from prunebench.toolkit.placement import Resident
from prunebench.toolkit.quiet import quiet_transformers

SAMPLES = 7
LENGTH = 8

INNER = 40
"""The width inside the MLPs, and of nothing else."""

_DEPTH = 2
_WINDOW = 4
_NOISE = 0.25
_COMMON = {"vocab_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA_LIKE = _COMMON | {
    "hidden_size": 16,
    "num_hidden_layers": _DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": _WINDOW}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_CAPPED = {"query_pre_attn_scalar": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}


@dataclass(frozen=True)
class _Family:
    model_type: str
    """As transformers calls it."""
    settings: dict[str, Any] = field(default_factory=dict)
    inner: str = "intermediate_size"
    """What the family calls the width inside the MLP."""


_FAMILIES = {
    "llama": _Family("llama", _LLAMA_LIKE),
    "qwen2": _Family("qwen2", _LLAMA_LIKE),  # biases at q, k and v
    "qwen3": _Family("qwen3", _LLAMA_LIKE | {"tie_word_embeddings": True}),  # as its small sizes are
    "mistral": _Family("mistral", _LLAMA_LIKE | {"sliding_window": _WINDOW}),
    "gemma2": _Family("gemma2", _LLAMA_LIKE | _MIXED | _CAPPED),  # scores and logits capped; eager attention; tied
    "gemma3": _Family("gemma3_text", _LLAMA_LIKE | _MIXED),  # blocks take arguments of their own; tied
    "phi3": _Family("phi3", _LLAMA_LIKE),  # q, k and v in one matrix, gate and up in another
    "olmo2": _Family("olmo2", _LLAMA_LIKE),  # norms behind attention and MLP, so these read the residual itself
    "opt": _Family(  # tied
        "opt",
        _COMMON
        | {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": _DEPTH,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
        },
        "ffn_dim",
    ),
    "gpt2": _Family(  # Conv1D, weights stored transposed; tied
        "gpt2", _COMMON | {"n_embd": 16, "n_layer": _DEPTH, "n_head": 4, "n_positions": 32}, "n_inner"
    ),
    "gpt-neox": _Family(
        "gpt_neox",
        _COMMON | {"hidden_size": 16, "num_hidden_layers": _DEPTH, "num_attention_heads": 2, "max_position_embeddings": 32},
    ),
    "falcon": _Family(  # attention beside the MLP, of one input; one key and value for all heads; tied
        "falcon",
        _COMMON | {"hidden_size": 16, "num_hidden_layers": _DEPTH, "num_attention_heads": 4, "max_position_embeddings": 32},
        "ffn_hidden_size",
    ),
    "mixtral": _Family("mixtral", _LLAMA_LIKE | _EXPERTS),  # four experts a block; each token goes to two of them
    "qwen3-moe": _Family(  # the first block has no experts, and the weights of a token's two do not add up to one
        "qwen3_moe",
        _LLAMA_LIKE | _EXPERTS | {"intermediate_size": INNER, "mlp_only_layers": [0], "norm_topk_prob": False},
        "moe_intermediate_size",
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)


def tiny_model(
    family: str = "llama", *, inner: int = INNER, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """A random model of two blocks in eval mode on the host; every call returns one of its own.

    Args:
        family: one of `FAMILIES`.
        inner: the width inside the MLP; an odd one is what N:M does not fit.
        dtype: float64 in exact tests.
        seed: of the weights.

    Raises:
        UnknownNameError: there is no such family.
    """
    if family not in _FAMILIES:
        raise UnknownNameError.among("family of tiny models", family, FAMILIES)
    model: PreTrainedModel = copy.deepcopy(_built(family, inner, seed)).to(dtype)  # type: ignore[arg-type]
    return model


@cache
def _built(family: str, inner: int, seed: int) -> PreTrainedModel:
    chosen = _FAMILIES[family]
    with quiet_transformers(), torch.random.fork_rng([]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(chosen.model_type, **chosen.settings, **{chosen.inner: inner})
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            # Far above the initialisation's 0.02, norms and biases too: what a method leaves out or disturbs then shows.
            for parameter in model.parameters():
                parameter.add_(_NOISE * torch.randn_like(parameter))
    take_apart(model)
    model.train(False)
    return model


def random_tokens(model: PreTrainedModel, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Token ids [samples, length] from a generator of its own."""
    size = int(model.config.get_text_config().vocab_size)
    return torch.randint(0, size, (samples, length), generator=torch.Generator().manual_seed(seed))


def make_job(
    pruner: Pruner,
    model: PreTrainedModel,
    target: Target | None = None,
    *,
    tokens: torch.Tensor | None = None,
    training: torch.Tensor | None = None,
    validation: torch.Tensor | None = None,
    batch_size: int = 2,
    seed: int = 0,
    anatomy: ModelAnatomy | None = None,
    dense: DenseWeights | None = None,
    placement: Placement | None = None,
    notes: JsonDict | None = None,
) -> Job:
    """A step's job as the harness would make it, with every kind of tokens that the pruner declares to need.

    Args:
        pruner: decides, by `needs()`, which tokens are handed over.
        model: on the host, or where `placement` works.
        target: 0.5 where none is given.
        tokens: calibration sequences [samples, length]; random where none are given.
        training: windows [n, length]; random where none are given.
        validation: windows [n, length]; random where none are given.
        batch_size: sequences at a time.
        seed: handed over only where the pruner declares to use it, as in a run.
        anatomy: of this model, with the masks that earlier steps left; found now where none is given.
        dense: the weights before the first step; the present ones where none are given.
        placement: everything on the host where none is given.
        notes: where the pruner's notes go.
    """
    needs = pruner.needs()
    anatomy = anatomy or find_anatomy(model)
    calibration = random_tokens(model, seed=1) if tokens is None else tokens
    trains = bool(needs & Needs.TRAINING)
    training = random_tokens(model, seed=2) if training is None else training
    validation = random_tokens(model, seed=3) if validation is None else validation
    return Job(
        model=model,
        anatomy=anatomy,
        target=target or Unstructured(0.5),
        needs=needs,
        seed=seed if needs & (Needs.SEED | Needs.TRAINING) else 0,
        placement=placement or Resident("cpu"),
        batch_size=batch_size,
        masks=anatomy.masks.copy(),
        dense=dense or DenseWeights(anatomy),
        progress=lambda what, done, total: None,  # noqa: ARG005 - the signature is the contract
        note=({} if notes is None else notes).__setitem__,
        attach=anatomy.adapters.attach,
        artefact=lambda name, make: make(),  # noqa: ARG005 - nothing is kept between jobs
        calibration_tokens=calibration if needs & (Needs.CALIBRATION | Needs.GRADIENTS) else None,
        training_tokens=training if trains else None,
        validation_tokens=validation if trains else None,
    )

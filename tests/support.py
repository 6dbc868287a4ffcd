"""What several test files share: tiny random models of every family, jobs, and statistics computed the plain way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prunebench.spec import Job, Needs, Placement
from prunebench.targets import Target, Unstructured
from prunebench.toolkit import Block, walk
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.placement import Resident

VOCABULARY = 48
LENGTH = 7
DEPTH = 3
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OPT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
"""Two kinds of attention in one model, with a window shorter than the sequences: blocks need arguments of their own."""


def _llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_LLAMA_LIKE | options))


def _qwen2(**options: Any) -> PreTrainedModel:
    sliding = {"layer_types": _WINDOWS, "use_sliding_window": True, "sliding_window": 3}
    return Qwen2ForCausalLM(Qwen2Config(**_LLAMA_LIKE | sliding | options))


def _qwen3(**options: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_LLAMA_LIKE | {"head_dim": 6} | options))


def _gemma3(**options: Any) -> PreTrainedModel:
    sliding = {"layer_types": _WINDOWS, "sliding_window": 3, "head_dim": 4}
    return Gemma3ForCausalLM(Gemma3TextConfig(**_LLAMA_LIKE | sliding | options))


def _opt(**options: Any) -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**_OPT_LIKE | {"word_embed_proj_dim": 16} | options))


def _opt_350m(**options: Any) -> PreTrainedModel:
    """The odd one of its family: linears around the blocks, and the norm after the residual."""
    return _opt(**{"word_embed_proj_dim": 8, "do_layer_norm_before": False} | options)


def _gpt2(**options: Any) -> PreTrainedModel:
    shape = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": DEPTH, "n_head": 4, "n_positions": 32, "n_inner": 24}
    return GPT2LMHeadModel(GPT2Config(**shape | {"bos_token_id": 1, "eos_token_id": 2} | options))


def _gpt_neox(**options: Any) -> PreTrainedModel:
    shape = {key: _LLAMA_LIKE[key] for key in _LLAMA_LIKE if key != "num_key_value_heads"}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape | options))


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "opt": _opt,
    "opt-350m": _opt_350m,
    "gpt2": _gpt2,
    "gpt-neox": _gpt_neox,
}


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in eval mode; norms and biases are random too, so that leaving one out shows."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = FAMILIES[family](**options)
    return scattered(model, seed).to(dtype).eval()


def scattered(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every parameter moved by noise far above the initialisation's 0.02."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens_of(samples: int = 5, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Random token ids [samples, length]."""
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def make_job(
    model: PreTrainedModel,
    tokens: torch.Tensor | None = None,
    *,
    target: Target | None = None,
    placement: Placement | None = None,
    batch_size: int = 2,
    needs: Needs = Needs.WEIGHTS | Needs.CALIBRATION | Needs.GRADIENTS | Needs.SEED,
    seed: int = 0,
) -> Job:
    """A step's job on the model, as the runner would make it."""
    anatomy = find_anatomy(model)
    return Job(
        model=model,
        anatomy=anatomy,
        target=target or Unstructured(0.5),
        needs=needs,
        seed=seed,
        placement=placement or Resident("cpu"),
        batch_size=batch_size,
        masks=anatomy.masks.copy(),
        dense=DenseWeights(anatomy),
        progress=lambda what, done, total: None,
        note=lambda key, value: None,
        calibration_tokens=tokens,
    )


def masks_of(job: Job) -> dict[str, torch.Tensor]:
    """The keep masks that the step has laid over the model, by matrix name."""
    return dict(job.anatomy.masks)  # type: ignore[attr-defined]


def visit_all(job: Job, visit: Callable[[Block], object]) -> None:
    """Walk to the end, or until a visit raises."""
    for block in walk(job):
        visit(block)


def fingerprint(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters and buffers whose bits differ from the copy."""
    return {name for name, tensor in fingerprint(model).items() if not same_bits(tensor, before[name])}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal as bit patterns: tells -0.0 from 0.0."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@contextlib.contextmanager
def counted_calls(*modules: nn.Module) -> Iterator[dict[str, int]]:
    """How often any of the modules is called."""
    calls = {"count": 0}

    def count(*_: Any) -> None:
        calls["count"] += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class PlainBlock(nn.Module):
    """A residual block of two linears. Subclasses change what it takes or returns."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def mix(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.mix(hidden_states)


class PlainModel(PreTrainedModel):
    """The least model that has decoder blocks. Subclasses change what happens around them."""

    config_class = PretrainedConfig

    def __init__(self, block: Callable[[], nn.Module] = PlainBlock, depth: int = DEPTH, width: int = 8) -> None:
        super().__init__(PretrainedConfig(num_hidden_layers=depth))
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList([block() for _ in range(depth)])
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        scattered(self)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = self.step(block, hidden, input_ids)
        return self.head(hidden)

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        output = block(hidden)
        return output[0] if isinstance(output, tuple) else output

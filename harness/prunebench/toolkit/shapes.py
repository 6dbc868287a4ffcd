"""Shapes: architectures with random weights of a seed, for measuring what pruning costs without the model's files.

The settings are those of the published `config.json` files. Matrices and embeddings are drawn from a normal distribution of
the architecture's `initializer_range`, norms are 1, biases 0. Each parameter is drawn on the device, straight in its dtype, by
a generator whose seed is a hash of `SEED` and of the parameter's name: any block, or any matrix, can be made alone and again,
and is the same bit for bit on the same kind of device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from prunebench.errors import ModelError, UnknownNameError
from prunebench.handles import Matrix
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy, is_norm
from prunebench.toolkit.cache import digest
from prunebench.toolkit.dense import DenseWeights

SHAPE = "shape:"
"""How the name of a shape begins where models are named."""

NO_TOKENIZER = "none"
"""The hash of the tokenizer that a shape does not have."""

SEED = 0
"""Of the weights; a run's own seed has no part in them."""

SCHEME = "normal-by-name-1"
"""How weights are drawn: another word when the same seed gives others."""


def _llama(
    hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 32000, context: int = 4096, **further: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **further,
    }


_LLAMA_3: dict[str, Any] = {
    "vocabulary": 128256,
    "context": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _llama(4096, 11008, 32, 32),
    "llama-2-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 60, 52, context=2048, rms_norm_eps=1e-6),
    "llama-65b": _llama(8192, 22016, 80, 64, context=2048),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, **_LLAMA_3),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, **_LLAMA_3),
    "qwen2.5-0.5b": {
        **_llama(896, 4864, 24, 14, 151936, 32768, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000000.0),
        **{"model_type": "qwen2", "tie_word_embeddings": True},
    },
    "opt-6.7b": {
        "model_type": "opt",
        "hidden_size": 4096,
        "word_embed_proj_dim": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "dropout": 0.1,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    },
    "mixtral-8x7b": {
        **_llama(4096, 14336, 32, 32, 32000, 32768, num_key_value_heads=8, rope_theta=1000000.0),
        **{"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    },
    "qwen3-30b-a3b": {
        **_llama(2048, 6144, 48, 32, 151936, 40960, num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1000000.0),
        **{"model_type": "qwen3_moe", "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1},
    },
    # No published models: for tests, and for measuring on a small machine.
    "tiny-llama": _llama(64, 160, 3, 4, 512, 256, num_key_value_heads=2),
    "tiny-mixtral": {
        **_llama(64, 96, 2, 4, 512, 256, num_key_value_heads=2),
        **{"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "small-llama": _llama(1024, 2816, 4, 16, 8192, 2048),
}
"""Shapes by name, as arguments of their configuration."""

ALIASES = {"7b": "llama-2-7b", "13b": "llama-2-13b", "30b": "llama-30b", "65b": "llama-65b"}
"""Short names, as the papers' tables have them."""


def shape_named(name: str) -> str:
    """A shape's full name, by that or a short one.

    Raises:
        UnknownNameError: there is no such shape.
    """
    full = ALIASES.get(name, name)
    if full not in ARCHITECTURES:
        raise UnknownNameError.among("shape", name[:100], ARCHITECTURES)
    return full


def config_of(name: str) -> PretrainedConfig:
    """The settings of a shape, by its full name."""
    settings = dict(ARCHITECTURES[name])
    config: PretrainedConfig = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return config


def content_of(name: str) -> str:
    """What stands for the hash of a shape's weights: of its settings, the seed, and how weights are drawn."""
    return digest([SCHEME, str(SEED), json.dumps(ARCHITECTURES[name], sort_keys=True)])


class RandomWeights:
    """The weights of a shape, each parameter made alone by its name."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str) -> None:
        """`model` may be on the meta device: only its modules' kinds and its settings are looked at."""
        self.device, self.dtype = torch.device(device), dtype
        settings = model.config.get_text_config()
        self._std = float(getattr(settings, "initializer_range", None) or getattr(settings, "init_std", None) or 0.02)
        self._norms = {name for name, module in model.named_modules() if is_norm(module)}

    def make(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A parameter of the shape of `like`, by its full name in the model."""
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias":
            return torch.zeros(like.shape, dtype=self.dtype, device=self.device)
        if owner in self._norms:
            return torch.ones(like.shape, dtype=self.dtype, device=self.device)
        seed = hashlib.blake2b(f"{SCHEME} {SEED} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(seed))
        made = torch.empty(like.shape, dtype=self.dtype, device=self.device)
        return made.normal_(0.0, self._std, generator=generator)


def filled(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str, rests: Callable[[str], torch.device | None]
) -> PreTrainedModel:
    """Give a model without weights those of its shape.

    Args:
        model: on the meta device; changed in place.
        dtype: of the weights.
        device: where they are drawn.
        rests: by a parameter's name, where it is kept once it is drawn; None leaves it on the meta device.

    Raises:
        ModelError: a part of the model cannot be made from its settings.
    """
    model.to(dtype)  # type: ignore[arg-type]  # nothing is there yet: this is for what rests on the meta device
    model.config.dtype = dtype
    weights = RandomWeights(model, dtype, device)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = names[id(parameter)]
            place = rests(name)
            if place is None:
                continue
            if id(parameter) not in made:  # tied ones stay one
                made[id(parameter)] = nn.Parameter(weights.make(name, parameter).to(place))
            module._parameters[key] = made[id(parameter)]
    _make_buffers(model, torch.device(device))
    model.train(False)
    return model


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers that no file keeps, rotary frequencies for one, are lost on the meta device: their modules are made once more.

    On the host, as a model that is loaded has them, and then moved.
    """
    for name, module in model.named_modules():
        lost = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not lost:
            continue
        try:
            again = type(module)(config=module.config)
        except (AttributeError, TypeError) as error:
            raise ModelError(f"{name} has buffers that cannot be made from the settings of the shape: {error}.") from None
        for key in lost:
            buffer = again._buffers[key]
            assert buffer is not None
            module._buffers[key] = buffer.to(device)


class DrawnDense(DenseWeights):
    """The weights of a shape before the first step, drawn again whenever they are asked for."""

    def __init__(self, anatomy: ModelAnatomy, weights: RandomWeights) -> None:
        self._remember(anatomy)
        self._weights = weights
        self._like = {  # sizes, without the weights
            f"{block.name}.{name}": torch.empty_like(parameter, device="meta")
            for block in anatomy.blocks
            for name, parameter in block.module.named_parameters()
        }

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """The dense weight [outputs, inputs], on the matrix's device; where that is none, on the run's."""
        assert isinstance(matrix, LinearMatrix)
        made, place = self._read(f"{self._names[id(matrix.module)]}.weight"), matrix.parameter.device
        return matrix.oriented(made if place.type == "meta" else made.to(place))

    def _read(self, name: str) -> torch.Tensor:
        return self._weights.make(name, self._like[name])

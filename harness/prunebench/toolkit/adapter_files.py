"""Adapters on disk: the format of Hugging Face's PEFT (LoRA), in the folder `adapter` inside a model's.

`PeftModel.from_pretrained(model, folder / "adapter")` reads what is written here; what PEFT has written is read here, as long
as it is plain LoRA of prunable matrices.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from prunebench.errors import ContractError, ModelError, WriteError
from prunebench.toolkit.adapters import Adapter
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.experts import is_of_expert

ADAPTER_FOLDER = "adapter"
NO_NAME = "PEFT has no name for a matrix of one expert, as transformers keeps those of all experts in one parameter"
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_PLAIN = {"peft_type": "LORA", "bias": "none"}
_MORE = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("alora_invocation_tokens", "target_parameters", "arrow_config", "use_bdlora"),
)
"""Settings of PEFT that make something else than `scale * up @ down` of it."""


def adapter_files(folder: Path) -> list[Path]:
    """The files of the adapter that lies in a model's folder; none where there is no adapter."""
    found = [folder / ADAPTER_FOLDER / name for name in (_CONFIG, _WEIGHTS)]
    return found if any(path.is_file() for path in found) else []


def save_adapters(anatomy: ModelAnatomy, folder: Path) -> None:
    """Write the adapters attached to a model into its folder; nothing where there are none.

    Several adapters of one matrix become one, of all their ranks together.

    Raises:
        WriteError: one belongs to an expert of a mixture, for which the format has no name.
    """
    joined = _joined(anatomy)
    if not joined:
        return
    for name in joined:
        if is_of_expert(name):
            raise WriteError(f"the adapter of {name} cannot be written: {NO_NAME}.")
    modules = {matrix.name: matrix.module for matrix in anatomy.matrices}
    ranks = {name: adapter.down.shape[0] for name, adapter in joined.items()}
    alphas = {name: adapter.scale * ranks[name] for name, adapter in joined.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **_PLAIN,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "..",  # the model's folder, seen from the adapter's
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(joined),
        "rank_pattern": {name: other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {name: other for name, other in alphas.items() if other != alpha},
        "fan_in_fan_out": any(isinstance(modules[name], Conv1D) for name in joined),
    }
    tensors = {}
    for name, adapter in joined.items():
        tensors[f"{_PREFIX}{name}{_DOWN}"] = adapter.down.cpu().contiguous()
        tensors[f"{_PREFIX}{name}{_UP}"] = adapter.up.cpu().contiguous()
    (folder / ADAPTER_FOLDER).mkdir()
    save_file(tensors, str(folder / ADAPTER_FOLDER / _WEIGHTS), metadata={"format": "pt"})
    (folder / ADAPTER_FOLDER / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapters(anatomy: ModelAnatomy, folder: Path) -> None:
    """Attach the adapters that lie in a model's folder; nothing where there are none.

    Raises:
        ModelError: they are damaged, no plain LoRA, or not this model's.
    """
    files = adapter_files(folder)
    if not files:
        return
    for path in files:
        if not path.is_file():
            raise _damaged(folder, f"{path.name} is missing")
    config, factors = _settings(folder), _factors(folder)
    matrices = {matrix.name: matrix for matrix in anatomy.matrices}
    for name in factors:
        if name not in matrices:
            raise _damaged(folder, f"it belongs to {name}, which is no prunable matrix of the model")
    ranks, alphas = (_by_name(folder, config, pattern, list(factors)) for pattern in ("rank_pattern", "alpha_pattern"))
    for name, (down, up) in factors.items():
        rank, alpha = ranks.get(name, config.get("r")), alphas.get(name, config.get("lora_alpha"))
        if not isinstance(rank, int) or down.ndim != 2 or down.shape[0] != rank or rank < 1:
            raise _damaged(folder, f"{_CONFIG} says that {name} has rank {rank}, and its factors are otherwise")
        if not isinstance(alpha, int | float):
            raise _damaged(folder, f"{_CONFIG} has no number as the alpha of {name}")
        try:
            anatomy.adapters.attach(matrices[name], down, up, alpha / rank)
        except ContractError as error:
            raise _damaged(folder, str(error).rstrip(".")) from None


def _joined(anatomy: ModelAnatomy) -> dict[str, Adapter]:
    """One adapter a matrix: the factors of several side by side, their scales made equal in the later ones' `up`."""
    joined: dict[str, Adapter] = {}
    for adapter in anatomy.adapters:
        first = joined.get(adapter.matrix)
        if first is not None:
            ratio = adapter.scale / first.scale
            down = torch.cat([first.down, adapter.down.to(first.down)])
            up = torch.cat([first.up, adapter.up.to(first.up) * ratio], dim=1)
            adapter = Adapter(first.matrix, down, up, first.scale)
        joined[adapter.matrix] = adapter
    return joined


def _settings(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / ADAPTER_FOLDER / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{_CONFIG}: {error}") from None
    if not isinstance(config, dict):
        raise _damaged(folder, f"{_CONFIG} is no JSON object")
    for key, wanted in _PLAIN.items():
        if config.get(key) != wanted:
            raise _damaged(folder, f"{key} is {config.get(key)!r}, and only {wanted!r} is supported")
    for key in _MORE:
        if config.get(key):
            raise _damaged(folder, f"{key} is {config[key]!r}, and only plain LoRA is supported")
    return config


def _factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Both factors by module name."""
    try:
        tensors = load_file(str(folder / ADAPTER_FOLDER / _WEIGHTS))
    except Exception as error:  # noqa: BLE001 - a cut or foreign file raises one of safetensors' own kinds
        raise _damaged(folder, f"{_WEIGHTS}: {error}") from None
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind = next((kind for kind in (_DOWN, _UP) if key.endswith(kind)), None)
        if kind is None or not key.startswith(_PREFIX) or not tensor.is_floating_point():
            raise _damaged(folder, f"{_WEIGHTS} holds {key}, which is no factor of LoRA")
        halves.setdefault(key.removeprefix(_PREFIX).removesuffix(kind), {})[kind] = tensor
    for name, found in halves.items():
        if len(found) != 2:
            raise _damaged(folder, f"{name} has one factor only")
    if not halves:
        raise _damaged(folder, f"{_WEIGHTS} is empty")
    return {name: (found[_DOWN], found[_UP]) for name, found in sorted(halves.items())}


def _by_name(folder: Path, config: dict[str, Any], pattern: str, names: list[str]) -> dict[str, Any]:
    """A setting that differs by module: keyed by a module's name or the end of it (PEFT takes regular expressions too)."""
    given = config.get(pattern) or {}
    if not isinstance(given, dict):
        raise _damaged(folder, f"{pattern} is no JSON object")
    found: dict[str, Any] = {}
    for key, value in given.items():
        fitting = [name for name in names if f".{name}".endswith(f".{key}")]
        if not fitting:
            raise _damaged(folder, f"{pattern} names {key!r}, which is none of its modules")
        found |= dict.fromkeys(fitting, value)
    return found


def _damaged(folder: Path, reason: str) -> ModelError:
    return ModelError(f"the adapter of {folder.name} cannot be used: {reason}.")

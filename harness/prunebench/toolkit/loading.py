"""Find, check, identify and load a model: a folder, a name in the mirror, or a pinned revision on the Hub.

Safetensors only. Pickle weights and code that comes with a model are refused unless the user allows them for that model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prunebench.errors import ModelError, Refused, first_line
from prunebench.toolkit.adapter_files import adapter_files, load_adapters
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.cache import digest, digest_file
from prunebench.toolkit.calibration import Vocabulary
from prunebench.toolkit.experts import take_apart
from prunebench.toolkit.hub import model_patterns, pinned, refusal
from prunebench.toolkit.model_shape import ModelShape, counted
from prunebench.toolkit.quiet import quiet_transformers
from prunebench.toolkit.shapes import NO_TOKENIZER, SHAPE, config_of, content_of, filled, shape_named
from prunebench.toolkit.trust import check_whole, trusts_code, weight_files

Allowed = frozenset[str]
"""What the user allows for a model by name: `pickle`, `remote-code`."""

ALLOWABLE = ("pickle", "remote-code")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A model's folder, what it is called, and how a record names where it came from."""

    folder: Path
    name: str
    source: str
    allowed: Allowed = frozenset()
    shape: str | None = None
    """The name of an architecture with random weights; `folder` is nothing then."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model by content, known before its weights are loaded."""

    weights: str
    tokenizer_hash: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    attention: str
    """The attention kernel that transformers will use."""

    def vocabulary(self) -> Vocabulary:
        """For making and checking tokens."""
        size = int(self.config.get_text_config().vocab_size)
        return Vocabulary(self.tokenizer, self.tokenizer_hash, size)


def resolve_model(name: str, folders: list[Path], revision: str | None = None, allowed: Allowed = frozenset()) -> ModelSource:
    """Find a model by a folder's path, a name in `folders` or in the mirror, or a name on the Hub.

    Args:
        name: a folder, or `owner/name`.
        folders: where relative names are looked for, in order.
        revision: a commit on the Hub; needed for a Hub model, so that the same name stays the same weights.

    Raises:
        ModelError: nothing is there.
    """
    return find_model(name, folders, allowed) or _from_hub(name, revision, allowed)


def find_model(name: str, folders: list[Path], allowed: Allowed = frozenset()) -> ModelSource | None:
    """A model by a folder's path, a name in `folders` or in the mirror, or `shape:NAME`; None where its name is one of the Hub.

    Raises:
        ModelError: it is nowhere.
        UnknownNameError: there is no such shape.
    """
    if name.startswith(SHAPE):
        shape = shape_named(name.removeprefix(SHAPE))
        return ModelSource(Path(), f"{shape} (random weights)", f"{SHAPE}{shape}", allowed, shape)
    for folder in [*folders, *_mirror_models()]:
        for spelling in dict.fromkeys((name, name.rsplit("/", 1)[-1])) if folder in _mirror_models() else (name,):
            candidate = folder / spelling
            if (candidate / "config.json").is_file():
                source = f"mirror:{name}" if folder in _mirror_models() else "local"
                return ModelSource(candidate.resolve(), candidate.resolve().name, source, allowed)
            if candidate.is_dir() and not any(candidate.glob("*/config.json")) and "/" in name:
                raise ModelError(f"{name} is a folder without a config.json, so it holds no model.")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not _mirror_models():
        return None
    where = "the mirror and " if _mirror_models() else ""
    raise ModelError(f"there is no model {name!r}: no folder of that name holds a config.json (looked in {where}{folders[0]}).")


def identify(source: ModelSource) -> ModelIdentity:
    """Read what can be known of a model without loading its weights, and check that it may be loaded.

    Raises:
        ModelError: the folder is unreadable, or holds what is not allowed.
    """
    if source.shape:
        config, shell = _shell(source)
        return ModelIdentity(content_of(source.shape), NO_TOKENIZER, config, None, str(shell.config._attn_implementation))
    folder = source.folder
    weights = weight_files(folder, source.name, source.allowed)
    trust = trusts_code(folder, source.name, source.allowed)
    check_whole(weights, source.name)
    with _readable(source):
        config, shell = _shell(source)
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES[:3])
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust) if has_tokenizer else None
    if adapter := adapter_files(folder):
        try:
            load_adapters(find_anatomy(shell), folder)  # what fits a model without weights fits the model
        except Refused as refusal:
            raise ModelError(f"the adapter of {source.name} cannot be used: {refusal}") from None
    return ModelIdentity(
        weights=_weights_hash(config, [*weights, *adapter]),
        tokenizer_hash=_tokenizer_hash(folder),
        config=config,
        tokenizer=tokenizer,
        attention=str(shell.config._attn_implementation),
    )


def check_unchanged(source: ModelSource, weights: str, tokenizer: str) -> None:
    """Find out whether a model is still the one that was identified, by the hashes of then.

    Files that nobody touched are not read again, so that it costs milliseconds.

    Raises:
        ModelError: it is another, or is gone.
    """
    if source.shape:
        _tell_changed(source, (content_of(source.shape), NO_TOKENIZER), (weights, tokenizer))
        return
    folder = source.folder
    files = [*weight_files(folder, source.name, source.allowed), *adapter_files(folder)]
    trust = trusts_code(folder, source.name, source.allowed)
    with _readable(source):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    _tell_changed(source, (_weights_hash(config, files), _tokenizer_hash(folder)), (weights, tokenizer))


def _tell_changed(source: ModelSource, found: tuple[str, str], planned: tuple[str, str]) -> None:
    if found != planned:
        raise ModelError(
            f"{source.name} is not the model any more that this run was planned for: its files were changed meanwhile. "
            "Run the same command again to measure what is there now."
        )


def _weights_hash(config: PretrainedConfig, files: Iterable[Path]) -> str:
    """Of the settings, and of the files of weights and adapters."""
    settings = json.dumps(_without_paths(config.to_dict()), sort_keys=True, default=str)
    return digest([settings, *(digest_file(path) for path in files)])


def _tokenizer_hash(folder: Path) -> str:
    return digest(digest_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file())


def shape_of(source: ModelSource) -> ModelShape:
    """Build a model without weights and count; `config.json` is all that needs to be there.

    Raises:
        ModelError: the settings are not those of a causal language model, or ask for code that is not allowed.
    """
    with _readable(source):
        config, shell = _shell(source)
    return counted(config, shell)


def _shell(source: ModelSource) -> tuple[PretrainedConfig, Any]:
    """A model's settings, and the model without its weights."""
    trust = source.shape is None and trusts_code(source.folder, source.name, source.allowed)
    config = config_of(source.shape) if source.shape else AutoConfig.from_pretrained(source.folder, trust_remote_code=trust)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)  # type: ignore[no-untyped-call]
    take_apart(shell)
    return config, shell


@contextmanager
def _readable(source: ModelSource) -> Iterator[None]:
    """Make one sentence of what transformers says about a model's files."""
    try:
        with quiet_transformers():
            yield
    except ModelError:
        raise
    except Exception as error:  # settings that do not fit raise one of many kinds, down to ZeroDivisionError
        raise ModelError(f"{source.name} cannot be read as a causal language model: {first_line(error)}") from error


def empty_model(source: ModelSource) -> PreTrainedModel:
    """A model on the meta device, without weights.

    Raises:
        ModelError: its settings are not those of a causal language model.
    """
    with _readable(source):
        shell: PreTrainedModel = _shell(source)[1]
        return shell


def load_model(source: ModelSource, dtype: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load a model in eval mode on the host, in `dtype`; a shape is drawn on `device` and stays there.

    Raises:
        ModelError: the weights cannot be read, or do not fill the model.
    """
    if source.shape:
        place = torch.device(device)
        return filled(empty_model(source), DTYPES[dtype], place, lambda _: place)
    weights = weight_files(source.folder, source.name, source.allowed)
    trust = trusts_code(source.folder, source.name, source.allowed)
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=DTYPES[dtype],
                use_safetensors=weights[0].suffix == ".safetensors",  # what `identify` has hashed
                trust_remote_code=trust,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except Exception as error:  # a cut or foreign file raises one of many kinds, down to safetensors' own
        raise ModelError(f"the weights of {source.name} cannot be loaded: {first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"the weights of {source.name} lack {len(missing)} parameters, the first is {missing[0]}.")
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise ModelError(f"{name} of {source.name} is {list(found)} in its file, and its config.json says {list(wanted)}.")
    model.train(False)
    take_apart(model)
    return model


def _mirror_models() -> list[Path]:
    mirror = os.environ.get("PRUNEBENCH_MIRROR")
    return [Path(mirror) / "models"] if mirror else []


def _from_hub(name: str, revision: str | None, allowed: Allowed) -> ModelSource:
    from huggingface_hub import snapshot_download

    revision = pinned(name, revision)
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=model_patterns(allowed))
    except Exception as error:  # noqa: BLE001 - the hub's client raises dozens of kinds, all of which mean: not to be had
        raise ModelError(refusal(name, revision, error)) from None
    return ModelSource(Path(folder), name.rsplit("/", 1)[-1], f"{name}@{revision}", allowed)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is computed; where and by which version it was written, and the dtype stored, do not."""
    left_out = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}
    return {key: value for key, value in config.items() if key not in left_out}

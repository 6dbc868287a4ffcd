"""Finding, identifying and loading models; what is refused, and that every refusal is a sentence."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import Bench, cases, same_bits, tiny
from transformers import LlamaForCausalLM
from transformers.utils import logging

from prunebench.errors import DataError, ModelError
from prunebench.toolkit.calibration import calibration_tokens
from prunebench.toolkit.loading import (
    DTYPES,
    ModelSource,
    check_unchanged,
    identify,
    load_model,
    quiet_transformers,
    resolve_model,
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def model(bench: Bench, tmp_path: Path) -> Path:
    """A copy of the tiny model, with its tokenizer."""
    return Path(shutil.copytree(bench.model, tmp_path / "models" / "tiny"))


def source_of(folder: Path, *allowed: str) -> ModelSource:
    return ModelSource(folder, folder.name, "local", frozenset(allowed))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def complaint(action: Callable[[], object]) -> str:
    """What a ModelError says: one line, no more than three sentences."""
    with pytest.raises(ModelError) as error:
        action()
    text = str(error.value)
    assert "\n" not in text
    assert 20 < len(text) < 600
    return text


# Names


def test_a_folder_by_its_path(model: Path, tmp_path: Path) -> None:
    for name, folders in (
        (str(model), [Path("/nowhere")]),
        ("tiny", [model.parent]),
        ("models/tiny", [Path("/nowhere"), tmp_path]),
        ("./models/../models/tiny", [tmp_path]),
    ):
        found = resolve_model(name, folders)
        assert found == ModelSource(model.resolve(), "tiny", "local", frozenset())


def test_the_first_folder_wins(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "others" / "tiny"))
    assert resolve_model("tiny", [other.parent, model.parent]).folder == other.resolve()
    assert resolve_model("tiny", [model.parent, other.parent]).folder == model.resolve()


def test_what_is_allowed_goes_along(model: Path) -> None:
    assert resolve_model(str(model), [Path()], allowed=frozenset({"pickle"})).allowed == {"pickle"}


@pytest.mark.parametrize("name", ["nothing", "/nowhere/tiny", "~/nothing-of-that-name", "a/b/c", "", "."])
def test_a_folder_that_is_not_there(tmp_path: Path, name: str) -> None:
    text = complaint(lambda: resolve_model(name, [tmp_path / "models"], revision="abc"))
    assert text.startswith(f"there is no model {name!r}: no folder of that name holds a config.json (looked in ")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "some" / "folder").mkdir(parents=True)
    assert complaint(lambda: resolve_model(str(tmp_path / "some" / "folder"), [Path()])).endswith(
        "is a folder without a config.json, so it holds no model."
    )


def test_a_hub_model_needs_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    assert "the Hub model owner/name needs a revision (a commit)" in complaint(lambda: resolve_model("owner/name", [tmp_path]))


def test_a_hub_model_that_cannot_be_had(tmp_path: Path) -> None:
    """Tests are offline, so this one can never be had."""
    text = complaint(lambda: resolve_model("owner/name-of-nothing", [tmp_path], revision="0" * 40))
    assert text.startswith(f"the model owner/name-of-nothing at {'0' * 40} cannot be had from the Hub: ")


@pytest.mark.parametrize(
    ("allowed", "more"),
    [((), []), (("pickle",), ["*.bin"]), (("remote-code",), ["*.py"]), (("pickle", "remote-code"), ["*.bin", "*.py"])],
)
def test_only_what_is_allowed_is_downloaded(
    model: Path, monkeypatch: pytest.MonkeyPatch, allowed: tuple[str, ...], more: list[str]
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model("owner/name", [Path("/nowhere")], revision="abc123", allowed=frozenset(allowed))
    assert found == ModelSource(model, "name", "owner/name@abc123", frozenset(allowed))
    assert (asked["name"], asked["revision"]) == ("owner/name", "abc123")
    assert asked["allow_patterns"] == ["*.json", "*.safetensors", "tokenizer.model", "*.txt", *more]


def test_the_mirror_resolves_by_layout(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("tiny", "owner/tiny"):
        found = resolve_model(name, [Path("/nowhere")], revision="abc")
        assert found == ModelSource(model.resolve(), "tiny", f"mirror:{name}", frozenset())
    local = Path(shutil.copytree(model, tmp_path / "here" / "tiny"))
    assert resolve_model("tiny", [local.parent]).source == "local"
    for name in ("owner/other", "other"):
        text = complaint(lambda name=name: resolve_model(name, [Path("/nowhere")], revision="abc"))
        assert "looked in the mirror and /nowhere" in text


def test_models_of_the_real_mirror(mirror: Path) -> None:
    for name in ("wiki7m", "stories260K"):
        found = resolve_model(name, [Path("/nowhere")])
        assert found.folder == (mirror / "models" / name).resolve()
        assert identify(found).config.model_type == "llama"


# Weights


def test_loading_gives_the_weights_of_the_file(model: Path) -> None:
    loaded = load_model(source_of(model), "float32")
    assert not loaded.training
    stored = load_file(model / "model.safetensors")
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    assert stored.keys() <= parameters.keys()
    assert all(same_bits(parameters[name].detach(), tensor) for name, tensor in stored.items())
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_in_any_dtype(model: Path, dtype: str) -> None:
    loaded = load_model(source_of(model), dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {DTYPES[dtype]}


def test_loading_is_silent(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_transformers():
        pass
    identify(source_of(model))
    load_model(source_of(model), "float32")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("shown", [True, False], ids=["with progress bars", "without"])
def test_silence_ends(shown: bool) -> None:
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with contextlib.suppress(ZeroDivisionError), quiet_transformers():
            assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.ERROR, False)
            raise ZeroDivisionError
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, shown)
    finally:
        logging.set_verbosity(before[0])
        (logging.enable_progress_bar if before[1] else logging.disable_progress_bar)()


def test_weights_in_several_files(model: Path, tmp_path: Path) -> None:
    whole = load_model(source_of(model), "float32")
    sharded = tmp_path / "sharded"
    with quiet_transformers():
        whole.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    found = load_model(source_of(sharded), "float32")
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(whole.parameters(), found.parameters(), strict=True))
    first = identify(source_of(sharded)).weights
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    flip_bit(shard)
    assert identify(source_of(sharded)).weights != first


def test_a_config_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    expected = "the folder of tiny holds no .safetensors file."
    assert complaint(lambda: identify(source_of(model))) == expected
    assert complaint(lambda: load_model(source_of(model), "float32")).endswith(expected)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.place,))


def with_pickled_weights(model: Path) -> dict[str, torch.Tensor]:
    """Replace the weights by others in a `.bin`."""
    state = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    torch.save(state, model / "pytorch_model.bin")
    return state


def test_pickled_weights_are_refused_unless_allowed(model: Path) -> None:
    state = with_pickled_weights(model)
    (model / "model.safetensors").unlink()
    for action in (lambda: identify(source_of(model)), lambda: load_model(source_of(model), "float32")):
        text = complaint(action)
        assert "has only pickled weights (pytorch_model.bin), which can run any code" in text
        assert "--allow pickle" in text
    assert complaint(lambda: identify(source_of(model, "remote-code")))
    allowed = source_of(model, "pickle")
    before = identify(allowed).weights
    loaded = dict(load_model(allowed, "float32").named_parameters(remove_duplicate=False))
    assert all(same_bits(loaded[name].detach(), tensor) for name, tensor in state.items())
    flip_bit(model / "pytorch_model.bin")
    assert identify(allowed).weights != before


def test_refused_pickles_are_not_opened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with (model / "pytorch_model.bin").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "exploded"), file)
    complaint(lambda: identify(source_of(model)))
    complaint(lambda: load_model(source_of(model), "float32"))
    assert not (tmp_path / "exploded").exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb of this test is a dud"


@pytest.mark.parametrize("allowed", [(), ("pickle",)], ids=["not allowed", "allowed"])
def test_safetensors_are_taken_where_both_are(model: Path, allowed: tuple[str, ...]) -> None:
    plain = identify(source_of(model)).weights
    with_pickled_weights(model)
    source = source_of(model, *allowed)
    assert identify(source).weights == plain
    stored = load_file(model / "model.safetensors")
    loaded = dict(load_model(source, "float32").named_parameters(remove_duplicate=False))
    assert all(same_bits(loaded[name].detach(), tensor) for name, tensor in stored.items())


def test_allowing_pickles_does_no_harm_where_there_are_none(model: Path) -> None:
    assert load_model(source_of(model, "pickle"), "float32").config.model_type == "llama"


def flip_bit(path: Path, at: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 0.5, -1])
def test_weights_that_are_cut_short(model: Path, size: float) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * size) if isinstance(size, float) else size])
    text = complaint(lambda: load_model(source_of(model), "float32"))
    assert text.startswith("the weights of tiny cannot be loaded: ")


@pytest.mark.parametrize(
    "content",
    [
        b"garbage",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        b"\x80\x04.",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["garbage", "an endless header", "no tensors", "a pickle", "a pointer of Git LFS"],
)
def test_weights_that_are_none(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert "tiny" in complaint(lambda: load_model(source_of(model), "float32"))


def test_missing_parameters_are_named(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    del state["model.layers.0.self_attn.q_proj.weight"]
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    assert complaint(lambda: load_model(source_of(model), "float32")) == (
        "the weights of tiny lack 2 parameters, the first is model.layers.0.self_attn.q_proj.weight."
    )


def test_weights_of_another_shape_are_named(model: Path) -> None:
    change_config(model, intermediate_size=32)
    assert complaint(lambda: load_model(source_of(model), "float32")) == (
        "model.layers.0.mlp.down_proj.weight of tiny is [16, 24] in its file, and its config.json says [16, 32]."
    )


# Settings

BAD_CONFIGS: dict[str, bytes | dict[str, Any]] = {
    "cut short": b'{"model_type": "lla',
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "a text": b'"llama"',
    "no settings": b"{}",
    "deeply nested": b"[" * 100_000,
    "an unknown architecture": {"model_type": "nothing-of-that-name"},
    "a number that is a text": {"hidden_size": "large"},
    "no heads": {"num_attention_heads": 0},
    "a negative size": {"vocab_size": -5},
    "an endless size": {"vocab_size": 10**30},
    "no context": {"max_position_embeddings": None},
    "an unknown activation": {"hidden_act": "nothing"},
    "an unknown dtype": {"dtype": "float99"},
    "unknown layers": {"layer_types": ["a"]},
    "no language model": {"model_type": "vit"},
}


@pytest.mark.parametrize("settings", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_settings_that_are_none(model: Path, settings: bytes | dict[str, Any]) -> None:
    if isinstance(settings, bytes):
        (model / "config.json").write_bytes(settings)
    else:
        change_config(model, **settings)
    assert "tiny" in complaint(lambda: identify(source_of(model)))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({place!r}).touch()
class TheirConfig(LlamaConfig):
    model_type = "theirs"
class TheirModel(LlamaForCausalLM):
    config_class = TheirConfig
"""


def test_code_that_comes_with_a_model_is_refused_unless_allowed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "ran"
    (model / "theirs.py").write_text(CODE.format(place=str(place)))
    auto_map = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    change_config(model, model_type="theirs", auto_map=auto_map)
    for allowed in ((), ("pickle",)):
        text = complaint(lambda allowed=allowed: identify(source_of(model, *allowed)))
        assert "tiny wants to run code that comes with it" in text
        assert "--allow remote-code" in text
        complaint(lambda allowed=allowed: load_model(source_of(model, *allowed), "float32"))
    assert not place.exists()
    # Allowed, it runs; what transformers copies and imports stays in this test.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    trusted = source_of(model, "remote-code")
    assert identify(trusted).config.model_type == "theirs"
    assert type(load_model(trusted, "float32")).__name__ == "TheirModel"
    assert place.exists()
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


# Identity


def test_the_weights_hash_changes_with_one_bit(model: Path) -> None:
    first = identify(source_of(model))
    assert len(first.weights) == 16
    for at in (-1, -5, -20_000):
        flip_bit(model / "model.safetensors", at)
        assert identify(source_of(model)).weights != first.weights
        flip_bit(model / "model.safetensors", at)
        assert identify(source_of(model)).weights == first.weights
    assert identify(source_of(model)).tokenizer_hash == first.tokenizer_hash


def test_the_weights_hash_is_not_of_names(model: Path, tmp_path: Path) -> None:
    first = identify(source_of(model))
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere" / "renamed"))
    change_config(moved, _name_or_path="/home/someone/models/tiny", transformers_version="9.9.9", dtype="float16")
    (moved / "README.md").write_text("hello")
    second = identify(source_of(moved))
    assert (second.weights, second.tokenizer_hash) == (first.weights, first.tokenizer_hash)


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}], ids=str)
def test_the_weights_hash_changes_with_what_is_computed(model: Path, change: dict[str, Any]) -> None:
    first = identify(source_of(model)).weights
    change_config(model, **change)
    assert identify(source_of(model)).weights != first


def test_the_tokenizer_has_a_hash_of_its_own(model: Path) -> None:
    first = identify(source_of(model))
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))
    (model / "tokenizer_config.json").unlink()
    second = identify(source_of(model))
    assert second.tokenizer_hash != first.tokenizer_hash
    assert second.weights == first.weights


def test_an_untouched_model_is_not_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one would take minutes at each run."""
    found, opened, really_open = identify(source_of(model)), [], Path.open

    def watched(self: Path, *args: Any, **options: Any) -> Any:
        opened.append(self.name)
        return really_open(self, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    check_unchanged(source_of(model), found.weights, found.tokenizer_hash)
    assert "model.safetensors" not in opened
    (model / "model.safetensors").touch()
    check_unchanged(source_of(model), found.weights, found.tokenizer_hash)
    assert "model.safetensors" in opened, "it might have been written anew"


@pytest.mark.parametrize(
    ("change", "said"),
    cases(
        {
            "a bit": (lambda model: flip_bit(model / "model.safetensors"), "is not the model any more"),
            "a setting": (lambda model: change_config(model, rms_norm_eps=1e-3), "is not the model any more"),
            "the tokenizer": (lambda model: (model / "tokenizer_config.json").unlink(), "is not the model any more"),
            "no weights": (lambda model: (model / "model.safetensors").unlink(), "holds no .safetensors file"),
            "no folder": (shutil.rmtree, "holds no .safetensors file"),
        }
    ),
)
def test_a_model_that_was_changed_since_is_noticed(model: Path, change: Callable[[Path], object], said: str) -> None:
    found = identify(source_of(model))
    change(model)
    assert said in complaint(lambda: check_unchanged(source_of(model), found.weights, found.tokenizer_hash))


def test_identifying_reads_no_weights_into_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the weights were loaded"))
    found = identify(source_of(model))
    assert found.attention == "sdpa"
    assert found.vocabulary().size == 300
    assert found.vocabulary().content == found.tokenizer_hash


def test_a_model_without_a_tokenizer_takes_token_files_only(model: Path, bench: Bench, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    found = identify(source_of(model))
    assert found.tokenizer is None
    np.save(tmp_path / "tokens.npy", np.arange(20).reshape(2, 10))
    assert calibration_tokens("tokens.npy", found.vocabulary(), 1, 1, 0, tmp_path).array.shape == (2, 10)
    np.save(tmp_path / "large.npy", np.array([[300]]))
    with pytest.raises(DataError, match="outside the model's vocabulary of 300"):
        calibration_tokens("large.npy", found.vocabulary(), 1, 1, 0, tmp_path)
    with pytest.raises(DataError, match=r"the model's folder has no tokenizer, so only token files \(\.npy\) can be used"):
        calibration_tokens(str(bench.calibration), found.vocabulary(), 1, 16, 0, tmp_path)


@pytest.mark.parametrize("content", [b"{", b"{}", b"null", b"\xff"], ids=["cut", "empty", "null", "not UTF-8"])
def test_tokenizers_that_are_none(model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    assert complaint(lambda: identify(source_of(model))).startswith("tiny cannot be read as a causal language model: ")


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma3"])
def test_every_family_is_identified_and_loaded(family: str, tmp_path: Path) -> None:
    saved = tiny(family)
    with quiet_transformers():
        saved.save_pretrained(tmp_path / family)
    source = resolve_model(family, [tmp_path])
    assert identify(source).config.model_type == saved.config.model_type
    loaded = load_model(source, "float32")
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))

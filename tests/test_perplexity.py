"""Perplexity against a slow formula, and on real models against published numbers (`methods.md` 1.5)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import Letters, Oracle, eval_job, tiny
from transformers import LlamaConfig, PreTrainedModel

from prunebench.bench.evals import windows as windows_module
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.bench.specs import eval_facts
from prunebench.errors import DataError, NonFiniteError, OptionError
from prunebench.spec import EvalFacts, Score
from prunebench.toolkit.cache import digest_array
from prunebench.toolkit.loading import ModelSource, identify, load_model

pytestmark = pytest.mark.usefixtures("own_cache")

CONTEXT = 32
LETTERS = 128
SHAPE = {"vocab_size": LETTERS, "max_position_embeddings": CONTEXT}


def facts_of(folder: Path, tokenizer: Any = None, **config: Any) -> EvalFacts:
    return EvalFacts(LlamaConfig(**SHAPE | config), tokenizer or Letters(), "letters", str(folder))


def measure(
    model: Any, facts: EvalFacts, batch_size: int = 4, progress: Callable[..., None] = lambda *_: None, **options: Any
) -> Score:
    evaluation = Perplexity(**options)
    return evaluation.measure(eval_job(evaluation, model, facts, batch_size=batch_size, progress=progress))


def indifferent(ids: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids.shape, LETTERS)


def slow_losses(model: PreTrainedModel, ids: Sequence[int], window: int) -> list[float]:
    """Mean over positions of -log softmax, in float64, a window and a position at a time."""
    losses = []
    for start in range(0, len(ids) - window + 1, window):
        part = list(ids[start : start + window])
        logits = model(torch.tensor([part])).logits[0].detach().numpy().astype(np.float64)
        positions = []
        for at in range(window - 1):
            row = logits[at] - logits[at].max()
            positions.append(math.log(np.exp(row).sum()) - row[part[at + 1]])
        losses.append(math.fsum(positions) / (window - 1))
    return losses


def write_text(folder: Path, length: int = 200) -> str:
    draw = np.random.default_rng(0)
    (folder / "a.txt").write_text("".join(chr(code) for code in draw.integers(97, 123, length)))
    return "a.txt"


# The number


@pytest.mark.parametrize("window", [2, 7, 16, CONTEXT])
def test_the_value_is_that_of_the_slow_formula(tmp_path: Path, window: int) -> None:
    model = tiny("llama", torch.float64, **SHAPE)
    name = write_text(tmp_path)
    score = measure(model, facts_of(tmp_path), data=name, window=window)
    losses = slow_losses(model, (tmp_path / name).read_bytes(), window)
    assert len(losses) == 200 // window
    assert score.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-6)
    assert score.items["nll"] == pytest.approx(losses, abs=2e-6)
    assert (score.unit, score.higher_is_better) == ("perplexity", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_in_float32_whatever_the_model(tmp_path: Path, dtype: torch.dtype) -> None:
    """In 16 bits the sum of 128 exponentials alone would be off by a percent."""
    model = tiny("llama", dtype, **SHAPE)
    name = write_text(tmp_path)
    losses = slow_losses_of_half(model, (tmp_path / name).read_bytes())
    score = measure(model, facts_of(tmp_path), batch_size=1, data=name, window=20)
    assert score.value == pytest.approx(math.exp(math.fsum(losses) / len(losses)), rel=1e-5)


def slow_losses_of_half(model: PreTrainedModel, ids: bytes) -> list[float]:
    class Widened:
        def __call__(self, tokens: torch.Tensor) -> Any:
            return SimpleNamespace(logits=model(tokens).logits.float())

    return slow_losses(Widened(), ids, 20)  # type: ignore[arg-type]


def test_guessing_among_all_tokens_has_the_perplexity_of_their_number(tmp_path: Path) -> None:
    score = measure(Oracle(indifferent), facts_of(tmp_path), data=write_text(tmp_path), window=10)
    assert score.value == pytest.approx(LETTERS, rel=1e-6)
    assert score.items["nll"] == [round(math.log(LETTERS), 6)] * 20


def test_a_token_is_predicted_from_those_before_it(tmp_path: Path) -> None:
    """A model that knows the next letter of the alphabet has perplexity 1 on it, and only on it."""
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")

    def next_letter(ids: torch.Tensor) -> torch.Tensor:
        return 100.0 * torch.nn.functional.one_hot(ids + 1, LETTERS).float()

    assert measure(Oracle(next_letter), facts_of(tmp_path), data="a.txt", window=13).value == pytest.approx(1.0)
    (tmp_path / "a.txt").write_text("zyxwvutsrqponmlkjihgfedcba")
    assert measure(Oracle(next_letter), facts_of(tmp_path), data="a.txt", window=13).value > 1e6


def test_windows_count_equally(tmp_path: Path) -> None:
    """The value is the exponential of the mean over windows, not the mean of exponentials."""
    (tmp_path / "a.txt").write_text("aaaabbbb")

    def sure_of_a(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(*ids.shape, LETTERS)
        logits[..., ord("a")] = math.log(3 * (LETTERS - 1))  # three quarters for `a`
        return logits

    score = measure(Oracle(sure_of_a), facts_of(tmp_path), data="a.txt", window=4)
    losses = [-math.log(0.75), -math.log(0.25 / (LETTERS - 1))]
    assert score.items["nll"] == pytest.approx(losses, abs=1e-6)
    assert score.value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(tmp_path: Path, batch_size: int) -> None:
    model, name = tiny("llama", **SHAPE), write_text(tmp_path)
    one = measure(model, facts_of(tmp_path), batch_size=2, data=name, window=16)
    other = measure(model, facts_of(tmp_path), batch_size=batch_size, data=name, window=16)
    assert other.value == pytest.approx(one.value, rel=1e-6)
    assert other.items["nll"] == pytest.approx(one.items["nll"], abs=2e-6)
    assert other.items["document"] == one.items["document"]


def test_batches_are_smaller_where_logits_would_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_text(tmp_path)
    for most, expected in ((10**9, [8, 8, 4]), (3 * 10 * LETTERS, [3] * 6 + [2]), (1, [1] * 20)):
        monkeypatch.setattr(windows_module, "MAX_LOGITS", most)
        oracle = Oracle(indifferent)
        measure(oracle, facts_of(tmp_path), batch_size=8, data=name, window=10)
        assert oracle.batches == expected


# Windows


@pytest.mark.parametrize(("length", "window", "windows"), [(20, 5, 4), (24, 5, 4), (25, 5, 5), (5, 5, 1), (9, 5, 1)])
def test_windows_do_not_overlap_and_the_rest_is_dropped(tmp_path: Path, length: int, window: int, windows: int) -> None:
    name = write_text(tmp_path, length)
    oracle = Oracle(indifferent)
    facts = facts_of(tmp_path)
    measure(oracle, facts, data=name, window=window)
    content = list((tmp_path / name).read_bytes())
    assert oracle.shown == [content[at * window : (at + 1) * window] for at in range(windows)]
    conditions = Perplexity(data=name, window=window).conditions(facts)
    assert (conditions["tokens"], conditions["window"], conditions["windows"]) == (length, window, windows)
    assert conditions["token_hash"] == digest_array(np.array(content[: windows * window]))


@pytest.mark.parametrize(("asked", "used"), [(0, 20), (1, 1), (7, 7), (20, 20), (500, 20)])
def test_only_the_first_windows(tmp_path: Path, asked: int, used: int) -> None:
    name, oracle = write_text(tmp_path), Oracle(indifferent)
    score = measure(oracle, facts_of(tmp_path), data=name, window=10, windows=asked)
    assert len(oracle.shown) == len(score.items["nll"]) == used
    assert oracle.shown[0] == list((tmp_path / name).read_bytes()[:10])


def test_bos_stands_in_the_first_window_only(tmp_path: Path) -> None:
    oracle, tokenizer = Oracle(indifferent), Letters(bos=1)
    name = write_text(tmp_path, 39)
    measure(oracle, facts_of(tmp_path, tokenizer), data=name, window=10)
    assert [row.count(1) for row in oracle.shown] == [1, 0, 0, 0]
    assert [token for row in oracle.shown for token in row] == [1, *(tmp_path / name).read_bytes()]
    assert len(tokenizer.read) == 1, "the text is tokenized once, in one piece"


@pytest.mark.parametrize(("context", "window"), [(32, 32), (2048, 2048), (4096, 2048)])
def test_the_window_is_the_models_context_at_most_2048(tmp_path: Path, context: int, window: int) -> None:
    name = write_text(tmp_path, 5000)
    conditions = Perplexity(data=name).conditions(facts_of(tmp_path, max_position_embeddings=context))
    assert conditions["window"] == window
    assert conditions["windows"] == 5000 // window


def test_a_window_beyond_the_context(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="perplexity: a window of 33 is longer than the model's context of 32"):
        Perplexity(data=write_text(tmp_path), window=33).conditions(facts_of(tmp_path))


def test_a_text_shorter_than_a_window(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"perplexity: a\.txt has 9 tokens, fewer than one window of 10"):
        Perplexity(data=write_text(tmp_path, 9), window=10).conditions(facts_of(tmp_path))


@pytest.mark.parametrize("options", [{"window": 1}, {"window": -1}, {"windows": -1}], ids=str)
def test_options_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="perplexity: "):
        Perplexity(**options)  # type: ignore[arg-type]


def test_the_document_of_each_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("= A =\n\n" + 13 * "a" + "\n\n= B =\n\n" + 20 * "b" + "\n")
    score = measure(Oracle(indifferent), facts_of(tmp_path), data="a.txt", window=5)
    assert score.items["document"] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]  # the second begins at 22


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    measure(
        Oracle(indifferent),
        facts_of(tmp_path),
        batch_size=8,
        progress=lambda *what: told.append(what),
        data=write_text(tmp_path),
        window=10,
    )
    assert told == [("window", 0, 20), ("window", 8, 20), ("window", 16, 20), ("window", 20, 20)]


# Token files


def test_a_flat_token_file_is_a_text(tmp_path: Path) -> None:
    model, name = tiny("llama", **SHAPE), write_text(tmp_path)
    np.save(tmp_path / "flat.npy", np.frombuffer((tmp_path / name).read_bytes(), np.uint8))
    facts = facts_of(tmp_path)
    flat = measure(model, facts, data="flat.npy", window=16)
    assert flat.value == measure(model, facts, data=name, window=16).value
    assert Perplexity(data="flat.npy").conditions(facts)["window"] == CONTEXT


def test_a_token_file_of_windows_keeps_them(tmp_path: Path) -> None:
    windows = np.random.default_rng(0).integers(0, LETTERS, (6, 12))
    np.save(tmp_path / "windows.npy", windows)
    facts = facts_of(tmp_path)
    for options in ({}, {"window": 12}):
        oracle = Oracle(indifferent)
        score = measure(oracle, facts, data="windows.npy", **options)
        assert oracle.shown == windows.tolist()
        assert score.items["document"] == list(range(6))
    with pytest.raises(DataError, match=r"windows\.npy holds windows of 12 tokens, and window is 24"):
        Perplexity(data="windows.npy", window=24).conditions(facts)


@pytest.mark.parametrize(("width", "complaint"), [(33, "longer than the model's context of 32"), (1, "too short to predict")])
def test_windows_in_a_file_must_fit_the_model(tmp_path: Path, width: int, complaint: str) -> None:
    np.save(tmp_path / "windows.npy", np.zeros((2, width), int))
    with pytest.raises(DataError, match=f"perplexity: a window of {width} is {complaint}"):
        Perplexity(data="windows.npy").conditions(facts_of(tmp_path))


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.zeros((2, 2, 2), int), "must hold a flat token stream or"),
        (np.zeros(40), "must hold integers"),
        (np.full(40, LETTERS), "outside the model's vocabulary of 128"),
        (np.full(40, -1), "outside the model's vocabulary of 128"),
    ],
    ids=["three dimensions", "floats", "too large", "negative"],
)
def test_token_files_that_do_not_fit(tmp_path: Path, array: Any, complaint: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=f"a.npy.*{complaint}"):
        Perplexity(data="a.npy", window=10).conditions(facts_of(tmp_path))


# Values that are none


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    model = tiny("llama", **SHAPE)
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("a")] = value
    (tmp_path / "a.txt").write_text("bcdebcde" + "bacd" + "bcde")
    with pytest.raises(NonFiniteError, match="the likelihood of 1 of 4 windows is not finite, first of window 2"):
        measure(model, facts_of(tmp_path), data="a.txt", window=4)


def test_a_perplexity_beyond_all_numbers(tmp_path: Path) -> None:
    def certain_of_nul(ids: torch.Tensor) -> torch.Tensor:
        return 1000.0 * torch.nn.functional.one_hot(torch.zeros_like(ids), LETTERS).float()

    with pytest.raises(NonFiniteError, match=r"the mean negative log-likelihood is 1000\.0, whose exponential is not finite"):
        measure(Oracle(certain_of_nul), facts_of(tmp_path), data=write_text(tmp_path), window=10)


# Conditions


def test_conditions_say_what_was_measured(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    fake_mirror("Salesforce/wikitext/wikitext-2-raw-v1/test", ["", " = A = \n", "", "x" * 60 + "\n"])
    conditions = Perplexity(window=16).conditions(facts_of(tmp_path))
    assert json.loads(json.dumps(conditions)) == conditions
    assert {
        key: conditions[key] for key in ("data", "config", "split", "origin", "complete", "joining", "window", "windows")
    } == {
        "data": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "origin": "mirror",
        "complete": False,
        "joining": "'\\n\\n'",
        "window": 16,
        "windows": (2 + 7 + 2 + 2 + 61 + 0) // 16,
    }


def test_conditions_tell_texts_and_windows_apart(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    first = Perplexity(data=write_text(tmp_path), window=10).conditions(facts)
    assert Perplexity(data="a.txt", window=20).conditions(facts) != first
    assert Perplexity(data="a.txt", window=10, windows=3).conditions(facts)["token_hash"] != first["token_hash"]
    (tmp_path / "a.txt").write_text((tmp_path / "a.txt").read_text().replace("a", "b"))
    second = Perplexity(data="a.txt", window=10).conditions(facts)
    assert (second["content"], second["token_hash"]) != (first["content"], first["token_hash"])
    assert second["content"] != first["content"]


@pytest.mark.parametrize("name", ["c4", "c4:validation", "allenai/c4/en", "allenai/c4/en:validation"])
def test_c4_is_its_first_1100_texts_and_256_windows(tmp_path: Path, fake_mirror: Callable[..., Path], name: str) -> None:
    rows = [f"text {index}" for index in range(1300)]
    fake_mirror("allenai/c4/en/validation", rows)
    whole = " ".join(rows[:1100])
    facts = facts_of(tmp_path)
    few = Perplexity(data=name, window=32).conditions(facts)
    assert few["tokens"] == len(whole)
    assert few["windows"] == 256 < len(whole) // 32
    more = Perplexity(data=name, window=32, windows=300).conditions(facts)
    assert more["windows"] == 256
    oracle = Oracle(indifferent)
    measure(oracle, facts, data=name, window=32, windows=2)
    assert bytes(oracle.shown[0]) == whole[:32].encode()


def test_other_texts_are_taken_whole(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    rows = [f"text {index}" for index in range(1300)]
    fake_mirror("owner/name/default/test", rows)
    conditions = Perplexity(data="owner/name", window=4).conditions(facts_of(tmp_path))
    assert conditions["tokens"] == len("\n\n".join(rows))
    assert conditions["windows"] == conditions["tokens"] // 4


# Real models


def on_mirror(mirror: Path, model: str, **options: Any) -> Score:
    source = ModelSource(mirror / "models" / model, model, "local")
    facts = eval_facts(identify(source), mirror)
    return measure(load_model(source, "float32"), facts, batch_size=8, **options)


@pytest.mark.slow
def test_stories260k_on_its_golden_tokens(mirror: Path) -> None:
    score = on_mirror(mirror, "stories260K", data="golden/stories260K/eval.npy", window=256)
    assert score.value == pytest.approx(4.107, abs=5e-4)


@pytest.mark.slow
def test_wiki7m_on_tinystories(mirror: Path) -> None:
    score = on_mirror(mirror, "wiki7m", data="roneneldan/TinyStories:validation", window=512, windows=100)
    assert score.value == pytest.approx(16.57, abs=5e-3)


@pytest.mark.slow
def test_wiki7m_on_c4(mirror: Path) -> None:
    score = on_mirror(mirror, "wiki7m", data="c4", window=256)
    assert len(score.items["nll"]) == 256
    assert score.value == pytest.approx(95.44, abs=5e-3)


@pytest.mark.soak  # on the whole text; the golden tests read it too
def test_wiki7m_on_wikitext(mirror: Path) -> None:
    score = on_mirror(mirror, "wiki7m", data="wikitext2", window=512)
    assert len(score.items["nll"]) == 740
    assert score.value == pytest.approx(61.72, abs=5e-3)
    assert score.items["document"][-1] == 59

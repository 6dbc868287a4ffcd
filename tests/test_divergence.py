"""Divergence from the dense model against a slow formula, and what windows it shares with perplexity."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Letters, Oracle, eval_job, tiny
from transformers import LlamaConfig, PreTrainedModel

from prunebench.bench.evals import windows as windows_module
from prunebench.bench.evals.divergence import Divergence
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.errors import DataError, NonFiniteError, OptionError
from prunebench.spec import EvalFacts, Score

pytestmark = pytest.mark.usefixtures("own_cache")

LETTERS = 128
SHAPE = {"vocab_size": LETTERS, "max_position_embeddings": 32}


def facts_of(folder: Path) -> EvalFacts:
    return EvalFacts(LlamaConfig(**SHAPE), Letters(), "letters", str(folder))  # type: ignore[arg-type]


def measure(model: Any, dense: Any, facts: EvalFacts, batch_size: int = 4, **options: Any) -> Score:
    evaluation = Divergence(**options)
    return evaluation.measure(eval_job(evaluation, model, facts, dense=dense, batch_size=batch_size))


def write_text(folder: Path, length: int = 200) -> str:
    draw = np.random.default_rng(0)
    (folder / "a.txt").write_text("".join(chr(code) for code in draw.integers(97, 123, length)))
    return "a.txt"


def disturbed(model: PreTrainedModel, by: float) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(1)
        for parameter in other.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return other


def always(token: int, share: float) -> Oracle:
    """A model that gives one token this share of the probability, the others equal parts of the rest."""
    logits = torch.zeros(LETTERS)
    logits[token] = math.log(share * (LETTERS - 1) / (1 - share))
    return Oracle(lambda ids: logits.expand(*ids.shape, LETTERS))


def slow(dense: PreTrainedModel, pruned: PreTrainedModel, part: list[int]) -> tuple[float, float]:
    """Divergence and agreement of a window in float64, a position and a token at a time."""
    divergences, same = [], []
    for at in range(len(part) - 1):
        rows = [model(torch.tensor([part])).logits[0, at].detach().numpy().astype(np.float64) for model in (dense, pruned)]
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in rows)
        divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same.append(int(rows[0].argmax()) == int(rows[1].argmax()))
    return math.fsum(divergences) / len(divergences), sum(same) / len(same)


# The numbers


@pytest.mark.parametrize("window", [2, 7, 16])
def test_the_value_is_that_of_the_slow_formula(tmp_path: Path, window: int) -> None:
    dense = tiny("llama", torch.float64, **SHAPE)
    pruned = disturbed(dense, 0.02)
    name = write_text(tmp_path, 60)
    score = measure(pruned, dense, facts_of(tmp_path), data=name, window=window)
    content = list((tmp_path / name).read_bytes())
    found = [slow(dense, pruned, content[at * window : (at + 1) * window]) for at in range(60 // window)]
    assert score.items["kl"] == pytest.approx([kl for kl, _ in found], rel=1e-4, abs=1e-7)
    assert score.items["agreement"] == pytest.approx([agreement for _, agreement in found], abs=1e-6)
    assert score.value == pytest.approx(np.mean([kl for kl, _ in found]), rel=1e-4)
    assert score.parts == {"top-1 agreement": pytest.approx(np.mean([agreement for _, agreement in found]))}
    assert 0 < score.parts["top-1 agreement"] < 1
    assert (score.unit, score.higher_is_better) == ("KL, nats", False)
    assert score.sample is not None
    assert (score.sample.column, score.sample.documents, score.sample.exponential) == ("kl", "document", False)


def test_the_divergence_is_that_from_the_dense_model_not_to_it(tmp_path: Path) -> None:
    """By hand: with p on `a` three quarters and q one half, the rest spread evenly."""
    name = write_text(tmp_path)
    from_dense = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    to_dense = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    sharp, flat = always(ord("a"), 0.75), always(ord("a"), 0.5)
    assert measure(flat, sharp, facts_of(tmp_path), data=name, window=10).value == pytest.approx(from_dense, rel=1e-5)
    assert measure(sharp, flat, facts_of(tmp_path), data=name, window=10).value == pytest.approx(to_dense, rel=1e-5)


def test_first_choices_may_differ_everywhere_or_nowhere(tmp_path: Path) -> None:
    name, facts = write_text(tmp_path), facts_of(tmp_path)
    first = always(ord("a"), 0.5)
    assert measure(always(ord("a"), 0.1), first, facts, data=name, window=10).parts == {"top-1 agreement": 1.0}
    assert measure(always(ord("b"), 0.5), first, facts, data=name, window=10).parts == {"top-1 agreement": 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dense_model_diverges_from_itself_by_exactly_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    dense, name = tiny("llama", dtype, **SHAPE), write_text(tmp_path)
    score = measure(copy.deepcopy(dense), dense, facts_of(tmp_path), data=name, window=16)
    assert score.value == 0
    assert set(score.items["kl"]) == {0.0}
    assert score.parts == {"top-1 agreement": 1.0}


def test_rounding_makes_no_divergence_negative(tmp_path: Path) -> None:
    dense, name = tiny("llama", **SHAPE), write_text(tmp_path)
    for by in (1e-9, 1e-8, 1e-7, 1e-6):
        score = measure(disturbed(dense, by), dense, facts_of(tmp_path), data=name, window=16)
        assert min(score.items["kl"]) >= 0


def test_in_16_bits_the_sums_are_still_in_32(tmp_path: Path) -> None:
    dense, name = tiny("llama", torch.bfloat16, **SHAPE), write_text(tmp_path)
    pruned = disturbed(dense, 0.05)
    score = measure(pruned, dense, facts_of(tmp_path), batch_size=1, data=name, window=20)
    ids = torch.tensor(list((tmp_path / name).read_bytes())).view(-1, 20)
    wanted = []
    for row in ids:
        p, q = (m(row[None]).logits[0, :-1].detach().double().log_softmax(-1) for m in (dense, pruned))
        wanted.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert score.items["kl"] == pytest.approx(wanted, rel=1e-4)


# Windows and batches


def test_windows_are_those_of_perplexity(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("= A =\n\n" + 13 * "a" + "\n\n= B =\n\n" + 20 * "b" + "\n")
    facts = facts_of(tmp_path)
    own = Divergence(data="a.txt", window=5, windows=7).conditions(facts)
    assert own.pop("direction") == "KL(dense || pruned) over the whole vocabulary"
    assert own == Perplexity(data="a.txt", window=5, windows=7).conditions(facts)
    model = always(ord("a"), 0.5)
    score = measure(model, model, facts, data="a.txt", window=5, windows=7)
    assert score.items["document"] == [0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(tmp_path: Path, batch_size: int) -> None:
    dense, name = tiny("llama", torch.float64, **SHAPE), write_text(tmp_path)
    pruned, facts = disturbed(dense, 0.02), facts_of(tmp_path)
    one = measure(pruned, dense, facts, batch_size=2, data=name, window=16)
    other = measure(pruned, dense, facts, batch_size=batch_size, data=name, window=16)
    assert other.items["kl"] == pytest.approx(one.items["kl"], rel=1e-6)
    assert other.items["agreement"] == one.items["agreement"]


def test_batches_leave_room_for_the_logits_of_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write_text(tmp_path)
    for most, expected in ((10**9, [8, 8, 4]), (2 * 3 * 10 * LETTERS, [3] * 6 + [2]), (1, [1] * 20)):
        monkeypatch.setattr(windows_module, "MAX_LOGITS", most)
        dense, pruned = always(ord("a"), 0.5), always(ord("a"), 0.5)
        measure(pruned, dense, facts_of(tmp_path), batch_size=8, data=name, window=10)
        assert dense.batches == pruned.batches == expected


# What cannot be


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["dense", "pruned"])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, which: str) -> None:
    sound = tiny("llama", **SHAPE)
    broken = copy.deepcopy(sound)
    with torch.no_grad():
        broken.get_input_embeddings().weight[ord("a")] = value
    (tmp_path / "a.txt").write_text("bcdebcde" + "bacd" + "bcde")
    pruned, dense = (sound, broken) if which == "dense" else (broken, sound)
    with pytest.raises(NonFiniteError, match="the divergence of 1 of 4 windows is not finite, first of window 2"):
        measure(pruned, dense, facts_of(tmp_path), data="a.txt", window=4)


def test_messages_name_the_evaluation(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="divergence: a window is at least 2 tokens"):
        Divergence(window=1)
    with pytest.raises(DataError, match="divergence: a window of 33 is longer than the model's context of 32"):
        Divergence(data=write_text(tmp_path), window=33).conditions(facts_of(tmp_path))

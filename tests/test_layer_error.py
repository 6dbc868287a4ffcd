"""The error of each matrix's output against a slow formula, and what counts as error."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Letters, eval_job, tiny
from transformers import LlamaConfig, PreTrainedModel

from prunebench.bench.evals.layer_error import LayerError
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.errors import NonFiniteError
from prunebench.spec import EvalFacts, Score
from prunebench.toolkit.anatomy import find_anatomy

pytestmark = pytest.mark.usefixtures("own_cache")

SHAPE = {"vocab_size": 128, "max_position_embeddings": 32}


@pytest.fixture
def facts(tmp_path: Path) -> EvalFacts:
    draw = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("".join(chr(code) for code in draw.integers(97, 123, 64)))
    return EvalFacts(LlamaConfig(**SHAPE), Letters(), "letters", str(tmp_path))  # type: ignore[arg-type]


def measure(model: Any, dense: Any, facts: EvalFacts, batch_size: int = 4) -> Score:
    evaluation = LayerError(data="a.txt", window=16)
    return evaluation.measure(eval_job(evaluation, model, facts, dense=dense, batch_size=batch_size))


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """Every second weight of every prunable matrix is zero."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in find_anatomy(other).matrices:
            matrix.parameter.flatten()[::2] = 0
    return other


def slow(model: PreTrainedModel, dense: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """A matrix and a token at a time, in float64; weights as [outputs, inputs], whatever the family stores."""
    seen: dict[str, list[np.ndarray[Any, Any]]] = {}
    matrices = find_anatomy(model).matrices
    hooks = [
        matrix.module.register_forward_pre_hook(
            lambda _, inputs, name=matrix.name: seen.setdefault(name, []).extend(inputs[0].flatten(0, -2).double().numpy())
        )
        for matrix in matrices
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found = {}
    for matrix, before in zip(matrices, find_anatomy(dense).matrices, strict=True):
        now, then = (m.weight.detach().double().numpy() for m in (matrix, before))
        wrong = sum(float(((now - then) @ x) @ ((now - then) @ x)) for x in seen[matrix.name])
        whole = sum(float((then @ x) @ (then @ x)) for x in seen[matrix.name])
        found[matrix.name] = wrong / whole
    return found


def letters(facts: EvalFacts) -> torch.Tensor:
    return torch.tensor(list((Path(facts.folder) / "a.txt").read_bytes())).view(-1, 16)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_errors_are_those_of_the_slow_formula(facts: EvalFacts, family: str) -> None:
    """opt has biases, gpt2 stores its matrices the other way round."""
    dense = tiny(family, **(SHAPE if family != "gpt2" else {"vocab_size": 128, "n_positions": 32}))
    pruned = halved(dense)
    score = measure(pruned, dense, facts)
    expected = slow(pruned, dense, letters(facts))
    assert score.items["matrix"] == list(expected)
    assert score.items["error"] == pytest.approx(list(expected.values()), rel=1e-4)
    assert score.value == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
    assert 0.1 < score.value < 1
    assert (score.unit, score.higher_is_better, score.sample) == ("relative error", False, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_not_changed_has_no_error_at_all(facts: EvalFacts, dtype: torch.dtype) -> None:
    dense = tiny("llama", dtype, **SHAPE)
    score = measure(copy.deepcopy(dense), dense, facts)
    assert set(score.items["error"]) == {0.0}
    assert score.value == 0


def test_a_change_in_one_matrix_is_an_error_there_only(facts: EvalFacts) -> None:
    """Later matrices get other inputs, and answer them as the dense ones would."""
    dense = tiny("llama", **SHAPE)
    pruned = copy.deepcopy(dense)
    first = find_anatomy(pruned).matrices[0]
    with torch.no_grad():
        first.parameter.zero_()
    score = measure(pruned, dense, facts)
    assert dict(zip(score.items["matrix"], score.items["error"], strict=True)) == {
        matrix.name: 1.0 if matrix.name == first.name else 0.0 for matrix in find_anatomy(dense).matrices
    }


def test_a_changed_bias_and_an_adapter_are_changes(facts: EvalFacts) -> None:
    dense = tiny("opt", **SHAPE)
    pruned = copy.deepcopy(dense)
    matrices = find_anatomy(pruned).matrices
    with torch.no_grad():
        matrices[0].module.bias += 1
    matrices[1].module.register_forward_hook(lambda _, inputs, output: 2 * output)
    score = measure(pruned, dense, facts)
    errors = dict(zip(score.items["matrix"], score.items["error"], strict=True))
    assert {name for name, error in errors.items() if error} == {matrices[0].name, matrices[1].name}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(facts: EvalFacts, batch_size: int) -> None:
    dense = tiny("llama", **SHAPE)
    pruned = halved(dense)
    one, other = measure(pruned, dense, facts, batch_size=2), measure(pruned, dense, facts, batch_size=batch_size)
    assert other.items["error"] == pytest.approx(one.items["error"], rel=1e-5)


def test_a_matrix_that_answers_nothing_is_left_out(facts: EvalFacts) -> None:
    dense = tiny("llama", **SHAPE)
    silent = find_anatomy(dense).matrices[3]
    with torch.no_grad():
        silent.parameter.zero_()
    names = measure(halved(dense), dense, facts).items["matrix"]
    assert names == [matrix.name for matrix in find_anatomy(dense).matrices if matrix.name != silent.name]


def test_no_hook_stays(facts: EvalFacts) -> None:
    dense = tiny("llama", **SHAPE)
    pruned = halved(dense)
    measure(pruned, dense, facts)
    broken = halved(dense)
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"of the output of 21 of 21 matrices is not finite, first of model\.layers\.0"):
        measure(broken, dense, facts)
    assert not any(module._forward_hooks for model in (pruned, broken, dense) for module in model.modules())


def test_conditions_are_those_of_perplexity_and_say_what_is_compared(facts: EvalFacts) -> None:
    own = LayerError(data="a.txt", window=16).conditions(facts)
    assert "dense x" in str(own.pop("error"))
    assert own == Perplexity(data="a.txt", window=16).conditions(facts)

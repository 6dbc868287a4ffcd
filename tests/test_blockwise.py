"""Evaluations of models whose blocks rest elsewhere: the numbers of the model's own forward, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Letters, eval_job, tiny
from torch import nn
from transformers import PreTrainedModel

from prunebench.bench.evals.divergence import Divergence
from prunebench.bench.evals.layer_error import LayerError
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.bench.evals.windows import WindowEval
from prunebench.spec import EvalFacts, EvalJob
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.placement import Streaming
from prunebench.toolkit.visiting import Visits, visiting


class Counted(Streaming):
    """The host plays the device; counts the blocks that are there at once."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.there = self.most = 0

    def bring(self, module: nn.Module) -> None:
        super().bring(module)
        self.there += 1
        self.most = max(self.most, self.there)

    def drop(self, module: nn.Module) -> None:
        super().drop(module)
        self.there -= 1


pytestmark = pytest.mark.usefixtures("own_cache")

WINDOW, COUNT, BATCH = 8, 7, 2
LETTERS = 128
EVALS = (Perplexity, Divergence, LayerError)


def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(1)
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return other


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [block.module for block in find_anatomy(model).blocks]  # type: ignore[arg-type]


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., EvalJob]:
    """An evaluation's job on a text of seven windows and a rest."""
    draw = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("".join(chr(code) for code in draw.integers(97, 123, WINDOW * COUNT + 3)))

    def job(kind: type[WindowEval], model: Any, dense: Any) -> tuple[WindowEval, EvalJob]:
        evaluation = kind(data="a.txt", window=WINDOW)
        facts = EvalFacts(model.config, Letters(), "letters", str(tmp_path))  # type: ignore[arg-type]
        return evaluation, eval_job(evaluation, model, facts, dense=dense, batch_size=BATCH)

    return job


@pytest.mark.parametrize("kind", EVALS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "falcon"])
def test_block_by_block_the_numbers_are_the_same(family: str, kind: type[WindowEval], asked: Callable[..., Any]) -> None:
    dense = tiny(family, vocab_size=LETTERS)
    pruned = disturbed(dense)
    evaluation, job = asked(kind, pruned, dense)
    wanted = evaluation.measure(job)
    placement = Counted()
    calls = forwards(pruned)
    job.placement = Visits(placement)
    assert evaluation.measure(job) == wanted
    assert placement.most == (2 if kind is LayerError else 1)
    assert placement.there == 0
    batches = [BATCH] * 3 + [1]
    assert calls == [1, 2, *batches, *([] if kind is LayerError else batches)], (
        "two to see its calls, all, all above the blocks"
    )
    if kind is not LayerError:
        chosen = [5, 0, 3]
        job.placement = None
        apart = evaluation.again(job, chosen)  # type: ignore[attr-defined]
        job.placement = Visits(placement)
        assert evaluation.again(job, chosen) == apart  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", EVALS, ids=lambda kind: kind.name)
def test_a_model_that_cannot_be_taken_apart_is_called_as_it_is(kind: type[WindowEval], asked: Callable[..., Any]) -> None:
    """Its blocks come and go within its own forward."""
    dense = tiny(vocab_size=LETTERS)
    pruned = disturbed(dense)
    for model in (dense, pruned):  # changes the hidden state between two blocks
        blocks_of(model)[1].register_forward_pre_hook(lambda _, args: (0.5 * args[0], *args[1:]))
    evaluation, job = asked(kind, pruned, dense)
    wanted = evaluation.measure(job)
    placement = Counted()
    job.placement = visits = Visits(placement)
    with visiting(blocks_of(dense), visits), visiting(blocks_of(pruned), visits):
        assert evaluation.measure(job) == wanted
    assert placement.most >= 1
    assert placement.there == 0


def test_visits_nest_and_end_with_an_error() -> None:
    model = tiny()
    placement = Counted()
    visits = Visits(placement)
    blocks = blocks_of(model)
    ids = torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    wanted = model(input_ids=ids, use_cache=False).logits
    with visiting(blocks, visits):
        visits.bring(blocks[1])
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        assert placement.there == 1, "who brought it has it still"
        visits.release(blocks[1])
        assert placement.there == 0
        with pytest.raises(TypeError):
            blocks[0](surprise=True)
        assert placement.there == 0
    assert not any("forward" in block.__dict__ for block in blocks)


def forwards(model: nn.Module) -> list[int]:
    """Sizes of the batches that reach the embeddings."""
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))  # type: ignore[operator]
    return sizes

"""Evaluations of models whose blocks rest elsewhere: the numbers of the model's own forward, one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Bench, Letters, eval_job, tiny
from torch import nn
from transformers import PreTrainedModel

from prunebench.bench import evaluation as evaluation_module
from prunebench.bench import runner, workplace
from prunebench.bench.evals.divergence import Divergence
from prunebench.bench.evals.layer_error import LayerError
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.bench.evals.windows import WindowEval
from prunebench.bench.lodging import Lodging
from prunebench.bench.plan import RunRequest
from prunebench.spec import EvalFacts, EvalJob
from prunebench.testing.lanes import LateLane
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.arranging import Arrangement
from prunebench.toolkit.placement import Streaming, place_model
from prunebench.toolkit.spread import Spread
from prunebench.toolkit.visiting import Visits, visiting


class Counted(Streaming):
    """The host plays a device to which copies come late; counts the blocks that are there at once."""

    def __init__(self) -> None:
        super().__init__("cpu", LateLane)
        self.there = self.most = 0

    def bring(self, module: nn.Module) -> None:
        super().bring(module)
        self.there += 1
        self.most = max(self.most, self.there)

    def drop(self, module: nn.Module) -> None:
        super().drop(module)
        self.there -= 1


pytestmark = pytest.mark.usefixtures("own_cache")

QUESTIONS = """\
{"prefix": "The dog sat on the", "good": "mat", "bad": "sky", "phenomenon": "thing"}
{"prefix": "Once upon a", "good": "time", "bad": "dog", "phenomenon": "thing"}
"""
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
    above = [] if kind is LayerError else batches
    assert calls == [1, 2, *batches, *above], "one and two sequences show how blocks are called"
    if kind is not LayerError:
        chosen = [5, 0, 3]
        job.placement = None
        apart = evaluation.again(job, chosen)  # type: ignore[attr-defined]
        job.placement = Visits(Counted())
        assert evaluation.again(job, chosen) == apart  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("kind", EVALS, ids=lambda kind: kind.name)
def test_on_a_gpu_blocks_come_from_the_host_and_the_numbers_are_the_same(
    kind: type[WindowEval], asked: Callable[..., Any]
) -> None:
    device = torch.device("cuda")
    dense = tiny(vocab_size=LETTERS)
    pruned = disturbed(dense)
    evaluation, job = asked(kind, pruned.to(device), dense.to(device))
    job.device = device
    wanted = evaluation.measure(job)
    placement = Streaming(device)
    for model in (dense, pruned):
        place_model(model, blocks_of(model), placement)
    job.placement = visits = Visits(placement)
    with visiting(blocks_of(dense), visits), visiting(blocks_of(pruned), visits):
        assert evaluation.measure(job) == wanted
    assert {parameter.device.type for block in blocks_of(pruned) for parameter in block.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", EVALS, ids=lambda kind: kind.name)
def test_over_several_devices_the_numbers_are_the_same(kind: type[WindowEval], asked: Callable[..., Any]) -> None:
    """The dense model's blocks come from the host as guests."""
    dense = tiny(vocab_size=LETTERS)
    pruned = disturbed(dense)
    evaluation, job = asked(kind, pruned, dense)
    wanted = evaluation.measure(job)
    homes = {block: number % 2 for number, block in enumerate(blocks_of(pruned))}
    job.placement = visits = Visits(Spread([torch.device("cpu")] * 2, homes))
    with visiting(blocks_of(dense), visits), visiting(blocks_of(pruned), visits):
        assert evaluation.measure(job) == wanted


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
        with pytest.raises(RuntimeError):
            blocks[0](torch.zeros(1, 2, 3))
        assert placement.there == 0
    assert not any("forward" in block.__dict__ for block in blocks)


# A run


def wanda(bench: Bench, folder: Path) -> RunRequest:
    """A run with every kind of evaluation on windows, and one that generates."""
    (folder / "asked.jsonl").write_text(QUESTIONS)
    text = f"data={bench.evaluation},window=16,windows=9"
    evals = [f"{kind.name}[{text}]" for kind in EVALS] + [f"generation[tasks={folder / 'asked.jsonl'}]"]
    (request,) = bench.requests(folder, "wanda", evals=evals)
    return request


def scores_of(request: RunRequest) -> dict[str, Any]:
    record = runner.run(request, lambda *call: None, "inline")
    assert record.status == "ok", record.reason
    return {name: (score.value, score.items, score.reason) for name, score in record.scores.items()}


def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "arrange", lambda *_: Arrangement(4, Streaming))


def test_a_run_that_was_pruned_streaming_is_evaluated_streaming(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanda(bench, tmp_path)
    wanted = scores_of(request)
    assert len(wanted) == 4
    streamed(monkeypatch)
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "another cache"))
    moved: list[nn.Module] = []
    monkeypatch.setattr(Lodging, "_moved", lambda _, model: moved.append(model))
    brings = counted(monkeypatch)
    assert scores_of(request) == wanted
    assert moved == [], "the model stays where it rests"
    assert len(brings) > 40, "generation brings every block for every token"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that are brought from now on."""
    bring, found = Streaming.bring, list[str]()
    monkeypatch.setattr(Streaming, "bring", lambda self, module: (found.append(type(module).__name__), bring(self, module))[1])
    return found


@pytest.mark.parametrize("short_of", ["the dense model", "windows"])
def test_when_memory_runs_out_the_blocks_leave_the_device(
    short_of: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host plays the device, on which there is room for one model, or for few activations."""
    request = wanda(bench, tmp_path)
    wanted = scores_of(request)
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "another cache"))  # or the dense model is not needed
    monkeypatch.setattr(Lodging, "can_leave", property(lambda self: self.placement is None))
    if short_of == "the dense model":
        there: list[nn.Module] = []
        monkeypatch.setattr(Lodging, "_moved", lambda _, model: not there and not there.append(model))
    else:
        top = evaluation_module._measured
        monkeypatch.setattr(
            evaluation_module,
            "_measured",
            lambda asked, job: top(asked, job) if job.placement is not None else exhausted(),
        )
    record = runner.run(request, lambda *call: None, "inline")
    assert {name: (score.value, score.items, score.reason) for name, score in record.scores.items()} == wanted
    first = "divergence" if short_of == "the dense model" else "perplexity"
    told = {key: value for key, value in record.steps[-1].notes.items() if "rest on the host" in key}
    assert told == {f"{first}: blocks rest on the host": "out of memory"}


def exhausted() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_where_even_that_is_too_much_the_score_says_so_and_the_run_is_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanda(bench, tmp_path)
    wanted = scores_of(request)
    streamed(monkeypatch)
    monkeypatch.setattr(Divergence, "measure", lambda *_: exhausted())
    found = scores_of(request)
    assert found.pop("divergence") == (None, {}, "out of memory, with one block at a time on the device too")
    assert found == {name: score for name, score in wanted.items() if name != "divergence"}


def test_on_a_host_the_run_ends_as_ever(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Divergence, "measure", lambda *_: exhausted())
    record = runner.run(wanda(bench, tmp_path), lambda *call: None, "inline")
    assert record.failure is not None
    assert record.failure.kind == "oom"


def forwards(model: nn.Module) -> list[int]:
    """Sizes of the batches that reach the embeddings."""
    sizes: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))  # type: ignore[operator]
    return sizes

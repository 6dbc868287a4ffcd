"""A run that is killed anywhere goes on there: the same bits, masks, notes and scores as one that nobody touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, fingerprint, same_bits, tiny
from transformers import PreTrainedTokenizerFast

from prunebench.bench import runner
from prunebench.bench.checkpoints import clear
from prunebench.bench.plan import RunRequest
from prunebench.results.records import RunRecord
from prunebench.spec import Progress

BLOCKS = 4
METHODS = {
    "magnitude": "magnitude",
    "random": "random",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt[block_size=8]",
    "gblm": "gblm",
    "wanda++": "wanda++[rounds=2,ro_samples=2,learning_rate=0.001]",
}


class Killed(KeyboardInterrupt):
    """Ends a run without a record, as a kill does."""


@dataclass(frozen=True)
class Ended:
    """What a run has come to."""

    record: RunRecord
    model: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks, with the bench's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("deep") / "deep"
    shape = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": BLOCKS}
    tiny("llama", bos_token_id=0, eos_token_id=0, **shape).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(bench.model).save_pretrained(folder)
    return folder


@pytest.fixture
def request_of(bench: Bench, deep: Path, tmp_path: Path) -> Callable[..., RunRequest]:
    """The request of a method's run, that keeps checkpoints after every block."""

    def make(method: str, every: int | None = 1, **options: Any) -> RunRequest:
        text = bench.suite_text(method, model=deep, **{"seeds": [3], **options})
        (tmp_path / "small.toml").write_text(text)
        (request,) = bench.requests(tmp_path, method, model=deep, **{"seeds": [3], **options})
        return replace(request, checkpoint_every=every, checkpoints=str(tmp_path / "kept"))

    return make


def run(request: RunRequest, progress: Progress = lambda what, done, total: None) -> Ended:
    """Do a run, and look at what the record does not say."""
    seen: list[Any] = []
    load = runner.load_model
    try:
        runner.load_model = lambda *given: seen.append(load(*given)) or seen[-1]  # type: ignore[func-returns-value]
        outcomes: list[runner.Outcome] = []
        make = runner.Outcome
        runner.Outcome = lambda: outcomes.append(make()) or outcomes[-1]  # type: ignore[assignment,misc,func-returns-value]
        record = runner.run(request, progress, "inline")
    finally:
        runner.load_model, runner.Outcome = load, make  # type: ignore[misc]
    assert outcomes[0].anatomy is not None
    return Ended(record, fingerprint(seen[0]), dict(outcomes[0].anatomy.masks))


def kill_at(what: str, done: int) -> Progress:
    """Ends the run when it tells this progress."""

    def progress(said: str, at: int, total: int) -> None:
        if said.startswith(what) and at == done:
            raise Killed

    return progress


def killed(request: RunRequest, what: str, done: int) -> None:
    with pytest.raises(Killed):
        run(request, kill_at(what, done))


def assert_same(one: Ended, other: Ended) -> None:
    """But for costs and for notes of where it went on."""
    assert one.record.status == other.record.status == "ok", (one.record.reason, other.record.reason)
    assert one.model.keys() == other.model.keys()
    assert [name for name in one.model if not same_bits(one.model[name], other.model[name])] == []
    assert one.masks.keys() == other.masks.keys()
    assert [name for name in one.masks if not torch.equal(one.masks[name], other.masks[name])] == []
    assert one.record.audit == other.record.audit
    assert scores_of(one) == scores_of(other)
    assert [notes_of(step) for step in one.record.steps] == [notes_of(step) for step in other.record.steps]


def scores_of(ended: Ended) -> list[Any]:
    return [(name, score.value, score.items) for name, score in ended.record.scores.items()]


def notes_of(step: Any) -> dict[str, Any]:
    return {key: note for key, note in step.notes.items() if key not in ("resumed", "checkpoint discarded")}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_killed_at_any_block_ends_as_if_it_had_not_been(request_of: Callable[..., RunRequest], method: str) -> None:
    request = request_of(method)
    whole = run(replace(request, checkpoint_every=None))
    for block in range(1, BLOCKS):
        killed(request, "block", block)
        again = run(request)
        assert again.record.steps[0].notes["resumed"] == f"at block {block} of {BLOCKS}"
        assert_same(whole, again)
        clear(request)
        assert not Path(request.checkpoints or "").exists()

"""Training in less memory: blocks that are run again on the way back, and masks of a bit an entry. No number changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import fingerprint, halve, make_job, same_bits, tiny, tokens_of, visit_all

from prunebench.spec import Job, Needs
from prunebench.toolkit import Retraining, lowrank, recovery, retrain
from prunebench.toolkit.lowrank import Kind, LowRank
from prunebench.toolkit.masks import pack_bits
from prunebench.toolkit.recomputing import recomputed


def pruned_job() -> Job:
    job = make_job(tiny("llama"), needs=Needs.CALIBRATION | Needs.TRAINING)
    visit_all(job, halve)
    job.masks = job.anatomy.masks.copy()  # type: ignore[attr-defined]
    job.training_tokens = tokens_of(6)
    return job


@pytest.fixture
def first_runs_out(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The first training that is begun runs out of memory, though it was done; tells for each whether blocks ran again."""
    train, begun = recovery.train, list[bool]()

    def failing(settings: Retraining, scope: Any, parts: Any, batches: Any, loss: Any, job: Job) -> Any:
        block = job.anatomy.blocks[0].module
        begun.append("recomputing" in block.forward.__module__)
        found = train(settings, scope, parts, batches, loss, job)
        if len(begun) == 1:
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(recovery, "train", failing)
    return begun


@pytest.mark.parametrize("subset", ["mask_lora", "lora_prune", "scale_lora"])
def test_blocks_that_run_again_change_no_bit(subset: Any, first_runs_out: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Retraining(subset=subset, steps=3, batch=2, learning_rate=1e-2)
    job, notes = pruned_job(), dict[str, Any]()
    job.note = notes.__setitem__  # type: ignore[assignment]
    found = retrain(job, settings)
    assert first_runs_out == [False, True]
    assert notes["blocks run again on the way back"] == "out of memory"
    monkeypatch.undo()
    plain = pruned_job()
    assert retrain(plain, settings).losses == found.losses
    assert all(same_bits(t, fingerprint(plain.model)[name]) for name, t in fingerprint(job.model).items())


def test_what_moves_the_model_itself_is_not_begun_again(first_runs_out: list[bool]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        retrain(pruned_job(), Retraining(subset="norms", steps=1, batch=2))
    assert first_runs_out == [False]


def test_a_block_keeps_its_input_alone() -> None:
    """Of all that autograd would keep of two blocks, what is kept is the hidden state before each."""
    model = tiny("llama")
    blocks = list(model.model.layers)

    def kept(chosen: list[Any]) -> int:
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        hidden = torch.randn(1, 8, model.config.hidden_size, requires_grad=True)
        with recomputed(chosen), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state.sum()
        return sum(sizes)

    assert kept(blocks) < kept([]) / 3
    assert all("forward" not in block.__dict__ for block in blocks)


@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune", "scale_lora", "lora"])
def test_masks_of_bits_are_masks(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask = torch.randn(10, 13), torch.rand(10, 13) < 0.5
    changes = []
    for stored in (lowrank._stored, lambda mask, device: pack_bits(mask).to(device)):
        monkeypatch.setattr(lowrank, "_stored", stored)
        change = LowRank(torch.nn.Linear(13, 10), weight, kind, 2, 4.0, torch.Generator().manual_seed(0), mask)
        with torch.no_grad():
            change.up.add_(0.5)
        changes.append((change.changed_weight(), change.merged_weight(), change.product_gradient(weight)))
    assert all(same_bits(one, other) for one, other in zip(*changes, strict=True))

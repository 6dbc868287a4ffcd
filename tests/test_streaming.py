"""Streaming: what is on the device, counted by a placement that only pretends to have one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from support import (
    DEPTH,
    FAMILIES,
    LENGTH,
    Rescaling,
    changed,
    fingerprint,
    make_job,
    masks_of,
    same_bits,
    tiny,
    tokens_of,
    visit_all,
)
from torch import nn

from prunebench.errors import Refused
from prunebench.spec import Job
from prunebench.targets import Unstructured
from prunebench.toolkit import Block, InputNorm, keep_mask, magnitude_scores, walk
from prunebench.toolkit.placement import Resident, Streaming, place_model
from prunebench_pruners.wanda import Wanda

SAMPLES, BATCH = 12, 2


class Counting(Streaming):
    """The host plays the device: counts bytes of blocks brought and of batches fetched that are still alive."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.blocks: dict[int, int] = {}
        self.batches = 0
        self.most_blocks = self.most_batches = self.most = 0
        self.fetched = 0

    def bring(self, module: nn.Module) -> None:
        super().bring(module)
        self.blocks[id(module)] = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
        self._note()

    def release(self, module: nn.Module) -> None:
        super().release(module)
        del self.blocks[id(module)]

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        found = super().fetch(tensor)
        assert found.data_ptr() != tensor.data_ptr()
        self.batches += found.nbytes
        self.fetched += 1
        weakref.finalize(found, self._drop, found.nbytes)
        self._note()
        return found

    def _drop(self, size: int) -> None:
        self.batches -= size

    def _note(self) -> None:
        self.most_blocks = max(self.most_blocks, len(self.blocks))
        self.most_batches = max(self.most_batches, self.batches)
        self.most = max(self.most, sum(self.blocks.values()) + self.batches)


def streaming_job(model: nn.Module, placement: Counting | None = None) -> tuple[Job, Counting]:
    placement = placement or Counting()
    return make_job(model, tokens_of(SAMPLES), placement=placement, batch_size=BATCH), placement


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_masks_of_resident_within_one_block_and_a_few_batches(family: str) -> None:
    resident = make_job(tiny(family), tokens_of(SAMPLES), batch_size=BATCH, placement=Resident("cpu"))
    Wanda().prune(resident)
    model = tiny(family)
    job, placement = streaming_job(model)
    Wanda().prune(job)
    wanted, found = masks_of(resident), masks_of(job)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(mask, found[name]) for name, mask in wanted.items())
    for (name, one), (_, other) in zip(resident.model.named_parameters(), model.named_parameters(), strict=True):
        assert same_bits(one, other), name
    batch = BATCH * LENGTH * model.config.hidden_size * 4
    block = max(sum(p.nbytes for p in b.module.parameters()) for b in job.anatomy.blocks)
    assert placement.fetched == (2 * DEPTH - 1) * SAMPLES // BATCH
    assert placement.most_blocks == 1
    assert batch <= placement.most_batches <= 2 * batch
    assert placement.most <= block + 2 * batch + 4096  # buffers
    assert (placement.blocks, placement.batches) == ({}, 0)


@pytest.mark.parametrize("first", [1, DEPTH - 1])
def test_data_first_asked_for_later_still_take_one_block_at_a_time(first: int) -> None:
    """The blocks before have to run then; the one on its visit steps aside."""

    def inputs(job: Job) -> Iterator[torch.Tensor]:
        for block in walk(job):
            if block.index >= first:
                yield torch.cat(list(block.batches()))
                block.collect(InputNorm)
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), Unstructured(0.5), "matrix"))

    job, placement = streaming_job(tiny())
    resident = make_job(tiny(), tokens_of(SAMPLES), batch_size=BATCH)
    for found, wanted in zip(inputs(job), inputs(resident), strict=True):
        assert same_bits(found, wanted)
    assert placement.most_blocks == 1
    assert (placement.blocks, placement.batches) == ({}, 0)


def test_the_block_on_its_visit_is_on_the_device() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        assert set(placement.blocks) == {id(block.module)}
        list(block.batches())
        assert set(placement.blocks) == {id(block.module)}
        block.collect(InputNorm)
        assert set(placement.blocks) == {id(block.module)}


def test_batches_are_let_go_one_by_one() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        for hidden in block.batches():
            block.forward(hidden)
            assert placement.batches <= 2 * hidden.nbytes
        del hidden
        assert placement.batches == 0


def leave_at_once(job: Job) -> None:
    for _ in walk(job):
        break


def leave_later(job: Job) -> None:
    for block in walk(job):
        block.collect(InputNorm)
        if block.index == 1:
            break


def leave_with_a_batch_open(job: Job) -> None:
    for block in walk(job):
        for _ in block.batches():
            break
        if block.index == 1:
            break


def fail(job: Job) -> None:
    def visit(block: Block) -> None:
        block.collect(InputNorm)
        if block.index == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_all(job, visit)


def fail_in_an_earlier_block(job: Job) -> None:
    """The first data are asked for at the last block, and the second fails on the way."""
    handle = job.anatomy.blocks[1].matrices[0].module.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        visit_all(job, lambda block: block.index == DEPTH - 1 and list(block.batches()))
    handle.remove()


@pytest.mark.parametrize("leave", [leave_at_once, leave_later, leave_with_a_batch_open, fail, fail_in_an_earlier_block])
def test_however_the_loop_ends_everything_is_back(leave: Callable[[Job], None]) -> None:
    job, placement = streaming_job(tiny())
    leave(job)
    assert placement.most_blocks == 1
    assert (placement.blocks, placement.batches) == ({}, 0)


@pytest.mark.parametrize("first", range(DEPTH))
def test_everything_is_back_after_a_refusal(first: int) -> None:
    job, placement = streaming_job(Rescaling().eval())
    with pytest.raises(Refused):
        visit_all(job, lambda block: block.index == first and list(block.batches()))
    assert (placement.blocks, placement.batches) == ({}, 0)


def test_activations_rest_on_the_host_and_are_fetched_as_copies() -> None:
    placement = Streaming("meta")
    assert placement.rest(torch.zeros(2)).device == torch.device("cpu")
    assert placement.device == torch.device("meta")
    assert placement.fetch(torch.zeros(2)).device == torch.device("meta")


def test_a_placed_model_has_its_blocks_on_the_host_and_is_otherwise_the_same() -> None:
    model = tiny("opt")
    job, placement = streaming_job(model)
    blocks = [block.module for block in job.anatomy.blocks]
    before, parameters = fingerprint(model), list(model.parameters())
    for block in blocks:
        placement.bring(block)
    place_model(model, blocks, placement)
    assert placement.blocks == {}
    assert not changed(model, before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    place_model(model, blocks, Resident("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

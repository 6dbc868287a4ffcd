"""Streaming: what is on the device, counted by a placement that only pretends to have one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

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
from prunebench.spec import Job, Pruner
from prunebench.targets import Unstructured
from prunebench.testing.lanes import LateLane
from prunebench.toolkit import Block, InputNorm, keep_mask, magnitude_scores, walk
from prunebench.toolkit.placement import HostActivations, Resident, Streaming, place_model, tensors_of
from prunebench.toolkit.shelf import Shelf
from prunebench.toolkit.transfer import CudaLane, Pairs, Ticket
from prunebench.toolkit.walk import Replica
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

SAMPLES, BATCH = 12, 2


class Counting(Streaming):
    """The host plays the device, whose copies come late: counts what is there, and keeps what was done in order."""

    _lane: LateLane
    _rows: LateLane

    def __init__(self) -> None:
        super().__init__("cpu", LateLane)
        self.most_blocks = self.most = 0
        self.done: list[tuple[str, int]] = []
        """What was asked for, with the block's number by `name_blocks`, or the sequences of a batch."""
        self.numbers: dict[int, int] = {}

    @property
    def blocks(self) -> set[int]:
        """The blocks that were brought."""
        return set(self._visits)

    @property
    def held(self) -> int:
        """Bytes of batches that were fetched and are alive."""
        return self._rows.there

    @property
    def most_batches(self) -> int:
        return self._rows.most

    @property
    def fetched(self) -> int:
        return sum(name == "fetch" for name, _ in self.done)

    def expect(self, module: nn.Module | None) -> None:
        super().expect(module)
        self._note("expect", module)

    def bring(self, module: nn.Module) -> None:
        super().bring(module)
        self._note("bring", module)

    def settle(self, module: nn.Module) -> None:
        super().settle(module)
        self._note("settle", module)

    def drop(self, module: nn.Module) -> None:
        super().drop(module)
        self._note("drop", module)

    def _begun(self, parts: Sequence[torch.Tensor], sequences: int) -> tuple[torch.Tensor, Ticket]:
        found = super()._begun(parts, sequences)
        assert all(found[0].data_ptr() != part.data_ptr() for part in parts)
        self.done.append(("fetch", sequences))
        self._count()
        return found

    def _note(self, what: str, module: nn.Module | None) -> None:
        if module is not None:
            self.done.append((what, self.numbers.get(id(module), -1)))
        self._count()

    def _count(self) -> None:
        self.most_blocks = max(self.most_blocks, len(self._visits) + (self._expected is not None))
        self.most = max(self.most, self._lane.there + self._rows.there)

    def check_all_is_back(self) -> None:
        """Every copy was waited for, and nothing is left there."""
        assert (self._visits, self._expected, list(self._stores)) == ({}, None, [])
        for lane in (self._lane, self._rows):
            assert (lane.open, lane.lost, lane.there) == (0, 0, 0)


def streaming_job(model: nn.Module, placement: Counting | None = None) -> tuple[Job, Counting]:
    placement = placement or Counting()
    job = make_job(model, tokens_of(SAMPLES), placement=placement, batch_size=BATCH)
    placement.numbers = {id(block.module): index for index, block in enumerate(job.anatomy.blocks)}
    return job, placement


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_the_masks_of_resident_within_two_blocks_and_a_few_batches(family: str) -> None:
    job, placement = check_same_bits_as_resident(Wanda(), family)
    batch = BATCH * LENGTH * job.model.config.hidden_size * 4
    block = max(sum(p.nbytes for p in tensors_of(b.module)) for b in job.anatomy.blocks)
    assert placement.fetched == (2 * DEPTH - 1) * SAMPLES // BATCH
    assert placement.most_blocks == 2
    assert 2 * batch <= placement.most_batches <= 3 * batch  # the loop still has the last one in hand when the next is sent for
    assert placement.most <= 2 * block + 3 * batch


PRUNERS = {
    "wanda": Wanda(),
    "sparsegpt": SparseGpt(block_size=8),
    "gblm": Gblm(),
    "wanda++": WandaPlusPlus(rounds=2, ro_samples=3, learning_rate=1e-3),
    "magnitude": Magnitude(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PRUNERS)
def test_every_kind_of_method_ends_with_the_bits_of_resident(name: str, dtype: torch.dtype) -> None:
    check_same_bits_as_resident(PRUNERS[name], "llama", dtype)


def check_same_bits_as_resident(pruner: Pruner, family: str, dtype: torch.dtype = torch.float32) -> tuple[Job, Counting]:
    resident = make_job(tiny(family, dtype), tokens_of(SAMPLES), batch_size=BATCH, placement=Resident("cpu"))
    pruner.prune(resident)
    job, placement = streaming_job(tiny(family, dtype))
    pruner.prune(job)
    wanted, found = masks_of(resident), masks_of(job)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(mask, found[name]) for name, mask in wanted.items())
    for (name, one), (_, other) in zip(resident.model.named_parameters(), job.model.named_parameters(), strict=True):
        assert same_bits(one, other), name
    placement.check_all_is_back()
    return job, placement


def test_the_next_block_is_on_its_way_before_a_block_is_worked_on_and_the_last_goes_back_while_it_is_run() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        placement.done.append(("body", block.index))
        block.collect(InputNorm)
    blocks = [(what, number) for what, number in placement.done if what != "fetch"]
    expected: list[tuple[str, int]] = []
    for index in range(DEPTH):
        more = [("expect", index + 1)] if index + 1 < DEPTH else []
        expected += [("bring", index), *more, ("body", index), ("settle", index), ("drop", index)]
    assert blocks == expected
    for index in range(DEPTH - 1):
        between = placement.done[placement.done.index(("settle", index)) : placement.done.index(("drop", index))]
        assert between.count(("fetch", BATCH)) == SAMPLES // BATCH


def test_the_next_batch_is_on_its_way_while_one_is_worked_on() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        before = placement.fetched
        for number, _ in enumerate(block.batches(), start=1):
            assert placement.fetched - before == min(number + 1, SAMPLES // BATCH)


def test_a_block_that_was_only_read_is_not_copied_back() -> None:
    job, placement = streaming_job(tiny())
    module = job.anatomy.blocks[0].module
    placement.bring(module)
    begun = placement._lane.begun
    placement.drop(module)
    assert placement._lane.begun == begun
    placement.bring(module)
    placement.release(module)
    assert placement._lane.begun == begun + 2 * len(tensors_of(module))


def test_writes_that_leave_no_trace_go_back_too() -> None:
    """Methods of others like to write into `.data`, which no version counts."""
    job, _ = streaming_job(tiny())
    for block in walk(job):
        for matrix in block.matrices:
            matrix.module.weight.data.fill_(block.index)
    assert [float(b.matrices[0].weight.sum()) / b.matrices[0].weight.numel() for b in job.anatomy.blocks] == [0, 1, 2]


def test_what_is_expected_and_does_not_come_is_given_up() -> None:
    job, placement = streaming_job(tiny())
    first, second = (block.module for block in job.anatomy.blocks[:2])
    placement.expect(first)
    placement.expect(second)
    assert placement.most_blocks == 1
    placement.bring(first)
    placement.release(first)
    placement.expect(None)
    placement.check_all_is_back()


def test_a_block_that_shares_weights_with_the_one_on_its_visit_is_not_sent_for() -> None:
    model = tiny()
    layers = model.model.layers
    layers[1].mlp = layers[0].mlp
    job, placement = streaming_job(model)
    shared = [layer for layer in job.anatomy.blocks if layer.module in (layers[0], layers[1])]
    placement.bring(shared[0].module)
    placement.expect(shared[1].module)
    placement.release(shared[0].module)
    placement.bring(shared[1].module)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(shared[1].module))
    placement.release(shared[1].module)
    placement.check_all_is_back()


def test_chosen_sequences_come_in_the_order_given() -> None:
    job, _ = streaming_job(tiny())
    for block, twin in zip(walk(job), walk(make_job(tiny(), tokens_of(SAMPLES), batch_size=BATCH)), strict=True):
        assert same_bits(block.inputs([7, 0, 7, 3]), twin.inputs([7, 0, 7, 3]))
        assert same_bits(block._stream.inputs(block.index), twin._stream.inputs(twin.index))


class Careless(Counting):
    """Forgets to wait where it is told to."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self.forgets = forgets

    def bring(self, module: nn.Module) -> None:
        if self.forgets == "bring":
            self._expected, visit = None, self._expected or self._sent(module)
            for tensor, there in zip(visit.tensors, visit.there, strict=True):
                tensor.data = there
            self._visits[id(module)] = visit
        else:
            super().bring(module)

    def drop(self, module: nn.Module) -> None:
        if self.forgets == "release":
            visit = self._visits[id(module)]
            self._late, visit.back = visit.back, None
        super().drop(module)

    def batches(self, resting: torch.Tensor, rows: Sequence[slice]) -> Iterator[torch.Tensor]:
        if self.forgets == "batches":
            for chosen in rows:
                self.ticket = self._begun([resting[chosen]], chosen.stop - chosen.start)
                yield self.ticket[0]
        else:
            yield from super().batches(resting, rows)

    def finish(self) -> None:
        if self.forgets != "finish":
            super().finish()


@pytest.mark.parametrize("forgets", ["nothing", "bring", "release", "batches", "finish"])
def test_whoever_forgets_to_wait_finds_no_numbers(forgets: str) -> None:
    """That the lane of these tests would show it."""
    job, _ = streaming_job(tiny(), Careless(forgets))
    seen: list[torch.Tensor] = []
    for block in walk(job):
        seen += [*block.collect(InputNorm).values(), block._stream.inputs(block.index).clone()]
        for matrix in block.matrices:
            matrix.keep(torch.ones(matrix.shape, dtype=torch.bool))
    seen += [matrix.weight for matrix in job.anatomy.matrices]
    assert all(bool(tensor.isfinite().all()) for tensor in seen) == (forgets == "nothing")


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
    assert placement.most_blocks <= 2
    placement.check_all_is_back()


def test_the_block_on_its_visit_is_on_the_device() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        assert placement.blocks == {id(block.module)}
        list(block.batches())
        assert placement.blocks == {id(block.module)}
        block.collect(InputNorm)
        assert placement.blocks == {id(block.module)}


def test_batches_are_let_go_one_by_one() -> None:
    job, placement = streaming_job(tiny())
    for block in walk(job):
        for hidden in block.batches():
            block.forward(hidden)
            assert placement.held <= 2 * hidden.nbytes  # this one, and the next
        del hidden
        assert placement.held == 0


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
    assert placement.most_blocks <= 2
    placement.check_all_is_back()


@pytest.mark.parametrize("first", range(DEPTH))
def test_everything_is_back_after_a_refusal(first: int) -> None:
    job, placement = streaming_job(Rescaling().eval())
    with pytest.raises(Refused):
        visit_all(job, lambda block: block.index == first and list(block.batches()))
    placement.check_all_is_back()


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
    place_model(model, blocks, placement)
    assert not changed(model, before)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    place_model(model, blocks, Resident("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_what_is_put_away_comes_back_last_first_and_whole() -> None:
    lane = LateLane(torch.device("cpu"))
    for there in (True, False):
        shelf, hidden = Shelf(torch.device("cpu"), there, lambda device: lane), torch.zeros(2, 3)
        for number in range(5):
            hidden.fill_(number)  # written into at once, as a block's outputs are
            shelf.append(hidden)
        earlier = None
        for number in reversed(range(5)):
            found = shelf.pop()
            assert found.tolist() == [[number] * 3] * 2
            assert earlier is None or earlier.tolist() == [[number + 1] * 3] * 2  # what is still being read
            earlier = found
    assert (lane.open, lane.begun) == (0, 5)


def test_a_late_lane_takes_nothing_for_the_hosts_that_lies_where_the_hosts_was() -> None:
    """Two walks of one step have a room each; the second one's batches may come to lie where the first one's room was."""
    lane = LateLane(torch.device("cpu"))
    for _ in range(20):
        lane.room((7, 8, 16), torch.float32)  # and let go of at once
        there = torch.zeros(7, 8, 16)
        lane.copy([(torch.ones(7, 8, 16), there)]).wait()
        assert there.isfinite().all()


@pytest.mark.parametrize("name", ["gblm", "wanda++"])
def test_copies_of_blocks_go_without_being_collected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nobody collects: rings that hold copies would fill it."""
    alive: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    most, init = 0, Replica.__init__

    def counting(self: Replica, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        init(self, *args, **kwargs)
        alive.add(self.module)
        most = max(most, len(alive))

    monkeypatch.setattr(Replica, "__init__", counting)
    job, _ = streaming_job(tiny(dtype=torch.bfloat16))
    gc.disable()
    try:
        PRUNERS[name].prune(job)
    finally:
        gc.enable()
    assert 0 < most <= 2
    assert not alive


# On a GPU, and as far as it goes without one


def test_a_lane_of_a_gpu_comes_behind_the_work_before_it_and_work_behind_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []

    class FakeStream:
        def __init__(self, device: Any = "work") -> None:
            self.name = str(device)

        def wait_stream(self, other: FakeStream) -> None:
            done.append((self.name, "waits for", other.name))

        def wait_event(self, event: FakeEvent) -> None:
            done.append((self.name, "waits for", event.of))

    class FakeEvent:
        of = ""

        def record(self, stream: FakeStream) -> None:
            self.of = f"copies of {stream.name}"

        def synchronize(self) -> None:
            done.append(("host", "waits for", self.of))

    device, work = torch.device("cuda:1"), FakeStream()
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: work)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    source, target = torch.arange(3.0), torch.zeros(3)
    ticket = CudaLane(device).copy([(source, target)])
    assert torch.equal(source, target)
    ticket.wait()
    ticket.finish()
    copies = "copies of cuda:1"
    assert done == [("cuda:1", "waits for", "work"), ("work", "waits for", copies), ("host", "waits for", copies)]


SIZE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_hidden_layers": 4}


def placed(placement: Resident, samples: int = 32) -> Job:
    """A job on a model of 4 blocks of 33 MiB in bfloat16, a MiB a sequence of hidden states."""
    model = tiny(dtype=torch.bfloat16, max_position_embeddings=512, **SIZE)
    job = make_job(model, tokens_of(samples, 512), placement=placement, batch_size=4)
    place_model(model, [block.module for block in job.anatomy.blocks], placement)
    return job


@pytest.mark.skipif(torch.cuda.is_available(), reason="here memory can be pinned")
def test_memory_that_cannot_be_pinned_is_plain_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    lane, held = CudaLane(torch.device("cuda")), torch.ones(2048)
    assert lane.room((4, 256), torch.float32).shape == (4, 256)
    assert lane.resting(held) is held
    assert lane.plain == 4 * 256 * 4 + held.nbytes
    placement = Streaming("cpu")
    assert placement.remarks() == {}
    placement._lane = lane
    assert placement.remarks() == {"host memory that could not be pinned": "12 KiB; its copies were waited for"}


def test_a_block_for_which_there_is_no_room_yet_comes_when_it_is_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    job, placement = streaming_job(tiny())
    module, sent = job.anatomy.blocks[0].module, placement._sent
    monkeypatch.setattr(placement, "_sent", lambda module: raise_(torch.OutOfMemoryError()))
    placement.expect(module)
    monkeypatch.setattr(placement, "_sent", sent)
    placement.bring(module)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors_of(module))
    placement.release(module)
    placement.check_all_is_back()


def raise_(error: Exception) -> Any:
    raise error


class TimedLane(CudaLane):
    """Keeps when each group of copies began and ended."""

    times: ClassVar[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = []

    def copy(self, pairs: Pairs) -> Ticket:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        began.record(self._stream)
        ticket = super().copy(pairs)
        ended.record(self._stream)
        self.times.append((began, ended))
        return ticket


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("kind", [Streaming, HostActivations])
def test_a_gpu_streams_to_the_bits_of_resident(kind: type[Resident], name: str) -> None:
    resident, streamed = placed(Resident("cuda"), 8), placed(kind("cuda"), 8)
    for job in (resident, streamed):
        PRUNERS[name].prune(job)
    for one, other in zip(resident.model.parameters(), streamed.model.parameters(), strict=True):
        assert same_bits(one.cpu(), other.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_holds_two_blocks_and_a_few_batches() -> None:
    job = placed(Streaming("cuda"))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    Wanda().prune(job)
    block = sum(tensor.nbytes for tensor in tensors_of(job.anatomy.blocks[0].module))
    batch = 4 * 512 * SIZE["hidden_size"] * 2
    inner = batch * SIZE["intermediate_size"] // SIZE["hidden_size"]
    assert torch.cuda.max_memory_allocated() - before <= 2 * block + 10 * batch + 6 * inner
    assert torch.cuda.memory_allocated() - before <= batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_copies_the_next_block_and_batch_while_it_works_on_this_one() -> None:
    placement = Streaming("cuda", TimedLane)
    job, works = placed(placement), []
    Wanda().prune(placed(Streaming("cuda"), 4))  # pinned memory and kernels are there from now on
    TimedLane.times.clear()
    for block in walk(job):
        first = len(TimedLane.times)
        block.collect(InputNorm)
        done = torch.cuda.Event(enable_timing=True)
        done.record()
        works.append((TimedLane.times[first - 1] if block.index + 1 < len(job.anatomy.blocks) else None, done))
    torch.cuda.synchronize()
    copied = [(copy, done) for copy, done in works if copy is not None]
    assert copied
    # The copy of the next block, which was begun last before the statistics, is over before they are.
    assert all(copy[1].elapsed_time(done) > 0 for copy, done in copied)

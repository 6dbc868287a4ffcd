"""One run over several devices: where blocks go, by made-up numbers; a walk over two devices that are both the host."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import DEPTH, cases, make_job, masks_of, same_bits, tiny, tokens_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from prunebench.bench import plan, subprocesses, workplace
from prunebench.bench.measure import hold_to, measured
from prunebench.errors import Refused, RequestError
from prunebench.spec import Needs, Pruner
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.arranging import SPARE, Arrangement, Footprint, arrange, spread_out
from prunebench.toolkit.placement import HostActivations, Resident, Streaming
from prunebench.toolkit.recorder import BlockCall
from prunebench.toolkit.spread import Spread, called_there, devices_of, homes_of, moved
from prunebench.toolkit.visiting import Visits, visiting
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

GIB = 1 << 30
MODEL = Footprint(
    weights=14 * GIB, outside=2 * GIB, activations=GIB, block=2 * GIB, sequence=GIB // 4, passing=GIB // 16, blocks=(GIB,) * 12
)
"""Beside its blocks it takes 3 GiB on the first device, and where work is done 2 GiB and a quarter a sequence."""
PLACES: list[type[Resident]] = [Resident, Spread, HostActivations, Streaming]


# What a text names


@pytest.mark.parametrize(
    ("text", "expected"),
    cases(
        {
            "the host": ("cpu", ["cpu"]),
            "the first GPU": ("cuda", ["cuda:0"]),
            "one": ("cuda:3", ["cuda:3"]),
            "two": ("cuda:0+1", ["cuda:0", "cuda:1"]),
            "in the order given": ("cuda:2+0+11", ["cuda:2", "cuda:0", "cuda:11"]),
            "all": ("cuda+", ["cuda:0", "cuda:1", "cuda:2"]),
        }
    ),
)
def test_a_text_names_devices(text: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in devices_of(text)] == expected


@pytest.mark.parametrize(
    "text", ["", "tpu", "cpu:0", "cuda:", "cuda:+", "cuda:0+", "cuda:-1", "cuda:0,1", "cuda:0-1", "cuda:²", "gpu:0"]
)
def test_what_names_no_device(text: str) -> None:
    with pytest.raises(RequestError, match=r"^--device is cpu, cuda or cuda:N, cuda:N"):
        devices_of(text)


def test_a_gpu_that_is_named_twice() -> None:
    with pytest.raises(RequestError, match=r"^--device cuda:1\+0\+1 names a GPU twice\.$"):
        devices_of("cuda:1+0+1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cuda:0+3", "the device cuda:0+3 is not there: this machine has 3 CUDA devices."),
        ("cuda:0+1", "--device cuda:0+1 names 2 GPUs, and only runs can be spread over several."),
    ],
)
def test_devices_that_cannot_be_had(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(RequestError) as found:
        plan.pick_device(text)
    assert str(found.value) == message


def test_runs_may_have_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert plan.pick_device("cuda:1+0", several=True) == "cuda:1+0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RequestError, match=r"the device cuda\+ is not there: this machine has 0"):
        plan.pick_device("cuda+", several=True)


@pytest.mark.parametrize(
    ("device", "jobs", "expected"),
    cases(
        {
            "a pair each, the named one first": ("cuda:2+1", 2, ["cuda:2+1", "cuda:0+3"]),
            "all shared out": ("cuda+", 2, ["cuda:0+1", "cuda:2+3"]),
            "all for one": ("cuda+", 1, ["cuda+"]),
            "a pair": ("cuda:0+1", 1, ["cuda:0+1"]),
            "one each": ("cuda+", 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        }
    ),
)
def test_several_runs_have_gpus_of_their_own(
    device: str, jobs: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert subprocesses.leases(device, jobs) == expected


@pytest.mark.parametrize(("device", "jobs"), [("cuda:0+1", 3), ("cuda+", 5)])
def test_too_many_runs(device: str, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RequestError, match=f"--jobs {jobs} needs as many GPUs, .* at work, and this machine has 4."):
        subprocesses.leases(device, jobs)


# Which block goes where


def test_blocks_are_placed_in_order_each_once_where_there_is_room() -> None:
    draw, met = random.Random(0), set()
    for _ in range(300):
        blocks = [draw.randint(1, 9) for _ in range(draw.randint(0, 12))]
        room = [draw.randint(-3, 30) for _ in range(draw.randint(1, 4))]
        homes = homes_of(blocks, room)
        met.add(homes is not None)
        assert (homes is not None) == _fits_somehow(blocks, room)
        if homes is not None:
            assert len(homes) == len(blocks)
            assert list(homes) == sorted(homes)
            for device, there in enumerate(room):
                taken = sum(size for size, home in zip(blocks, homes, strict=True) if home == device)
                assert taken <= max(0, there)
    assert met == {True, False}


def _fits_somehow(blocks: list[int], room: list[int]) -> bool:
    """By every number of blocks that the first device could have."""
    if not blocks:
        return True
    if not room:
        return False
    return any(
        (count == 0 or sum(blocks[:count]) <= room[0]) and _fits_somehow(blocks[count:], room[1:])
        for count in range(len(blocks) + 1)
    )


def test_no_device_is_overfull_and_what_does_not_fit_is_streamed() -> None:
    draw, met = random.Random(0), set()
    for _ in range(300):
        free = [draw.randint(0, 24) * GIB for _ in range(draw.randint(1, 3))]
        found = arrange(MODEL, free, PLACES)
        met.add(found.resting)
        work = MODEL.block + found.batch_size * MODEL.sequence
        if found.resting is Spread:
            assert found.homes[0] == 0
            assert MODEL.weights + MODEL.activations + work > SPARE * free[0]
            for device, there in enumerate(free):
                own = sum(size for size, home in zip(MODEL.blocks, found.homes, strict=True) if home == device)
                beside = 0 if device else MODEL.outside + MODEL.activations
                assert not own or own + beside + work <= SPARE * there
        else:
            assert found.homes == ()
        if found.resting is Streaming:
            assert all(spread_out(MODEL, [int(SPARE * there) for there in free], size) is None for size in (1, 2, 4, 8))
    assert met == set(PLACES)


@pytest.mark.parametrize(
    ("free", "expected"),
    cases(
        {
            "one is enough": ([25, 25], Arrangement(8, Resident)),
            "two are": ([16, 16], Arrangement(8, Spread, (0,) * 7 + (1,) * 5)),
            "but not for the whole batch": ([14, 12], Arrangement(4, Spread, (0,) * 6 + (1,) * 6)),
            "the first has no room for its own": ([4, 40], Arrangement(1, Streaming)),
            "there is only one": ([19], Arrangement(2, HostActivations)),
            "nowhere": ([8, 8], Arrangement(4, Streaming)),
        }
    ),
)
def test_a_run_is_spread_before_it_is_streamed(free: list[int], expected: Arrangement) -> None:
    assert arrange(MODEL, [there * GIB for there in free], PLACES) == expected


# A walk over two devices, both the host


class Apart(TorchDispatchMode):
    """Knows on which of the devices, all played by the host, memory is; an operation that meets two of them fails.

    Small tensors may be anywhere, and so may those of which nothing is known: arguments of blocks, which `BlockCall` moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[int, int] = {}
        self.crossing = False
        self.seen: set[int] = set()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {self.homes.get(_memory(tensor)) for tensor in tree_iter((args, kwargs)) if _large(tensor)} - {None}
        if len(given) > 1 and not self.crossing:
            raise AssertionError(f"{call} is given tensors of several devices.")
        found = call(*args, **(kwargs or {}))
        before = {_memory(tensor) for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_iter(found):
            if isinstance(tensor, torch.Tensor) and _memory(tensor) not in before:
                self.homes.pop(_memory(tensor), None)  # used again
                if given and not self.crossing:
                    self.homes[_memory(tensor)] = next(iter(given))
        self.seen |= given
        return found


class Watched(Spread):
    """Tells which device memory is on."""

    def __init__(self, mode: Apart, homes: dict[nn.Module, int]) -> None:
        super().__init__([torch.device("cpu")] * 3, homes)
        self.mode, self.numbers = mode, {id(module): home for module, home in homes.items()}
        self.now = 0
        self.fetched = [0, 0, 0]
        for module, home in homes.items():
            mode.homes |= {_memory(parameter): home for parameter in module.parameters()}

    def bring(self, module: nn.Module) -> None:
        super().bring(module)
        self.now = self.numbers[id(module)]

    def fetch(self, tensor: torch.Tensor) -> torch.Tensor:
        self.mode.crossing = True
        found = super().fetch(tensor)
        self.mode.crossing = False
        self.mode.homes[_memory(found)] = self.now
        self.fetched[self.now] += 1
        return found

    def store(self, resting: torch.Tensor, rows: slice, batch: torch.Tensor) -> None:
        self.mode.crossing = True
        super().store(resting, rows, batch)
        self.mode.crossing = False


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _large(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() > 3


@pytest.mark.parametrize(
    "pruner",
    [Wanda(), SparseGpt(block_size=8), WandaPlusPlus(rounds=2, ro_samples=3, learning_rate=1e-3)],
    ids=lambda p: p.name,
)
def test_a_walk_over_devices_mixes_none_and_gives_the_same_bits(pruner: Pruner) -> None:
    alone = make_job(tiny(), tokens_of(6))
    pruner.prune(alone)
    job, mode = make_job(tiny(), tokens_of(6)), Apart()
    job.placement = placement = Watched(mode, {block.module: min(i, 2) for i, block in enumerate(job.anatomy.blocks)})
    with mode:
        pruner.prune(job)
    check_same(job, alone)
    assert mode.seen == {0, 1, 2}
    assert all(placement.fetched)


def test_the_watch_sees_a_batch_on_another_device() -> None:
    job, mode = make_job(tiny(), tokens_of(6)), Apart()
    placement = Watched(mode, {block.module: min(i, 2) for i, block in enumerate(job.anatomy.blocks)})
    placement.bring = lambda module: None  # type: ignore[method-assign]
    job.placement = placement
    with mode, pytest.raises(AssertionError, match="several devices"):
        Wanda().prune(job)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_gradients_over_devices_give_the_same_bits(family: str) -> None:
    alone, job = make_job(tiny(family), tokens_of(6)), make_job(tiny(family), tokens_of(6))
    job.placement = spread(job)
    for one in (alone, job):
        Gblm().prune(one)
    check_same(job, alone)


def spread(job: Any) -> Spread:
    return Spread([torch.device("cpu")] * 2, {block.module: int(i > 0) for i, block in enumerate(job.anatomy.blocks)})


def check_same(job: Any, other: Any) -> None:
    wanted = masks_of(other)
    assert all(torch.equal(mask, wanted[name]) for name, mask in masks_of(job).items())
    pairs = zip(job.model.parameters(), other.model.parameters(), strict=True)
    assert all(same_bits(one, two) for one, two in pairs)


def test_arguments_of_a_block_follow_the_hidden_state_to_its_device() -> None:
    call = BlockCall((torch.ones(2), 3), {"mask": torch.ones(1, 4)}, torch.float32, device=torch.device("cpu"))
    args, kwargs = call.sized(2, torch.bfloat16, torch.device("meta"))
    assert (args[0].device.type, args[0].dtype, args[1]) == ("meta", torch.bfloat16, 3)
    assert kwargs["mask"].device.type == "meta"
    stays = BlockCall((torch.ones(2),), {}, torch.float32, device=torch.device("meta"))  # was not where the hidden state was
    assert stays.sized(2, torch.float32, torch.device("meta"))[0][0].device.type == "cpu"


def test_a_block_is_called_where_it_is_and_answers_where_it_was_asked() -> None:
    block = nn.Linear(3, 3, device="meta")
    seen: list[Any] = []

    def own(hidden: torch.Tensor, *, mask: Any) -> Any:
        seen.extend([hidden.device.type, mask[0].device.type])
        return torch.zeros(3), None

    found = called_there(block, own, (torch.zeros(3),), {"mask": [torch.zeros(3)]})
    assert (seen, found[0].device.type, found[1]) == (["meta", "meta"], "cpu", None)
    assert moved({"a": (1, "x")}, torch.device("meta")) == {"a": (1, "x")}


def test_a_model_is_placed_and_a_guest_comes_and_goes() -> None:
    job = make_job(tiny(), tokens_of(2))
    blocks = [block.module for block in job.anatomy.blocks]
    placement = Spread([torch.device("cpu"), torch.device("meta")], {block: int(i > 0) for i, block in enumerate(blocks)})
    guest = nn.Linear(2, 2)
    weight = guest.weight.detach().clone()
    placement.expect(guest)
    placement.bring(guest)
    placement.drop(guest)
    assert torch.equal(guest.weight, weight)
    placement.place(job.model)
    kinds = [{parameter.device.type for parameter in block.parameters()} for block in blocks]
    assert kinds == [{"cpu"}] + [{"meta"}] * (DEPTH - 1)
    assert job.model.get_output_embeddings().weight.device.type == "cpu"
    assert placement.counts() == {"cpu": 1, "meta": DEPTH - 1}
    placement.bring(blocks[1])
    assert placement.fetch(torch.zeros(1)).device.type == "meta"


# Runs


def arranged(pruner: Pruner, free: list[float], **changes: Any) -> Arrangement:
    """What a run on three GPUs arranges, with so much free on each, in shares of what the model's weights take."""
    model = tiny(num_hidden_layers=12)
    anatomy = find_anatomy(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    request = plan.RunRequest(
        **dict.fromkeys(plan.RunRequest.__dataclass_fields__) | {"tokens": {}, "device": "cuda"} | changes
    )
    return workplace._arranged(request.on("cuda:0+1+2"), model, anatomy, [pruner], [int(share * weights) for share in free])


def test_a_run_that_fits_one_of_its_devices_stays_there() -> None:
    assert arranged(Wanda(), [9, 9, 9]).resting is Resident


def test_a_run_that_fits_its_devices_is_spread() -> None:
    found = arranged(Wanda(), [1.1, 1.1, 1.1], batch_size=1)
    assert found.resting is Spread
    assert len(found.homes) == 12


def test_a_limit_holds_on_every_device() -> None:
    weights = sum(parameter.nbytes for parameter in tiny(num_hidden_layers=12).parameters())
    assert arranged(Wanda(), [9, 9, 9], device_memory=1.1 * weights, batch_size=1).resting is Spread
    assert arranged(Wanda(), [9, 9, 9], device_memory=weights / 9).resting is Streaming


def test_whole_models_are_trained_on_one_device() -> None:
    class Trains(Wanda):
        def needs(self) -> Needs:
            return super().needs() | Needs.TRAINING

    assert arranged(Trains(), [9, 9, 9]).resting is Resident
    with pytest.raises(Refused, match=r"^wanda trains the whole model on one device, and the model does not fit on cuda:0\.$"):
        arranged(Trains(), [1, 9, 9])


def test_a_request_knows_all_its_devices() -> None:
    fields = dict.fromkeys(plan.RunRequest.__dataclass_fields__)
    request = plan.RunRequest(**fields | {"device": "cpu", "spread": ()})
    assert (request.on_text, request.devices) == ("cpu", (torch.device("cpu"),))
    pair = request.on("cuda:2+1")
    assert (pair.device, pair.on_text) == ("cuda:2", "cuda:2+1")
    assert pair.devices == (torch.device("cuda:2"), torch.device("cuda:1"))
    assert (pair.on_any().on_text, pair.on("cuda:3").on_any().on_text) == ("cuda:0+1", "cuda:0")
    assert pair.on("cuda:3").spread == ()


def test_a_model_on_several_devices_is_evaluated_as_if_it_were_on_one() -> None:
    job, ids = make_job(tiny(), tokens_of(2)), tokens_of(3)
    expected = job.model(input_ids=ids).logits
    with visiting([block.module for block in job.anatomy.blocks], Visits(spread(job))):
        assert same_bits(job.model(input_ids=ids).logits, expected)


def test_peaks_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The highest is the step's."""
    peaks = {"cuda:0": 5, "cuda:1": 7}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[str(device)])
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    with measured(torch.device("cuda:0"), torch.device("cuda:1")) as cost:
        pass
    assert (cost.peak_device_bytes, cost.device_peaks) == (7, peaks)
    assert list(cost.phases) == ["other"]


def test_a_limit_is_held_by_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: told.append((share, str(device))))
    hold_to([torch.device("cpu"), torch.device("cuda:1")], 25.0)
    hold_to([torch.device("cuda:1")], 1000.0)
    hold_to([torch.device("cuda:1")], None)
    assert told == [(0.25, "cuda:1"), (1.0, "cuda:1"), (1.0, "cuda:1")]

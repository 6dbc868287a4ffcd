"""What a step costs: phases that add up to its time, and the peak of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from prunebench.bench import measure
from prunebench.bench.measure import measured
from prunebench.toolkit import phase

CPU = torch.device("cpu")
MIB = 1 << 20


class FakeClock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    found = FakeClock()
    monkeypatch.setattr(time, "perf_counter", found)
    return found


@pytest.fixture(params=["kernel", "sampled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the peak of the process is found; the kernel's way is not to be had everywhere."""
    if request.param == "sampled":
        monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    elif not kernel_can():
        pytest.skip("this kernel's high-water mark cannot be reset")
    return str(request.param)


def kernel_can() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return "VmHWM:" in Path("/proc/self/status").read_text(encoding="ascii")


def test_phases_of_a_block(clock: FakeClock) -> None:
    with measured(CPU) as cost:
        clock.pass_by(1)
        with phase("statistics"):
            clock.pass_by(2)
            with phase("propagation"):
                clock.pass_by(4)
            clock.pass_by(8)
        with phase("scoring"):
            clock.pass_by(16)
        with phase("statistics"):
            clock.pass_by(32)
    clock.pass_by(64)
    assert cost.phases == {"other": 1, "statistics": 2 + 8 + 32, "propagation": 4, "scoring": 16}


def test_nothing_is_known_before_the_end(clock: FakeClock) -> None:
    with measured(CPU) as cost:
        with phase("update"):
            clock.pass_by(1)
        assert cost.phases == {}
        assert cost.peak_host_bytes is None
    assert cost.phases == {"other": 0, "update": 1}


def test_a_phase_without_a_measured_block_costs_nothing(clock: FakeClock) -> None:
    with phase("training"):
        clock.pass_by(1)
    with measured(CPU) as cost:
        clock.pass_by(2)
    with phase("training"):
        clock.pass_by(4)
    assert cost.phases == {"other": 2}


def test_blocks_one_after_another_are_apart(clock: FakeClock) -> None:
    with measured(CPU) as first, phase("scoring"):
        clock.pass_by(1)
    with measured(CPU) as second, phase("update"):
        clock.pass_by(2)
    assert (first.phases, second.phases) == ({"other": 0, "scoring": 1}, {"other": 0, "update": 2})


def test_phases_add_up_to_the_time_that_passed() -> None:
    started = time.perf_counter()
    with measured(CPU) as cost:
        for _ in range(3):
            with phase("statistics"):
                time.sleep(0.02)
                with phase("propagation"):
                    time.sleep(0.01)
        time.sleep(0.02)
    passed = time.perf_counter() - started
    assert cost.phases["statistics"] >= 0.06
    assert cost.phases["propagation"] >= 0.03
    assert cost.phases["other"] >= 0.02
    assert sum(cost.phases.values()) <= passed
    assert sum(cost.phases.values()) == pytest.approx(passed, abs=0.5)


def test_an_error_inside_is_measured_too(clock: FakeClock, way: str) -> None:
    costs = []

    def step() -> None:
        with measured(CPU) as cost, phase("training"):
            costs.append(cost)
            clock.pass_by(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    [cost] = costs
    assert cost.phases == {"other": 0, "training": 3}
    assert cost.peak_host_bytes is not None


# Memory


def touch(size: int) -> np.ndarray:
    """Memory that is really there: every page is written."""
    return np.ones(size, dtype=np.uint8)


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_the_peak_of_a_block_is_seen(way: str) -> None:
    before = resident()
    with measured(CPU) as cost:
        block = touch(200 * MIB)
        if way == "sampled":
            time.sleep(0.2)  # many times the sampling interval
        del block
    assert cost.host_peak_sampled is (way == "sampled")
    assert cost.peak_device_bytes is None
    assert cost.peak_host_bytes is not None
    assert before + 190 * MIB <= cost.peak_host_bytes <= before + 300 * MIB


def test_what_was_before_is_not_counted(way: str) -> None:
    block = touch(200 * MIB)
    high = resident()
    del block
    with measured(CPU) as cost:
        touch(1 * MIB)
    assert cost.peak_host_bytes is not None
    assert cost.peak_host_bytes <= high - 150 * MIB


def test_the_second_peak_is_not_the_first(way: str) -> None:
    peaks = []
    for size in (200, 20):
        with measured(CPU) as cost:
            block = touch(size * MIB)
            time.sleep(0.1 if way == "sampled" else 0)
            del block
        peaks.append(cost.peak_host_bytes or 0)
    assert peaks[0] - peaks[1] >= 150 * MIB


def test_the_kernel_sees_a_peak_that_is_shorter_than_any_sample() -> None:
    if not kernel_can():
        pytest.skip("this kernel's high-water mark cannot be reset")
    before = resident()
    with measured(CPU) as cost:
        for _ in range(3):
            touch(100 * MIB)
    assert not cost.host_peak_sampled
    assert (cost.peak_host_bytes or 0) >= before + 95 * MIB


def test_sampling_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_reset_high_water", lambda: False)
    before = threading.active_count()
    with measured(CPU):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system without Linux' files about processes."""

    def refuse(self: Path, *_: object, **__: object) -> str:
        raise FileNotFoundError(str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", refuse)
        patch.setattr(Path, "read_text", refuse)
        yield


def test_without_the_kernels_files_the_peak_is_sampled(unreadable: None) -> None:
    with measured(CPU) as cost:
        pass
    assert cost.host_peak_sampled
    assert (cost.peak_host_bytes or 0) > 10 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_device() -> None:
    device = torch.device("cuda")
    kept = torch.ones(10 * MIB, dtype=torch.uint8, device=device)
    before = torch.cuda.memory_allocated(device)
    with measured(device) as cost, phase("update"):
        block = torch.ones(100 * MIB, dtype=torch.uint8, device=device)
        del block
    assert before + 100 * MIB <= (cost.peak_device_bytes or 0) <= before + 110 * MIB
    assert sum(cost.phases.values()) > 0
    del kept

"""The phase clock, with a host clock that only moves when told to."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from support import make_job, tiny, tokens_of

from prunebench.toolkit import InputNorm, keep_mask, phase, walk
from prunebench.toolkit.phases import PhaseClock, PhaseName, lap, uncounted
from prunebench_pruners.wanda import Wanda


class HostClock:
    """Seconds since the start; `read` counts how often they were asked for."""

    def __init__(self) -> None:
        self.now = 100.0
        self.read = 0

    def __call__(self) -> float:
        self.read += 1
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostClock:
    clock = HostClock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


@pytest.fixture
def clock() -> PhaseClock:
    return PhaseClock(torch.device("cpu"))


def test_times_are_exclusive_and_add_up(host: HostClock, clock: PhaseClock) -> None:
    with clock.running():
        host.pass_by(1)
        with phase("statistics"):
            host.pass_by(2)
            with phase("propagation"):
                host.pass_by(4)
                with phase("statistics"):
                    host.pass_by(8)
                host.pass_by(16)
            host.pass_by(32)
        host.pass_by(64)
        with phase("statistics"):
            host.pass_by(128)
        host.pass_by(256)
    host.pass_by(512)
    assert clock.seconds() == {"other": 1 + 64 + 256, "statistics": 2 + 8 + 32 + 128, "propagation": 4 + 16}
    assert sum(clock.seconds().values()) == 511


def test_a_phase_inside_itself_counts_once(host: HostClock, clock: PhaseClock) -> None:
    with clock.running(), phase("update"), phase("update"):
        host.pass_by(3)
    assert clock.seconds() == {"other": 0, "update": 3}


def test_what_is_outside_any_phase_is_other(host: HostClock, clock: PhaseClock) -> None:
    with clock.running():
        host.pass_by(3)
    assert clock.seconds() == {"other": 3}


def test_nothing_is_counted_before_or_after(host: HostClock, clock: PhaseClock) -> None:
    with phase("training"):
        host.pass_by(1)
    with clock.running():
        host.pass_by(2)
    with phase("training"):
        host.pass_by(4)
    assert clock.seconds() == {"other": 2}


def test_an_exception_ends_its_phases_and_goes_on(host: HostClock, clock: PhaseClock) -> None:
    def work() -> None:
        with phase("scoring"):
            host.pass_by(1)
            with phase("update"):
                host.pass_by(2)
                raise ZeroDivisionError

    with clock.running():
        with pytest.raises(ZeroDivisionError):
            work()
        host.pass_by(4)
    assert clock.seconds() == {"other": 4, "scoring": 1, "update": 2}


def test_an_exception_that_ends_the_step_stops_the_clock(host: HostClock, clock: PhaseClock) -> None:
    def step() -> None:
        with clock.running(), phase("training"):
            host.pass_by(2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    with phase("training"):
        host.pass_by(4)
    assert clock.seconds() == {"other": 0, "training": 2}


def test_clocks_of_one_step_after_another_are_apart(host: HostClock) -> None:
    first, second = PhaseClock(torch.device("cpu")), PhaseClock(torch.device("cpu"))
    with first.running(), phase("scoring"):
        host.pass_by(1)
    with second.running(), phase("scoring"):
        host.pass_by(2)
    assert first.seconds()["scoring"] == 1
    assert second.seconds()["scoring"] == 2


def test_a_clock_may_run_again_and_does_not_count_the_time_between(host: HostClock, clock: PhaseClock) -> None:
    for seconds in (1, 2):
        with clock.running(), phase("scoring"):
            host.pass_by(seconds)
        host.pass_by(4)
    assert clock.seconds() == {"other": 0, "scoring": 3}


def test_an_inner_clock_gives_the_outer_one_back(host: HostClock) -> None:
    outer, inner = PhaseClock(torch.device("cpu")), PhaseClock(torch.device("cpu"))
    with outer.running():
        with inner.running(), phase("scoring"):
            host.pass_by(1)
        with phase("update"):
            host.pass_by(2)
    assert inner.seconds() == {"other": 0, "scoring": 1}
    assert outer.seconds() == {"other": 1, "update": 2}


def test_without_a_clock_no_time_is_read(host: HostClock) -> None:
    for _ in range(3):
        with phase("statistics"), phase("update"):
            pass
    Wanda().prune(make_job(tiny(), tokens_of()))
    assert host.read == 0


def test_the_phases_of_a_method_add_up_to_its_time(monkeypatch: pytest.MonkeyPatch, clock: PhaseClock) -> None:
    """With a clock that ticks at every reading, no reading may be lost."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    with clock.running():
        Wanda().prune(make_job(tiny(), tokens_of()))
    total = next(ticks) - 1
    assert sum(clock.seconds().values()) == total
    assert set(clock.seconds()) == {"other", "calibration", "statistics", "scoring", "update", "propagation"}


@pytest.mark.parametrize("use", ["nothing", "batches", "statistics", "scores"])
def test_the_body_of_a_walk_is_the_bodys_own_time(host: HostClock, clock: PhaseClock, use: str) -> None:
    """No phase is held across a yield."""
    uses: dict[str, Callable[..., object]] = {
        "nothing": lambda block: None,
        "batches": lambda block: [host.pass_by(10) for _ in block.batches()],
        "statistics": lambda block: block.collect(InputNorm),
        "scores": lambda block: keep_mask(block.matrices[0].weight.abs(), job.target),
    }
    job = make_job(tiny(), tokens_of(), batch_size=5)
    with clock.running():
        for block in walk(job):
            uses[use](block)
            host.pass_by(1)
    assert clock.seconds().pop("other") == 3 * (11 if use == "batches" else 1)
    assert sum(clock.seconds().values()) == 3 * (11 if use == "batches" else 1)


@pytest.mark.parametrize("name", ["calibration", "statistics", "scoring", "update", "propagation", "training", "other"])
def test_every_phase_is_known_by_its_name(host: HostClock, clock: PhaseClock, name: PhaseName) -> None:
    with clock.running(), phase(name):
        host.pass_by(5)
    assert clock.seconds()[name] == 5


# Time that is no step's, and time that is looked at by itself


def test_uncounted_time_is_in_no_phase(host: HostClock, clock: PhaseClock) -> None:
    with clock.running():
        host.pass_by(1)
        with phase("statistics"):
            host.pass_by(2)
            with uncounted():
                host.pass_by(4)
            host.pass_by(8)
        with uncounted():
            host.pass_by(16)
    assert clock.seconds() == {"other": 1, "statistics": 10}


def test_a_lap_tells_what_passed_inside_and_changes_nothing(host: HostClock, clock: PhaseClock) -> None:
    with clock.running():
        host.pass_by(1)
        with phase("scoring"):
            host.pass_by(2)
            with lap() as found:
                host.pass_by(4)
                with phase("statistics"):
                    host.pass_by(8)
                with uncounted():
                    host.pass_by(16)
            assert found == {"scoring": 4, "statistics": 8}
            host.pass_by(32)
    assert found == {"scoring": 4, "statistics": 8}
    assert clock.seconds() == {"other": 1, "scoring": 2 + 4 + 32, "statistics": 8}


def test_without_a_clock_nothing_is_counted_or_left_out() -> None:
    with uncounted(), lap() as found:
        pass
    assert found == {}


def test_a_lap_that_fails_leaves_the_clock_right(host: HostClock, clock: PhaseClock) -> None:
    def fail() -> None:
        with lap(), uncounted(), phase("update"):
            host.pass_by(1)
            raise ZeroDivisionError

    with clock.running():
        with pytest.raises(ZeroDivisionError):
            fail()
        host.pass_by(2)
    assert clock.seconds() == {"other": 2, "update": 1}

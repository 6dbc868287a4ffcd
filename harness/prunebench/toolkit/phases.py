"""`with phase("statistics")`: where a step's time goes.

The harness installs a clock in a context variable; without one a phase costs nothing. Time is exclusive: what is spent in an
inner phase is not counted in the outer one, so the phases of a step add up to its whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Literal, Protocol

import torch

PhaseName = Literal["calibration", "statistics", "scoring", "update", "propagation", "training", "other"]

_NO_PHASE = ""

_clock: ContextVar[PhaseClock | None] = ContextVar("prunebench_phase_clock", default=None)


@contextmanager
def phase(name: PhaseName) -> Iterator[None]:
    """Count the time spent inside under `name`."""
    with _inside(name):
        yield


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave the time spent inside out of every phase: what the harness does for itself in the middle of a step."""
    with _inside(_NO_PHASE):
        yield


@contextmanager
def lap() -> Iterator[dict[str, float]]:
    """Yield what will be the seconds by phase of what runs inside, once it has ended; they count as ever, too."""
    clock = _clock.get()
    if clock is None:
        yield {}
        return
    with clock.lap() as found:
        yield found


def so_far() -> dict[str, float]:
    """Seconds by phase since the clock was started, up to now; nothing without one."""
    clock = _clock.get()
    return {} if clock is None else clock.so_far()


@contextmanager
def _inside(name: str) -> Iterator[None]:
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()


class _Mark(Protocol):
    def seconds_since(self, earlier: _Mark) -> float: ...


class _HostMark:
    def __init__(self) -> None:
        self.at = time.perf_counter()

    def seconds_since(self, earlier: _Mark) -> float:
        assert isinstance(earlier, _HostMark)
        return self.at - earlier.at


class _DeviceMark:
    """An event on the device's stream, so that phases need no synchronisation of their own."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.event.record()

    def seconds_since(self, earlier: _Mark) -> float:
        assert isinstance(earlier, _DeviceMark)
        return float(earlier.event.elapsed_time(self.event)) / 1000.0


class PhaseClock:
    """Adds up seconds by phase. Two synchronisations in all, at the start and at the end, and one more a lap.

    Events of several devices have no common time: where work is spread, each mark waits for all of them, and the host's clock
    counts.
    """

    def __init__(self, *devices: torch.device) -> None:
        """For work on these devices, one or more."""
        self._devices = devices
        self._stack: list[str] = []
        self._marks: list[tuple[str, _Mark]] = []

    @contextmanager
    def running(self) -> Iterator[PhaseClock]:
        """Measure what runs inside; everything outside a phase counts as `other`."""
        token = _clock.set(self)
        self._synchronise()
        self.enter("other")
        try:
            yield self
        finally:
            self.leave()
            self._synchronise()
            _clock.reset(token)

    def enter(self, name: str) -> None:
        """Start a phase inside the present one."""
        self._stack.append(name)
        self._mark(name)

    def leave(self) -> None:
        """End the present phase and go on with the one around it."""
        self._stack.pop()
        self._mark(self._stack[-1] if self._stack else _NO_PHASE)

    @contextmanager
    def lap(self) -> Iterator[dict[str, float]]:
        """Yield what will be the seconds by phase between here and the end of the block."""
        found: dict[str, float] = {}
        first = len(self._marks)
        self._mark(self._stack[-1])
        yield found
        self._mark(self._stack[-1])
        last = len(self._marks)
        self._synchronise()
        found.update(_seconds(self._marks[first:last]))

    def so_far(self) -> dict[str, float]:
        """Seconds by phase up to now; one synchronisation."""
        self._mark(self._stack[-1])
        self._synchronise()
        return _seconds(self._marks)

    def seconds(self) -> dict[str, float]:
        """Seconds by phase, once the clock has stopped."""
        return _seconds(self._marks)

    def _mark(self, name: str) -> None:
        if len(self._devices) > 1:
            self._synchronise()
        by_event = [device.type for device in self._devices] == ["cuda"]
        self._marks.append((name, _DeviceMark() if by_event else _HostMark()))

    def _synchronise(self) -> None:
        for device in self._devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)


def _seconds(marks: list[tuple[str, _Mark]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (name, start), (_, end) in pairwise(marks):
        if name != _NO_PHASE:
            found[name] = found.get(name, 0.0) + end.seconds_since(start)
    return found

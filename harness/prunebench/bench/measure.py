"""What a step costs: seconds by phase, peak memory of the device and of the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from prunebench.toolkit.phases import PhaseClock

SAMPLING_SECONDS = 0.01
SPARE_CORES, SPARE_SECONDS = 0.2, 0.2
"""What others may use without being counted: a screen that is redrawn, the tick of the kernel's clock."""


@dataclass
class Cost:
    """Filled in when the measured part ends."""

    phases: dict[str, float] = field(default_factory=dict)
    peak_device_bytes: int | None = None
    peak_host_bytes: int | None = None
    host_peak_sampled: bool = False
    device_peaks: dict[str, int] = field(default_factory=dict)
    """Of each device where work is spread over several; above is the highest."""
    crowded: bool = False
    """Other processes left the step less than the cores that its threads need."""

    def include(self, other: Cost) -> None:
        """Add the cost of something that was done earlier: seconds add up, peaks do not; what was crowded stays so."""
        for name, seconds in other.phases.items():
            self.phases[name] = self.phases.get(name, 0.0) + seconds
        self.peak_device_bytes = _larger(self.peak_device_bytes, other.peak_device_bytes)
        self.peak_host_bytes = _larger(self.peak_host_bytes, other.peak_host_bytes)
        self.crowded |= other.crowded


def peaks_so_far(device: torch.device) -> tuple[int | None, int | None]:
    """Peak bytes on the device and on the host since the measuring began; the present ones where no peak is to be had."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return on_device, _high_water() or int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device, limit: float | None = None) -> int:
    """Bytes that are free on the device; on a host no more than a limit on this process leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    return int(available if limit is None else min(available, limit - psutil.Process().memory_info().rss))


def hold_to(devices: Sequence[torch.device], limit: float | None) -> None:
    """Let this process allocate so many bytes on each GPU, or all there are; what goes beyond runs out of memory."""
    for device in devices:
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total), device)


@contextmanager
def measured(device: torch.device, *others: torch.device) -> Iterator[Cost]:
    """Measure what runs inside. Two synchronisations in all; nothing else is added to the work.

    `others` are devices that it is spread over as well: then the clock waits for all of them where a phase begins or ends.
    """
    cost = Cost()
    on_gpu = [one for one in (device, *others) if one.type == "cuda"]
    for one in on_gpu:
        torch.cuda.reset_peak_memory_stats(one)
    clock = PhaseClock(device, *others)
    with _host_peak(cost), _neighbours(cost):
        try:
            with clock.running():
                yield cost
        finally:
            cost.phases = clock.seconds()
            peaks = {str(one): torch.cuda.max_memory_allocated(one) for one in on_gpu}
            cost.peak_device_bytes = max(peaks.values(), default=None)
            cost.device_peaks = peaks if len(peaks) > 1 else {}


@contextmanager
def _neighbours(cost: Cost) -> Iterator[None]:
    """Whether others were at work on the cores that the step's threads need, by the kernel's count of busy time."""
    started, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    try:
        yield
    finally:
        elapsed = time.perf_counter() - started
        others = _busy_seconds() - busy - (time.process_time() - own)
        free = max(0, (psutil.cpu_count() or 1) - torch.get_num_threads())
        cost.crowded = others > (free + SPARE_CORES) * elapsed + SPARE_SECONDS


def _busy_seconds() -> float:
    """Seconds that all cores together have worked, or were taken away by the machine's host."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


@contextmanager
def _host_peak(cost: Cost) -> Iterator[None]:
    """The peak of resident memory: the kernel's high-water mark where it can be reset, otherwise sampled and marked so."""
    if _reset_high_water():
        try:
            yield
        finally:
            cost.peak_host_bytes = _high_water()
        return
    cost.host_peak_sampled = True
    process, stop, peak = psutil.Process(), threading.Event(), [0]

    def sample() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss)
            if stop.wait(SAMPLING_SECONDS):
                return

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield
    finally:
        stop.set()
        sampler.join()
        cost.peak_host_bytes = peak[0]


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _reset_high_water() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return _high_water() is not None


def _high_water() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line for line in lines if line.startswith("VmHWM:")]
    return int(found[0].split()[1]) * 1024 if found else None

"""Seconds of work on a device: warmed up, measured several times, the median told; and the state the device was in.

On CUDA between two events. Work of many small operations waits for the host that launches them, so where that can be done it is
recorded once as a CUDA graph and replayed: what is measured then is the device. Work that waits for its own results, as the
routing of experts does, cannot be recorded, and is launched anew each time. On a CPU between two looks at the clock.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Literal

import torch

from prunebench.toolkit.memory import is_out_of_memory

Launch = Literal["graph", "eager"]
"""Replayed from a CUDA graph, or launched operation by operation."""

Work = Callable[[], object]

WARM_UP = 3
ROUNDS = 7
SLICE = {"cuda": 5e-3, "cpu": 1e-3}
"""Seconds of a round: short work is done so often that it takes as long."""

MOST_TIMES = 200

_STATE_SECONDS = 10


class CannotRecord(Exception):
    """The work cannot be recorded as a CUDA graph."""


def launches(device: torch.device) -> tuple[Launch, ...]:
    """Ways of launching on a device, the better one first."""
    return ("graph", "eager") if device.type == "cuda" else ("eager",)


def launched(work: Work, device: torch.device, launch: Launch) -> Work:
    """The work as something to call often; with `graph` it has run `WARM_UP` times already.

    Raises:
        CannotRecord: with `graph`, where the work cannot be recorded.
        torch.OutOfMemoryError: nor has it room.
    """
    if launch == "eager":
        return work
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own = torch.cuda.current_stream(device)
    stream.wait_stream(own)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # libraries choose their algorithms and take their workspace before anything is recorded
            work()
    own.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        torch.cuda.set_stream(own)  # `graph` does not go back to it where the end of the recording fails too
        torch.cuda.synchronize(device)
        if is_out_of_memory(error):
            raise
        raise CannotRecord(str(error).partition("\n")[0]) from error
    return graph.replay


def elapsed(work: Work, times: int, device: torch.device) -> float:
    """Seconds of doing the work so many times, one after the other."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(times):
            work()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def median_seconds(work: Work, device: torch.device, launch: Launch = "eager") -> float:
    """Seconds of the work: the median of several rounds, each of so many repetitions that the clock can tell.

    Raises:
        CannotRecord: with `graph`, where the work cannot be recorded.
    """
    run = launched(work, device, launch)
    for _ in range(WARM_UP):
        once = elapsed(run, 1, device)
    times = max(1, min(MOST_TIMES, round(SLICE[device.type] / max(once, 1e-9))))
    return statistics.median(elapsed(run, times, device) / times for _ in range(ROUNDS))


def device_state(device: torch.device) -> str:
    """Clock, temperature and power of a GPU as they are now; which of it cannot be read."""
    if device.type != "cuda":
        return "clock not read"
    said = []
    for name, unit, read in (
        ("SM clock", "MHz", torch.cuda.clock_rate),
        ("temperature", "C", torch.cuda.temperature),
        ("power", "mW", torch.cuda.power_draw),
    ):
        try:
            said.append(f"{name} {read(device)} {unit}")
        except Exception as error:  # noqa: BLE001 - no NVML, or none of its Python package, whose errors are of its own kind
            said.append(f"{name} not read ({type(error).__name__})")
    return ", ".join(said)


def power_limit(device: torch.device) -> str:
    """The power limit of a GPU as `nvidia-smi` tells it, or why it does not."""
    if device.type != "cuda":
        return "no power limit read"
    asked = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"]
    asked += ["--query-gpu=power.limit", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=_STATE_SECONDS).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"power limit not read ({type(error).__name__})"
    return f"power limit {said}"

"""What this machine can do at best: products by dtype, a copy on the device, a copy from pinned host memory. Under ten seconds.

Floors rest on these rates (`floors.py`), so they may be too high and never too low. Hence the best of several sizes and
repetitions, never a mean. On a CPU one thread is measured, by the time in which it had a core, and counted so many times as a
run has threads: other processes may have the cores meanwhile, and several threads would wait for each other wherever another
process has one. Threads that share a core, a cache or the memory's bus do less together than so many times what one does
alone; floors are then lower than they could be, and still floors. On a GPU that another process uses meanwhile rates come out
too low: where a phase is then found below its floor, remove the file, and `machine` in the cache; the next sweep measures anew.

`rates.py` measures at a model's sizes what runs are expected to take; these are of the machine alone, and kept with it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from prunebench.bench import machine
from prunebench.bench.rates import quickest
from prunebench.bench.runner import threads
from prunebench.results.machines import MachineFile, MachineRates, read_machine, write_machine
from prunebench.toolkit.cache import digest, load_json, save_json
from prunebench.toolkit.loading import DTYPES
from prunebench.toolkit.memory import is_out_of_memory, let_go
from prunebench.toolkit.precision import single_precision
from prunebench.toolkit.products import weight_gradient

SECONDS_ON_HOST, SECONDS_ON_DEVICE = 0.1, 0.5
"""How long each rate is measured at each size, once at least and after one that wakes the device; a GPU's clock rises first."""

LONGEST = 0.5
"""A product that took longer is the last of its dtype: the next size takes eight times as long."""

SIDES_ON_HOST, SIDES_ON_DEVICE = (512, 1024), (4096, 8192, 16384)
"""Of square matrices: a thread is at its best from the smallest on, a GPU at the largest, in a hundredth of a second."""

COPIED_ON_HOST, COPIED_ON_DEVICE, UPLOADED = 1 << 28, 1 << 30, 1 << 28
"""Bytes of a copy: more than caches hold."""

DTYPES_MEASURED = ("float32", "bfloat16", "float16")

QUICKER = ("cpu", torch.float32)
"""Where a second library may be the quicker one."""

TF32 = "tf32"
"""What float32 products on CUDA are called where they may read ten bits of their fractions."""


def machine_rates(folder: Path, name: str, device: str) -> MachineRates:
    """A machine's rates from its file; measured, and written there, where it has none of this torch, device and driver.

    Args:
        folder: of the machine, inside a results folder.
        name: the machine's slug.
        device: where runs are.

    Raises:
        WriteError: the file cannot be written.
    """
    kind = "cuda" if device.startswith("cuda") else torch.device(device).type  # which may name several
    known = read_machine(folder, name)
    made_by = (machine.device_name(kind), machine.driver_version() if kind == "cuda" else None, torch.__version__)
    found = known.rates.get(kind)
    if found is not None and found.made_by(*made_by):
        return found
    found = _remembered(kind, made_by)
    write_machine(folder, MachineFile(machine=name, rates={**known.rates, kind: found}))
    return found


def _remembered(kind: str, made_by: tuple[str, str | None, str]) -> MachineRates:
    """From the user's cache, for another results folder; measured where it has none."""
    key = digest([kind, *map(str, made_by)])
    kept = load_json("machine", key)
    try:
        if kept:
            return MachineRates.model_validate(kept)
    except ValueError:  # changed by another hand
        pass
    found = measured_rates(torch.device(kind), *made_by)
    save_json("machine", key, found.model_dump(mode="json"))
    return found


def measured_rates(device: torch.device, name: str, driver: str | None, version: str) -> MachineRates:
    """Measure now; what was held for it is given back."""
    on_host = device.type == "cpu"
    with threads(1 if on_host else 0), torch.no_grad():
        products = {kind: _best_product(DTYPES[kind], device) for kind in DTYPES_MEASURED}
        if not on_host:
            with single_precision(device):
                products[TF32] = _best_product(torch.float32, device)
        copied = _best_copy(device, device, COPIED_ON_HOST if on_host else COPIED_ON_DEVICE)
        uploaded = None if on_host else _best_copy(torch.device("cpu"), device, UPLOADED)
    if not on_host:
        let_go()  # the runs need the memory, in other processes
    return MachineRates(
        device=name,
        driver=driver,
        torch=version,
        threads=1 if on_host else 0,
        products=products,
        copied=2 * copied,
        uploaded=uploaded,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _best_product(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second at the best size that fits, by the quicker of the ways that passes have (`toolkit/products.py`)."""
    best = 0.0
    ways: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.mm]
    if (device.type, dtype) == QUICKER:
        ways.append(partial(weight_gradient, transposed=False))
    for side in SIDES_ON_HOST if device.type == "cpu" else SIDES_ON_DEVICE:
        try:
            first, second = (torch.full((side, side), 0.5, dtype=dtype, device=device) for _ in range(2))
            taken = min(quickest(partial(way, first, second), device, _seconds(device)) for way in ways)
        except (MemoryError, RuntimeError) as error:
            if not best or not is_out_of_memory(error):
                raise
            break
        best = max(best, 2 * side**3 / taken)
        if 8 * taken > LONGEST:
            break
    return best


def _best_copy(source: torch.device, target: torch.device, size: int) -> float:
    """Bytes copied a second; from the host by pinned memory."""
    pinned = source.type != target.type
    from_ = torch.full((size,), 1, dtype=torch.uint8, device=source)
    from_ = from_.pin_memory() if pinned else from_
    into = torch.empty(size, dtype=torch.uint8, device=target)
    return size / quickest(lambda: into.copy_(from_, non_blocking=pinned), target, _seconds(target))


def _seconds(device: torch.device) -> float:
    return SECONDS_ON_HOST if device.type == "cpu" else SECONDS_ON_DEVICE

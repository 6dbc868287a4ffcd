"""Fast paths, for GPUs in Triton and for hosts in C. The PyTorch versions stay: they are the reference, and the way wherever a
kernel is not used.

`PRUNEBENCH_KERNELS` is `on` (the default), `off`, or `interpret` (GPU kernels on the CPU, in Triton's interpreter, slowly: for
tests; `TRITON_INTERPRET=1` must be set before anything imports triton). Before a kernel is first used in a process it is
compared with the PyTorch version on small inputs, on the device at hand. A kernel that raises there or later, or that differs,
is not used any more, and `report` says why. Nothing here imports triton before it is asked for: builds of torch for the CPU
come without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType
from typing import Literal, TypeVar

import torch

from prunebench.errors import RequestError
from prunebench.toolkit.memory import is_out_of_memory
from prunebench.toolkit.phases import uncounted

_T = TypeVar("_T")

NAMES = ("groups", "rows", "matrices", "column_sweep", "column_squares", "gram", "rmsprop")
"""Kernels of GPUs: modules of this package, each with a `check(device)` that raises where results are not as they should be."""

ON_HOSTS = ("host_sweep",)
"""Those of hosts."""

IN_USE = "in use"
LIMIT = 1 << 31
"""Kernels count entries in 32 bits."""


class Mismatch(Exception):
    """A kernel does not find what the PyTorch version finds."""


_verdicts: dict[tuple[str, str], str] = {}
"""By device and kernel."""

_asked: set[tuple[str, str]] = set()
"""For which of them `use` was called since `begin_report`."""


def mode() -> Literal["on", "off", "interpret"]:
    """What `PRUNEBENCH_KERNELS` says.

    Raises:
        RequestError: something else.
    """
    found = os.environ.get("PRUNEBENCH_KERNELS") or "on"
    if found not in ("on", "off", "interpret"):
        raise RequestError(f"PRUNEBENCH_KERNELS is {found!r}, and none of on, off and interpret.")
    return found  # type: ignore[return-value]


def use(device: torch.device, name: str) -> bool:
    """Whether a kernel is to be used on a device; the first time it is compared with the PyTorch version."""
    where = {"on": "cpu", "off": "", "interpret": ""} if name in ON_HOSTS else {"on": "cuda", "off": "", "interpret": "cpu"}
    if device.type != where[mode()]:
        return False
    key = (str(device), name)
    _asked.add(key)
    if key not in _verdicts:
        _verdicts[key] = "being compared"  # what it is compared with asks here, too
        try:
            with uncounted(), _at(device):
                _module(name).check(device)
            _verdicts[key] = IN_USE
        except Exception as error:  # noqa: BLE001 - a compiler may raise anything; it goes into the report
            del _verdicts[key]
            _refuse(device, name, error)
    return _verdicts[key] == IN_USE


def run(device: torch.device, name: str, work: Callable[[ModuleType], _T | None]) -> _T | None:
    """What `work` makes with a kernel's module; None where the kernel is not used, or does not take such inputs.

    `work` must leave its inputs alone if it raises: the PyTorch version starts from them.
    """
    if not use(device, name):
        return None
    try:
        with _at(device):
            return work(_module(name))
    except Exception as error:  # noqa: BLE001 - shared memory, registers: what a device has not is told by any exception
        _refuse(device, name, error)
        return None


def sweeper(device: torch.device) -> str | None:
    """The kernel that sweeps columns on a device, which decides the last bits of SparseGPT; None where PyTorch does."""
    return next((name for name in ("column_sweep", "host_sweep") if use(device, name)), None)


def begin_report() -> None:
    """Let `report` tell of what is asked for from now on."""
    _asked.clear()


def report() -> dict[str, str]:
    """What has become of each kernel that was asked for, `in use` or why not, and what compiled those in use. A device is named
    where there are several."""
    if mode() == "off":
        return {"all": "off, by PRUNEBENCH_KERNELS"}
    asked = {key: verdict for key, verdict in sorted(_verdicts.items()) if key in _asked}
    several = len({device for device, _ in asked}) > 1
    found = {f"{name} on {device}" if several else name: verdict for (device, name), verdict in asked.items()}
    used = {name for (_, name), verdict in asked.items() if verdict == IN_USE}
    if used & set(ON_HOSTS):
        found["compiler"] = import_module(f"{__name__}.compiling").compiler()
    if used & set(NAMES) and (triton := sys.modules.get("triton")):
        found["triton"] = str(triton.__version__)
    return found


def fits(*tensors: torch.Tensor) -> bool:
    """Whether 32 bits tell all entries of these matrices apart."""
    return all(sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) < LIMIT for t in tensors)


def _refuse(device: torch.device, name: str, error: Exception) -> None:
    """Not this kernel again; memory that runs out is another matter, and goes to who can help."""
    if is_out_of_memory(error):
        raise error
    told = " ".join(f"{type(error).__name__}: {error}".split())
    _verdicts[str(device), name] = f"not used: {told[:300]}"


def _module(name: str) -> ModuleType:
    if mode() == "interpret":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    return import_module(f"{__name__}.{name}")


def _at(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton launches where torch stands."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

"""Where tests use kernels: GPUs, what stands for them on a CPU, and hosts."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from prunebench.toolkit import kernels
from prunebench.toolkit.kernels.compiling import compiled

CUDA = torch.cuda.is_available()
GPUS = [
    pytest.param(
        "interpreter",
        marks=[
            pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing (extra dev-kernels)"),
            pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process"),
        ],
    ),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")]),
]
"""The second compiles Triton's kernels, the first interprets them."""


def _why_not_here() -> str:
    """Why no C can be compiled for this processor; empty where it can."""
    try:
        compiled("host_sweep")
    except (RuntimeError, OSError) as error:
        return str(error)
    return ""


COMPILER = pytest.mark.skipif(bool(_why_not_here()), reason=f"no kernel in C here: {_why_not_here()[:200]}")
HOST = pytest.param("host", marks=COMPILER)


def let_in(place: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Let the kernels of a place be used there as if they had been compared already."""
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "interpret" if place == "interpreter" else "on")
    found = torch.empty(0, device="cuda" if place == "cuda" else "cpu").device
    names = kernels.ON_HOSTS if place == "host" else kernels.NAMES
    monkeypatch.setattr(kernels, "_verdicts", {(str(found), name): kernels.IN_USE for name in names})
    kernels.begin_report()
    return found


def in_use(device: torch.device, *names: str) -> None:
    """These kernels were asked for, and none has stepped aside in the meantime."""
    assert {name: kernels.report().get(name) for name in names} == dict.fromkeys(names, kernels.IN_USE)

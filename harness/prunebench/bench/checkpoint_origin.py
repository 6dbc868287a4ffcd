"""What a checkpoint's bits depend on: the harness's own code and that of plugins included."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

import prunebench
from prunebench.bench import machine
from prunebench.bench.plan import RunRequest
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.spec import JsonDict, Pruner
from prunebench.toolkit import kernels


def origin(request: RunRequest, pruners: Sequence[Pruner]) -> JsonDict:
    """By name, in words that a note may use; the batch size is 0 where the run leaves the choice."""
    registry = load_registry()
    plugins = [*pruners, *(registry.eval(parse_step(text)) for text in request.eval_texts)]
    return {
        "run": request.spec.id,
        "machine": request.machine,
        "kernels": f"{kernels.mode()}, {kernels.sweeper(torch.device(request.device)) or 'PyTorch'} in sweeps",
        "device": f"{torch.device(request.device).type}, {machine.device_name(request.device)}",
        "batch size": request.batch_size,
        "number of threads": request.threads or torch.get_num_threads(),
        "packages": machine.package_versions(),
        "code": code_digest(frozenset(type(plugin).__module__.partition(".")[0] for plugin in plugins)),
    }


@cache
def code_digest(modules: frozenset[str]) -> str:
    """Of all source files of the harness and of the packages that plugins are from, as this process found them.

    A class that was made in no module, as in a notebook, has none.
    """
    state = hashlib.sha256()
    for name in sorted({prunebench.__name__, *modules}):
        for file in _source_files(sys.modules.get(name)):
            state.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return state.hexdigest()


def _source_files(module: ModuleType | None) -> list[Path]:
    """Of a module, a package, or a namespace package, whose parts may lie in several folders."""
    folders = getattr(module, "__path__", None)
    if folders is None:
        found = [Path(getattr(module, "__file__", None) or "")]
    else:
        found = [file for folder in folders for file in sorted(Path(folder).rglob("*.py")) + sorted(Path(folder).rglob("*.c"))]
    return [file for file in found if file.is_file()]

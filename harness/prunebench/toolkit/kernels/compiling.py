"""C sources of this package as functions, where the machine has a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
"""Contracted: sums are of fused multiply-adds. Nothing of -ffast-math, as a NaN must stay one."""

_PATIENCE = 120
"""Seconds for the compiler; it takes a third of one."""


@cache
def compiled(name: str) -> ctypes.CDLL:
    """The functions of a C source beside this module, compiled by `$CC` (or `cc`) for the processor at hand.

    Once a process, and not kept: whether a library from a folder that others may write into is whole, ours, and for this
    processor takes more to find out than making it.

    Raises:
        RuntimeError: there is no compiler, or it refuses, in its words.
        OSError: what it made cannot be loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{name}.so"
        _output([*_compiler(), *_FLAGS, "-o", str(made), str(Path(__file__).with_name(f"{name}.c"))])
        return ctypes.CDLL(str(made))


@cache
def compiler() -> str:
    """The compiler's name and version, in the first line that it says of itself."""
    return _output([*_compiler(), "--version"]).partition("\n")[0].strip()


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def _output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"no C compiler answers: {error}") from error
    if found.returncode:
        raise RuntimeError(f"{command[0]} does not compile it: {found.stderr.strip() or found.stdout.strip()}")
    return found.stdout

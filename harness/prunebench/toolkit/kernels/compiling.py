"""C sources of this package as functions, where the machine has a compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from prunebench.toolkit.cache import cache_folder, digest, write_file
from prunebench.toolkit.processor import of_processor

_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
"""Contracted: sums are of fused multiply-adds. Nothing of -ffast-math, as a NaN must stay one."""

_PATIENCE = 120
"""Seconds for the compiler; it takes half a second."""


@cache
def compiled(name: str) -> ctypes.CDLL:
    """The functions of a C source beside this module, compiled by `$CC` (or `cc`) for the processor at hand.

    Kept in the cache folder, by the source and all that decides what a compiler makes of it.

    Raises:
        RuntimeError: there is no compiler, or it refuses, in its words.
        OSError: what it made cannot be loaded.
    """
    source = Path(__file__).with_name(f"{name}.c")
    command = [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS]
    chip = (platform.system(), platform.machine(), *map(of_processor, ("model name", "flags", "Features")))
    kept = cache_folder() / "kernels" / f"{digest([source.read_bytes(), *command, compiler(), *chip])}.so"
    with suppress(OSError):  # not there yet, or not to be loaded
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / kept.name
        _output([*command, "-o", str(made), str(source)])
        write_file(kept, lambda file: file.write(made.read_bytes()))
        return ctypes.CDLL(str(made))


@cache
def compiler() -> str:
    """The compiler's name and version, in the first line that it says of itself."""
    return _output([*shlex.split(os.environ.get("CC") or "cc"), "--version"]).partition("\n")[0].strip()


def _output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"no C compiler answers: {error}") from error
    if found.returncode:
        raise RuntimeError(f"{command[0]} does not compile it: {found.stderr.strip() or found.stdout.strip()}")
    return found.stdout

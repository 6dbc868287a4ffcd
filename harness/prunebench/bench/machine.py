"""The machine a run happens on, as records name it: hardware only, never a host or user name."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import prunebench
from prunebench.results.content import slug
from prunebench.toolkit.processor import of_processor

_PACKAGES = ("prunebench", "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "pluggy")


@cache
def machine_slug() -> str:
    """CPU model, cores, GPU model and count, e.g. `amd-epyc-9654-16c` or `intel-xeon-8480c-26c-nvidia-h200-x1`."""
    name = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", " ", _cpu_model())
    parts = [slug(name), f"{available_cores()}c"]
    if torch.cuda.is_available():
        parts += [slug(torch.cuda.get_device_name(0)), f"x{torch.cuda.device_count()}"]
    return "-".join(parts)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_device() -> str:
    """`cuda` where there is one, otherwise `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on CPU, bfloat16 on CUDA."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def device_name(device: str) -> str:
    """What a device is called: the GPU's model, or the CPU's; as it was asked for where this machine has no such GPU.

    The command that sends runs to a cluster makes the records of those that died there.
    """
    if not device.startswith("cuda"):
        return _cpu_model()
    try:
        return torch.cuda.get_device_name(torch.device(device.partition("+")[0]))  # of several the first
    except (AssertionError, RuntimeError):  # torch without CUDA, no driver, no such index
        return device


def driver_version() -> str | None:
    """The NVIDIA driver's and CUDA's version, or None without a GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return f"CUDA {torch.version.cuda}"
    found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return f"{found[1] if found else 'unknown'}, CUDA {torch.version.cuda}"


def platform_name() -> str:
    """System, architecture and C library."""
    libc = "".join(platform.libc_ver())
    return " ".join(part for part in (platform.system(), platform.machine(), libc) if part)


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def source_commit() -> tuple[str | None, bool | None]:
    """The commit of the clone this program runs from, and whether its code has changes; (None, None) outside a clone."""
    top = Path(prunebench.__file__).parents[2]
    if not (top / ".git").exists():
        return None, None
    try:
        commit = _git(top, "rev-parse", "HEAD")
        changed = _git(top, "status", "--porcelain", "--", "harness", "pruners", "benchmarks", "pyproject.toml")
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(changed)


def portable(text: str) -> str:
    """A text without paths of this machine: the mirror, the clone, the working and the home folder by name."""
    places = [
        (os.environ.get("PRUNEBENCH_MIRROR"), "$MIRROR"),
        (str(Path(prunebench.__file__).parents[2]), "$PRUNEBENCH"),
        (str(Path.cwd()), "."),
        (str(Path.home()), "$HOME"),
    ]
    text = text.encode(errors="replace").decode()  # file names may hold bytes that are no UTF-8
    for place, name in places:
        for spelling in {place, str(Path(place).resolve())} if place else ():
            if len(spelling) > 1:
                text = text.replace(spelling, name)
    return re.sub(r"(?<![\w.$])/(?:[\w.+-]+/)+([\w.+-]+)", r"…/\1", text)


def _git(folder: Path, *args: str) -> str:
    found = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
    return found.stdout.strip()


def _cpu_model() -> str:
    return of_processor("model name") or platform.processor() or platform.machine()

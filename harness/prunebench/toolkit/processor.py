"""What the system says of its processors."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def of_processor(field: str) -> str:
    """A field of the first processor in `/proc/cpuinfo`, as `vendor_id`; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")

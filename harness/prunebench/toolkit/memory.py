"""Memory: settings of it, and when it runs out: tell that from other failures, let go of what is cached, halve the batch."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from prunebench.errors import RequestError
from prunebench.spec import Job

_SAYINGS = ("can't allocate memory", "not enough memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
"""What errors say that have no class of their own: the host's allocator, the CUDA runtime, its libraries."""

_T = TypeVar("_T")


def gib_setting(name: str) -> int | None:
    """An environment variable in GiB, as bytes; None where it is not set.

    Raises:
        RequestError: it is not a number of GiB.
    """
    text = os.environ.get(name)
    if not text:
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not gib >= 0:
        raise RequestError(f"{name} is a number of GiB, not {text!r}.")
    return int(min(gib, 2.0**30) * 2**30)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's memory or the host's ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)


def let_go() -> None:
    """Give back what nobody uses: cycles that hold tensors, and blocks that the device's allocator keeps."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def halving(job: Job, size: Callable[[], int], attempt: Callable[[], _T], where: str) -> _T:
    """Attempt a pass over the calibration set; when memory runs out, start it again with batches of half the size.

    The size stays so to the end of the step, and the step's notes say so.

    Args:
        job: whose `batch_size` is lowered.
        size: sequences at a time as the job's batch size now makes them.
        attempt: the pass, which starts from nothing each time, or from where it left what it has finished.
        where: for the note, "block 3".

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: one sequence alone does not fit.
    """

    def lower(sequences: int) -> None:
        job.batch_size = sequences
        job.note(f"batch size halved to {sequences}", f"out of memory in {where}")

    return until_it_fits(size, attempt, lower)


def until_it_fits(size: Callable[[], int], attempt: Callable[[], _T], lower: Callable[[int], None]) -> _T:
    """Attempt something; when memory runs out, lower its size to half and attempt it again.

    Args:
        size: sequences at a time, as they are now.
        attempt: starts from nothing each time, or from where it left what it has finished.
        lower: is given half the size.

    Raises:
        torch.OutOfMemoryError, MemoryError, RuntimeError: one sequence alone does not fit.
    """
    while True:
        try:
            return attempt()
        except (MemoryError, RuntimeError) as error:
            if size() <= 1 or not is_out_of_memory(error):
                raise
        # Here the error is gone, and with it the frames whose tensors it held.
        let_go()
        lower(size() // 2)

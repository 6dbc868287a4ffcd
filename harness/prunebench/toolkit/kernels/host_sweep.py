"""SparseGPT's sweep on a host, in C: some rows of W at a time, their slab in the nearest caches, the sums in registers.

In PyTorch a slab is some hundred small operations; with N:M targets these take longer than what they compute. The machine's own
C compiler makes functions of `host_sweep.c` once a process, in a third of a second. Without one the sweep stays PyTorch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from functools import cache
from threading import Barrier
from typing import Any

import torch

from prunebench.toolkit.kernels import Mismatch
from prunebench.toolkit.kernels.comparing import compare_numbers, compare_sweeps
from prunebench.toolkit.kernels.compiling import compiled

WIDEST = 256
"""Columns of a slab, as in the source."""

_BLOCK = 6
"""Columns that are summed at once, as in the source."""

_ROWS = 64
"""Rows that go together, at most: threads take multiples."""


def sweep_slab(
    work: torch.Tensor,
    keep: torch.Tensor,
    upper: torch.Tensor,
    inverse: torch.Tensor,
    keeps: int = 0,
    of: int = 0,
    removed: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """As `column_sweep.sweep_slab`; None, and nothing is written, also where anything is not in float32 on the host."""
    columns, outputs = work.shape
    masks = [keep] if removed is None else [keep, removed]
    fitting = keep.is_contiguous() and not (of and columns % of) and all(mask.dtype == torch.bool for mask in masks)
    if not fitting or not _takes(columns, work, upper, inverse, others=masks):
        return None
    errors, upper, inverse = torch.empty_like(work), upper.contiguous(), inverse.contiguous()
    gone = (None, 0, 0) if removed is None else (removed.data_ptr(), *removed.stride())

    def of_rows(first: int, last: int) -> None:
        matrices = (work.data_ptr(), keep.data_ptr(), errors.data_ptr())
        factor = (upper.data_ptr(), inverse.data_ptr())
        _library().prunebench_sweep(*matrices, outputs, first, last, columns, *factor, keeps, of, *gone)

    _by_rows(of_rows, outputs)
    return errors


def correct(work: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor) -> torch.Tensor | None:
    """Take the errors of a slab from the columns behind it, in place: `W -= U' E`.

    Args:
        work: W, [later columns, outputs], float32, contiguous.
        upper: U, the factor's rows of the slab, [columns, later columns].
        errors: E, [columns, outputs], contiguous.

    Returns:
        `work`; None, and nothing is written, where the slab is too wide or anything not in float32 on the host.
    """
    columns, later = upper.shape
    outputs = work.shape[1]
    if not _takes(columns, work, errors, upper) or not errors.is_contiguous():
        return None
    share = work.new_empty(columns * (later + _BLOCK))  # the last columns take up as much as others
    _library().prunebench_pack(share.data_ptr(), upper.data_ptr(), *upper.stride(), columns, later)

    def of_rows(first: int, last: int) -> None:
        matrices = (work.data_ptr(), share.data_ptr(), errors.data_ptr())
        _library().prunebench_correct(*matrices, outputs, first, last, columns, later)

    _by_rows(of_rows, outputs)
    return work


def check(device: torch.device) -> None:
    """Compare with a sweep in float64, column by column, and with a product."""
    compare_sweeps(device, sweep_slab)
    generator = torch.Generator().manual_seed(4)
    work, upper, errors = (torch.randn(shape, generator=generator) for shape in ((45, 150), (16, 45), (16, 150)))
    wanted = work.double() - upper.double().t() @ errors.double()
    if correct(work, upper, errors) is None:
        raise Mismatch("no column was corrected")
    compare_numbers("corrected columns", work, wanted)


def _takes(columns: int, work: torch.Tensor, *numbers: torch.Tensor, others: Sequence[torch.Tensor] = ()) -> bool:
    floats = (work, *numbers)
    here = all(tensor.device.type == "cpu" for tensor in (*floats, *others))
    return here and all(t.dtype == torch.float32 for t in floats) and work.is_contiguous() and columns <= WIDEST


def _by_rows(work: Callable[[int, int], None], outputs: int) -> None:
    """`work(first, last)` for all rows, on as many threads as torch takes: while C runs, other threads of Python do."""
    threads = torch.get_num_threads()
    each = _ROWS * max(1, -(-outputs // (threads * _ROWS)))
    (first, last), *others = [(start, min(start + each, outputs)) for start in range(0, max(1, outputs), each)]
    pool = _pool(threads - 1) if others else None
    if pool is None:
        work(0, outputs)
        return
    begun = [pool.submit(work, *part) for part in others]
    work(first, last)
    for future in begun:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor | None:
    """Threads that are all there: one that cannot be begun amid a matrix leaves it half swept. None if they cannot be had."""
    pool, gate = ThreadPoolExecutor(threads, thread_name_prefix="prunebench-sweep"), Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(gate.wait)
        gate.wait()
    except RuntimeError:  # the system gives no more
        gate.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        return None
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has none of these threads


@cache
def _library() -> Any:
    library = compiled("host_sweep")
    pointer, number = c_void_p, c_int64
    library.prunebench_sweep.argtypes = (
        *(pointer, pointer, pointer, number, number, number, number, pointer, pointer),
        *(number, number, pointer, number, number),
    )
    library.prunebench_pack.argtypes = (pointer, pointer, number, number, number, number)
    library.prunebench_correct.argtypes = (pointer, pointer, pointer, number, number, number, number, number)
    for function in (library.prunebench_sweep, library.prunebench_pack, library.prunebench_correct):
        function.restype = None
    return library

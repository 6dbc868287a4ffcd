"""Kernels of the column sweep: on GPUs, or in Triton's interpreter, and in C on hosts, against sweeps in float64."""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from places import COMPILER, GPUS, HOST, in_use, let_in
from support import make_job, tiny, tokens_of

from prunebench.errors import NonFiniteError
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import kernels
from prunebench.toolkit.kernels import compiling, host_sweep
from prunebench.toolkit.least_squares import (
    InverseFactor,
    Swept,
    ThresholdRule,
    choose_given,
    choose_groups,
    choose_slabs,
    inverse_factor,
    sweep,
)
from prunebench.toolkit.placement import Resident, place_model
from prunebench_pruners.sparsegpt import SparseGpt

HALF = Unstructured(0.5)


@pytest.fixture(params=[*GPUS, HOST])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a kernel sweeps, without having been compared before."""
    return let_in(request.param, monkeypatch)


def sweeper() -> str:
    """The kernel that sweeps in the place at hand."""
    return "host_sweep" if ("cpu", "host_sweep") in kernels._verdicts else "column_sweep"


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram matrix of correlated inputs, one of them dead."""
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator)
    inputs = inputs @ (torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=generator))
    inputs[:, 3] = 0
    return torch.randn(rows, columns, generator=generator), 2 / 5 * inputs.t() @ inputs


def never(damping: float) -> None:
    pytest.fail(f"tried again with a damping of {damping}")


@pytest.mark.parametrize("rule", ["slabs", "2:4", "2:4 removed", "4:8", "given", "threshold"])
@pytest.mark.parametrize(("columns", "slab"), [(48, 32), (56, 128)])
def test_a_sweep_is_that_in_float64(rule: str, columns: int, slab: int, device: torch.device) -> None:
    """Masks entry by entry, but for near ties; weights and loss within rounding. The last slab is narrower."""
    weight, gram = problem(19, columns)
    removed = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    found = []
    for dtype, at in ((torch.float32, device), (torch.float64, torch.device("cpu"))):
        w, gone = weight.to(at, dtype), removed.to(at)
        factor = inverse_factor(gram.to(at, dtype), 0.01, never)
        choose: Any = {
            "slabs": lambda w=w: choose_slabs(HALF, None),
            "2:4": lambda: choose_groups(NM(2, 4), None),
            "2:4 removed": lambda gone=gone: choose_groups(NM(2, 4), gone),
            "4:8": lambda: choose_groups(NM(4, 8), None),
            "given": lambda gone=gone: choose_given(~gone),
            "threshold": lambda w=w: ThresholdRule(HALF, None, w),
        }[rule]()
        every = {"2": 4, "4": 8}.get(rule[0], 0)
        swept = sweep(w, factor, choose, slab, every)
        found.append((swept.weight.cpu().double(), swept.keep.cpu(), float(swept.loss)))
    (w, keep, loss), (wanted, wanted_keep, wanted_loss) = found
    assert int((keep != wanted_keep).sum()) == 0
    torch.testing.assert_close(w, wanted, rtol=1e-3, atol=1e-4)
    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert not bool(torch.signbit(w[~keep]).any())
    in_use(device, sweeper())


def test_weights_that_are_no_numbers_end_a_sweep(device: torch.device) -> None:
    weight, gram = problem(8, 48)
    weight[2, 40] = math.nan
    factor = inverse_factor(gram.to(device), 0.01, never)
    for choose, every in ((choose_slabs(HALF, None), 0), (choose_groups(NM(2, 4), None), 4)):
        with pytest.raises(NonFiniteError, match="NaN"):
            sweep(weight.to(device), factor, choose, 16, every)


def test_a_slab_too_wide_is_for_torch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(5, 48)
    factor = inverse_factor(gram.to(device), 0.01, never)
    wanted = sweep(weight.to(device), factor, choose_slabs(HALF, None), 48)
    kernel = import_module(f"{kernels.__name__}.{sweeper()}")
    monkeypatch.setattr(kernel, "WIDEST", 32)
    work, keep = torch.zeros(2, 48, 5, device=device)
    assert kernel.sweep_slab(work, keep.bool(), torch.eye(48, device=device), torch.ones(48, 1, device=device)) is None
    found = sweep(weight.to(device), factor, choose_slabs(HALF, None), 48)
    assert torch.equal(found.keep, wanted.keep)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=1e-4, atol=1e-5)


def test_a_method_by_kernels(device: torch.device) -> None:
    """SparseGPT on a whole model, by kernels and without."""
    found = []
    for at in (device, None):
        with pytest.MonkeyPatch.context() as patch:
            if at is None:
                patch.setenv("PRUNEBENCH_KERNELS", "off")
            placement = Resident(str(device))
            job = make_job(tiny(num_hidden_layers=1), tokens_of(), target=NM(2, 4), placement=placement)
            place_model(job.model, [block.module for block in job.anatomy.blocks], placement)
            SparseGpt(block_size=32).prune(job)
            found.append({m.name: m.weight.clone() for m in job.anatomy.matrices})
    for name, weight in found[0].items():
        assert int(((weight == 0) != (found[1][name] == 0)).sum()) <= 2


# In C


def swept(weight: torch.Tensor, gram: torch.Tensor, target: NM | None, slab: int = 128) -> Swept:
    return swept_by(weight, inverse_factor(gram, 0.01, never), target, slab)


def swept_by(weight: torch.Tensor, factor: InverseFactor, target: NM | None, slab: int = 128) -> Swept:
    choose = choose_slabs(HALF, None) if target is None else choose_groups(target, None)
    return sweep(weight, factor, choose, slab, 0 if target is None else target.of)


def equal(left: Swept, right: Swept) -> bool:
    return torch.equal(left.weight, right.weight) and torch.equal(left.keep, right.keep)


def forget() -> None:
    """Let compilers be asked for anew, and libraries be loaded."""
    for once in (compiling.compiled, compiling.compiler, host_sweep._library):
        once.cache_clear()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A host whose kernel may be used."""
    return let_in("host", monkeypatch)


@pytest.fixture
def fresh(host: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A host whose kernel was neither loaded nor compared yet; nor is it known afterwards."""
    monkeypatch.setattr(kernels, "_verdicts", {})
    forget()
    yield host
    forget()


@COMPILER
def test_it_passes_its_own_comparison_and_says_who_made_it(fresh: torch.device) -> None:
    assert kernels.use(fresh, "host_sweep"), kernels.report()
    assert kernels.report() == {"host_sweep": kernels.IN_USE, "compiler": compiling.compiler()}
    assert kernels.report()["compiler"]


@COMPILER
@pytest.mark.parametrize("rows", [1, 15, 64, 65, 130])
@pytest.mark.parametrize(
    ("target", "columns", "slab"),
    [(None, 7, 128), (None, 131, 50), (NM(1, 2), 70, 32), (NM(2, 4), 100, 128), (NM(8, 16), 96, 48), (NM(16, 32), 96, 64)],
)
def test_rows_and_columns_of_any_number(rows: int, target: NM | None, columns: int, slab: int, host: torch.device) -> None:
    """Registers hold some rows and some columns; what is left over comes out right, too."""
    weight, gram = problem(rows, columns)
    found, wanted = swept(weight, gram, target, slab), swept(weight.double(), gram.double(), target, slab)
    in_use(host, "host_sweep")
    assert torch.equal(found.keep, wanted.keep)
    torch.testing.assert_close(found.weight.double(), wanted.weight, rtol=1e-3, atol=1e-4)
    assert float(found.loss) == pytest.approx(float(wanted.loss), rel=1e-4)


@COMPILER
@pytest.mark.parametrize("target", [None, NM(2, 4)], ids=str)
def test_bits_depend_on_neither_threads_nor_registers(
    target: NM | None, fresh: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(300, 136)
    factor = inverse_factor(gram, 0.01, never)
    first = swept_by(weight, factor, target)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert equal(swept_by(weight, factor, target), first), threads
        finally:
            torch.set_num_threads(1)
    if platform.machine() == "x86_64":
        monkeypatch.setenv("CC", "cc -mno-avx512f")
        forget()
        assert equal(swept_by(weight, factor, target), first)
    in_use(fresh, "host_sweep")


@COMPILER
@pytest.mark.parametrize("target", [NM(1, 2), NM(2, 4), NM(3, 4), NM(4, 8)], ids=str)
def test_of_equal_scores_the_same_stay(target: NM, host: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is corrected by a factor that is diagonal, so that masks are those of the scores, and most of them are ties."""
    weight = torch.randint(-2, 3, (77, 48), generator=torch.Generator().manual_seed(0)).float()
    gone = torch.rand(77, 96, generator=torch.Generator().manual_seed(1))[:, ::2] < 0.3
    factor = inverse_factor(torch.eye(48), 0.01, never)
    found = []
    for mode in ("on", "off"):
        monkeypatch.setenv("PRUNEBENCH_KERNELS", mode)
        found += [sweep(weight, factor, choose_groups(target, removed), 48, target.of) for removed in (None, gone)]
    assert all(equal(by_kernel, plain) for by_kernel, plain in zip(found[:2], found[2:], strict=True))


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/no/such/cc", "no C compiler answers"), ("false", "false does not compile it")]
)
def test_without_a_compiler_torch_sweeps(
    compiler: str, reason: str, fresh: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = problem(20, 64)
    monkeypatch.setenv("CC", compiler)
    found = swept(weight, gram, NM(2, 4))
    assert kernels.report()["host_sweep"].startswith(f"not used: RuntimeError: {reason}")
    assert "compiler" not in kernels.report()
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "off")
    assert equal(found, swept(weight, gram, NM(2, 4)))


@COMPILER
def test_a_host_that_gives_no_more_threads(host: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is swept twice, and none is left out."""
    weight, gram = problem(300, 136)
    factor = inverse_factor(gram, 0.01, never)
    wanted = swept_by(weight, factor, NM(2, 4))
    start, begun = threading.Thread.start, []

    def scarce(self: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(self)
        start(self)

    host_sweep._pool.cache_clear()
    monkeypatch.setattr(threading.Thread, "start", scarce)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    try:
        assert equal(swept_by(weight, factor, NM(2, 4)), wanted)
        assert begun
        in_use(host, "host_sweep")
    finally:
        host_sweep._pool.cache_clear()


@COMPILER
def test_a_fork_has_threads_of_its_own(host: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(300, 136)
    factor = inverse_factor(gram, 0.01, never)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    wanted = swept_by(weight, factor, NM(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python, which cannot know that these threads rest
        child = os.fork()
    if not child:
        signal.alarm(30)
        os._exit(0 if equal(swept_by(weight, factor, NM(2, 4)), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


@COMPILER
def test_what_it_cannot_read_is_for_torch(host: torch.device) -> None:
    """Nothing is written then. Other threads' settings and no outputs do not disturb it."""
    work, keep, upper = torch.randn(8, 5), torch.ones(8, 5, dtype=torch.bool), torch.eye(8)
    inverse, errors = torch.ones(8, 1), torch.randn(8, 5)
    wide = torch.zeros(264, 5)
    for refused in (
        host_sweep.sweep_slab(work.double(), keep, upper, inverse),
        host_sweep.sweep_slab(work, keep, upper.double(), inverse),
        host_sweep.sweep_slab(work, keep, upper, inverse.double()),
        host_sweep.sweep_slab(work, keep.int(), upper, inverse),
        host_sweep.sweep_slab(work, keep, upper, inverse, 1, 3),
        host_sweep.sweep_slab(work, keep, upper, inverse, 2, 4, torch.zeros(5, 8)),
        host_sweep.sweep_slab(work.t().contiguous().t(), keep, upper, inverse),
        host_sweep.sweep_slab(wide, wide.bool(), torch.eye(264), torch.ones(264, 1)),
        host_sweep.correct(work, upper.double(), errors),
        host_sweep.correct(work, upper, errors.half()),
        host_sweep.correct(work, torch.zeros(264, 8), wide),
    ):
        assert refused is None
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        wanted = work - upper.t() @ errors
        assert torch.allclose(host_sweep.correct(work, upper, errors), wanted)
    finally:
        torch.set_default_dtype(before)
    nothing = host_sweep.sweep_slab(torch.zeros(8, 0), keep[:, :0].contiguous(), upper, inverse)
    assert nothing is not None
    assert nothing.shape == (8, 0)

"""Float32 products in TF32: what that does to masks, by an emulation on a host, and that the setting is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import make_job, masks_of, tiny, tokens_of
from test_golden import GOLDEN, golden_job
from torch.utils._python_dispatch import TorchDispatchMode

from prunebench.spec import Job, Pruner
from prunebench.toolkit import loss_gradients, precision, products, regional, walk
from prunebench.toolkit.anatomy import LinearMatrix
from prunebench.toolkit.precision import in_three, single_precision, suits_three
from prunebench.toolkit.stream import Stream
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.addmm_.default, ATEN.bmm.default, ATEN.baddbmm.default}
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no trained model: {GOLDEN} is not there")


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Float32 numbers with ten bits of their fractions, to the nearest."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Products whose operands are rounded as tensor cores round them; sums stay in float32."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[-1].dtype == torch.float32:
            self.calls += 1
            args = (*args[:-2], rounded(args[-2]), rounded(args[-1]))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> Tf32:
    """Products are made where and as they are on CUDA, with tensor cores that only seem so."""
    mode, on = Tf32(), [False]

    @contextmanager
    def emulated(device: torch.device) -> Iterator[None]:
        before, on[0] = on[0], True
        try:
            if before:
                yield
            else:
                with mode:
                    yield
        finally:
            on[0] = before

    monkeypatch.setattr(products, "_onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "suits_three", lambda one, other: one.dtype == torch.float32 and not on[0])
    monkeypatch.setattr(products, "is_single", lambda device: on[0])
    for module in (precision, products, regional):
        monkeypatch.setattr(module, "single_precision", emulated)
    return mode


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_three_products_are_as_good_as_one_in_float32(as_on_a_device: Tf32) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(96, 200, generator=generator), torch.randn(130, 200, generator=generator)
    exact = one.double() @ other.double().t()
    with as_on_a_device:
        rough = one @ other.t()
    assert 1e-4 < error(rough, exact) < 1e-3, "the emulation rounds"
    for left, right in [(one, other.t()), (one.t().contiguous().t(), other.t().contiguous())]:
        assert error(in_three(left, right), exact) < 2 * error(one @ other.t(), exact) < 1e-6


PRUNERS = [Gblm(), Gblm(norm="l2"), WandaPlusPlus(ro=False), WandaPlusPlus()]


@needs_golden
@pytest.mark.parametrize(
    ("pruner", "target", "samples"),
    [
        (Gblm(), "0.5", 8),
        (WandaPlusPlus(rounds=1, ro_samples=2), "2:4", 4),
        *(pytest.param(pruner, target, 32, marks=pytest.mark.soak) for pruner in PRUNERS for target in ("0.5", "2:4")),
    ],
    ids=str,
)
def test_masks_stay_within_what_golden_ones_are_held_to(
    pruner: Pruner, target: str, samples: int, as_on_a_device: Tf32, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32 on the host: the same model, the same calibration text."""
    found = []
    for emulated in (True, False):
        if not emulated:
            monkeypatch.undo()
        job = golden_job("stories260K", target)
        job.calibration_tokens = job.calibration[:samples]
        pruner.prune(job)
        found.append(masks_of(job))
    assert as_on_a_device.calls > 100
    different = {name: int((mask != found[1][name]).sum()) for name, mask in found[0].items()}
    for name, count in different.items():
        assert count <= max(4, found[0][name].numel() // 10_000), name
    assert sum(different.values()) <= 1e-4 * sum(mask.numel() for mask in found[0].values())


def masks_on_the_same_blocks(pruner: Pruner, job: Job, laid: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The masks that a method wants, while others are laid: a single entry would change the inputs of all later blocks, whose
    last bits in bfloat16 are then others, and with them hundreds of entries, whatever the first one came of."""
    found: dict[str, torch.Tensor] = {}

    def keep(matrix: LinearMatrix, mask: torch.Tensor) -> None:
        found[matrix.name] = mask.clone()
        original(matrix, laid.get(matrix.name, mask))

    original = LinearMatrix.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearMatrix, "keep", keep)
        pruner.prune(job)
    return found


@needs_golden
@pytest.mark.parametrize(
    ("pruner", "target", "samples"),
    [
        (WandaPlusPlus(ro=False), "2:4", 2),
        *(pytest.param(p, t, 8, marks=pytest.mark.soak) for p in (Gblm(), WandaPlusPlus(ro=False)) for t in ("0.5", "2:4")),
    ],
    ids=str,
)
def test_a_model_in_16_bits_moves_more_entries_by_itself(
    pruner: Pruner, target: str, samples: int, as_on_a_device: Tf32, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Than TF32 does in its float32 copies: against the same weights in float32, and against copies in its own dtype."""

    def job(dtype: torch.dtype) -> Job:
        made = golden_job("stories260K", target)
        made.model.to(torch.bfloat16).to(dtype)
        made.calibration_tokens = made.calibration[:samples]
        return made

    in_tf32 = job(torch.bfloat16)
    laid = masks_on_the_same_blocks(pruner, in_tf32, {})
    assert as_on_a_device.calls > 100
    monkeypatch.undo()
    exact = masks_on_the_same_blocks(pruner, job(torch.bfloat16), laid)
    in_float32 = masks_on_the_same_blocks(pruner, job(torch.float32), laid)
    monkeypatch.setattr(Stream, "work_dtype", lambda _: torch.bfloat16)
    all_short = masks_on_the_same_blocks(pruner, job(torch.bfloat16), laid)

    def share(one: dict[str, torch.Tensor]) -> float:
        different = sum(int((mask != exact[name]).sum()) for name, mask in one.items())
        return different / sum(mask.numel() for mask in one.values())

    assert 10 * share(laid) < min(share(in_float32), share(all_short))
    assert share(laid) < 1e-4, "what golden masks are held to"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_copies_of_blocks_follow_their_model_there_and_back(dtype: torch.dtype, as_on_a_device: Tf32) -> None:
    """One product where the model is in 16 bits, three where it is in float32."""
    job = make_job(tiny(dtype=dtype), tokens_of(samples=1))
    walking = walk(job)
    block = next(walking)
    inputs = block.inputs([0])
    replica, before = block.replica(), as_on_a_device.calls
    torch.autograd.grad(replica.forward(inputs.float()).sum(), list(replica.module.parameters()))
    assert as_on_a_device.calls - before == (1 if dtype.itemsize == 2 else 3) * 3 * len(block.matrices)


def test_gradients_are_made_of_three_products(as_on_a_device: Tf32) -> None:
    """Forward, to the inputs and to the weights."""
    job = make_job(tiny(), tokens_of(samples=2))
    found = loss_gradients(job)
    matrices = len(job.anatomy.matrices)
    first, head = 3, 2  # the first block's query, key and value read what takes no gradient; the head's weight takes none
    assert as_on_a_device.calls == 2 * 3 * (3 * matrices - first + head)
    exact = loss_gradients(make_job(tiny(dtype=torch.float64), tokens_of(samples=2)))
    assert all(error(gradient, exact[name]) < 1e-5 for name, gradient in found.items())


def test_on_a_host_nothing_changes() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    with single_precision(torch.device("cpu")):
        assert torch.backends.cuda.matmul.fp32_precision == before
    assert not suits_three(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_the_setting_is_put_back_after_an_error_too(before: str) -> None:
    setting = torch.backends.cuda.matmul
    own = setting.fp32_precision
    try:
        setting.fp32_precision = before
        found = setting.fp32_precision  # `none` reads as what another setting says, whoever made it
        with single_precision(torch.device("cuda")):
            with single_precision(torch.device("cuda", 1)):
                assert setting.fp32_precision == "tf32"
            assert setting.fp32_precision == "tf32"
        with pytest.raises(ZeroDivisionError), single_precision(torch.device("cuda")):
            raise ZeroDivisionError
        assert setting.fp32_precision == found
    finally:
        setting.fp32_precision = own


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_three_products_on_a_device() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(512, 2048, generator=generator), torch.randn(1024, 2048, generator=generator)
    exact = one.double() @ other.double().t()
    assert error(in_three(one.cuda(), other.cuda().t()).cpu(), exact) < 2e-6
    with single_precision(torch.device("cuda")):
        assert error((one.cuda() @ other.cuda().t()).cpu(), exact) > 1e-5, "TF32 was on"

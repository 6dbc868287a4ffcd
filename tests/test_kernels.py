"""GPU kernels against the PyTorch versions: on the CPU in Triton's interpreter, on a GPU compiled; and the door of all kernels.

Those that sweep are in `test_sweep_kernels.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from places import CUDA, GPUS, in_use, let_in

from prunebench.errors import NonFiniteError, RequestError
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import Gram, InputNorm, keep_mask, kernels, masks
from prunebench.toolkit.masks import keep_by_norms, keep_slab
from prunebench.toolkit.regional import RmsProp
from prunebench.toolkit.scores import gradient_scores, wanda_scores

HALF = Unstructured(0.5)


@pytest.fixture(params=GPUS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where GPU kernels are used, and have passed no comparison yet but count as if they had."""
    return let_in(request.param, monkeypatch)


def draws(rows: int, columns: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Scores of which some decide by ties, signs of zero, infinities or the last bit; one in transposed storage."""
    generator = torch.Generator().manual_seed(rows * columns)
    special = torch.tensor([-math.inf, math.inf, -0.0, 0.0, 1.0, 1e-45, -1e-45, 3.4e38])
    yield torch.rand(rows, columns, generator=generator).to(device)
    yield (
        torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(-30, 30, (rows, columns), generator=generator)
    ).to(device)
    yield torch.randint(-2, 3, (rows, columns), generator=generator).float().to(device)
    yield torch.full((rows, columns), 0.25, device=device)
    yield special[torch.randint(0, 8, (columns, rows), generator=generator)].to(device).t()


def by_torch(scores: torch.Tensor, target: Target, group: str) -> torch.Tensor:
    if isinstance(target, NM):
        return masks.keep_nm(scores, target)
    assert isinstance(target, Unstructured)
    return masks.keep_rows(scores, target) if group == "row" else masks.keep_together([scores], target)[0]


@pytest.mark.parametrize("share", [0.29, 0.999])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (3, 17), (19, 172), (2, 1029)])
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_unstructured_masks_are_those_of_torch(group: Any, rows: int, columns: int, share: float, device: torch.device) -> None:
    for scores in draws(rows, columns, device):
        target = Unstructured(share)
        assert torch.equal(keep_mask(scores, target, group), by_torch(scores, target, group))
    if int(columns * share):
        in_use(device, "rows" if group == "row" else "matrices")


@pytest.mark.parametrize("target", [NM(2, 4), NM(4, 8), NM(1, 2), NM(5, 16)], ids=str)
def test_groups_are_those_of_torch(target: NM, device: torch.device) -> None:
    for rows, groups in ((1, 1), (7, 1), (5, 3)):
        for scores in draws(rows, groups * target.of, device):
            assert torch.equal(keep_mask(scores, target), masks.keep_nm(scores, target))
    in_use(device, "groups")


def test_a_group_of_odd_size_is_for_torch(device: torch.device) -> None:
    scores = next(draws(4, 12, device))
    assert torch.equal(keep_mask(scores, NM(1, 3)), masks.keep_nm(scores, NM(1, 3)))


def test_several_matrices_are_compared_in_order(device: torch.device) -> None:
    """One of them wider than a tile."""
    several = [torch.randint(0, 3, shape).float().to(device) for shape in ((4, 9), (1, 1), (2, 4500), (6, 5))]
    for found, wanted in zip(keep_mask(several, HALF, "model"), masks.keep_together(several, HALF), strict=True):
        assert torch.equal(found, wanted)
    in_use(device, "matrices")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
def test_scores_made_on_the_way(target: Target, dtype: torch.dtype, transposed: bool, device: torch.device) -> None:
    """Rounded as PyTorch rounds them: products, and the sum with alpha times gradients."""
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn(40, 24, generator=generator).to(dtype).to(device)
    weight = stored.t() if transposed else stored
    norms = torch.rand(weight.shape[1], generator=generator).to(device)
    norms[::5] = 0  # dead columns
    gradients = torch.rand(weight.shape, generator=generator).to(device)
    assert torch.equal(keep_by_norms(weight, norms, target), by_torch(wanda_scores(weight, norms), target, "row"))
    wanted = by_torch(gradient_scores(weight, norms, gradients, 3.7), target, "row")
    assert torch.equal(keep_by_norms(weight, norms, target, gradients, 3.7), wanted)
    in_use(device, "rows" if target is HALF else "groups")


@pytest.mark.parametrize("target", [HALF, NM(2, 4)], ids=str)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_not_a_number_is_an_error_that_counts(target: Target, group: Any, device: torch.device) -> None:
    scores = torch.rand(4, 8, device=device)
    scores[1, 2] = scores[3, 7] = math.nan
    with pytest.raises(NonFiniteError, match="2 of 32"):
        keep_mask(scores, target, group)
    with pytest.raises(NonFiniteError, match="2 of 32"):
        keep_by_norms(scores, torch.ones(8, device=device), target)
    assert keep_slab(scores, target).shape == scores.shape  # nobody has waited


def test_float64_is_for_torch(device: torch.device) -> None:
    """Numbers that float32 would not tell apart."""
    scores = 1 + torch.arange(64, 0, -1, dtype=torch.float64, device=device).reshape(4, 16) * 1e-12
    for target in (HALF, NM(2, 4)):
        assert torch.equal(keep_mask(scores, target), by_torch(scores, target, "row"))


# Statistics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_norms_of_inputs_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    """In batches of unequal size, of which one spans several chunks and one is empty."""
    norm = InputNorm(70, device, torch.float32)
    batches = [torch.randn(n, 70, generator=torch.Generator().manual_seed(n)).to(dtype).to(device) for n in (1300, 5)]
    for batch in batches:
        assert norm.takes(batch)
        norm.add(batch, 2)
    norm.pass_by(1)
    wanted = (torch.cat(batches).double().square().sum(dim=0) / 5).sqrt().float()
    torch.testing.assert_close(norm.value(), wanted, rtol=1e-6, atol=0.0)
    in_use(device, "column_squares")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_gram_of_short_inputs(dtype: torch.dtype) -> None:
    device = torch.empty(0, device="cuda").device
    gram, inputs = Gram(300, device, torch.float32), torch.randn(2000, 300, device=device).to(dtype)
    assert gram.takes(inputs)
    gram.add(inputs[:700], 1)
    gram.add(inputs[700:], 3)
    wanted = 2 / 4 * inputs.double().t() @ inputs.double()
    torch.testing.assert_close(gram.value().double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.max()))


def test_short_inputs_lose_nothing_in_float32() -> None:
    """What `kernels/gram.py` rests on: products of two 16-bit numbers are exact in float32, by bits of their significands."""
    for dtype in (torch.bfloat16, torch.float16):
        left, right = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0)).to(dtype)
        exact = left.double() * right.double()
        assert torch.equal((left.float() * right.float()).double(), exact)
        inputs = torch.randn(4096, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
        gram = Gram(48, torch.device("cpu"), torch.float32)
        gram.add(inputs.float(), 2)
        wanted = inputs.double().t() @ inputs.double()
        torch.testing.assert_close(gram.value().double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.max()))


# Training


@pytest.mark.parametrize("shape", [(3, 5), (64, 48)])
def test_a_step_of_rmsprop(shape: tuple[int, int], device: torch.device) -> None:
    """As PyTorch's, within rounding; what is not stored row by row is left to it."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device), torch.randn(shape, generator=generator).to(device).t()]
    ours, theirs = [value.clone() for value in values], [value.clone() for value in values]
    mine, reference = RmsProp(ours, 0.01), torch.optim.RMSprop(theirs, lr=0.01)
    for _ in range(4):
        for index, value in enumerate(theirs):
            value.grad = torch.randn(shape if not index else shape[::-1], generator=generator).to(device)
            by_kernel = kernels.run(device, "rmsprop", lambda k, w=ours[index].clone(), g=value.grad: k.step(w, g, g, 0, 0, 1))
            assert (by_kernel is not None) == (index == 0)
            mine.step(index, value.grad)
        reference.step()
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    in_use(device, "rmsprop")


# The door


class Broken(ModuleType):
    """A kernel that fails at being compared, or later."""

    def __init__(self, at_once: bool) -> None:
        super().__init__("broken")
        self.at_once = at_once

    def check(self, device: torch.device) -> None:
        if self.at_once:
            raise kernels.Mismatch("3 of 9 entries are not those of the PyTorch version")

    def keep(self, *anything: object) -> None:
        raise RuntimeError("out of resource:\n shared memory")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_kernel_that_fails_steps_aside_and_says_so(at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "interpret")
    monkeypatch.setattr(kernels, "_verdicts", {})
    asked: list[str] = []
    monkeypatch.setattr(kernels, "_module", lambda name: asked.append(name) or Broken(at_once))
    scores = torch.rand(4, 8)
    for _ in range(2):
        assert torch.equal(keep_mask(scores, HALF), masks.keep_rows(scores, HALF))
    reason = "Mismatch: 3 of 9 entries" if at_once else "RuntimeError: out of resource: shared memory"
    assert kernels.report()["rows"].startswith(f"not used: {reason}")
    assert asked == (["rows"] if at_once else ["rows", "rows"])  # not asked for again


def test_memory_that_runs_out_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str) -> ModuleType:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("PRUNEBENCH_KERNELS", "interpret")
    monkeypatch.setattr(kernels, "_verdicts", {})
    monkeypatch.setattr(kernels, "_module", full)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.use(torch.device("cpu"), "rows")
    assert kernels.report() == {}


def test_who_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_verdicts", {("cpu", "rows"): kernels.IN_USE, ("cuda:0", "rows"): kernels.IN_USE})
    host, gpu = torch.device("cpu"), torch.device("cuda:0")
    for mode, wanted in (("", (False, True)), ("on", (False, True)), ("off", (False, False)), ("interpret", (True, False))):
        monkeypatch.setenv("PRUNEBENCH_KERNELS", mode)
        assert (kernels.use(host, "rows"), kernels.use(gpu, "rows")) == wanted
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "off")
    assert kernels.report() == {"all": "off, by PRUNEBENCH_KERNELS"}
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "on")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.0"))
    assert kernels.report() == {"rows on cpu": kernels.IN_USE, "rows on cuda:0": kernels.IN_USE, "triton": "3.0"}
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "perhaps")
    with pytest.raises(RequestError, match="'perhaps', and none of on, off and interpret"):
        kernels.use(host, "rows")


@pytest.mark.parametrize("name", [name for name in kernels.NAMES if name != "gram"])
def test_kernels_pass_their_own_comparison(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_verdicts", {})
    assert kernels.use(device, name), kernels.report()


def test_without_triton_nothing_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEBENCH_KERNELS", "interpret")
    monkeypatch.setattr(kernels, "_verdicts", {})
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("groups", "scoring"):
        monkeypatch.delitem(sys.modules, f"{kernels.__name__}.{name}", raising=False)
    scores = torch.rand(2, 8)
    assert torch.equal(keep_mask(scores, NM(2, 4)), masks.keep_nm(scores, NM(2, 4)))
    assert kernels.report()["groups"].startswith("not used: ModuleNotFoundError")

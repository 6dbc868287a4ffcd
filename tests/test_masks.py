"""Keep masks against a slow reference: float64, one stable argsort a comparison group, in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from prunebench.errors import NonFiniteError, RunError
from prunebench.targets import NM, Dense, Target, Unstructured
from prunebench.toolkit import keep_mask, masks
from prunebench.toolkit.masks import pack_bits, unpack_bits

SHARES = (0.0, 0.29, 0.5, 0.6, 0.7, 0.999)
PATTERNS = (NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4), NM(2, 16))


def reference_group(scores: NDArray[np.float64], removed: int) -> NDArray[np.bool_]:
    """The lowest go, of equal ones the first."""
    keep = np.ones(scores.shape, dtype=bool)
    keep[np.argsort(scores, kind="stable")[:removed]] = False
    return keep


def reference(scores: torch.Tensor, target: Target, group: str) -> torch.Tensor:
    numbers = scores.double().numpy()
    if isinstance(target, NM):
        parts = numbers.reshape(-1, target.of)
        keep = np.stack([reference_group(part, target.of - target.keep) for part in parts]) if len(parts) else parts > 0
    elif isinstance(target, Dense):
        keep = np.ones(numbers.shape, dtype=bool)
    elif group == "row":
        keep = np.stack([reference_group(row, int(row.size * target.sparsity)) for row in numbers])
    else:
        keep = reference_group(numbers.ravel(), int(numbers.size * target.sparsity))
    return torch.from_numpy(keep.reshape(numbers.shape))


def even(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator)


def negative(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-30, 30, shape, generator=generator)


def tied(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=generator).float()


def constant(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.full(shape, 0.25)


def zeros_of_both_signs(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    signs = torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0
    return 0.0 * signs + tied(shape, generator) * (torch.rand(shape, generator=generator) < 0.2)


def infinite(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    values = torch.tensor([-math.inf, math.inf, -0.0, 0.0, 1.0, 1e-45, -1e-45, 3.4e38])
    return values[torch.randint(0, len(values), shape, generator=generator)]


Draw = Callable[[tuple[int, int], torch.Generator], torch.Tensor]
DRAWS: tuple[Draw, ...] = (even, negative, tied, constant, zeros_of_both_signs, infinite)


@pytest.fixture(params=[1 << 22, 37, 1], ids=["one-chunk", "chunks-of-37", "chunks-of-1"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The result may not depend on where chunks begin."""
    monkeypatch.setattr(masks, "CHUNK_ENTRIES", request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("group", ["row", "matrix", "model"])
def test_unstructured_equals_the_reference(group: Any, draw: Draw, dtype: torch.dtype, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1), (1, 2), (5, 1), (3, 17), (8, 172), (13, 31)]:
        scores = draw(shape, generator).to(dtype)
        for share in SHARES:
            target = Unstructured(share)
            keep = keep_mask([scores], target, "model")[0] if group == "model" else keep_mask(scores, target, group)
            assert keep.dtype == torch.bool
            assert torch.equal(keep, reference(scores, target, group)), (shape, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("target", PATTERNS, ids=str)
def test_n_of_m_equals_the_reference(target: NM, draw: Draw, dtype: torch.dtype, chunk: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, groups in [(1, 1), (7, 1), (3, 5), (16, 3)]:
        scores = draw((rows, groups * target.of), generator).to(dtype)
        keep = keep_mask(scores, target)
        assert torch.equal(keep, reference(scores, target, "row")), (rows, groups)
        assert bool((keep.view(-1, target.of).sum(dim=1) == target.keep).all())


@pytest.mark.parametrize("draw", [even, tied, infinite], ids=lambda draw: draw.__name__)
def test_over_the_model_matrices_are_compared_in_order(draw: Draw, chunk: int) -> None:
    """Ties go to the earlier matrix, and within it to the earlier row."""
    generator = torch.Generator().manual_seed(2)
    scores = [draw(shape, generator) for shape in [(4, 9), (1, 1), (6, 5), (2, 31)]]
    whole = torch.cat([matrix.flatten() for matrix in scores])[None]
    for share in SHARES:
        target = Unstructured(share)
        found = keep_mask(scores, target, "model")
        assert [mask.shape for mask in found] == [matrix.shape for matrix in scores]
        flat = torch.cat([mask.flatten() for mask in found])[None]
        assert torch.equal(flat, reference(whole, target, "row"))


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_exactly_the_floor_is_removed(group: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for columns in [*range(1, 40), 100, 172, 255, 1000]:
        for scores in (torch.rand(3, columns, generator=generator), torch.zeros(3, columns)):
            for share in SHARES:
                gone = ~keep_mask(scores, Unstructured(share), group)
                if group == "row":
                    assert gone.sum(dim=1).tolist() == [int(columns * share)] * 3
                else:
                    assert int(gone.sum()) == int(3 * columns * share)


def test_nothing_is_removed_from_a_dense_target() -> None:
    assert bool(keep_mask(torch.zeros(3, 5), Dense()).all())
    assert all(bool(mask.all()) for mask in keep_mask([torch.zeros(3, 5), torch.zeros(2, 2)], Dense(), "model"))


@pytest.mark.parametrize("group", ["row", "matrix", "model"])
def test_n_of_m_ignores_the_comparison_group(group: Any) -> None:
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(4))
    found = keep_mask([scores, scores], NM(2, 4), "model")[1] if group == "model" else keep_mask(scores, NM(2, 4), group)
    assert torch.equal(found, reference(scores, NM(2, 4), "row"))


def test_scores_in_any_memory_order_give_one_mask() -> None:
    """GPT-2's weights are views of transposed storage."""
    generator = torch.Generator().manual_seed(5)
    stored = tied((16, 12), generator)
    for target, group in [(Unstructured(0.6), "row"), (Unstructured(0.6), "matrix"), (NM(2, 4), "row")]:
        view, copy = stored.t(), stored.t().contiguous()
        assert torch.equal(keep_mask(view, target, group), keep_mask(copy, target, group))  # type: ignore[call-overload]


def test_the_scores_are_left_alone() -> None:
    scores = zeros_of_both_signs((6, 8), torch.Generator().manual_seed(6))
    before = scores.clone().view(torch.int32)
    for target in (Unstructured(0.5), NM(2, 4)):
        keep_mask(scores, target, "row")
        keep_mask(scores, target, "matrix")
    assert torch.equal(scores.view(torch.int32), before)


@pytest.mark.parametrize("target", [Unstructured(0.5), NM(2, 4), Dense()], ids=str)
def test_not_a_number_is_an_error_that_counts(target: Target) -> None:
    scores = torch.rand(4, 8)
    scores[1, 2] = scores[3, 7] = math.nan
    with pytest.raises(NonFiniteError, match="2 of 32"):
        keep_mask(scores, target)
    with pytest.raises(NonFiniteError, match="2 of 32"):
        keep_mask([torch.rand(4, 8), scores], target, "model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_short_types_are_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(RunError, match=str(dtype).removeprefix("torch.")):
        keep_mask(torch.ones(4, 4, dtype=dtype), Unstructured(0.5))


def test_an_unknown_group_is_an_error() -> None:
    with pytest.raises(RunError, match="'layer' is none of row, matrix and model"):
        keep_mask(torch.ones(2, 4), Unstructured(0.5), "layer")  # type: ignore[call-overload]


def test_columns_that_are_not_a_multiple_are_an_error() -> None:
    with pytest.raises(RunError, match="10 columns are not a multiple of 4"):
        keep_mask(torch.rand(4, 10), NM(2, 4))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_scores_are_matrices(shape: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match=r"must be \[outputs, inputs\]"):
        keep_mask(torch.rand(shape), Unstructured(0.5))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 3), (8, 8), (5, 172), (16, 17)])
def test_bits_are_those_of_numpy(shape: tuple[int, int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.5
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy()))
    assert torch.equal(unpack_bits(packed, shape), mask)
    assert np.array_equal(pack_bits(mask.t()).numpy(), np.packbits(mask.numpy().T))


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's own allocator held at once, temporaries inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    assert events
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.parametrize(
    ("target", "group", "bytes_an_entry"),
    [
        (Unstructured(0.5), "row", 16),
        (Unstructured(0.5), "matrix", 23),
        (NM(2, 4), "row", 11),
        (NM(2, 16), "row", 11),
    ],
    ids=str,
)
def test_extra_memory_is_bounded_by_the_chunk(
    target: Target, group: Any, bytes_an_entry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix twice as tall costs its mask and not a byte more."""
    chunk = 1 << 18
    monkeypatch.setattr(masks, "CHUNK_ENTRIES", chunk)
    generator = torch.Generator().manual_seed(8)
    extra = []
    for rows in (2048, 4096):
        scores = torch.rand(rows, 512, generator=generator)
        extra.append(peak_bytes(lambda scores=scores: keep_mask(scores, target, group)) - scores.numel())
    assert extra[1] == pytest.approx(extra[0], abs=chunk)
    assert max(extra) <= bytes_an_entry * chunk

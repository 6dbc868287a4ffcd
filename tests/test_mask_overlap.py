"""The overlap of two masks against sets of places, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from prunebench.errors import RequestError
from prunebench.results.mask_files import MaskFile
from prunebench.results.overlap import overlap, overlap_in_total

SHAPES = {"q": (7, 9), "k": (16, 16), "up": (1, 3), "down": (40, 64)}


def mask_file(masks: dict[str, NDArray[np.bool_]], weights: str | None = "aaaa") -> MaskFile:
    shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
    manifest = {} if weights is None else {"weights": weights}
    return MaskFile(shapes, manifest, {name: np.packbits(mask) for name, mask in masks.items()})


def masks(seed: int, share: float = 0.5) -> dict[str, NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    return {name: generator.random(shape) >= share for name, shape in SHAPES.items()}


def removed_places(keep: dict[str, NDArray[np.bool_]]) -> set[tuple[str, int, int]]:
    return {
        (name, row, column)
        for name, mask in keep.items()
        for row in range(mask.shape[0])
        for column in range(mask.shape[1])
        if not mask[row, column]
    }


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_overlap_is_that_of_the_sets(share: float) -> None:
    first, second = masks(0, share), masks(1, share)
    left, right = removed_places(first), removed_places(second)
    found = overlap(mask_file(first), mask_file(second))
    for name in SHAPES:
        mine, theirs = ({place for place in places if place[0] == name} for places in (left, right))
        if mine | theirs:
            assert found[name] == len(mine & theirs) / len(mine | theirs)
        else:
            assert name not in found
    assert overlap_in_total(mask_file(first), mask_file(second)) == len(left & right) / len(left | right)


def test_equal_disjoint_and_empty_masks() -> None:
    one = masks(0)
    assert set(overlap(mask_file(one), mask_file(one)).values()) == {1.0}
    opposite = {name: ~mask for name, mask in one.items()}
    assert overlap_in_total(mask_file(one), mask_file(opposite)) == 0.0
    full = {name: np.ones(shape, dtype=bool) for name, shape in SHAPES.items()}
    assert overlap(mask_file(full), mask_file(full)) == {}
    assert math.isnan(overlap_in_total(mask_file(full), mask_file(full)))


def test_it_does_not_matter_which_comes_first_nor_the_order_of_matrices() -> None:
    first, second = masks(0), dict(reversed(masks(1).items()))
    assert overlap(mask_file(first), mask_file(second)) == overlap(mask_file(second), mask_file(first))


def test_masks_of_different_models_are_refused() -> None:
    first = masks(0)
    with pytest.raises(RequestError, match="the weights aaaa and bbbb"):
        overlap(mask_file(first), mask_file(first, "bbbb"))
    assert overlap(mask_file(first), mask_file(first, None))
    fewer = {name: mask for name, mask in first.items() if name != "down"}
    with pytest.raises(RequestError, match="down is not in both"):
        overlap(mask_file(first), mask_file(fewer))
    with pytest.raises(RequestError, match="q is not in both, or of another shape"):
        overlap_in_total(mask_file(first), mask_file({**first, "q": first["q"].T.copy()}))

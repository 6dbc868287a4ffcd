"""Sparsity targets as text and as counts."""

from __future__ import annotations

import random
import re

import pytest

from prunebench.errors import RequestError
from prunebench.targets import NM, Dense, Target, Unstructured, parse_target


@pytest.mark.parametrize(
    ("text", "target", "sparsity", "slug"),
    [
        ("dense", Dense(), 0.0, "dense"),
        ("0.5", Unstructured(0.5), 0.5, "0.5"),
        (" .25 ", Unstructured(0.25), 0.25, "0.25"),
        ("0", Unstructured(0.0), 0.0, "0"),
        ("5e-1", Unstructured(0.5), 0.5, "0.5"),
        ("2:4", NM(2, 4), 0.5, "2of4"),
        ("4:8", NM(4, 8), 0.5, "4of8"),
        ("1:4", NM(1, 4), 0.75, "1of4"),
        ("3:4", NM(3, 4), 0.25, "3of4"),
        ("2:16", NM(2, 16), 0.875, "2of16"),
    ],
)
def test_reads_targets(text: str, target: Target, sparsity: float, slug: str) -> None:
    found = parse_target(text)
    assert found == target
    assert type(found) is type(target)
    assert found.sparsity == sparsity
    assert found.slug == slug


@pytest.mark.parametrize(
    "text", ["", "half", "50%", "2/4", "2:4:8", ":4", "2:", "-0.5", "2.0:4", "nan", "inf", "0.5 0.6", "Dense"]
)
def test_what_is_no_target_is_named_with_the_two_spellings(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(repr(text))) as caught:
        parse_target(text)
    assert "0.5" in str(caught.value)
    assert "2:4" in str(caught.value)


@pytest.mark.parametrize("text", ["1", "1.0", "1.5", "4:4", "5:4", "0:4", "1:1", "0:0", "1e400"])
def test_out_of_range_is_said(text: str) -> None:
    with pytest.raises(RequestError, match="out of range"):
        parse_target(text)


def test_text_gives_the_target_back() -> None:
    """The text stands for the target in run ids and file names, so two shares may never share one."""
    draw = random.Random(0)
    shares = [draw.random() for _ in range(500)] + [draw.random() * 10.0**-k for k in range(1, 12)] + [0.1 + 0.2, 1 / 3]
    targets: list[Target] = [Unstructured(share) for share in shares]
    targets += [NM(keep, of) for of in range(2, 20) for keep in range(1, of)]
    for target in [*targets, Dense()]:
        assert parse_target(str(target)) == target
        assert re.fullmatch(r"[a-z0-9.+-]+", target.slug)
    assert len({target.slug for target in targets}) == len(set(targets))


def test_plain_shares_are_written_short() -> None:
    assert [str(Unstructured(share)) for share in (0.5, 0.25, 0.6, 0.999)] == ["0.5", "0.25", "0.6", "0.999"]


def test_counts_are_the_floor_of_the_binary_product() -> None:
    """As `int(W.shape[1] * sparsity)` in Wanda's code: 100 * 0.29 is just below 29."""
    assert [Unstructured(0.29).removed(size) for size in (100, 50, 1)] == [28, 14, 0]
    assert [Unstructured(0.5).removed(size) for size in (0, 1, 2, 3, 172)] == [0, 0, 1, 1, 86]
    assert Unstructured(0.999).removed(1000) == 999
    assert all(Unstructured(share).removed(size) < size for share in (0.0, 0.5, 0.999999) for size in range(1, 200))


def test_targets_are_values() -> None:
    assert len({NM(2, 4), NM(2, 4), Unstructured(0.5), Unstructured(0.5), Dense(), Dense()}) == 3
    assert NM(2, 4) != Unstructured(0.5)
    with pytest.raises(AttributeError):
        NM(2, 4).keep = 1  # type: ignore[misc]

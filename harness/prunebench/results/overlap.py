"""How much two masks of one model agree: the Jaccard index of what they remove."""

from __future__ import annotations

from prunebench.errors import RequestError
from prunebench.results.mask_files import MaskFile, count_bits


def overlap(first: MaskFile, second: MaskFile) -> dict[str, float]:
    """By matrix, the share of the entries that either removes which both remove: 1 for equal masks, 0 for disjoint ones.

    Two masks that each remove the share s by chance come to about s / (2 - s). A matrix from which neither removes anything
    is left out.

    Raises:
        RequestError: the masks are of different models.
    """
    return {name: both / either for name, (both, either) in _removed(first, second).items() if either}


def overlap_in_total(first: MaskFile, second: MaskFile) -> float:
    """The same over all matrices together; NaN where neither removes anything.

    Raises:
        RequestError: the masks are of different models.
    """
    counts = list(_removed(first, second).values())
    both, either = sum(both for both, _ in counts), sum(either for _, either in counts)
    return both / either if either else float("nan")


def _removed(first: MaskFile, second: MaskFile) -> dict[str, tuple[int, int]]:
    """By matrix, how many entries both remove, and how many at least one of them."""
    weights = [mask.manifest.get("weights") for mask in (first, second)]
    if None not in weights and weights[0] != weights[1]:
        raise RequestError(f"the masks are of different models, with the weights {weights[0]} and {weights[1]}.")
    if dict(first.shapes) != dict(second.shapes):
        differing = sorted(name for name, _ in first.shapes.items() ^ second.shapes.items())
        raise RequestError(f"the masks are of different models: {differing[0]} is not in both, or of another shape.")
    found = {}
    for name, (rows, columns) in first.shapes.items():
        kept_by_both = count_bits(first.packed(name), second.packed(name))
        kept = count_bits(first.packed(name)) + count_bits(second.packed(name))
        size = rows * columns
        found[name] = (size - kept + kept_by_both, size - kept_by_both)
    return found

"""Sparsity targets: what a pruned model must look like.

`0.5` is unstructured (the share of zeros), `2:4` keeps 2 of every 4 consecutive input weights of a row
(survivors : group, the literature's meaning; `methods.md` 1.4 explains that some code counts the zeros instead).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prunebench.errors import RequestError


@dataclass(frozen=True)
class Dense:
    """Nothing is removed."""

    @property
    def sparsity(self) -> float:
        """Share of zeros asked for."""
        return 0.0

    @property
    def slug(self) -> str:
        """The target in a file name."""
        return "dense"

    def __str__(self) -> str:
        return "dense"


@dataclass(frozen=True)
class Unstructured:
    """Remove exactly `int(size * sparsity)` entries of every comparison group."""

    sparsity: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise RequestError(f"the target {self.sparsity} is out of range: a share of zeros is at least 0 and below 1.")

    def removed(self, size: int) -> int:
        """Entries to remove from a comparison group of `size` entries (the floor, as in Wanda's code)."""
        return int(size * self.sparsity)

    @property
    def slug(self) -> str:
        """The target in a file name."""
        return str(self)

    def __str__(self) -> str:
        short = f"{self.sparsity:g}"
        return short if float(short) == self.sparsity else repr(self.sparsity)


@dataclass(frozen=True)
class NM:
    """Keep `keep` of every `of` consecutive input weights of a row, aligned to column 0."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.of:
            raise RequestError(
                f"the target {self.keep}:{self.of} is out of range: N:M keeps N of every M weights, with 1 <= N < M."
            )

    @property
    def sparsity(self) -> float:
        """Share of zeros asked for."""
        return 1.0 - self.keep / self.of

    @property
    def slug(self) -> str:
        """The target in a file name, without the colon that some file systems refuse."""
        return f"{self.keep}of{self.of}"

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


Target = Dense | Unstructured | NM


def parse_target(text: str) -> Target:
    """Read `dense`, `0.5` or `2:4`.

    Raises:
        RequestError: the text is none of these, or out of range.
    """
    text = text.strip()
    if text == "dense":
        return Dense()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if re.fullmatch(r"\d*\.?\d+([eE]-?\d+)?", text):
        return Unstructured(float(text))
    raise RequestError(f"the target {text!r} is not one: write a share of zeros like 0.5, or survivors:group like 2:4.")

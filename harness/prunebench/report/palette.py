"""How a method looks, the same in every figure: its colour tells what chose the mask, its shape what came after.

Colours are Okabe and Ito's, which colour-blind readers tell apart, darkened for white paper and lightened for a dark ground so
that each has a contrast of 3:1 there (WCAG 2.2, 1.4.11); the shapes tell apart what colours alone do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COLOURS = (
    ("#0072b2", "#56b0e8"),  # blue
    ("#c84e00", "#f28f52"),  # vermilion
    ("#008060", "#3dbe98"),  # green
    ("#a8457f", "#e08fbd"),  # purple
    ("#946700", "#e0b040"),  # amber
    ("#2585a3", "#7ccde6"),  # cyan
    ("#5a4fb0", "#a79ff0"),  # indigo
    ("#64731a", "#b4c24e"),  # olive
    ("#7d4e30", "#cfa27f"),  # brown
    ("#6b7280", "#a0a8b4"),  # grey
)
"""On white, and on a dark ground."""

INK = -1
"""The colour of what prunes nothing: the text's own."""

_OWN = {"dense": INK, "wanda": 0, "sparsegpt": 1, "magnitude": 2, "wanda++": 3, "gblm": 4, "ria": 5, "imp": 6, "random": 9}
"""Methods that keep their colour whatever stands beside them."""

_FOR_OTHERS = (7, 8, 5, 6, 4, 3, 2, 1, 0)

PHASES = {
    "calibration": ("#8a93a0", "#79828e"),
    "statistics": ("#2f6fa8", "#5f9fd6"),
    "scoring": ("#d08a1d", "#e0a84a"),
    "update": ("#3b8f7c", "#58b39e"),
    "propagation": ("#a3c4dd", "#a8c8e2"),
    "training": ("#9a5b8f", "#bb82b2"),
    "other": ("#cfd3d8", "#4a525c"),
}
"""Colours of phases, side by side in the order of the work; dark and pale take turns."""

SHAPES = ("circle", "square", "diamond", "triangle", "cross", "star")
"""Nothing after the mask, `perp`, `lora`, `dsnot`, another step, several steps."""

_AFTER = {"perp": "square", "lora": "diamond", "dsnot": "triangle"}


@dataclass(frozen=True)
class Look:
    """A method's mark."""

    colour: int
    """An index of `COLOURS`, or `INK`."""
    shape: str


class Palette:
    """Looks of all methods of a report; strangers' methods share out by name the colours that the built-in ones leave."""

    def __init__(self, methods: Iterable[str]) -> None:
        others = sorted({names_of(method)[0] for method in methods} - _OWN.keys())
        self._colours = _OWN | {name: _FOR_OTHERS[index % len(_FOR_OTHERS)] for index, name in enumerate(others)}

    def look(self, method: str) -> Look:
        """The mark of a method that the palette was made with; of another one as the text."""
        first, *later = names_of(method)
        shape = "circle" if not later else "star" if len(later) > 1 else _AFTER.get(later[0], "cross")
        return Look(self._colours.get(first, INK), shape)


def names_of(method: str) -> list[str]:
    """The pruners of a method, without their options."""
    return [step.partition("[")[0].strip() for step in method.split(" + ")]


def family(method: str) -> str:
    """A method without its options, for where there is little room."""
    return " + ".join(names_of(method))

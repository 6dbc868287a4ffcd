"""Text that a picture can show."""

from __future__ import annotations

import textwrap
from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font

from prunebench.plain import plain

MOST_CHARACTERS = 120
"""Of one label: a stranger's name may have any number."""

MISSING = "\u25a1"
"""Stands for what the font cannot show."""


def shown(text: str, most: int = MOST_CHARACTERS) -> str:
    """One line of what the font has, cut where it is longer than `most` characters."""
    line = " ".join(plain(text).split())
    line = line if len(line) <= most else f"{line[: most - 1]}…"
    return "".join(each if each == " " or _has_glyph(each) else MISSING for each in line)


def wrapped(text: str, width: int, most: int = MOST_CHARACTERS) -> str:
    """The same in lines of at most `width` characters."""
    return "\n".join(textwrap.wrap(shown(text, most), width)) or " "


@cache
def _has_glyph(character: str) -> bool:
    return bool(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_char_index(ord(character)))

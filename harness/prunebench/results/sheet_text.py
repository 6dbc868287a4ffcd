"""Texts in spreadsheets: what strangers wrote is never computed."""

from __future__ import annotations

from prunebench.plain import plain

_ACTIVE = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "'", "\t", "\r", "\n", " ")
"""How a text begins that a spreadsheet may take for a formula, some in full width too, and our mark of one that does."""


def defused(text: str) -> str:
    """A cell's text on one line that no spreadsheet takes for a formula."""
    return f"'{plain(text)}" if text.startswith(_ACTIVE) else plain(text)

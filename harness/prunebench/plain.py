"""What is shown: amounts in the unit that suits, and text of strangers made safe: names, reasons and notes out of records,
suites, plugins and model folders.

Whatever comes from outside goes through one of three on its way out, whole: `escape` to a rich console, `markdown` to a page,
`plain` to anything else that shows text as it is.
"""

from __future__ import annotations

import re

MOST_CHARACTERS = 2_000
"""Of a text on a page; the record has all of it."""

_ENTITIES = {"&": "&amp;", "<": "&lt;", "@": "&#64;", "://": "&#58;//", "www.": "www&#46;"}

_MARKS = re.compile(
    r"""
      [<|]                                             # tags, cells
    | & (?= [#A-Za-z])                                 # entities
    | \\ (?= [!-/:-@\[-`{-~])                          # escapes of their own
    | \] (?= [(\[:])                                   # links, pictures, and definitions of links
    | \* (?= \S) | (?<! \w) _ (?= \S) | ~ (?= ~)       # emphasis: what begins it, which is enough
    | :// | (?i: www\.) | @ (?= \w)                    # addresses and people, which some renderers link
    | \A (?: > | (?= ``` ) | (?= (?: [-+=] | \#+ ) \s))  # quotes, fences, lists and headings, which begin a line
    """,
    re.VERBOSE,
)


def plain(text: str) -> str:
    """One line of what can be seen.

    Line ends and tabs become spaces; what steers a terminal, is invisible or turns the direction of writing is spelt out, as
    `\\x1b` or `\\u202e`.
    """
    line = re.sub(r"\s", " ", text)
    return line if line.isprintable() else "".join(each if each.isprintable() else _spelt(each) for each in line)


def escape(text: str) -> str:
    """For rich's markup, whatever stands before or behind it: no bracket of it begins a tag, nor ends one begun elsewhere."""
    return re.sub(r"(\\*)(\[|\Z)", lambda found: found[1] * 2 + ("\\[" if found[2] else ""), plain(text))


def markdown(text: str) -> str:
    """For a line, a heading or a cell of a Markdown page: no tag, link, picture, emphasis or cell of its own."""
    line = " ".join(plain(text).split())
    if len(line) > MOST_CHARACTERS:
        line = f"{line[:MOST_CHARACTERS]}…"
    return _MARKS.sub(lambda found: _ENTITIES.get(found[0].lower(), f"\\{found[0]}"), line)


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def duration_text(seconds: float) -> str:
    """Seconds, minutes, hours or days, to two figures or so."""
    for size, below, unit, smaller in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if seconds >= size:
            whole, rest = divmod(round(seconds / below), size // below)
            return f"{whole} {unit} {rest} {smaller}" if rest and whole < 10 else f"{whole} {unit}"
    return f"{seconds:.0f} s"


def size_text(count: int) -> str:
    """Bytes in the unit that suits."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}" if count < 1000 << power else f"{count / (1 << power):.0f} {unit}"
    return f"{count} bytes"

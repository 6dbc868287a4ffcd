"""Text of strangers, made safe to show: names, reasons and notes out of records, suites, plugins and model folders.

Whatever comes from outside goes through one of these on its way out, whole: `escape` to a rich console, `markdown` to a page,
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

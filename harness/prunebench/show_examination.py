"""What `submit` and `verify` print: what is in a bundle; a line for each check, then each finding in a sentence."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from prunebench.plain import escape, size_text
from prunebench.results.bundle import Contents
from prunebench.results.inspection import ABOUT, Examination

MOST_SENTENCES = 100
"""Findings that are printed; `--json` has all."""

MOST_CHARACTERS = 400

MOST_MISSING = 8
"""Sentences of one kind that say what a bundle lacks."""


def print_contents(contents: Contents, out: str, console: Console) -> None:
    """What was packed, and what was not."""
    console.print(
        f"{escape(out)}: {_several(len(contents.records), 'record')}, {_several(contents.answers, 'file')} of raw answers, "
        f"{_several(contents.masks, 'file')} of masks, {size_text(contents.bytes)} unpacked."
    )
    for sentences, title in ((contents.missing, "missing"), (contents.left_out, "left out")):
        for sentence in sentences[:MOST_MISSING]:
            console.print(f"{title}: {escape(sentence)}", style="yellow", soft_wrap=True)
        if len(sentences) > MOST_MISSING:
            console.print(f"{title}: and {len(sentences) - MOST_MISSING} more like these.", style="yellow")


def print_examination(found: Examination, console: Console) -> None:
    """The checks with their counts, the findings, and the grades."""
    errors, warnings = (Counter(f.check for f in found.findings if f.level == level) for level in ("error", "warning"))
    grid = Table(box=None, pad_edge=False)
    for name, justify in (("check", "left"), ("looked at", "right"), ("wrong", "right"), ("odd", "right"), ("what", "left")):
        grid.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name, about in ABOUT.items():
        if found.looked[name] or errors[name] or warnings[name]:
            style = "red" if errors[name] else "yellow" if warnings[name] else ""
            grid.add_row(
                name,
                str(found.looked[name]),
                str(errors[name] or ""),
                str(warnings[name] or ""),
                f"[dim]{about}[/]",
                style=style,
            )
    console.print(grid)
    for finding in sorted(found.findings, key=lambda finding: finding.level)[:MOST_SENTENCES]:
        console.print(
            f"{'wrong' if finding.level == 'error' else 'odd'}: {escape(shorten(finding.sentence()))}", soft_wrap=True
        )
    if len(found.findings) > MOST_SENTENCES:
        console.print(f"and {len(found.findings) - MOST_SENTENCES} more; --json has all of them.")
    if found.alone:
        console.print(escape(found.alone), style="yellow", soft_wrap=True)
    reasons = Counter(sentence for sentences in found.unseen.values() for sentence in sentences)
    for sentence, count in reasons.most_common(MOST_MISSING):
        console.print(f"not looked at in {_several(count, 'record')}: {escape(sentence)}", style="dim", soft_wrap=True)
    grades = Counter(found.grade(entry) for entry in found.entries)
    console.print("; ".join(f"{_several(count, 'record')} {grade}" for grade, count in sorted(grades.items())) or "no record")


def examination_json(found: Examination, seed: int | None) -> dict[str, Any]:
    """The same as data."""
    return {
        "passed": not found.failed,
        "seed": seed,
        "alone": found.alone,
        "checks": {name: found.looked[name] for name in ABOUT if found.looked[name]},
        "findings": [vars(finding) for finding in found.findings],
        "records": [
            {
                "path": entry.path,
                "id": entry.record.id,
                "grade": found.grade(entry),
                "replayed": found.replayed.get(entry.path),
                "not_looked_at": found.unseen.get(entry.path, []),
            }
            for entry in found.entries
        ],
    }


def shorten(sentence: str) -> str:
    """As much of a sentence as somebody reads: a stranger's record may have any names."""
    return sentence if len(sentence) <= MOST_CHARACTERS else f"{sentence[:MOST_CHARACTERS]}…"


def _several(count: int, name: str) -> str:
    return f"{count:,} {name}" if count == 1 else f"{count:,} {name}s"

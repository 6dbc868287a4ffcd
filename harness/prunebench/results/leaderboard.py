"""From boards to text: the page `leaderboard.md`, and the cells that the terminal shows too. Equal records, equal bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from prunebench.plain import markdown
from prunebench.results import costs_text
from prunebench.results.beside import HEADINGS, Beside, counts, matched
from prunebench.results.board import Board, Section, Table
from prunebench.results.content import fingerprint
from prunebench.results.page_text import INTRODUCTION, PUBLISHED, READING
from prunebench.results.planning import Asked
from prunebench.results.records import RunRecord
from prunebench.results.rows import DENSE, Row, target_title
from prunebench.results.statistics import Difference

NO_KERNEL = "no kernel"
"""Stands in place of a value whose reason begins so; below the table is the whole reason."""

_GUESS, _BELOW = " ≈", " ↓"
"""Stand behind an accuracy whose interval covers guessing, and one whose interval lies below it."""


def to_markdown(board: Board, published: Sequence[Beside] = ()) -> str:
    """The page, as `leaderboard.md`, with published numbers beside ours where both are of the same thing."""
    parts = [INTRODUCTION]
    if not board.titles:
        parts.append("There are no results yet: `make leaderboard` runs the quickstart.")
    anchors = _anchors(board.sections)
    if len(board.sections) > 1:
        parts.append(_contents(board, anchors, bool(published)))
    parts.append(READING)
    for section, anchor in zip(board.sections, anchors, strict=True):
        parts.append(f'<a id="{anchor}"></a>\n\n{_section_markdown(section)}')
    if board.costs:
        parts.append(costs_text.to_markdown(board.costs))
    if published:
        parts.append(_published_markdown(published))
    for title, records in (("Refused", board.refused), ("Failed", board.failed), ("Outdated", board.outdated)):
        if records:
            lines = [f"* {markdown(f'{describe(record)}: {reason(record)}')}" for record in records]
            parts.append(f"## {title} runs\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def columns(section: Section, table: Table) -> list[str]:
    """The headings of a table."""
    return [
        "rank",
        "method",
        f"{section.unit} %" if section.is_share else section.unit,
        f"vs dense{' %' if section.is_ratio else ' points' if section.is_share else ''} [95%]",
        *([f"vs control{' points' if section.is_share else ''}", "extra"] if table.training else []),
        *(["flips %"] if section.asks_questions else []),
        *section.parts,
        "seeds",
        *(["prune s", "peak MiB", "sparsity %", "of all %", "coverage %"] if section.shows_costs else []),
        *(["trust"] if section.shows_trust else []),
    ]


def cells(section: Section, table: Table, row: Row) -> list[str]:
    """A row's texts, one a heading."""
    mark = "*" if row.shared_machine else ""
    method = row.method.replace(",", ", ")  # so that a narrow column can break it; steps are read with the spaces too
    flips = "" if row.flipped is None else f"{row.flipped[0]:.1%} / {row.flipped[1]:.1%}".replace("%", "")
    costs = [
        f"{row.prune_seconds:.2f}{mark}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}{mark}",
        f"{row.sparsity_prunable:.2%}".removesuffix("%"),
        f"{row.sparsity_total:.2%}".removesuffix("%"),
        f"{row.coverage:.2%}".removesuffix("%"),
    ]
    return [
        "" if row.rank is None else str(row.rank),
        f"{method} (tuned)" if row.tuned else method,
        _value(section, row),
        versus_text(section, row),
        *(
            [_against(section, row, row.control), f"{row.extra_parameters:,}" if row.extra_parameters else ""]
            if table.training
            else []
        ),
        *([flips] if section.asks_questions else []),
        *(_part(section, row, part) for part in section.parts),
        row.seeds_shown,
        *(costs if section.shows_costs else []),
        *([row.grade] if section.shows_trust else []),
    ]


def _value(section: Section, row: Row) -> str:
    if row.reason and math.isnan(row.mean):
        return NO_KERNEL if row.reason.startswith(NO_KERNEL) else "none"
    spread = ""
    if row.spread is not None and not math.isnan(row.spread):
        spread = f" ± {value_text(row.spread, True) if section.is_share else number(row.spread, like=row.mean)}"
    return f"{value_text(row.mean, section.is_share)}{spread}{_chance(row, '')}"


def _part(section: Section, row: Row, part: str) -> str:
    if part not in row.parts:
        return ""
    return f"{value_text(row.parts[part], section.is_share)}{_chance(row, part)}"


def _chance(row: Row, task: str) -> str:
    """The mark of an accuracy that is no better than guessing."""
    return _GUESS if task in row.guesses else _BELOW if task in row.below_chance else ""


def versus_text(section: Section, row: Row) -> str:
    """The difference from dense with its interval: of perplexities relative, of shares in points."""
    if row.versus is None:
        return _against(section, row, row.dense)
    return difference_text(row.versus, section.is_ratio, section.is_share)


def difference_text(found: Difference, exponential: bool, share: bool) -> str:
    """A difference with its interval: of logarithms in per cent of their exponentials, of shares in points."""
    values = [found.estimate, found.low, found.high]
    if exponential:
        values = [100 * math.expm1(min(value, 700.0)) for value in values]
    elif share:
        values = [100 * value for value in values]
    middle, low, high = (f"{value:+,.{1 if exponential or share else 4}f}" for value in values)
    return f"{middle} [{low}, {high}]" if found.is_known else middle


def difference_size(size: float, exponential: bool, share: bool) -> str:
    """The size of a difference, in the same units."""
    if exponential:
        return f"{math.expm1(min(size, 700.0)):.1%}"
    return f"{100 * size:.1f} points" if share else f"{size:.4f}"


def value_text(value: float | None, share: bool) -> str:
    """A value; shares in per cent with two decimals."""
    return f"{value:.2%}".removesuffix("%") if share and value is not None and not math.isnan(value) else number(value)


def _against(section: Section, row: Row, other: float | None) -> str:
    """A row's mean against another, without an interval: of shares in points, else relative in per cent."""
    if not other or math.isnan(row.mean):
        return ""
    return f"{100 * (row.mean - other):+.1f}" if section.is_share else f"{row.mean / other - 1:+.1%}"


def _published_markdown(published: Sequence[Beside]) -> str:
    parts = ["## Published numbers", PUBLISHED, f"{counts(published)[:1].upper()}{counts(published)[1:]}."]
    rows = [[markdown(cell) for cell in one.cells()] for one in matched(published)]
    if rows:
        parts.append(pd.DataFrame(rows, columns=list(HEADINGS)).to_markdown(index=False, disable_numparse=True))
    return "\n\n".join(parts)


def section_notes(section: Section) -> list[str]:
    """What the tables of a section stand for: conditions, recipe, machine, command."""
    conditions = section.conditions
    told = [what_was_asked(conditions), str(conditions.get("dtype")), f"{conditions.get('attention')} attention"]
    notes = [f"Evaluation: {', '.join(filter(None, told))} (conditions `{fingerprint(dict(conditions))}`)."]
    if conditions.get("missing"):
        missing = ", ".join(conditions["missing"])
        notes.append(f"No mean and no ranks: the data of {missing} were not there, so the set is not whole.")
    notes += [f"Without intervals and ranks: {unread}" for unread in section.unread]
    guessed = sorted(
        {name for table in section.tables for row in table.rows if row.method == DENSE for name in row.guesses if name}
    )
    if guessed:
        notes.append(f"The dense model's interval covers guessing (marked {_GUESS.strip()}) in: {', '.join(guessed)}.")
    if section.recipe is not None and section.recipe.calibration is not None:
        recipe = section.recipe
        assert recipe.calibration is not None
        notes.append(
            f"Calibration: {recipe.samples} x {recipe.length} tokens of {recipe.calibration.label()} "
            f"(recipe `{fingerprint(recipe)}`)."
        )
    if section.strangers:
        notes.append(f"Of other packages: {', '.join(section.strangers)}.")
    if section.is_tuning:
        notes.append("A means, and no result: by these rows on validation text the options of other suites were chosen.")
    notes.append(f"Machine: {section.machine}.")
    if section.commands:
        notes.append("Reproduce: " + ", ".join(f"`{command}`" for command in section.commands) + ".")
    return notes


def what_was_asked(conditions: Mapping[str, Any]) -> str:
    """What was asked, in a few words; nothing where an evaluation does not say it as the built-in ones do."""
    reads = Asked.by(conditions)
    if reads.windows:
        return f"{reads.windows} windows of {reads.window or '?'} tokens"
    questions = sum(count for _, count in reads.questions)
    asked = [f"{questions:,} questions"] if questions else []
    if conditions.get("limit"):
        asked.append(f"the first {conditions['limit']} of each task")
    if "lm_eval" in conditions:
        asked.append(f"{conditions.get('metric')}, {conditions.get('shots')} shots, lm-eval {conditions['lm_eval']}")
    return ", ".join(asked)


def describe(record: RunRecord) -> str:
    """A run in a few words."""
    seed = "" if record.spec.seed is None else f", seed {record.spec.seed}"
    return f"{record.spec.model.name}, {record.spec.method} at {record.spec.target}{seed}, on {record.machine} (`{record.id}`)"


def number(value: float | None, like: float | None = None) -> str:
    """Two decimals, four where the value (or what it is printed beside) is small, none where it is large, thousands marked."""
    if value is None or math.isnan(value):
        return "–"
    size = abs(value if like is None else like)
    if size < 1:
        return f"{value:.4f}"
    return f"{value:,.0f}" if size >= 10_000 else f"{value:.2f}"


def _anchors(sections: Sequence[Section]) -> list[str]:
    """A name for links to each section: its conditions and recipe, so that it stays when others come."""
    names: list[str] = []
    for section in sections:
        recipe = fingerprint(section.recipe) if section.recipe is not None else "any"
        name = f"{fingerprint(dict(section.conditions))}-{recipe}"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _contents(board: Board, anchors: Sequence[str], published: bool) -> str:
    """Links to all sections; those of one title beneath it, by what tells them apart."""
    parts = ["## Contents"]
    linked = list(zip(board.sections, anchors, strict=True))
    for group, members in groupby(linked, key=lambda one: (one[0].model, one[0].machine, one[0].is_tuning)):
        parts.append(markdown(f"{group[0]} on {group[1]}{', to choose options' if group[2] else ''}:"))
        lines = []
        for title, some in groupby(members, key=lambda one: one[0].title):
            alike, name = list(some), markdown(title.removeprefix(f"{group[0]}: "))
            if len(alike) == 1:
                lines.append(f"- [{name}](#{alike[0][1]}): {_targets(alike[0][0])}")
            else:
                names = _apart([section for section, _ in alike])
                lines.append(f"- {name}")
                for (section, anchor), told in zip(alike, names, strict=True):
                    lines.append(f"  - [{markdown(told)}](#{anchor}): {_targets(section)}")
        parts.append("\n".join(lines))
    runs = [("Refused runs", board.refused), ("Failed runs", board.failed), ("Outdated runs", board.outdated)]
    rest = [(costs_text.TITLE, board.costs), ("Published numbers", published), *runs]
    links = [f"[{title}](#{title.lower().replace(' ', '-')})" for title, there in rest if there]
    return "\n\n".join([*parts, *([f"Then: {', '.join(links)}."] if links else [])])


def _apart(sections: Sequence[Section]) -> list[str]:
    """What tells sections of one title apart, in a few words each."""
    facts = []
    for section in sections:
        recipe = section.recipe
        text = recipe.calibration.name if recipe is not None and recipe.calibration is not None else "nothing"
        size = f", {recipe.samples} x {recipe.length} tokens" if recipe is not None else ""
        conditions = f"conditions `{fingerprint(dict(section.conditions))}`"
        dtype = str(section.conditions.get("dtype"))
        facts.append((what_was_asked(section.conditions), dtype, f"calibrated on {text}{size}", conditions))
    several = [len(set(column)) > 1 for column in zip(*facts, strict=True)]
    several[-1] = several[-1] and not any(several[:2])  # the last resort
    return [", ".join(fact for fact, differs in zip(own, several, strict=True) if differs) or "the same" for own in facts]


def _targets(section: Section) -> str:
    if section.silence:
        return "no tables"
    titles = [target_title(table.target).removesuffix(" unstructured") for table in section.tables]
    names = [f"{title} retrained" if table.training else title for title, table in zip(titles, section.tables, strict=True)]
    return markdown(", ".join(dict.fromkeys(names)))


def _section_markdown(section: Section) -> str:
    notes = "\n".join(f"* {markdown(note)}" for note in section_notes(section))
    parts = [f"## {markdown(section.title)}", notes]
    if section.silence:
        return "\n\n".join([*parts, section.silence])
    for table in section.tables:
        rows = [[markdown(cell) for cell in cells(section, table, row)] for row in table.rows]
        for row, texts in zip(table.rows, rows, strict=True):
            if row.rank is not None and row.rank.best:
                texts[1] = f"**{texts[1]}**"
        frame = pd.DataFrame(rows, columns=[markdown(heading) for heading in columns(section, table)])
        align = ["center", "left"] + ["right"] * (len(frame.columns) - 2)
        text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        parts.append(f"### {markdown(table_title(table))}\n\n{text}")
        limits = table_limits(section, table)
        if limits:
            parts.append(markdown(limits))
    return "\n\n".join(parts)


def table_limits(section: Section, table: Table) -> str | None:
    """What a table can and cannot show, and why a row has no value."""
    missing = [
        f"No value of {row.method}: {row.reason.rstrip('.')}." for row in table.rows if row.reason and math.isnan(row.mean)
    ]
    return " ".join(filter(None, [_power(section, table), *missing])) or None


def _power(section: Section, table: Table) -> str | None:
    if table.detectable is None:
        unranked = sum(not math.isnan(row.mean) for row in table.rows if not row.unpruned)
        return "No ranks: the rows' answers cannot be compared one by one." if unranked > 1 else None
    if math.isinf(table.detectable):
        return "So few items tell no two rows apart."
    least = difference_size(table.detectable, section.is_ratio, section.is_share)
    return f"A true difference of two rows below about {least} had less than an 80% chance to show."


def table_title(table: Table) -> str:
    """A table's target, and what its rows were trained on."""
    title = target_title(table.target)
    if table.training is None or table.training.training is None:
        return title
    return f"{title}, retrained on text of {table.training.training.label()}, {table.training.training_tokens:,} tokens"


def reason(record: RunRecord) -> str:
    """Why a run is in no table."""
    if record.failure is not None:
        return f"{record.failure.kind}: {record.failure.message}"
    return record.reason or "measured with another revision of the method or an evaluation; run the suite again"

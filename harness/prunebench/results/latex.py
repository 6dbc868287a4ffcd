"""The board as LaTeX tables for papers. They need `\\usepackage{booktabs}` and nothing else. Equal records give equal bytes.

A section's targets stand side by side, methods below each other, dense on top; where there is one target there is room for the
difference from dense with its interval, the rank and costs, or for each task. Options are in notes below, by letters.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from prunebench.plain import plain
from prunebench.results.board import Board, Section, Table
from prunebench.results.content import fingerprint
from prunebench.results.leaderboard import number, table_limits, value_text, versus_text, what_was_asked
from prunebench.results.rows import Row, target_title

MOST_TARGETS = 6
"""That stand side by side; more are another table."""

MOST_PARTS = 8
"""Tasks that have columns; more would fit no page."""

_DAGGER = r"\rlap{$^{\dagger}$}"

_CHARACTERS = {
    **{each: f"\\{each}" for each in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\`{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "≈": r"$\approx$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "µ": r"$\mu$",
}
_ACCENTS = {"̀": "`", "́": "'", "̂": "^", "̃": "~", "̈": '"', "̊": "r", "̧": "c", "̌": "v"}


def to_latex(board: Board) -> str:
    """Every section's tables, to be included where a paper wants them."""
    parts = [r"% Made by `prunebench report --latex`. In the preamble: \usepackage{booktabs}"]
    labels: Counter[str] = Counter()
    for section in board.sections:
        parts.append(_comment(section.title))
        if section.silence:
            parts.append(_comment(f"No tables: {section.silence}"))
            continue
        for _, tables in groupby(section.tables, key=lambda table: table.training):
            listed = list(tables)
            for start in range(0, len(listed), MOST_TARGETS):
                some = listed[start : start + MOST_TARGETS]
                label = _label(section, some)
                labels[label] += 1
                parts.append(_float(section, some, label if labels[label] == 1 else f"{label}-{labels[label]}"))
    return "\n\n".join(parts) + "\n"


def latex(text: str) -> str:
    """A text of anybody's on one line in plain ASCII, with nothing in it that TeX would act upon."""
    escaped = "".join(map(_character, " ".join(plain(text).split())))
    return re.sub(r"([-,!?'])(?=[-,'`])", r"\1{}", escaped).replace("!\\text", "!{}\\text").replace("?\\text", "?{}\\text")


def _comment(text: str) -> str:
    return f"% {plain(text)}".encode("ascii", "backslashreplace").decode("ascii")


def _character(character: str) -> str:
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if character.isascii():
        return character
    letter, *accents = list(unicodedata.normalize("NFD", character))
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in _ACCENTS:
        return f"\\{_ACCENTS[accents[0]]}{{{letter}}}"
    return f"(U+{ord(character):04X})"


def signed(text: str) -> str:
    """A number of ours with the signs of mathematics."""
    return re.sub(r"[-+](?=[\d.])", lambda found: f"${found[0]}$", text).replace("–", "--").replace("%", r"\%")


@dataclass(frozen=True)
class _Column:
    """A column, or two that stand as one: a number and what hangs behind it."""

    heading: str
    rows: Mapping[str, Row]
    """By method."""
    cell: Callable[[Row], str]
    spec: str = "r"

    @property
    def width(self) -> int:
        """In columns of LaTeX's."""
        return len(re.sub(r"@\{.*?\}", "", self.spec))

    def text(self, method: str) -> str:
        """A row's cell."""
        found = self.cell(self.rows[method]) if method in self.rows else ""
        return found or f"\\multicolumn{{{self.width}}}{{c}}{{{'' if method in self.rows else '--'}}}"

    @property
    def title(self) -> str:
        """The cell in the line of headings."""
        return f"\\multicolumn{{{self.width}}}{{c}}{{{self.heading}}}"


class _Notes:
    """Methods by their short names, and their options as notes below the table."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    @property
    def lines(self) -> list[str]:
        """The notes, in the order in which their letters first stand in the table."""
        return [f"{letter}\\,{note}." for note, letter in self._letters.items()]

    def name(self, row: Row) -> str:
        """Steps without options, and the letter of a note that has them."""
        steps = row.method.split(" + ")
        told = [step.replace(",", ", ") for step in steps if "[" in step]
        if row.tuned:
            told.append("chosen on validation text")
        short = latex(" + ".join(step.partition("[")[0] for step in steps))
        if short.startswith(("[", "*")):  # which the end of the line before would take for its own
            short = f"{{}}{short}"
        if not told:
            return short
        letter = f"$^{{{_letter(len(self._letters))}}}$"
        return short + self._letters.setdefault(latex("; ".join(told)), letter)


def _letter(index: int) -> str:
    """a, b, …, z, aa, ab, …"""
    return (_letter(index // 26 - 1) if index >= 26 else "") + chr(ord("a") + index % 26)


def _float(section: Section, tables: Sequence[Table], label: str) -> str:
    """One floating table of a section's targets that have one training."""
    columns = _target_columns(section, tables) if len(tables) > 1 else _all_columns(section, tables[0])
    width = sum(column.width for column in columns)
    notes = _Notes()
    top = [row for row in tables[0].rows if row.unpruned]
    several = len(tables) > 1
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\setlength{\belowcaptionskip}{6pt}",
        f"\\caption{{{_caption(section, tables)}}}",
        f"\\label{{{label}}}",
        _size(several, len(columns)),
        f"\\begin{{tabular}}{{@{{}}l{''.join(column.spec for column in columns)}@{{}}}}",
        r"\toprule",
        *(_kinds(tables) if several else []),
        " & ".join(["Method", *(column.title for column in columns)]) + r" \\",
        r"\midrule",
    ]
    for row in top:
        same = f"\\multicolumn{{{width}}}{{c}}{{{_mean(section, row)}{_spread(section, row)}}}"
        cells = [same] if several else [column.text(row.method) for column in columns]
        lines.append(" & ".join([notes.name(row), *cells]) + r" \\")
    pruned = _methods(tables)
    lines += [r"\midrule"] if top and pruned else []
    for method, row in pruned.items():
        lines.append(" & ".join([notes.name(row), *(column.text(method) for column in columns)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if notes.lines:
        lines += [r"\par\smallskip", r"\begin{minipage}{0.95\linewidth}", r"\footnotesize\raggedright"]
        lines += [*notes.lines, r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"])


def _size(several: bool, columns: int) -> str:
    """Type by which a table fits LaTeX's narrow pages, 345 points wide."""
    if several:
        return (r"\small" if columns < 5 else r"\footnotesize") + r"\setlength{\tabcolsep}{4pt}"
    return r"\footnotesize\setlength{\tabcolsep}{3pt}" if columns < 7 else r"\scriptsize\setlength{\tabcolsep}{2pt}"


def _methods(tables: Sequence[Table]) -> dict[str, Row]:
    """The pruned rows by method, in the order of their mean place over the targets that they have."""
    places: dict[str, list[int]] = {}
    rows: dict[str, Row] = {}
    for table in tables:
        for place, row in enumerate(row for row in table.rows if not row.unpruned):
            places.setdefault(row.method, []).append(place)
            rows.setdefault(row.method, row)
    return {name: rows[name] for name in sorted(places, key=lambda name: (sum(places[name]) / len(places[name]), name))}


def _kinds(tables: Sequence[Table]) -> Iterator[str]:
    """The line above the targets: unstructured or N:M, with rules under it. Each target has two columns."""
    cells, rules, at = [""], [], 2
    for is_pattern, some in groupby(tables, key=lambda table: ":" in table.target):
        last = at + 2 * len(list(some)) - 1
        cells.append(f"\\multicolumn{{{last - at + 1}}}{{c}}{{{'$N{:}M$' if is_pattern else 'unstructured'}}}")
        rules.append(f"\\cmidrule(lr){{{at}-{last}}}")
        at = last + 1
    yield " & ".join(cells) + r" \\"
    yield " ".join(rules)


def _target_columns(section: Section, tables: Sequence[Table]) -> list[_Column]:
    """A column a target: mean, standard deviation, and the mark of rows that cannot be told from the best."""
    return [_value_column(section, table, latex(target_title(table.target).removesuffix(" unstructured"))) for table in tables]


def _value_column(section: Section, table: Table, heading: str) -> _Column:
    lead = next((row.method for row in table.rows if row.rank is not None and row.rank.best), None)

    def cell(row: Row) -> str:
        best = row.rank is not None and row.rank.best
        mean = _mean(section, row)
        mark = _DAGGER if best and row.method != lead else ""
        return (f"\\textbf{{{mean}}}" if best else mean) + f" & {_spread(section, row)}{mark}"

    return _Column(heading, {row.method: row for row in table.rows}, cell, "r@{}l")


def _all_columns(section: Section, table: Table) -> list[_Column]:
    """What there is room for beside one target: each task, or the difference from dense, the rank and costs."""
    rows = {row.method: row for row in table.rows}
    shows_parts = 0 < len(section.parts) <= MOST_PARTS
    percent = r" (\%)" if section.is_share and not shows_parts else ""
    value = _value_column(section, table, f"{latex(section.unit)}{percent}")
    versus = "vs dense" + (r" (\%)" if section.is_ratio else " (points)" if section.is_share else "")
    beside = [_Column(versus, rows, lambda row: _versus(section, row), r"r@{\ }l")]
    if shows_parts:
        parts = [_part_column(section, rows, part) for part in section.parts]
        return [*parts, value, *(beside if len(parts) < 5 else [])]
    beside.append(_Column("rank", rows, lambda row: str(row.rank or "").replace("-", "--"), "c"))
    if section.shows_costs:
        beside.append(_Column("prune s", rows, lambda row: _cost(row, row.prune_seconds, 2)))
        beside.append(_Column("peak MiB", rows, lambda row: _cost(row, row.peak_bytes and row.peak_bytes / 2**20, 0)))
    return [value, *beside]


def _part_column(section: Section, rows: Mapping[str, Row], part: str) -> _Column:
    return _Column(latex(part), rows, lambda row: signed(value_text(row.parts.get(part), section.is_share)))


def _mean(section: Section, row: Row) -> str:
    return signed(value_text(row.mean, section.is_share))


def _spread(section: Section, row: Row) -> str:
    """The standard deviation over seeds, small."""
    if row.spread is None or math.isnan(row.spread):
        return ""
    size = value_text(row.spread, True) if section.is_share else number(row.spread, like=row.mean)
    return f"{{\\scriptsize$\\,\\pm\\,${size}}}"


def _versus(section: Section, row: Row) -> str:
    """The difference and its interval, as two cells."""
    middle, _, interval = versus_text(section, row).removesuffix("%").partition(" ")
    return f"{signed(middle)} & {signed(interval)}" if middle else ""


def _cost(row: Row, amount: float | None, digits: int) -> str:
    """Seconds or MiB, marked where the machine was shared."""
    mark = r"\rlap{$^{*}$}" if row.shared_machine else ""
    return "" if amount is None else f"{amount:,.{digits}f}{mark}"


def _caption(section: Section, tables: Sequence[Table]) -> str:
    """What was measured, how, with how many seeds, and what the marks rest on."""
    rows = [row for table in tables for row in table.rows if not row.unpruned]
    training = tables[0].training
    trained = ""
    if training is not None and training.training is not None:
        trained = f"; retrained on {training.training_tokens:,} tokens of {training.training.label()}"
    target = f", {target_title(tables[0].target)}" if len(tables) == 1 else ""
    better = "higher" if section.higher_is_better else "lower"
    said = [f"{section.title}{target}{trained} ({better} is better)."]
    asked = ", ".join(filter(None, [what_was_asked(section.conditions), str(section.conditions.get("dtype") or "")]))
    said += [f"{asked[:1].upper()}{asked[1:]}."] if asked else []
    recipe = section.recipe
    if recipe is not None and recipe.calibration is not None:
        said.append(f"Calibration: {recipe.samples} × {recipe.length} tokens of {recipe.calibration.label()}.")
    said.append(_seeds(rows))
    if any(row.rank is not None for row in rows):
        items = "questions" if section.asks_questions else "windows"
        said.append(
            f"Bold: no method is significantly better at that target. Ranks rest on paired tests over the same {items}, with "
            "Holm's correction over all pairs of a target (5%)."
        )
    caption = latex(" ".join(filter(None, said)))
    if any(sum(row.rank is not None and row.rank.best for row in table.rows) > 1 for table in tables):
        caption += r" $^{\dagger}$: not the best mean, and the best cannot be told from it."
    limits = table_limits(section, tables[0]) if len(tables) == 1 else None
    caption += f" {latex(limits)}" if limits else ""
    if len(tables) == 1 and section.shows_costs and any(row.shared_machine for row in tables[0].rows):
        caption += r" $^{*}$: others took cores that the run needed."
    prints = f" Conditions \\texttt{{{fingerprint(dict(section.conditions))}}}"
    if recipe is not None:
        prints += f", recipe \\texttt{{{fingerprint(recipe)}}}"
    return f"{caption}{prints}, machine {latex(section.machine)}."


def _seeds(rows: Sequence[Row]) -> str:
    """Over how many seeds means are."""
    counts = sorted({len(row.seeds) for row in rows if row.seeds != (None,)})
    if not counts or counts == [1]:
        return "One seed." if counts else ""
    many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    once = "; deterministic methods ran once" if any(row.seeds == (None,) for row in rows) else ""
    return f"Means over {many} seeds with their standard deviation{once}."


def _label(section: Section, tables: Sequence[Table]) -> str:
    """The same for the same table, whatever else there is."""
    training = tables[0].training
    named = {
        "place": [section.machine, section.model, section.score, *(table.target for table in tables)],
        "conditions": fingerprint(dict(section.conditions)),
        "recipe": section.recipe and fingerprint(section.recipe),
        "training": training and fingerprint(training),
    }
    return f"tab:prunebench-{fingerprint(named)}"

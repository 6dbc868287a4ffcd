"""The board as CSV: a line a row, all sections in one file, for data frames and spreadsheets. Equal records give equal bytes.

A text that begins with `=`, `+`, `-`, `@`, `'` or white space gets an apostrophe in front: a spreadsheet takes it for text and
computes nothing of what strangers wrote. Who reads the file with a program removes one apostrophe from the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from prunebench.results.board import Board
from prunebench.results.content import canonical_json
from prunebench.results.exports import ExportedRow, ExportedSection, ExportedTable, exported
from prunebench.results.sheet_text import defused

COLUMNS: Mapping[str, str] = {
    "machine": "hardware the run was on",
    "model": "what the model is called",
    "evaluation": "its name and data, as the page has it",
    "conditions": "fingerprint: values of other conditions may not be compared",
    "recipe": "fingerprint of the calibration of rows that used data",
    "training": "text that the row was trained on",
    "target": "share of zeros, keep:of, or dense",
    "method": "steps with options that differ from their defaults",
    "pruned": "False for dense rows, which stand on top of every table",
    "tuned": "suite by whose records options were chosen",
    "value": "mean over seeds",
    "unit": "of the value",
    "standard_deviation": "over seeds",
    "seeds": "how many; 0 is deterministic",
    "rank_low": "1 + how many are significantly better",
    "rank_high": "how many rows there are less those significantly worse",
    "best": "nobody is significantly better",
    "difference": "from dense, paired",
    "difference_low": "of its 95% interval",
    "difference_high": "likewise",
    "difference_unit": "share of dense, or the value's unit",
    "control": "value of the dense model after the same training",
    "right_to_wrong": "share of questions, against dense",
    "wrong_to_right": "likewise",
    "parts": "further numbers as a JSON object",
    "prune_seconds": "the whole pruning, mean over seeds",
    "peak_bytes": "highest memory while pruning",
    "costs_ranked": "False where others took cores that the run needed",
    "sparsity_prunable": "share of zeros in prunable weights",
    "sparsity_total": "the same zeros over all parameters",
    "coverage": "share of the blocks' parameters in pruned matrices",
    "extra_parameters": "that the method added",
    "ids": "of the runs, joined by semicolons",
    "trust": "reported, checked or replayed: the lowest of its runs",
}
"""The columns of the CSV file and what they mean; in this order."""


def to_csv(board: Board) -> str:
    """All rows of all tables, one a line."""
    lines = [
        _line(section, table, row) for section in exported(board).sections for table in section.tables for row in table.rows
    ]
    frame = pd.DataFrame(lines, columns=list(COLUMNS), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _line(section: ExportedSection, table: ExportedTable, row: ExportedRow) -> dict[str, Any]:
    found = row.difference
    cells: dict[str, Any] = {
        "machine": section.machine,
        "model": section.model,
        "evaluation": section.title.removeprefix(f"{section.model}: "),
        "conditions": section.conditions_fingerprint,
        "recipe": section.recipe_fingerprint,
        "training": table.training and f"{table.training}, {table.training_tokens} tokens",
        "target": table.target,
        "unit": section.unit,
        "seeds": 0 if row.seeds == [None] else len(row.seeds),
        "difference": found and found.estimate,
        "difference_low": found and found.low,
        "difference_high": found and found.high,
        "difference_unit": found and found.unit,
        "parts": canonical_json(row.parts) if row.parts else None,
        "ids": ";".join(row.ids),
    }
    own = row.model_dump(exclude=set(cells))
    cells |= {name: own[name] for name in COLUMNS if name not in cells}
    return {name: defused(cell) if isinstance(cell, str) else cell for name, cell in cells.items()}

"""Tables of costs as data: for the JSON file of the board, and as a CSV sheet of their own. Equal records give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from prunebench.results.content import canonical_json, fingerprint
from prunebench.results.costs_board import CostRow, CostSection
from prunebench.results.sheet_text import defused


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ExportedCost(_Frozen):
    """What one method cost at one target; means over seeds."""

    target: str = Field(description="share of zeros, or `keep:of`")
    method: str = Field(description="steps, with the options that differ from their defaults")
    prune_seconds: float = Field(description="the whole pruning, without loading")
    floor_seconds: float | None = Field(description="that no implementation avoids, of all phases that have a floor")
    phases: dict[str, float] = Field(description="seconds by phase; `rest` is all that has no column")
    floors: dict[str, float] = Field(description="seconds by phase that no implementation avoids")
    peak_device_bytes: int | None = Field(description="highest memory of the GPU; null without one")
    peak_host_bytes: int | None = Field(description="highest memory of the process")
    costs_ranked: bool = Field(description="false where costs were measured while others took cores that the run needed")
    longer_seconds: float | None = Field(description="of a longer training, extrapolated; null without one")
    longer_steps: int | None = Field(description="how many steps that has")
    longer_measured: int | None = Field(description="by how many steps one was timed")
    published_seconds: float | None = Field(description="what is published of a model of these sizes")
    published_gigabytes: float | None = Field(description="likewise, on the device")
    published_text: str | None = Field(description="likewise, in words")
    published_place: str | None = Field(description="who says it, of what model, on what device; S is a secondary source")
    times_faster: float | None = Field(description="published over ours, or over the longer training's")
    seeds: list[int | None] = Field(description="[null]: neither data nor randomness")
    ids: list[str] = Field(description="of the runs, one a seed")


class ExportedCosts(_Frozen):
    """Costs of one model on one machine."""

    title: str = Field(description="model and calibration in a line")
    machine: str = Field(description="hardware the runs were on")
    device: str = Field(description="what the device is called")
    model: str = Field(description="what the model is called")
    random_weights: bool = Field(description="costs only, no quality")
    dtype: str = Field(description="of the weights")
    recipe: dict[str, JsonValue] | None = Field(description="calibration of the rows that used data")
    recipe_fingerprint: str | None = Field(description="of that")
    commands: list[str] = Field(description="that measure the rows again")
    rows: list[ExportedCost] = Field(description="by target, the cheapest first")


COLUMNS: Mapping[str, str] = {
    "machine": "hardware the run was on",
    "device": "what the device is called",
    "model": "what the model is called",
    "random_weights": "costs only, no quality",
    "dtype": "of the weights",
    "recipe": "fingerprint of the calibration",
    **{name: str(field.description) for name, field in ExportedCost.model_fields.items()},
}
"""The columns of the CSV sheet and what they mean; in this order."""


def exported_costs(sections: Sequence[CostSection]) -> list[ExportedCosts]:
    """The sections as data."""
    return [
        ExportedCosts(
            title=section.title,
            machine=section.machine,
            device=section.device,
            model=section.model,
            random_weights=section.is_shape,
            dtype=section.dtype,
            recipe=None if section.recipe is None else section.recipe.model_dump(mode="json", exclude_none=True),
            recipe_fingerprint=None if section.recipe is None else fingerprint(section.recipe),
            commands=list(section.commands),
            rows=[_row(table.target, row) for table in section.tables for row in table.rows],
        )
        for section in sections
    ]


def costs_to_csv(sections: Sequence[CostSection]) -> str:
    """All rows of all tables, one a line."""
    lines = []
    for section in exported_costs(sections):
        common = {"recipe": section.recipe_fingerprint, **{name: getattr(section, name) for name in list(COLUMNS)[:5]}}
        lines += [{**common, **row.model_dump()} for row in section.rows]
    frame = pd.DataFrame([{name: _cell(line[name]) for name in COLUMNS} for line in lines], columns=list(COLUMNS), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join(map(str, value))
    return canonical_json(value) if isinstance(value, dict) else defused(value) if isinstance(value, str) else value


def _row(target: str, row: CostRow) -> ExportedCost:
    longer, published = row.longer, row.published
    return ExportedCost(
        target=target,
        method=row.method,
        prune_seconds=row.seconds,
        floor_seconds=row.floor,
        phases=dict(row.phases),
        floors=dict(row.floors),
        peak_device_bytes=row.peak_device_bytes,
        peak_host_bytes=row.peak_host_bytes,
        costs_ranked=not row.shared_machine,
        longer_seconds=longer.seconds if longer else None,
        longer_steps=longer.steps if longer else None,
        longer_measured=longer.measured if longer else None,
        published_seconds=published.seconds if published else None,
        published_gigabytes=published.gigabytes if published else None,
        published_text=(published.text or None) if published else None,
        published_place=published.place if published else None,
        times_faster=row.faster,
        seeds=list(row.seeds),
        ids=list(row.ids),
    )

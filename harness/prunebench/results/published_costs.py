"""What prunings cost elsewhere, as data: `results/published/costs/*.toml`, a file a source, a cost a method.

Costs are of another machine and, where weights are random here, of another model of the same sizes: they stand beside ours for
orientation, and nothing is said to be reproduced. What was not read in the paper itself is marked `secondary`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunebench.errors import StoreError
from prunebench.results.files import read_file

COSTS = "costs"
"""The folder of these files in that of published numbers."""

MAX_FILE_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CostSource(_Strict):
    """Where a cost was read."""

    name: str = Field(description="the paper")
    reference: str
    read: Literal["paper", "secondary"] = Field(description="in the paper, or in what others wrote of it")
    note: str = ""


class CostSetting(_Strict):
    """On what it was measured, as far as stated."""

    model: str
    shapes: tuple[str, ...] = Field(description="our shapes of the same sizes")
    device: str
    samples: int | None = Field(default=None, description="calibration sequences")
    length: int | None = Field(default=None, description="tokens of one")


class PublishedCost(_Strict):
    """What one method took, or what is said of it in words."""

    method: str = Field(description="as prunebench spells steps")
    seconds: float | None = Field(default=None, gt=0)
    gigabytes: float | None = Field(default=None, gt=0, description="1e9 bytes, on the device")
    text: str = ""
    source: CostSource
    setting: CostSetting

    @property
    def place(self) -> str:
        """Who says it, of what model, on what device; a secondary source is marked S."""
        mark = ", S" if self.source.read == "secondary" else ""
        return f"{self.source.name}: {self.setting.model} on {self.setting.device}{mark}"


class _Cost(_Strict):
    method: str
    seconds: Annotated[float, Field(gt=0)]
    gigabytes: Annotated[float, Field(gt=0)] | None = None


class _Said(_Strict):
    method: str
    text: str


class _File(_Strict):
    source: CostSource
    setting: CostSetting
    cost: list[_Cost] = []
    said: list[_Said] = []


def load_costs(folder: Path) -> list[PublishedCost]:
    """Every cost of every file, in the order of files; none where there is no folder.

    Args:
        folder: of published numbers.

    Raises:
        StoreError: a file cannot be read, or an entry does not fit: the message names both.
    """
    found = []
    for path in sorted((folder / COSTS).glob("*.toml")):
        file = _read(path)
        for entry in (*file.cost, *file.said):
            found.append(PublishedCost(**entry.model_dump(), source=file.source, setting=file.setting))
    return found


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(read_file(path, path.parent, MAX_FILE_BYTES).decode()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StoreError(f"{path.name}, {place}: {first['msg']}.") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be read: {str(error).rstrip('.')}.") from None

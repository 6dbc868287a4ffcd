"""What a machine can do at best, kept with its records: `<machine>/machine.json`.

Floors are counted by these rates: the seconds of a step that no implementation avoids there. A file that cannot be read, or
of another format, counts as absent: the rates are measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prunebench.errors import WriteError
from prunebench.results.files import is_within, read_file, write_aside

FORMAT = 1
"""Of the file; one of another format is written anew."""

FILE = "machine.json"

MAX_BYTES = 1 << 20

Rate = Annotated[float, Field(gt=0)]
"""What seconds are divided by."""


class MachineRates(BaseModel):
    """The best that was found of one kind of device; a second of it, or on a CPU of one thread's."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    device: str = Field(description="what it is called")
    driver: str | None = Field(description="of the GPU; None on a CPU")
    torch: str = Field(description="version")
    threads: int = Field(ge=0, description="whose rates these are: 1 on a CPU; 0 where threads do not matter")
    products: dict[str, Rate] = Field(
        description="operations a second of a large product by dtype, a multiplication and an addition are two; `tf32`: of "
        "float32 products where lower precision is allowed"
    )
    copied: Rate = Field(description="bytes a second of a large copy on the device, those read and those written")
    uploaded: Rate | None = Field(default=None, description="bytes a second from pinned host memory to the device")
    measured: str = Field(description="UTC, ISO 8601")

    def times(self, threads: int) -> MachineRates:
        """Of so many threads: those of one, so many times. As they are where threads do not matter."""
        if not self.threads:
            return self
        share = threads / self.threads
        products = {name: share * rate for name, rate in self.products.items()}
        return self.model_copy(update={"threads": threads, "products": products, "copied": share * self.copied})

    def made_by(self, device: str, driver: str | None, torch: str) -> bool:
        """Whether they are of this device, driver and version of torch."""
        return (self.device, self.driver, self.torch) == (device, driver, torch)


class MachineFile(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    machine: str = Field(description="its slug")
    rates: dict[str, MachineRates] = Field(description="by kind of device: `cpu`, `cuda`")


def read_machine(folder: Path, machine: str) -> MachineFile:
    """What is known of a machine by the file in its folder; nothing where there is none, or one that cannot be read."""
    try:
        data = json.loads(read_file(folder / FILE, folder, MAX_BYTES))
        found = MachineFile.model_validate(data)
    except (OSError, ValueError, RecursionError, ValidationError):
        return MachineFile(machine=machine, rates={})
    return found if (found.format, found.machine) == (FORMAT, machine) else MachineFile(machine=machine, rates={})


def write_machine(folder: Path, known: MachineFile) -> None:
    """Write a machine's file, in place of an earlier one.

    Args:
        folder: of the machine, inside a results folder.
        known: what the file will say.

    Raises:
        WriteError: it cannot be written.
    """
    if not is_within(folder, folder.parent):
        raise WriteError(f"{FILE} cannot be written: {folder} is a link that leads out of the results folder.")
    try:
        write_aside(folder, known.model_dump_json(indent=1) + "\n").replace(folder / FILE)
    except OSError as error:
        raise WriteError(f"{folder / FILE} cannot be written: {error.strerror}.") from None

"""Suites: what to run, as a TOML file. A suite is data; nothing in it is executed or expanded."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prunebench.errors import RequestError, UnknownNameError
from prunebench.shipped import suites_folder

MAX_SUITE_BYTES = 1 << 20

MOST_DOTS = 200
"""In a line of a suite, as many as there are parts in a dotted key."""

MOST_NAME = 200
"""Characters of a name that a message repeats."""

MAX_SEED = 2**32 - 1
"""What every generator of random numbers takes, also where a method makes several seeds of one."""

Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
Count = Annotated[int, Field(strict=True, ge=1)]
"""A number, not a text that reads as one, nor `true`."""
Positive = Annotated[float, Field(strict=True, gt=0)]
Plain = Annotated[str, Field(pattern=r"^[\w.,:=@/&|*()\[\]+%-]{1,200}$")]
"""One word for a scheduler: no blanks, quotes or line ends, so that it stays the value it is."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SuiteHead(_Section):
    """Name and version: what a board says its rows come from."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")]
    version: Count = 1


class ModelEntry(_Section):
    """A model: a folder relative to the suite, a pinned revision on the Hub, or an architecture with random weights.

    With `reload` a pruned model is written to disk and read back before it is evaluated.
    """

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    shape: str | None = None
    """A name in `toolkit/shapes.py`; such a model has costs only."""
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16|float64)$")] | None = None
    allow: tuple[Annotated[str, Field(pattern="^(pickle|remote-code)$")], ...] = ()
    reload: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> ModelEntry:
        if sum(place is not None for place in (self.path, self.hub, self.shape)) != 1:
            raise ValueError("name the model by path, by hub or by shape, one of them")
        if self.hub is not None and self.revision is None:
            raise ValueError("a hub model needs its revision, a commit")
        if self.shape is not None and (self.revision is not None or self.allow or self.reload):
            raise ValueError("a shape has no files, so revision, allow and reload mean nothing for it")
        return self

    @property
    def name(self) -> str:
        """As written; a shape is `shape:NAME`."""
        return f"shape:{self.shape}" if self.shape is not None else self.path or self.hub or ""


class Calibration(_Section):
    """Calibration text, sampled as `methods.md` 1.2 says."""

    source: str
    samples: Count = 128
    length: Annotated[int, Field(strict=True, ge=0)] = 2048
    """Tokens a sequence; 0 is the model's context, at most 2048."""

    @model_validator(mode="after")
    def _long_enough(self) -> Calibration:
        if self.length == 1:
            raise ValueError("a length is at least 2 tokens (0 is the model's context)")
        return self


class Training(_Section):
    """Training text, for steps that train: packed windows of the calibration length."""

    source: str
    tokens: Count


class Validation(_Section):
    """Validation text, for choosing options. Evaluation text is never used for that."""

    source: str


class SlurmOptions(_Section):
    """What `sbatch` is told beside the amounts. These and no others: a suite is data, and some options name files or programs.

    Everything else has an environment variable that `sbatch` reads, `SBATCH_…`.
    """

    account: Plain | None = None
    constraint: Plain | None = None
    exclude: Plain | None = None
    exclusive: Annotated[bool, Field(strict=True)] | None = None
    gres: Plain | None = None
    licenses: Plain | None = None
    mail_type: Plain | None = None
    mail_user: Plain | None = None
    nodelist: Plain | None = None
    partition: Plain | None = None
    qos: Plain | None = None
    reservation: Plain | None = None


class Resources(_Section):
    """What a run is given by Ray or Slurm. It changes no result, so it is no part of a run's id."""

    gpus: Annotated[int, Field(strict=True, ge=0)] | None = None
    """None is one where the device is CUDA, otherwise none."""
    cpus: Count | None = None
    """Cores. None is as many as the run has threads."""
    memory: Positive | None = None
    """GiB on the host. None is the limit of `--memory`, or what the scheduler gives."""
    minutes: Positive | None = None
    """How long Slurm lets a run work. None is `timeout` and ten minutes for its start and end."""
    slurm: SlurmOptions = SlurmOptions()

    def merged(self, own: Resources) -> Resources:
        """These, with what a method says of its own over them."""
        data, over = self.model_dump(exclude_unset=True), own.model_dump(exclude_unset=True)
        slurm = {**data.get("slurm", {}), **over.get("slurm", {})}
        return Resources.model_validate({**data, **over, "slurm": slurm})


class MethodEntry(_Section):
    """A method: its steps, and its targets, seeds, calibration text and resources where they differ from the suite's."""

    steps: Annotated[tuple[str, ...], Field(min_length=1)]
    targets: tuple[str, ...] | None = None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    calibration: Calibration | None = None
    resources: Resources = Resources()
    tuned: str | None = None
    """The suite by whose records, on validation text, options were chosen."""


class EvalEntry(_Section):
    """An evaluation with its options, and the targets and seeds it is for where it is not for all; the dense model is always
    measured."""

    use: str
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None


class Grid(_Section):
    """What every method is run at."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)


class Limits(_Section):
    """Resources of a run."""

    threads: Count | None = None
    batch_size: Count | None = None
    """Sequences at a time; without it what is free decides, which is 8 where there is room."""
    timeout: Positive | None = None
    device_memory: Positive | None = None
    """GiB that a run may use of a device, if less than is free; where that is not enough blocks rest on the host."""


class Suite(_Section):
    """A suite, and the folder its relative names start in."""

    suite: SuiteHead
    model: Annotated[tuple[ModelEntry, ...], Field(min_length=1)]
    calibration: Calibration | None = None
    training: Training | None = None
    validation: Validation | None = None
    method: Annotated[tuple[MethodEntry, ...], Field(min_length=1)]
    eval: tuple[EvalEntry, ...] = ()
    grid: Grid
    limits: Limits = Limits()
    resources: Resources = Resources()
    folder: Path = Path()


def measures_costs_only(suite: Suite) -> bool:
    """Whether every model is a shape, so that there is no quality to measure."""
    return all(entry.shape is not None for entry in suite.model)


def with_dense(suite: Suite) -> Suite:
    """The suite, with the dense model first where it has no such run: every table of scores needs it."""
    if measures_costs_only(suite) or any(tuple(map(str.strip, entry.steps)) == ("dense",) for entry in suite.method):
        return suite
    return suite.model_copy(update={"method": (MethodEntry(steps=("dense",)), *suite.method)})


def shipped_suites() -> dict[str, Path]:
    """The shipped suites by name."""
    return {path.stem: path for path in sorted(suites_folder().glob("*.toml"))}


def load_suite(name: str) -> Suite:
    """Read a suite by path or shipped name.

    Raises:
        UnknownNameError: no such suite, or a key that suites do not have.
        RequestError: the file cannot be read, or a value does not fit.
    """
    path = Path(name).expanduser()
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        if name not in shipped_suites():
            raise UnknownNameError.among("suite", name[:MOST_NAME], shipped_suites())
        path = shipped_suites()[name]
    try:
        if path.stat().st_size > MAX_SUITE_BYTES:
            raise RequestError(f"the suite {path.name} is larger than {MAX_SUITE_BYTES >> 20} MiB, which no suite is.")
        text = path.read_text(encoding="utf-8")
        if any(line.count(".") > MOST_DOTS for line in text.splitlines()):  # of a dotted key, tomllib takes the square in time
            raise RequestError(f"the suite {path.name} has a line of more than {MOST_DOTS} dots, which no suite has.")
        data = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
        raise RequestError(f"the suite {path.name} cannot be read as TOML: {error}") from None
    if "folder" in data:
        raise UnknownNameError(f"the suite {path.name}: {UnknownNameError.among('key', 'folder', _keys(()))}")
    try:
        suite = Suite.model_validate({**data, "folder": path.resolve().parent})
    except ValidationError as error:
        raise _explain(path.name, error) from None
    check_measured(suite, path.name)
    return suite


def check_measured(suite: Suite, name: str) -> None:
    """Raise a RequestError where a model, which is no shape, would be pruned and then not measured."""
    if not suite.eval and not measures_costs_only(suite):
        raise RequestError(f"the suite {name} lacks [[eval]]: there is nothing to measure.")


def _explain(name: str, error: ValidationError) -> RequestError:
    """The first thing that is wrong with a suite, as a sentence; a misspelt key is also a missing one, so it comes first."""
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    place = [str(part) for part in first["loc"]]
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        near = UnknownNameError.among("key", place[-1], _keys(tuple(p for p in place[:-1] if not p.isdigit())))
        return UnknownNameError(f"the suite {name}, at {where}: {near}")
    if first["type"] == "missing":
        return RequestError(f"the suite {name} lacks {where}.")
    message = first["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}".replace("tuple", "list")
    return RequestError(f"the suite {name}, at {where}: {message}.")


def _keys(place: tuple[str, ...]) -> list[str]:
    """The keys of the innermost section that a place is in."""
    sections: dict[str, type[BaseModel]] = {
        "suite": SuiteHead,
        "model": ModelEntry,
        "calibration": Calibration,
        "training": Training,
        "validation": Validation,
        "method": MethodEntry,
        "eval": EvalEntry,
        "grid": Grid,
        "limits": Limits,
        "resources": Resources,
    }
    known: dict[str, type[BaseModel]] = {**sections, "slurm": SlurmOptions}
    inner = [known[name] for name in place if name in known]
    return list(inner[-1].model_fields) if inner else list(sections)

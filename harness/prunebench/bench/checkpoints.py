"""What a run leaves behind while it is under way, so that the same run goes on there when it was killed.

After every so many blocks of a step whose method claims BLOCKWISE: where its walk is (`toolkit/resuming.py`). After each step:
the model, its masks and adapters, the steps' records. After each evaluation: the scores. A checkpoint counts only for the same
run on the same machine and device, with the same batch size, threads, packages and code, and only whole; any other is thrown
away, and the record says why. Seconds before the kill are added to the record's; saving and loading are in no phase. Nobody
knows what else was at work before the kill, so the costs of a run that went on are marked as of a shared machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from prunebench.bench import machine
from prunebench.bench.checkpoint_files import MANIFEST, CheckpointFolder
from prunebench.bench.checkpoint_origin import origin
from prunebench.bench.measure import Cost, peaks_so_far
from prunebench.bench.plan import RunRequest
from prunebench.handles import WalkState
from prunebench.results.records import RunRecord, ScoreRecord, StepRecord
from prunebench.spec import Changes, Claims, JsonDict, Pruner
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.phases import so_far


@dataclass
class Standing:
    """What has come of the finished steps, as far as later ones have to know."""

    steps: list[StepRecord] = field(default_factory=list)
    group: str = "row"
    """In which the target is exact."""
    explained: bool = False
    """A step noted why there are extra zeros."""
    crowded: bool = False
    """Other processes were at work on the cores that a step needed, or nobody knows."""
    changes: int = 0
    """All that the steps declared to change, as the value of the flag."""

    @property
    def survivors_changed(self) -> bool:
        """A step changed values that it did not remove."""
        return bool(Changes(self.changes) & Changes.KEPT_WEIGHTS)


def clear(request: RunRequest) -> None:
    """Remove a run's checkpoint, once its record is kept; also one of a command that asked for it, where this one does not."""
    if request.checkpoints:
        with suppress(OSError):  # the record is there, and the folder became read-only since
            CheckpointFolder(Path(request.checkpoints)).clear()


def clear_older(request: RunRequest, settled: Iterable[RunRecord]) -> None:
    """Before a run that is settled is done again: remove a checkpoint that was written before it was settled last.

    One written since is of an attempt to do it again, which was killed; it goes on there.
    """
    with suppress(OSError):  # there is none, mostly
        written = (Path(request.checkpoints or "") / MANIFEST).stat().st_mtime
        if any(written <= _ended(record).timestamp() for record in settled):
            clear(request)


def _ended(record: RunRecord) -> datetime:
    """When a run ended, or up to a second later: records round down when it began."""
    made = record.provenance
    return datetime.fromisoformat(made.started) + timedelta(seconds=made.seconds + 1)


class Checkpoints:
    """The checkpoint of one run: takes what is there, and writes what comes."""

    def __init__(self, request: RunRequest, pruners: Sequence[Pruner]) -> None:
        """For a run as it was asked for; nothing is taken or written unless it says after how many blocks."""
        self.request = request
        """With the batch size of what is taken, where the run leaves the choice."""
        self.every = request.checkpoint_every
        self.notes: JsonDict = {}
        """For the next step's record."""
        self.device = torch.device(request.device)
        self.finished = 0
        """Steps."""
        self._count = len(request.spec.steps)
        self._asked = bool(request.checkpoints and request.checkpoint_every)
        """Falls when a file cannot be written: what came later would lean on what is not there."""
        self.folder = CheckpointFolder(Path(request.checkpoints or ""))
        self._began = (datetime.now(UTC), time.perf_counter())
        self._said: JsonDict = {"made": origin(request, pruners)} if self._asked else {}
        """The manifest."""
        self._resumed = False
        self._tied: list[list[str]] = []
        if self._asked:
            self._read()

    def arranged(self, request: RunRequest) -> None:
        """What is written is of this batch size, which the run has now, and has kept if anything was taken."""
        if self._asked:
            self._said["made"] |= {"batch size": request.batch_size}

    def began(self, started: datetime, clock: float) -> tuple[datetime, float]:
        """When the run began, by the calendar and by `time.perf_counter`, as if what was killed had just gone before."""
        if self._resumed:
            started, clock = datetime.fromisoformat(self._said["started"]), clock - self._said["seconds"]
        self._began = (started, clock)
        return self._began

    @property
    def scores(self) -> dict[str, ScoreRecord]:
        """Scores that were found before the kill."""
        return {name: ScoreRecord.model_validate(score) for name, score in self._said.get("scores", {}).items()}

    def restore(self, anatomy: ModelAnatomy) -> Standing:
        """Put the model, as it was loaded, into the state after the finished steps."""
        self._tied = [list(group) for group in anatomy.tied()]
        found = self._said.get("state")
        if found is None:
            return Standing(crowded=self._resumed)
        if found["untied"]:
            untie_head(anatomy.model)
        _fill(anatomy, self.folder.tensors(found["files"]), found["adapters"])
        standing = Standing(**found["standing"] | {"crowded": True})
        standing.steps = [StepRecord.model_validate(step) for step in found["steps"]]
        self.finished = len(standing.steps)
        if "walk" not in self._said:
            self.notes["resumed"] = f"after step {self.finished} of {self._count}"
        return standing

    def of_step(self, pruner: Pruner, notes: JsonDict) -> StepCheckpoint | None:
        """For the step after the finished ones; None where its method does not claim that it can go on in its midst."""
        notes |= self.notes
        self.notes = {}
        outside = pruner.changes() & (Changes.HEAD | Changes.ADAPTER)
        return StepCheckpoint(self, notes) if self._asked and pruner.claims() & Claims.BLOCKWISE and not outside else None

    def step_done(self, standing: Standing, anatomy: ModelAnatomy) -> None:
        """Keep the state after a step, in place of what was kept in its midst."""
        if not self._asked:
            return
        plain = replace(standing, steps=[])
        self.finished = len(standing.steps)

        def write() -> JsonDict:
            files = []
            for part, tensors in enumerate(_parts(anatomy, Changes(standing.changes))):
                files.append(f"state-{self.finished}-{part}.safetensors")
                self.folder.store(files[-1], tensors)
            state = {
                "files": files,
                "steps": [step.model_dump(mode="json") for step in standing.steps],
                "standing": asdict(plain),
                "untied": [list(group) for group in anatomy.tied()] != self._tied,
                "adapters": [[adapter.matrix, adapter.scale, str(adapter.up.device)] for adapter in anatomy.adapters],
            }
            return {"state": state, "walk": None}

        self.write(write, standing.steps[-1].notes)

    def scored(self, scores: Mapping[str, ScoreRecord], steps: Sequence[StepRecord]) -> None:
        """Keep the scores found so far, and what evaluations noted in the steps' records."""

        def write() -> JsonDict:
            return {
                "scores": {name: score.model_dump(mode="json") for name, score in scores.items()},
                "state": self._said["state"] | {"steps": [step.model_dump(mode="json") for step in steps]},
            }

        self.write(write, steps[-1].notes)

    def walked(self) -> JsonDict | None:
        """What was kept in the midst of the step after the finished ones."""
        found: JsonDict | None = self._said.get("walk")
        return found

    def write(self, make: Callable[[], JsonDict], notes: JsonDict) -> None:
        """Write what `make` adds to the manifest, None for what leaves it; what cannot be written is missed, and noted."""
        if not self._asked:
            return
        try:
            said = {name: value for name, value in (self._said | make()).items() if value is not None}
            said |= {"started": self._began[0].isoformat(), "seconds": time.perf_counter() - self._began[1]}
            walk, state = said.get("walk", {}), said.get("state", {})
            self.folder.commit(said, [*state.get("files", []), *walk.get("blocks", []), *walk.get("passing", [])])
            self._said = said
        except OSError as error:
            self._asked = False
            notes["checkpoint not written"] = machine.portable(str(error.strerror or error))

    def _read(self) -> None:
        """Take what was left, if it may be used."""
        try:
            found = self.folder.read()
            if found is None:
                return
            made = found["made"]
            chosen = self.request.batch_size or made.get("batch size")
            for name, value in (self._said["made"] | {"batch size": chosen}).items():
                if made.get(name) != value:
                    raise ValueError(f"it was made with another {name}")
        except ValueError as error:
            self.notes["checkpoint discarded"] = f"{error}."
            self.folder.clear()
        else:
            self._said |= found
            self._resumed, self.request = True, replace(self.request, batch_size=chosen)


class StepCheckpoint:
    """`Job.checkpoint` of one step, for its first walk."""

    def __init__(self, run: Checkpoints, notes: JsonDict) -> None:
        self._run, self._notes = run, notes
        self._walks = 0
        self._files: list[str] = []
        self._started: dict[str, float] = {}
        self._killed = Cost()
        """Of the walk, before the kill."""

    def take(self) -> WalkState | None:
        """What a killed run left of the step's first walk."""
        self._walks += 1
        found = self._run.walked() if self._walks == 1 else None
        self._started = self._started or so_far()
        if found is None:
            return None
        self._files, self._killed = list(found["blocks"]), Cost(found["phases"], *found["peaks"])
        self._notes |= found["notes"] | {"resumed": f"at block {found['done']} of {found['of']}"}
        tensors = self._run.folder.tensors
        return WalkState(found["done"], found["of"], tensors(self._files), tensors(found["passing"]), found["facts"])

    def due(self, done: int) -> bool:
        """After every so many blocks of the first walk."""
        return self._walks == 1 and self._run.every is not None and done % self._run.every == 0

    def keep(self, state: WalkState) -> None:
        """Write a state down."""
        step = self._run.finished

        def write() -> JsonDict:
            blocks, passing = f"blocks-{step}-{state.done}.safetensors", f"passing-{step}-{state.done}.safetensors"
            self._run.folder.store(blocks, state.blocks)
            self._run.folder.store(passing, state.passing)
            cost = Cost(_since(self._started), *peaks_so_far(self._run.device))
            cost.include(self._killed)
            self._files.append(blocks)
            walk = {
                **{"done": state.done, "of": state.of, "facts": state.facts, "notes": dict(self._notes)},
                **{"blocks": list(self._files), "passing": [passing]},
                **{"phases": cost.phases, "peaks": [cost.peak_device_bytes, cost.peak_host_bytes]},
            }
            return {"walk": walk}

        self._run.write(write, self._notes)

    def settle(self, cost: Cost) -> None:
        """Add what the walk had cost before the kill."""
        cost.include(self._killed)


def _since(earlier: dict[str, float]) -> dict[str, float]:
    """Seconds by phase since an earlier reading."""
    return {name: seconds - earlier.get(name, 0.0) for name, seconds in so_far().items()}


def _parts(anatomy: ModelAnatomy, changes: Changes) -> Iterator[dict[str, torch.Tensor]]:
    """All that steps which declare these changes can have changed, block by block, and then what is in none."""
    beyond = bool(changes & (Changes.BIASES | Changes.NORMS | Changes.HEAD))
    names = {id(tensor): name for name, tensor in _named(anatomy).items()}
    left = dict(_named(anatomy))
    for block in anatomy.blocks:
        inside: list[torch.Tensor] = [*block.module.parameters(), *block.module.buffers()]
        wanted = inside if beyond else [matrix.parameter for matrix in block.matrices]
        part = {names[id(tensor)]: tensor for tensor in wanted} if changes else {}
        for tensor in inside:
            left.pop(names[id(tensor)], None)
        part |= anatomy.masks.written(block.matrices)
        if part:
            yield part
    rest = left if beyond else {}
    for number, adapter in enumerate(anatomy.adapters):
        rest |= {_factor(number, "down"): adapter.down, _factor(number, "up"): adapter.up}
    if rest:
        yield rest


def _fill(anatomy: ModelAnatomy, tensors: Mapping[str, torch.Tensor], adapters: Sequence[Sequence[Any]]) -> None:
    """Put everything of `_parts` into a model as it was loaded."""
    named = _named(anatomy)
    with torch.no_grad():
        for name in tensors.keys() & named.keys():
            named[name].copy_(tensors[name])
    anatomy.masks.put_back(anatomy.matrices, tensors)
    matrices = {matrix.name: matrix for matrix in anatomy.matrices}
    for number in range(len(anatomy.adapters), len(adapters)):  # those before came with the model
        name, scale, device = adapters[number]
        down, up = (tensors[_factor(number, half)].to(device) for half in ("down", "up"))
        anatomy.adapters.attach(matrices[name], down, up, scale)


def _named(anatomy: ModelAnatomy) -> dict[str, torch.Tensor]:
    return dict([*anatomy.model.named_parameters(), *anatomy.model.named_buffers()])


def _factor(number: int, half: str) -> str:
    return f"the {half} factor of adapter {number}"

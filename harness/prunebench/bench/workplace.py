"""What all steps of a run work on: the model, where it rests, how many sequences at a time are worked on; each step's job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from prunebench.bench.artefacts import Artefacts
from prunebench.bench.drawn import dense_weights, drawing_place, virtual_footprint
from prunebench.bench.measure import free_bytes, hold_to
from prunebench.bench.plan import RunRequest
from prunebench.errors import Refused
from prunebench.handles import Checkpoint
from prunebench.plain import size_text
from prunebench.results.consistency import VIRTUAL
from prunebench.results.costs_board import LIMITED
from prunebench.spec import Job, JsonDict, Needs, Progress, Pruner
from prunebench.targets import Target
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.arranging import SPARE, Arrangement, arrange, footprint
from prunebench.toolkit.audit import Looks
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.memory import let_go
from prunebench.toolkit.placement import HostActivations, Resident, Streaming, place_model
from prunebench.toolkit.spread import Spread
from prunebench.toolkit.virtual import Drawing, is_virtual

_AT_REST = {
    Resident: None,
    HostActivations: "activations rest on the host",
    Streaming: "blocks and activations rest on the host",
}


@dataclass(frozen=True)
class Workplace:
    """A loaded model, and what every step of the run is given of it."""

    request: RunRequest
    """With the batch size that was chosen."""
    model: PreTrainedModel
    anatomy: ModelAnatomy
    target: Target
    placement: Resident
    dense: DenseWeights

    @property
    def looks(self) -> Looks | None:
        """What was seen of weights that are not there any more; None where all are there."""
        return self.placement if isinstance(self.placement, Drawing) else None

    def job(
        self,
        pruner: Pruner,
        progress: Progress,
        notes: JsonDict,
        artefacts: Artefacts,
        checkpoint: Checkpoint | None,
    ) -> Job:
        """A step's job."""
        needs, spec = pruner.needs(), self.request.spec
        if said := _AT_REST.get(type(self.placement)):
            notes["little memory is free"] = said
        if isinstance(self.placement, Spread):
            notes["blocks on several devices"] = self.placement.counts()
        if self.request.device_memory is not None:
            held = torch.device(self.request.device).type == "cuda"  # elsewhere nothing stops what takes more
            limit = size_text(int(self.request.device_memory))
            notes[LIMITED] = limit if held else f"{limit}, when the batch was chosen"
        if isinstance(self.placement, Drawing):
            notes[VIRTUAL] = "drawn block by block on the device, looked at and dropped, in no phase"
            self.placement.begin()
        tokens = {
            f"{name}_tokens": None if array is None else torch.from_numpy(array) for name, array in self.request.tokens.items()
        }
        job = artefacts.job = Job(
            model=self.model,
            anatomy=self.anatomy,
            target=self.target,
            needs=needs,
            # A method that does not declare to use the seed gets the same one whatever the run's.
            seed=spec.seed or 0 if needs & (Needs.SEED | Needs.TRAINING) else 0,
            placement=self.placement,
            batch_size=self.request.batch_size,
            masks=self.anatomy.masks.copy(),
            dense=self.dense,
            progress=progress,
            note=notes.__setitem__,
            attach=self.anatomy.adapters.attach,
            artefact=artefacts,
            checkpoint=checkpoint,
            **tokens,
        )
        return job


def set_up(
    request: RunRequest, model: PreTrainedModel, anatomy: ModelAnatomy, target: Target, pruners: Sequence[Pruner], free: int
) -> Workplace:
    """Choose where things rest and how many sequences are worked on at a time, and put the model there.

    Args:
        request: its batch size is kept, unless it leaves the choice.
        model: as it was loaded, on the host.
        anatomy: of the model.
        target: of the run.
        pruners: one a step.
        free: bytes on the device before the model was loaded.

    Raises:
        Refused: a step trains the whole model, which is asked for on several devices and does not fit on the first.
    """
    devices = request.devices
    chosen = _arranged(request, model, anatomy, pruners, [free, *map(free_bytes, devices[1:])])
    if is_virtual(model):
        placement: Resident = drawing_place(chosen.resting, request, anatomy)
    elif chosen.homes:
        homes = {block.module: home for block, home in zip(anatomy.blocks, chosen.homes, strict=True)}
        placement = Spread(devices, homes)
        placement.place(model)
    else:
        placement = chosen.resting(request.device)
        place_model(model, [block.module for block in anatomy.blocks], placement)
    if request.device_memory is not None:
        let_go()  # of what drawing the model took
    hold_to(devices, request.device_memory)
    dense = dense_weights(request, anatomy)
    return Workplace(replace(request, batch_size=chosen.batch_size), model, anatomy, target, placement, dense)


def _arranged(
    request: RunRequest, model: PreTrainedModel, anatomy: ModelAnatomy, pruners: Sequence[Pruner], free: Sequence[int]
) -> Arrangement:
    """By what is free on each device, and what the run may use of it."""
    room = [int(min(there, request.device_memory or there)) for there in free]
    tokens = request.tokens.get("calibration")
    samples, length = (0, 0) if tokens is None else tokens.shape
    hidden = int(getattr(model.config.get_text_config(), "hidden_size", 0))
    gradients = any(pruner.needs() & (Needs.GRADIENTS | Needs.TRAINING) for pruner in pruners)
    taken = footprint(model, anatomy.blocks, samples, length, hidden, gradients)
    if is_virtual(model):
        taken = virtual_footprint(taken)
    trains = [pruner.name for pruner in pruners if pruner.needs() & Needs.TRAINING]  # whole models are trained on one device
    if trains and len(room) > 1 and taken.weights > SPARE * room[0]:
        raise Refused(f"{trains[0]} trains the whole model on one device, and the model does not fit on {request.device}.")
    resting: list[type[Resident]] = [Resident]
    may_part = not trains and not is_virtual(model)
    if torch.device(request.device).type != "cpu":
        resting += [Spread] if may_part and len(room) > 1 else []
        resting.append(HostActivations)
        resting += [Streaming] if may_part else []
    return arrange(taken, room, resting, request.batch_size or None)

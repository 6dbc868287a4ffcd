"""Where a shape's weights are drawn for a run: on the device, whole or a block at a time; and what the run is then given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from prunebench.answers import ask
from prunebench.bench.plan import RunRequest
from prunebench.errors import Refused
from prunebench.plain import size_text
from prunebench.spec import Needs, Pruner
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.arranging import SPARE, Footprint
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.loading import DTYPES, empty_model
from prunebench.toolkit.placement import HostActivations, Resident
from prunebench.toolkit.shapes import SHAPE, DrawnDense, RandomWeights, filled
from prunebench.toolkit.virtual import Drawing, DrawingToHost, check_steps, is_large, is_virtual, left_virtual


def drawn_model(request: RunRequest, pruners: Sequence[Pruner], free: int) -> PreTrainedModel:
    """A shape, drawn on the device, and kept on the host where it would not leave room there.

    One that is too large for the host is virtual: only what is in no block is there. A step that trains the whole model has it
    whole on the device.

    Args:
        request: of the run.
        pruners: one a step.
        free: bytes on the device.

    Raises:
        Refused: the shape is too large for what the steps do.
    """
    model, device, dtype = empty_model(request.model), torch.device(request.device), DTYPES[request.spec.model.dtype]
    size = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
    fits = size <= SPARE * free
    if is_large(size):
        if not any(ask(pruner, "needs") & Needs.TRAINING for pruner in pruners):
            check_steps(pruners, [step.text for step in request.spec.steps], f"{SHAPE}{request.model.shape}")
            return left_virtual(model, dtype, device)
        if not fits:
            raise Refused(
                f"to train {SHAPE}{request.model.shape} it must be whole on the device: its weights are {size_text(size)}, and "
                f"{size_text(free)} are free there."
            )
    rest = device if fits else torch.device("cpu")
    return filled(model, dtype, device, lambda _: rest)


def without_checkpoints(request: RunRequest, model: nn.Module) -> RunRequest:
    """The request; of a virtual model nothing is written down, as its blocks are nowhere."""
    return replace(request, checkpoint_every=None) if is_virtual(model) else request


def virtual_footprint(footprint: Footprint) -> Footprint:
    """What a walk takes on the device where only what is in no block is always there."""
    return replace(footprint, weights=footprint.outside)


def drawing_place(resting: type[Resident], request: RunRequest, anatomy: ModelAnatomy) -> Drawing:
    """The placement of a virtual model, its activations where another's would rest."""
    kind = DrawingToHost if resting is HostActivations else Drawing
    return kind(request.device, anatomy, _weights(request, anatomy))


def dense_weights(request: RunRequest, anatomy: ModelAnatomy) -> DenseWeights:
    """The weights before the first step: those of the model's files, or a shape's, drawn again."""
    if request.model.shape is None:
        return DenseWeights(anatomy, request.model.folder)
    return DrawnDense(anatomy, _weights(request, anatomy))


def _weights(request: RunRequest, anatomy: ModelAnatomy) -> RandomWeights:
    return RandomWeights(anatomy.model, DTYPES[request.spec.model.dtype], request.device)

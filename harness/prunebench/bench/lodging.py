"""Where models are while they are evaluated: on the device as a whole, or their blocks at rest and brought one at a time.

A model that was pruned with its blocks at rest stays so. One that is on the device as a whole leaves it when an evaluation
runs out of memory there: the dense model may not fit beside it. Then the evaluation begins again, with its numbers the same.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn
from transformers import PreTrainedModel

from prunebench.bench.plan import RunRequest
from prunebench.errors import RequestError
from prunebench.handles import Placement
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.loading import load_model
from prunebench.toolkit.memory import is_out_of_memory, let_go
from prunebench.toolkit.placement import HostActivations, Resident, Streaming, place_model
from prunebench.toolkit.visiting import Visits, visiting


class NoRoomError(Exception):
    """The dense model does not fit on the device beside the pruned one."""


class Lodging:
    """A pruned model, and beside it the dense one, where evaluations may call them."""

    def __init__(self, request: RunRequest, model: PreTrainedModel, placement: Placement | None = None) -> None:
        """Put the model where it will be called.

        Args:
            request: of the run.
            model: pruned.
            placement: where its blocks rest since it was pruned; None where nobody has arranged it yet.
        """
        self.device = torch.device(request.device)
        self.placement: Visits | None = None
        """What brings blocks; None while models are on the device as a whole."""
        self._request, self._model = request, model
        self._dense: PreTrainedModel | None = None
        self._leaving = ExitStack()
        if placement is not None and type(placement) not in (Resident, HostActivations):
            self._visit(_blocks(model), placement)
        elif not self._moved(model):
            self.leave_device()

    def __enter__(self) -> Lodging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._leaving.close()

    @property
    def can_leave(self) -> bool:
        """Whether there would be more room with the blocks elsewhere."""
        return self.placement is None and self.device.type != "cpu"

    def leave_device(self) -> None:
        """From now on blocks rest on the host.

        Raises:
            ModelError, Refused: the model has no blocks that can be told.
        """
        self._dense = None  # loaded again when it is asked for
        let_go()
        placement, blocks = Streaming(self.device), _blocks(self._model)
        place_model(self._model, blocks, placement)
        self._visit(blocks, placement)
        let_go()

    def dense(self) -> PreTrainedModel:
        """The model as it was before the first step, in eval mode; loaded when an evaluation first asks for it.

        Raises:
            RequestError: the model was not pruned here, so that nobody knows what it was before.
            NoRoomError: it does not fit on the device beside the pruned one.
        """
        if not self._request.spec.steps:
            raise RequestError("what a model was before it was pruned is known in runs only: give the evaluation to a suite.")
        if self._dense is None:
            place = "cpu" if self.placement is not None else self.device  # a shape is drawn there, of itself
            dense = load_model(self._request.model, self._request.spec.model.dtype, place)
            if self.placement is not None:
                place_model(dense, _blocks(dense), Streaming(self.device))
                self._visit(_blocks(dense), self.placement)
            elif not self._moved(dense):
                raise NoRoomError
            self._dense = dense
        return self._dense

    def _visit(self, blocks: list[nn.Module], placement: Placement) -> None:
        """Let blocks come when they are called."""
        if self.placement is None:
            self.placement = Visits(placement)
        self._leaving.enter_context(visiting(blocks, self.placement))

    def _moved(self, model: PreTrainedModel) -> bool:
        """Move a whole model to the device; False where memory ran out."""
        try:
            model.to(self.device)  # type: ignore[arg-type]
        except (MemoryError, RuntimeError) as error:
            if self.device.type == "cpu" or not is_out_of_memory(error):
                raise
            return False
        return True


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [block.module for block in find_anatomy(model).blocks]

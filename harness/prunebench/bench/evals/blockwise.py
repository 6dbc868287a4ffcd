"""Predictions for the windows of a text by a model that is not on the device as a whole: all windows go through one block at a
time, as calibration sequences do when the model is pruned, and then, batch by batch, through what is above the blocks.

The numbers are those of the model's own forward with batches of the same size: the same operations on the same operands.
What lies before the last block's output depends on the model and the windows alone, so that of the dense model it can be kept
for the other runs of a sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from prunebench.bench.evals.windows import Windows
from prunebench.errors import ModelError, Refused
from prunebench.handles import DenseWeights, Placement
from prunebench.spec import EvalJob, Job, Needs
from prunebench.targets import Dense
from prunebench.toolkit.anatomy import ModelAnatomy, find_anatomy
from prunebench.toolkit.cache import digest, digest_array
from prunebench.toolkit.placement import HostActivations, brought
from prunebench.toolkit.recorder import record_arguments, replaced
from prunebench.toolkit.stream import Stream, evaluating

Predictor = Callable[[torch.Tensor], torch.Tensor]
"""Logits [windows, window, vocabulary] of the next batch of windows; batches are given in order, from the first."""


def predictor(job: EvalJob, windows: Windows) -> Predictor:
    """What the job's model predicts: by its own forward, or block by block where it is not on the device as a whole."""
    return _own_forward(job.model) if job.placement is None else _blockwise(job, job.model, windows)


def dense_predictor(job: EvalJob, windows: Windows) -> Predictor:
    """What the dense model predicts, from its last hidden states where these can be kept for other runs.

    Where another run has kept them and the pruned model is the same outside its blocks, the dense model is not even loaded.
    """
    if job.artefact is None:
        return _own_forward(job.dense()) if job.placement is None else _blockwise(job, job.dense(), windows)
    try:
        outside = job.artefact("what is in no block, its digest", lambda: digest_outside(job.dense()))
        name = f"last hidden states {digest_array(windows.ids.numpy())} in batches of {windows.batch}"
        hidden = job.artefact(name, lambda: Passage(job, job.dense(), windows).last_hidden())
        same = torch.equal(outside, digest_outside(job.model))
        return Passage(job, job.model if same else job.dense(), windows).behind(hidden)
    except (ModelError, Refused):
        return _own_forward(job.dense())


def digest_outside(model: PreTrainedModel) -> torch.Tensor:
    """The digest of all that is in no block, parameters, buffers and the number of hooks, as sixteen numbers.

    Raises:
        ModelError, Refused: the model has no blocks that can be told.
    """
    inside = {id(module) for block in find_anatomy(model).blocks for module in block.module.modules()}
    parts: list[bytes | str] = []
    for name, module in model.named_modules():
        if id(module) not in inside:
            parts += [name, str(len(module._forward_hooks) + len(module._forward_pre_hooks))]
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                data = tensor.detach().cpu().reshape(-1).view(torch.uint8)
                parts += [key, str(tensor.dtype), data.numpy().tobytes()]
    return torch.tensor([int(digit, 16) for digit in digest(parts)])


def _own_forward(model: PreTrainedModel) -> Predictor:
    return lambda ids: cast(torch.Tensor, model(input_ids=ids, use_cache=False).logits)


def _blockwise(job: EvalJob, model: PreTrainedModel, windows: Windows) -> Predictor:
    """Take all windows through the blocks now; what is above them is left to the predictor."""
    try:
        passage = Passage(job, model, windows)
        return passage.behind(passage.last_hidden())
    except (ModelError, Refused):  # no blocks that can be run one by one: they come and go within the model's own forward
        return _own_forward(model)


class Passage:
    """The windows of a text on their way through a model's blocks."""

    def __init__(self, job: EvalJob, model: PreTrainedModel, windows: Windows) -> None:
        """Find the model's blocks; nothing runs yet.

        Raises:
            ModelError, Refused: the model has no blocks that can be told.
        """
        self._model = model
        self.anatomy = find_anatomy(model)
        # Where the model is on the device as a whole, what is kept of it need not be.
        placement = job.placement or HostActivations(job.device)
        self._job = _step(job, model, self.anatomy, placement, windows)
        self._returning: Callable[[torch.Tensor], Any] | None = None

    def last_hidden(self, at: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()) -> torch.Tensor:
        """The last block's outputs, [windows, window, hidden], where activations rest.

        Args:
            at: what is open while the block of this number is brought and the windows go through it.

        Raises:
            Refused: the model's blocks cannot be run one by one; found before any was.
            torch.OutOfMemoryError: a batch does not fit.
        """
        blocks, job = self.anatomy.blocks, self._job
        stream = Stream(job, quickly=False)  # the numbers of the ordinary way
        try:
            with brought(job.placement, blocks[0].module):
                stream.resting(0)  # before anything is opened: it runs the block on one sequence
            for index, handle in enumerate(blocks):
                job.progress("block", index, len(blocks))
                with at(index), brought(job.placement, handle.module):
                    stream.expect(index + 1)
                    stream.propagate(index)
        finally:
            job.placement.expect(None)
        job.progress("block", len(blocks), len(blocks))
        self._returning = stream.returning
        return stream.outputs()

    def behind(self, hidden: torch.Tensor) -> Predictor:
        """What the model predicts of its last hidden states, [windows, window, hidden], which another run may have made.

        Raises:
            Refused: the model's blocks cannot be run one by one.
        """
        if self._returning is None:
            first = self.anatomy.blocks[0].module
            with brought(self._job.placement, first), torch.no_grad(), evaluating(self._model):
                self._returning = record_arguments(self._job)[0].returning
        done = 0

        def predict(ids: torch.Tensor) -> torch.Tensor:
            nonlocal done
            done += len(ids)
            return self.top(hidden[done - len(ids) : done], ids)

        return predict

    def top(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [windows, window, vocabulary], by the model's own forward above the blocks.

        Args:
            hidden: a batch of the last hidden states.
            ids: its tokens, on the device.
        """
        assert self._returning is not None
        state = self._returning(self._job.placement.fetch(hidden).to(self._job.device))
        modules = [block.module for block in self.anatomy.blocks]
        with replaced(modules, lambda _, __: lambda *args, **kwargs: state):  # noqa: ARG005
            return cast(torch.Tensor, self._model(input_ids=ids, use_cache=False).logits)


def _step(job: EvalJob, model: PreTrainedModel, anatomy: ModelAnatomy, placement: Placement, windows: Windows) -> Job:
    """The windows as the calibration set of a step that changes nothing, as which the walk's machinery takes them."""
    return Job(
        model=model,
        anatomy=anatomy,
        target=Dense(),
        needs=Needs.CALIBRATION,
        seed=0,
        placement=placement,
        batch_size=windows.batch,
        masks={},
        dense=cast(DenseWeights, None),  # nobody asks it here, and to make it may copy the model
        progress=job.progress,
        note=_anew,
        attach=anatomy.adapters.attach,
        artefact=lambda name, make: make(),  # noqa: ARG005
        calibration_tokens=windows.ids,
    )


def _anew(key: str, _: object) -> None:
    """A pass wants to go on with half the batch: the whole evaluation is to be begun again, so that all its bits are of one."""
    raise torch.OutOfMemoryError(f"out of memory: {key}.")

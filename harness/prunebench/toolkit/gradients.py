"""Gradients of the causal language model's loss, each sample's own, reduced over samples: what a plain backward finds.

Where the model is in float32 already and one sample's graph is small, each sample goes forward and back through the whole
model, and each matrix's gradient is folded into its accumulator as it comes. Else block by block: all samples go forward with
each block's inputs kept; the loss gives a gradient at the top for each sample; then, from the last block down, each block is
run again with autograd, its matrices' gradients are folded, and the gradient of its input is handed to the block below. In
memory are then the inputs of all blocks, and one block in float32 with its accumulators: GBLM's own code holds the gradients
of the whole model (`methods.md` 6). Both ways give the same bits: the same products of the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prunebench.spec import Job, Matrix
from prunebench.toolkit.arranging import footprint
from prunebench.toolkit.phases import phase
from prunebench.toolkit.placement import Resident, brought
from prunebench.toolkit.products import quick
from prunebench.toolkit.recorder import replaced
from prunebench.toolkit.sample_gradients import SampleGradients, together
from prunebench.toolkit.scores import at_least_float32
from prunebench.toolkit.shelf import Shelf
from prunebench.toolkit.stream import Stream, evaluating
from prunebench.toolkit.transfer import lane_to
from prunebench.toolkit.walk import Block

MOST_KEPT = 8 << 30
"""Bytes of inputs of blocks on a GPU: those of a 7B model would be 64 GiB, four times the rest of the work."""

SMALL_GRAPH = 1 << 30
"""Bytes of a sample's graph through the whole model that are never too many."""


def loss_gradients(job: Job, reduce: Literal["l1", "l2"] = "l1") -> dict[str, torch.Tensor]:
    """Gradients of each sample's loss with respect to every matrix of the model as it is, reduced over samples.

    The loss of a sample is the mean cross-entropy of its `length - 1` later tokens. Blocks run forward in the model's dtype
    and backward in float32 (float64 where the model is); norm and head above them work in the model's dtype.

    Args:
        job: the model and its calibration sequences [samples, length].
        reduce: `l1`, the sum of magnitudes, or `l2`, the root of the sum of squares.

    Returns:
        By matrix name [outputs, inputs] on the host, float32 (or float64); zero where no sample reaches a matrix.

    Raises:
        Refused: the model's blocks cannot be run one by one.
    """
    found = _at_once(job, reduce) if _fits_at_once(job) else _by_blocks(job, reduce)
    for device in job.placement.devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # copies to the host were begun and not waited for
    return {matrix.name: found[matrix.name] for matrix in job.anatomy.matrices}


def _fits_at_once(job: Job) -> bool:
    """Whether the whole model is there as gradients want it, and samples' graphs take less than all blocks' inputs would."""
    dtype, (samples, length) = job.model.dtype, job.calibration.shape
    if type(job.placement) is not Resident or dtype not in (torch.float32, torch.float64):
        return False
    hidden = int(getattr(job.model.config.get_text_config(), "hidden_size", 0))
    taken = footprint(job.model, job.anatomy.blocks, samples, length, hidden)
    graphs = together(job.device, job.batch_size, length) * taken.sequence
    return graphs * len(job.anatomy.blocks) <= max(SMALL_GRAPH, len(job.anatomy.blocks) * taken.activations)


def _at_once(job: Job, reduce: Literal["l1", "l2"]) -> dict[str, torch.Tensor]:
    """Each sample forward and back through the whole model."""
    matrices, tokens = job.anatomy.matrices, job.calibration
    found = SampleGradients([_stored(matrix.module) for matrix in matrices], reduce)
    done = 0
    with phase("statistics"), evaluating(job.model):
        for part in found.parts([tokens], job.batch_size):
            job.progress("gradients", done, len(tokens))
            ids = part.to(job.device)
            with found.taking(job.model):
                found.backward(len(part), _losses(job.model(input_ids=ids, use_cache=False).logits, ids).sum())
            done += len(part)
    job.progress("gradients", done, len(tokens))
    return _on_the_host(matrices, found.reduced())


def _losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Each sample's mean cross-entropy of its later tokens; logits [samples, length, vocabulary], ids [samples, length]."""
    pairs = zip(at_least_float32(logits), ids, strict=True)
    return torch.stack([nn.functional.cross_entropy(own[:-1], sample[1:]) for own, sample in pairs])


def _stored(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _on_the_host(matrices: Sequence[Matrix], totals: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Totals by name [outputs, inputs], copied to the host; from CUDA into pinned memory, and not waited for."""
    found = {}
    for matrix, total in zip(matrices, totals, strict=True):
        oriented = matrix.oriented(total).contiguous()
        if oriented.device.type == "cuda":
            room = lane_to(oriented.device).room(oriented.shape, oriented.dtype)
            oriented = room.copy_(oriented, non_blocking=True)
        found[matrix.name] = oriented.cpu()
    return found


class _Samples(Stream):
    """Hidden states that move on as many samples at a time as go backward together, so that both ways do the same products."""

    @property
    def batch_size(self) -> int:
        """Sequences at a time."""
        return together(self._job.device, self._job.batch_size, self._job.calibration.shape[1])


def _by_blocks(job: Job, reduce: Literal["l1", "l2"]) -> dict[str, torch.Tensor]:
    """All samples forward, and from the last block down all of them back."""
    stream, kept = _Samples(job), Shelf(job.device, there=True)
    blocks = job.anatomy.blocks
    try:
        for index, handle in enumerate(blocks):
            job.progress("forward", index, len(blocks))
            with brought(job.placement, handle.module):
                stream.expect(index + 1)
                inputs = stream.inputs(index)
                if not index:
                    kept = Shelf(job.device, _resting_place(inputs.device, inputs.nbytes * len(blocks)) == inputs.device)
                kept.append(inputs)
                stream.propagate(index)
        gradients = _at_the_top(job, stream)
        found: dict[str, torch.Tensor] = {}
        for index in reversed(range(len(blocks))):
            job.progress("backward", len(blocks) - 1 - index, len(blocks))
            totals = _through_block(job, stream, index, kept.pop(), gradients, reduce)
            found |= _on_the_host(blocks[index].matrices, totals)
        job.progress("backward", len(blocks), len(blocks))
    finally:
        job.placement.expect(None)
        stream.close()
    return found


def _resting_place(device: torch.device, wanted: int) -> torch.device:
    """Where inputs of all blocks are kept: where they are, or on the host if they would fill half of what is free there.

    On a GPU also if they are more than `MOST_KEPT`, whatever is free.
    """
    if device.type != "cuda":
        return device
    return device if wanted <= min(torch.cuda.mem_get_info(device)[0] // 2, MOST_KEPT) else torch.device("cpu")


def _at_the_top(job: Job, stream: Stream) -> torch.Tensor:
    """The loss gradient at the last block's output [samples, length, hidden], by the model's own forward above the blocks."""
    tokens, dtype = job.calibration, job.model.dtype
    # In float16 the gradients of a mean over 2048 tokens underflow; a power of two changes no bit where they do not.
    scale = 2 ** tokens.shape[1].bit_length()
    gradients = stream.outputs().to(stream.work_dtype())  # a sample's hidden state is read, then overwritten
    state = gradients[:1]

    def handing(index: int, own: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG001
        # The copy is for models that write into what the last block returns.
        return lambda *args, **kwargs: stream.returning(state.clone())  # noqa: ARG005

    modules, at = [block.module for block in job.anatomy.blocks], 0
    with phase("statistics"), evaluating(job.model), replaced(modules, handing), quick(job.model), torch.enable_grad():
        for part in torch.split(tokens, stream.batch_size):
            rows, ids = slice(at, at + len(part)), part.to(job.device)
            state = job.placement.fetch(gradients[rows]).to(job.device, dtype).requires_grad_()
            losses = _losses(job.model(input_ids=ids, use_cache=False).logits, ids)
            (gradient,) = torch.autograd.grad(losses.sum() * scale, state)
            gradients[rows] = job.placement.rest(gradient.to(gradients.dtype) / scale)
            at += len(part)
    return gradients


def _through_block(
    job: Job, stream: Stream, index: int, inputs: torch.Tensor, gradients: torch.Tensor, reduce: Literal["l1", "l2"]
) -> list[torch.Tensor]:
    """Reduced gradients of one block's matrices; the gradient at its output is replaced by the one at its input."""
    handle, placement = job.anatomy.blocks[index], job.placement
    with phase("statistics"):
        with brought(placement, handle.module):
            replica = Block(handle, index, stream).replica(stream.work_dtype())
        placement.expect(job.anatomy.blocks[index - 1].module if index else None)
        found, at = SampleGradients([replica.parameter(matrix) for matrix in handle.matrices], reduce), 0
        for part in found.parts([inputs], job.batch_size):
            rows = slice(at, at + len(part))
            hidden = placement.fetch(part).to(stream.work_dtype()).requires_grad_()
            with found.taking(replica.module):
                below = found.backward(len(part), replica.forward(hidden), placement.fetch(gradients[rows]), hidden)
            assert below is not None
            gradients[rows] = placement.rest(below)
            at += len(part)
        return found.reduced()

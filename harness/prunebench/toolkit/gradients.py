"""Gradients of the causal language model's loss, block by block: what a plain backward finds, without a graph of the model.

All samples go forward with each block's inputs kept; the loss gives a gradient at the top for each sample; then, from the
last block down, each block is run again with autograd, one sample at a time, its matrices' gradients are folded into an
accumulator and the gradient of its input is handed to the block below. In memory are the inputs of all blocks, and one
block in float32 with its accumulator: GBLM's own code holds the gradients of the whole model (`methods.md` 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from prunebench.spec import Job
from prunebench.toolkit.phases import phase
from prunebench.toolkit.recorder import replaced
from prunebench.toolkit.stream import Stream, evaluating
from prunebench.toolkit.walk import Block, fold


def loss_gradients(job: Job, reduce: Literal["l1", "l2"] = "l1") -> dict[str, torch.Tensor]:
    """Gradients of each sample's loss with respect to every matrix of the model as it is, reduced over samples.

    The loss of a sample is the mean cross-entropy of its `length - 1` later tokens. Blocks run forward in the model's dtype
    and backward in float32 (float64 where the model is); norm and head above them work in the model's dtype.

    Args:
        job: the model and its calibration sequences [samples, length].
        reduce: `l1`, the sum of magnitudes, or `l2`, the root of the sum of squares.

    Returns:
        By matrix name [outputs, inputs] on the host, float32 (or float64).

    Raises:
        Refused: the model's blocks cannot be run one by one.
    """
    stream, kept = Stream(job), list[torch.Tensor]()
    blocks = job.anatomy.blocks
    try:
        for index, handle in enumerate(blocks):
            job.progress("forward", index, len(blocks))
            job.placement.bring(handle.module)
            try:
                stream.expect(index + 1)
                inputs = stream.inputs(index)
                kept.append(inputs.to(_resting_place(inputs.device, inputs.nbytes * (len(blocks) - index)), copy=True))
                stream.propagate(index)
            finally:
                job.placement.drop(handle.module)
        gradients = _at_the_top(job, stream)
        found: dict[str, torch.Tensor] = {}
        for index in reversed(range(len(blocks))):
            job.progress("backward", len(blocks) - 1 - index, len(blocks))
            found |= _through_block(job, stream, index, kept.pop(), gradients, reduce)
        job.progress("backward", len(blocks), len(blocks))
    finally:
        job.placement.expect(None)
        stream.close()
    return {matrix.name: found[matrix.name] for matrix in job.anatomy.matrices}


def _resting_place(device: torch.device, wanted: int) -> torch.device:
    """Where inputs of blocks are kept: where they are, or on the host if they would fill half of what is free there."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2 * wanted
    return device if wanted <= free // 2 else torch.device("cpu")


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

    modules = [block.module for block in job.anatomy.blocks]
    with phase("statistics"), evaluating(job.model), replaced(modules, handing), torch.enable_grad():
        for sample in range(len(tokens)):
            state = job.placement.fetch(gradients[sample : sample + 1]).to(job.device, dtype).requires_grad_()
            ids = tokens[sample : sample + 1].to(job.device)
            logits = job.model(input_ids=ids, use_cache=False).logits[0, :-1].to(stream.work_dtype())
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, ids[0, 1:]) * scale, state)
            gradients[sample : sample + 1] = job.placement.rest(gradient.to(gradients.dtype) / scale)
    return gradients


def _through_block(
    job: Job, stream: Stream, index: int, inputs: torch.Tensor, gradients: torch.Tensor, reduce: Literal["l1", "l2"]
) -> dict[str, torch.Tensor]:
    """Reduced gradients of one block's matrices; the gradient at its output is replaced by the one at its input."""
    handle, placement = job.anatomy.blocks[index], job.placement
    with phase("statistics"):
        placement.bring(handle.module)
        try:
            replica = Block(handle, index, stream).replica(stream.work_dtype())
        finally:
            placement.drop(handle.module)
        placement.expect(job.anatomy.blocks[index - 1].module if index else None)
        weights = [replica.parameter(matrix) for matrix in handle.matrices]
        totals = [torch.zeros_like(weight) for weight in weights]
        for sample in range(len(inputs)):
            rows = slice(sample, sample + 1)
            hidden = placement.fetch(inputs[rows]).to(stream.work_dtype()).requires_grad_()
            with torch.enable_grad():
                output = replica.forward(hidden)
            above = placement.fetch(gradients[rows])
            # An expert to which no token of the sample went has a gradient of zeros.
            below, *found = torch.autograd.grad(output, [hidden, *weights], above, materialize_grads=True)
            gradients[rows] = placement.rest(below)
            fold(totals, found, reduce)
        if reduce == "l2":
            totals = [total.sqrt_() for total in totals]
        return {m.name: m.oriented(total).contiguous().cpu() for m, total in zip(handle.matrices, totals, strict=True)}

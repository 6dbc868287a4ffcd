"""Low-rank changes of a matrix while it is trained: `W + s BA` in several kinds (`methods.md` 8.2).

While a change is installed, the matrix's module computes with the changed weight by an instance attribute `forward`; the module
tree and the weight itself stay as they are. The product BA, as large as the matrix, is made anew in the forward and in the
backward pass and never kept between them, so training needs the memory of one matrix more, whatever the depth of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from prunebench.toolkit.masks import pack_bits, unpack_bits
from prunebench.toolkit.scores import at_least_float32

Kind = Literal["lora", "lora_prune", "mask_lora", "scale_lora"]
"""How the factors change the weight W under the keep mask M, in training and when merged:

* `lora`: `W + s BA`, both times;
* `lora_prune`: `W + s BA` in training, `M * (W + s BA)` when merged;
* `mask_lora`: `W + s (M * BA)`, both times;
* `scale_lora`: `W * BA`, both times.
"""


class LowRank:
    """Two trainable factors beside a matrix: `down` [rank, inputs] and `up` [outputs, rank], float32 whatever the weight is."""

    def __init__(
        self,
        module: nn.Module,
        weight: torch.Tensor,
        kind: Kind,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Make the factors so that they change nothing yet.

        Args:
            module: the linear layer, `Conv1D` or head whose output is changed.
            weight: its weight as [outputs, inputs], on its device.
            kind: one of `Kind`.
            rank: of the change.
            alpha: the change is scaled by `alpha / rank`; `scale_lora` has no scale.
            generator: on the host, so that every device starts from the same numbers.
            mask: the keep mask [outputs, inputs]; None keeps everything.
        """
        self.module, self.kind, self.scale = module, kind, alpha / rank
        self._weight = weight.detach()
        self._mask = None if mask is None else _stored(mask, weight.device)
        outputs, inputs = weight.shape
        dtype = at_least_float32(weight[:0]).dtype
        if kind == "scale_lora":
            # BA = 1 everywhere, as the authors start it; all `rank` components then get the same gradient and stay equal.
            down = torch.full((rank, inputs), 1 / math.sqrt(rank), dtype=dtype)
            up = torch.full((outputs, rank), 1 / math.sqrt(rank), dtype=dtype)
        else:
            bound = 1 / math.sqrt(inputs)  # Kaiming's uniform with a = sqrt(5), as `nn.Linear` and PEFT have it
            down = (torch.rand(rank, inputs, generator=generator, dtype=dtype) * 2 - 1) * bound
            up = torch.zeros(outputs, rank, dtype=dtype)
        self.down = down.to(weight.device).requires_grad_(True)
        self.up = up.to(weight.device).requires_grad_(True)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The factors."""
        return [self.down, self.up]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the module compute with the changed weight for the time inside."""
        earlier = self.module.__dict__.get("forward")
        bias = self.module.bias if isinstance(self.module.bias, torch.Tensor) else None

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            changed: torch.Tensor = _ChangedLinear.apply(inputs, self.down, self.up, self, bias)  # type: ignore[no-untyped-call]
            return changed

        self.module.forward = forward
        try:
            yield
        finally:
            del self.module.forward
            if earlier is not None:
                self.module.forward = earlier

    def collect_gradients(self) -> None:
        """The factors are what the forward pass uses: their gradients are in place."""

    def refresh(self) -> None:
        """Likewise nothing to bring over after a step."""

    def changed_weight(self) -> torch.Tensor:
        """The weight as training uses it, [outputs, inputs] in the factors' dtype."""
        with torch.no_grad(), torch.autocast(self.up.device.type, enabled=False):
            product = self.up @ self.down
        weight = self._weight.to(product.dtype)
        if self.kind == "scale_lora":
            return weight * product
        product *= self.scale
        mask = self._unpacked() if self.kind == "mask_lora" else None
        return weight + (product if mask is None else product * mask)

    def merged_weight(self) -> torch.Tensor:
        """The weight to keep, [outputs, inputs] in the factors' dtype; zero wherever the mask removes."""
        merged = self.changed_weight()
        mask = None if self.kind == "lora" else self._unpacked()
        return merged if mask is None else merged.masked_fill_(~mask, 0)

    def product_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient of the changed weight to that of BA, both [outputs, inputs]."""
        if self.kind == "scale_lora":
            return gradient * self._weight
        gradient = gradient * self.scale
        mask = self._unpacked() if self.kind == "mask_lora" else None
        return gradient if mask is None else gradient * mask

    def _unpacked(self) -> torch.Tensor | None:
        """The keep mask [outputs, inputs], on the weight's device."""
        if self._mask is None or self._mask.dtype == torch.bool:
            return self._mask
        outputs, inputs = self._weight.shape
        return unpack_bits(self._mask, (outputs, inputs))


def _stored(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A mask as it is kept while it is trained under: on a GPU a bit an entry, of a 30B model 4 GB in place of 32."""
    return pack_bits(mask).to(device) if device.type == "cuda" else mask.to(device)


class _ChangedLinear(torch.autograd.Function):
    """`inputs @ changed_weight.T + bias`, keeping for the backward pass nothing but the inputs."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, down: torch.Tensor, up: torch.Tensor, change: LowRank, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs, down, up)
        ctx.change = change
        return nn.functional.linear(inputs, change.changed_weight().to(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor | None, ...]:
        inputs, down, up = ctx.saved_tensors
        (gradient,) = gradients  # of a shorter dtype than the inputs under autocast
        weight = ctx.change.changed_weight().to(gradient.dtype)
        below = (gradient @ weight).to(inputs.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (gradient.flatten(0, -2).t() @ inputs.to(gradient.dtype).flatten(0, -2)).to(down.dtype)
        of_product = ctx.change.product_gradient(of_weight)
        return below, up.t() @ of_product, of_product @ down.t(), None, None

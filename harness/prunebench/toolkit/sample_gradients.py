"""Each sample's gradients of some matrices, from one forward and one backward of several samples.

The gradient of a matrix for a sample is `D'X`: X what the matrix read and D the gradient at its output, for that sample's
tokens alone. Both pass by on the way back; each sample's product is made there, folded into the total, and gone, so that the
gradients of one matrix and one sample are all that is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal
from weakref import WeakMethod

import torch
from torch import nn

from prunebench.toolkit.precision import is_single, single_precision
from prunebench.toolkit.products import only_these, quick, weight_gradient

Reduce = Literal["rms", "l1", "l2"]


TOGETHER = 4096
"""Tokens that go through together on a device: enough to keep it busy, and their graph through one block is small."""


def together(device: torch.device, batch_size: int, length: int) -> int:
    """Samples of so many tokens that go there and back at once; one on a host, where more gain nothing and take memory."""
    return 1 if device.type == "cpu" else max(1, min(batch_size, TOGETHER // length))


class OnTheWay:
    """Gives each matrix's gradient of each sample to somebody as soon as the way back has made it."""

    def __init__(self, weights: Sequence[nn.Parameter], give: Callable[[int, torch.Tensor], None]) -> None:
        """For these parameters; `give`, a method, gets the number of one and its gradient as it is stored, to use up."""
        self.missed: list[int] = []
        """Parameters that the last way back did not come to: their gradients are zero."""
        self._weights = list(weights)
        # Weakly: who gives the method mostly holds this, and such a ring would keep a block's copies until they are collected.
        self._give = WeakMethod(give)
        self._index = {id(weight): index for index, weight in enumerate(weights)}
        self._calls = [0] * len(weights)
        self._waiting: list[list[tuple[torch.Tensor, torch.Tensor, bool, bool]]] = [[] for _ in weights]
        """Inputs, gradients at outputs, whether the weight is stored transposed, and whether TF32 was on."""
        self._apart = True
        """Whether batches of several samples can be taken apart; the first sample, by itself, shows it."""
        self._samples = 0

    def _taker(self) -> Callable[[int, torch.Tensor], None]:
        give = self._give()
        assert give is not None
        return give

    @contextmanager
    def taking(self, module: nn.Module) -> Iterator[None]:
        """Take the gradients of what is run through a module here, forward and back."""
        with only_these(module, self._weights), quick(module, self), torch.enable_grad():
            yield

    def parts(self, batches: Iterable[torch.Tensor], at_once: int) -> Iterator[torch.Tensor]:
        """Batches in parts that may go through together, no more samples than asked for: the first one by itself.

        After it as many as can be taken apart, and as `together` says.
        """
        for batch in batches:
            start, most = 0, together(self._weights[0].device, at_once, batch.shape[1]) if self._weights else 1
            while start < len(batch):
                stop = start + (most if self._samples and self._apart else 1)
                yield batch[start:stop]
                start = stop

    def backward(
        self,
        samples: int,
        outputs: torch.Tensor,
        gradients: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Go back, of so many samples, from the sum of their losses, or from outputs with the gradients there.

        Returns:
            The gradient at `inputs`, if these are given.

        Raises:
            RuntimeError: the samples of a batch cannot be taken apart, and the first sample did not show it.
        """
        wanted = [*self._weights] if inputs is None else [inputs, *self._weights]
        found: list[torch.Tensor | None] = list(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        below: torch.Tensor | None = None if inputs is None else found.pop(0)
        beside = any(gradient is not None for gradient in found)  # of a weight that is read past its layer
        apart = self._apart and all(self._calls) and not beside
        if self._samples and self._apart and not apart:
            raise RuntimeError("the block works on this sample in another way than on the first; they cannot be taken apart.")
        self._apart = apart
        self.missed = [index for index, calls in enumerate(self._calls) if not calls and found[index] is None]
        for index, gradient in enumerate(found):
            if gradient is not None or self._waiting[index]:
                self._hand_on(index, gradient)
        self._calls, self._samples = [0] * len(self._weights), self._samples + samples
        return below

    def called(self, weight: torch.Tensor, inputs: torch.Tensor) -> None:
        """A product that `take` is going to see."""
        index = self._index.get(id(weight))
        if index is not None:
            self._calls[index] += 1
            self._apart &= inputs.ndim > 2  # without a dimension of samples, tokens may be in any order

    def take(self, weight: torch.Tensor, inputs: torch.Tensor, gradients: torch.Tensor, transposed: bool) -> None:
        """Hand on what a product gives; of a matrix that was called several times, when all of them are here.

        Of the first sample all wait to the end: only then is it known whether autograd finds something beside them.
        """
        index = self._index.get(id(weight))
        if index is None:
            return
        self._waiting[index].append((inputs.detach(), gradients, transposed, is_single(inputs.device)))
        if self._samples and self._apart and len(self._waiting[index]) == self._calls[index]:
            self._hand_on(index, None)

    def _hand_on(self, index: int, beside: torch.Tensor | None) -> None:
        """Take in all samples of what waits for a matrix, and of a single sample what autograd found beside it."""
        waiting, self._waiting[index] = self._waiting[index], []
        for sample in range(len(waiting[0][0]) if self._apart and waiting else 1):
            gradient = beside
            for inputs, gradients, transposed, single in waiting:
                parts = (inputs[sample], gradients[sample]) if self._apart else (inputs, gradients)
                with single_precision(inputs.device) if single else nullcontext():
                    own = weight_gradient(*parts, transposed)
                gradient = own if gradient is None else own.add_(gradient)
            assert gradient is not None
            self._taker()(index, gradient)


class SampleGradients(OnTheWay):
    """Gradients reduced over samples as these come: totals of magnitudes for l1, of squares otherwise."""

    def __init__(self, weights: Sequence[nn.Parameter], reduce: Reduce) -> None:
        """For these parameters, each in its stored orientation."""
        super().__init__(weights, self._fold)
        self.totals = [torch.zeros_like(weight, requires_grad=False) for weight in weights]
        self._reduce = reduce

    def reduced(self) -> list[torch.Tensor]:
        """The totals, brought to the scale of the reduction in place; nothing can be folded in afterwards."""
        samples = max(1, self._samples)
        if self._reduce == "rms":
            self.totals = [total.div_(samples) for total in self.totals]
        return self.totals if self._reduce == "l1" else [total.sqrt_() for total in self.totals]

    def _fold(self, index: int, gradient: torch.Tensor) -> None:
        if self._reduce == "l1":
            self.totals[index].add_(gradient.abs_())
        else:
            self.totals[index].addcmul_(gradient, gradient)

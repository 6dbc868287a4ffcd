"""Statistics of the inputs of a matrix, gathered while the calibration set passes through a block."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch

from prunebench.toolkit import kernels
from prunebench.toolkit.scores import at_least_float32

SHORT = (torch.bfloat16, torch.float16)


class Statistic(abc.ABC):
    """Something accumulated over the inputs of one matrix. Matrices that read the same input share one."""

    by_sequence: ClassVar[bool] = False
    """Whether `add` gets an expert's tokens one sequence at a time, without those of which it read nothing: they have different
    lengths. Slow; for what is a number a sequence, as a variance is."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        """For inputs of `width` features on `device`; `dtype` is float32, or float64 in exact tests."""
        self.width, self.device, self.dtype = width, device, dtype

    @abc.abstractmethod
    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Take in one batch: [all its tokens, width], sequence by sequence, and how many these are.

        An expert of a mixture reads some tokens of each sequence, in the order in which it is given them; see `by_sequence`.
        The inputs come in the statistic's dtype, but where it says that it takes them as they are.
        """

    def pass_by(self, sequences: int) -> None:
        """Take in so many sequences of which the matrix, one of an expert's, read no token."""
        if not self.by_sequence:
            self.add(torch.zeros(0, self.width, device=self.device, dtype=self.dtype), sequences)

    @abc.abstractmethod
    def value(self) -> torch.Tensor:
        """What was found."""

    def takes(self, inputs: torch.Tensor) -> bool:
        """Whether `add` takes inputs of this dtype on this device as they are; a copy in the statistic's dtype is spared."""
        return inputs.dtype == self.dtype


class InputNorm(Statistic):
    """`sqrt(1/N * sum over N sequences and their tokens of x_j^2)`, [inputs] (Wanda's code; the 1/N leaves rankings alone)."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        # A vector, so float64 costs nothing; sums then hardly depend on how the set is split into batches.
        self._squares = torch.zeros(width, device=device, dtype=torch.float64)
        self._sequences = 0

    def takes(self, inputs: torch.Tensor) -> bool:
        """Of 16 bits, too, where a kernel reads them."""
        return super().takes(inputs) or (inputs.dtype in SHORT and kernels.use(inputs.device, "column_squares"))

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Add the squares of a batch."""
        found = kernels.run(inputs.device, "column_squares", lambda k: k.column_squares(inputs))
        self._squares += at_least_float32(inputs).square().sum(dim=0) if found is None else found
        self._sequences += sequences

    def pass_by(self, sequences: int) -> None:
        """They count, so that norms of experts can be compared."""
        self._sequences += sequences

    def value(self) -> torch.Tensor:
        """The norms, [inputs]."""
        return (self._squares / max(1, self._sequences)).sqrt().to(self.dtype)


class Gram(Statistic):
    """`2/N * sum over N sequences of X'X`, [inputs, inputs]: the Hessian of SparseGPT's least squares (`methods.md` 4.1)."""

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self._mean = torch.zeros(width, width, device=device, dtype=dtype)
        self._sequences = 0

    def takes(self, inputs: torch.Tensor) -> bool:
        """Of 16 bits, too, where products of them are summed in float32: each is exact there."""
        return super().takes(inputs) or (inputs.dtype in SHORT and kernels.use(inputs.device, "gram"))

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Take a batch into the running mean, by panels of rows from the diagonal on: half of a symmetric matrix is enough."""
        old, self._sequences = self._sequences, self._sequences + sequences
        before, share = old / self._sequences, 2 / self._sequences
        for start, end in self._panels():
            panel, left, right = self._mean[start:end, start:], inputs[:, start:end].t(), inputs[:, start:]
            found = _product_of_short(left, right)
            if found is None:
                panel.addmm_(at_least_float32(left), at_least_float32(right), beta=before, alpha=share)
            else:
                panel.mul_(before).add_(found, alpha=share)

    def pass_by(self, sequences: int) -> None:
        """They count, with nothing in them."""
        old, self._sequences = self._sequences, self._sequences + sequences
        self._mean *= old / self._sequences

    def value(self) -> torch.Tensor:
        """The mean, [inputs, inputs]; not a copy."""
        for start, end in self._panels():
            self._mean[end:, start:end] = self._mean[start:end, end:].t()
        return self._mean

    def _panels(self) -> list[tuple[int, int]]:
        """Few enough for products of a good size, many enough to leave most of the lower half out."""
        size = max(128, self.width // 8)
        return [(start, min(start + size, self.width)) for start in range(0, self.width, size)]


def _product_of_short(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """Of matrices in 16 bits, in float32; None where there is no way but a copy of them."""
    return kernels.run(left.device, "gram", lambda k: k.product(left, right))


class SharedStatistics:
    """One pass's statistics of several kinds for several matrices, shared where matrices read one tensor.

    A matrix of an expert may be called in some batches and not in others; its statistics count the sequences of all of them.
    Siblings such as q, k and v are called one after another with the very same tensor; that is seen in the first batch and
    relied on, under a check, in the later ones.
    """

    def __init__(self, kinds: tuple[type[Statistic], ...], matrices: int) -> None:
        """For so many matrices."""
        self._kinds, self._matrices = kinds, matrices
        self._calls = self._sequences = 0
        self._each_once: bool | None = None
        self._called: set[str] = set()
        self._tokens: dict[str, int] = {}
        self._of: dict[str, list[Statistic]] = {}
        self._leader: dict[str, bool] = {}
        self._last: tuple[torch.Tensor, list[Statistic]] | None = None
        self._values: dict[int, list[torch.Tensor]] = {}

    def see(self, name: str, inputs: torch.Tensor, sequences: int, of: torch.Tensor | None = None) -> None:
        """Take in what matrix `name` reads in this batch; `of` says of which sequence each token is, where it is not all."""
        self._calls += 1
        same = self._last is not None and self._last[0] is inputs
        if name not in self._of:
            self._leader[name] = not same
            self._of[name] = self._last[1] if same and self._last else self._fresh(inputs)
            self._pass_by(name, self._sequences)
        elif self._leader[name] == same:
            raise RuntimeError(f"{name} shares its input with its neighbour in one batch and not in another.")
        self._called.add(name)
        self._tokens[name] = self._tokens.get(name, 0) + inputs.numel() // inputs.shape[-1]
        if self._leader[name]:
            flat, wide = inputs.detach().reshape(-1, inputs.shape[-1]), None
            for statistic in self._of[name]:
                taken = flat
                if not statistic.takes(flat):  # one copy for all that need it
                    taken = wide = at_least_float32(flat) if wide is None else wide
                if of is None or not statistic.by_sequence:
                    statistic.add(taken, sequences)
                else:
                    for sequence in sorted(set(of.tolist())):
                        statistic.add(taken[of == sequence], 1)
        self._last = (inputs, self._of[name])

    @property
    def complete(self) -> bool:
        """Whether this batch has shown all that it will, known once the first has called every matrix, and each just once."""
        return bool(self._each_once) and self._calls == self._matrices

    def end_batch(self, sequences: int) -> None:
        """Let go of the last tensor seen; the batch had so many sequences."""
        for name in self._of.keys() - self._called:
            self._pass_by(name, sequences)
        self._sequences += sequences
        self._called.clear()
        if self._each_once is None:
            self._each_once = self._calls == len(self._of) == self._matrices
        self._last, self._calls = None, 0

    def tokens(self, name: str) -> int:
        """How many tokens a matrix has read."""
        return self._tokens.get(name, 0)

    def values(self, name: str) -> list[torch.Tensor]:
        """The values for a matrix, one a kind; the same tensors for matrices that share."""
        if name not in self._of:
            raise RuntimeError(f"{name} was not called in its block's forward pass, so it has no statistics.")
        shared = self._of[name]
        if id(shared) not in self._values:
            self._values[id(shared)] = [statistic.value() for statistic in shared]
        return self._values[id(shared)]

    def _pass_by(self, name: str, sequences: int) -> None:
        if self._leader[name] and sequences:
            for statistic in self._of[name]:
                statistic.pass_by(sequences)

    def _fresh(self, inputs: torch.Tensor) -> list[Statistic]:
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        return [kind(inputs.shape[-1], inputs.device, dtype) for kind in self._kinds]

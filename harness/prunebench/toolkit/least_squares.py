"""Remove entries column by column and let the later columns make up for it: the least squares of SparseGPT (`methods.md` 4).

For a weight W and the Gram matrix H of its inputs, min ||(W - Q) X||² over Q with given zeros is approached greedily: when
column j loses entries, the later columns of the same rows take up the error. With `U'U` the inverse of H (U upper triangular),
`U_jj² = [(H_{j:,j:})^-1]_00` and row j of U over U_jj says how (Frantar and Alistarh 2023, arXiv 2301.00774, section 3).

Speed. Everything is transposed, [inputs, outputs], so that a column of W is contiguous. Columns come in leaves of few: inside
a leaf a column takes the errors of those before it by one matrix-vector product; leaves are joined by halves of a slab, slabs
by the lazy update of all that follows, each one product of matrices. Only the order of sums depends on the leaves.

Kernels sweep a slab of float32 in one call, once more with sums in another order: on GPUs in one launch, the host waiting for
nothing within a matrix (`kernels/column_sweep.py`; no product is in TF32 there unless torch is told so from outside), on hosts
with a C compiler some rows at a time, the lazy update as well (`kernels/host_sweep.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from prunebench.errors import NonFiniteError, RunError
from prunebench.targets import NM, Target, Unstructured
from prunebench.toolkit import kernels
from prunebench.toolkit.masks import keep_in_groups, keep_slab
from prunebench.toolkit.phases import phase
from prunebench.toolkit.scores import at_least_float32

LEAF = 8
"""Columns swept one at a time before their errors go on in a product; with N:M targets a leaf is a group."""

Choose = Callable[[torch.Tensor, slice], torch.Tensor]
"""`choose(scores, columns)`: from the scores `W²/U_jj²` [outputs, some columns] of the present weights to their keep mask."""


@dataclass(frozen=True)
class InverseFactor:
    """What the sweep needs of a Gram matrix; matrices that share inputs share it."""

    upper: torch.Tensor
    """U, upper triangular, [inputs, inputs]: `U'U` is the inverse of the damped Gram matrix."""
    dead: torch.Tensor
    """Inputs that are always zero, [inputs]: their weights do nothing, and become zero."""


def inverse_factor(gram: torch.Tensor, damping: float, retried: Callable[[float], None]) -> InverseFactor:
    """Factor the inverse of `gram + damping * mean(diagonal) * I`; dead inputs get a diagonal of 1 first.

    In the authors' order (Cholesky, inverse, Cholesky again): one factorisation of the matrix turned by 180 degrees would do,
    in half the time, but rounding then decides near ties otherwise than in their code, and all later choices differ.

    Args:
        gram: [inputs, inputs], float32 or float64; left as it is.
        damping: above 0; where the factorisation fails ten times as much is tried, up to 1.
        retried: told each damping that is tried after the first.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        RunError: it cannot be factored with a damping of 1 either.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NonFiniteError(f"{int((~torch.isfinite(gram)).sum())} of {gram.numel()} entries of a Gram matrix are not finite.")
    with phase("update"):
        dead = gram.diagonal() == 0
        diagonal = gram.diagonal().masked_fill(dead, 1)
        while True:
            upper = _factored(gram, diagonal + damping * diagonal.mean())
            if upper is not None:
                return InverseFactor(upper, dead)
            if damping >= 1:
                raise RunError(
                    f"a Gram matrix of {len(gram)} inputs is not positive definite, even with a damping of {damping:g}; "
                    "more calibration text may help."
                )
            damping = min(1.0, 10 * damping)
            retried(damping)


def _factored(gram: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor | None:
    """U for the matrix with that diagonal, or None where it is not positive definite as far as can be told."""
    damped = gram.clone()
    damped.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else upper


def choose_slabs(target: Target, removed: torch.Tensor | None) -> Choose:
    """Compare all the entries it is shown: exactly `int(size * s)` of them go, those in `removed` [outputs, inputs] first."""

    def choose(scores: torch.Tensor, columns: slice) -> torch.Tensor:
        return keep_slab(_removed_first(scores, removed, columns), target)

    return choose


@dataclass(frozen=True)
class _Groups:
    """`choose_groups`, in a form that tells a kernel what is asked."""

    target: NM
    removed: torch.Tensor | None

    def __call__(self, scores: torch.Tensor, columns: slice) -> torch.Tensor:
        keep = keep_in_groups(_removed_first(scores, self.removed, columns).t().contiguous(), self.target).t()
        return keep if self.removed is None else keep & ~self.removed[:, columns]


def choose_groups(target: NM, removed: torch.Tensor | None) -> Choose:
    """Compare the M columns it is shown row by row, those in `removed` first; without the checks of `keep_mask`, which wait
    for the device. Entries in `removed` stay so even where a group has more of them than the target asks for."""
    return _Groups(target, removed)


class ThresholdRule:
    """The authors' code: of the entries it is shown all go whose score is at most that of number `int(size * s)`, counted from
    0: one more than asked for, and all that are equal to it. Remembers the mask of exact counts, [outputs, inputs]."""

    def __init__(self, target: Unstructured, removed: torch.Tensor | None, like: torch.Tensor) -> None:
        self._target, self._removed = target, removed
        self.exact = torch.ones_like(like, dtype=torch.bool)

    def __call__(self, scores: torch.Tensor, columns: slice) -> torch.Tensor:
        """As `Choose`."""
        scores = _removed_first(scores, self._removed, columns)
        exact = keep_slab(scores, self._target)
        self.exact[:, columns] = exact
        # The least score that stays under exact counts is the threshold, and so goes, too.
        return scores > scores.masked_fill(~exact, torch.inf).amin() if self._target.removed(scores.numel()) else exact


def choose_given(keep: torch.Tensor) -> Choose:
    """A mask [outputs, inputs] made before the sweep."""
    return lambda scores, columns: keep[:, columns]  # noqa: ARG005 - the signature is `Choose`


def _removed_first(scores: torch.Tensor, removed: torch.Tensor | None, columns: slice) -> torch.Tensor:
    return scores if removed is None else scores.masked_fill(removed[:, columns], -1)


def check_room(name: str, groups: Sequence[torch.Tensor], target: Target) -> None:
    """Whether exact counts are possible in comparison groups of which earlier steps have removed what is True.

    Raises:
        RunError: more is removed already than the target asks for.
    """
    if not isinstance(target, Unstructured):
        return
    for group in groups:
        removed, wanted = int(group.sum()), target.removed(group.numel())
        if removed > wanted:
            raise RunError(
                f"earlier steps removed {removed} of {group.numel()} entries of {name} that are compared with each other, "
                f"and {target} asks for {wanted}."
            )


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves."""

    weight: torch.Tensor
    """[outputs, inputs], float32 or float64; zero where `keep` is False."""
    keep: torch.Tensor
    """[outputs, inputs]."""
    loss: torch.Tensor
    """`sum((w - q)²/U_jj²) / 2`, a scalar on the device."""


def sweep(
    weight: torch.Tensor, factor: InverseFactor, choose: Choose, slab: int = 128, every: int = 0, leaf: int = LEAF
) -> Swept:
    """Remove entries slab by slab, in each column by column, later columns taking up the errors.

    Args:
        weight: [outputs, inputs]; left as it is.
        factor: of its inputs' Gram matrix.
        choose: decides what stays.
        slab: columns whose errors the later slabs take up at once.
        every: asked for so many columns at a time, M for N:M targets; 0 for whole slabs. Divides `slab`.
        leaf: columns swept one at a time where `every` is 0.

    Raises:
        NonFiniteError: scores are NaN, told by `choose`, or weights became NaN, found at the end.
    """
    with phase("update"):
        work = at_least_float32(weight).t().clone(memory_format=torch.contiguous_format)
        if work.device.type != "cpu" or bool(factor.dead.any()):  # a device would have to be waited for
            work[factor.dead] = 0
        keep = torch.empty_like(work, dtype=torch.bool)
        loss = work.new_zeros(())
        for start in range(0, len(work), slab):
            end = min(start + slab, len(work))
            part = _Slab(work[start:end], keep[start:end], factor.upper[start:end, start:end], choose, start)
            errors = part.swept(every, leaf)
            loss += torch.linalg.vector_norm(errors).square() / 2
            _correct(work[end:], factor.upper[start:end, end:], errors)
        work += 0.0  # -0.0 becomes 0.0
        if bool(torch.isnan(loss)):  # errors hold every NaN that was swept
            raise NonFiniteError(f"{int(torch.isnan(work).sum())} of {work.numel()} weights became NaN in the sweep.")
        return Swept(work.t(), keep.t(), loss)


def _correct(work: torch.Tensor, upper: torch.Tensor, errors: torch.Tensor) -> None:
    """`W -= U' E` for the columns behind a slab, with U [columns of the slab, later columns]."""
    if len(work) and kernels.run(work.device, "host_sweep", lambda k: k.correct(work, upper, errors)) is None:
        work.addmm_(upper.t(), errors, alpha=-1)


class _Slab:
    """Some columns on their way through the sweep, all [columns, outputs]; views into the whole."""

    def __init__(self, work: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, choose: Choose, start: int) -> None:
        self._work, self._keep, self._upper, self._choose, self._start = work, keep, upper, choose, start
        self._inverse = upper.diagonal().reciprocal()[:, None]
        self._errors = torch.empty_like(work)
        """`(w - q)/U_jj`."""
        self._scale = torch.empty_like(work)
        """1/U_jj where an entry goes, 0 where it stays: an error is a product of two columns."""
        self._columns: list[tuple[torch.Tensor, ...]] = []

    def swept(self, every: int, leaf: int) -> torch.Tensor:
        """Sweep, and return the errors."""
        if not every:
            self._decide(0, len(self._work))
        errors = self._by_kernel(every)
        if errors is not None:
            return errors
        if not every:
            self._rescale(0, len(self._work))
        columns = (self._work.unbind(), self._scale.unbind(), self._errors.unbind(), self._upper.unbind(1))
        self._columns = list(zip(*columns, strict=True))
        self._halve(0, len(self._work), every or leaf, select=bool(every))
        self._work *= self._keep.view(torch.uint8)  # on a host twenty times as fast as `masked_fill_`; below, too
        return self._errors

    def _by_kernel(self, every: int) -> torch.Tensor | None:
        """The same by a kernel, all at once; None where there is none for it."""
        work, choose, keeps, removed = self._work, self._choose, 0, None
        if every and not (isinstance(choose, _Groups) and every == choose.target.of):
            return None
        if isinstance(choose, _Groups) and every:
            columns = slice(self._start, self._start + len(work))
            keeps, removed = choose.target.keep, None if choose.removed is None else choose.removed[:, columns]
        name, factor = kernels.sweeper(work.device), (self._upper, self._inverse)
        if name is None:
            return None
        return kernels.run(work.device, name, lambda k: k.sweep_slab(work, self._keep, *factor, keeps, every, removed))

    def _decide(self, first: int, last: int) -> None:
        scores = (self._work[first:last] * self._inverse[first:last]).square_()
        self._keep[first:last].copy_(self._choose(scores.t(), slice(self._start + first, self._start + last)).t())

    def _rescale(self, first: int, last: int) -> None:
        self._scale[first:last].copy_((~self._keep[first:last]).view(torch.uint8)).mul_(self._inverse[first:last])

    def _halve(self, first: int, last: int, leaf: int, select: bool) -> None:
        """The first half, its errors into the second by one product, the second half."""
        if last - first <= leaf:
            if select:
                self._decide(first, last)
                self._rescale(first, last)
            self._sweep(first, last)
            return
        middle = first + leaf * ((last - first - 1) // leaf // 2 + 1)
        self._halve(first, middle, leaf, select)
        self._work[middle:last].addmm_(self._upper[first:middle, middle:last].t(), self._errors[first:middle], alpha=-1)
        self._halve(middle, last, leaf, select)

    def _sweep(self, first: int, last: int) -> None:
        errors = self._errors[first:last].t()
        for done, (present, scale, error, upper) in enumerate(self._columns[first:last]):
            if done:
                present.addmv_(errors[:, :done], upper[first : first + done], alpha=-1)
            torch.mul(present, scale, out=error)

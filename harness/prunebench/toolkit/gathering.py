"""One pass of the calibration set through a block for statistics of what its matrices read; a second one for starved experts.

Each expert of a mixture reads the tokens that the router sends to it: another number in each batch, maybe none. One that saw
fewer tokens in all than a matrix of it has input columns is *starved* there: its norms would be noise or zero, and its Gram
matrix has no full rank. It is named in the record (note `starved experts`, with the tokens that it saw), and the statistics of
that matrix are made anew of *all* the block's tokens, shown to the expert for this alone, as if it were a dense MLP (so does
llm-compressor when it calibrates all experts). What the block computes does not change. The few tokens are not mixed in: a
statistic is any class, and the one thing that all have in common is what they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from prunebench.handles import Matrix
from prunebench.spec import Job
from prunebench.toolkit.experts import Experts, experts_in
from prunebench.toolkit.phases import phase
from prunebench.toolkit.stats import SharedStatistics, Statistic


class Starved:
    """The starved experts that a walk has met."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.tokens: dict[str, int] = {}
        """By matrix the tokens that it saw; of several passes those of the one that showed it the fewest."""

    def meet(self, tokens: Mapping[str, int]) -> None:
        """Note matrices that were starved in a pass."""
        for name, seen in tokens.items():
            self.tokens[name] = min(seen, self.tokens.get(name, seen))
        if self.tokens:
            self._job.note("starved experts", dict(self.tokens))
            self._job.note("statistics of starved experts", "of all tokens of their blocks, routed there or not")


def gather(
    root: nn.Module,
    modules: Mapping[Matrix, nn.Module],
    kinds: Sequence[type[Statistic]],
    batches: Callable[[], Iterable[torch.Tensor]],
    forward: Callable[[torch.Tensor], torch.Tensor],
    starved: Starved,
    work: Callable[[torch.Tensor], object] | None = None,
) -> Any:
    """Statistics of what each matrix's module reads while `forward` runs over the batches, as `Block.collect` returns them.

    Args:
        root: the block, or a copy of it.
        modules: of its matrices.
        kinds: of statistics.
        batches: the inputs [sequences, length, hidden], from the start each time it is called.
        forward: of the block.
        starved: is told which experts were.
        work: runs the block on a batch for something else, too; then nothing but this is done, except for starved experts.
    """
    with phase("statistics"):
        experts = experts_in(root)
        shared, tokens = _pass(modules, kinds, batches(), work or forward, experts, to_the_end=work is not None)
        hungry = {
            matrix: module
            for matrix, module in modules.items()
            if module in experts and shared.tokens(matrix.name) < min(matrix.shape[1], tokens)
        }
        values = {matrix: shared.values(matrix.name) for matrix in modules if matrix not in hungry}
        if hungry:
            starved.meet({matrix.name: shared.tokens(matrix.name) for matrix in hungry})
            with ExitStack() as stack:
                for owner in {experts[module][0] for module in hungry.values()}:
                    chosen = {experts[m][1] for m in hungry.values() if experts[m][0] is owner}
                    stack.enter_context(owner.showing(chosen))
                shared, _ = _pass(hungry, kinds, batches(), forward, experts)
            values |= {matrix: shared.values(matrix.name) for matrix in hungry}
    found: tuple[dict[Matrix, torch.Tensor], ...] = tuple(
        {matrix: values[matrix][i] for matrix in modules} for i in range(len(kinds))
    )
    return found[0] if len(kinds) == 1 else found


def _pass(
    modules: Mapping[Matrix, nn.Module],
    kinds: Sequence[type[Statistic]],
    batches: Iterable[torch.Tensor],
    forward: Callable[[torch.Tensor], object],
    experts: Mapping[nn.Module, tuple[Experts, int]],
    to_the_end: bool = False,
) -> tuple[SharedStatistics, int]:
    """The statistics of one pass, and how many tokens were in it."""
    shared, tokens = SharedStatistics(tuple(kinds), len(modules)), 0
    with _hooked(modules, shared, experts, to_the_end) as batch, torch.no_grad():
        for hidden in batches:
            batch[:] = hidden.shape[:2]
            with suppress(_AllRead):
                forward(hidden)
            shared.end_batch(hidden.shape[0])
            tokens += hidden.shape[0] * hidden.shape[1]
    return shared, tokens


class _AllRead(Exception):
    """Every matrix has read its input: ends a forward of which nobody reads the rest, in a LLaMA block a fifth of the work."""


@contextmanager
def _hooked(
    modules: Mapping[Matrix, nn.Module],
    shared: SharedStatistics,
    experts: Mapping[nn.Module, tuple[Experts, int]],
    to_the_end: bool,
) -> Iterator[list[int]]:
    """Show what each matrix's module reads to the statistics while the block runs.

    Yields cells for the batch: its sequences, and their length.
    """
    batch = [0, 0]

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            chosen = experts[module][0].chosen if module in experts else None
            of = None if chosen is None else chosen // batch[1]
            shared.see(name, args[0] if args else next(iter(kwargs.values())), batch[0], of)
            if shared.complete and not to_the_end:
                raise _AllRead

        return see

    handles = [module.register_forward_pre_hook(hook_for(m.name), with_kwargs=True) for m, module in modules.items()]
    try:
        yield batch
    finally:
        for handle in handles:
            handle.remove()

"""Laws that hold by a method's mathematics where it claims them, in float64, where rounding moves no mask.

They compare whole masks of two runs, so they see couplings that no count shows: between rows, on the order of columns, between
sparsities, between a block and those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from prunebench.spec import Changes, Claims
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing.interruptions import Kept, Killed
from prunebench.testing.models import INNER, tiny_model
from prunebench.testing.trial import (
    CheckFailed,
    Contents,
    Declined,
    Factory,
    Task,
    Trial,
    differing,
    failing,
    label,
    linears,
    refusal,
    tasks,
    zeros,
)
from prunebench.toolkit.anatomy import ModelAnatomy

TWO_KINDS: tuple[Target, ...] = (Unstructured(0.5), NM(2, 4))

RISING: tuple[tuple[Target, ...], ...] = (
    (Unstructured(0.25), Unstructured(0.5), Unstructured(0.6), Unstructured(0.8)),
    (NM(3, 4), NM(2, 4), NM(1, 4)),
)
"""What is removed at one target is removed at the next."""


@failing()
def check_rows_commute(make: Factory, family: str) -> None:
    """ROWS: permute the rows of a matrix, and those of its mask are permuted; of the first matrix, and of the last."""
    for task in _asked(make, family, Claims.ROWS, TWO_KINDS):
        plain = _pruned(make, family, task)
        for name in (next(iter(plain)), next(reversed(plain))):
            model = tiny_model(family, dtype=torch.float64)
            weight = linears(model)[name]
            order = _order(len(weight))
            weight.copy_(weight[order])
            wrong = int((_pruned(make, family, task, model)[name] != plain[name][order]).sum())
            if wrong:
                raise CheckFailed(
                    f"{wrong} zeros of {name} do not move with its rows when these are permuted, at {task}, "
                    f"and the pruner claims ROWS."
                )


@failing()
def check_channels_commute(make: Factory, family: str) -> None:
    """CHANNELS: permute what is inside all MLPs, and all masks are permuted with it."""
    for task in _asked(make, family, Claims.CHANNELS, (Unstructured(0.5), Unstructured(0.6))):
        model, order = tiny_model(family, dtype=torch.float64), _order(INNER)
        permute_channels(model, order)
        permuted = _pruned(make, family, task, model)
        for name, mask in _pruned(make, family, task).items():
            wrong = int((permuted[name] != _with_channels(mask, order)).sum())
            if wrong:
                raise CheckFailed(
                    f"{wrong} zeros of {name} do not move with the channels of the MLPs when these are permuted, at {task}, "
                    f"and the pruner claims CHANNELS."
                )


@failing()
def check_nested(make: Factory, family: str) -> None:
    """NESTED: what is removed at a target of `RISING` is removed at the next one that the pruner accepts."""
    accepted = _asked(make, family, Claims.NESTED, [target for ladder in RISING for target in ladder])
    pairs = [(low, high) for low, high in pairwise(accepted) if type(low.target) is type(high.target)]
    if not pairs:
        raise Declined(f"{label(make)} accepts {accepted[0]} alone, and nothing that rises from it.")
    found = {task: _pruned(make, family, task) for task in accepted}
    for low, high in pairs:
        for name, mask in found[low].items():
            back = int((mask & ~found[high][name]).sum())
            if back:
                raise CheckFailed(
                    f"{back} entries of {name} are removed at {low} and not at {high}, and the pruner claims NESTED."
                )


@failing()
def check_pruned_prefix(make: Factory, family: str) -> None:
    """PREFIX: where the first block comes pruned from an earlier step, the later blocks' masks are what they were."""
    asked = _asked(make, family, Claims.PREFIX, TWO_KINDS)
    model = tiny_model(family)
    follows = [task for task in asked if refusal(make(), model, Task(task.target, task.target)) is None]
    if not follows:
        raise Declined(f"{label(make)} refuses to follow an earlier step on {family}.")
    for task in follows:
        whole = Trial(make, family, task, dtype=torch.float64).prune()
        after = Task(task.target, task.target)
        again = Trial(make, family, after, dtype=torch.float64, lay=partial(_lay_first, whole.anatomy)).prune()
        masks, expected = zeros(again.model), zeros(whole.model)
        for matrix in (matrix for block in whole.anatomy.blocks[1:] for matrix in block.matrices):
            wrong = int((masks[matrix.name] != expected[matrix.name]).sum())
            if wrong:
                raise CheckFailed(
                    f"{wrong} zeros of {matrix.name} are others at {task} when an earlier step had pruned the block before it, "
                    f"and the pruner claims PREFIX."
                )


@failing()
def check_resumes(make: Factory, family: str) -> None:
    """BLOCKWISE: a step that is killed after a block, and goes on there, ends with the same bits, masks and notes."""
    if not make().claims() & Claims.BLOCKWISE:
        raise Declined(f"{label(make)} does not claim BLOCKWISE.")
    for task in tasks(make, family, TWO_KINDS):
        whole = Trial(make, family, task).prune()
        for done in range(1, len(whole.anatomy.blocks)):
            kept = Kept(done)
            killed = Trial(make, family, task, checkpoint=kept)
            try:
                killed.prune()
            except Killed:
                pass
            else:
                raise CheckFailed(f"no walk left a block at {task}, and the pruner claims BLOCKWISE.")
            again = Trial(make, family, task, checkpoint=kept).prune()
            differ = differing(whole.left(), again.left()) + differing(dict(whole.anatomy.masks), dict(again.anatomy.masks))
            if not differ and whole.notes != killed.notes | again.notes:
                differ = ["a note"]
            if differ:
                raise CheckFailed(
                    f"{differ[0]} is another at {task} when the step was killed after {done} of its blocks and went on there, "
                    f"and the pruner claims BLOCKWISE."
                )


def permute_channels(model: PreTrainedModel, order: torch.Tensor) -> None:
    """Permute the channels inside all MLPs of a tiny model, which leaves its function as it is.

    What has as many outputs as there are channels, or twice as many in one matrix, writes them; what has as many inputs reads
    them.
    """
    for name, weight in linears(model).items():
        weight.copy_(_with_channels(weight, order))
        bias = getattr(model.get_submodule(name), "bias", None)
        if bias is not None:
            bias.data.copy_(_with_channels(bias.data[:, None], order)[:, 0])


def _with_channels(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    if rows % INNER == 0:
        matrix = matrix[torch.cat([order + start for start in range(0, rows, INNER)])]
    return matrix[:, order] if columns == INNER else matrix


def _asked(make: Factory, family: str, claim: Claims, targets: Sequence[Target]) -> list[Task]:
    """At what the claim is tried.

    Raises:
        Declined: the pruner does not make the claim, or makes no masks of its own.
    """
    pruner = make()
    if not pruner.claims() & claim:
        raise Declined(f"{label(make)} does not claim {claim.name}.")
    accepted = tasks(make, family, targets)
    if not pruner.changes() & Changes.MASKS or accepted[0].earlier:
        raise Declined(f"{label(make)} claims {claim.name}, and has no masks but those of the step before it.")
    return accepted


def _pruned(make: Factory, family: str, task: Task, model: PreTrainedModel | None = None) -> Contents:
    return zeros(Trial(make, family, task, dtype=torch.float64, model=model).prune().model)


def _order(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(6))


def _lay_first(pruned: ModelAnatomy, anatomy: ModelAnatomy) -> None:
    """Give a model the first block of a pruned one, weights and masks."""
    theirs, ours = pruned.blocks[0], anatomy.blocks[0]
    ours.module.load_state_dict(theirs.module.state_dict())
    for matrix in ours.matrices:
        matrix.keep(pruned.masks[matrix.name])

"""What a pruned model is: laws, each a function of a pruner's class (or what makes one) and a family of tiny models.

A law returns nothing, raises `CheckFailed` with one sentence, or `Declined` where there is nothing that it could ask. Laws
count and compare on their own, without the handles and masks that pruner and audit share, and then ask the audit too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunebench.errors import RunError
from prunebench.spec import Changes
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing.models import tiny_model
from prunebench.testing.trial import (
    CheckFailed,
    Contents,
    Declined,
    Factory,
    Task,
    Trial,
    added,
    bits,
    contents,
    differing,
    failing,
    far_apart,
    first_of_each,
    label,
    lighter,
    linears,
    refusal,
    tasks,
    ties,
    without_head,
    zeros,
)
from prunebench.toolkit.adapter_files import load_adapters, save_adapters
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.audit import Before, audit
from prunebench.toolkit.experts import take_apart, together
from prunebench.toolkit.quiet import quiet_transformers

TARGETS: tuple[Target, ...] = (Unstructured(0.5), Unstructured(0.6), NM(2, 4), NM(4, 8), NM(1, 4))
"""The usual ones, and 1:4, which tells survivors from zeros (`methods.md` 1.4: some code counts the zeros of a group)."""

ODD_SHAPES: tuple[tuple[int, tuple[Target, ...]], ...] = (
    (20, (NM(2, 4), NM(1, 4), Unstructured(0.55))),
    (12, (NM(3, 4), NM(1, 4))),
    (21, (Unstructured(1 / 3), Unstructured(0.99), Unstructured(0.01))),
    (50, (Unstructured(0.7), Unstructured(0.58))),
)
"""Widths inside the MLPs, and what is asked there. Of 21 entries 0.99 leaves one, and 0.01 takes none; `50 * 0.58` is a hair
below 29 in floats, so 28 go."""


@failing()
def check_target_met(make: Factory, family: str, targets: Sequence[Target] = TARGETS) -> None:
    """After `prune` the zeros are exactly those of the target, in the group that `audit_group` names, and the audit agrees.

    A step that makes no masks, and may train for long, is asked at one unstructured and one N:M target.
    """
    accepted = tasks(make, family, targets)
    masks = bool(make().changes() & Changes.MASKS)
    for task in accepted if masks else first_of_each(accepted) or accepted:
        _check_counts(Trial(make, family, task).prune())


@failing()
def check_odd_shapes(make: Factory, family: str) -> None:
    """The same where widths are no powers of two, and shares of them no whole numbers: `ODD_SHAPES`."""
    refused = []
    for inner, targets in ODD_SHAPES:
        try:
            accepted = tasks(make, family, targets, inner)
        except Declined as reason:
            refused.append(reason)
            continue
        for task in accepted:
            _check_counts(Trial(make, family, task).prune())
    if len(refused) == len(ODD_SHAPES):
        raise refused[0]


@failing()
def check_zero_sparsity(make: Factory, family: str) -> None:
    """At a sparsity of 0 nothing is removed, and nothing changes but what the pruner declares besides the masks."""
    for task in tasks(make, family, [Unstructured(0.0)]):
        trial = Trial(make, family, task)
        before = contents(trial.model)
        trial.prune()
        removed = [name for name, mask in trial.anatomy.masks.items() if not bool(mask.all())]
        if removed:
            raise CheckFailed(f"the mask of {removed[0]} removes entries at a sparsity of 0.")
        undeclared = _undeclared(trial.model, before, trial.pruner.changes() & ~Changes.MASKS)
        if len(trial.anatomy.adapters) and not trial.pruner.changes() & Changes.ADAPTER:
            undeclared.append("what the matrices add up to, by adapters,")
        if undeclared:
            raise CheckFailed(f"{undeclared[0]} changed at a sparsity of 0, and the pruner does not declare it.")


@failing()
def check_declared_changes(make: Factory, family: str) -> None:
    """Only what `changes` declares differs afterwards, in any bit; survivors too, in their dtype, and ties stay."""
    accepted = tasks(make, family, TARGETS)
    for task in [accepted[0], *_after_earlier(make, family, accepted)[:1]]:
        trial = Trial(make, family, task)
        found, copied, tied = Before(trial.anatomy, trial.dense, False), contents(trial.model), ties(trial.model)
        changes = trial.prune().pruner.changes()
        if ties(trial.model) not in (tied, without_head(trial.model, tied) if changes & Changes.HEAD else tied):
            raise CheckFailed("parameters that shared one tensor were untied, or others were tied.")
        undeclared = _undeclared(trial.model, copied, changes)
        if undeclared:
            raise CheckFailed(f"{undeclared[0]} changed at {task}, and the pruner does not declare it.")
        # The audit counts what comes back among the survivors; ours were compared above, and the rest is another law's.
        found.check_declared(changes | Changes.KEPT_WEIGHTS if task.earlier else changes)


@failing()
def check_earlier_zeros(make: Factory, family: str) -> None:
    """What an earlier step removed stays removed, in the weights and in the masks, but where `changes` has MASK_MOVES."""
    if make().changes() & Changes.MASK_MOVES:
        raise Declined(f"{label(make)} declares MASK_MOVES, so zeros may come back.")
    later = _after_earlier(make, family, tasks(make, family, TARGETS))
    if not later:
        raise Declined(f"{label(make)} refuses to follow an earlier step on {family}.")
    for task in later:
        trial = Trial(make, family, task)
        found, gone, masks = Before(trial.anatomy, trial.dense, False), zeros(trial.model), trial.anatomy.masks.copy()
        left = zeros(trial.prune().model)
        for name in gone.keys() & left.keys():
            back = int((gone[name] & ~left[name]).sum())
            if back:
                raise CheckFailed(f"{back} zeros of {name} came back at {task}, and the pruner does not declare MASK_MOVES.")
        for name, mask in trial.anatomy.masks.items():
            back = int((mask & ~masks[name]).sum())
            if back:
                raise CheckFailed(f"the mask of {name} keeps {back} entries again at {task}, and MASK_MOVES is not declared.")
        found.check_masks(trial.pruner.changes())


@failing()
def check_saves(make: Factory, family: str) -> None:
    """What `save_pretrained` writes and `from_pretrained` reads has the same bits, the same zeros and the same ties.

    Adapters, saved beside it, add the same.
    """
    trial = Trial(make, family, tasks(make, family, TARGETS)[0]).prune()
    model = trial.model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        with together(model):
            model.save_pretrained(folder)
        again: PreTrainedModel = type(model).from_pretrained(folder, dtype=model.dtype)
        take_apart(again)
        save_adapters(trial.anatomy, Path(folder))
        anatomy = find_anatomy(again)
        load_adapters(anatomy, Path(folder))
    if ties(again) != ties(model):
        raise CheckFailed("parameters that share one tensor do not when the saved model is read back, or others do.")
    differ = differing(contents(model), contents(again)) or differing(zeros(model), zeros(again))
    if differ:
        raise CheckFailed(f"{differ[0]} is another when the saved model is read back.")
    differ = far_apart(added(trial.anatomy), added(anatomy))
    if differ:
        raise CheckFailed(f"the adapter of {differ[0]} is another when it is read back.")


def _after_earlier(make: Factory, family: str, accepted: Sequence[Task]) -> list[Task]:
    """Of the accepted tasks the first unstructured one and the first N:M one, each after an earlier step that removed less;
    for a step that makes no masks as much."""
    found = [task if task.earlier else Task(task.target, lighter(task.target)) for task in first_of_each(accepted)]
    model = tiny_model(family)
    return [task for task in found if task.earlier and refusal(make(), model, task) is None]


def _check_counts(trial: Trial) -> None:
    """Ask the audit, and count."""
    task, explained = trial.task, "extra_zeros" in trial.notes
    try:
        audit(trial.anatomy, task.target, trial.group, explained)
    except RunError as error:
        raise CheckFailed(f"the audit fails at {task}: {error}") from error
    for name, count, wanted in _counts(zeros(trial.model), task.target, trial.group):
        wrong = (count < wanted) if explained else (count != wanted)
        if bool(wrong.any()):
            raise CheckFailed(f"{name} has {int(count[wrong][0])} zeros at {task}, and exactly {wanted} were asked for.")


def _counts(found: Contents, target: Target, group: str) -> list[tuple[str, torch.Tensor, int]]:
    """For each matrix, or for the model, the zeros of each comparison group and how many there must be."""
    if isinstance(target, NM):
        return [(name, z.reshape(len(z), -1, target.of).sum(-1), target.of - target.keep) for name, z in found.items()]
    if group == "row":
        return [(f"a row of {name}", zero.sum(1), int(zero.shape[1] * target.sparsity)) for name, zero in found.items()]
    if group == "matrix":
        return [(name, zero.sum().view(1), int(zero.numel() * target.sparsity)) for name, zero in found.items()]
    if group.startswith("columns:"):
        width = int(group.removeprefix("columns:"))
        slabs = [(name, slab) for name, zero in found.items() for slab in torch.split(zero, width, dim=1)]
        return [(f"a slab of {name}", slab.sum().view(1), int(slab.numel() * target.sparsity)) for name, slab in slabs]
    total = torch.stack([zero.sum() for zero in found.values()]).sum().view(1)
    return [("the model", total, int(sum(zero.numel() for zero in found.values()) * target.sparsity))]


def _undeclared(model: PreTrainedModel, before: Contents, changes: Changes) -> list[str]:
    """Names of what differs beyond the declaration; entries of prunable weights may become zero, and what was zero is the
    matter of another law. Nothing declares another shape or dtype."""
    now, matrices = contents(model), {f"{name}.weight" for name in linears(model)}
    found = []
    for name in differing(before, now):
        one, other = before.get(name), now.get(name)
        if one is not None and other is not None and (one.shape, one.dtype) != (other.shape, other.dtype):
            allowed = False
        elif name in matrices and one is not None and other is not None:
            changed = (bits(one) != bits(other)).any(-1) & (one != 0)
            if changes & Changes.MASKS:
                changed &= other != 0
            allowed = bool(changes & Changes.KEPT_WEIGHTS) or not bool(changed.any())
        else:
            allowed = bool(changes & _declaration(model, name))
        if not allowed:
            found.append(name)
    return found


def _declaration(model: PreTrainedModel, name: str) -> Changes:
    """What covers a parameter outside the prunable matrices."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return Changes.NOTHING  # it is gone, and nothing declares that
    kinds = Changes.BIASES if leaf == "bias" else Changes.NOTHING
    kinds |= Changes.NORMS if "norm" in type(module).__name__.lower() else Changes.NOTHING
    return kinds | (Changes.HEAD if module is model.get_output_embeddings() else Changes.NOTHING)  # type: ignore[no-untyped-call]

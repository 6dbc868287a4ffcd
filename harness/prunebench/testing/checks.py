"""The laws that every pruner keeps, each a function of a pruner's class (or what makes one) and a family of tiny models.

A law returns nothing, raises `CheckFailed` with one sentence, or `Declined` where the pruner refuses all that it would ask.
They count and compare on their own, without the handles and masks that pruner and audit share, and then ask the audit too.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunebench.errors import RunError
from prunebench.options import option_values
from prunebench.spec import Changes, JobFacts, Needs, Pruner
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing.models import SAMPLES, tiny_model
from prunebench.testing.traces import Traces
from prunebench.testing.trial import (
    CheckFailed,
    Contents,
    Factory,
    Task,
    Trial,
    added,
    bits,
    contents,
    differing,
    failing,
    far_apart,
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
from prunebench.toolkit.loading import quiet_transformers
from prunebench.toolkit.state import capture, differences, guarded

TARGETS: tuple[Target, ...] = (Unstructured(0.5), Unstructured(0.6), NM(2, 4), NM(4, 8), NM(1, 4))
"""The usual ones, and 1:4, which tells survivors from zeros (`methods.md` 1.4: some code counts the zeros of a group)."""

ODD = 21
"""A width that no N:M pattern of the targets fits."""


@failing()
def check_target_met(make: Factory, family: str, targets: Sequence[Target] = TARGETS) -> None:
    """After `prune` the zeros are exactly those of the target, in the group that `audit_group` names, and the audit agrees."""
    for task in tasks(make, family, targets):
        trial = Trial(make, family, task).prune()
        explained = "extra_zeros" in trial.notes
        try:
            audit(trial.anatomy, task.target, trial.group, explained)
        except RunError as error:
            raise CheckFailed(f"the audit fails at {task}: {error}") from error
        for name, count, wanted in _counts(zeros(trial.model), task.target, trial.group):
            wrong = (count < wanted) if explained else (count != wanted)
            if bool(wrong.any()):
                raise CheckFailed(f"{name} has {int(count[wrong][0])} zeros at {task}, and exactly {wanted} were asked for.")


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
    """Only what `changes` declares differs afterwards, in any bit; survivors too, ties stay, and earlier masks hold."""
    accepted = tasks(make, family, TARGETS)
    grown = Task(accepted[0].target, lighter(accepted[0].target))
    grows = grown.earlier is not None and refusal(make(), tiny_model(family), grown) is None
    for task in [accepted[0], grown] if grows else accepted[:2]:
        trial = Trial(make, family, task)
        found, copied, tied = Before(trial.anatomy, trial.dense, False), contents(trial.model), ties(trial.model)
        gone = zeros(trial.model)
        changes = trial.prune().pruner.changes()
        if ties(trial.model) not in (tied, without_head(trial.model, tied) if changes & Changes.HEAD else tied):
            raise CheckFailed("parameters that shared one tensor were untied, or others were tied.")
        revived = [name for name, zero in zeros(trial.model).items() if bool((gone[name] & ~zero).any())]
        if revived and not changes & Changes.MASK_MOVES:
            raise CheckFailed(f"zeros of {revived[0]} came back at {task}, and the pruner does not declare MASK_MOVES.")
        undeclared = _undeclared(trial.model, copied, changes)
        if undeclared:
            raise CheckFailed(f"{undeclared[0]} changed at {task}, and the pruner does not declare it.")
        found.check_masks(changes)
        found.check_declared(changes)


@failing()
def check_same_seed(make: Factory, family: str) -> None:
    """The same job gives the same bits, whatever state the global generators are in, and when an instance is used again."""
    task = tasks(make, family, TARGETS)[0]
    pruner = make()
    results = []
    with guarded([]):
        for stir in (1, 2):
            random.seed(stir)
            np.random.seed(stir)
            torch.manual_seed(stir)
            results.append(Trial(make, family, task, pruner=pruner).prune().left())
    differ = differing(*results)
    if differ:
        raise CheckFailed(f"{differ[0]} differs between two runs of one instance with the same seed.")


@failing()
def check_batch_splits(make: Factory, family: str) -> None:
    """Batches of 1, of 3 and of all: the same masks but for max(2, 0.01%) of a matrix, and quite the same in float64.

    Adapters too add the same in float64, to a millionth.
    """
    task = tasks(make, family, TARGETS)[0]
    for dtype in (torch.float32, torch.float64):
        sizes = (SAMPLES, 3, 1)
        trials = [Trial(make, family, task, dtype=dtype, batch_size=size).prune() for size in sizes]
        found = [zeros(trial.model) for trial in trials]
        for size, trial in zip(sizes[1:], trials[1:], strict=True):
            differ = far_apart(added(trials[0].anatomy), added(trial.anatomy)) if dtype == torch.float64 else []
            if differ:
                raise CheckFailed(f"batches of {size} and of {SAMPLES} differ in the adapter of {differ[0]} in float64.")
        for size, masks in zip(sizes[1:], found[1:], strict=True):
            for name, mask in masks.items():
                count = int((mask != found[0][name]).sum())
                if count > (max(2, mask.numel() // 10_000) if dtype == torch.float32 else 0):
                    kind = str(dtype).removeprefix("torch.")
                    raise CheckFailed(f"batches of {size} and of {SAMPLES} differ in {count} zeros of {name} in {kind}.")


@failing()
def check_nothing_left(make: Factory, family: str) -> None:
    """No hook, gradient, flag, mode, attribute, module, setting, global state, output, warning or open walk is left.

    But for what is declared: the hooks of attached adapters, and the settings of an untied head.
    """
    trial = Trial(make, family, tasks(make, family, TARGETS)[0])
    for index, parameter in enumerate(trial.model.parameters()):
        parameter.requires_grad_(index % 2 == 0)  # so that setting all of them either way shows
    traces, options = Traces(trial.model), option_values(trial.pruner)
    written = trial.prune().written.getvalue().strip()
    if trial.pruner.changes() & Changes.ADAPTER:
        trial.anatomy.adapters.detach()
    for sentence in traces.left(may_untie=bool(trial.pruner.changes() & Changes.HEAD)):
        raise CheckFailed(f"the pruner {sentence}.")
    if trial.state_changed:
        raise CheckFailed(f"the pruner left changed: {', '.join(trial.state_changed)}.")
    if written:
        raise CheckFailed(f"the pruner printed {written[:60]!r}; it says things by job.progress and job.note.")
    if trial.warned:
        raise CheckFailed(f"the pruner let a warning through: {trial.warned[0][:200]}")
    if trial.placement.held:
        raise CheckFailed("the pruner left a walk open, which holds a block and the hidden states.")
    if option_values(trial.pruner) != options:
        raise CheckFailed("the pruner changed its own options, so the record would name others than those asked for.")


@failing()
def check_saves(make: Factory, family: str) -> None:
    """What `save_pretrained` writes and `from_pretrained` reads has the same bits, the same zeros and the same ties.

    Adapters, saved beside it, add the same.
    """
    trial = Trial(make, family, tasks(make, family, TARGETS)[0]).prune()
    model = trial.model
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        again: PreTrainedModel = type(model).from_pretrained(folder, dtype=model.dtype)
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


@failing()
def check_refuses_first(make: Factory, family: str) -> None:
    """What does not fit is refused with a reason, and asking `refuses`, `needs`, `changes`, `audit_group` touches nothing."""
    pruner, model = make(), tiny_model(family, inner=ODD)
    before, traces, state, anatomy = contents(model), Traces(model), capture(), find_anatomy(model)
    for target in TARGETS:
        facts = anatomy.facts(target)
        answers = _answers(pruner, facts)
        if answers != _answers(pruner, facts):
            raise CheckFailed(f"the pruner answers otherwise when it is asked about {target} a second time.")
        _check_answers(answers)
        misfits = isinstance(target, NM) and bool(pruner.changes() & Changes.MASKS)
        if misfits and not (facts.misfit() or answers["refuses"]):
            raise CheckFailed(f"{target} does not fit an input width of {ODD}, and nothing refuses it.")
    differ = differing(before, contents(model))
    if differ:
        raise CheckFailed(f"asking the pruner questions changed {differ[0]}.")
    for sentence in traces.left():
        raise CheckFailed(f"asking the pruner questions {sentence}.")
    if changed := differences(state, capture()):
        raise CheckFailed(f"asking the pruner questions left changed: {', '.join(changed)}.")


CHECKS: Mapping[str, Callable[[Factory, str], None]] = {
    "target_met": check_target_met,
    "zero_sparsity": check_zero_sparsity,
    "declared_changes": check_declared_changes,
    "same_seed": check_same_seed,
    "batch_splits": check_batch_splits,
    "nothing_left": check_nothing_left,
    "saves": check_saves,
    "refuses_first": check_refuses_first,
}
"""The laws by name, as excuses and test ids call them."""


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
    """Names of what differs beyond the declaration; entries of prunable weights may become zero, or come back from it."""
    now, matrices = contents(model), {f"{name}.weight" for name in linears(model)}
    found = []
    for name in differing(before, now):
        if name in matrices and before[name].shape == now[name].shape:
            changed = (bits(before[name]) != bits(now[name])).any(-1)
            if changes & Changes.MASKS:
                changed &= now[name] != 0
            if changes & Changes.MASK_MOVES:
                changed &= before[name] != 0
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


def _answers(pruner: Pruner, facts: JobFacts) -> dict[str, Any]:
    return {
        "needs": pruner.needs(),
        "changes": pruner.changes(),
        "audit_group": pruner.audit_group(),
        "refuses": pruner.refuses(facts),
    }


def _check_answers(answers: dict[str, Any]) -> None:
    allowed: dict[str, Callable[[Any], bool]] = {
        "needs": lambda answer: isinstance(answer, Needs),
        "changes": lambda answer: isinstance(answer, Changes),
        "audit_group": lambda answer: bool(re.fullmatch(r"row|matrix|model|columns:[1-9]\d*", str(answer))),
        "refuses": lambda answer: answer is None or (isinstance(answer, str) and bool(answer.strip())),
    }
    for question, fits in allowed.items():
        if not fits(answers[question]):
            raise CheckFailed(f"{question}() answers {answers[question]!r}, which is none of its answers.")

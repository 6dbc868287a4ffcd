"""How a pruner goes about it: repeatable, for any batches and any placement, silent, leaving nothing, refusing first."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from prunebench.answers import WITHOUT_A_JOB, ask
from prunebench.errors import PluginError
from prunebench.options import option_values
from prunebench.spec import Changes, JobFacts, Pruner
from prunebench.targets import NM
from prunebench.testing.checks import TARGETS
from prunebench.testing.models import SAMPLES, tiny_model
from prunebench.testing.placements import Moved
from prunebench.testing.traces import Traces
from prunebench.testing.trial import (
    CheckFailed,
    Factory,
    Trial,
    added,
    contents,
    differing,
    failing,
    far_apart,
    tasks,
    zeros,
)
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.state import capture, differences, guarded

ODD = 21
"""A width that no N:M pattern of the targets fits."""


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
def check_streaming(make: Factory, family: str) -> None:
    """Blocks that move to a device and back, one at a time, end with the same bits as a model that stays where it is."""
    task = tasks(make, family, TARGETS)[0]
    resident = Trial(make, family, task).prune()
    try:
        streamed = Trial(make, family, task, placement=Moved()).prune()
    except CheckFailed as failure:
        raise CheckFailed(f"with streamed blocks, and only so, {failure}") from failure
    differ = differing(resident.left(), streamed.left())
    if differ:
        raise CheckFailed(
            f"{differ[0]} is another at {task} when blocks are streamed; a weight is where `matrix.weight` says at that moment."
        )


@failing()
def check_silent(make: Factory, family: str) -> None:
    """Nothing is printed or logged, and no warning comes through."""
    trial = Trial(make, family, tasks(make, family, TARGETS)[0]).prune()
    written = trial.written.getvalue().strip()
    if written:
        raise CheckFailed(f"the pruner printed {written[:60]!r}; it says things by job.progress and job.note.")
    if trial.logged:
        raise CheckFailed(f"the pruner logged {trial.logged[0][:60]!r}; it says things by job.progress and job.note.")
    if trial.warned:
        raise CheckFailed(f"the pruner let a warning through: {trial.warned[0][:200]}")


@failing()
def check_nothing_left(make: Factory, family: str) -> None:
    """No hook, gradient, flag, mode, attribute, module, setting, global state or open walk is left.

    But for what is declared: the hooks of attached adapters, and the settings of an untied head.
    """
    trial = Trial(make, family, tasks(make, family, TARGETS)[0])
    for index, parameter in enumerate(trial.model.parameters()):
        parameter.requires_grad_(index % 2 == 0)  # so that setting all of them either way shows
    traces, options = Traces(trial.model), option_values(trial.pruner)
    trial.prune()
    if trial.pruner.changes() & Changes.ADAPTER:
        trial.anatomy.adapters.detach()
    for sentence in traces.left(may_untie=bool(trial.pruner.changes() & Changes.HEAD)):
        raise CheckFailed(f"the pruner {sentence}.")
    if trial.state_changed:
        raise CheckFailed(f"the pruner left changed: {', '.join(trial.state_changed)}.")
    if trial.placement.held:
        raise CheckFailed("the pruner left a walk open, which holds a block and the hidden states.")
    if option_values(trial.pruner) != options:
        raise CheckFailed("the pruner changed its own options, so the record would name others than those asked for.")


@failing()
def check_refuses_first(make: Factory, family: str) -> None:
    """What does not fit is refused with a reason, and the questions that a pruner is asked touch nothing."""
    pruner, model = make(), tiny_model(family, inner=ODD)
    before, traces, state, anatomy = contents(model), Traces(model), capture(), find_anatomy(model)
    for target in TARGETS:
        facts = anatomy.facts(target)
        answers = _answers(pruner, facts)
        if answers != _answers(pruner, facts):
            raise CheckFailed(f"the pruner answers otherwise when it is asked about {target} a second time.")
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


def _answers(pruner: Pruner, facts: JobFacts) -> dict[str, Any]:
    try:
        return {question: ask(pruner, question) for question in WITHOUT_A_JOB} | {"refuses": ask(pruner, "refuses", facts)}
    except PluginError as error:
        raise CheckFailed(str(error)) from error

"""Better than random: a law on the trained model that ships with the package, as random models have nothing to lose.

wiki7m and its texts are found beside the package, in a clone and in an installed wheel. Losses are of text that nothing is
calibrated on or trained with: 4.51 nats a token of the dense model, 6.12 after random pruning at 0.5 with a standard deviation
of 0.06 over seeds, 4.55 after magnitude pruning, the plainest of methods.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from prunebench.shipped import suites_folder
from prunebench.spec import Changes
from prunebench.targets import NM, Target, Unstructured
from prunebench.testing.trial import CheckFailed, Declined, Factory, Task, Trial, failing, label, linears, tasks
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.loading import ModelSource, load_model
from prunebench.toolkit.quiet import quiet_transformers

QUICKSTART = "quickstart"
"""The trained model, where a law names a family."""

LENGTH = 128
CALIBRATION_SAMPLES = 4
TRAINING_SAMPLES = 16
EVALUATION_SAMPLES = 8

RANDOM_SEEDS = range(5)
DEVIATIONS = 6.0
"""How far below the mean of random pruning a loss must be, in standard deviations over `RANDOM_SEEDS`: no seed gets there."""

SLACK = 0.01
"""Nats by which a step that makes no masks may end worse than it began: as much as rounding and luck make of nothing."""


TARGETS: tuple[Target, ...] = (Unstructured(0.5), NM(2, 4))


@failing()
def check_better_than_random(make: Factory, family: str = QUICKSTART) -> None:
    """On text that the pruner has not seen the pruned model loses clearly less than one that was pruned at random.

    A step that needs another before it follows magnitude pruning; one that makes no masks must not leave the model worse than
    it found it.
    """
    if family != QUICKSTART:
        raise CheckFailed(f"a random model has nothing to lose: this law is for the family {QUICKSTART!r}, not {family!r}.")
    masks = bool(make().changes() & Changes.MASKS)
    accepted = tasks(make, family, TARGETS if masks else TARGETS[1:], model=copy.deepcopy(_shipped()))
    following = [task for task in accepted if task.earlier]
    if not masks and not following:
        raise Declined(f"{label(make)} refuses to follow an earlier step.")
    for task in accepted if masks else following:
        trial = Trial(make, family, task, model=copy.deepcopy(_shipped()), lay=_by_magnitude(task), texts=_texts())
        bound = _random_bound(task.target) if masks else _loss(trial.model) + SLACK
        loss = _loss(trial.prune().model)
        if not loss < bound:
            than = "random pruning would leave at least" if masks else "before the step it was"
            raise CheckFailed(f"the loss on text that the pruner has not seen is {loss:.3f} at {task}, and {than} {bound:.3f}.")


def remove_lowest(model: PreTrainedModel, scores: Mapping[str, torch.Tensor], target: Target) -> None:
    """Zero the entries of lowest score in each row, or group of M, without the toolkit.

    Args:
        model: changed in place.
        scores: [outputs, inputs] for each prunable matrix.
        target: unstructured or N:M.
    """
    for name, weight in linears(model).items():
        width = target.of if isinstance(target, NM) else weight.shape[1]
        count = width - target.keep if isinstance(target, NM) else int(width * target.sparsity)
        groups = scores[name].reshape(-1, width)
        lowest = groups.topk(count, dim=1, largest=False).indices
        gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True)
        weight.masked_fill_(gone.view(weight.shape), 0)


def _by_magnitude(task: Task) -> Callable[[ModelAnatomy], None] | None:
    """What an earlier step does, if the task is to follow one."""
    if task.earlier is None:
        return None

    def lay(anatomy: ModelAnatomy) -> None:
        remove_lowest(anatomy.model, {name: weight.abs() for name, weight in linears(anatomy.model).items()}, task.target)
        for matrix in anatomy.matrices:
            matrix.keep(matrix.weight != 0)

    return lay


@cache
def _random_bound(target: Target) -> float:
    """What no seed of random pruning comes down to."""
    losses = []
    for seed in RANDOM_SEEDS:
        model, generator = copy.deepcopy(_shipped()), torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(weight.shape, generator=generator) for name, weight in linears(model).items()}
        remove_lowest(model, scores, target)
        losses.append(_loss(model))
    return statistics.fmean(losses) - DEVIATIONS * statistics.stdev(losses)


def _loss(model: PreTrainedModel) -> float:
    """Mean over the tokens of the evaluation windows, in nats."""
    windows = _windows("evaluation", EVALUATION_SAMPLES)
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten()))


def _texts() -> dict[str, torch.Tensor]:
    return {
        "tokens": _windows("calibration", CALIBRATION_SAMPLES),
        "training": _windows("training", TRAINING_SAMPLES),
        "validation": _windows("validation", CALIBRATION_SAMPLES),
    }


@cache
def _shipped() -> PreTrainedModel:
    """The model, which nobody changes: copies are pruned."""
    return load_model(ModelSource(_folder() / "wiki7m", "wiki7m", "local"), "float32")


@cache
def _windows(text: str, samples: int) -> torch.Tensor:
    """Token windows [samples, length], spread evenly over a shipped text."""
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(_folder() / "wiki7m")
    ids = tokenizer((_folder() / "texts" / f"{text}.txt").read_text(encoding="utf-8"), verbose=False)["input_ids"]
    starts = range(0, len(ids), len(ids) // samples)[:samples]
    return torch.tensor([ids[start : start + LENGTH] for start in starts])


def _folder() -> Path:
    return suites_folder() / "quickstart"

"""The order of the literature on a small trained model: magnitude, wanda, gblm, regional gradients, sparsegpt, wanda++ at 2:4.

Three calibration samples of TinyStories' training text; a difference counts when the mean difference of log-perplexity over the
samples is at least twice its standard error. The learning rate of wanda++ is chosen on the last tenth of that text, from which
no calibration is drawn; the evaluation tokens are those beside the golden masks.
"""

from __future__ import annotations

import math
import random
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support import make_job
from test_golden import GOLDEN, MIRROR, loaded
from transformers import AutoTokenizer, PreTrainedModel

from prunebench.spec import Pruner
from prunebench.targets import NM
from prunebench.toolkit.texts import load_text
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no trained model: {GOLDEN} is not there, and no PRUNEBENCH_MIRROR has it"),
]

NAME, WINDOW, SAMPLES = "stories260K", 256, 32
LEARNING_RATES = (1e-4, 3e-4, 1e-3)


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """The training text as tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNEBENCH_MIRROR", str(MIRROR))
        rows = load_text("roneneldan/TinyStories:train", "train", Path()).rows
    ids = AutoTokenizer.from_pretrained(MIRROR / "models" / NAME)(rows[0], verbose=False)["input_ids"]
    return torch.tensor(ids)


def perplexity(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    losses = []
    with torch.no_grad():
        for batch in windows.split(16):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            losses += [float(torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())) * len(batch)]
    return math.exp(sum(losses) / len(windows))


def pruned(pruner: Pruner, calibration: torch.Tensor, seed: int) -> PreTrainedModel:
    model = loaded(NAME)
    pruner.prune(make_job(model, calibration, target=NM(2, 4), batch_size=16, seed=seed))
    return model


def sampled(text: torch.Tensor, seed: int) -> torch.Tensor:
    draw = random.Random(seed)
    starts = [draw.randrange(len(text) * 9 // 10 - WINDOW) for _ in range(SAMPLES)]
    return torch.stack([text[start : start + WINDOW] for start in starts])


def test_the_order_of_the_literature(text: torch.Tensor) -> None:
    validation = text[len(text) * 9 // 10 :][: 40 * WINDOW]
    tried = {
        rate: perplexity(pruned(WandaPlusPlus(learning_rate=rate), sampled(text, 0), 0), validation) for rate in LEARNING_RATES
    }
    methods = {
        "magnitude": Magnitude(),
        "wanda": Wanda(),
        "gblm": Gblm(),
        "regional gradients": WandaPlusPlus(ro=False),
        "sparsegpt": SparseGpt(),
        "wanda++": WandaPlusPlus(learning_rate=min(tried, key=tried.__getitem__)),
    }
    evaluation = torch.from_numpy(np.load(GOLDEN / NAME / "eval.npy"))
    found = {
        name: [math.log(perplexity(pruned(pruner, sampled(text, seed), seed), evaluation)) for seed in range(3)]
        for name, pruner in methods.items()
    }
    shown = {name: [round(math.exp(value), 2) for value in values] for name, values in found.items()}
    for worse, better in pairwise(methods):
        differences = [a - b for a, b in zip(found[worse], found[better], strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        assert statistics.fmean(differences) >= 2 * error > 0, (worse, better, shown, tried)
    assert statistics.fmean(found["sparsegpt"]) - statistics.fmean(found["wanda++"]) > 0.5, shown

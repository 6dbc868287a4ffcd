"""Perplexity over non-overlapping windows, as in the papers (`methods.md` 1.5).

Each window's mean cross-entropy over its `window - 1` predictions counts equally; the value is the exponential of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunebench.bench.evals.blockwise import Predictor, predictor
from prunebench.bench.evals.windows import WindowEval
from prunebench.errors import NonFiniteError
from prunebench.spec import EvalJob, Sample, Score

_NOTHING = -100
"""No token: a position whose prediction is not counted."""


@dataclass
class Perplexity(WindowEval):
    """Perplexity of a causal language model on a text."""

    name: ClassVar[str] = "perplexity"
    revision: ClassVar[int] = 1

    def measure(self, job: EvalJob) -> Score:
        """Negative log-likelihood of every window, with the document its first token is in."""
        losses = self._losses(job)
        mean = math.fsum(losses) / len(losses)
        if not math.isfinite(mean):
            bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
            raise NonFiniteError(
                f"the likelihood of {len(bad)} of {len(losses)} windows is not finite, first of window {bad[0]}."
            )
        if mean > 700:
            raise NonFiniteError(f"the mean negative log-likelihood is {mean:.1f}, whose exponential is not finite.")
        items: dict[str, Sequence[float | int | str]] = {
            "nll": [round(x, 6) for x in losses],
            "document": self.documents(job),
        }
        return Score(math.exp(mean), "perplexity", False, items, sample=Sample("nll", exponential=True, documents="document"))

    def again(self, job: EvalJob, chosen: Sequence[int]) -> dict[str, list[float | int | str]]:
        """Only these windows: `nll` and `document` as `measure` finds them."""
        documents = self.documents(job)
        return {"nll": [*self._losses(job, chosen)], "document": [documents[row] for row in chosen]}

    def _losses(self, job: EvalJob, chosen: Sequence[int] | None = None) -> list[float]:
        losses: list[float] = []
        with torch.no_grad():
            windows = self.cut(job, chosen=chosen)
            predict = predictor(job, windows)
            for ids in windows.batches(job):
                losses += _window_losses(predict, ids)
        return losses


def _window_losses(predict: Predictor, ids: torch.Tensor) -> list[float]:
    """Mean cross-entropy of each window's predictions, in float32 whatever the model's dtype."""
    logits = predict(ids).float()
    # The last position predicts nothing here; it is left in, because to cut it off would copy the logits.
    wanted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=_NOTHING)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=_NOTHING)
    return (losses.view_as(ids)[:, :-1].mean(dim=1)).tolist()

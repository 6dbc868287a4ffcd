"""How far the pruned model is from the dense one, prediction by prediction, on the windows of text that perplexity takes.

For each predicted token `KL(dense || pruned) = sum_v p_v (log p_v - log q_v)` in nats, p the dense model's distribution over
the vocabulary and q the pruned one's, both by a log-softmax in float32; and whether both find the same token the most likely
(of equals the first). The value is the mean over all predictions. Two models of one perplexity may be far from each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from prunebench.bench.evals.blockwise import dense_predictor, predictor
from prunebench.bench.evals.windows import WindowEval
from prunebench.errors import NonFiniteError
from prunebench.spec import EvalFacts, EvalJob, JsonDict, Sample, Score


@dataclass
class Divergence(WindowEval):
    """Divergence of the pruned model's predictions from the dense model's on a text."""

    name: ClassVar[str] = "divergence"
    revision: ClassVar[int] = 1

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Those of perplexity, and what is compared with what."""
        return {**super().conditions(facts), "direction": "KL(dense || pruned) over the whole vocabulary"}

    def measure(self, job: EvalJob) -> Score:
        """Mean divergence and agreement of every window, with the document its first token is in."""
        divergences, agreements = self._compared(job)
        bad = [i for i, divergence in enumerate(divergences) if not math.isfinite(divergence)]
        if bad:
            raise NonFiniteError(
                f"the divergence of {len(bad)} of {len(divergences)} windows is not finite, first of window {bad[0]}."
            )
        items: dict[str, Sequence[float | int | str]] = {
            "kl": [round(x, 8) for x in divergences],
            "agreement": [round(x, 6) for x in agreements],
            "document": self.documents(job),
        }
        return Score(
            math.fsum(divergences) / len(divergences),
            "KL, nats",
            False,
            items,
            parts={"top-1 agreement": math.fsum(agreements) / len(agreements)},
            sample=Sample("kl", documents="document"),
        )

    def again(self, job: EvalJob, chosen: Sequence[int]) -> dict[str, list[float | int | str]]:
        """Only these windows: `kl`, `agreement` and `document` as `measure` finds them."""
        divergences, agreements = self._compared(job, chosen)
        documents = self.documents(job)
        return {"kl": [*divergences], "agreement": [*agreements], "document": [documents[row] for row in chosen]}

    def _compared(self, job: EvalJob, chosen: Sequence[int] | None = None) -> tuple[list[float], list[float]]:
        divergences: list[float] = []
        agreements: list[float] = []
        with torch.no_grad():
            windows = self.cut(job, models=2, chosen=chosen)
            dense, pruned = dense_predictor(job, windows), predictor(job, windows)
            for ids in windows.batches(job):
                found = _compare(dense(ids), pruned(ids))
                divergences += found[0].tolist()
                agreements += found[1].tolist()
        return divergences, agreements


def _compare(logits_p: torch.Tensor, logits_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean divergence and share of equal first choices of each window's predictions, [windows] each.

    Windows are taken one at a time: what is as large as the logits is then made for one only.
    """
    divergences, agreements = [], []
    for window_p, window_q in zip(logits_p, logits_q, strict=True):
        log_p, log_q = (logits[:-1].float().log_softmax(dim=-1) for logits in (window_p, window_q))  # [window - 1, vocabulary]
        agreements.append((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).float().mean())
        divergence = (log_p.exp() * log_p.sub(log_q)).sum(dim=-1).mean()
        divergences.append(divergence.clamp(min=0))  # rounding alone can make it negative; NaN stays NaN
    return torch.stack(divergences), torch.stack(agreements)

"""lm-eval's own model class on the model in memory, with batches by length."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from prunebench.errors import DataError
from prunebench.spec import EvalJob

HOST_TOKENS, DEVICE_LOGITS = 1024, 1 << 28
"""How much goes into a batch: tokens on a host, where larger ones leave its caches; logits on a device (1 GiB in float32)."""

_Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation, and the tokens of both."""


class ModelInMemory(HFLM):  # type: ignore[misc]
    """Answers lm-eval's requests for likelihoods."""

    def __init__(self, job: EvalJob) -> None:
        # A tokenizer of its own: lm-eval gives one that has no padding a token for it.
        super().__init__(pretrained=job.model, tokenizer=copy.deepcopy(job.facts.tokenizer), batch_size=1)
        self._progress, self._done, self._total = job.progress, 0, 0
        vocabulary = int(job.facts.config.get_text_config().vocab_size)
        self._tokens = HOST_TOKENS if job.device.type == "cpu" else max(HOST_TOKENS, DEVICE_LOGITS // vocabulary)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Likelihoods of continuations, and whether each is what the model would have written.

        Raises:
            DataError: an answer has no tokens, or more than the model's context.
        """
        if any(request.args[1] == "" for request in requests):
            raise DataError("zero_shot: an answer is empty, so it has no likelihood.")
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: list[_Request], *_: object, **__: object) -> list[tuple[float, bool]]:
        """Requests of like length together; those of one length stay together, because lm-eval shares what they share."""
        context = self.max_length
        for (_question, answer), _before, tokens in requests:
            if not 0 < len(tokens) <= context:
                raise DataError(f"zero_shot: {answer[:40]!r} is {len(tokens)} tokens, and the model takes 1 to {context}.")
        order = sorted(range(len(requests)), key=lambda number: -_length(requests[number]))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        self._done, self._total, start = 0, len(requests), 0
        while start < len(order):
            longest = _length(requests[order[start]])
            end = next((i for i in range(start, len(order)) if 4 * _length(requests[order[i]]) < 3 * longest), len(order))
            self.batch_size_per_gpu = max(1, self._tokens // longest)
            answers = super()._loglikelihood_tokens([requests[number] for number in order[start:end]], disable_tqdm=True)
            for number, answer in zip(order[start:end], answers, strict=True):
                found[number] = answer
            start = end
        return found

    def _model_call(self, inps: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._progress("answer", self._done, self._total)
        self._done += len(inps)
        logits: torch.Tensor = super()._model_call(inps, **arguments)
        return logits


def _length(request: _Request) -> int:
    return len(request[1]) + len(request[2])

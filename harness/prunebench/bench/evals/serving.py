"""How fast a model reads prompts and writes answers, whole: seconds of the prefill and of a step of greedy decoding.

Prompts are random tokens, all of one length: what is written does not matter, and a model without a tokenizer can be measured
too. Only the last position's logits are made where the model can leave the others out.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from prunebench.bench.evals.clocks import WARM_UP, CannotRecord, Launch, Work, elapsed, launched, launches

ROUNDS = 5


@dataclass(frozen=True)
class Served:
    """Seconds of one batch."""

    prefill: float
    """Of the whole batch's prompts."""
    step: float
    """Of one token for each sequence of the batch."""


class Session:
    """A model with a batch of prompts, which it reads and goes on from as often as asked."""

    def __init__(self, model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, launch: Launch) -> None:
        """`prompts` are [batch, length] on the model's device.

        Raises:
            CannotRecord: with the launch `graph`, where the model cannot be recorded.
        """
        self._model, self._prompts, self._new_tokens, self._launch = model, prompts, new_tokens, launch
        self._length = prompts.shape[1] + max(new_tokens, WARM_UP + 1)
        self._cache = self._new_cache()
        self._token = prompts[:, -1:].clone()
        named = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in named else {})}
        self._recorded: dict[str, Work] = {}  # nothing of its own is kept here: a circle would hold the cache's memory
        if launch == "graph":
            self._recorded["read"] = launched(self._read, prompts.device, launch)
            self.prefill()
            self._recorded["write"] = launched(self._write, prompts.device, launch)

    def prefill(self) -> None:
        """Read the prompts."""
        self._recorded.get("read", self._read)()

    def decode(self) -> None:
        """Write the new tokens; `prefill` comes before it each time."""
        step = self._recorded.get("write", self._write)
        for _ in range(self._new_tokens):
            step()

    @property
    def token(self) -> torch.Tensor:
        """The token each sequence has come to, [batch, 1]."""
        return self._token

    def _new_cache(self) -> StaticCache | DynamicCache:
        """Keys and values: for a graph in one place for ever."""
        if self._launch == "graph":
            return StaticCache(config=self._model.config, max_cache_len=self._length)
        return DynamicCache(config=self._model.config)

    def _read(self) -> None:
        if isinstance(self._cache, StaticCache):
            self._cache.reset()  # type: ignore[no-untyped-call]
        else:
            self._cache = self._new_cache()
        self._forward(self._prompts)

    def _write(self) -> None:
        self._forward(self._token)

    def _forward(self, ids: torch.Tensor) -> None:
        logits = self._model(input_ids=ids, past_key_values=self._cache, **self._options).logits
        self._token.copy_(logits[:, -1:].argmax(dim=-1))


def serve(model: PreTrainedModel, prompts: torch.Tensor, new_tokens: int, launch: Launch) -> Served:
    """Measure a model with a batch of prompts, [batch, length] on its device.

    Raises:
        CannotRecord: with the launch `graph`, where the model cannot be recorded.
    """
    device = prompts.device
    with torch.inference_mode():
        session = Session(model, prompts, new_tokens, launch)
        session.prefill()
        session.decode()
        prefills, steps = [], []
        for _ in range(ROUNDS):
            prefills.append(elapsed(session.prefill, 1, device))
            steps.append(elapsed(session.decode, 1, device) / new_tokens)
    return Served(statistics.median(prefills), statistics.median(steps))


Form = tuple[PreTrainedModel, AbstractContextManager[None]]
"""A model, and what is in force while it is measured."""


def serve_alike(forms: Sequence[Callable[[], Form]], prompts: torch.Tensor, new_tokens: int) -> tuple[Launch, list[Served]]:
    """Measure several forms of a model, launched the same way: from graphs where all can be recorded."""
    for launch in launches(prompts.device):
        found = []
        try:
            for form in forms:
                model, inside = form()
                with inside:
                    found.append(serve(model, prompts, new_tokens, launch))
        except CannotRecord:
            continue
        return launch, found
    raise AssertionError("what is launched operation by operation need not be recorded")


def random_prompts(batch: int, length: int, vocabulary: int, device: torch.device) -> torch.Tensor:
    """Token ids [batch, length], the same each time."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

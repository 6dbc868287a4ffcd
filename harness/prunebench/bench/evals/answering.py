"""What a model makes of a question: how likely it finds each candidate, and what it goes on with by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from prunebench.bench.evals.questions import Question
from prunebench.bench.evals.windows import MAX_LOGITS
from prunebench.errors import DataError, NonFiniteError
from prunebench.spec import EvalFacts, EvalJob
from prunebench.toolkit.calibration import DEFAULT_LENGTH, Vocabulary, context_of
from prunebench.toolkit.placement import paying_batch
from prunebench.toolkit.quiet import quiet_transformers

_PADDING = 0
"""Any token will do where the mask hides it, so a model needs no pad token."""

_TAIL = 8
"""Tokens of the prompt that a continuation is decoded with: alone it would lose the space it begins with, or half a letter."""


@dataclass(frozen=True)
class Prompt:
    """A question in tokens, cut on the left to what the model can take in."""

    tokens: list[int]
    """The prefix's: what is continued."""
    candidates: list[list[int]]
    """Prefix and answer, for each answer; the right one first."""
    begins: int
    """So many tokens all of these begin with: mostly the prefix's, but a tokenizer may part it otherwise before an answer."""


class Reader:
    """The tokenizer of a model and the ends of words in its vocabulary."""

    def __init__(self, facts: EvalFacts) -> None:
        config = facts.config.get_text_config()
        self.size = int(config.vocab_size)
        self.context = context_of(config)
        self._vocabulary = Vocabulary(facts.tokenizer, facts.tokenizer_hash, self.size)
        self._tokenizer: Any = facts.tokenizer
        ends = getattr(config, "eos_token_id", None)
        ends = [*ends] if isinstance(ends, list | tuple) else [ends]
        self.stops = sorted({i for i in (*ends, getattr(facts.tokenizer, "eos_token_id", None)) if i is not None})
        """Tokens that end a text. From the settings and the tokenizer: what a folder says of generation is not followed."""

    def tokens(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them, without the end of text that some add."""
        ids = self._vocabulary.encode(text)
        return ids[:-1] if len(ids) > 1 and ids[-1] in self.stops else ids

    def prompt(self, question: Question, new_tokens: int) -> Prompt:
        """A question in tokens, with room for `new_tokens` more and for every candidate.

        Raises:
            DataError: the context leaves no room for a prefix, or a token is outside the vocabulary.
        """
        tokens = self.tokens(question.prefix)
        candidates = [self.tokens(f"{question.prefix} {answer}") for answer in (question.answer, *question.wrong)]
        begins = _common_beginning([tokens, *candidates])
        for ids in (tokens, *candidates):
            self._vocabulary.check(np.array(ids, dtype=np.int64), "a question")
        surplus = max(0, len(tokens) + new_tokens - self.context, *(len(ids) - self.context for ids in candidates))
        first = int(surplus > 0 and tokens[0] == getattr(self._tokenizer, "bos_token_id", None))  # a BOS stays in front
        if begins - surplus <= first:
            raise DataError(f"the model's context of {self.context} tokens has no room for {question.prefix[-40:]!r}.")
        kept = [ids[:first] + ids[first + surplus :] for ids in (tokens, *candidates)]
        return Prompt(kept[0], kept[1:], begins - surplus)

    def word_ends(self) -> torch.Tensor:
        """The tokens that cannot go on with a word: special ones, and those that begin with neither letter nor digit."""
        known = range(min(self.size, len(self._tokenizer)))
        special = set(self._tokenizer.all_special_ids)
        pieces = self._tokenizer.convert_ids_to_tokens(list(known))
        found = []
        for token, piece in zip(known, pieces, strict=True):
            # SentencePiece writes a word's first space as this sign, and decoding a token alone drops it.
            parted = token in special or str(piece).startswith("▁")
            if parted or not (self._tokenizer.decode([token], clean_up_tokenization_spaces=False)[:1]).isalnum():
                found.append(token)
        return torch.tensor(found, dtype=torch.int64)

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """What new tokens add to a prompt, as text, up to the end of text."""
        length = next((i for i, token in enumerate(new) if token in self.stops), len(new))
        tail = list(prompt[-_TAIL:])
        before, after = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (tail, [*tail, *new[:length]])
        )
        return str(after[len(before) :])


def log_likelihoods(job: EvalJob, prompts: Sequence[Prompt], reader: Reader) -> list[list[float]]:
    """How likely each candidate is behind its prefix, as a whole word, in nats: the sum of its tokens' log-probabilities and
    of the log-probability that the word ends there.

    Without its end `leave` could never be less likely than `leaves` where the latter's tokens begin with the former's.
    Sequences are padded on the right; log-softmaxes are in float32 whatever the model's dtype.
    """
    rows = [(ids, prompt.begins) for prompt in prompts for ids in prompt.candidates]
    ends = reader.word_ends().to(job.device)
    found = [0.0] * len(rows)
    with torch.no_grad():
        for chosen in _batches(job, [len(ids) for ids, _ in rows], reader, 0, "likelihood"):
            ids, mask = _padded([rows[row][0] for row in chosen], job.device, left=False)
            logits = job.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            sums = []
            for at, row in enumerate(chosen):
                whole, begins = rows[row]
                log_p = logits[at, begins - 1 : len(whole)].float().log_softmax(dim=-1)  # [answer + 1, vocabulary]
                answer = ids[at, begins : len(whole), None]
                sums.append(log_p[:-1].gather(1, answer).sum() + log_p[-1, ends].logsumexp(dim=0))
            for row, value in zip(chosen, torch.stack(sums).tolist(), strict=True):
                found[row] = value
    values = iter(found)
    return [[next(values) for _ in prompt.candidates] for prompt in prompts]


def continuations(job: EvalJob, prompts: Sequence[Prompt], new_tokens: int, reader: Reader) -> list[str]:
    """What the model goes on with, at most `new_tokens` tokens, each the most likely one; padded on the left.

    Raises:
        NonFiniteError: there is no most likely one.
    """
    found = [""] * len(prompts)
    model: Any = job.model
    plain = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        use_cache=True,
        pad_token_id=_PADDING,
        eos_token_id=reader.stops or None,
    )
    with torch.no_grad(), quiet_transformers(), _generating(model, plain):
        for chosen in _batches(job, [len(prompt.tokens) for prompt in prompts], reader, new_tokens, "answer"):
            ids, mask = _padded([prompts[row].tokens for row in chosen], job.device, left=True)
            whole: torch.Tensor = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=plain, logits_processor=[_refuse_nan]
            )
            for row, new in zip(chosen, whole[:, ids.shape[1] :].tolist(), strict=True):
                found[row] = reader.text(prompts[row].tokens, new)
    return found


def _refuse_nan(_: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Between two steps of decoding: the most likely of NaNs would be the first token, without a word."""
    if bool(logits.isnan().any()):
        raise NonFiniteError("the model's predictions are NaN while it answers.")
    return logits


@contextmanager
def _generating(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Keep what the model's folder says of generation (penalties, lengths, sampling) out of what `config` leaves open."""
    kept = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = kept


def _batches(job: EvalJob, lengths: Sequence[int], reader: Reader, more: int, what: str) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, as many at a time as have no more tokens than a batch of windows has."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    tokens = job.batch_size * min(reader.context, DEFAULT_LENGTH)
    done = 0
    while done < len(order):
        longest = lengths[order[done]]
        rows = paying_batch(max(1, tokens // (longest + more)), longest, job.device)
        rows = max(1, min(rows, MAX_LOGITS // (longest * reader.size)))
        job.progress(what, done, len(order))
        yield order[done : done + rows]
        done += rows
    job.progress(what, len(order), len(order))


def _padded(rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, [rows, longest], int64."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), _PADDING)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[at, place] = torch.tensor(row)
        mask[at, place] = 1
    return ids.to(device), mask.to(device)


def _common_beginning(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    shortest = min(map(len, rows))
    return next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), shortest)

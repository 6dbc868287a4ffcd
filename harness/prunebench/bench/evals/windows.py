"""Non-overlapping windows of a text, as in the papers (`methods.md` 1.5): what perplexity and divergence have in common.

The text is joined and tokenized once and cut into windows; what is left over is dropped. A BOS stands only where the tokenizer
puts one, at the start of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from prunebench.errors import DataError, OptionError
from prunebench.spec import Eval, EvalFacts, EvalJob, JsonDict, option
from prunebench.toolkit.cache import digest_array
from prunebench.toolkit.calibration import DEFAULT_LENGTH, Stream, Vocabulary, context_of, stream_file, token_stream
from prunebench.toolkit.placement import paying_batch
from prunebench.toolkit.texts import KNOWN, load_text

MAX_LOGITS = 1 << 26
"""Float32 logits held at a time (256 MiB); windows are split into smaller batches to stay below."""

C4_ROWS, C4_WINDOWS = 1100, 256
"""The excerpt of C4's validation shard that the papers use: 1,100 texts, at most 256 windows."""


@dataclass(frozen=True)
class Windows:
    """Windows of a text, and how many of them are taken at a time."""

    ids: torch.Tensor
    """[windows, window] on the host."""
    batch: int

    def batches(self, job: EvalJob) -> Iterator[torch.Tensor]:
        """In order, [batch, window] on the device."""
        for start in range(0, len(self.ids), self.batch):
            job.progress("window", start, len(self.ids))
            yield self.ids[start : start + self.batch].to(job.device)
        job.progress("window", len(self.ids), len(self.ids))


@dataclass
class WindowEval(Eval):
    """An evaluation over the windows of a text."""

    data: str = option("wikitext2", "wikitext2, c4, OWNER/NAME[/CONFIG][:SPLIT], FILE.txt or FILE.npy")
    window: int = option(0, "tokens a window; 0 is the file's, or the model's context, at most 2048")
    windows: int = option(0, "use only so many windows from the start; 0 is all")

    def __post_init__(self) -> None:
        if self.window < 0 or self.window == 1:
            raise OptionError(f"{self.name}: a window is at least 2 tokens (0 is the model's context), not {self.window}.")
        if self.windows < 0:
            raise OptionError(f"{self.name}: the number of windows cannot be {self.windows}.")

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Data set, split, content, window, joining."""
        stream, joining = self._stream(facts)
        window = self._window(facts, stream)
        windows = self._count(stream, window)
        return {
            "data": stream.source.name,
            "config": stream.source.config,
            "split": stream.source.split,
            "origin": stream.source.origin,
            "content": stream.source.content,
            "complete": stream.source.complete,
            "joining": joining,
            "bos": "as the tokenizer adds it, in the first window only",
            "tokens": len(stream.ids),
            "token_hash": digest_array(stream.ids[: windows * window]),
            "window": window,
            "windows": windows,
        }

    def texts(self, facts: EvalFacts) -> list[str]:
        """The text as far as windows are cut from it."""
        if facts.tokenizer is None:
            return []
        stream, _ = self._stream(facts)
        window = self._window(facts, stream)
        return [str(facts.tokenizer.decode(stream.ids[: self._count(stream, window) * window].tolist()))]

    def cut(self, job: EvalJob, models: int = 1, chosen: Sequence[int] | None = None) -> Windows:
        """All windows, or those with the chosen numbers, as many at a time as the logits of `models` models allow."""
        stream, _ = self._stream(job.facts)
        window, count = job.conditions["window"], job.conditions["windows"]
        ids = torch.from_numpy(stream.ids[: count * window].reshape(count, window))
        if chosen is not None:
            ids = ids[list(chosen)]
        vocabulary = int(job.facts.config.get_text_config().vocab_size)
        most = MAX_LOGITS // (models * window * vocabulary)
        return Windows(ids, max(1, min(paying_batch(job.batch_size, window, job.device), most)))

    def documents(self, job: EvalJob) -> list[int]:
        """The document that each window's first token is in."""
        stream, _ = self._stream(job.facts)
        window, count = job.conditions["window"], job.conditions["windows"]
        return [int(document) for document in stream.documents[: count * window : window]]

    def _stream(self, facts: EvalFacts) -> tuple[Stream, str]:
        folder = Path(facts.folder)
        vocabulary = Vocabulary(facts.tokenizer, facts.tokenizer_hash, int(facts.config.get_text_config().vocab_size))
        if self.data.endswith(".npy"):
            return stream_file(self.data, vocabulary, folder), "none: tokens"
        is_c4 = self.data.partition(":")[0] in ("c4", KNOWN["c4"].repo, f"{KNOWN['c4'].repo}/{KNOWN['c4'].config}")
        text = load_text(self.data, "validation" if is_c4 else "test", folder)
        return token_stream(text, vocabulary, C4_ROWS if is_c4 else None), repr(text.joining)

    def _window(self, facts: EvalFacts, stream: Stream) -> int:
        context = context_of(facts.config)
        if stream.window and self.window not in (0, stream.window):
            raise DataError(f"{self.name}: {self.data} holds windows of {stream.window} tokens, and window is {self.window}.")
        window = self.window or stream.window or min(context, DEFAULT_LENGTH)
        if not 2 <= window <= context:
            bound = f"longer than the model's context of {context}" if window > context else "too short to predict anything"
            raise DataError(f"{self.name}: a window of {window} is {bound}.")
        return window

    def _count(self, stream: Stream, window: int) -> int:
        there = len(stream.ids) // window
        if not there:
            raise DataError(f"{self.name}: {self.data} has {len(stream.ids)} tokens, fewer than one window of {window}.")
        is_c4 = stream.source.name == KNOWN["c4"].repo
        return min(x for x in (there, self.windows or there, C4_WINDOWS if is_c4 else there) if x)

"""Token arrays: calibration samples, packed windows for training and validation, the stream that perplexity is measured on.

Built once per (source, tokenizer, length, seed), kept on disk by content and shared by every method.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from prunebench.errors import DataError
from prunebench.toolkit.cache import digest, digest_array, digest_file, load_arrays, save_arrays
from prunebench.toolkit.texts import Source, Text, load_text, resolve_file

SAMPLER = "documents-v1"
"""The sampler of `methods.md` 1.2; part of a run's recipe."""

DEFAULT_LENGTH = 2048
"""Tokens of a sequence where nothing else is said, and the context of a model that does not state one."""

TokenArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Tokens:
    """Token sequences [sequences, length] and where they come from."""

    array: TokenArray
    source: Source
    content: str
    """Hash of the array."""


@dataclass(frozen=True)
class Stream:
    """A text as one run of tokens, and the document of each."""

    ids: TokenArray
    documents: TokenArray
    source: Source
    window: int | None = None
    """Tokens a window, where the file holds windows."""


def context_of(config: PretrainedConfig) -> int:
    """The longest sequence that a model takes."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", DEFAULT_LENGTH))


class Vocabulary:
    """A tokenizer, its hash, and the number of embeddings that token ids must stay below."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, content: str, size: int) -> None:
        self.tokenizer, self.content, self.size = tokenizer, content, size

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself."""
        return list(self._tokenizer()(text, verbose=False)["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and the character at which each begins (-1 where the tokenizer cannot tell)."""
        tokenizer = self._tokenizer()
        if not tokenizer.is_fast:
            ids = self.encode(text)
            return ids, [-1] * len(ids)
        found = tokenizer(text, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), [start for start, _ in found["offset_mapping"]]

    def check(self, ids: TokenArray, name: str) -> None:
        """Refuse tokens outside the vocabulary.

        Raises:
            DataError: naming the first such token.
        """
        if ids.size and (ids.min() < 0 or ids.max() >= self.size):
            bad = ids[(ids < 0) | (ids >= self.size)].flat[0]
            raise DataError(f"{name} holds the token {bad}, outside the model's vocabulary of {self.size}.")

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise DataError("the model's folder has no tokenizer, so only token files (.npy) can be used with it.")
        return self.tokenizer


def sample_documents(lengths: DocumentLengths, samples: int, length: int, seed: int) -> list[tuple[int, int]]:
    """Draw (document, start) pairs as the reference code does (`methods.md` 1.2): Python's `random`, documents strictly longer
    than `length`, the start uniform so that the document's last token is never taken.

    Raises:
        DataError: fewer than `samples / 4` documents are long enough; says how many are, and the longest usable length.
    """
    needed = max(1, -(-samples // 4))
    if lengths.count_longer(length, enough=needed) < needed:
        long_enough = lengths.count_longer(length, enough=lengths.total)
        usable = sorted((lengths[i] for i in range(lengths.total)), reverse=True)
        longest = usable[needed - 1] - 1 if len(usable) >= needed else 0
        advice = f"the longest usable length is {longest}" if longest > 0 else "there are too few documents for any length"
        raise DataError(
            f"{samples} samples of {length} tokens need at least {needed} documents longer than that, and "
            f"{long_enough} of {lengths.total} are; {advice}."
        )
    draw = random.Random(seed)
    picked = []
    for _ in range(samples):
        while True:
            index = draw.randint(0, lengths.total - 1)
            if lengths[index] > length:
                break
        picked.append((index, draw.randint(0, lengths[index] - length - 1)))
    return picked


class DocumentLengths:
    """Token counts of documents, each tokenized at most once, and only when asked for."""

    def __init__(self, documents: Sequence[str], vocabulary: Vocabulary) -> None:
        self._documents, self._vocabulary = documents, vocabulary
        self._ids: dict[int, list[int]] = {}
        self.total = len(documents)

    def __getitem__(self, index: int) -> int:
        return len(self.ids(index))

    def ids(self, index: int) -> list[int]:
        if index not in self._ids:
            self._ids[index] = self._vocabulary.encode(self._documents[index])
        return self._ids[index]

    def count_longer(self, length: int, enough: int) -> int:
        """How many documents are longer, counted no further than `enough`."""
        found = 0
        for index in range(self.total):
            if found >= enough:
                break
            found += self[index] > length
        return found


def calibration_tokens(name: str, vocabulary: Vocabulary, samples: int, length: int, seed: int, folder: Path) -> Tokens:
    """Calibration sequences [samples, length] from a named text, a text file or a token file.

    A token file (`FILE.npy`, integers [samples, length]) is used as it is, in order; the numbers are then not read.

    Raises:
        DataError: the source is missing, too short, or has tokens outside the vocabulary.
    """
    if name.endswith(".npy"):
        return token_file(name, vocabulary, folder)
    text = load_text(name, "train", folder)
    key = digest([SAMPLER, text.source.content, vocabulary.content, str(samples), str(length), str(seed)])
    kept = load_arrays("calibration", key)
    if kept is None:
        lengths = DocumentLengths(text.documents(), vocabulary)
        picked = sample_documents(lengths, samples, length, seed)
        array = np.array([lengths.ids(index)[start : start + length] for index, start in picked], dtype=np.int64)
        kept = {"tokens": array}
        save_arrays("calibration", key, kept)
    vocabulary.check(kept["tokens"], name)
    return Tokens(kept["tokens"], text.source, digest_array(kept["tokens"]))


def token_file(name: str, vocabulary: Vocabulary, folder: Path) -> Tokens:
    """Token sequences from an integer array [samples, length] on disk.

    Raises:
        DataError: it is not there, not a 2-D integer array, or has tokens outside the vocabulary.
    """
    array = read_token_file(name, folder)
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(f"{name} must hold [samples, length] token ids, and its shape is {list(array.shape)}.")
    vocabulary.check(array, name)
    return Tokens(array, _file_source(name, folder), digest_array(array))


def packed_windows(name: str, split: str, vocabulary: Vocabulary, length: int, tokens: int | None, folder: Path) -> Tokens:
    """Consecutive windows [n, length] of a whole text, at most `tokens` tokens of it, for training and validation.

    Raises:
        DataError: the source is missing, or shorter than one window.
    """
    if name.endswith(".npy"):
        found = token_file(name, vocabulary, folder)
        width = found.array.shape[1]
        array = found.array[: tokens // width] if tokens else found.array
        if not len(array):
            raise DataError(f"{name} has windows of {width} tokens, and {tokens} tokens are fewer than one.")
        return Tokens(array, found.source, digest_array(array))
    stream = token_stream(load_text(name, split, folder), vocabulary)
    usable = min(len(stream.ids), tokens or len(stream.ids)) // length
    if not usable:
        raise DataError(f"{name} has {len(stream.ids)} tokens, fewer than one window of {length}.")
    array = stream.ids[: usable * length].reshape(usable, length)
    return Tokens(array, stream.source, digest_array(array))


def token_stream(text: Text, vocabulary: Vocabulary, rows: int | None = None) -> Stream:
    """A text tokenized once, its first `rows` rows joined as its kind is (`methods.md` 1.5), with each token's document."""
    key = digest(["stream-v2", text.source.content, text.joining, str(rows), vocabulary.content])
    kept = load_arrays("streams", key)
    if kept is None:
        ids, offsets = vocabulary.encode_with_offsets(text.joined(rows))
        starts = text.document_starts(rows)
        documents = np.searchsorted(np.array(starts), np.array(offsets, dtype=np.int64), side="right") - 1
        kept = {"ids": np.array(ids, dtype=np.int64), "documents": documents.clip(0).astype(np.int64)}
        save_arrays("streams", key, kept)
    vocabulary.check(kept["ids"], text.source.name)
    return Stream(kept["ids"], kept["documents"], text.source)


def stream_file(name: str, vocabulary: Vocabulary, folder: Path) -> Stream:
    """A token file as a stream: a flat array is one document, [windows, length] one document a window.

    Raises:
        DataError: it is not there, not a 1-D or 2-D integer array, or has tokens outside the vocabulary.
    """
    array = read_token_file(name, folder)
    if array.ndim not in (1, 2) or not array.size:
        raise DataError(f"{name} must hold a flat token stream or [windows, length], and its shape is {list(array.shape)}.")
    vocabulary.check(array, name)
    width = array.shape[-1]
    documents = np.arange(array.size, dtype=np.int64) // width
    return Stream(array.reshape(-1), documents, _file_source(name, folder), width if array.ndim == 2 else None)


def read_token_file(name: str, folder: Path) -> TokenArray:
    """The integers in a `.npy` file.

    Raises:
        DataError: it is not there, or not an integer array.
    """
    try:
        with resolve_file(name, folder).open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - numpy's reader raises many kinds, down to the tokenizer's of Python
        reason = str(error).partition(". ")[0].rstrip(".")  # what follows is numpy's advice to unpickle it
        raise DataError(f"{name} cannot be read as a numpy array: {reason}.") from None
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} must hold integers, and holds {getattr(array, 'dtype', type(array).__name__)}.")
    return array.astype(np.int64)


def _file_source(name: str, folder: Path) -> Source:
    path = resolve_file(name, folder)
    return Source(path.name, "", "", "file", digest_file(path), True)

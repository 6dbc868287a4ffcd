"""Calibration, training and evaluation tokens, against a literal copy of the reference sampler (`methods.md` 1.2)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Bench, Letters, files_no_larger_than, tree, write_mirror
from transformers import AutoTokenizer

from prunebench.errors import DataError, UnknownNameError
from prunebench.shipped import suites_folder
from prunebench.toolkit import cache as cache_module
from prunebench.toolkit.cache import cache_folder, digest, digest_array, digest_file, load_arrays, save_arrays
from prunebench.toolkit.calibration import (
    DocumentLengths,
    Tokens,
    Vocabulary,
    calibration_tokens,
    packed_windows,
    sample_documents,
    stream_file,
    token_stream,
)
from prunebench.toolkit.texts import Source, Text, load_text

WIKI7M = suites_folder() / "quickstart" / "wiki7m"
TEXTS = suites_folder() / "quickstart" / "texts"

pytestmark = pytest.mark.usefixtures("own_cache")


@cache
def wiki7m_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WIKI7M)


def wiki7m() -> Vocabulary:
    return Vocabulary(wiki7m_tokenizer(), "wiki7m", 4096)


def letters(bos: int | None = None) -> Vocabulary:
    return Vocabulary(Letters(bos), f"letters {bos}", 128)  # type: ignore[arg-type]


def calls_of(vocabulary: Vocabulary) -> list[str]:
    assert isinstance(vocabulary.tokenizer, Letters)
    return vocabulary.tokenizer.read


def sha(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.array.astype("<i8").tobytes()).hexdigest()[:16]


def reference_sample(
    documents: Sequence[str], encode: Callable[[str], Sequence[int]], samples: int, length: int, seed: int
) -> np.ndarray[Any, Any]:
    """The loop of the reference code, with Python's global generator."""
    random.seed(seed)
    remembered = cache(encode)
    found = []
    for _ in range(samples):
        while True:
            index = random.randint(0, len(documents) - 1)
            ids = remembered(documents[index])
            if len(ids) > length:
                break
        start = random.randint(0, len(ids) - length - 1)
        found.append(list(ids[start : start + length]))
    return np.array(found)


def encode_plainly(text: str) -> list[int]:
    return list(wiki7m_tokenizer()(text, verbose=False)["input_ids"])


# The sampler


@pytest.mark.parametrize(("seed", "expected"), [(0, "c52f679333a920d9"), (1, "d0771b24f0d76b30"), (2, "77f14ccd6dfb9896")])
def test_c4_samples_are_those_of_the_reference(mirror: Path, seed: int, expected: str) -> None:
    found = calibration_tokens("c4", wiki7m(), 128, 512, seed, Path())
    with (mirror / "datasets" / "allenai" / "c4" / "en" / "train.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    assert np.array_equal(found.array, reference_sample(documents, encode_plainly, 128, 512, seed))
    assert found.array.shape == (128, 512)
    assert sha(found) == expected
    assert (found.source.name, found.source.config, found.source.split) == ("allenai/c4", "en", "train")
    assert (found.source.origin, found.source.complete) == ("mirror", False)


@pytest.mark.parametrize(("seed", "expected"), [(0, "04fe615f84445b2a"), (1, "621792f95ffbfd46"), (2, "4d2bc80ef5170c97")])
def test_quickstart_samples_are_those_of_the_reference(seed: int, expected: str) -> None:
    found = calibration_tokens("calibration.txt", wiki7m(), 32, 256, seed, TEXTS)
    content = (TEXTS / "calibration.txt").read_text(encoding="utf-8")
    documents = re.split(r"(?m)^(?== [^=\n]+ =$)", content)[1:]
    assert len(documents) > 15
    assert np.array_equal(found.array, reference_sample(documents, encode_plainly, 32, 256, seed))
    assert sha(found) == expected
    assert (found.source.name, found.source.origin, found.source.complete) == ("calibration.txt", "file", True)


@pytest.mark.parametrize("seed", range(20))
def test_samples_of_documents_near_the_length(seed: int) -> None:
    draw = random.Random(seed)
    documents = ["".join(draw.choices("abcdefgh", k=draw.randint(5, 14))) for _ in range(30)]
    vocabulary = letters()
    lengths = DocumentLengths(documents, vocabulary)
    picked = sample_documents(lengths, 40, 9, seed)
    found = [lengths.ids(index)[start : start + 9] for index, start in picked]
    assert np.array_equal(np.array(found), reference_sample(documents, lambda text: list(text.encode()), 40, 9, seed))


def test_the_seed_is_pythons_and_other_generators_do_not_matter() -> None:
    random.seed(5)
    np.random.seed(5)
    first = calibration_tokens("calibration.txt", letters(), 8, 100, 3, TEXTS)
    after = random.random()
    random.seed(5)
    assert random.random() == after, "the global generator was used"
    assert not np.array_equal(first.array, calibration_tokens("calibration.txt", letters(), 8, 100, 4, TEXTS).array)


def test_documents_must_be_longer_and_their_last_token_is_never_taken() -> None:
    """`length` tokens are too few; of `length + 1` there is one choice, without the last."""
    documents = ["x" * 8, "aaaaaaaaz", "bbbbbbbbbbbbz"]
    lengths = DocumentLengths(documents, letters())
    picked = [pick for seed in range(60) for pick in sample_documents(lengths, 4, 8, seed)]
    assert {index for index, _ in picked} == {1, 2}
    assert {start for index, start in picked if index == 1} == {0}
    assert {start for index, start in picked if index == 2} == {0, 1, 2, 3, 4}


def test_bos_appears_only_at_a_documents_start() -> None:
    found = calibration_tokens("calibration.txt", letters(bos=1), 64, 500, 0, TEXTS)
    assert not (found.array[:, 1:] == 1).any()
    starts = found.array[found.array[:, 0] == 1]
    assert all(bytes(row[1:3].tolist()) == b"= " for row in starts)


def test_a_document_is_tokenized_at_most_once() -> None:
    vocabulary = letters()
    calibration_tokens("calibration.txt", vocabulary, 64, 500, 0, TEXTS)
    assert len(calls_of(vocabulary)) == len(set(calls_of(vocabulary))) <= 18


def test_documents_that_are_not_needed_are_not_tokenized() -> None:
    documents = ["x" * 50] * 1000
    vocabulary = letters()
    sample_documents(DocumentLengths(documents, vocabulary), 8, 10, 0)
    assert len(calls_of(vocabulary)) <= 2 + 8


@pytest.mark.parametrize(("samples", "needed"), [(1, 1), (4, 1), (5, 2), (8, 2), (128, 32)])
def test_too_few_long_documents(samples: int, needed: int) -> None:
    enough = [f"{'x' * 20}{index}" for index in range(needed)]
    short = ["y" * 10] * 7
    sample_documents(DocumentLengths(short + enough, letters()), samples, 20, 0)
    with pytest.raises(DataError, match=rf"{samples} samples of 20 tokens need at least {needed} documents longer than that"):
        sample_documents(DocumentLengths(short + enough[1:], letters()), samples, 20, 0)


@pytest.mark.parametrize("sizes", [[3, 9, 9, 14, 30], [50] * 5, [2, 3, 3, 3, 40]], ids=str)
def test_the_longest_usable_length_is_named_and_works(sizes: list[int]) -> None:
    documents = ["x" * size for size in sizes]
    with pytest.raises(DataError) as error:
        sample_documents(DocumentLengths(documents, letters()), 12, 60, 0)
    message = re.search(r"and (\d+) of 5 are; the longest usable length is (\d+)\.$", str(error.value))
    assert message is not None, error.value
    assert int(message[1]) == 0
    longest = int(message[2])
    assert len(sample_documents(DocumentLengths(documents, letters()), 12, longest, 0)) == 12
    with pytest.raises(DataError):
        sample_documents(DocumentLengths(documents, letters()), 12, longest + 1, 0)


def test_how_many_documents_are_long_enough_is_named() -> None:
    documents = ["x" * size for size in (5, 11, 10, 12, 3)]
    with pytest.raises(DataError, match=r"and 2 of 5 are; the longest usable length is 9\."):
        sample_documents(DocumentLengths(documents, letters()), 12, 10, 0)


def test_no_length_is_usable() -> None:
    with pytest.raises(DataError, match="and 0 of 2 are; there are too few documents for any length"):
        sample_documents(DocumentLengths(["abc", "abc"], letters()), 12, 10, 0)


# Token files


def write_tokens(folder: Path, array: Any) -> str:
    np.save(folder / "tokens.npy", array)
    return "tokens.npy"


@pytest.mark.parametrize("kind", ["<i8", ">i4", "u1", "<i2", "<u8"])
def test_a_token_file_is_used_as_it_is(tmp_path: Path, kind: str) -> None:
    array = np.random.default_rng(0).integers(0, 100, (5, 7)).astype(kind)
    found = calibration_tokens(write_tokens(tmp_path, array), letters(), 128, 2048, 3, tmp_path)
    assert np.array_equal(found.array, array)
    assert found.array.dtype == np.int64
    assert found.content == digest_array(array)
    assert (found.source.name, found.source.origin, found.source.complete) == ("tokens.npy", "file", True)


def test_a_token_file_in_fortran_order(tmp_path: Path) -> None:
    array = np.arange(35).reshape(5, 7)
    found = calibration_tokens(write_tokens(tmp_path, np.asfortranarray(array)), letters(), 1, 1, 0, tmp_path)
    assert np.array_equal(found.array, array)
    assert found.content == digest_array(array)


@pytest.mark.parametrize(
    ("array", "complaint"),
    [
        (np.arange(6), "must hold [samples, length] token ids, and its shape is [6]"),
        (np.zeros((2, 3, 4), int), "must hold [samples, length] token ids, and its shape is [2, 3, 4]"),
        (np.zeros((0, 4), int), "must hold [samples, length] token ids, and its shape is [0, 4]"),
        (np.zeros((4, 0), int), "must hold [samples, length] token ids, and its shape is [4, 0]"),
        (np.array(3), "must hold [samples, length] token ids, and its shape is []"),
        (np.zeros((2, 3)), "must hold integers, and holds float64"),
        (np.zeros((2, 3), bool), "must hold integers, and holds bool"),
        (np.array([["a"]]), "must hold integers, and holds <U1"),
        (np.array([[1, 128]]), "holds the token 128, outside the model's vocabulary of 128"),
        (np.array([[1, -1]]), "holds the token -1, outside the model's vocabulary of 128"),
        (np.array([[2**64 - 1]], np.uint64), "outside the model's vocabulary of 128"),
        (np.array([[{}]], object), "cannot be read as a numpy array"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype}{list(value.shape)}",
)
def test_token_files_that_do_not_fit(tmp_path: Path, array: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)) as error:
        calibration_tokens(write_tokens(tmp_path, array), letters(), 1, 1, 0, tmp_path)
    assert "tokens.npy" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x02\x00((", b"x,y\n1,2\n", b"\x80\x04."], ids=range(6)
)
def test_files_that_are_no_token_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.npy cannot be read as a numpy array"):
        calibration_tokens("tokens.npy", letters(), 1, 1, 0, tmp_path)


def test_no_damaged_token_file_breaks_more_than_itself(tmp_path: Path) -> None:
    name = write_tokens(tmp_path, np.arange(20).reshape(4, 5))
    good = (tmp_path / name).read_bytes()
    draw = random.Random(0)
    for place in [*range(8, 128, 2), *draw.sample(range(len(good)), 40)]:
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        for content in (bytes(flipped), good[:place]):
            (tmp_path / name).write_bytes(content)
            try:
                found = calibration_tokens(name, letters(), 1, 1, 0, tmp_path)
            except (DataError, DeprecationWarning):
                continue
            assert found.array.ndim == 2


def test_an_archive_of_arrays_is_no_token_file(tmp_path: Path) -> None:
    with (tmp_path / "tokens.npy").open("wb") as file:
        np.savez(file, a=np.zeros((2, 3), int))
    with pytest.raises(DataError, match="must hold integers, and holds NpzFile"):
        calibration_tokens("tokens.npy", letters(), 1, 1, 0, tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for name in ("absent.npy", "absent.txt"):
        with pytest.raises(DataError, match=rf"the file {name} does not exist \(looked in "):
            calibration_tokens(name, letters(), 1, 1, 0, tmp_path)


def test_shipped_texts_are_found_from_anywhere_but_one_s_own_come_first(tmp_path: Path) -> None:
    name = "quickstart/texts/calibration.txt"
    assert load_text(name, "", tmp_path).source == load_text("calibration.txt", "", TEXTS).source
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("a text of one's own")
    assert load_text(name, "", tmp_path).rows == ["a text of one's own"]


def test_tokens_outside_the_vocabulary_of_a_text() -> None:
    with pytest.raises(DataError, match="outside the model's vocabulary of 100"):
        calibration_tokens("calibration.txt", Vocabulary(Letters(), "small", 100), 4, 100, 0, TEXTS)  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_takes_token_files_only(tmp_path: Path) -> None:
    bare = Vocabulary(None, "none", 128)
    assert calibration_tokens(write_tokens(tmp_path, np.zeros((1, 2), int)), bare, 1, 1, 0, tmp_path).array.shape == (1, 2)
    with pytest.raises(DataError, match=r"has no tokenizer, so only token files \(\.npy\) can be used"):
        calibration_tokens("calibration.txt", bare, 1, 10, 0, TEXTS)


# The cache


class Deaf:
    """A tokenizer that must not be called."""

    is_fast = True

    def __call__(self, *_: Any, **__: Any) -> Any:
        pytest.fail("it was tokenized again")


def sample(tokenizer: Any, seed: int = 0, length: int = 100, samples: int = 8, content: str = "letters") -> Tokens:
    return calibration_tokens("calibration.txt", Vocabulary(tokenizer, content, 128), samples, length, seed, TEXTS)


def kept_arrays() -> list[Path]:
    return sorted(cache_folder().rglob("*.npz"))


def test_the_second_time_nothing_is_tokenized() -> None:
    first = sample(Letters())
    again = sample(Deaf())
    assert np.array_equal(first.array, again.array)
    assert (first.content, first.source) == (again.content, again.source)
    text = load_text("calibration.txt", "", TEXTS)
    stream = token_stream(text, letters())
    kept = token_stream(text, Vocabulary(Deaf(), "letters None", 128))  # type: ignore[arg-type]
    assert np.array_equal(stream.ids, kept.ids)
    assert np.array_equal(stream.documents, kept.documents)


def test_what_tokens_depend_on_is_kept_apart() -> None:
    base = {"seed": 0, "length": 100, "samples": 8, "content": "letters"}
    changes = ({}, {"seed": 1}, {"length": 101}, {"samples": 9}, {"content": "other letters"})
    for count, change in enumerate(changes, start=1):
        tokenizer = Letters()
        sample(tokenizer, **base | change)
        assert tokenizer.read, change
        assert len(kept_arrays()) == count


def test_another_text_of_the_same_name_is_another(tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / "calibration.txt").write_text(letter * 50)
        found = calibration_tokens("calibration.txt", letters(), 2, 10, 0, tmp_path)
        assert (found.array == ord(letter)).all()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "replaced", "another array", "a folder"])
def test_a_damaged_cache_is_made_again(damage: str) -> None:
    first = sample(Letters())
    [path] = kept_arrays()
    good = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        at = good.index(first.array.tobytes()) + 5
        content = {
            "cut": good[: len(good) // 2],
            "flipped": good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
            "emptied": b"",
            "replaced": b"garbage",
            "another array": b"\x93NUMPY" + good[:100],
        }
        path.write_bytes(content[damage])
    tokenizer = Letters()
    again = sample(tokenizer)
    assert tokenizer.read
    assert np.array_equal(first.array, again.array)
    if damage != "a folder":
        assert path.read_bytes() == good


def test_no_cut_or_flip_in_the_cache_is_believed() -> None:
    array = np.arange(60)
    save_arrays("kind", "key", {"tokens": array})
    [path] = kept_arrays()
    good = path.read_bytes()
    draw = random.Random(0)
    for _ in range(300):
        place = draw.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        for content in (good[:place], bytes(flipped)):
            path.write_bytes(content)
            found = load_arrays("kind", "key")
            assert found is None or np.array_equal(found["tokens"], array)


@pytest.mark.parametrize("obstacle", ["a file in its place", "a full disk", "no rename"])
def test_a_cache_that_cannot_be_written_is_merely_slow(obstacle: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample(Letters(), seed=7)
    if obstacle == "a file in its place":
        monkeypatch.setenv("PRUNEBENCH_CACHE", str(TEXTS / "calibration.txt"))
        assert np.array_equal(sample(Letters(), seed=7).array, expected.array)
        return
    before = tree(own_cache)
    if obstacle == "a full disk":
        with files_no_larger_than(500):
            found = sample(Letters(), seed=8)
    else:
        monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        found = sample(Letters(), seed=8)
    assert found.array.shape == (8, 100)
    assert tree(own_cache) == before, "half a file was left"


def test_hashes_of_files_are_remembered_and_follow_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"one")
    first = digest_file(path)
    assert first == hashlib.sha256(b"one").hexdigest()[:16]
    [note] = (cache_folder() / "hashes").iterdir()
    note.write_text("0123456789abcdef", encoding="ascii")
    assert digest_file(path) == "0123456789abcdef", "it was not remembered"
    for broken in (b"", b"0123", b"\xff" * 16, b"0123456789abcdeg"):
        note.write_bytes(broken)
        assert digest_file(path) == first
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp --preserve` and archives do
    assert digest_file(path) == hashlib.sha256(b"two").hexdigest()[:16]
    monkeypatch.setattr(cache_module, "write_file", lambda *_: None)
    path.write_bytes(b"three")
    assert digest_file(path) == hashlib.sha256(b"three").hexdigest()[:16]


def test_digests_keep_parts_apart() -> None:
    parts = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["", "abc"], [b"ab", "d"]]
    assert len({digest(part) for part in parts}) == len(parts)
    assert digest(["é"]) == digest(["é".encode()])
    assert digest_array(np.arange(6)) != digest_array(np.arange(6).reshape(2, 3))
    assert digest_array(np.arange(6, dtype=np.int32)) == digest_array(np.arange(6))
    assert digest_array(np.arange(12)[::2]) == digest_array(np.arange(0, 12, 2))


# Streams and packed windows


def text_of(*rows: str, joining: str = "\n\n", articles: bool = False) -> Text:
    return Text(rows, joining, articles, Source("a/b", "default", "train", "hub", digest(rows), True))


def test_a_stream_is_the_joined_text_and_knows_its_documents() -> None:
    stream = token_stream(text_of("abc", "", "de", joining="--"), letters())
    assert bytes(stream.ids.tolist()) == b"abc----de"
    assert stream.documents.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert stream.window is None


def test_a_stream_of_the_first_rows() -> None:
    stream = token_stream(text_of("abc", "de", "f", joining=" "), letters(), rows=2)
    assert bytes(stream.ids.tolist()) == b"abc de"
    whole = token_stream(text_of("abc", "de", "f", joining=" "), letters())
    assert bytes(whole.ids.tolist()) == b"abc de f"


def test_a_stream_is_tokenized_in_one_piece() -> None:
    vocabulary = letters(bos=1)
    stream = token_stream(text_of("abc", "de", joining=" "), vocabulary)
    assert calls_of(vocabulary) == ["abc de"]
    assert stream.ids.tolist() == [1, *b"abc de"]
    assert stream.documents.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_tokenizer_that_cannot_tell_positions() -> None:
    vocabulary = letters()
    vocabulary.tokenizer.is_fast = False  # type: ignore[union-attr, misc]
    stream = token_stream(text_of("abc", "de"), vocabulary)
    assert bytes(stream.ids.tolist()) == b"abc\n\nde"
    assert stream.documents.tolist() == [0] * 7


def test_articles_begin_at_headings_of_the_first_kind() -> None:
    first = ["", " = First = \n", "", " Some = text \n", " = = Part = = \n", "", " = = = Deep = = = \n", ""]
    rows = [*first, " = Second one = \n", "", "x"]
    text = text_of(*rows, joining="", articles=True)
    assert text.documents() == ["".join(first), "".join(rows[8:])]
    assert "".join(text.documents()) == text.joined()
    assert text.document_starts(limit=8) == [0]
    stream = token_stream(text, letters())
    assert np.bincount(stream.documents).tolist() == [len("".join(first)), len("".join(rows[8:]))]


def test_a_line_of_a_formula_is_no_heading() -> None:
    """As in the article on the constant k filter, in WikiText-2's test set."""
    rows = [
        "",
        " = Constant k filter = \n",
        "",
        " a frequency of \n",
        " = 1 rad / s and k = \n",
        " 1. \n",
        "",
        " = Next = \n",
        "",
    ]
    text = text_of(*rows, articles=True)
    assert text.documents() == ["\n\n".join(rows[:7]) + "\n\n", "\n\n".join(rows[7:])]


def test_what_stands_before_the_first_heading_belongs_to_the_first_article() -> None:
    assert text_of("before\n= A =\na\n= B =\nb", articles=True).documents() == ["before\n= A =\na\n", "= B =\nb"]
    assert text_of("no heading at all", articles=True).documents() == ["no heading at all"]


def test_rows_are_documents_elsewhere() -> None:
    assert text_of("= A =", "b", "").documents() == ["= A =", "b", ""]


def test_a_text_file_with_headings(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("= A =\n\nalpha\n\n== no ==\n\n= B =\n\nbeta\n", encoding="utf-8")
    text = load_text("a.txt", "train", tmp_path)
    assert text.documents() == ["= A =\n\nalpha\n\n== no ==\n\n", "= B =\n\nbeta\n"]
    assert text.source == Source("a.txt", "", "", "file", digest(["= A =\n\nalpha\n\n== no ==\n\n= B =\n\nbeta\n"]), True)


def test_articles_of_wikitext(mirror: Path) -> None:
    text = load_text("wikitext2", "test", Path())
    documents = text.documents()
    assert len(text.rows) == 4358
    assert len(documents) == 60
    assert "".join(documents) == text.joined() == "\n\n".join(text.rows)
    assert all(re.match(r"\s*= [^=\n]+ = \n", document) for document in documents)
    assert documents[0].lstrip().startswith("= Robert Boulter =")
    assert text.source.complete, "the mirror's copy of this split is known to be the whole"
    assert not load_text("Salesforce/wikitext/wikitext-2-v1:validation", "test", Path()).source.complete


def test_packed_windows_are_the_text_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijk")
    found = packed_windows("a.txt", "train", letters(), 4, None, tmp_path)
    assert [bytes(row.tolist()) for row in found.array] == [b"abcd", b"efgh"]
    assert found.content == digest_array(found.array)


@pytest.mark.parametrize(("tokens", "windows"), [(4, 1), (7, 1), (8, 2), (11, 2), (1000, 2)])
def test_packed_windows_keep_to_the_budget(tmp_path: Path, tokens: int, windows: int) -> None:
    (tmp_path / "a.txt").write_text("abcdefghijk")
    found = packed_windows("a.txt", "train", letters(), 4, tokens, tmp_path)
    assert found.array.shape == (windows, 4)
    assert found.content == digest_array(found.array)


@pytest.mark.parametrize("tokens", [None, 3])
def test_packed_windows_of_too_short_a_text(tmp_path: Path, tokens: int | None) -> None:
    (tmp_path / "a.txt").write_text("abcdef")
    length = 7 if tokens is None else 4
    with pytest.raises(DataError, match=rf"a\.txt has 6 tokens, fewer than one window of {length}|fewer than one"):
        packed_windows("a.txt", "train", letters(), length, tokens, tmp_path)


def test_packed_windows_of_a_token_file(tmp_path: Path) -> None:
    array = np.arange(20).reshape(5, 4)
    name = write_tokens(tmp_path, array)
    assert np.array_equal(packed_windows(name, "train", letters(), 512, None, tmp_path).array, array)
    cut = packed_windows(name, "train", letters(), 512, 11, tmp_path)
    assert np.array_equal(cut.array, array[:2])
    assert cut.content == digest_array(array[:2])
    with pytest.raises(DataError, match=r"tokens\.npy has windows of 4 tokens, and 3 tokens are fewer than one"):
        packed_windows(name, "train", letters(), 512, 3, tmp_path)


def test_a_token_file_as_a_stream(tmp_path: Path) -> None:
    flat = stream_file(write_tokens(tmp_path, np.arange(6)), letters(), tmp_path)
    assert (flat.ids.tolist(), flat.documents.tolist(), flat.window) == (list(range(6)), [0] * 6, None)
    windows = stream_file(write_tokens(tmp_path, np.arange(6).reshape(3, 2)), letters(), tmp_path)
    assert (windows.ids.tolist(), windows.documents.tolist(), windows.window) == (list(range(6)), [0, 0, 1, 1, 2, 2], 2)
    for bad in (np.zeros((1, 1, 2), int), np.zeros(0, int), np.array(5)):
        with pytest.raises(DataError, match="must hold a flat token stream or"):
            stream_file(write_tokens(tmp_path, bad), letters(), tmp_path)
    with pytest.raises(DataError, match="the token 128, outside"):
        stream_file(write_tokens(tmp_path, np.array([128])), letters(), tmp_path)


# Names and the mirror


@pytest.mark.parametrize(
    ("name", "near"), [("wikitxt2", "wikitext2"), ("c44", "c4"), ("C4", "c4"), ("wikitext-2", "wikitext2")]
)
def test_unknown_sources_name_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        load_text(name, "train", Path())
    assert f"there is no text source {name!r}; did you mean {near!r}?" in str(error.value)
    assert "Known: FILE.npy, FILE.txt, OWNER/NAME[/CONFIG], c4, wikitext2." in str(error.value)


@pytest.mark.parametrize("name", ["", ":", "a/b/c/d", "a b/c", "/abs/olute", "x.npy", "http://a.b/c"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(UnknownNameError, match="there is no text source"):
        load_text(name, "train", Path())


def test_data_sets_of_the_mirror(fake_mirror: Callable[..., Path]) -> None:
    fake_mirror("allenai/c4/en/train", ["one", "two"])
    fake_mirror("allenai/c4/en/validation", ["three"])
    fake_mirror("their/own/default/train", ["four"])
    fake_mirror("their/own/small/extra", ["five"])
    names = {"c4": "one two", "c4:validation": "three", "their/own": "four", "their/own/small:extra": "five"}
    for name, joined in names.items():
        text = load_text(name, "train", Path())
        assert text.joined() == joined
        assert (text.source.origin, text.source.complete, text.source.content) == ("mirror", False, digest(text.rows))
    assert load_text("their/own/small:extra", "train", Path()).source.config == "small"


def test_a_known_text_by_its_long_name_is_the_same(fake_mirror: Callable[..., Path]) -> None:
    fake_mirror("allenai/c4/en/train", ["one", "two"])
    fake_mirror("Salesforce/wikitext/wikitext-2-raw-v1/test", ["", " = A = \n", ""])
    for short, long in (("c4", "allenai/c4/en"), ("wikitext2:test", "Salesforce/wikitext/wikitext-2-raw-v1:test")):
        assert load_text(long, "train", Path()) == load_text(short, "train", Path())
    assert load_text("allenai/c4/en", "train", Path()).joining == " "


def test_another_mirror_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        write_mirror(tmp_path / name, "allenai/c4/en/train", [name])
        monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / name))
        assert load_text("c4", "train", Path()).rows == [name]


def test_what_the_mirror_lacks(fake_mirror: Callable[..., Path]) -> None:
    fake_mirror("allenai/c4/en/validation", ["x"])
    fake_mirror("allenai/c4/de/train", ["x"])
    there = r"PRUNEBENCH_MIRROR has allenai/c4/de/train\.jsonl, allenai/c4/en/validation\.jsonl\."
    with pytest.raises(DataError, match=rf"the mirror holds no allenai/c4, en, train: {there}"):
        load_text("c4", "train", Path())
    with pytest.raises(DataError, match=r"the mirror holds no Salesforce/wikitext, .*: PRUNEBENCH_MIRROR has nothing of it"):
        load_text("wikitext2", "test", Path())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "a"}\n{"text":\n', r"owner/name/default/train\.jsonl cannot be read as JSON lines: .*"),
        (b"", r"owner/name/default/train\.jsonl cannot be read as JSON lines: it is empty\."),
        (b'{"text": "\xff"}\n', r"owner/name/default/train\.jsonl cannot be read as JSON lines: .*utf-8.*"),
        (b'{"sentence": "a", "label": 1}\n', r"has no column 'text'; its columns are sentence, label\."),
        (b'{"text": " "}\n{"text": ""}\n{"text": null}\n', r"\(default, train\) holds no text\."),
    ],
    ids=["broken", "empty", "not UTF-8", "another column", "blank"],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_data_sets_that_are_none(fake_mirror: Callable[..., Path], content: bytes, complaint: str) -> None:
    fake_mirror("owner/name/default/train", []).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as error:
        load_text("owner/name", "train", Path())
    assert "\n" not in str(error.value)


def test_a_row_without_text_is_empty(fake_mirror: Callable[..., Path]) -> None:
    fake_mirror("owner/name/default/train", ["a", {"text": None}, "b"])
    assert load_text("owner/name", "train", Path()).rows == ["a", "", "b"]


@pytest.mark.parametrize(("content", "complaint"), [(b" \n", "is empty"), (b"\xff\xfe", "cannot be read as UTF-8 text")])
def test_text_files_that_are_none(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"the file a\.txt {complaint}"):
        load_text("a.txt", "train", tmp_path)


OFFLINE_PROGRAM = """
import socket, sys
from pathlib import Path

def refuse(*args, **options):
    print("reached for", args[-1:], file=sys.stderr)
    raise OSError("no network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

from prunebench.bench.evals.perplexity import Perplexity
from prunebench.bench.specs import eval_facts
from prunebench.toolkit.calibration import calibration_tokens
from prunebench.toolkit.loading import identify, load_model, resolve_model

source = resolve_model("owner/tiny", [Path()], revision="0123abc")
identity = identify(source)
load_model(source, "float32")
print(source.source, calibration_tokens("c4", identity.vocabulary(), 2, 16, 0, Path()).array.shape)
print(Perplexity(data="wikitext2", window=16).conditions(eval_facts(identity, Path()))["windows"])
"""


def test_nothing_touches_the_network_where_there_is_a_mirror(bench: Bench, tmp_path: Path) -> None:
    text = bench.calibration.read_text(encoding="utf-8")
    write_mirror(tmp_path, "allenai/c4/en/train", text.split("\n\n"))
    write_mirror(tmp_path, "Salesforce/wikitext/wikitext-2-raw-v1/test", text.split("\n"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(bench.model)
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_PROGRAM],
        env=environment | {"PRUNEBENCH_MIRROR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "reached for" not in done.stderr
    assert done.stdout.splitlines()[0] == "mirror:owner/tiny (2, 16)"


def test_tests_leave_the_users_caches_alone() -> None:
    import datasets

    home = Path.home()
    assert not Path(datasets.config.HF_DATASETS_CACHE).is_relative_to(home)
    assert not cache_folder().is_relative_to(home)

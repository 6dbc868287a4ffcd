"""The four texts that come with the project: enough of them, original, and disjoint."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prunebench.bench.suite import load_suite, suites_folder

FOLDER = suites_folder() / "quickstart"
LEAST = {"evaluation": 60_000, "training": 60_000, "calibration": 25_000, "validation": 15_000}
"""Bytes of each text."""

HEADING = re.compile(r"^= ([^=\n]+) =$", re.MULTILINE)


def read(name: str) -> str:
    return (FOLDER / "texts" / f"{name}.txt").read_bytes().decode("ascii")


def articles(name: str) -> list[tuple[str, str]]:
    """Titles and bodies."""
    parts = HEADING.split(read(name))
    assert parts[0].strip() == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def grams(text: str, size: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[at : at + size]) for at in range(len(found) - size + 1)]


def grams_of(name: str, size: int) -> list[tuple[str, ...]]:
    """None of them runs from one article into the next."""
    return [gram for title, body in articles(name) for gram in grams(f"{title} {body}", size)]


def test_there_are_these_four() -> None:
    assert {path.name for path in (FOLDER / "texts").iterdir()} == {f"{name}.txt" for name in LEAST}


@pytest.mark.parametrize("name", LEAST)
def test_a_text_is_large_enough(name: str) -> None:
    assert len(read(name)) >= LEAST[name]


@pytest.mark.parametrize("name", LEAST)
def test_a_text_is_plain(name: str) -> None:
    text = read(name)  # fails on what is not ASCII
    assert not set(text) - {chr(code) for code in range(32, 127)} - {"\n"}
    assert text.endswith("\n")
    assert not re.search(r"[ \t]+$|\n{4}", text, re.MULTILINE)


def test_together_they_are_many_articles_with_titles_of_their_own() -> None:
    assert sum(len(read(name)) for name in LEAST) >= 160_000
    titles = [title.lower() for name in LEAST for title, _ in articles(name)]
    assert len(titles) >= 100
    assert [title for title, count in Counter(titles).items() if count > 1] == []
    assert min(len(words(body)) for name in LEAST for _, body in articles(name)) >= 50


def test_nothing_is_said_over_and_over() -> None:
    """At most 2% of all runs of eight words occur a second time."""
    counts = Counter(gram for name in LEAST for gram in grams_of(name, 8))
    repeated = sum(count - 1 for count in counts.values())
    assert repeated / counts.total() <= 0.02


@pytest.mark.parametrize(("one", "other"), list(combinations(LEAST, 2)))
def test_texts_share_no_article_and_no_run_of_thirteen_words(one: str, other: str) -> None:
    bodies = [{" ".join(words(body)) for _, body in articles(name)} for name in (one, other)]
    assert not bodies[0] & bodies[1]
    assert not set(grams_of(one, 13)) & set(grams_of(other, 13))


def test_the_suite_uses_them_as_what_they_are() -> None:
    suite = load_suite("quickstart")
    assert suite.calibration is not None
    assert suite.calibration.source == "quickstart/texts/calibration.txt"
    assert [entry.use for entry in suite.eval if "texts/" in entry.use and "texts/evaluation.txt" not in entry.use] == []
    sources = {"training": suite.training, "validation": suite.validation}
    for name, section in sources.items():
        assert section is None or section.source == f"quickstart/texts/{name}.txt"


def test_there_is_enough_to_calibrate_on() -> None:
    suite = load_suite("quickstart")
    assert suite.calibration is not None
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "wiki7m")
    lengths = [len(tokenizer(f"= {title} ={body}", verbose=False)["input_ids"]) for title, body in articles("calibration")]
    assert suite.calibration.length == 256
    assert sum(length > suite.calibration.length for length in lengths) >= suite.calibration.samples / 2


def test_the_model_has_a_card_that_names_its_sources() -> None:
    card = (FOLDER / "wiki7m" / "README.md").read_text(encoding="utf-8")
    for source in ("WikiText-2", "C4", "TinyStories", "CC BY-SA", "ODC-BY", "CDLA-Sharing", "public"):
        assert source in card, source
    for number in ("61.72", "95.44", "16.57"):
        assert number in card


def test_the_model_is_the_one_that_the_card_describes() -> None:
    names = {path.name for path in (FOLDER / "wiki7m").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if Path(name).suffix in (".bin", ".pt", ".py")]
    size = (FOLDER / "wiki7m" / "model.safetensors").stat().st_size
    assert 14_000_000 < size < 15_000_000  # 7.3 million float16 weights

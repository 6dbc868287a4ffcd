"""The quickstart's minimal pairs: as the script makes them, balanced, none twice, and hard enough for a pruned model."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter, defaultdict
from itertools import pairwise
from math import comb
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunebench.shipped import suites_folder
from prunebench.targets import Unstructured
from prunebench.toolkit import keep_mask

FOLDER = suites_folder() / "quickstart"
TASKS = FOLDER / "tasks"
Item = dict[str, Any]
ITEMS: list[Item] = [json.loads(line) for line in (TASKS / "pairs.jsonl").read_text(encoding="ascii").splitlines()]
FIELDS = ["id", "phenomenon", "sentence_good", "sentence_bad", "prefix", "good", "bad", "rest"]
WHOLE = "word_order"
"""The phenomenon whose sentences differ in more than one word."""


def by_phenomenon() -> dict[str, list[Item]]:
    found = defaultdict(list)
    for item in ITEMS:
        found[item["phenomenon"]].append(item)
    return found


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9']+", text.lower())
    return {tuple(words[at : at + size]) for at in range(len(words) - size + 1)}


def test_the_file_is_what_the_script_writes() -> None:
    made = runpy.run_path(str(TASKS / "make_pairs.py"))
    assert (TASKS / "pairs.jsonl").read_bytes() == "".join(made["lines"]()).encode("ascii")


def test_there_are_enough_items_of_enough_phenomena() -> None:
    assert [item["id"] for item in ITEMS] == list(range(len(ITEMS)))
    assert len(ITEMS) >= 800
    counts = Counter(item["phenomenon"] for item in ITEMS)
    assert len(counts) >= 10
    assert set(counts.values()) == {80}
    assert counts[WHOLE]


def test_the_first_items_are_a_sample_of_all_phenomena() -> None:
    """So that a limited evaluation sees them all."""
    kinds = len(by_phenomenon())
    counts = Counter(item["phenomenon"] for item in ITEMS[: 4 * kinds])
    assert set(counts.values()) == {4}
    assert len(counts) == kinds


def test_an_item_is_plain_text_in_these_fields() -> None:
    for item in ITEMS:
        assert list(item) == FIELDS
        for sentence in (item["sentence_good"], item["sentence_bad"]):
            assert re.fullmatch(r"[A-Z][A-Za-z]*,?( [A-Za-z]+,?)+\.", sentence), sentence


def test_a_good_sentence_has_the_right_article() -> None:
    for item in ITEMS:
        assert not re.search(r"\b(a [aeiou]|an [^aeiou])", item["sentence_good"].lower()), item["sentence_good"]


def test_two_sentences_differ_in_one_word() -> None:
    for item in ITEMS:
        if item["phenomenon"] == WHOLE:
            assert item["prefix"] == item["good"] == item["bad"] == item["rest"] == ""
            continue
        assert item["sentence_good"] == f"{item['prefix']} {item['good']} {item['rest']}"
        assert item["sentence_bad"] == f"{item['prefix']} {item['bad']} {item['rest']}"
        assert len(item["prefix"].split()) >= 2
        assert len(item["good"].split()) == len(item["bad"].split()) == 1
        assert item["good"] != item["bad"]
        assert item["rest"]


def test_in_another_order_stand_the_same_words() -> None:
    for item in by_phenomenon()[WHOLE]:
        good, bad = (item[name].rstrip(".").split() for name in ("sentence_good", "sentence_bad"))
        assert good != bad
        assert Counter(good) == Counter(bad)


def test_no_sentence_stands_there_twice() -> None:
    """Nor is one right here and wrong there."""
    sentences = Counter(item[name] for item in ITEMS for name in ("sentence_good", "sentence_bad"))
    assert [sentence for sentence, count in sentences.items() if count > 1] == []


def test_every_word_is_right_as_often_as_it_is_wrong() -> None:
    """Against the same other word: whatever looks only at the two words is right in half of the items."""
    for phenomenon, items in by_phenomenon().items():
        counts = Counter((item["good"], item["bad"]) for item in items)
        for (good, bad), count in counts.items():
            assert counts[bad, good] == count, (phenomenon, good, bad)


def test_twins_stand_together() -> None:
    for one, other in zip(ITEMS[::2], ITEMS[1::2], strict=True):
        assert one["phenomenon"] == other["phenomenon"]
        assert (one["good"], one["bad"]) == (other["bad"], other["good"])


def test_items_are_varied() -> None:
    """At most 4 of 80 items have one prefix, and a phenomenon uses at least 60 words."""
    for phenomenon, items in by_phenomenon().items():
        if phenomenon != WHOLE:
            assert Counter(item["prefix"] for item in items).most_common(1)[0][1] <= 4, phenomenon
        assert len({word for item in items for word in item["sentence_good"].split()}) >= 60, phenomenon


@pytest.mark.parametrize("name", ["calibration", "evaluation", "training", "validation"])
def test_no_run_of_six_words_stands_in_a_text(name: str) -> None:
    text = grams((FOLDER / "texts" / f"{name}.txt").read_text(encoding="ascii"), 6)
    shared = [item["id"] for item in ITEMS if (grams(item["sentence_good"], 6) | grams(item["sentence_bad"], 6)) & text]
    assert shared == []


def test_the_task_asks_for_the_likelier_sentence() -> None:
    task = yaml.safe_load((TASKS / "pairs.yaml").read_text(encoding="ascii"))
    assert task["task"] == "prunebench_pairs"
    assert task["output_type"] == "multiple_choice"
    assert task["doc_to_text"] == ""
    assert task["doc_to_choice"] == "{{[sentence_good, sentence_bad]}}"
    assert task["doc_to_target"] == 0
    assert (TASKS / task["dataset_kwargs"]["data_files"][task["test_split"]]).is_file()


def test_the_card_names_every_phenomenon() -> None:
    card = (TASKS / "README.md").read_text(encoding="ascii")
    for phenomenon in by_phenomenon():
        assert f"| {phenomenon} |" in card, phenomenon


@torch.inference_mode()
def right(model: Any) -> list[bool]:
    """Whether the good sentence of each item has the higher likelihood, after the token that begins a text."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "wiki7m")
    sentences = [item[name] for item in ITEMS for name in ("sentence_good", "sentence_bad")]
    tokens = [[tokenizer.bos_token_id, *tokenizer(sentence)["input_ids"]] for sentence in sentences]
    order = sorted(range(len(tokens)), key=lambda at: len(tokens[at]))
    likelihoods = torch.zeros(len(tokens))
    for start, end in pairwise([*range(0, len(order), 64), len(order)]):
        chosen = order[start:end]  # of nearly one length
        longest = len(tokens[chosen[-1]])
        padded = torch.tensor([tokens[at] + [-1] * (longest - len(tokens[at])) for at in chosen])
        logits = model(input_ids=padded.clamp(min=0)).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), padded[:, 1:], ignore_index=-1, reduction="none")
        likelihoods[chosen] = -losses.sum(dim=1)
    return (likelihoods[::2] > likelihoods[1::2]).tolist()


@pytest.mark.slow
def test_the_dense_model_is_above_chance_and_a_pruned_one_falls() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "wiki7m", dtype=torch.float32).eval()
    dense = right(model)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data *= keep_mask(module.weight.data.abs(), Unstructured(0.7), "matrix")
    pruned = right(model)
    assert sum(dense) / len(dense) > 0.7
    accuracies = [sum(dense[item["id"]] for item in items) / len(items) for items in by_phenomenon().values()]
    assert sum(accuracy > 0.6 for accuracy in accuracies) > 0.8 * len(accuracies)
    lost = sum(before and not after for before, after in zip(dense, pruned, strict=True))
    won = sum(after and not before for before, after in zip(dense, pruned, strict=True))
    chance = sum(comb(lost + won, count) for count in range(lost, lost + won + 1)) / 2 ** (lost + won)
    assert chance < 0.001, (lost, won)  # McNemar's exact test, one-sided

"""Recognition and production: against slow formulas, with models that always do one thing, and on data that are none."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import FAMILIES, VOCABULARY, Letters, cases, eval_job, tiny
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from prunebench.bench.evals import answering
from prunebench.bench.evals.answering import Prompt, Reader, continuations, log_likelihoods
from prunebench.bench.evals.generation import Generation, is_loop, judge
from prunebench.bench.evals.questions import Question, load_tasks, words
from prunebench.errors import DataError, NonFiniteError, OptionError, UnknownNameError
from prunebench.options import build, canonical, parse_step
from prunebench.plugins import load_registry
from prunebench.spec import EvalFacts, Score
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.loading import ModelSource, identify, load_model

pytestmark = pytest.mark.usefixtures("own_cache")

LETTERS = 128
END = 0
CONTEXT = 64
SHAPE = {"vocab_size": LETTERS, "max_position_embeddings": CONTEXT, "eos_token_id": END, "bos_token_id": 1}
PAIRS = [
    {"phenomenon": "agreement", "prefix": "The dog", "good": "barks", "bad": "bark"},
    {"phenomenon": "agreement", "prefix": "The dogs over there", "good": "bark", "bad": "barks"},
    {"phenomenon": "word order", "prefix": "", "good": "", "bad": ""},
    {"phenomenon": "number", "prefix": "Two", "good": "cats", "bad": "cat"},
    {"phenomenon": "number", "prefix": "He had one", "good": "Cat", "bad": "dogs"},
]
ASKED = [pair for pair in PAIRS if pair["prefix"]]


class Spelling(Letters):
    """A tokenizer of one token a character, back and forth; NUL ends a text."""

    eos_token_id, bos_token_id, all_special_ids = END, 1, (END, 1)

    def __len__(self) -> int:
        return LETTERS

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [chr(i) for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True) -> str:
        assert not clean_up_tokenization_spaces
        return "".join(chr(i) for i in ids if not (skip_special_tokens and i in self.all_special_ids))


def facts_of(folder: Path, tokenizer: Any = None, **config: Any) -> EvalFacts:
    return EvalFacts(LlamaConfig(**SHAPE | config), tokenizer or Spelling(), "spelling", str(folder))


def measure(model: Any, facts: EvalFacts, batch_size: int = 4, **options: Any) -> Score:
    evaluation = Generation(**{"tasks": ("pairs.jsonl",)} | options)
    return evaluation.measure(eval_job(evaluation, model, facts, batch_size=batch_size))


def write_pairs(folder: Path, rows: Sequence[Any] = PAIRS, name: str = "pairs.jsonl") -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return name


class Oracle(LlamaForCausalLM):
    """Gives the chance of each next letter by a rule that is told the text so far."""

    def __init__(self, rule: Callable[[str], Mapping[str, float]]) -> None:
        super().__init__(LlamaConfig(**SHAPE, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
        self.rule, self.broken = rule, ""

    def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: Any, attention_mask: Any = None, **_: Any) -> CausalLMOutputWithPast:  # type: ignore[override]
        mask_all = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.full((*input_ids.shape, LETTERS), -100.0)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), mask_all.tolist(), strict=True)):
            for at in range(len(ids)):
                text = "".join(chr(i) for i, shown in zip(ids[: at + 1], mask, strict=False) if shown)
                for letter, chance in self.rule(text).items():
                    logits[row, at, ord(letter)] = math.log(chance)
                logits[row, at] *= math.nan if self.broken and text.endswith(self.broken) else 1
        return CausalLMOutputWithPast(logits=logits)


def saying(rest_of: Callable[[Mapping[str, str]], str]) -> Oracle:
    """A model that goes on with this text behind each prefix, and then ends."""

    def rule(text: str) -> Mapping[str, float]:
        for pair in sorted(ASKED, key=lambda pair: -len(pair["prefix"])):
            whole = pair["prefix"] + rest_of(pair)
            if whole.startswith(text) and len(text) >= len(pair["prefix"]):
                return {(whole + "\0")[len(text)]: 1.0}
        return {"\0": 1.0}

    return Oracle(rule)


# Models that always do one thing


@pytest.mark.parametrize(
    ("rest_of", "recognised", "produced", "empty", "repetitive", "answers"),
    cases(
        {  # recognised is None where the model finds all words equally unlikely
            "right": (lambda pair: f" {pair['good']}.", 1, 1, 0, 0, ["barks", "bark", "cats", "cat"]),
            "right, in capitals and quotes": (lambda pair: f' "{pair["good"].upper()}"', None, 1, 0, 0, None),
            "wrong": (lambda pair: f" {pair['bad']} it is", 0, 0, 0, 0, ["bark", "barks", "cat", "dogs"]),
            "right, but late": (lambda pair: f" not {pair['good']}", None, 0, 0, 0, ["not"] * 4),
            "silent": (lambda _: "", None, 0, 1, 0, [""] * 4),
            "only spaces": (lambda _: " \n  ", None, 0, 1, 0, [""] * 4),
            "only marks": (lambda _: ' .. , " !', None, 0, 1, 0, [""] * 4),
            "in a loop": (lambda _: " so it so it so it", None, 0, 0, 1, ["so"] * 4),
            "the right word in a loop": (lambda pair: 4 * f" {pair['good']}", 1, 1, 0, 1, None),
            "the last word again": (lambda pair: f" {pair['prefix'].split()[-1]} is", None, 0, 0, 1, None),
        }
    ),
)
def test_a_model_that_is_always(
    tmp_path: Path,
    rest_of: Callable[[Mapping[str, str]], str],
    recognised: int | None,
    produced: int,
    empty: int,
    repetitive: int,
    answers: list[str] | None,
) -> None:
    write_pairs(tmp_path)
    score = measure(saying(rest_of), facts_of(tmp_path))
    known = score.parts["recognised"] if recognised is None else recognised
    found = {name: set(score.items[name]) for name in ("produced", "empty", "repetitive")}
    assert found == {"produced": {produced}, "empty": {empty}, "repetitive": {repetitive}}
    assert score.items["answer"] == (answers or score.items["answer"])
    assert score.value == produced
    assert score.parts == {
        "recognised": known,
        "produced": produced,
        "gap": known - produced,
        "empty": empty,
        "repetitive": repetitive,
    }


def test_a_model_that_knows_what_it_does_not_say(tmp_path: Path) -> None:
    """The likeliest word is neither; of the two the right one is three times as likely."""
    write_pairs(tmp_path, [{"phenomenon": "number", "prefix": "Two", "good": "cats", "bad": "dogs"}])
    steps = {"Two": {" ": 1.0}, "Two ": {"x": 0.6, "c": 0.3, "d": 0.1}}

    def rule(text: str) -> Mapping[str, float]:
        rest = next((word[len(text) :] for word in ("Two cats", "Two dogs") if word.startswith(text)), "")
        return steps.get(text, {rest[0]: 1.0} if rest else {"\0": 1.0})

    score = measure(Oracle(rule), facts_of(tmp_path))
    assert score.parts == {"recognised": 1, "produced": 0, "gap": 1, "empty": 0, "repetitive": 0}
    assert score.items["margin"] == [pytest.approx(math.log(3), abs=1e-4)]


def test_words_that_are_equally_likely_are_not_told_apart(tmp_path: Path) -> None:
    write_pairs(tmp_path, [{"phenomenon": "number", "prefix": "Two", "good": "cats", "bad": "dogs"}])
    score = measure(Oracle(lambda _: {}), facts_of(tmp_path))
    assert (score.items["margin"], score.items["recognised"]) == ([0.0], [0])


def test_the_right_answer_is_set_against_the_likeliest_of_the_others(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    chances = {"b": 0.4, "a": 0.5, "c": 0.06, "h": 0.04}
    lambada(fake_mirror, "So we met b", "she saw a", "he took c", "in the h")
    score = measure(Oracle(lambda text: chances if text.endswith(" ") else {" ": 1.0}), facts_of(tmp_path), tasks=("lambada",))
    best = [max(chance for other, chance in chances.items() if other != right) for right in "bach"]
    assert score.items["margin"] == pytest.approx([math.log(chances["bach"[i]] / best[i]) for i in range(4)], abs=1e-4)
    assert score.items["recognised"] == [0, 1, 0, 0]


@pytest.mark.parametrize(("goes_on", "margin"), [(0.9, math.log(0.1 / 0.9)), (0.2, math.log(0.8 / 0.2))])
def test_a_word_that_another_begins_with_is_judged_by_its_end(tmp_path: Path, goes_on: float, margin: float) -> None:
    write_pairs(tmp_path, [{"phenomenon": "agreement", "prefix": "They", "good": "go", "bad": "gos"}])

    def rule(text: str) -> Mapping[str, float]:
        steps = {"They": {" ": 1.0}, "They ": {"g": 1.0}, "They g": {"o": 1.0}, "They go": {"s": goes_on, " ": 1 - goes_on}}
        return steps.get(text, {".": 1.0})

    score = measure(Oracle(rule), facts_of(tmp_path))
    assert score.items["margin"] == [pytest.approx(margin, abs=1e-4)]
    assert score.items["recognised"] == [int(margin > 0)]


# Against slow formulas


def slow_log_likelihood(model: PreTrainedModel, prefix: str, answer: str) -> float:
    """In float64, a position at a time, nothing padded; a word ends before any token but a letter or digit."""
    whole = f"{prefix} {answer}"
    found = 0.0
    for at in range(len(prefix), len(whole) + 1):
        logits = model(torch.tensor([list(whole[:at].encode())])).logits[0, -1].detach().double()
        chances = (logits - logits.max()).exp()
        chances /= chances.sum()
        if at < len(whole):
            found += math.log(chances[ord(whole[at])])
        else:
            found += math.log(sum(float(chances[i]) for i in range(LETTERS) if not chr(i).isalnum()))
    return found


def slow_continuation(model: PreTrainedModel, ids: Sequence[int], new_tokens: int, stops: Sequence[int]) -> list[int]:
    """The most likely token, again and again, each time from the whole text so far."""
    found: list[int] = []
    while len(found) < new_tokens:
        found.append(int(model(torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
        if found[-1] in stops:
            break
    return found


def test_margins_and_answers_are_those_of_the_slow_formulas(tmp_path: Path) -> None:
    model, facts = tiny("llama", torch.float64, **SHAPE), facts_of(tmp_path)
    write_pairs(tmp_path)
    score = measure(model, facts)
    margins, answers = [], []
    for pair in ASKED:
        good, bad = (slow_log_likelihood(model, pair["prefix"], pair[name]) for name in ("good", "bad"))
        margins.append(good - bad)
        new = slow_continuation(model, list(pair["prefix"].encode()), 20, [END])
        answers.append(judge(Question("", pair["prefix"], pair["good"], ()), "".join(map(chr, new))))
    assert score.items["margin"] == pytest.approx(margins, abs=1e-4)
    assert score.items["recognised"] == [int(margin > 0) for margin in margins]
    assert set(score.items["recognised"]) == {0, 1}
    assert score.items["answer"] == [answer.word for answer in answers]
    assert score.items["repetitive"] == [int(answer.repetitive) for answer in answers]


class Ids:
    """A reader that keeps tokens as they are."""

    size, context, stops = VOCABULARY, 32, (2,)

    def text(self, prompt: Sequence[int], new: Sequence[int]) -> Any:
        length = next((i + 1 for i, token in enumerate(new) if token in self.stops), len(new))
        return list(new[:length])

    def word_ends(self) -> torch.Tensor:
        return torch.arange(5, 25)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_in_any_family(tmp_path: Path, family: str) -> None:
    # Gemma 2 turns scores of a float64 model into float32, where what its mask hides for padding is no number any more.
    model = tiny(family, torch.float32 if family == "gemma2" else torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in (2, 9, 5, 5, 14, 3, 8)]
    prompts = [Prompt(ids[:-1], [ids, [*ids[:-1], 7, 11]], len(ids) - 1) for ids in rows]
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    job = eval_job(Generation(tasks=(write_pairs(tmp_path),)), model, facts_of(tmp_path), batch_size=3)
    reader: Any = Ids()
    assert len(list(answering._batches(job, [len(ids) for ids in rows], reader, 6, ""))) > 1
    wanted = [slow_continuation(model, prompt.tokens, 6, (2,)) for prompt in prompts]
    assert continuations(job, prompts, 6, reader) == wanted
    for prompt, values in zip(prompts, log_likelihoods(job, prompts, reader), strict=True):
        for ids, value in zip(prompt.candidates, values, strict=True):
            log_p = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
            slow = sum(float(log_p[at - 1, ids[at]]) for at in range(prompt.begins, len(ids)))
            assert value == pytest.approx(slow + float(log_p[-1, 5:25].logsumexp(0)), abs=1e-5)


def test_adapters_count(tmp_path: Path) -> None:
    """Hooks on matrices, as a step attaches them, are in force for both answers."""
    model, facts = tiny("llama", torch.float64, **SHAPE), facts_of(tmp_path)
    write_pairs(tmp_path, ASKED[:1])
    without = measure(model, facts).items
    anatomy, generator = find_anatomy(model), torch.Generator().manual_seed(0)
    for matrix in (matrix for block in anatomy.blocks for matrix in block.matrices):
        outputs, inputs = matrix.weight.shape
        down, up = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, inputs), (outputs, 2)))
        anatomy.adapters.attach(matrix, down, up, 0.5)
    found = measure(model, facts).items
    prefix, good, bad = (str(ASKED[0][name]) for name in ("prefix", "good", "bad"))
    new = slow_continuation(model, list(prefix.encode()), 20, [END])
    assert found["answer"] == [" ".join(words("".join(map(chr, new)))[:1])[:24]] != without["answer"]
    margin = slow_log_likelihood(model, prefix, good) - slow_log_likelihood(model, prefix, bad)
    assert found["margin"] == [pytest.approx(margin, abs=1e-4)] != without["margin"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_batch_size_does_not_matter(tmp_path: Path, dtype: torch.dtype) -> None:
    model, facts = tiny("llama", dtype, **SHAPE), facts_of(tmp_path)
    write_pairs(tmp_path, [{**pair, "prefix": pair["prefix"] + tail} for pair in ASKED for tail in ("", " of it")])
    found = [measure(model, facts, batch_size).items for batch_size in (1, 3, 8)]
    for other in found[1:]:
        assert other.pop("margin") == pytest.approx(found[0]["margin"], abs=2e-4)
        assert other == {name: column for name, column in found[0].items() if name != "margin"}


def test_what_the_folder_says_of_generation_is_not_followed(tmp_path: Path) -> None:
    model, facts = tiny("llama", **SHAPE), facts_of(tmp_path)
    write_pairs(tmp_path)
    plain = measure(model, facts)
    other = copy.deepcopy(model)
    other.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        max_length=3,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        min_new_tokens=15,
        suppress_tokens=list(range(60, 120)),
        eos_token_id=list(range(30, 110)),
        num_beams=3,
    )
    said = other.generation_config
    assert measure(other, facts).items == plain.items
    assert other.generation_config is said


# Tokens


def test_the_continuation_begins_behind_the_prefix(tmp_path: Path) -> None:
    reader = Reader(facts_of(tmp_path))
    assert reader.text([*b"The dog"], [*b" barks", END, *b" no"]) == " barks"
    assert reader.text([*b"a"], [*b"b"]) == "b"
    assert reader.text([*b"a"], [END]) == ""


def test_a_long_prefix_loses_its_beginning_but_not_its_bos(tmp_path: Path) -> None:
    question = Question("", "x" * 30 + "abcdefghij", "yes", ("no",))
    for bos, tokens in ((None, b"xxabcdefghij"), (1, b"\1xabcdefghij")):
        reader = Reader(facts_of(tmp_path, Spelling(bos), max_position_embeddings=32))
        prompt = reader.prompt(question, 20)
        assert bytes(prompt.tokens) == tokens
        assert [bytes(ids) for ids in prompt.candidates] == [tokens + b" yes", tokens + b" no"]
        assert prompt.begins == 12
    whole = Reader(facts_of(tmp_path)).prompt(question, 20)
    assert (len(whole.tokens), whole.begins) == (40, 40)
    long = Question("", "x" * 40, "y" * 25, ("n",))
    assert len(Reader(facts_of(tmp_path, max_position_embeddings=32)).prompt(long, 4).candidates[0]) == 32


def test_a_context_without_room(tmp_path: Path) -> None:
    reader = Reader(facts_of(tmp_path, max_position_embeddings=20))
    with pytest.raises(DataError, match="the model's context of 20 tokens has no room for 'The dog'"):
        reader.prompt(Question("", "The dog", "barks", ("bark",)), 20)


class Merging(Spelling):
    """Makes one token of `g` and a space behind it."""

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        return super().__call__(text.replace("g ", "\x7f"), **options)


def test_a_prefix_that_is_parted_otherwise_before_an_answer(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, Merging())
    prompt = Reader(facts).prompt(Question("", "The dog", "bark", ("cry",)), 20)
    assert bytes(prompt.tokens) == b"The dog"
    assert [bytes(ids) for ids in prompt.candidates] == [b"The do\x7fbark", b"The do\x7fcry"]
    assert prompt.begins == len("The do")


def test_an_end_of_text_that_the_tokenizer_adds_is_left_out(tmp_path: Path) -> None:
    class Ending(Spelling):
        def __call__(self, text: str, **options: Any) -> dict[str, Any]:
            return super().__call__(text + "\0", **options)

    prompt = Reader(facts_of(tmp_path, Ending())).prompt(Question("", "The dog", "bark", ("cry",)), 20)
    assert bytes(prompt.tokens) == b"The dog"
    assert [bytes(ids) for ids in prompt.candidates] == [b"The dog bark", b"The dog cry"]


def test_words_end_before_all_but_letters_and_digits(tmp_path: Path) -> None:
    class Pieces(Spelling):
        all_special_ids = (END, ord("z"))

        def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
            return ["▁q" if chr(i) == "q" else chr(i) for i in ids]

    marks = {i for i in range(LETTERS) if not chr(i).isalnum()}
    assert set(Reader(facts_of(tmp_path, vocab_size=200)).word_ends().tolist()) == marks
    found = Reader(facts_of(tmp_path, Pieces())).word_ends().tolist()
    assert set(found) == marks | {ord("q"), ord("z")}, "one begins with a space that decoding drops, the other is special"


# Words


@pytest.mark.parametrize(
    ("text", "found"),
    cases(
        {
            "case and marks": (' "Shane," he', ["shane", "he"]),
            "apostrophes": (" don’t 'quote' Shane's", ["don't", "quote", "shane's"]),
            "hyphens": (" well-known -- a-", ["well-known", "a"]),
            "dashes and dots": (" thought...Tess—he", ["thought", "tess", "he"]),
            "other letters": (" Éric_Müller 12", ["éric", "müller", "12"]),
            "nothing": (" \n .,-", []),
        }
    ),
)
def test_words(text: str, found: list[str]) -> None:
    assert words(text) == found


@pytest.mark.parametrize(
    ("text", "loop"),
    cases(
        {
            "one word": ("the the the", True),
            "twice is none": ("the the", False),
            "two words": ("of it of it of it", True),
            "four words": ("as soon as possible as soon as possible as soon as", False),
            "four words, three times": ("so be it now so be it now so be it now", True),
            "five words": ("a b c d e a b c d e a b c d e", False),
            "behind another half": ("once upon a time he said no no no no", False),
            "from the half": ("once upon a no no no", True),
            "up to the half": ("no no no once upon a", True),
            "between": ("a no no no no b c", True),
            "text": ("he went on to be the king of the land", False),
            "nothing": ("", False),
        }
    ),
)
def test_loops(text: str, loop: bool) -> None:
    assert is_loop(text.split()) is loop


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    cases(
        {
            "more behind it": ("cats", " cats and dogs", True),
            "a longer word": ("cat", " cats", False),
            "two words": ("New York", " new york, he", True),
            "half of two": ("New York", " new", False),
        }
    ),
)
def test_as_many_words_count_as_the_answer_has(answer: str, text: str, right: bool) -> None:
    found = judge(Question("", "It is", answer, ()), text)
    assert found.right is right


def test_a_right_answer_may_repeat_the_last_word() -> None:
    assert not judge(Question("", "He said that", "that", ()), " that was").repetitive
    assert judge(Question("", "He said that", "she", ()), " that was").repetitive


# Data


def lambada(fake_mirror: Callable[..., Path], *texts: str) -> None:
    fake_mirror("EleutherAI/lambada_openai/default/test", texts)


PASSAGES = ("So we met Bob", "and then\nbob", "she saw Ann", "he took the car", "they like Ann", "in the old house")


def test_lambada_asks_for_the_last_word(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    lambada(fake_mirror, *PASSAGES)
    (task,) = load_tasks(["lambada"], 0, tmp_path)
    assert [(question.prefix, question.answer) for question in task.questions[:2]] == [
        ("So we met", "Bob"),
        ("and then", "bob"),
    ]
    assert [question.wrong for question in task.questions] == [
        ("Ann", "car", "house"),  # not `bob`, and `Ann` once
        ("Ann", "car", "house"),
        ("car", "house", "Bob"),
        ("Ann", "house", "Bob"),
        ("house", "Bob", "car"),
        ("Bob", "Ann", "car"),
    ]
    assert {question.stratum for question in task.questions} == {"lambada"}


def test_the_limit_changes_no_question(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    lambada(fake_mirror, *PASSAGES)
    write_pairs(tmp_path)
    names = ["lambada", "pairs.jsonl"]
    whole, few = load_tasks(names, 0, tmp_path), load_tasks(names, 3, tmp_path)
    assert [task.questions for task in few] == [task.questions[:3] for task in whole]
    assert [len(task.questions) for task in whole] == [6, 4]


def test_pairs_without_a_prefix_are_left_out(tmp_path: Path) -> None:
    (task,) = load_tasks([write_pairs(tmp_path)], 0, tmp_path)
    assert task.name == "pairs"
    assert task.questions == [Question(p["phenomenon"], p["prefix"], p["good"], (p["bad"],)) for p in ASKED]


def test_tasks_count_equally(tmp_path: Path) -> None:
    write_pairs(tmp_path, ASKED[:1], "one.jsonl")
    write_pairs(tmp_path, ASKED[1:], "rest.jsonl")
    model = saying(lambda pair: f" {pair['good' if pair is ASKED[0] else 'bad']}.")
    score = measure(model, facts_of(tmp_path), tasks=("one.jsonl", "rest.jsonl"))
    assert score.items["produced"] == [1, 0, 0, 0]
    assert score.items["task"] == ["one", "rest", "rest", "rest"]
    assert score.items["stratum"] == ["agreement", "agreement", "number", "number"]
    assert (score.value, score.parts["recognised"]) == (0.5, 0.5)
    assert (score.unit, score.higher_is_better) == ("accuracy", True)
    assert score.sample is not None
    assert (score.sample.column, score.sample.strata, score.sample.tasks) == ("produced", "stratum", "task")


def test_long_answers_are_kept_in_part(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    score = measure(saying(lambda _: " " + 60 * "a"), facts_of(tmp_path))
    assert score.items["answer"] == [19 * "a"] * 4  # a space and 19 letters are decoded
    write_pairs(tmp_path, [{"phenomenon": "length", "prefix": "Two", "good": 30 * "b", "bad": "c"}])
    assert measure(saying(lambda _: " " + 60 * "a"), facts_of(tmp_path)).items["answer"] == [24 * "a"]


def test_conditions_say_what_was_asked(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    lambada(fake_mirror, *PASSAGES)
    write_pairs(tmp_path)
    facts = facts_of(tmp_path)
    conditions = Generation(tasks=("lambada", "pairs.jsonl"), limit=3).conditions(facts)
    assert json.loads(json.dumps(conditions)) == conditions
    assert (conditions["data"], conditions["complete"]) == ("EleutherAI/lambada_openai + pairs.jsonl", False)
    assert (conditions["questions"], conditions["new_tokens"]) == (6, 20)
    first, second = conditions["tasks"]
    assert (first["task"], first["config"], first["split"], first["origin"]) == ("lambada", "default", "test", "mirror")
    assert (second["task"], second["origin"], second["questions"]) == ("pairs", "file", 3)
    assert first["candidates"] != second["candidates"]
    assert "BOS" in conditions["prefix"]


def test_conditions_tell_questions_apart(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    first = Generation(tasks=(write_pairs(tmp_path),)).conditions(facts)
    fewer = Generation(tasks=("pairs.jsonl",), limit=2).conditions(facts)
    assert (fewer["questions"], fewer["content"]) == (2, first["content"])
    assert fewer["tasks"][0]["question_hash"] != first["tasks"][0]["question_hash"]
    write_pairs(tmp_path, [{**pair, "bad": "xyz"} for pair in ASKED])
    other = Generation(tasks=("pairs.jsonl",)).conditions(facts)
    assert other["content"] != first["content"]
    assert other["tasks"][0]["question_hash"] != first["tasks"][0]["question_hash"]


def test_as_many_tokens_are_decoded_as_the_longest_answer_has_and_four(tmp_path: Path) -> None:
    write_pairs(tmp_path, [*PAIRS, {"phenomenon": "length", "prefix": "Two", "good": 25 * "b", "bad": "c"}])
    assert Generation(tasks=("pairs.jsonl",)).conditions(facts_of(tmp_path))["new_tokens"] == 1 + 25 + 4


# What cannot be


@pytest.mark.parametrize(
    ("line", "complaint"),
    cases(
        {
            "no field": ({"phenomenon": "a", "prefix": "b", "good": "c"}, "has no text under 'bad'"),
            "a number": ({"phenomenon": "a", "prefix": "b", "good": 3, "bad": "c"}, "has no text under 'good'"),
            "no phenomenon": ({"prefix": "b", "good": "c", "bad": "d"}, "has no text under 'phenomenon'"),
            "no answer": ({"phenomenon": "a", "prefix": "b", "good": " ", "bad": "c"}, "has no word under 'good'"),
            "nothing wrong": ({"phenomenon": "a", "prefix": "b", "good": "c", "bad": "."}, "has no word under 'bad'"),
            "one word": ({"phenomenon": "a", "prefix": "b", "good": "It", "bad": "it"}, "the same word under 'good' and 'bad'"),
            "no object": ([1, 2], "is no object with named columns"),
            "cut": ('{"phenomenon": "a', "is not JSON"),
        }
    ),
)
def test_a_line_that_is_no_pair(tmp_path: Path, line: Any, complaint: str) -> None:
    write_pairs(tmp_path, [*PAIRS, line])
    with pytest.raises(DataError, match=rf"pairs\.jsonl, line 6, .*{complaint}"):
        Generation(tasks=("pairs.jsonl",)).conditions(facts_of(tmp_path))


def test_files_without_questions(tmp_path: Path) -> None:
    beginning = b'{"phenomenon": "a", "prefix": "", "good": "b", "bad": "c"}'
    for content, complaint in ((b"", "is empty"), (beginning, "holds no pair with a prefix"), (b"\xff\xfe{", "is not UTF-8")):
        (tmp_path / "pairs.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=complaint):
            load_tasks(["pairs.jsonl"], 0, tmp_path)
    with pytest.raises(DataError, match=r"the file none\.jsonl does not exist"):
        load_tasks(["none.jsonl"], 0, tmp_path)


def test_a_pair_may_hold_any_sign(tmp_path: Path) -> None:
    """U+2028 ends a line for Python's `splitlines`, and stands unescaped in JSON's strings."""
    row = {"phenomenon": "a", "prefix": "the\u2028dog", "good": "barks", "bad": "bark"}
    write_pairs(tmp_path, [json.dumps(row, ensure_ascii=False)])
    (task,) = load_tasks(["pairs.jsonl"], 0, tmp_path)
    assert [question.prefix for question in task.questions] == ["the\u2028dog"]


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_pairs(tmp_path)
    write_pairs(tmp_path / "other")
    with pytest.raises(DataError, match="two tasks are called pairs"):
        load_tasks(["pairs.jsonl", "other/pairs.jsonl"], 0, tmp_path)


@pytest.mark.parametrize("row", ["", "  ", "alone", "the end ..."])
def test_a_passage_without_a_last_word(tmp_path: Path, fake_mirror: Callable[..., Path], row: str) -> None:
    lambada(fake_mirror, "So we met Bob", row, "she saw Ann")
    with pytest.raises(DataError, match="lambada: passage 1 of 3 has no last word to ask for"):
        load_tasks(["lambada"], 1, tmp_path)


def test_too_few_words_to_choose_from(tmp_path: Path, fake_mirror: Callable[..., Path]) -> None:
    lambada(fake_mirror, "we met Bob", "she saw Ann", "he saw Eve")
    with pytest.raises(DataError, match="3 passages have fewer than 4 different last words"):
        load_tasks(["lambada"], 0, tmp_path)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UnknownNameError, match="there is no task 'lambda'; did you mean 'lambada'"):
        load_registry().eval(parse_step("generation[tasks=lambda]"))
    with pytest.raises(UnknownNameError, match="there is no task ''"):
        Generation(tasks=())
    with pytest.raises(OptionError, match="generation: the number of questions cannot be -1"):
        Generation(limit=-1)


def test_options_as_text() -> None:
    built = build(Generation, parse_step("generation[tasks=lambada+quickstart/tasks/pairs.jsonl,limit=7]"))
    assert (built.tasks, built.limit) == (("lambada", "quickstart/tasks/pairs.jsonl"), 7)
    assert canonical("generation", built) == "generation[tasks=lambada+quickstart/tasks/pairs.jsonl,limit=7]"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    model = tiny("llama", **SHAPE)
    with torch.no_grad():
        model.get_input_embeddings().weight[ord("w")] = value
    write_pairs(tmp_path)
    with pytest.raises(NonFiniteError, match="the likelihood of 1 of 4 answers is not finite, first of question 2"):
        measure(model, facts_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wiki7m", "stories260K"])
def test_a_real_tokenizer(mirror: Path, name: str) -> None:
    """Byte-level BPE and SentencePiece: words, their ends and continuations, each question by itself and unpadded."""
    source = ModelSource(mirror / "models" / name, name, "local")
    identity, model = identify(source), load_model(source, "float32")
    facts = EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(mirror))
    score = measure(model, facts, tasks=("lambada",), limit=6)
    tokenizer: Any = facts.tokenizer
    (task,) = load_tasks(["lambada"], 6, mirror)
    for at, question in enumerate(task.questions):
        ids = tokenizer(question.prefix)["input_ids"]
        values = []
        for answer in (question.answer, *question.wrong):
            whole = tokenizer(f"{question.prefix} {answer}")["input_ids"]
            assert whole[: len(ids)] == ids
            log_p = model(torch.tensor([whole])).logits[0].detach().double().log_softmax(-1)
            tail = whole[-6:]
            here = len(tokenizer.decode(tail))
            ends = [i for i in range(log_p.shape[1]) if not tokenizer.decode([*tail, i])[here:][:1].isalnum()]
            behind = float(log_p[-1, ends].logsumexp(0))
            values.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(ids), len(whole))) + behind)
        assert score.items["margin"][at] == pytest.approx(values[0] - max(values[1:]), abs=2e-3)
        new = slow_continuation(model, ids, 20, [tokenizer.eos_token_id])
        text = tokenizer.decode([*ids, *new], skip_special_tokens=True)[len(tokenizer.decode(ids, skip_special_tokens=True)) :]
        assert score.items["answer"][at] == words(text)[0][:24]


def test_numbers_that_end_while_decoding(tmp_path: Path) -> None:
    """The likelihoods of the candidates are sound, but what the model itself goes on with is not."""
    write_pairs(tmp_path)
    model = saying(lambda pair: f" {pair['good']} and x")
    model.broken = "x"
    with pytest.raises(NonFiniteError, match="the model's predictions are NaN while it answers"):
        measure(model, facts_of(tmp_path))


def test_only_some_phenomena(tmp_path: Path) -> None:
    name = write_pairs(tmp_path)
    (whole,) = load_tasks([name], 0, tmp_path)
    one = whole.questions[0].stratum
    (some,) = load_tasks([name], 0, tmp_path, [one])
    assert some.questions == [question for question in whole.questions if question.stratum == one]
    assert 0 < len(some.questions) < len(whole.questions)
    assert some.conditions()["question_hash"] != whole.conditions()["question_hash"]
    with pytest.raises(UnknownNameError, match=f"no phenomenon in {name} '{one}s'; did you mean '{one}'"):
        load_tasks([name], 0, tmp_path, [f"{one}s"])

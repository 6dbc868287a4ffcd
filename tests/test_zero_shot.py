"""Zero-shot accuracy: likelihoods by hand and by lm-eval itself, sets, conditions, bad input."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support import Bench, Ran, eval_job, fingerprint, same_bits, tiny, traces, write_mirror
from transformers import PreTrainedModel

from prunebench.bench.evals import lm_model, lm_tasks, task_index
from prunebench.bench.evals.task_index import SETS
from prunebench.bench.evals.zero_shot import ZeroShot
from prunebench.bench.runner import classify
from prunebench.errors import DataError, NonFiniteError
from prunebench.shipped import suites_folder
from prunebench.spec import EvalFacts, Score
from prunebench.testing.lanes import LateLane
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.loading import ModelSource, identify, load_model
from prunebench.toolkit.placement import Streaming
from prunebench.toolkit.state import capture, differences, guarded
from prunebench.toolkit.stream import evaluating
from prunebench.toolkit.visiting import Visits, visiting

CONTEXT = 64
SHAPE = {"vocab_size": 300, "max_position_embeddings": CONTEXT, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 0}
PLAIN: dict[str, Any] = {
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "own.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{answers}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    "metadata": {"version": 1.0},
}
WORDS = ("the a boy girl runs sits away house saw red old tree and then he she was little").split()  # noqa: SIM905 - words


def rows_of(count: int = 12, seed: int = 0, answers: int = 3) -> list[dict[str, Any]]:
    """Questions of unequal lengths; some answers are single tokens of one beginning."""
    draw = random.Random(seed)
    text = lambda most: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))  # noqa: E731
    return [
        {"question": text(6), "answers": [text(3) for _ in range(answers)], "right": draw.randrange(answers)}
        for _ in range(count)
    ]


def write_task(folder: Path, rows: Sequence[Any] | None = None, name: str = "own", **changes: Any) -> str:
    """A definition and its data; JSON is YAML too."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"data_files": {"test": f"{name}.jsonl"}}
    definition = {"task": name, **PLAIN, "dataset_kwargs": files, **changes}
    (folder / f"{name}.yaml").write_text(json.dumps({k: v for k, v in definition.items() if v is not None}))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (rows_of() if rows is None else rows)))
    return f"{name}.yaml"


@pytest.fixture
def facts(bench: Bench, tmp_path: Path) -> EvalFacts:
    identity = identify(ModelSource(bench.model, "tiny", "local"))
    return EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(tmp_path))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", torch.float64, **SHAPE)


def measure(model: PreTrainedModel, facts: EvalFacts, progress: Any = lambda *_: None, **options: Any) -> Score:
    evaluation = ZeroShot(**options)
    return evaluation.measure(eval_job(evaluation, model, facts, progress=progress))


def likelihoods_of(score: Score) -> list[list[float]]:
    return [[float(number) for number in str(text).split()] for text in score.items["likelihoods"]]


def by_hand(model: PreTrainedModel, facts: EvalFacts, question: str, answer: str) -> float:
    """The sum of the log-probabilities of the answer's tokens, one at a time, each from as much before it as is read."""
    encode: Any = facts.tokenizer
    whole, before = encode(question + answer)["input_ids"], encode(question)["input_ids"]
    whole = whole[-(CONTEXT + 1) :]
    answers = len(encode(question + answer)["input_ids"]) - len(before)
    total = 0.0
    for at in range(len(whole) - answers, len(whole)):
        with torch.no_grad():
            logits = model(torch.tensor([whole[:at]])).logits[0, -1].numpy().astype(np.float64)
        total += logits[whole[at]] - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    return total


# The numbers


def test_likelihoods_are_those_by_hand(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path) -> None:
    rows = rows_of()
    rows[3]["question"] = " ".join(WORDS * 8)  # beyond the context: read without its beginning
    rows[5]["answers"][2] = rows[5]["answers"][1]  # equally likely: the first counts
    score = measure(model, facts, tasks=write_task(tmp_path, rows))
    expected = [[by_hand(model, facts, row["question"], f" {answer}") for answer in row["answers"]] for row in rows]
    assert np.allclose(likelihoods_of(score), expected, atol=6e-4)
    choices = [int(np.argmax(row)) for row in expected]
    assert score.items["choice"] == choices
    assert score.items["gold"] == [row["right"] for row in rows]
    assert score.items["right"] == [int(a == row["right"]) for a, row in zip(choices, rows, strict=True)]
    assert score.items["question"] == list(range(len(rows)))
    assert score.items["choices"] == [3] * len(rows)
    assert 0 < sum(score.items["right"]) < len(rows)  # type: ignore[arg-type]
    assert score.value == sum(score.items["right"]) / len(rows)  # type: ignore[arg-type]
    assert (score.unit, score.higher_is_better, score.parts) == ("accuracy", True, {})
    assert score.sample is not None
    assert (score.sample.column, score.sample.strata, score.sample.tasks) == ("right", "stratum", "task")


def test_blocks_that_rest_elsewhere_come_and_go(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path) -> None:
    name = write_task(tmp_path)
    wanted = measure(model, facts, tasks=name)
    blocks = [block.module for block in find_anatomy(model).blocks]
    placement = Streaming("cpu", LateLane)  # forgetting to wait for a block finds NaN
    with visiting(blocks, Visits(placement)):
        assert measure(model, facts, tasks=name) == wanted
    assert placement._lane.begun > 0  # type: ignore[attr-defined]
    assert measure(model, facts, tasks=name) == wanted


def test_a_sentence_without_a_question_begins_with_the_bos_token(
    model: PreTrainedModel, facts: EvalFacts, tmp_path: Path
) -> None:
    rows = rows_of()
    name = write_task(tmp_path, rows, doc_to_text="", target_delimiter="")
    bos: Any = facts.tokenizer
    expected = [[by_hand(model, facts, bos.bos_token, answer) for answer in row["answers"]] for row in rows]
    assert np.allclose(likelihoods_of(measure(model, facts, tasks=name)), expected, atol=6e-4)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_answers_are_those_of_lm_eval_one_at_a_time(
    model: PreTrainedModel, facts: EvalFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """Neither batches, nor their order, nor what is shared between requests may matter."""
    rows = rows_of(60)
    for row in rows[::3]:
        row["answers"] = ["a", "tree", "the old house and the old tree"]
    name = write_task(tmp_path, rows)
    choices, right, numbers = plainly(model, facts, tmp_path / name, metric)
    seen = []
    for tokens in (1, 40, 1024):
        monkeypatch.setattr(lm_model, "HOST_TOKENS", tokens)
        score = measure(model, facts, tasks=name, metric=metric)
        assert (score.items["choice"], score.items["right"]) == (choices, right)
        seen.append(likelihoods_of(score))
        assert np.allclose(seen[-1], numbers, atol=6e-4)
    assert seen[0] == seen[1] == seen[2]
    assert (numbers.argmax(axis=1).tolist() == choices) == (metric == "acc"), "the lengths of answers make no difference here"


def plainly(
    model: PreTrainedModel, facts: EvalFacts, path: Path, metric: str
) -> tuple[list[int], list[int], np.ndarray[Any, Any]]:
    """Choices, which of them are right, and likelihoods, by lm-eval's own model class and a question at a time."""
    with lm_tasks.quiet():
        task = lm_tasks.load_tasks(path.name, 0, path.parent).tasks["own"]
        plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(facts.tokenizer), batch_size=1, logits_cache=False)
        found = lm_eval.simple_evaluate(
            model=plain, tasks=[task], num_fewshot=0, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
    samples = found["samples"]["own"]
    numbers = np.array([[answer[0] for answer in sample["filtered_resps"]] for sample in samples])
    lengths = np.array([[len(text) for text in sample["doc"]["answers"]] for sample in samples])
    choices = (numbers / lengths if metric == "acc_norm" else numbers).argmax(axis=1)
    return choices.tolist(), [int(sample[metric]) for sample in samples], numbers


def test_the_model_and_everything_global_stay_as_they_were(
    facts: EvalFacts, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The head was tied and is no longer: lm-eval's model class ties the weights of the model it is given."""
    model = tiny("llama", tie_word_embeddings=True, **SHAPE)
    assert untie_head(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[:50] = 0.0  # type: ignore[no-untyped-call]
    model.model.layers[1].train()
    before, kept, settings = fingerprint(model), traces(model), model.config.to_dict()
    tokenizer: Any = facts.tokenizer
    assert tokenizer.pad_token is None
    name = write_task(tmp_path)
    evaluation = ZeroShot(tasks=name)
    job = eval_job(evaluation, model, facts, batch_size=1)
    capfd.readouterr()
    state = capture()
    with guarded([]), evaluating(model):
        evaluation.measure(job)
    assert capfd.readouterr() == ("", "")
    assert not [name for name, tensor in fingerprint(model).items() if not same_bits(tensor, before[name])]
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight  # type: ignore[no-untyped-call]
    assert traces(model) == kept
    assert model.config.to_dict() == settings
    assert not differences(state, capture())
    assert tokenizer.pad_token is None


def test_choices_are_filled_in_once_a_question(
    model: PreTrainedModel, facts: EvalFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval compiles their template anew each time."""
    name, filled = write_task(tmp_path), []
    evaluation = ZeroShot(tasks=name)
    evaluation.conditions(facts)
    render = lm_eval.utils.apply_template
    monkeypatch.setattr(lm_eval.utils, "apply_template", lambda text, doc: filled.append(text) or render(text, doc))
    measure(model, facts, tasks=name)
    assert filled.count(PLAIN["doc_to_choice"]) == 12


def test_progress_is_told(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_model, "HOST_TOKENS", 40)
    told: list[tuple[str, int, int]] = []
    measure(model, facts, lambda *what: told.append(what), tasks=write_task(tmp_path))
    assert len(told) > 3
    assert told == sorted(told)
    assert {what for what, _, _ in told} == {"answer"}
    assert all(0 <= done < total == 36 for _, done, total in told)


def test_weights_that_are_no_numbers(facts: EvalFacts, tmp_path: Path) -> None:
    broken = tiny("llama", **SHAPE)
    token = facts.tokenizer.encode("Q")[0]  # type: ignore[union-attr]
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = math.nan
    rows = [{"question": word, "answers": ["a boy", "a girl"], "right": 0} for word in ("the", "Q", "a")]
    with pytest.raises(NonFiniteError, match="a likelihood of question 1 of own is not finite") as caught:
        measure(broken, facts, tasks=write_task(tmp_path, rows))
    assert classify(caught.value, None).kind == "nan"


def test_a_text_as_the_answer(facts: EvalFacts, tmp_path: Path) -> None:
    """Right where the model would have written it; one that is all but impossible is a number too, its perplexity none."""
    certain = tiny("llama", torch.float64, **SHAPE)
    with torch.no_grad():
        certain.get_output_embeddings().weight *= 1e4  # type: ignore[no-untyped-call]
    read: Any = facts.tokenizer
    for question in WORDS:
        ids = read(question)["input_ids"]
        written = int(certain(torch.tensor([ids])).logits[0, -1].argmax())
        answer = read.decode([written])
        if read(question + answer)["input_ids"] == [*ids, written]:  # not half a letter
            break
    rows = [{"question": question, "answers": answer}, {"question": question, "answers": " tree"}]
    name = write_task(
        tmp_path,
        rows,
        output_type="loglikelihood",
        doc_to_choice=None,
        doc_to_target="answers",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )
    score = measure(certain, facts, tasks=name)
    assert (score.items["right"], score.items["choice"], score.items["gold"]) == ([1, 0], [0, -1], [0, 0])
    assert math.fsum(likelihoods_of(score)[1]) < -2000


def test_a_metric_of_mutual_information_costs_nothing_unless_it_is_asked_for(
    model: PreTrainedModel, facts: EvalFacts, tmp_path: Path
) -> None:
    """lm-eval answers each question twice for it."""
    plain = measure(model, facts, tasks=write_task(tmp_path, name="plain"))
    both = write_task(tmp_path, name="both", metric_list=[{"metric": "acc"}, {"metric": "acc_mutual_info"}])
    score = measure(model, facts, tasks=both)
    assert (score.items["choice"], score.items["choices"]) == (plain.items["choice"], plain.items["choices"])


def test_a_question_with_several_right_answers(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path) -> None:
    rows = [{**row, "right": [0, 2]} for row in rows_of()]
    score = measure(model, facts, tasks=write_task(tmp_path, rows))
    assert score.items["right"] == [int(choice in (0, 2)) for choice in score.items["choice"]]
    assert 0 < sum(score.items["right"]) < len(rows)  # type: ignore[arg-type]


def test_a_score_that_is_a_share_stays_one(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path) -> None:
    """TruthfulQA's mc2 gives each question the probability of its true answers."""
    (tmp_path / "share.py").write_text("def share(doc, results):\n    return {'acc': 0.25 + 0.5 * doc['right']}\n")
    rows = [{**row, "right": index % 2} for index, row in enumerate(rows_of(answers=2))]
    name = write_task(tmp_path, rows)
    text = json.dumps(json.loads((tmp_path / name).read_text()) | {"process_results": "FUNCTION"})
    (tmp_path / name).write_text(text.replace('"FUNCTION"', "!function share.share"))
    score = measure(model, facts, tasks=name)
    assert score.items["right"] == [0.25, 0.75] * 6
    assert score.value == 0.5


# Sets and groups


@pytest.fixture(scope="module")
def _stock() -> task_index.TaskIndex:
    """Some of the stock definitions: to read all of them takes ten seconds."""
    root = Path(lm_eval.__file__).parent / "tasks"
    folders = ["arc", "blimp", "glue", "hellaswag", "mmlu/default", "openbookqa", "super_glue", "winogrande"]
    manager = TaskManager(include_defaults=False, include_path=[root / folder for folder in folders])
    return task_index.TaskIndex(root, task_index._entries(manager, root))


@pytest.fixture
def stock(_stock: task_index.TaskIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_index, "stock_index", lambda: _stock)


def arc(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "question": row["question"],
            "choices": {"text": row["answers"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[row["right"]],
        }
        for number, row in enumerate(rows_of(rows, seed))
    ]


def two(rows: int, seed: int, *columns: str, label: str = "label") -> list[dict[str, Any]]:
    found = []
    for row in rows_of(rows, seed, 2):
        texts = [row["question"], *row["answers"]]
        found.append({**dict(zip(columns, texts, strict=False)), label: row["right"]})
    return found


FILES: dict[str, list[dict[str, Any]]] = {
    "aps/super_glue/boolq/validation": two(3, 1, "passage", "question"),
    "nyu-mll/glue/rte/validation": two(4, 2, "sentence1", "sentence2"),
    "Rowan/hellaswag/default/validation": [
        {
            "ind": 0,
            "activity_label": "Run",
            "ctx_a": "a boy.",
            "ctx_b": row["question"],
            "endings": row["answers"],
            "label": "1",
        }
        for row in rows_of(5, 3)
    ],
    "allenai/winogrande/winogrande_xl/validation": [
        {"sentence": "the boy saw the girl and _ runs away", "option1": "the boy", "option2": "the girl", "answer": "2"},
        {"sentence": "he saw the tree and _ was old", "option1": "he", "option2": "the tree", "answer": "1"},
    ],
    "allenai/ai2_arc/ARC-Easy/test": arc(6, 4),
    "allenai/ai2_arc/ARC-Challenge/test": arc(7, 5),
    "allenai/openbookqa/main/test": [{"question_stem": row.pop("question"), **row} for row in arc(8, 6)],
}


@pytest.fixture
def wanda7(tmp_path: Path, stock: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mirror with a few questions of each task."""
    for name, rows in FILES.items():
        write_mirror(tmp_path / "mirror", name, rows)
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))
    return tmp_path / "mirror" / "datasets"


def test_the_value_of_a_set_is_the_mean_of_its_members(model: PreTrainedModel, facts: EvalFacts, wanda7: Path) -> None:
    score = measure(model, facts, tasks="wanda7")
    assert tuple(score.parts) == SETS["wanda7"]
    asked = [str(task) for task in score.items["task"]]
    assert [asked.count(name) for name in SETS["wanda7"]] == [3, 4, 5, 2, 6, 7, 8]
    assert score.items["stratum"] == asked
    for name, value in score.parts.items():
        right = [int(x) for x, task in zip(score.items["right"], asked, strict=True) if task == name]
        assert value == sum(right) / len(right)
    assert score.value == pytest.approx(sum(score.parts.values()) / 7)
    assert score.value != pytest.approx(sum(map(int, score.items["right"])) / len(asked))
    winogrande = [number for number, task in enumerate(asked) if task == "winogrande"]
    assert [score.items["gold"][number] for number in winogrande] == [1, 0]


def test_a_set_with_a_missing_member_has_no_mean(model: PreTrainedModel, facts: EvalFacts, wanda7: Path) -> None:
    whole, before = measure(model, facts, tasks="wanda7"), ZeroShot().conditions(facts)
    (wanda7 / "nyu-mll/glue/rte/validation.jsonl").unlink()
    score, conditions = measure(model, facts, tasks="wanda7"), ZeroShot().conditions(facts)
    assert score.value is None
    assert score.parts == {name: value for name, value in whole.parts.items() if name != "rte"}
    assert "rte" not in score.items["task"]
    assert (conditions["missing"], before["missing"]) == (["rte"], [])
    assert conditions["tasks"] == {name: facts for name, facts in before["tasks"].items() if name != "rte"}


def test_the_only_member_left_is_shown(model: PreTrainedModel, facts: EvalFacts, wanda7: Path) -> None:
    for path in wanda7.rglob("*.jsonl"):
        if "boolq" not in str(path):
            path.unlink()
    score = measure(model, facts, tasks="wanda7")
    assert (score.value, list(score.parts)) == (None, ["boolq"])


def test_a_list_of_tasks_with_a_missing_one_is_refused(facts: EvalFacts, wanda7: Path) -> None:
    (wanda7 / "nyu-mll/glue/rte/validation.jsonl").rename(wanda7 / "nyu-mll/glue/rte/train.jsonl")
    with pytest.raises(DataError, match=r"rte needs nyu-mll/glue/rte/validation\.jsonl, and PRUNEBENCH_MIRROR has train"):
        ZeroShot(tasks="boolq+rte").conditions(facts)


def test_a_group_counts_by_its_questions(model: PreTrainedModel, facts: EvalFacts, tmp_path: Path) -> None:
    for name, count in (("first", 2), ("second", 10)):
        write_task(tmp_path, rows_of(count, count), name)
    (tmp_path / "both.yaml").write_text(json.dumps({"group": "both", "task": ["first", "second"]}))
    score = measure(model, facts, tasks="both.yaml")
    assert score.items["task"] == ["both"] * 12
    assert score.items["stratum"] == ["first"] * 2 + ["second"] * 10
    assert score.items["question"] == [0, 1, *range(10)]
    assert score.value == sum(map(int, score.items["right"])) / 12
    assert score.parts == {}
    assert (
        ZeroShot(tasks="both.yaml").conditions(facts)["tasks"]["both"] | {"tasks": 2, "items": 12}
        == (ZeroShot(tasks="both.yaml").conditions(facts)["tasks"]["both"])
    )


def test_a_limit_counts_for_each_task(model: PreTrainedModel, facts: EvalFacts, wanda7: Path) -> None:
    score = measure(model, facts, tasks="boolq+arc_easy", limit=2)
    assert score.items["task"] == ["boolq"] * 2 + ["arc_easy"] * 2
    whole = measure(model, facts, tasks="boolq+arc_easy")
    assert score.items["likelihoods"] == [whole.items["likelihoods"][number] for number in (0, 1, 3, 4)]


# Conditions


def test_conditions_say_what_was_asked(facts: EvalFacts, wanda7: Path) -> None:
    conditions = ZeroShot(tasks="winogrande").conditions(facts)
    assert json.loads(json.dumps(conditions)) == conditions
    hashes = [conditions["tasks"]["winogrande"].pop(name) for name in ("content", "prompt")]
    assert all(len(text) == 16 for text in hashes)
    assert conditions == {
        "set": None,
        "tasks": {"winogrande": {"tasks": 1, "version": "1.0", "kind": "multiple_choice", "split": "validation", "items": 2}},
        "missing": [],
        "metric": "acc",
        "shots": 0,
        "limit": None,
        "lm_eval": "0.4.13",
    }


def test_conditions_know_no_places(facts: EvalFacts, wanda7: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ZeroShot().conditions(facts)
    assert str(tmp_path) not in json.dumps(first)
    (tmp_path / "mirror").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "elsewhere"))
    assert ZeroShot().conditions(facts) == first
    here, there = tmp_path / "here", tmp_path / "there"
    found = []
    for folder in (here, there):
        name = write_task(folder)
        found.append(ZeroShot(tasks=name).conditions(EvalFacts(facts.config, facts.tokenizer, "", str(folder))))
    assert found[0] == found[1]
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    "change",
    [{"shots": 1}, {"limit": 2}, {"metric": "acc_norm"}, {"tasks": "arc_easy+arc_challenge"}, {"tasks": "arc_challenge"}],
    ids=str,
)
def test_conditions_tell_options_apart(facts: EvalFacts, wanda7: Path, change: dict[str, Any]) -> None:
    for name in ("Easy", "Challenge"):
        write_mirror(wanda7.parent, f"allenai/ai2_arc/ARC-{name}/validation", arc(4, 9))
    first = ZeroShot(tasks="arc_easy").conditions(facts)
    assert ZeroShot(**{"tasks": "arc_easy"} | change).conditions(facts) != first


def test_conditions_tell_data_apart(facts: EvalFacts, wanda7: Path) -> None:
    first = ZeroShot(tasks="arc_easy").conditions(facts)
    path = wanda7 / "allenai/ai2_arc/ARC-Easy/test.jsonl"
    path.write_text(path.read_text().replace('"answerKey": "A"', '"answerKey": "B"'))
    second = ZeroShot(tasks="arc_easy").conditions(facts)
    assert second["tasks"]["arc_easy"]["content"] != first["tasks"]["arc_easy"]["content"]


@pytest.mark.parametrize(
    "change",
    [
        {"doc_to_text": "{{question}}?"},
        {"target_delimiter": ""},
        {"description": "Answer. "},
        {"doc_to_target": "{{2 - right}}"},
        {"metadata": {"version": 2.0}},
    ],
    ids=str,
)
def test_conditions_tell_definitions_apart(facts: EvalFacts, tmp_path: Path, change: dict[str, Any]) -> None:
    first = ZeroShot(tasks=write_task(tmp_path)).conditions(facts)
    assert ZeroShot(tasks=write_task(tmp_path, **change)).conditions(facts) != first
    assert ZeroShot(tasks=write_task(tmp_path)).conditions(facts) == first


def test_conditions_tell_functions_apart(facts: EvalFacts, tmp_path: Path) -> None:
    name = write_task(tmp_path)
    text = (tmp_path / name).read_text().replace('"{{question}}"', "!function asking.ask")
    (tmp_path / name).write_text(text)
    found = []
    for mark in ("?", "!"):
        (tmp_path / "asking.py").write_text(f"def ask(doc):\n    return doc['question'] + '{mark}'\n")
        found.append(ZeroShot(tasks=name).conditions(facts)["tasks"]["own"])
    assert found[0]["prompt"] != found[1]["prompt"]
    assert found[0]["content"] == found[1]["content"]


def test_examples_are_drawn_as_lm_eval_draws_them_and_are_conditions(
    model: PreTrainedModel, facts: EvalFacts, wanda7: Path
) -> None:
    write_mirror(wanda7.parent, "allenai/ai2_arc/ARC-Easy/validation", arc(5, 8))
    write_mirror(wanda7.parent, "allenai/ai2_arc/ARC-Easy/train", arc(5, 9))
    first = ZeroShot(tasks="arc_easy", shots=2).conditions(facts)
    score = measure(model, facts, tasks="arc_easy", shots=2)
    assert score.items["likelihoods"] != measure(model, facts, tasks="arc_easy").items["likelihoods"]
    with lm_tasks.quiet():
        tasks = [*lm_tasks.load_tasks("arc_easy", 2, Path()).tasks.values()]
        plain = HFLM(pretrained=model, tokenizer=copy.deepcopy(facts.tokenizer), batch_size=1)
        found = lm_eval.simple_evaluate(
            model=plain, tasks=tasks, num_fewshot=2, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
        )
    samples = found["samples"]["arc_easy"]
    assert "Answer:" in samples[0]["arguments"][0][0].split("\n\n")[1], "there are examples"
    numbers = [[answer[0] for answer in sample["filtered_resps"]] for sample in samples]
    assert np.allclose(likelihoods_of(score), numbers, atol=6e-4)
    write_mirror(wanda7.parent, "allenai/ai2_arc/ARC-Easy/train", arc(5, 10))
    second = ZeroShot(tasks="arc_easy", shots=2).conditions(facts)
    assert second["tasks"]["arc_easy"]["prompt"] != first["tasks"]["arc_easy"]["prompt"]
    assert second["tasks"]["arc_easy"]["content"] == first["tasks"]["arc_easy"]["content"]


def test_a_split_that_stands_in_for_another_is_a_condition(facts: EvalFacts, wanda7: Path) -> None:
    name = "allenai/ai2_arc/ARC-Easy"
    write_mirror(wanda7.parent, f"{name}/validation", FILES[f"{name}/test"])
    first = ZeroShot(tasks="arc_easy").conditions(facts)["tasks"]["arc_easy"]
    assert (first["split"], "conversion" in first) == ("test", False)
    (wanda7 / name / "test.jsonl").unlink()
    second = ZeroShot(tasks="arc_easy").conditions(facts)["tasks"]["arc_easy"]
    assert second["conversion"] == "validation stands in for test"
    assert (second["split"], second["content"]) == ("validation", first["content"])


def test_what_is_kept_is_what_is_found(
    facts: EvalFacts, wanda7: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = ZeroShot().conditions(facts)
    kept = [*(own_cache / "tasks").iterdir()]
    assert len(kept) == 1
    with monkeypatch.context() as patch:
        patch.setattr(lm_tasks, "load_tasks", lambda *_: pytest.fail("this was kept"))
        assert ZeroShot().conditions(facts) == fresh
    kept[0].write_text("{")
    assert ZeroShot().conditions(facts) == fresh
    monkeypatch.setattr(ZeroShot, "revision", ZeroShot.revision + 1)
    ZeroShot().conditions(facts)
    assert len([*(own_cache / "tasks").iterdir()]) == 2


@pytest.mark.parametrize("place", ["beside", "a folder further", "the mirror", "included", "a function"])
def test_what_is_kept_follows_the_data_of_a_definition(
    facts: EvalFacts, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Wherever a definition's parts lie."""
    folder, changed = tmp_path / "mine", tmp_path / "mine" / "own.jsonl"
    name = write_task(folder)
    if place == "a folder further":
        changed = tmp_path / "data.jsonl"
        name = write_task(folder, dataset_kwargs={"data_files": {"test": "../data.jsonl"}})
        (folder / "own.jsonl").rename(changed)
    elif place == "the mirror":
        changed = write_mirror(tmp_path / "mirror", "some/body/default/test", rows_of())
        monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))
        name = write_task(folder, dataset_path="some/body", dataset_kwargs=None)
    elif place == "included":
        changed = tmp_path / "base.yaml"
        (folder / name).rename(changed)
        (folder / name).write_text(json.dumps({"include": "../base.yaml", "task": "own"}))
    elif place == "a function":
        changed = folder / "asking.py"
        changed.write_text("def ask(doc):\n    return doc['question']  # tree\n")
        (folder / name).write_text((folder / name).read_text().replace('"{{question}}"', "!function asking.ask"))
    facts = EvalFacts(facts.config, facts.tokenizer, "", str(folder))
    first = ZeroShot(tasks=name).conditions(facts)
    assert ZeroShot(tasks=name).conditions(facts) == first
    changed.write_text(changed.read_text().replace("tree", "trees").replace("{{question}}", "{{question}}?"))
    assert ZeroShot(tasks=name).conditions(facts) != first


def test_without_a_mirror_lm_eval_loads_the_data_itself(
    model: PreTrainedModel, facts: EvalFacts, stock: None, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        asked.append((path, name))
        rows = datasets.Dataset.from_list(arc(4))
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    score = measure(model, facts, tasks="arc_easy")
    assert set(asked) == {("allenai/ai2_arc", "ARC-Easy")}
    assert len(score.items["right"]) == 4
    assert not (own_cache / "tasks").exists(), "what the Hub has may change"


def test_without_mirror_or_network(facts: EvalFacts, stock: None) -> None:
    with pytest.raises(DataError, match=r"arc_easy cannot be loaded: .*\. Without a network set PRUNEBENCH_MIRROR"):
        ZeroShot(tasks="arc_easy").conditions(facts)


# Bad input


@pytest.fixture
def complaint(command: Callable[..., Ran], bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `prunebench eval` says, in one sentence or two, to tasks in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    if (tmp_path / "mirror").is_dir():
        monkeypatch.setenv("PRUNEBENCH_MIRROR", str(tmp_path / "mirror"))

    def ask(tasks: str, more: str = "") -> str:
        return command("eval", bench.model, "--eval", f"zero_shot[tasks={tasks}{more}]").complaint

    return ask


def test_an_unknown_task(wanda7: Path, complaint: Callable[..., str]) -> None:
    said = complaint("boolq+arc_esay")
    assert said.startswith("error: there is no task 'arc_esay'; did you mean 'arc_easy'? Near ones: ")
    assert said.count(",") < 8


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        ("mmlu_anatomy", "the task mmlu_anatomy needs cais/mmlu/anatomy/test.jsonl, and PRUNEBENCH_MIRROR has nothing of it."),
        ("mmlu", "needs cais/mmlu/abstract_algebra/test.jsonl, and PRUNEBENCH_MIRROR has nothing of it."),
        ("blimp", "no task of blimp can be had: the task blimp_adjunct_island needs nyu-mll/blimp/adjunct_island/train.jsonl"),
        ("boolq+boolq", "zero_shot: the task boolq is asked for twice; each counts once."),
        ("boolq,metric=f1", "zero_shot: the metric is acc or acc_norm, not 'f1'."),
        ("boolq,metric=acc_norm", "zero_shot: boolq has no acc_norm; it has acc."),
        ("boolq,shots=-1", "zero_shot: shots cannot be -1."),
        ("boolq,limit=-1", "zero_shot: limit cannot be -1."),
        ("arc_easy,shots=2", "the task arc_easy needs examples for 2 shots, and of its data only the split test is there."),
        ("boolq,shots=2", "boolq needs examples for 2 shots, and of its data only the split validation is there."),
    ],
)
def test_requests_that_cannot_be_met(wanda7: Path, complaint: Callable[..., str], tasks: str, says: str) -> None:
    assert says in complaint(tasks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output_type": "generate_until"}, "own is a task of kind generate_until; it takes multiple_choice and loglikelihood"),
        ({"num_fewshot": 0}, "the definition of own forbids examples (num_fewshot: 0), so shots must be 0"),
        ({"task": None}, "own.yaml defines no task of lm-eval: it needs a `task:`"),
        ({"doc_to_target": -1}, "the task own has no right answer for question 0"),
        ({"doc_to_target": "nothing"}, "the task own has no right answer for question 0"),
        ({"doc_to_choice": "{{answers"}, "the task own cannot be loaded: TemplateSyntaxError"),
        ({"dataset_kwargs": None}, "data_files: {SPLIT: FILE.jsonl}"),
        ({"dataset_kwargs": {"data_files": ["own.jsonl"]}}, "data_files: {SPLIT: FILE.jsonl}"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "the file none.jsonl cannot be read: No such file"),
        ({"test_split": "other"}, "the task own cannot be loaded: KeyError: 'other'"),
    ],
    ids=str,
)
def test_definitions_that_cannot_be_asked(
    tmp_path: Path, complaint: Callable[..., str], changes: dict[str, Any], says: str
) -> None:
    said = complaint(write_task(tmp_path, **changes), ",shots=1" if "num_fewshot" in changes else "")
    assert says in said
    assert "Without a network" not in said


@pytest.mark.parametrize("text", ["task: [own\n", "task: !!python/object:os.system {}\n  - x", "\x00"], ids=repr)
def test_a_broken_definition(tmp_path: Path, complaint: Callable[..., str], text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert "own.yaml cannot be read as a definition of a task: " in complaint("own.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "words\n"], ids=repr)
def test_a_file_that_defines_nothing(tmp_path: Path, complaint: Callable[..., str], text: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    assert "own.yaml defines no task of lm-eval" in complaint("own.yaml")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"right": 0}', '{"right": '], "own.jsonl, line 2, is not JSON: "),
        (["", "[1]"], "own.jsonl, line 2, is no object with named columns."),
        (["", ""], "the file own.jsonl is empty."),
        (["\udcff"], "the file own.jsonl is not UTF-8: invalid start byte at byte 0."),
    ],
)
def test_broken_data(tmp_path: Path, complaint: Callable[..., str], lines: list[str], says: str) -> None:
    name = write_task(tmp_path)
    (tmp_path / "own.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    assert says in complaint(name)


@pytest.mark.parametrize("right", [-1, 3, None, "", [], [0, 3]], ids=repr)
def test_a_question_without_an_answer(tmp_path: Path, complaint: Callable[..., str], right: Any) -> None:
    """As the test splits of GLUE and HellaSwag are: their answers are not published."""
    rows = [{**row, "right": right if number > 8 else row["right"]} for number, row in enumerate(rows_of())]
    if isinstance(right, list):
        rows = [{**row, "right": [row["right"]] if isinstance(row["right"], int) else row["right"]} for row in rows]
    if right == "":
        rows = [{**row, "right": row["answers"][0] if row["right"] != "" else ""} for row in rows]
    said = complaint(write_task(tmp_path, rows))
    assert "the task own has no right answer for question 9, so it cannot be scored." in said


def test_a_stock_task_without_answers(wanda7: Path, complaint: Callable[..., str]) -> None:
    path = wanda7 / "Rowan/hellaswag/default/validation.jsonl"
    path.write_text(path.read_text().replace('"label": "1"', '"label": ""'))
    assert "the task hellaswag cannot be loaded: ValueError: invalid literal for int()" in complaint("hellaswag")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "an answer is empty, so it has no likelihood"),
        (" ".join(WORDS * 8), r"' the a boy .*' is \d+ tokens, and the model takes 1 to 64"),
    ],
    ids=["empty", "long"],
)
def test_answers_that_have_no_likelihood(
    model: PreTrainedModel, facts: EvalFacts, tmp_path: Path, answer: str, says: str
) -> None:
    rows = [*rows_of(answers=2), {"question": "the", "answers": ["a", answer], "right": 0}]
    name = write_task(tmp_path, rows, target_delimiter=" " if answer else "")
    with pytest.raises(DataError, match=says):
        measure(model, facts, tasks=name)


def test_a_tokenizer_without_a_first_token(facts: EvalFacts) -> None:
    tokenizer: Any = copy.deepcopy(facts.tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="lm-eval begins a text with BOS or EOS, and the tokenizer has neither"):
        ZeroShot().conditions(EvalFacts(facts.config, tokenizer, "", facts.folder))


def test_a_model_without_a_tokenizer(facts: EvalFacts) -> None:
    with pytest.raises(DataError, match="zero_shot: tasks are text, and the model has no tokenizer"):
        ZeroShot().conditions(EvalFacts(facts.config, None, "", facts.folder))


# The quickstart's own task


def test_the_quickstart_pairs(model: PreTrainedModel, facts: EvalFacts) -> None:
    facts = EvalFacts(facts.config, facts.tokenizer, "", str(suites_folder()))
    name = "quickstart/tasks/pairs.yaml"
    conditions = ZeroShot(tasks=name, limit=40).conditions(facts)
    assert list(conditions["tasks"]) == ["prunebench_pairs"]
    lines = (suites_folder() / "quickstart/tasks/pairs.jsonl").read_text().splitlines()
    assert conditions["tasks"]["prunebench_pairs"]["items"] == len(lines) >= 800
    score = measure(model, facts, tasks=name, limit=40)
    rows = [json.loads(line) for line in lines[:40]]
    assert score.items["stratum"] == [f"prunebench_pairs: {row['phenomenon']}" for row in rows]
    assert set(score.items["gold"]) == {0}
    tokenizer: Any = facts.tokenizer
    expected = [
        [by_hand(model, facts, tokenizer.bos_token, row[key]) for key in ("sentence_good", "sentence_bad")] for row in rows
    ]
    assert np.allclose(likelihoods_of(score), expected, atol=6e-4)


# Real models, and the `lm_eval` command itself


def write_definitions(names: Sequence[str], mirror: Path, folder: Path) -> None:
    """The stock definitions with nothing but the place of their data changed."""
    root = Path(lm_eval.__file__).parent / "tasks"
    index = task_index.stock_index()
    for name in names:
        path = root / index.entries[name]["file"]
        stock = yaml.safe_load(path.read_text().replace("!function", ""))
        base = stock
        while "include" in base:
            base = yaml.safe_load((path.parent / base["include"]).read_text().replace("!function", ""))
        data = mirror / "datasets" / index.entries[name]["data"]
        splits = {**base, **stock}
        there = {file.stem: str(file) for file in data.glob("*.jsonl")}
        kept = {key: splits.get(f"{key}_split") for key in ("test", "validation", "training", "fewshot")}
        changes = {
            "include": str(path),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: there[split] for split in kept.values() if split in there}},
            **{f"{key}_split": None for key, split in kept.items() if split is not None and split not in there},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(changes))


def by_command(
    names: Sequence[str], model: Path, mirror: Path, folder: Path, limit: int, shots: int
) -> dict[str, list[dict[str, Any]]]:
    """Every question's answer, by `lm_eval run`."""
    write_definitions(names, mirror, folder)
    arguments = [
        *("--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "4"),
        *("--tasks", ",".join(names), "--include_path", str(folder), "--num_fewshot", str(shots), "--limit", str(limit)),
        *("--log_samples", "--output_path", str(folder / "out")),
    ]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for name in names:
        [path] = (folder / "out").glob(f"*/samples_{name}_2*.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[name] = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return found


KINDS = (
    "blimp_adjunct_island",
    "blimp_passive_1",
    "hellaswag",
    "arc_easy",
    "openbookqa",
    "winogrande",
    "boolq",
    "rte",
    "lambada_openai",
    "mmlu_anatomy",
)


@pytest.mark.parametrize(
    ("name", "tasks", "shots"),
    [
        pytest.param("stories260K", KINDS, 0, marks=pytest.mark.slow, id="stories260K"),
        pytest.param("wiki7m", KINDS, 0, marks=pytest.mark.soak, id="wiki7m"),
        pytest.param("stories260K", ("mmlu_anatomy", "arc_easy"), 3, marks=pytest.mark.soak, id="examples"),
    ],
)
def test_answers_are_those_of_the_lm_eval_command(
    mirror: Path, tmp_path: Path, name: str, tasks: Sequence[str], shots: int
) -> None:
    """Question by question: which answer, whether it is right, and every likelihood."""
    limit = 40
    source = ModelSource(mirror / "models" / name, name, "local")
    identity = identify(source)
    facts = EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(tmp_path))
    score = measure(load_model(source, "float32"), facts, tasks="+".join(tasks), limit=limit, shots=shots)
    expected = by_command(tasks, mirror / "models" / name, mirror, tmp_path, limit, shots)
    numbers = likelihoods_of(score)
    for task in tasks:
        rows = [number for number, member in enumerate(score.items["task"]) if member == task]
        assert len(rows) == len(expected[task]) == limit
        for row, sample in zip(rows, expected[task], strict=True):
            theirs = [float(answer[0]) for answer in sample["filtered_resps"]]
            assert numbers[row] == pytest.approx(theirs, abs=1e-3), (task, sample["doc_id"])
            assert score.items["right"][row] == sample["acc"], (task, sample["doc_id"])
            if task != "lambada_openai":
                assert score.items["choice"][row] == int(np.argmax(theirs)), (task, sample["doc_id"])
        assert score.parts[task] == pytest.approx(np.mean([sample["acc"] for sample in expected[task]]))


@pytest.mark.slow
def test_wiki7m_knows_the_quickstart_pairs(mirror: Path) -> None:
    source = ModelSource(mirror / "models" / "wiki7m", "wiki7m", "local")
    identity = identify(source)
    facts = EvalFacts(identity.config, identity.tokenizer, identity.tokenizer_hash, str(suites_folder()))
    score = measure(load_model(source, "float32"), facts, tasks="quickstart/tasks/pairs.yaml")
    assert score.value is not None
    assert score.value > 0.75
    assert len(set(score.items["stratum"])) >= 8


@pytest.mark.parametrize("split", ["test", "validation"])
def test_questions_are_no_examples(tmp_path: Path, complaint: Callable[..., str], split: str) -> None:
    files = {"data_files": {split: "own.jsonl"}}
    name = write_task(tmp_path, dataset_kwargs=files, **{"test_split": None, f"{split}_split": split})
    assert f"own needs examples for 1 shots, and of its data only the split {split} is there" in complaint(name, ",shots=1")

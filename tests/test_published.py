"""Published numbers: the committed cells against literals and against each other, the loader's complaints, and what is set
beside runs."""

from __future__ import annotations

import math
import re
import statistics
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support import C4_TEXT, CONDITIONS, cases, make_record, make_spec

from prunebench.errors import StoreError
from prunebench.options import canonical, parse_step
from prunebench.plugins import load_registry
from prunebench.results.beside import HEADINGS, Beside, about, beside, counts, matched, tolerance
from prunebench.results.published import WHOLE, PublishedScore, load_published
from prunebench.results.records import Recipe, RunRecord
from prunebench.toolkit.texts import KNOWN

FOLDER = Path(__file__).parents[1] / "results" / "published"
SCORES = load_published(FOLDER)

W, SG, GB, WPP = "wanda", "sparsegpt", "gblm", "wanda-plus-plus"
L1, L2, OPT = "huggyllama/llama-{}b", "meta-llama/Llama-2-{}b-hf", "facebook/opt-{}"
L1_7, L2_7 = L1.format(7), L2.format(7)


def cell(source: str, table: str, model: str, method: str, target: str, task: str | None = None) -> PublishedScore:
    """The one committed cell of that place."""
    [found] = [
        score
        for score in SCORES
        if (score.source, score.table, score.task, score.target) == (source, table, task, target)
        and model in (score.model, score.model_label)
        and method in (score.method, score.method_label)
    ]
    return found


# The committed cells


def test_there_are_at_least_300_and_each_is_whole() -> None:
    assert len(SCORES) == 666
    for score in SCORES:
        assert isinstance(score, PublishedScore)
        assert score.paper
        assert score.method_label
        assert score.model_label
        assert score.measured_by
        assert score.comparable == (score.reason is None)
        assert score.value == float(score.printed) or math.isnan(score.value)
        assert math.isnan(score.value) or (score.value > 1 if score.metric == "perplexity" else 0 < score.value < 100)


def test_every_table_is_there_and_no_digit_has_changed() -> None:
    """Cells, and the sum of what is printed, NaN left out."""
    found: dict[tuple[str, str], list[Decimal]] = {}
    for score in SCORES:
        found.setdefault((score.source, score.table), []).append(Decimal(score.printed))
    sums = {key: str(sum(value for value in values if not value.is_nan())) for key, values in found.items()}
    assert {key: (len(values), sums[key]) for key, values in found.items()} == {
        (W, "2"): (70, "4025.61"),
        (W, "3"): (70, "616.35"),
        (W, "6, 21"): (12, "378.85"),
        (W, "10"): (24, "142354.89"),
        (W, "11"): (20, "20011200283.46"),
        (W, "17"): (24, "191.66"),
        (W, "18-19"): (42, "355677.98"),
        (W, "20"): (16, "695.65"),
        (W, "22-27"): (140, "7259.53"),
        (W, "section 5"): (2, "114.15"),
        (WPP, "1"): (140, "1286.69"),
        (WPP, "2"): (45, "2380.87"),
        (WPP, "3"): (5, "41.81"),
        (SG, "1"): (42, "78448.62"),
        (GB, "model zoo"): (14, "92.73"),
    }


@pytest.mark.parametrize(
    ("source", "table", "model", "method", "target", "task", "printed"),
    [
        (W, "3", L1_7, "dense", "dense", None, "5.68"),
        (W, "3", L1_7, "wanda", "0.5", None, "7.26"),
        (W, "3", L1.format(13), "sparsegpt", "4:8", None, "7.40"),
        (W, "3", L1.format(65), "magnitude", "2:4", None, "7.11"),
        (W, "3", L2_7, "dense", "dense", None, "5.12"),
        (W, "3", L2_7, "magnitude", "2:4", None, "54.59"),
        (W, "3", L2.format(70), "wanda", "2:4", None, "5.16"),
        (W, "17", L2_7, "sparsegpt", "2:4", None, "10.44"),
        (W, "18-19", L1_7, "magnitude", "0.6", None, "6e2"),
        (W, "18-19", L1.format(65), "sparsegpt", "0.8", None, "32.80"),
        (W, "18-19", L2_7, "magnitude", "0.8", None, "nan"),
        (W, "section 5", L1_7, "sparsegpt[mask=wanda]", "0.7", None, "29.65"),
        (W, "10", OPT.format("125m"), "wanda", "0.5", None, "38.96"),
        (W, "10", OPT.format("13b"), "sparsegpt", "0.5", None, "11.19"),
        (W, "11", "bigscience/bloom-560m", "magnitude", "0.5", None, "2e10"),
        (W, "11", "bigscience/bloom-7b1", "wanda", "0.5", None, "13.55"),
        (W, "2", L1_7, "sparsegpt", "0.5", "wanda7", "54.94"),
        (W, "2", L2.format(70), "sparsegpt", "0.5", "wanda7", "67.28"),
        (W, "22-27", L1_7, "wanda", "2:4", "rte", "51.99"),
        (W, "22-27", L2_7, "magnitude", "4:8", "openbookqa", "26.00"),
        (W, "22-27", L2_7, "dense", "dense", "arc_easy", "76.39"),
        (W, "20", L2.format(13), "wanda", "0.5", "mmlu", "55.01"),
        (W, "6, 21", L1_7, "wanda + lora", "2:4", None, "8.24"),
        (W, "6, 21", L1_7, "Wanda, then full sparse fine-tuning", "4:8", "wanda7", "56.65"),
        (WPP, "1", L1_7, "wanda++", "2:4", None, "9.43"),
        (WPP, "1", L1.format(30), "wanda++[ro=false]", "2:4", None, "6.93"),
        (WPP, "1", L1.format(13), "wanda++[rgs=false]", "2:4", None, "7.89"),
        (WPP, "1", "OpenLLaMA-70B", "wanda", "4:8", None, "5.73"),
        (WPP, "1", "meta-llama/Llama-3.1-8B", "gblm", "2:4", None, "24.34"),
        (WPP, "2", L1_7, "wanda++", "2:4", "mmlu", "27.52"),
        (WPP, "2", L1_7, "dense", "dense", "mrpc", "69.12"),
        (WPP, "3", L1_7, "wanda++ + lora", "2:4", None, "6.88"),
        (SG, "1", OPT.format("125m"), "sparsegpt", "0.5", None, "36.85"),
        (SG, "1", OPT.format("1.3b"), "AdaPrune", "0.5", None, "32.52"),
        (SG, "1", OPT.format("66b"), "magnitude", "0.5", None, "4.2e3"),
        (SG, "1", "OPT-175B", "sparsegpt", "2:4", None, "8.74"),
        (GB, "model zoo", L2.format(70), "gblm", "4:8", None, "4.72"),
        (GB, "model zoo", "meta-llama/Llama-2-13b-chat-hf", "gblm", "0.5", None, "7.10"),
    ],
)
def test_a_cell(source: str, table: str, model: str, method: str, target: str, task: str | None, printed: str) -> None:
    assert cell(source, table, model, method, target, task).printed == printed


def test_the_means_of_single_tasks_are_the_means_of_table_2() -> None:
    """Over seven tasks each; finds a misread digit. No row of the paper is an exception."""
    rows: dict[tuple[str | None, str | None, str], list[float]] = {}
    for score in SCORES:
        if (score.source, score.table) == (W, "22-27"):
            rows.setdefault((score.model, score.method, score.target), []).append(score.value)
    assert len(rows) == 20
    for (model, method, target), values in rows.items():
        printed = cell(W, "2", str(model), str(method), target, "wanda7")
        assert len(values) == 7
        assert abs(statistics.fmean(values) - printed.value) <= printed.rounding + 1e-9, (model, method, target)


def test_copies_repeat_a_number_that_is_there() -> None:
    """`load_published` refuses others; here the copies are found again by hand."""
    copies = [score for score in SCORES if score.copied_from]
    assert len(copies) == 42
    for copy in copies:
        source, _, table = str(copy.copied_from).partition("/")
        original = cell(source, table, str(copy.model), copy.method_label, copy.target, copy.task)
        assert (original.value, original.copied_from) == (copy.value, None)
        assert copy.measured_by == original.measured_by
        assert not copy.comparable
    assert cell(WPP, "1", L1_7, "wanda", "0.5").measured_by == "Wanda"
    assert cell(WPP, "1", L1_7, "gblm", "4:8").measured_by == "GBLM-Pruner"
    assert cell(WPP, "1", L1_7, "gblm", "2:4").copied_from is None
    assert cell(W, "10", OPT.format("125m"), "dense", "dense").measured_by == "SparseGPT"
    assert cell(WPP, "1", "OpenLLaMA-3B", "wanda", "0.5").measured_by == "not stated"


def test_rows_that_two_papers_print_alike_are_marked_as_copies() -> None:
    """Equal in every cell that two tables share cannot be told from a copy."""
    own = [score for score in SCORES if not score.copied_from]
    alike: dict[tuple[str | None, ...], list[bool]] = {}
    for one in own:
        for other in own:
            if one.source < other.source and one.subject == other.subject:
                row = (one.source, one.table, other.source, other.table, one.method, one.target)
                alike.setdefault(row, []).append(one.value == other.value)
    assert (SG, "1", W, "10", "sparsegpt", "0.5") in alike
    assert [row for row, equal in alike.items() if all(equal)] == []


def test_nothing_stands_there_twice() -> None:
    keys = [(score.source, score.table, score.method_label, *score.subject) for score in SCORES]
    assert len(set(keys)) == len(keys)


def test_windows_are_those_of_the_papers() -> None:
    """LLaMA-2 at 4096 in Wanda's tables, at 2048 in GBLM's: never one column."""
    assert cell(W, "3", L1_7, "wanda", "0.5").conditions.window == 2048
    assert cell(W, "3", L2_7, "wanda", "0.5").conditions.window == 4096
    assert cell(W, "3", L2_7, "wanda", "0.5").recipe.length == 4096
    assert cell(GB, "model zoo", L2_7, "gblm", "0.5").conditions.window == 2048
    for score in SCORES:
        if score.metric == "perplexity" and score.conditions.window is None:
            assert not score.comparable
            assert score.copied_from or "window not stated" in str(score.reason)
        if score.source == WPP:
            assert not score.comparable


def test_reasons_why_a_number_stands_beside_nothing() -> None:
    assert cell(WPP, "1", "OpenLLaMA-70B", "wanda", "0.5").reason == "window not stated; no such checkpoint on the Hub"
    assert cell(SG, "1", "OPT-175B", "dense", "dense").reason == "no such checkpoint on the Hub"
    assert cell(SG, "1", "OPT-125M", "AdaPrune", "0.5").reason == "prunebench has no such method"
    assert cell(W, "18-19", L2_7, "magnitude", "0.8").reason == "the value is not a number"
    assert cell(W, "20", L1_7, "wanda", "0.5", "mmlu").reason == "harness, metric key, limit not stated"
    assert cell(W, "3", L1_7, "wanda", "0.5").reason is None


def test_contradictions_are_carried_as_notes() -> None:
    assert "table 8 prints 17.59 for this cell" in cell(W, "3", L1_7, "magnitude", "0.5").notes
    assert "the README of the authors' code has 5.58" in cell(W, "3", L2.format(70), "magnitude", "4:8").notes
    assert cell(W, "10", OPT.format("350m"), "wanda", "0.5").notes == ("table 12 prints 36.19 for this cell",)
    assert cell(WPP, "3", L1_7, "wanda", "2:4").notes == ("table 1 has 11.53",)
    assert cell(W, "17", L1_7, "wanda", "2:4").spread == 0.05
    assert cell(W, "17", L1_7, "wanda", "2:4").seeds == 5


def test_methods_are_spelled_as_prunebench_spells_them() -> None:
    """Records write only options that differ from their defaults; a method's text must be what a record would have."""
    registry = load_registry()
    for method in {score.method for score in SCORES if score.method}:
        for text in method.split(" + "):
            step = parse_step(text)
            assert canonical(step.name, registry.pruner(step)) == text


def test_the_content_hashes_are_those_of_complete_texts() -> None:
    """`results` may not import the toolkit, so the hash stands in both."""
    for name, whole in WHOLE.items():
        assert (whole["data"], whole["config"]) == (KNOWN[name].repo, KNOWN[name].config)
        assert whole["content"] in KNOWN[name].whole


# What the loader refuses

SMALL = """
[paper]
name = "A paper"
title = "Its title"
reference = "arXiv 0000.00000"

[models]
S = { hub = "owner/small", label = "Small" }
M = { hub = "owner/medium", label = "Medium" }

[[table]]
number = "1"
metric = "perplexity"
across = "model"
columns = ["S", "M"]
conditions = { data = "wikitext2", window = [512, 1024] }
recipe = { calibration = "allenai/c4", samples = 128, length = 512 }
rows = [
  { method = "dense", target = "dense", values = [10.00, 9.5] },
  { method = "wanda", target = "0.5", values = [12, "-"] },
]
"""


def load(folder: Path, text: str = SMALL, **more: str) -> list[PublishedScore]:
    for name, content in {"small": text, **more}.items():
        (folder / f"{name}.toml").write_text(content)
    return load_published(folder)


def test_a_small_file(tmp_path: Path) -> None:
    first, second, third = load(tmp_path)
    assert [score.printed for score in (first, second, third)] == ["10.00", "9.5", "12"]
    assert [score.rounding for score in (first, second, third)] == pytest.approx([0.005, 0.05, 0.5])
    assert [score.conditions.window for score in (first, second, third)] == [512, 1024, 512]
    assert (first.recipe.samples, third.recipe.samples) == (None, 128)
    assert third.model == "owner/small"
    assert third.place == "A paper, table 1"


def test_no_folder_has_no_numbers(tmp_path: Path) -> None:
    assert load_published(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    cases(
        {
            "toml": ("[paper]", "[paper", r"small\.toml cannot be read as TOML"),
            "unknown key of a row": ("values = [12", "valeus = [12", r"table\.1\.rows\.2\.valeus: there is no such key"),
            "unknown key of a table": ('number = "1"', 'number = "1"\nwindow = 3', r"table\.1\.window: there is no such key"),
            "unknown condition": (
                "window = [512",
                "windows = [512",
                r"table 1, row 1, column S, at windows: there is no such key",
            ),
            "unknown metric": ('"perplexity"', '"speed"', r"at table\.1\.metric: "),
            "no rows": ("rows = [", "rows = []\nmore = [", r"there is no such key"),
            "missing": ('metric = "perplexity"', "", r"at table\.1\.metric: field required"),
            "columns": ("[10.00, 9.5]", "[10.00]", r"table 1, row 1: 1 values stand under 2 columns"),
            "condition's columns": ("[512, 1024]", "[512]", r"table 1, row 1, column S: window has 1 values for 2 columns"),
            "wrong type": ("[512, 1024]", '["wide", 1024]', r"row 1, column S, at window: "),
            "model": ('columns = ["S", "M"]', 'columns = ["S", "MM"]', r"no model 'MM' in \[models\]; did you mean 'M'"),
            "data": ('"wikitext2"', '"wikitext"', r"no data set 'wikitext'; known: wikitext2"),
            "target": ('"0.5"', '"half"', r"row 2, column S: the target 'half' is not one"),
            "value": ("[12, ", '["twelve", ', r"row 2, column S"),
            "infinite value": ("[12, ", "[inf, ", r"inf is no value"),
            "task": ('target = "0.5"', 'target = "0.5", task = "rte"', r"a task belongs to accuracy"),
            "no method": ('method = "wanda", ', "", r"row 2, column S: a cell needs"),
            "note": ("rows = [", 'notes = [{ method = "gblm", text = "odd" }]\nrows = [', r"no cell answers to the note 'odd'"),
            "twice": (
                'method = "wanda", target = "0.5"',
                'method = "dense", target = "dense"',
                r"dense at dense of Small .* twice",
            ),
            "copy of nothing": ("values = [12,", 'copied_from = "x/1", values = [12,', r"copied from x/1, which has no such"),
        }
    ),
)
def test_what_does_not_fit_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in SMALL
    with pytest.raises(StoreError, match=complaint) as found:
        load(tmp_path, SMALL.replace(old, new, 1))
    assert "small.toml" in str(found.value)


def test_a_copy_needs_an_original_of_the_same_value(tmp_path: Path) -> None:
    row = '{ method = "wanda", target = "0.5", values = [12, "-"] }'
    other = SMALL.replace('"A paper"', '"Another"').replace(row, row.replace("values", 'copied_from = "small/1", values'))
    other = other.replace('{ method = "dense", target = "dense", values = [10.00, 9.5] },', "")
    [copy] = [score for score in load(tmp_path, other=other) if score.source == "other"]
    assert (copy.measured_by, copy.reason) == ("A paper", "a copy of A paper, table 1")
    with pytest.raises(StoreError, match=r"wanda at 0\.5 of Small is copied from small/1"):
        load(tmp_path, other=other.replace("[12,", "[13,"))
    with pytest.raises(StoreError, match="copied from small/1"):  # a copy of a copy
        load(tmp_path, SMALL.replace("values = [12", 'copied_from = "other/1", values = [12'), other=other)


# Beside ours

WIKI: dict[str, Any] = {
    **CONDITIONS,
    **WHOLE["wikitext2"],
    "dtype": "float16",
    "tokens": 341_469,
    "window": 2048,
    "windows": 166,
}
PAPER = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=2048)


def ours(
    value: float = 7.30,
    *,
    method: str = "wanda",
    target: str = "0.5",
    seed: int | None = 0,
    source: str = f"{L1_7}@0123abc",
    model: str = "llama-7b",
    recipe: Recipe = PAPER,
    machine: str = "box",
    status: str = "ok",
    **conditions: Any,
) -> RunRecord:
    """A run of LLaMA-1-7B as in Wanda's table 3, but for what is given."""
    spec = make_spec(method, target, seed, model=model, recipe=recipe, conditions=WIKI | conditions)
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": source})})
    return make_record(spec, value, machine=machine, status=status)


def placed(*records: RunRecord, like: PublishedScore | None = None) -> Beside:
    """What is said of Wanda at 50% on LLaMA-1-7B, table 3, or of another number."""
    [found] = beside([like or cell(W, "3", L1_7, "wanda", "0.5")], records)
    return found


def test_a_number_without_a_run() -> None:
    for found in (placed(), placed(ours(method="sparsegpt")), placed(ours(target="2:4")), placed(ours(status="failed"))):
        assert (found.status, found.text, found.ours, found.seeds) == ("not run", "not run", None, 0)
    assert placed(ours(source="other/llama-7b@0123abc")).status == "not run"
    assert placed(ours(source=f"{L1_7}-extra@0123abc")).status == "not run"
    assert placed(ours(data="allenai/c4")).status == "not run"


@pytest.mark.parametrize(
    ("value", "text"), [(7.30, "reproduced"), (7.19, "reproduced"), (7.34, "off by +0.08"), (7.0, "off by -0.26")]
)
def test_a_number_beside_a_run(value: float, text: str) -> None:
    found = placed(ours(value))
    assert (found.text, found.ours, found.seeds) == (text, value, 1)


def test_the_mean_over_seeds_is_compared() -> None:
    found = placed(ours(7.0, seed=0), ours(7.6, seed=1), ours(7.2, seed=2))
    assert (found.status, found.seeds, found.ours) == ("reproduced", 3, pytest.approx(7.2667, abs=1e-4))
    assert found.cells()[-2] == "7.27 (mean of 3 seeds)"


def test_the_row_of_most_seeds_on_one_machine_counts() -> None:
    elsewhere = [ours(9.0, machine="a"), ours(9.0, machine="z", attention="eager", seed=0)]
    found = placed(elsewhere[0], ours(7.2, seed=0), ours(7.3, seed=1), elsewhere[1])
    assert (found.seeds, found.ours) == (2, pytest.approx(7.25))


@pytest.mark.parametrize(
    ("changes", "reason"),
    cases(
        {
            "wrong window": ({"window": 4096, "windows": 83}, "window 4096, published 2048"),
            "wrong split": ({"split": "validation"}, "split validation, published test"),
            "wrong dtype": ({"dtype": "bfloat16"}, "dtype bfloat16, published float16"),
            "other content": (
                {"content": "fa2bc264a9176183", "complete": False},
                "our data are not the complete set: their hash is fa2bc264a9176183",
            ),
            "partial windows": ({"windows": 40}, "only 40 of 166 windows"),
            "unknown windows": ({"tokens": None}, "the record does not say how many windows there are"),
            "local model": ({"source": "local"}, "the model is a local folder"),
            "fewer samples": ({"recipe": PAPER.model_copy(update={"samples": 32})}, "samples 32, published 128"),
            "calibration excerpt": (
                {"recipe": PAPER.model_copy(update={"calibration": C4_TEXT.model_copy(update={"complete": False})})},
                "our calibration text is an excerpt",
            ),
            "two things": ({"window": 1024, "windows": 166}, "window 1024, published 2048; only 166 of 333 windows"),
        }
    ),
)
def test_what_is_not_the_same_thing_is_not_compared(changes: dict[str, Any], reason: str) -> None:
    found = placed(ours(7.26, **changes))
    assert (found.status, found.reason, found.ours) == ("not comparable", reason, None)
    assert found.text == f"not comparable: {reason}"
    assert placed(ours(7.26, **changes), ours(7.27)).ours == 7.27


def test_the_mirrors_copy_of_a_complete_text_is_as_good() -> None:
    assert placed(ours(7.26, origin="mirror", complete=False)).status == "reproduced"


def test_methods_without_data_ask_for_no_recipe() -> None:
    dense = cell(W, "3", L1_7, "dense", "dense")
    assert placed(ours(5.69, method="dense", target="dense", seed=None), like=dense).status == "reproduced"


def test_copies_and_numbers_without_conditions_stand_beside_nothing() -> None:
    copy, bare = cell(WPP, "1", L1_7, "wanda", "0.5"), cell(WPP, "1", L1_7, "wanda++", "0.5")
    assert placed(ours(7.26), like=copy).text == "copy: a copy of Wanda, table 3"
    assert placed(ours(7.02, method="wanda++"), like=bare).text == "not comparable: window not stated"


def test_a_number_printed_with_one_digit_is_met_within_its_rounding() -> None:
    coarse = cell(W, "18-19", L1_7, "magnitude", "0.6")
    for value, status in ((649.0, "reproduced"), (551.0, "reproduced"), (651.0, "off")):
        assert placed(ours(value, method="magnitude", target="0.6", seed=None), like=coarse).status == status


# Accuracy

BOOLQ: dict[str, Any] = {"tasks": 1, "version": "1.0", "items": 3270, "content": "b001"}
ASKED: dict[str, Any] = {"eval": "zero_shot", "lm_eval": "df3da98", "metric": "acc", "shots": 0, "limit": None, "set": None}


def task(score: float, parts: dict[str, float] | None = None, **changes: Any) -> RunRecord:
    """A zero-shot run of BoolQ, as a share of right answers, under the conditions of Wanda's tables but for what is given."""
    spec = make_spec(recipe=PAPER, conditions={**ASKED, "tasks": {"boolq": BOOLQ}, **changes})
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"source": f"{L1_7}@0123abc"})})
    record = make_record(spec, score, unit="accuracy", higher_is_better=True)
    scores = {name: kept.model_copy(update={"parts": parts or {}}) for name, kept in record.scores.items()}
    return record.model_copy(update={"scores": scores})


def boolq() -> PublishedScore:
    """Wanda's 71.22 on BoolQ, had the content of the questions been known."""
    number = cell(W, "22-27", L1_7, "wanda", "0.5", "boolq")
    return number.model_copy(update={"conditions": number.conditions.model_copy(update={"content": "b001"})})


def test_an_accuracy_is_met_within_two_standard_errors() -> None:
    error = 100 * math.sqrt(0.7122 * 0.2878 / 3270)
    assert tolerance(boolq(), (3270,)) == pytest.approx(2 * error)
    assert placed(task(0.7122 + 1.9 * error / 100), like=boolq()).status == "reproduced"
    assert placed(task(0.7122 + 2.1 * error / 100), like=boolq()).status == "off"
    assert placed(task(0.5, {"boolq": 0.7122}), like=boolq()).ours == pytest.approx(71.22)


def test_a_mean_over_tasks_has_a_smaller_error() -> None:
    assert tolerance(boolq(), (400,) * 4) == pytest.approx(tolerance(boolq(), (1600,)))


def test_the_mean_of_a_set_is_that_of_the_set_alone() -> None:
    mean = boolq().model_copy(update={"metric": "mean accuracy", "task": "wanda7"})
    tasks = {"tasks": {"boolq": BOOLQ, "rte": BOOLQ}, "set": "wanda7"}
    alone = placed(task(0.7122, {"boolq": 0.70, "rte": 0.7244}, **tasks), like=mean)
    assert alone.text.startswith("not comparable: ")  # the content of seven tasks has no one hash
    assert placed(task(0.7122), like=mean).status == "not run"


@pytest.mark.parametrize(
    ("changes", "reason"),
    cases(
        {
            "version": ({"tasks": {"boolq": BOOLQ | {"version": "2.0"}}}, "task version 2, published 1"),
            "metric": ({"metric": "acc_norm"}, "metric key acc_norm, published acc"),
            "shots": ({"shots": 5}, "shots 5, published 0"),
            "limit": ({"limit": 100}, "limit 100, published 0"),
            "harness": ({"lm_eval": "0.4.13"}, "harness lm-eval 0.4.13, published lm-eval df3da98"),
            "content": (
                {"tasks": {"boolq": BOOLQ | {"content": "b002"}}},
                "our data are not the complete set: their hash is b002",
            ),
        }
    ),
)
def test_questions_asked_otherwise_are_not_compared(changes: dict[str, Any], reason: str) -> None:
    assert placed(task(0.7122, **changes), like=boolq()).text == f"not comparable: {reason}"


def test_questions_of_unknown_content_are_not_compared() -> None:
    found = placed(task(0.7122), like=cell(W, "22-27", L1_7, "wanda", "0.5", "boolq"))
    assert found.text == "not comparable: no hash of the complete data set is known"


# Text for the board


def test_a_part_of_a_board_has_the_numbers_of_what_was_measured_there() -> None:
    everything = beside(SCORES, [])
    wiki = about(everything, [CONDITIONS])
    assert {one.published.conditions.data for one in wiki} == {"Salesforce/wikitext"}
    assert any(one.published.method == "dense" for one in wiki)
    tasks = about(everything, [{"eval": "zero_shot", "tasks": {"rte": {}, "boolq": {}}, "set": "wanda7"}])
    assert {one.published.task for one in tasks} == {"rte", "boolq", "wanda7"}
    assert about(everything, [{"eval": "divergence", "data": "Salesforce/wikitext"}]) == []
    assert 0 < len(wiki) + len(tasks) < len(everything)


def test_the_rows_and_the_counts() -> None:
    found = beside(SCORES, [ours(7.30), ours(9.0, target="4:8"), ours(5.0, target="2:4", window=512, windows=666)])
    rows = [dict(zip(HEADINGS, one.cells(), strict=True)) for one in matched(found)]
    assert [(row["target"], row["published"], row["ours"], row["status"]) for row in rows] == [
        ("0.5", "7.26", "7.30", "reproduced"),
        ("4:8", "8.57", "9.00", "off by +0.43"),
        ("0.5", "7.25", "7.30", "reproduced"),
        ("4:8", "8.65", "9.00", "off by +0.35"),
    ]
    assert {(row["model"], row["method"], row["what"], row["paper"]) for row in rows} == {
        (L1_7, "wanda", "perplexity", "Wanda")
    }
    line = counts(found)
    assert re.fullmatch(r"published numbers: 666; reproduced 2, off 2, not run (\d+), not comparable (\d+), copies 42", line), (
        line
    )
    assert sum(map(int, re.findall(r"\d+", line)[1:])) == 666
    assert counts(beside(SCORES, [])) == (
        "published numbers: 666; reproduced 0, off 0, not run 439, not comparable 185, copies 42"
    )

"""The board from hand-made records, and the committed page against the committed records."""

from __future__ import annotations

import getpass
import itertools
import json
import math
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import C4_TEXT, CONDITIONS, make_record, make_spec

from prunebench.plugins import load_registry
from prunebench.results.beside import beside
from prunebench.results.board import Board, build_board
from prunebench.results.content import slug
from prunebench.results.leaderboard import number, to_markdown
from prunebench.results.published import load_published
from prunebench.results.records import SCHEMA, EvalSpec, Recipe, RunRecord
from prunebench.results.rows import target_title
from prunebench.results.store import ResultStore, Stored
from prunebench.results.verdicts import Grade, Verdicts

TOP = Path(__file__).parents[1]
RESULTS = TOP / "results"
PAGE = TOP / "leaderboard.md"

EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"
WIKI = CONDITIONS
C4 = CONDITIONS | {"data": "allenai/c4", "config": "en", "split": "validation", "content": "8899aabbccddeeff", "window": 256}
C4_512 = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=512)
C4_256 = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=256)


VERSUS = "vs dense [95%]"


def stored(*records: RunRecord) -> list[Stored]:
    return [
        Stored(f"{record.machine}/{record.spec.model.name}/{record.spec.file_stem}.{index}.json", record)
        for index, record in enumerate(records)
    ]


def board(*records: RunRecord, **revisions: int) -> Board:
    return build_board(stored(*records), revisions)


def page(*records: RunRecord, **revisions: int) -> str:
    return to_markdown(board(*records, **revisions))


def tables(text: str) -> Iterator[list[dict[str, str]]]:
    """The Markdown tables of a page, as rows by heading."""
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            heading, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
            yield [dict(zip(heading, row, strict=True)) for row in rows]


def only_table(text: str) -> list[dict[str, str]]:
    [table] = tables(text)
    return table


def methods(table: list[dict[str, str]]) -> list[str]:
    return [row["method"] for row in table]


def dense(value: float = 60.0, **changes: Any) -> RunRecord:
    return make_record(make_spec("dense", "dense", None), value, sparsity=0.0, **changes)


def magnitude(target: str = "0.5", value: float = 90.0, **changes: Any) -> RunRecord:
    return make_record(make_spec("magnitude", target, None), value, **changes)


# Which rows stand together


def test_an_empty_board() -> None:
    text = page()
    assert "There are no results yet" in text
    assert list(tables(text)) == []
    assert text.endswith("\n")
    assert "Refused" not in text
    assert "Failed" not in text


def test_one_table() -> None:
    text = page(dense(60.0), make_record(make_spec("wanda"), 72.0), magnitude(value=90.0))
    table = only_table(text)
    assert methods(table) == ["dense", "wanda", "magnitude"]
    assert [row["perplexity"] for row in table] == ["60.00", "72.00", "90.00"]
    assert [row[VERSUS] for row in table] == ["", "+20.0%", "+50.0%"]
    assert [row["seeds"] for row in table] == ["deterministic", "1", "deterministic"]
    assert "## tiny: perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512\n" in text
    assert "\n### 50% unstructured\n" in text
    assert "* Calibration: 128 x 512 tokens of allenai/c4 (en, train) (recipe `" in text
    assert "* Evaluation: 740 windows of 512 tokens, float32, sdpa attention (conditions `" in text
    assert "* Machine: box.\n" in text
    assert "* Reproduce: `prunebench run quickstart`.\n" in text


def test_every_target_is_a_table_with_dense_on_top() -> None:
    targets = ["8:16", "2:4", "0.6", "4:8", "0.5", "0.999", "1:4", "0.29"]
    text = page(dense(), *(magnitude(target) for target in targets))
    headings = ["29% unstructured", "50% unstructured", "60% unstructured", "99.9% unstructured", "2:4", "4:8", "8:16", "1:4"]
    assert re.findall(r"^### (.+)$", text, re.MULTILINE) == headings
    assert [methods(table) for table in tables(text)] == [["dense", "magnitude"]] * 8


def test_dense_alone_is_a_table() -> None:
    text = page(dense())
    assert methods(only_table(text)) == ["dense"]
    assert "\n### dense\n" in text


def test_dense_is_on_top_of_what_prunes_nothing() -> None:
    retrained = make_record(make_spec("adapt", "dense"), 55.0)
    assert methods(only_table(page(dense(60.0), retrained))) == ["dense", "adapt"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "else") for key in CONDITIONS if key not in ("origin", "complete", "window", "windows")),
        ("window", 256),
        ("windows", 7),
    ],
)
def test_other_conditions_are_another_section(key: str, value: Any) -> None:
    other = make_record(make_spec("magnitude", conditions=CONDITIONS | {key: value}))
    assert [methods(table) for table in tables(page(make_record(), other))] in (
        [["wanda"], ["magnitude"]],
        [["magnitude"], ["wanda"]],
    )


def test_the_same_text_from_elsewhere_is_the_same_section() -> None:
    """The mirror's copy and the Hub's are one when their content is."""
    moved = CONDITIONS | {"origin": "mirror", "complete": False}
    recipe = C4_512.model_copy(update={"calibration": C4_TEXT.model_copy(update={"origin": "mirror", "complete": False})})
    other = make_record(make_spec("magnitude", conditions=moved, recipe=recipe), 110.0)
    assert methods(only_table(page(make_record(value=100.0), other))) == ["wanda", "magnitude"]


def test_another_revision_of_an_evaluation_is_another_section() -> None:
    spec = make_spec("magnitude")
    newer = spec.model_copy(update={"evals": (spec.evals[0].model_copy(update={"revision": 2}),)})
    assert len(list(tables(page(make_record(), make_record(newer))))) == 2


def test_another_machine_or_model_is_another_section() -> None:
    found = board(make_record(), make_record(machine="another"), make_record(make_spec(model="other")))
    assert [(section.machine, section.model) for section in found.sections] == [
        ("another", "tiny"),
        ("box", "other"),
        ("box", "tiny"),
    ]


def test_several_evaluations_are_several_sections() -> None:
    both = [EvalSpec(text="perplexity[data=c4]", revision=1, conditions=C4)]
    found = board(make_record(make_spec(more_evals=both), 80.0))
    assert {section.title for section in found.sections} == {
        "tiny: perplexity on allenai/c4 (en, validation), window 256",
        "tiny: perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512",
    }


def test_every_recipe_has_a_section_and_methods_without_data_stand_in_each() -> None:
    records = [
        dense(),
        magnitude(),
        make_record(make_spec("wanda", recipe=C4_512), 70.0),
        make_record(make_spec("wanda", recipe=C4_256), 75.0),
        make_record(make_spec("sparsegpt", recipe=C4_256), 71.0),
    ]
    found = board(*records)
    rows = {s.recipe.length: [row.method for row in s.tables[0].rows] for s in found.sections if s.recipe}
    assert rows == {512: ["dense", "wanda", "magnitude"], 256: ["dense", "sparsegpt", "wanda", "magnitude"]}
    assert len(found.sections) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": C4_TEXT.model_copy(update={"content": "else"})},
        {"sampler": "documents-v2"},
        {"samples": 64},
        {"training": C4_TEXT},
        {"training_tokens": 4096},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_recipe_is_another_table(change: dict[str, Any]) -> None:
    other = C4_512.model_copy(update=change)
    found = board(make_record(make_spec(recipe=C4_512)), make_record(make_spec("magnitude", recipe=other)))
    assert [len(table.rows) for section in found.sections for table in section.tables] == [1, 1]


def test_retrained_rows_have_tables_of_their_own_under_their_control() -> None:
    """`dense + perp` is the control of `magnitude + perp`, and of that alone; methods without calibration match every one."""
    trained = Recipe(training=C4_TEXT, training_tokens=4096)
    perp, other = "perp[steps=60]", "perp[subset=norms,steps=60]"
    found = board(
        make_record(make_spec("dense", "dense", None), 50.0),
        make_record(make_spec(f"dense + {perp}", "dense", recipe=trained), 40.0),
        make_record(make_spec("magnitude", seed=None), 80.0),
        make_record(make_spec(f"magnitude + {perp}", recipe=trained), 60.0),
        make_record(make_spec(f"magnitude + {other}", recipe=trained), 70.0),
        make_record(make_spec("imp", recipe=trained), 65.0),
        make_record(make_spec("wanda", recipe=C4_512), 79.0),
    )
    [section] = found.sections
    plain, retrained = section.tables
    assert [(row.method, row.control) for row in plain.rows] == [("dense", None), ("wanda", None), ("magnitude", None)]
    assert [(row.method, row.control) for row in retrained.rows] == [
        ("dense", None),
        (f"dense + {perp}", None),
        (f"magnitude + {perp}", 40.0),
        ("imp", None),
        (f"magnitude + {other}", None),
    ]
    assert retrained.training == trained
    text = to_markdown(found)
    assert "retrained on text of allenai/c4" in text
    assert [row["vs control"] for row in list(tables(text))[1]] == ["", "", "+50.0%", "", ""]


def test_other_training_of_the_same_method_is_no_repetition() -> None:
    records = [
        make_record(make_spec("imp", recipe=Recipe(training=C4_TEXT, training_tokens=tokens)), value)
        for tokens, value in ((4096, 80.0), (8192, 70.0))
    ]
    [section] = board(*records).sections
    assert {(table.training and table.training.training_tokens, table.rows[0].mean) for table in section.tables} == {
        (4096, 80.0),
        (8192, 70.0),
    }


def test_a_retrained_dense_model_alone_has_a_row() -> None:
    trained = Recipe(training=C4_TEXT, training_tokens=4096)
    [section] = board(make_record(make_spec("perp", "dense", recipe=trained), 40.0)).sections
    assert [[row.method for row in table.rows] for table in section.tables] == [["perp"]]


# What a row says


def test_seeds_are_one_row_with_mean_and_standard_deviation() -> None:
    records = [make_record(make_spec(seed=seed), value) for seed, value in enumerate((70.0, 72.0, 77.0))]
    [row] = only_table(page(dense(50.0), *records))[1:]
    assert row["perplexity"] == "73.00 ± 3.61"  # sqrt((9 + 1 + 16) / 2)
    assert row["seeds"] == "3"
    assert row[VERSUS] == "+46.0%"


def test_seeds_are_in_order_whatever_the_order_of_records() -> None:
    records = [make_record(make_spec(seed=seed), float(seed)) for seed in (11, 2, 0)]
    [row] = board(*records).sections[0].tables[0].rows
    assert row.seeds == (0, 2, 11)
    assert row.values == (0.0, 2.0, 11.0)
    assert row.ids == tuple(make_spec(seed=seed).id for seed in (0, 2, 11))


def test_a_run_that_measured_more_is_no_second_seed() -> None:
    """The same method, target and seed in a suite with one more evaluation has another id, and is the same point."""
    more = [EvalSpec(text="perplexity[data=c4]", revision=1, conditions=C4)]
    records = []
    for seed in (0, 1):
        records.append(make_record(make_spec(seed=seed), 70.0 + seed, started=EARLY))
        records.append(make_record(make_spec(seed=seed, more_evals=more), 80.0 + seed, started=LATE))
    both = [dense(60.0, started=EARLY), make_record(make_spec("dense", "dense", None, more_evals=more), 61.0, started=LATE)]
    sections = {section.conditions["data"]: section for section in board(*records, *both).sections}
    wiki = sections["Salesforce/wikitext"].tables[0].rows
    assert [(row.method, row.values) for row in wiki] == [("dense", (61.0,)), ("wanda", (80.0, 81.0))]
    assert wiki[0].seeds_shown == "deterministic"
    assert [(row.method, row.values) for row in sections["allenai/c4"].tables[0].rows] == [
        ("dense", (61.0,)),
        ("wanda", (80.0, 81.0)),
    ]


@pytest.mark.parametrize(("higher", "order"), [(False, ["b", "a", "c"]), (True, ["c", "a", "b"])], ids=["lower", "higher"])
def test_rows_are_sorted_by_value(higher: bool, order: list[str]) -> None:
    values = {"a": 80.0, "b": 70.0, "c": 90.0}
    records = [make_record(make_spec(name), value, higher_is_better=higher, unit="acc") for name, value in values.items()]
    table = only_table(page(*records, dense(60.0, higher_is_better=higher, unit="acc")))
    assert methods(table) == ["dense", *order]


def test_equal_values_are_sorted_by_name() -> None:
    assert methods(only_table(page(*(make_record(make_spec(name), 70.0) for name in ("c", "a", "b"))))) == ["a", "b", "c"]


def test_without_items_that_can_be_compared_there_are_no_ranks() -> None:
    text = page(dense(), make_record(), magnitude())
    assert [row["rank"] for row in only_table(text)] == ["", "", ""]
    assert "**wanda**" not in text


def test_the_change_against_dense() -> None:
    assert [row[VERSUS] for row in only_table(page(dense(80.0), magnitude(value=60.0)))] == ["", "-25.0%"]
    assert [row[VERSUS] for row in only_table(page(magnitude()))] == [""]
    assert [row[VERSUS] for row in only_table(page(dense(0.0), magnitude()))] == ["", ""]
    other = dense(machine="another")
    assert [row[VERSUS] for row in list(tables(page(other, magnitude())))[1]] == [""]


def test_large_values_have_no_decimals() -> None:
    assert [number(value) for value in (9999.994, 10_000.4, 1_234_567.8, 0.125, -20_000.0)] == [
        "9999.99",
        "10,000",
        "1,234,568",
        "0.1250",
        "-20,000",
    ]
    assert [number(0.12345, like=5.0), number(5.0, like=0.1), number(None), number(math.nan)] == ["0.12", "5.0000", "–", "–"]


def test_sparsity_and_coverage_are_what_was_found() -> None:
    record = make_record(sparsity=0.512345)
    [row] = only_table(page(record))
    assert row["sparsity %"] == "51.23"
    assert row["of all %"] == "25.62"
    assert row["coverage %"] == "99.60"


def test_costs() -> None:
    [row] = only_table(page(make_record(seconds=2.25, peak_host_bytes=300 << 20)))
    assert (row["prune s"], row["peak MiB"]) == ("2.25", "300")
    [row] = only_table(page(make_record(peak_host_bytes=900 << 20, peak_device_bytes=50 << 20)))
    assert row["peak MiB"] == "50"
    seeds = [make_record(make_spec(seed=n), seconds=n + 1.0, peak_host_bytes=(n + 1) << 30) for n in range(3)]
    [row] = only_table(page(*seeds))
    assert (row["prune s"], row["peak MiB"]) == ("2.00", "3072")


def test_costs_beside_other_runs_are_marked() -> None:
    alone, beside = make_record(), make_record(make_spec("magnitude"), 200.0, shared_machine=True)
    table = only_table(page(alone, beside))
    assert [row["prune s"] for row in table] == ["2.00", "2.00*"]
    assert [row["peak MiB"] for row in table] == ["300", "300*"]
    seeds = [make_record(make_spec(seed=seed), shared_machine=seed == 1) for seed in range(3)]
    assert [row["prune s"] for row in only_table(page(*seeds))] == ["2.00*"]


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (
            {"tasks": {"one": {"items": 900, "tasks": 1}, "two": {"items": 40, "tasks": 1}}, "limit": 100},
            "140 questions, the first",
        ),
        ({"tasks": ["a", "b"]}, "Evaluation: float32, sdpa attention"),
    ],
)
def test_questions_are_those_asked_and_strangers_are_left_to_speak(conditions: dict[str, Any], said: str) -> None:
    record = make_record()
    [(name, score)] = record.scores.items()
    told = {"eval": "any", "dtype": "float32", "attention": "sdpa", **conditions}
    assert said in page(record.model_copy(update={"scores": {name: score.model_copy(update={"conditions": told})}}))


def test_excerpts_are_called_so() -> None:
    conditions = CONDITIONS | {"complete": False}
    recipe = C4_512.model_copy(update={"calibration": C4_TEXT.model_copy(update={"complete": False})})
    text = page(make_record(make_spec(conditions=conditions, recipe=recipe)))
    assert "perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test) (excerpt), window 512" in text
    assert "of allenai/c4 (en, train) (excerpt) (recipe" in text
    assert "excerpt" not in page(make_record())


def test_suites_that_made_the_rows_are_named() -> None:
    records = [make_record(suite="b"), make_record(make_spec("x"), suite="a"), make_record(make_spec("y"), suite=None)]
    assert "* Reproduce: `prunebench run a`, `prunebench run b`.\n" in page(*records)
    assert "Reproduce" not in page(make_record(suite=None))
    asked = "prunebench run my/peers.toml --results there"
    record = make_record(suite="peers")
    record = record.model_copy(update={"provenance": record.provenance.model_copy(update={"command": asked})})
    assert "* Reproduce: `prunebench run my/peers.toml`.\n" in page(record)


def commanded(record: RunRecord, command: str) -> RunRecord:
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"command": command})})


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("prunebench run quickstart --results there --jobs 2 --only wanda", "prunebench run quickstart"),
        (
            "prunebench run quickstart --method 'wanda[a=1] + perp' --method=imp",
            "prunebench run quickstart --method 'wanda[a=1] + perp' --method imp",
        ),
        ("prunebench run quickstart --model '$MIRROR/models/x'", "prunebench run quickstart --model $MIRROR/models/x"),
        ("prunebench run x/y.toml --model org/name", "prunebench run x/y.toml --model org/name"),
        ("prunebench run quickstart --method 'cut", "prunebench run quickstart"),
    ],
)
def test_what_took_the_place_of_a_suites_models_and_methods_is_told(typed: str, told: str) -> None:
    assert f"* Reproduce: `{told}`.\n" in page(commanded(make_record(), typed))


def test_methods_of_other_packages_are_told() -> None:
    record = make_record(make_spec("theirs"))
    assert "Of other packages" not in page(record)
    theirs = record.steps[0].model_copy(update={"distribution": "their-plugin", "version": "1.2.3"})
    text = page(record.model_copy(update={"steps": [theirs]}), make_record())
    assert f"* Of other packages: {theirs.pruner} (their-plugin 1.2.3).\n" in text


@pytest.mark.parametrize(
    ("target", "title"), [("0.5", "50% unstructured"), ("0.555", "55.5% unstructured"), ("2:4", "2:4"), ("dense", "dense")]
)
def test_titles_of_targets(target: str, title: str) -> None:
    assert target_title(target) == title


def test_only_some_sections() -> None:
    found = board(make_record(), make_record(make_spec(model="other")))
    assert [section.model for section in found.only("other: ").sections] == ["other"]
    assert len(found.only("").sections) == 2
    assert "no results" in to_markdown(found.only("nothing"))


def tuned(record: RunRecord, suite: str) -> RunRecord:
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"tuned": suite})})


def test_what_people_look_for_comes_first_and_tuning_last() -> None:
    def of(kind: str, data: str, **changes: Any) -> RunRecord:
        return make_record(make_spec(conditions=CONDITIONS | {"eval": kind, "data": data}), **changes)

    records = [
        of("divergence", "a"),
        of("perplexity", "validation", suite="tuning"),
        of("somebody's", "a"),
        of("zero_shot", "a"),
        of("perplexity", "small"),
        tuned(of("perplexity", "large"), "tuning"),
        make_record(make_spec("magnitude", "0.6", conditions=CONDITIONS | {"data": "large"})),
    ]
    sections = board(*records).sections
    order = ["large", "small", "a", "a", "a", "validation"]
    assert [section.conditions["data"] for section in sections] == order
    assert [str(section.conditions["eval"]) for section in sections[2:5]] == ["zero_shot", "divergence", "somebody's"]
    assert [section.is_tuning for section in sections] == [False] * 5 + [True]
    text = page(*records)
    assert text.count("* A means, and no result") == 1
    assert text.index("* A means, and no result") > text.index("somebody's on a")


def test_every_section_can_be_reached_from_the_contents() -> None:
    text = page(*many(), old=2)
    contents = text[text.index("## Contents") : text.index("## How to read")]
    links, anchors = re.findall(r"\]\(#(.+?)\)", contents), re.findall(r'<a id="(.+?)">', text)
    headings = [heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)]
    assert len(anchors) == len(set(anchors)) == len(re.findall(r"^## tiny: ", text, re.MULTILINE)) == 4
    assert set(links) == {*anchors, "refused-runs", "failed-runs", "outdated-runs"}
    assert {"refused-runs", "failed-runs", "outdated-runs"} <= set(headings)
    assert "tiny on another:\n\n- [perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512](#" in contents
    assert "- perplexity on Salesforce/wikitext (wikitext-2-raw-v1, test), window 512\n  - [calibrated on" in contents
    assert re.findall(r"  - \[calibrated on allenai/c4, 128 x (\d+) tokens\]\(#\S+\): 50%, 2:4", contents) == ["512", "256"]
    assert "## Contents" not in page(dense(), magnitude()), "one section needs none"


def test_a_number_that_repeats_the_value_has_no_column() -> None:
    def with_parts(record: RunRecord, **parts: float) -> RunRecord:
        [(name, score)] = record.scores.items()
        return record.model_copy(update={"scores": {name: score.model_copy(update={"parts": parts})}})

    both = [with_parts(dense(60.0), same=60.0, other=1.0), with_parts(magnitude(value=90.0), same=90.0, other=90.0)]
    [first, _] = only_table(page(*both))
    assert "other" in first
    assert "same" not in first
    differs = [with_parts(dense(60.0), same=60.0), with_parts(magnitude(value=90.0), same=90.5)]
    assert "same" in only_table(page(*differs))[0]


# What is in no table


def test_refused_and_failed_runs_are_listed_with_reasons() -> None:
    refused = make_record(make_spec("wanda", "4:8"), status="refused", reason="172 columns are not a multiple of 8.")
    failed = make_record(make_spec("sparsegpt", seed=2), status="failed", reason="3 rows are wrong.", kind="audit")
    text = page(make_record(), refused, failed)
    assert methods(only_table(text)) == ["wanda"]
    assert f"## Refused runs\n\n* tiny, wanda at 4:8, seed 0, on box (`{refused.id}`): 172 columns are not a" in text
    assert f"## Failed runs\n\n* tiny, sparsegpt at 0.5, seed 2, on box (`{failed.id}`): audit: 3 rows are wrong." in text
    assert "There are no results" not in text


def test_a_board_of_refusals_has_no_table() -> None:
    text = page(make_record(status="refused"))
    assert "There are no results yet" in text
    assert "## Refused runs" in text


def test_outdated_records_are_listed_and_in_no_table() -> None:
    old, new = make_record(make_spec("wanda", revision=1), 99.0), make_record(make_spec("wanda", revision=2), 70.0)
    text = page(old, new, wanda=2)
    assert [row["perplexity"] for row in only_table(text)] == ["70.00"]
    assert f"## Outdated runs\n\n* tiny, wanda at 0.5, seed 0, on box (`{old.id}`): measured with another revision" in text
    newer = page(make_record(make_spec("wanda", revision=3)), wanda=2)
    assert list(tables(newer)) == []
    assert "## Outdated runs" in newer


def test_one_outdated_step_is_enough() -> None:
    text = page(make_record(make_spec("magnitude + perp[subset=norms]")), magnitude=1, perp=2)
    assert list(tables(text)) == []
    assert "## Outdated runs\n\n* tiny, magnitude + perp[subset=norms] at 0.5" in text


def test_an_outdated_evaluation_makes_a_record_outdated_too() -> None:
    record = make_record()
    [evaluation] = {str(spec.conditions["eval"]) for spec in record.spec.evals}
    found = build_board(stored(record), {f"eval {evaluation}": 2})
    assert (found.sections, found.outdated) == ((), (record,))
    assert build_board(stored(record), {f"eval {evaluation}": 1, "eval other": 5}).outdated == ()


def test_outdated_refusals_are_no_refusals() -> None:
    text = page(make_record(status="refused"), make_record(make_spec(seed=1), status="failed"), wanda=2)
    assert "Refused" not in text
    assert "Failed" not in text
    assert len(re.findall(r"^\* tiny, wanda", text, re.MULTILINE)) == 2


def test_methods_that_are_not_installed_are_not_outdated() -> None:
    assert methods(only_table(page(make_record(), wanda2=2))) == ["wanda"]


# The page itself

HOSTILE = "a|b\n\n# heading\n<script>alert(1)</script> <img src=x onerror=y> | c\r\n| x | y |"


def hostile_lines(text: str) -> None:
    assert "<script" not in text
    assert "<img" not in text
    assert "\n# heading" not in text
    assert "\r" not in text


def test_methods_cannot_break_the_table() -> None:
    spec = make_spec(f"wanda[note={HOSTILE}]")
    text = page(dense(), make_record(spec, 70.0))
    hostile_lines(text)
    table = only_table(text)
    assert [row["perplexity"] for row in table] == ["60.00", "70.00"]
    assert "a\\|b # heading" in table[1]["method"]


def test_reasons_cannot_break_the_page() -> None:
    refused = make_record(make_spec(f"x[y={HOSTILE}]", seed=1), status="refused", reason=HOSTILE)
    failed = make_record(make_spec(model=HOSTILE), status="failed", reason=HOSTILE)
    text = page(make_record(), refused, failed, make_record(make_spec(f"old[z={HOSTILE}]"), reason=HOSTILE), old=2)
    hostile_lines(text)
    assert methods(only_table(text)) == ["wanda"]
    assert len(re.findall(r"^\* ", text, re.MULTILINE)) == 4 + 3


def test_names_cannot_break_the_page() -> None:
    conditions = CONDITIONS | {"data": HOSTILE, "attention": HOSTILE}
    recipe = C4_512.model_copy(update={"calibration": C4_TEXT.model_copy(update={"name": HOSTILE})})
    record = make_record(make_spec(model=HOSTILE, conditions=conditions, recipe=recipe), machine=HOSTILE, unit=HOSTILE)
    text = page(record)
    hostile_lines(text)
    assert methods(only_table(text)) == ["wanda"]


def many() -> list[RunRecord]:
    moved = CONDITIONS | {"origin": "mirror", "complete": False}
    recipe = C4_512.model_copy(update={"calibration": C4_TEXT.model_copy(update={"origin": "mirror", "complete": False})})
    more = [EvalSpec(text="perplexity[data=c4]", revision=1, conditions=C4)]
    return [
        dense(),
        magnitude(),
        magnitude("2:4", 95.0, suite="other"),
        *(make_record(make_spec(seed=seed), 70.0 + seed / 3) for seed in range(3)),
        make_record(make_spec("sparsegpt", conditions=moved, recipe=recipe), 70.0),
        make_record(make_spec(seed=0, more_evals=more), 70.5, started=LATE),
        make_record(make_spec("wanda", recipe=C4_256), 75.0),
        make_record(make_spec("wanda", "4:8"), status="refused"),
        make_record(make_spec("wanda", "1:4", seed=1), status="failed"),
        make_record(make_spec("wanda", "1:4", seed=0), status="failed"),
        make_record(make_spec("old")),
        make_record(machine="another"),
    ]


def test_the_order_of_records_does_not_matter() -> None:
    files = stored(*many())
    expected = to_markdown(build_board(files, {"old": 2}))
    draw = random.Random(0)
    for _ in range(12):
        draw.shuffle(files)
        assert to_markdown(build_board(files, {"old": 2})) == expected
    assert len(list(tables(expected))) == 6


def test_what_is_read_again_gives_the_same_bytes(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    for record in many():
        store.write(record)
    text = to_markdown(build_board(store.latest(), {"old": 2}))
    assert text == to_markdown(build_board(ResultStore(tmp_path, pytest.fail).latest(), {"old": 2}))
    assert text == page(*many(), old=2)


def test_the_page_is_plain_markdown() -> None:
    text = page(*many(), old=2)
    assert text.startswith("# prunebench leaderboard\n")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    for table in tables(text):
        assert len({frozenset(row) for row in table}) == 1


def test_trust_stands_where_somebody_looked_again() -> None:
    """A row is as its least trusted record."""
    records = [dense(), magnitude(), *(make_record(make_spec(seed=seed), value=80.0 + seed) for seed in (0, 1))]
    grades: dict[str, Grade] = {records[0].id: "replayed", records[2].id: "replayed", records[3].id: "checked"}
    found = build_board(stored(*records), grade=lambda record: grades.get(record.id, "reported"))
    table = only_table(to_markdown(found))
    assert [(row["method"].strip("*"), row["trust"]) for row in table] == [
        ("dense", "replayed"),
        ("wanda", "checked"),
        ("magnitude", "reported"),
    ]
    assert "trust" not in only_table(page(*records))[0]


# What is committed

COMMITTED = sorted(RESULTS.glob("*/*/*.json"))
needs_records = pytest.mark.skipif(not COMMITTED, reason="no records are committed in results/ yet")


@needs_records
def test_the_committed_page_is_what_the_committed_records_give() -> None:
    revisions = load_registry().revisions()
    store = ResultStore(RESULTS, pytest.fail)
    latest = store.latest()
    placed = beside(load_published(RESULTS / "published"), [item.record for item in latest])
    fresh = to_markdown(build_board(latest, revisions, store.items, Verdicts.of(RESULTS).grade), placed)
    assert PAGE.read_text(encoding="utf-8") == fresh, "run `prunebench report --out leaderboard.md`"


@needs_records
def test_the_committed_records_are_whole_and_in_their_places() -> None:
    store = ResultStore(RESULTS, pytest.fail)
    found = {entry.path: entry.record for entry in store.all()}
    assert len(found) == len([path for path in COMMITTED if not path.is_relative_to(RESULTS / "published")])
    for path, record in found.items():
        assert path.startswith(f"{record.machine}/{slug(record.spec.model.name)}/{record.spec.file_stem}."), path


ABSOLUTE = re.compile(r"(?<![\w.$…:/-])/(?:home|root|work|tmp|Users|usr|var|opt|mnt|data|etc|private)\b|[A-Za-z]:\\\\?\w")


def texts(data: Any) -> Iterator[str]:
    """All keys and texts in JSON."""
    if isinstance(data, dict):
        yield from data
        yield from texts(list(data.values()))
    elif isinstance(data, list):
        for item in data:
            yield from texts(item)
    elif isinstance(data, str):
        yield data


def test_what_an_absolute_path_is() -> None:
    for text in ("/home/jo/x", "at /root", '"/opt/main"', "=/tmp/a.txt", "\n/var/x", "C:\\Users\\jo"):
        assert ABSOLUTE.search(text), text
    for text in ("$HOME/x", "$MIRROR/models/wiki7m", "…/work/a.txt", "quickstart/texts/tmp", "https://a.org/home/", "q/k/v"):
        assert not ABSOLUTE.search(text), text


@needs_records
def test_the_committed_records_name_no_place_host_or_user() -> None:
    names = [name for name in {socket.gethostname(), getpass.getuser()} if len(name) > 2]
    for path in COMMITTED:
        where = path.relative_to(RESULTS).as_posix()
        for text in (where, *texts(json.loads(path.read_text(encoding="utf-8")))):
            assert not ABSOLUTE.search(text), f"{where} holds an absolute path: {text}"
            for name in names:
                assert not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text), f"{where} names {name}: {text}"


@needs_records
def test_the_committed_records_are_json_that_anyone_reads() -> None:
    for path in COMMITTED:
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["schema"] in range(1, SCHEMA + 1)
        assert all(len(set(map(len, score["items"].values()))) == 1 for score in data["scores"].values() if score["items"])


@needs_records
def test_the_committed_raw_answers_are_whole_and_belong_to_a_record() -> None:
    store, kept = ResultStore(RESULTS, pytest.fail), set()
    for stored in store.all():
        for score in stored.record.scores.values():
            columns = store.items(stored.record, score)
            assert len(set(map(len, columns.values()))) == 1
            if score.items_file:
                kept.add((RESULTS / stored.path).parent / score.items_file)
    assert kept == set(RESULTS.glob("*/*/*.parquet"))

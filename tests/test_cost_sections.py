"""Runs of which only costs are known: their own sections, beside floors and published costs, and nowhere else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from shapes_of_costs import GIB, MACHINE, METHODS, TRAINED, cost_record, costs_of_7b, step, trained_record
from support import Ran, make_record, make_spec

from prunebench.errors import StoreError
from prunebench.report.figures import figures_of
from prunebench.report.page import to_html
from prunebench.results import leaderboard
from prunebench.results.board import Board, build_board
from prunebench.results.costs_board import CostRow
from prunebench.results.costs_export import COLUMNS, costs_to_csv
from prunebench.results.costs_text import ONLY_COSTS, headings, phase_text, table_notes, texts
from prunebench.results.exports import ExportedBoard, to_json
from prunebench.results.published_costs import load_costs
from prunebench.results.records import RunRecord
from prunebench.results.sheet import to_csv
from prunebench.results.store import ResultStore, Stored
from prunebench.show import print_board, print_record

PUBLISHED = Path(__file__).parents[1] / "results" / "published"


def board_of(*records: RunRecord, published: bool = True) -> Board:
    stored = [Stored(f"{record.machine}/{record.spec.model.name}/{record.id}.json", record) for record in records]
    return build_board(stored, published=load_costs(PUBLISHED) if published else ())


def row_of(board: Board, method: str, target: str = "0.5") -> CostRow:
    [section] = board.costs
    return next(row for table in section.tables if table.target == target for row in table.rows if row.method == method)


# Which runs


def test_shapes_and_runs_without_evaluations_stand_among_the_costs_and_nowhere_else() -> None:
    scored = make_record()
    board = board_of(scored, *costs_of_7b(), cost_record(shape=None, machine="box"))
    assert [section.model for section in board.sections] == ["tiny"]
    assert {run_id for table in board.sections[0].tables for row in table.rows for run_id in row.ids} == {scored.id}
    assert [(section.machine, section.model, section.is_shape) for section in board.costs] == [
        ("box", "tiny", False),
        (MACHINE, "llama-2-7b (random weights)", True),
    ]
    assert board.costs[1].title == "Costs of llama-2-7b (random weights) in bfloat16, 128 x 2048 tokens"


def test_dense_failed_refused_and_outdated_runs_are_no_costs() -> None:
    wanda, dense = cost_record(), cost_record("dense", "dense", steps=[step("dense", {"other": (0.1, None)})])
    board = board_of(wanda, dense, cost_record("gblm", status="failed", steps=[]), cost_record("sparsegpt", status="refused"))
    assert [row.ids for section in board.costs for row in section.rows] == [(wanda.id,)]
    assert len(board.failed) == len(board.refused) == 1
    stored = [Stored("a/b/c.json", wanda)]
    assert build_board(stored, {"wanda": 2}).costs == ()


def test_machines_dtypes_and_recipes_have_sections_of_their_own_and_methods_without_data_stand_in_each() -> None:
    records = [cost_record(), cost_record(samples=32), cost_record("magnitude"), cost_record(machine="other")]
    found = {(s.machine, s.recipe and s.recipe.samples): [row.method for row in s.rows] for s in board_of(*records).costs}
    assert found == {
        (MACHINE, 32): ["magnitude", "wanda"],
        (MACHINE, 128): ["magnitude", "wanda"],
        ("other", 128): ["wanda"],
    }


def test_seeds_are_one_row_of_means_and_highest_peaks() -> None:
    slow = step("wanda", {"statistics": (6.0, 3.0)}, peak_device_bytes=20 * GIB)
    fast = step("wanda", {"statistics": (4.0, 3.0), "other": (1.0, None)})
    row = row_of(board_of(cost_record(steps=[slow], seed=1), cost_record(steps=[fast], seed=0)), "wanda")
    assert (row.seeds, row.seconds, row.floor, row.peak_device_bytes) == ((0, 1), 5.5, 3.0, 20 * GIB)
    assert row.phases == {"statistics": 5.0, "rest": 0.5}
    unknown = step("wanda", {"statistics": (4.0, None)})
    row = row_of(board_of(cost_record(steps=[slow], seed=1), cost_record(steps=[unknown], seed=0)), "wanda")
    assert (row.floor, row.times_floor) == (None, None), "a mean over some says nothing"


def test_a_run_within_a_limit_of_memory_has_a_row_of_its_own() -> None:
    notes = {"device memory limited to": "8 GiB"}
    started = "2999-01-01T00:00:00+00:00"
    limited = cost_record(steps=[step("wanda", {"statistics": (30.0, 3.0)}, notes=notes)])
    limited = limited.model_copy(update={"provenance": limited.provenance.model_copy(update={"started": started})})
    board = board_of(cost_record(), limited)
    assert row_of(board, "wanda").seconds == pytest.approx(sum(found for found, _ in METHODS["wanda"].values()))
    row = row_of(board, "wanda (within 8 GiB)")
    assert (row.seconds, row.published) == (30.0, None)


def test_of_committed_records_those_of_shapes_alone_have_costs_apart() -> None:
    stored = [s for s in ResultStore(PUBLISHED.parent, lambda _: None).latest() if s.record.status == "ok"]
    assert {s.record.spec.model.is_shape for s in stored if not s.record.scores} == {True}
    assert build_board([s for s in stored if not s.record.spec.model.is_shape][:40]).costs == ()


# Floors, trainings, published costs


def test_floors_stand_beside_what_was_found() -> None:
    board = board_of(*costs_of_7b())
    row = row_of(board, "wanda")
    assert row.times_floor == pytest.approx(sum(found for found, _ in METHODS["wanda"].values()) / 7.108)
    [section] = board.costs
    shown = dict(zip(headings(section, section.tables[0]), texts(section, section.tables[0], row), strict=True))
    assert shown["statistics"] == "4.20 (1.4x)"
    assert shown["x floor"] == "1.5x"
    assert (shown["device MiB"], shown["host MiB"]) == ("18432", "3072")
    assert shown["training"] == ""


@pytest.mark.parametrize(
    ("seconds", "floor", "text"),
    [(12.3, 8.8, "12.30 (1.4x)"), (0.05, 0.0001, "0.0500 (500x)"), (0.5, None, "0.50"), (1234.5, 1.0, "1,234.50 (1,234x)")],
)
def test_a_phase_in_words(seconds: float, floor: float | None, text: str) -> None:
    assert phase_text(seconds, floor) == text


def test_a_longer_training_is_told_by_the_steps_that_were_timed() -> None:
    row = row_of(board_of(trained_record(seconds=0.4)), TRAINED)
    assert row.longer is not None
    assert row.longer.seconds == pytest.approx(row.seconds + 945 * 0.4)
    assert (row.longer.steps, row.longer.measured) == (1000, 50)
    text = leaderboard.to_markdown(board_of(trained_record(seconds=0.4)))
    assert f"≈ {row.longer.seconds:.2f} s (1000 steps, extrapolated from 50)." in text


@pytest.mark.parametrize(
    "pace",
    [
        None,
        3,
        {},
        {"steps": 5, "after": 5, "seconds": 1},
        {"steps": 1000, "after": 5, "seconds": 1},
        {"steps": "9", "after": 5},
    ],
)
def test_what_says_nothing_of_a_step_is_not_extrapolated(pace: Any) -> None:
    trained = step("perp", {"training": (4.0, None)}, notes={"seconds a training step": pace})
    assert row_of(board_of(cost_record(TRAINED, steps=[trained])), TRAINED).longer is None


def test_published_costs_stand_beside_runs_of_the_same_sizes_and_recipe_on_a_gpu() -> None:
    row = row_of(board_of(*costs_of_7b()), "wanda")
    assert row.published is not None
    assert (row.published.seconds, row.published.gigabytes, row.published.source.read) == (55, 22, "secondary")
    assert row.faster == pytest.approx(55 / row.seconds)
    [section] = board_of(*costs_of_7b()).costs
    assert all("target not stated" in " ".join(table_notes(table)) for table in section.tables), "of 0.5 and of 2:4"
    on_host = step("wanda", METHODS["wanda"], peak_device_bytes=None)
    for other in (
        cost_record(shape="llama-3.1-8b"),
        cost_record(samples=32),
        cost_record("wanda[alpha=1]", steps=[step("wanda", METHODS["wanda"])]),
        cost_record(steps=[on_host]),
        cost_record(shape=None),
    ):
        [section] = board_of(other).costs
        assert section.rows[0].published is None
    trained = row_of(board_of(trained_record(shape="llama-30b")), TRAINED)
    assert trained.published is not None
    assert (trained.published.text, trained.faster) == ("retrains within minutes", None)


def test_the_published_costs_are_those_of_the_notes() -> None:
    found = {one.method: (one.seconds, one.gigabytes) for one in load_costs(PUBLISHED) if one.seconds}
    assert found == {"wanda": (55, 22), "sparsegpt": (322, 23), "wanda++": (290, 25), "gblm": (5801, 26)}
    assert load_costs(PUBLISHED / "nowhere") == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seconds = 55", "seconds = 0", "cost.0.seconds"),
        ('read = "secondary"', 'read = "guess"', "source.read"),
        ("[setting]", "[settings]", "setting"),
        ("[setting]", "[setting", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = (PUBLISHED / "costs" / "llama-1-7b.toml").read_text(encoding="utf-8")
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "x.toml").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(StoreError, match=f"x.toml.*{said}"):
        load_costs(tmp_path)


# Texts


def test_the_page_says_that_weights_are_random_and_keeps_other_sections_as_they_were() -> None:
    scored = make_record()
    before = leaderboard.to_markdown(board_of(scored))
    text = leaderboard.to_markdown(board_of(scored, *costs_of_7b()))
    head, _, rest = text.partition("## Costs of shapes\n")
    assert head.rstrip() == before.rstrip()
    assert ONLY_COSTS in rest
    assert "(random weights)" in rest
    assert "`prunebench run speed-7b`" in rest
    assert "55 | " in rest
    assert "S: read in a secondary source" in rest
    assert "for orientation" in rest
    shared = next(line for line in rest.splitlines() if TRAINED.replace(",", ", ") in line.replace("\\", "") and "*" in line)
    assert shared.count("*") >= 2


def test_costs_alone_are_a_board() -> None:
    text = leaderboard.to_markdown(board_of(*costs_of_7b()))
    assert "There are no results yet" not in text
    assert board_of(*costs_of_7b()).only("8B").titles == []
    assert board_of(*costs_of_7b()).only("llama-2").titles == [
        "Costs of llama-2-7b (random weights) in bfloat16, 128 x 2048 tokens"
    ]


def test_costs_are_in_the_exports() -> None:
    board = board_of(*costs_of_7b())
    data = json.loads(to_json(board))
    [costs] = ExportedBoard.model_validate(data).costs
    assert len(costs.rows) == 12
    assert costs.random_weights
    assert "costs" not in json.loads(to_json(board_of(make_record())))
    lines = list(csv.DictReader(io.StringIO(costs_to_csv(board.costs))))
    assert list(lines[0]) == list(COLUMNS)
    wanda = next(line for line in lines if line["method"] == "wanda" and line["target"] == "2:4")
    assert (float(wanda["published_seconds"]), wanda["random_weights"]) == (55, "True")
    assert json.loads(wanda["floors"])["statistics"] == 3.0
    assert to_csv(board_of(make_record())) == to_csv(board_of(make_record(), *costs_of_7b()))


def test_the_html_page_has_a_table_of_costs_whose_rows_open_their_runs() -> None:
    records = costs_of_7b()
    board = board_of(*records)
    page = to_html(board, records, figures_of(board, [], [], lambda _: None, lambda *_: {}))
    assert 'id="costs-1"' in page
    assert page.count('data-method="wanda"') == 2
    assert ONLY_COSTS in page
    assert f'data-runs="{row_of(board, "wanda").ids[0]}"' in page


def test_the_terminal_shows_costs_and_a_records_floors(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200)
    print_board(board_of(*costs_of_7b()), console)
    print_record(cost_record(), "a/b.json", console)
    shown = capsys.readouterr().out
    assert ONLY_COSTS in shown
    assert "14.00 (1.5x)" in shown
    assert "statistics 4.200 (1.4x floor), propagation 4.500 (1.1x floor)" in shown
    assert "calibration 0.200, other 1.000" in shown


def test_report_writes_costs_and_their_sheet(command: Callable[..., Ran], tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results", pytest.fail)
    for record in costs_of_7b()[:3]:
        store.write(record)
    ran = command("report", "--results", tmp_path / "results", "--out", tmp_path / "b.md", "--csv", tmp_path / "b.csv")
    assert ran.code == 0, ran
    assert "## Costs of shapes" in (tmp_path / "b.md").read_text(encoding="utf-8")
    assert len((tmp_path / "b.costs.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert command("report", "--results", tmp_path / "results", "--only", "8B").code == 2


# Scores without a value


def test_why_a_row_has_no_value_stands_in_its_place_and_below_the_table() -> None:
    fast, none = make_record(make_spec("wanda", "2:4")), make_record(make_spec("wanda", "0.5"))
    score = next(iter(none.scores.values())).model_copy(
        update={"value": None, "reason": "no kernel for unstructured masks", "items": {}}
    )
    slow = none.model_copy(update={"scores": {"eval0": score}})
    board = board_of(fast, slow)
    text = leaderboard.to_markdown(board)
    row = next(line for line in text.splitlines() if "no kernel" in line and line.startswith("|"))
    assert "wanda" in row
    assert "No value of wanda: no kernel for unstructured masks." in text
    assert "nan" not in text
    other = score.model_copy(update={"reason": "out of memory."})
    text = leaderboard.to_markdown(board_of(none.model_copy(update={"scores": {"eval0": other}})))
    assert " none |" in text
    assert "No value of wanda: out of memory." in text


def test_a_record_tells_why_a_score_has_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record()
    score = record.scores["eval0"].model_copy(update={"value": None, "reason": "no kernel takes these shapes"})
    print_record(record.model_copy(update={"scores": {"eval0": score}}), "a/b.json", Console(width=200))
    assert "no kernel takes these shapes (1.5 s)" in capsys.readouterr().out

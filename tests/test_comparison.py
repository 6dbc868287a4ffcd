"""Rows compared item by item: who is ranked with whom, and what a page says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import make_record, make_spec

from prunebench.errors import StoreError
from prunebench.results.board import Board, build_board
from prunebench.results.comparison import Answers, Measured, compare
from prunebench.results.items import Columns
from prunebench.results.leaderboard import to_markdown
from prunebench.results.records import RunRecord, SampleRecord, ScoreRecord
from prunebench.results.store import Stored

PERPLEXITY = SampleRecord(column="nll", exponential=True, documents="document")
ACCURACY = SampleRecord(column="right", strata="stratum", tasks="task")
WINDOWS = 60


def record(
    method: str, seed: int | None, items: dict[str, Sequence[Any]], sample: SampleRecord | None, **score: Any
) -> RunRecord:
    target = "dense" if method == "dense" else "0.5"
    made = make_record(make_spec(method, target, seed))
    [(name, old)] = made.scores.items()
    changes = {"items": {column: list(values) for column, values in items.items()}, "sample": sample, **score}
    return made.model_copy(update={"scores": {name: old.model_copy(update=changes)}})


def windows(method: str, seed: int | None, above: float, noise: float = 0.01, documents: int = 20) -> RunRecord:
    """A run whose windows are `above` those of a common text."""
    generator = np.random.default_rng([0 if seed is None else seed + 1, len(method)])
    text = np.random.default_rng(7).normal(4, 0.5, WINDOWS)
    nll = text + above + generator.normal(0, noise, WINDOWS)
    document = [index * documents // WINDOWS for index in range(WINDOWS)]
    return record(method, seed, {"nll": nll, "document": document}, PERPLEXITY, value=math.exp(nll.mean()))


def answers(method: str, seed: int | None, right: Sequence[int], choices: int = 2, **score: Any) -> RunRecord:
    """A run's answers to two tasks, the first with three times the questions."""
    split = 3 * len(right) // 4
    task = ["long"] * split + ["short"] * (len(right) - split)
    items = {"right": right, "task": task, "stratum": task, "choices": [choices] * len(right)}
    value = (np.mean(right[:split]) + np.mean(right[split:])) / 2
    parts = {"long": float(np.mean(right[:split])), "short": float(np.mean(right[split:]))}
    changes = {"value": float(value), "parts": parts, "unit": "accuracy", "higher_is_better": True, **score}
    return record(method, seed, items, ACCURACY, **changes)


def board(*records: RunRecord) -> Board:
    return build_board(Stored(f"box/tiny/{index}.json", made) for index, made in enumerate(records))


def ranks(found: Board) -> dict[str, str]:
    [section] = found.sections
    [table] = section.tables
    return {row.method: "" if row.rank is None else str(row.rank) for row in table.rows}


def row(made: RunRecord) -> Answers:
    [(name, score)] = made.scores.items()
    found = Answers.of([Measured(made, name, score)], lambda _, score: score.items)
    assert found is not None
    return found


def test_rows_that_differ_have_ranks_and_rows_that_do_not_share_them() -> None:
    runs = [windows("dense", None, 0.0, 0.0), windows("magnitude", None, 0.3)]
    runs += [windows("wanda", seed, 0.2) for seed in range(3)] + [windows("random", seed, 0.2) for seed in range(3)]
    assert ranks(board(*runs)) == {"dense": "", "wanda": "1-2", "random": "1-2", "magnitude": "3"}
    text = to_markdown(board(*runs))
    assert "| **wanda** " in text
    assert "| magnitude " in text
    assert "had less than an 80% chance to show" in text


def test_the_order_of_records_and_repetition_change_nothing() -> None:
    runs = [windows("dense", None, 0.0, 0.0), windows("magnitude", None, 0.201), *(windows("wanda", s, 0.2) for s in range(3))]
    assert to_markdown(board(*runs)) == to_markdown(board(*reversed(runs))) == to_markdown(board(*runs))


def test_without_articles_neighbouring_windows_are_drawn_together() -> None:
    runs = [windows("wanda", 0, 0.2, documents=1), windows("magnitude", None, 0.9, documents=1)]
    assert ranks(board(*runs)) == {"wanda": "1", "magnitude": "2"}
    assert row(runs[0]).items.clusters is None


def test_a_handful_of_windows_gives_no_interval_and_so_shared_ranks() -> None:
    runs = [windows("wanda", 0, 0.2, documents=1), windows("magnitude", None, 0.9, documents=1)]
    for index, made in enumerate(runs):
        [(name, score)] = made.scores.items()
        items = {column: values[:4] for column, values in score.items.items()}
        runs[index] = made.model_copy(update={"scores": {name: score.model_copy(update={"items": items})}})
    assert ranks(board(*runs)) == {"wanda": "1-2", "magnitude": "1-2"}
    text = to_markdown(board(*runs))
    assert "So few items tell no two rows apart." in text
    assert "nan" not in text


def test_a_row_that_cannot_be_compared_takes_no_rank_from_the_others() -> None:
    others = [windows("wanda", 0, 0.2), windows("random", 0, 0.4), windows("gblm", 0, 0.6)]
    assert ranks(board(*others, windows("magnitude", None, 0.1, documents=30))) == {
        "magnitude": "",
        "wanda": "1",
        "random": "2",
        "gblm": "3",
    }


def test_what_could_have_shown_is_told_after_correction() -> None:
    three = [windows("wanda", 0, 0.2), windows("random", 0, 0.21), windows("gblm", 0, 0.22)]
    [few], [many] = board(*three[:2]).sections, board(*three).sections
    assert few.tables[0].detectable is not None
    assert many.tables[0].detectable is not None
    assert 1.1 < many.tables[0].detectable / few.tables[0].detectable < 1.6


def test_a_row_alone_has_no_rank() -> None:
    assert ranks(board(windows("dense", None, 0.0), windows("wanda", 0, 0.2))) == {"dense": "", "wanda": ""}


@pytest.mark.parametrize("what", ["other items", "no seed in common", "no sample"])
def test_what_cannot_be_compared_is_not_ranked(what: str) -> None:
    first, second = windows("wanda", 0, 0.2), windows("random", 0, 0.4)
    if what == "other items":
        second = windows("random", 0, 0.4, documents=30)
    elif what == "no seed in common":
        second = windows("random", 5, 0.4)
    else:
        [(name, score)] = second.scores.items()
        second = second.model_copy(update={"scores": {name: score.model_copy(update={"sample": None})}})
    found = board(first, second)
    assert set(ranks(found).values()) == {""}
    assert "cannot be compared one by one" in to_markdown(found)


def test_the_difference_from_dense_is_that_of_the_perplexities() -> None:
    dense, pruned = windows("dense", None, 0.0, 0.0), windows("magnitude", None, 0.25, 0.0)
    [section] = board(dense, pruned).sections
    versus = section.tables[0].rows[1].versus
    assert versus is not None
    assert versus.estimate == pytest.approx(0.25)
    [(_, mine)], [(_, theirs)] = pruned.scores.items(), dense.scores.items()
    assert mine.value is not None
    assert theirs.value is not None
    assert math.exp(versus.estimate) == pytest.approx(mine.value / theirs.value)
    assert "+28.4" in to_markdown(board(dense, pruned))


def test_a_row_without_seeds_stands_beside_each_seed() -> None:
    seeded, single = [windows("wanda", seed, 0.2) for seed in range(3)], windows("magnitude", None, 0.3)
    measured = [Measured(made, name, score) for made in seeded for name, score in made.scores.items()]
    wanda = Answers.of(measured, lambda _, score: score.items)
    assert wanda is not None
    found = compare(row(single), wanda)
    assert found is not None
    assert found.seeds == (0, 1, 2)
    slow = np.mean([row(single).values[0] - values for values in wanda.values])
    assert found.new_items.estimate == pytest.approx(slow)
    back = compare(wanda, row(single))
    assert back is not None
    assert (back.new_items.low, back.new_items.p_value) == (-found.new_items.high, found.new_items.p_value)


def test_seeds_are_paired_and_only_common_ones_count() -> None:
    one = [windows("wanda", seed, 0.2) for seed in (0, 1, 2)]
    other = [windows("random", seed, 0.3) for seed in (1, 2, 3)]
    rows = []
    for runs in (one, other):
        measured = [Measured(made, name, score) for made in runs for name, score in made.scores.items()]
        rows.append(Answers.of(measured, lambda _, score: score.items))
    assert rows[0] is not None
    assert rows[1] is not None
    found = compare(rows[0], rows[1])
    assert found is not None
    assert found.seeds == (1, 2)
    first, second = found.pairs
    assert np.array_equal(first, rows[0].values[1:])
    assert np.array_equal(second, rows[1].values[:2])


def test_tasks_count_equally_and_flips_are_told_apart() -> None:
    right = [1] * 60 + [0] * 20
    changed = [0] * 6 + [1] * 54 + [1] * 2 + [0] * 18
    found = compare(row(answers("dense", None, right)), row(answers("wanda", 0, changed)))
    assert found is not None
    assert found.new_items.estimate == pytest.approx((6 / 60 - 2 / 20) / 2, abs=1e-12)
    assert found.flipped == pytest.approx((6 / 60 / 2, 2 / 20 / 2))
    [flips] = found.flips
    assert (flips.right_to_wrong, flips.wrong_to_right, flips.asked) == (6, 2, 80)
    text = to_markdown(board(answers("dense", None, right), answers("wanda", 0, changed)))
    assert "| 5.0 / 5.0 |" in text.replace("  ", " ")


def test_accuracies_that_guessing_reaches_are_marked() -> None:
    generator = np.random.default_rng(2)
    guessed = generator.integers(0, 2, 400).tolist()
    known = [1] * 360 + [0] * 40
    found = row(answers("dense", None, guessed))
    assert found.guesses == {"", "long", "short"}
    assert row(answers("dense", None, known)).guesses == frozenset()
    mixed = [1] * 300 + guessed[:100]
    assert row(answers("dense", None, mixed)).guesses == {"short"}
    text = to_markdown(board(answers("dense", None, mixed), answers("wanda", 0, guessed)))
    assert "covers guessing (marked ≈) in: short." in text
    assert row(answers("dense", None, mixed, choices=4)).guesses == frozenset()


def test_accuracies_below_guessing_are_marked() -> None:
    """A pruned model that prefers the wrong answer is no guesser, and no better for it."""
    wrong = [1] * 120 + [0] * 280
    found = row(answers("wanda", 0, wrong))
    assert (found.guesses, found.below_chance) == (frozenset(), {"", "long", "short"})
    known = [1] * 360 + [0] * 40
    mixed = row(answers("wanda", 0, [1] * 290 + [0] * 10 + [0] * 80 + [1] * 20))
    assert (mixed.guesses, mixed.below_chance) == (frozenset(), {"short"})
    assert row(answers("dense", None, known)).below_chance == frozenset()
    text = to_markdown(board(answers("dense", None, known), answers("wanda", 0, wrong)))
    assert " 20.00 ↓ |" in text
    assert "≈ |" not in text


def test_a_set_without_a_mean_shows_its_tasks_and_no_ranks() -> None:
    runs = [answers(name, 0, [1] * half + [0] * (80 - half), value=None) for name, half in (("wanda", 60), ("random", 20))]
    found = board(*runs)
    assert set(ranks(found).values()) == {""}
    text = to_markdown(found)
    assert " – |" in text
    assert " 100.00 |" in text


def test_a_set_without_a_mean_has_no_difference_from_dense() -> None:
    runs = [answers(name, None, [1] * half + [0] * (80 - half), value=None) for name, half in (("dense", 40), ("wanda", 60))]
    [section] = board(*runs).sections
    [table] = section.tables
    assert [(row.versus, row.flipped) for row in table.rows] == [(None, None)] * 2
    assert all("" not in row.guesses for row in table.rows)
    text = to_markdown(board(*runs))
    assert "nan" not in text
    assert "– ≈" not in text


def test_raw_answers_that_are_gone_do_not_take_the_board_down() -> None:
    def load(record: RunRecord, score: ScoreRecord) -> Columns:
        if record.spec.method == "wanda":
            raise StoreError("the raw answers x.parquet cannot be read: gone.")
        return score.items

    made = [windows(name, None, above) for name, above in (("dense", 0.0), ("wanda", 0.2), ("random", 0.3))]
    found = build_board((Stored(f"box/tiny/{index}.json", one) for index, one in enumerate(made)), load=load)
    [section] = found.sections
    assert section.unread == ("the raw answers x.parquet cannot be read: gone.",)
    assert {row.method: row.versus is None for row in section.tables[0].rows} == {"dense": True, "wanda": True, "random": False}
    assert "x.parquet" in to_markdown(found)


def test_a_score_without_the_column_it_names_is_not_compared() -> None:
    made = [windows(name, None, above) for name, above in (("wanda", 0.2), ("random", 0.3))]
    [(name, score)] = made[0].scores.items()
    made[0] = made[0].model_copy(update={"scores": {name: score.model_copy(update={"items": {}})}})
    assert set(ranks(board(*made)).values()) == {""}


def test_a_table_is_left_out_where_the_dense_model_cannot_do_the_task() -> None:
    def asked(method: str, right: Sequence[int]) -> RunRecord:
        made = answers(method, None, right)
        [(name, score)] = made.scores.items()
        conditions = {**score.conditions, "least_of_dense": 0.1}
        evals = tuple(spec.model_copy(update={"conditions": conditions}) for spec in made.spec.evals)
        spec = made.spec.model_copy(update={"evals": evals})
        return made.model_copy(
            update={"spec": spec, "id": spec.id, "scores": {name: score.model_copy(update={"conditions": conditions})}}
        )

    few, some = [1] * 3 + [0] * 77, [1] * 20 + [0] * 60
    text = to_markdown(board(asked("dense", few), asked("magnitude", few)))
    assert "The dense model gets 2.5% right, less than 10%" in text
    assert "| magnitude" not in text
    assert "| magnitude" in to_markdown(board(asked("dense", some), asked("magnitude", some)))

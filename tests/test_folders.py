"""`prunebench compare BEFORE AFTER`: rows matched by content, what changed beyond noise, and what a guard may cry about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import C4_TEXT, CONDITIONS, Ran, make_record, make_spec

from prunebench.errors import StoreError
from prunebench.results.changes import OUTCOMES, Change, Changes
from prunebench.results.folders import changes
from prunebench.results.items import Columns
from prunebench.results.matching import Folder
from prunebench.results.records import EvalSpec, Recipe, RunRecord, RunSpec, SampleRecord, ScoreRecord
from prunebench.results.store import ResultStore

LOSSES = SampleRecord(column="nll", exponential=True, documents="document")
ANSWERS = SampleRecord(column="right", strata="stratum", tasks="task")
WINDOWS = 60
METHODS = ("magnitude", "wanda", "gblm", "sparsegpt")


def losses(seed: int | Sequence[int], shift: float = 0.0, noise: float = 0.05) -> NDArray[np.float64]:
    """A text's windows; what differs from another seed is noise."""
    text = np.random.default_rng(7).normal(4, 0.5, WINDOWS)
    return text + shift + np.random.default_rng(seed).normal(0, noise, WINDOWS)


def measured(
    nll: NDArray[np.float64], method: str = "wanda", seed: int | None = 0, spec: RunSpec | None = None, **changes: Any
) -> RunRecord:
    """A run with these answers."""
    made = make_record(spec or make_spec(method, "0.5", seed), **changes)
    items = {"nll": nll.tolist(), "document": [index // 3 for index in range(len(nll))]}
    return scored(made, items=items, sample=LOSSES, value=math.exp(nll.mean()))


def answered(right: Sequence[int], **changes: Any) -> RunRecord:
    """A run that answered questions; more is better."""
    items = {"right": list(right), "task": ["one"] * len(right), "stratum": ["one"] * len(right)}
    made = make_record(make_spec("wanda", "0.5", 0), unit="accuracy", higher_is_better=True)
    return scored(made, items=items, sample=ANSWERS, value=float(np.mean(right)), **changes)


def scored(record: RunRecord, **changes: Any) -> RunRecord:
    """The record with fields of its only score changed."""
    [(name, score)] = record.scores.items()
    return record.model_copy(update={"scores": {name: score.model_copy(update=changes)}})


def own(record: RunRecord, score: ScoreRecord) -> Columns:
    return score.items


def became(before: Sequence[RunRecord], after: Sequence[RunRecord]) -> Changes:
    return changes(Folder(before, own), Folder(after, own))


def outcomes(found: Changes) -> dict[str, int]:
    return {outcome: count for outcome, count in found.counts.items() if count}


def only(found: Changes) -> Change:
    [change] = found.rows
    return change


def test_the_same_answers_are_the_same() -> None:
    records = [measured(losses(index), method) for index, method in enumerate(METHODS)]
    found = became(records, records)
    assert outcomes(found) == {"the same": 4}
    assert not found.worsened()
    assert all(change.corrected is None for change in found.rows)


def test_what_worsens_and_improves_is_told_with_its_interval() -> None:
    before = [measured(losses(0), "wanda"), measured(losses(1), "gblm"), measured(losses(2), "magnitude")]
    after = [measured(losses(3, 0.1), "wanda"), measured(losses(4, -0.1), "gblm"), measured(losses(2), "magnitude")]
    found = became(before, after)
    assert outcomes(found) == {"worsened": 1, "improved": 1, "the same": 1}
    worse, better, _ = found.rows
    assert (worse.label.method, better.label.method) == ("wanda", "gblm")
    assert worse.difference is not None
    assert worse.difference.low < 0.1 < worse.difference.high
    assert worse.difference.estimate == pytest.approx((losses(3, 0.1) - losses(0)).mean())
    assert better.difference is not None
    smaller = min((worse, better), key=lambda change: change.difference.p_value if change.difference else 1.0)
    assert smaller.difference is not None
    assert smaller.corrected == 2 * smaller.difference.p_value
    assert found.worsened()
    assert became(after, before).of("worsened")[0].label.method == "gblm"


def test_of_an_accuracy_more_is_better() -> None:
    few, many = [1] * 60 + [0] * 140, [1] * 120 + [0] * 80
    assert outcomes(became([answered(few)], [answered(many)])) == {"improved": 1}
    assert outcomes(became([answered(many)], [answered(few)])) == {"worsened": 1}
    flipped = [*few[1:], 1]
    assert outcomes(became([answered(few)], [answered(flipped)])) == {"within noise": 1}


def test_without_a_change_a_guard_rarely_cries() -> None:
    """Rows whose answers differ by noise only: some row of a folder is told to have changed in about one of twenty folders."""
    folders, cried = 300, 0
    for folder in range(folders):
        before = [measured(losses([folder, 0, row]), method) for row, method in enumerate(METHODS)]
        after = [measured(losses([folder, 1, row]), method) for row, method in enumerate(METHODS)]
        found = became(before, after)
        assert set(outcomes(found)) <= {"within noise", "worsened", "improved"}
        cried += bool(found.of("worsened") or found.of("improved"))
    assert 0 < cried <= 25, "at 5% it is 15 of 300, with a standard deviation of 4"


def test_a_guard_does_not_cry_about_questions_either() -> None:
    """Right and wrong answers, of which one in ten flips by chance, some rows none: equal rows take no part."""
    folders, cried = 200, 0
    for folder in range(folders):
        generator = np.random.default_rng([folder, 5])
        before, after = [], []
        for row, method in enumerate(METHODS):
            right = generator.integers(0, 2, 100)
            flipped = np.where(generator.random(100) < 0.1 * (row > 0), 1 - right, right)
            for answers, records in ((right, before), (flipped, after)):
                made = answered(answers.tolist())
                spec = make_spec(method, "0.5", 0)
                records.append(made.model_copy(update={"spec": spec, "id": spec.id}))
        found = became(before, after)
        assert len(found.of("the same")) >= 1
        cried += bool(found.of("worsened") or found.of("improved"))
    assert 0 < cried <= 18, "at 5% it is 10 of 200, with a standard deviation of 3"


def test_one_row_that_worsens_is_found_among_many() -> None:
    before, after = [], []
    for row in range(30):
        spec = make_spec(f"wanda[power={row}]", "0.5", 0)
        before.append(measured(losses([0, row]), spec=spec))
        after.append(measured(losses([1, row], 0.06 if row == 17 else 0.0), spec=spec))
    assert [change.label.method for change in became(before, after).of("worsened")] == ["wanda[power=17]"]


def test_rows_that_stayed_take_no_power() -> None:
    """Hundreds of equal rows do not hide one that is worse."""
    same = [measured(losses([row]), spec=make_spec(f"wanda[power={row}]")) for row in range(200)]
    [worse] = became([*same, measured(losses(1), "gblm")], [*same, measured(losses(2, 0.03), "gblm")]).of("worsened")
    assert worse.corrected is not None
    assert worse.difference is not None
    assert 0.05 / 200 < worse.difference.p_value == worse.corrected < 0.05


def test_all_seeds_of_a_row_are_one() -> None:
    before = [measured(losses(seed), seed=seed) for seed in range(3)]
    after = [measured(losses(seed + 9, 0.1), seed=seed) for seed in range(3)]
    change = only(became(before, after))
    assert change.outcome == "worsened"
    assert change.before is not None
    assert change.before.seeds == (0, 1, 2)
    assert change.before.value == pytest.approx(np.mean([math.exp(losses(seed).mean()) for seed in range(3)]))


def test_only_seeds_of_both_folders_are_compared() -> None:
    before = [measured(losses(seed), seed=seed) for seed in range(3)]
    after = [measured(losses(seed), seed=seed) for seed in (1, 2)] + [measured(losses(9), seed=9)]
    change = only(became(before, after))
    assert change.outcome == "the same"
    assert change.after is not None
    assert change.after.seeds == (1, 2)
    assert change.notes == ("seed 0 vanished", "seed 9 appeared")
    other = [measured(losses(9), seed=9)]
    assert only(became(before, other)).notes[0] == "no seed in common"


def test_where_only_the_revision_differs_rows_are_one_and_it_is_told() -> None:
    old, new = measured(losses(0)), measured(losses(0), spec=make_spec(revision=2))
    assert old.id != new.id
    change = only(became([old], [new]))
    assert (change.outcome, change.notes) == ("the same", ("wanda revision 1 → 2",))
    change = only(became([old], [measured(losses(1, 0.2)), new]))
    assert change.outcome == "the same", "of several revisions the highest counts"


def test_the_revision_of_an_evaluation_is_told() -> None:
    old = measured(losses(0))
    evals = tuple(one.model_copy(update={"revision": 2}) for one in old.spec.evals)
    new = measured(losses(1, 0.2), spec=old.spec.model_copy(update={"evals": evals}))
    for after in ([new], [new, old], [old, new]):
        change = only(became([old], after))
        assert (change.outcome, change.notes) == ("worsened", ("evaluation revision 1 → 2",))
    later = measured(losses(0), started="2026-02-02T00:00:00+00:00")
    assert only(became([old], [new, later])).outcome == "worsened", "the highest revision counts, whenever it was run"


@pytest.mark.parametrize(
    "spec",
    [
        make_spec("gblm"),
        make_spec("wanda[group=matrix]"),
        make_spec(target="2:4"),
        make_spec(conditions={**CONDITIONS, "window": 256}),
        make_spec(recipe=Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=64, length=512)),
        make_spec().model_copy(update={"model": make_spec().model.model_copy(update={"weights": "cccc000011112222"})}),
        make_spec().model_copy(update={"model": make_spec().model.model_copy(update={"dtype": "bfloat16"})}),
    ],
    ids=["method", "options", "target", "conditions", "recipe", "weights", "dtype"],
)
def test_other_content_is_another_row(spec: RunSpec) -> None:
    found = became([measured(losses(0))], [measured(losses(0), spec=spec)])
    assert outcomes(found) == {"vanished": 1, "appeared": 1}


def test_where_a_text_came_from_and_what_a_model_is_called_do_not_matter() -> None:
    spec = make_spec(model="small", conditions={**CONDITIONS, "origin": "mirror", "complete": False})
    assert only(became([measured(losses(0))], [measured(losses(0), spec=spec)])).notes == ("called tiny before",)


def test_rows_of_another_machine_are_matched_where_there_is_none_of_the_same() -> None:
    here, there = measured(losses(0), machine="box"), measured(losses(0), machine="theirs")
    assert only(became([here], [there])).notes == ("machine box → theirs",)
    other = measured(losses(5, 0.3), machine="another")
    found = became([here], [other, here, there])
    assert outcomes(found) == {"the same": 1, "appeared": 2}


def failed(record: RunRecord, status: str = "failed", **changes: Any) -> RunRecord:
    made = make_record(record.spec, status=status, reason="it broke", **changes)
    return made.model_copy(update={"scores": {}})


@pytest.mark.parametrize("status", ["failed", "refused"])
def test_a_run_that_is_lost_has_worsened(status: str) -> None:
    record = measured(losses(0))
    change = only(became([record], [failed(record, status)]))
    assert change.outcome == "worsened"
    assert status in change.notes[0]
    assert "it broke" in change.notes[0]
    assert only(became([failed(record, status)], [record])).outcome == "improved"
    assert outcomes(became([failed(record, status)], [failed(record, status)])) == {"no score": 1}


def test_a_seed_that_is_lost_has_worsened_though_the_others_stayed() -> None:
    records = [measured(losses(seed), seed=seed) for seed in range(2)]
    assert outcomes(became(records, [records[0], failed(records[1])])) == {"worsened": 1, "the same": 1}


def test_a_lost_run_with_many_scores_is_one_change() -> None:
    more = tuple(EvalSpec(text=f"other{i}", revision=1, conditions={**CONDITIONS, "window": i}) for i in range(3))
    record = make_record(make_spec(more_evals=more))
    change = only(became([record], [failed(record)]))
    assert change.scores == ("eval0", "eval1", "eval2", "eval3")
    assert outcomes(became([record], [])) == {"vanished": 1}


def test_a_failure_does_not_undo_what_another_run_of_the_row_measured() -> None:
    more = (EvalSpec(text="other", revision=1, conditions={**CONDITIONS, "window": 1}),)
    record, larger = measured(losses(0)), failed(measured(losses(0)).model_copy(update={"spec": make_spec(more_evals=more)}))
    assert outcomes(became([record], [record, larger])) == {"the same": 1, "appeared": 1}


def without_items(record: RunRecord) -> RunRecord:
    return scored(record, items={})


def longer() -> RunRecord:
    return measured(np.append(losses(0), 4.0))


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (without_items(measured(losses(0))), "after: no raw answers are kept"),
        (scored(measured(losses(0)), sample=None), "kind of answers is not the same"),
        (scored(measured(losses(0)), higher_is_better=True), "unit, direction"),
        (scored(measured(losses(0)), value=None), "without a mean"),
        (longer(), "other items"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_told_says_why_and_shows_both_values(after: RunRecord, reason: str) -> None:
    before = measured(losses(0))
    change = only(became([before], [after]))
    assert change.outcome == "cannot be told"
    assert reason in change.notes[0]
    assert change.before is not None
    assert change.before.value == before.scores["eval0"].value
    assert change.after is not None
    assert change.after.value == after.scores["eval0"].value


def test_few_items_tell_nothing() -> None:
    before, after = measured(losses(0)[:3]), measured(losses(1)[:3] + 1)
    assert only(became([before], [after])).notes == ("too few items to tell",)


def test_raw_answers_that_are_gone_are_told_of_the_side_that_lost_them() -> None:
    def gone(record: RunRecord, score: ScoreRecord) -> Columns:
        raise StoreError("the raw answers x.parquet cannot be read: gone.")

    record = measured(losses(0))
    change = only(changes(Folder([record], gone), Folder([record], own)))
    assert change.notes == ("before: the raw answers x.parquet cannot be read: gone",)


def test_costs_are_told_on_the_same_unshared_machine_only() -> None:
    def costing(seconds: float, peak: int, **changes: Any) -> RunRecord:
        return measured(losses(0), seconds=seconds, peak_host_bytes=peak, **changes)

    before = costing(2.0, 400)
    found = became([before], [costing(2.6, 600)])
    assert [(cost.cost, cost.grew) for cost in found.costs] == [("prune seconds", True), ("peak memory", True)]
    assert found.costs[0].factor == pytest.approx(1.3)
    assert (found.worsened(), found.worsened(with_costs=True)) == (False, True)
    less = became([costing(2.6, 600)], [before])
    assert [cost.grew for cost in less.costs] == [False, False]
    assert not less.worsened(with_costs=True)
    assert became([before], [costing(2.4, 450)]).costs == ()
    assert became([before], [costing(2.6, 600, shared_machine=True)]).costs == ()
    assert became([before], [costing(2.6, 600, machine="another")]).costs == ()
    assert became([costing(0.001, 400)], [costing(0.09, 400)]).costs == ()


def test_the_order_of_records_changes_nothing() -> None:
    before = [measured(losses([0, row]), method) for row, method in enumerate(METHODS)]
    after = [measured(losses([1, row], 0.1 * row), method) for row, method in enumerate(METHODS)]
    found = became(before, after)
    assert found == became(before[::-1], after[::-1])
    order = [OUTCOMES.index(change.outcome) for change in found.rows]
    assert order == sorted(order)


def test_everything_is_plain_json() -> None:
    before = [measured(losses(0)), measured(losses(1), "gblm"), failed(measured(losses(2), "magnitude"))]
    after = [measured(losses(3, 0.1)), longer(), measured(losses(4), "sparsegpt")]
    found = became(before, after)
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert told["counts"] == dict(found.counts)
    assert [row["outcome"] for row in told["rows"]] == [change.outcome for change in found.rows]


@pytest.fixture
def folders(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Two results folders with these records."""

    def write(before: Sequence[RunRecord], after: Sequence[RunRecord]) -> tuple[Path, Path]:
        for name, records in (("before", before), ("after", after)):
            (tmp_path / name).mkdir(exist_ok=True)
            store = ResultStore(tmp_path / name, pytest.fail)
            for record in records:
                store.write(record)
        return tmp_path / "before", tmp_path / "after"

    return write


def test_the_command_guards(folders: Callable[..., tuple[Path, Path]], command: Callable[..., Ran]) -> None:
    before, after = folders(
        [measured(losses(0)), measured(losses(1), "gblm", seconds=2.0), measured(losses(2), "magnitude")],
        [measured(losses(3, 0.1)), measured(losses(1), "gblm", seconds=9.0), measured(losses(2), "sparsegpt")],
    )
    ran = command("compare", before, after)
    assert (ran.code, ran.err) == (1, "")
    text = " ".join(ran.out.split())
    assert "3 runs before, 3 after" in text
    assert "1 worsened, 0 improved, 1 the same, 1 vanished, 1 appeared" in text
    order = [text.index(word) for word in ("1 worsened", "wanda", "magnitude", "sparsegpt", "slower or larger")]
    assert order == sorted(order)
    assert command("compare", after, after).code == 0
    ran = command("compare", before, after, "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["counts"]["worsened"] == 1


def test_costs_count_when_asked(folders: Callable[..., tuple[Path, Path]], command: Callable[..., Ran]) -> None:
    before, after = folders([measured(losses(0), seconds=2.0)], [measured(losses(0), seconds=3.0)])
    ran = command("compare", before, after)
    assert (ran.code, "slower or larger" in ran.out, "counted as worsened" in ran.out) == (0, True, False)
    ran = command("compare", before, after, "--costs")
    assert (ran.code, "counted as worsened" in ran.out) == (1, True)
    assert command("compare", after, before, "--costs").code == 0


def test_wrong_requests_are_one_sentence(
    folders: Callable[..., tuple[Path, Path]], command: Callable[..., Ran], tmp_path: Path
) -> None:
    before, after = folders([measured(losses(0))], [measured(losses(0), "gblm")])
    (tmp_path / "empty").mkdir()
    record = measured(losses(0))
    assert "is no folder" in command("compare", before, record.id, "--results", before).complaint
    assert "is no folder" in command("compare", "nowhere", after).complaint
    assert "holds no records" in command("compare", before, tmp_path / "empty").complaint
    assert "no row in common" in command("compare", before, after).complaint
    assert "are for two folders" in command("compare", record.id, "ffff", "--costs", "--results", before).complaint


def test_names_of_strangers_are_escaped(folders: Callable[..., tuple[Path, Path]], command: Callable[..., Ran]) -> None:
    hostile = "[red]x[/red]\x1b[31m\u202e"
    before, after = folders(
        [measured(losses(0), spec=make_spec(model=hostile)), measured(losses(0), "gblm")],
        [
            failed(measured(losses(0), spec=make_spec(model=hostile))).model_copy(update={"reason": hostile}),
            measured(losses(0), "gblm"),
        ],
    )
    out = command("compare", before, after).out
    assert "[red]" in out.replace("\n", "")
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_long_lists_are_cut_and_counted(folders: Callable[..., tuple[Path, Path]], command: Callable[..., Ran]) -> None:
    many = [measured(losses(0), spec=make_spec(f"wanda[power={row}]")) for row in range(30)]
    ran = command("compare", *folders([measured(losses(0))], [measured(losses(0)), *many]))
    assert ran.code == 0
    assert "30 appeared" in ran.out
    assert "and 5 more" in ran.out


def test_a_score_that_one_side_lacks_is_never_passed_over() -> None:
    """A run may be `ok` without a score that it was asked for, and seeds may have changed."""
    whole, bare = measured(losses(0)), measured(losses(0)).model_copy(update={"scores": {}})
    assert outcomes(became([whole], [bare])) == {"vanished": 1}
    assert outcomes(became([bare], [whole])) == {"appeared": 1}
    other = failed(measured(losses(0), seed=5))
    change = only(became([whole], [other]))
    assert (change.outcome, change.notes) == ("vanished", ("failed (error): it broke",))


def test_rows_that_read_alike_are_told_apart() -> None:
    recipe = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=64, length=512)
    records = [measured(losses(0)), measured(losses(0), spec=make_spec(recipe=recipe)), measured(losses(0), "gblm")]
    notes = {change.label.recipe: change.apart for change in became(records, records).rows if change.label.method == "wanda"}
    assert notes == {key: (f"recipe {key}",) for key in notes}
    assert len(notes) == 2
    [gblm] = [change for change in became(records, records).rows if change.label.method == "gblm"]
    assert gblm.apart == ()


def test_what_is_certain_and_small_counts_only_from_what_was_asked_on() -> None:
    before, after = [measured(losses(0, noise=0.0))], [measured(losses(1, 0.002, noise=0.0001))]
    assert outcomes(became(before, after)) == {"worsened": 1}
    found = changes(Folder(before, own), Folder(after, own), least=0.3)
    assert (only(found).outcome, only(found).notes) == ("within noise", ("beyond noise, and below 0.3",))
    assert outcomes(changes(Folder(before, own), Folder(after, own), least=0.19)) == {"worsened": 1}, "0.2% of a perplexity"
    twice = [measured(losses(2, math.log(2), noise=0.0001))]
    assert outcomes(changes(Folder(twice, own), Folder(before, own), least=49)) == {"improved": 1}, "half of what it was"
    assert outcomes(changes(Folder(twice, own), Folder(before, own), least=51)) == {"within noise": 1}
    few, many = [answered([1] * 60 + [0] * 140)], [answered([1] * 120 + [0] * 80)]
    assert outcomes(changes(Folder(many, own), Folder(few, own), least=29.9)) == {"worsened": 1}, "30 points"
    assert outcomes(changes(Folder(many, own), Folder(few, own), least=30.1)) == {"within noise": 1}

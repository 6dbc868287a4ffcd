"""`prunebench explain` and `compare`: why two scores may not stand together, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import C4_TEXT, Ran, make_record, make_spec

from prunebench.results.contest import contests, row_of
from prunebench.results.explain import explain
from prunebench.results.records import Recipe, RunRecord, RunSpec, SampleRecord
from prunebench.results.store import ResultStore

C4 = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=512)


def with_conditions(spec: RunSpec, **changes: Any) -> RunSpec:
    evals = tuple(one.model_copy(update={"conditions": {**one.conditions, **changes}}) for one in spec.evals)
    return spec.model_copy(update={"evals": evals})


def points(first: RunRecord, second: RunRecord) -> dict[str, bool]:
    """The fields that differ, and whether that keeps the two apart."""
    [found] = explain(first, second)
    assert found.comparable == all(point.consequence is None for point in found.points)
    return {point.field: point.consequence is not None for point in found.points}


def test_nothing_keeps_a_run_apart_from_itself() -> None:
    assert points(make_record(), make_record()) == {}


@pytest.mark.parametrize(
    ("changed", "field", "apart"),
    [
        (with_conditions(make_spec(), window=256), "conditions.window", True),
        (with_conditions(make_spec(), dtype="bfloat16"), "conditions.dtype", True),
        (with_conditions(make_spec(), new_field=1), "conditions.new_field", True),
        (with_conditions(make_spec(), origin="mirror"), "conditions.origin", False),
        (make_spec("magnitude"), "method", False),
        (make_spec(seed=5), "seed", False),
        (make_spec(target="2:4"), "target", True),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_field_that_differs_is_named_with_its_consequence(changed: RunSpec, field: str, apart: bool) -> None:
    assert points(make_record(), make_record(changed)) == {field: apart}
    assert points(make_record(changed), make_record()) == {field: apart}


def test_nested_conditions_are_told_by_their_path() -> None:
    first, second = (
        make_record(with_conditions(make_spec(), tasks={"boolq": {"version": version, "items": 5}})) for version in ("1", "2")
    )
    assert points(first, second) == {"conditions.tasks.boolq.version": True}


def test_lists_of_parts_are_told_by_their_parts() -> None:
    def asked(**changes: str) -> RunRecord:
        return make_record(with_conditions(make_spec(), tasks=[{"task": "lambada", "origin": "hub", "hash": "a", **changes}]))

    assert points(asked(), asked(hash="b")) == {"conditions.tasks.0.hash": True}
    assert points(asked(), asked(origin="mirror")) == {"conditions.tasks.0.origin": False}


def test_calibration_training_machine_and_revision_count() -> None:
    plain = make_record(make_spec(recipe=C4))
    longer = make_record(make_spec(recipe=C4.model_copy(update={"length": 256})))
    trained = make_record(make_spec(recipe=C4.model_copy(update={"training": C4_TEXT, "training_tokens": 4096})))
    assert points(plain, longer) == {"recipe.length": True}
    assert points(plain, trained) == {"training": True}
    assert points(plain, plain.model_copy(update={"machine": "another"})) == {"machine": True}
    spec = make_spec(recipe=C4)
    changed = spec.model_copy(update={"evals": tuple(one.model_copy(update={"revision": 2}) for one in spec.evals)})
    assert points(plain, make_record(changed)) == {"revision": True}


def test_a_method_without_data_matches_any_calibration() -> None:
    data_free = make_record(make_spec("magnitude", seed=None, recipe=Recipe()))
    assert points(make_record(make_spec(recipe=C4)), data_free) == {"method": False, "seed": False}


def test_scores_are_paired_with_the_nearest_of_their_evaluation() -> None:
    one, two = (with_conditions(make_spec(), window=window).evals[0] for window in (256, 512))
    both = make_record(make_spec().model_copy(update={"evals": (one, two)}))
    assert [(found.first, found.second, found.points) for found in explain(both, both)] == [
        ("eval0", "eval0", ()),
        ("eval1", "eval1", ()),
    ]


def measured(method: str, seed: int | None, above: float) -> RunRecord:
    made = make_record(make_spec(method, "0.5", seed))
    nll = np.random.default_rng(1).normal(4, 0.5, 40) + above
    nll += np.random.default_rng(7 if seed is None else seed).normal(0, 0.01, 40)
    [(name, score)] = made.scores.items()
    items = {"nll": nll.tolist(), "document": [index // 2 for index in range(40)]}
    sample = SampleRecord(column="nll", exponential=True, documents="document")
    changes = {"items": items, "sample": sample, "value": math.exp(nll.mean())}
    return made.model_copy(update={"scores": {name: score.model_copy(update=changes)}})


def test_all_seeds_of_a_row_are_compared() -> None:
    records = [measured("wanda", seed, 0.2) for seed in (2, 0, 1)] + [measured("magnitude", None, 0.1)]
    assert [record.spec.seed for record in row_of(records[0], records)] == [0, 1, 2]
    [found] = contests(row_of(records[1], records), row_of(records[3], records), lambda _, score: score.items)
    assert (len(found.first), len(found.second)) == (3, 1)
    assert found.comparison is not None
    assert found.comparison.new_items.estimate == pytest.approx(0.1, abs=0.01)
    assert found.corrected == found.comparison.new_items.p_value < 0.001


def test_a_run_that_measured_less_hides_nothing_of_its_row() -> None:
    whole = measured("magnitude", None, 0.1)
    [(name, score)] = whole.scores.items()
    conditions = {**score.conditions, "window": 256}
    evals = tuple(spec.model_copy(update={"conditions": conditions}) for spec in whole.spec.evals)
    spec = whole.spec.model_copy(update={"evals": evals})
    scores = {name: score.model_copy(update={"conditions": conditions})}
    other = whole.model_copy(update={"spec": spec, "id": spec.id, "scores": scores})
    for records in ([whole, other], [other, whole]):
        rows = [row_of(whole, records), [measured("wanda", 0, 0.2)]]
        assert len(rows[0]) == 2
        [found] = contests(rows[0], rows[1], lambda _, score: score.items)
        assert found.score.conditions == score.conditions


def test_a_score_that_some_seeds_have_is_compared_for_those() -> None:
    rows = [[measured(method, seed, above) for seed in range(3)] for method, above in (("wanda", 0.2), ("gblm", 0.1))]
    rows[0][1:] = [record.model_copy(update={"scores": {}}) for record in rows[0][1:]]
    [found] = contests(rows[0], rows[1], lambda _, score: score.items)
    assert found.comparison is not None
    assert found.comparison.seeds == (0,)


def test_the_commands(tmp_path: Path, command: Callable[..., Ran]) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    records = [measured("wanda", seed, 0.2) for seed in range(3)] + [measured("magnitude", None, 0.1)]
    for record in records:
        store.write(record)
    failed = make_record(make_spec("gblm"), status="failed")
    store.write(failed)
    wanda, magnitude = records[0].id, records[3].id
    ran = command("compare", wanda, magnitude, "--results", tmp_path)
    assert ran.code == 0
    for text in ("A - B %", "+10.", "seeds 0, 1, 2", "after Holm over 1 scores", "fewer than 5 seeds", "could show"):
        assert text in ran.out
    ran = command("explain", wanda, magnitude, "--results", tmp_path)
    assert ran.code == 0
    assert "may be ranked together" in ran.out
    for arguments, said in (
        (("compare", "zzz", magnitude), "no runs in"),
        (("compare", "", magnitude), "5 runs in"),
        (("explain", failed.id, magnitude), "has no scores: it is failed"),
    ):
        ran = command(*arguments, "--results", tmp_path)
        assert (ran.code, said in ran.err) == (2, True)


def test_runs_of_two_machines_are_told_apart_and_those_of_one_row_not_compared(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    here = [measured("wanda", seed, 0.2) for seed in range(2)]
    there = here[0].model_copy(update={"machine": "another"})
    for record in (*here, there):
        store.write(record)
    ran = command("explain", here[0].id, here[1].id, "--results", tmp_path)
    assert (ran.code, f"another/{there.id}" in ran.err) == (2, True)
    ran = command("explain", f"{here[0].machine}/{here[0].id}", f"another/{there.id}", "--results", tmp_path)
    assert (ran.code, "one machine's costs" in " ".join(ran.out.split())) == (0, True)
    ran = command("compare", f"{here[0].machine}/{here[0].id}", here[1].id, "--results", tmp_path)
    assert (ran.code, "of one row" in ran.err) == (2, True)


def test_a_report_of_no_section_says_so(tmp_path: Path, command: Callable[..., Ran]) -> None:
    ResultStore(tmp_path, pytest.fail).write(make_record())
    ran = command("report", "--only", "nothing", "--out", tmp_path / "page.md", "--results", tmp_path)
    assert (ran.code, "no section's title contains 'nothing'" in ran.err) == (2, True)
    assert not (tmp_path / "page.md").exists()


def test_rows_without_a_common_score_are_refused(tmp_path: Path, command: Callable[..., Ran]) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    first, second = make_record(), make_record(with_conditions(make_spec("magnitude"), window=256))
    for record in (first, second):
        store.write(record)
    ran = command("compare", first.id, second.id, "--results", tmp_path)
    assert ran.code == 2
    assert f"see `prunebench explain {first.id} {second.id}`" in " ".join(ran.err.split())

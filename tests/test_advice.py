"""`prunebench advise`: who is beaten by whom, what limits rule out, what is no evidence, and what is an extrapolation."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import CONDITIONS, Bench, Ran, make_record, make_spec

from prunebench.results.advice import Advice, Question, advise, tally, to_json
from prunebench.results.dominance import SHARED, UNRANKED, Limits, weigh
from prunebench.results.ranks import RankInterval
from prunebench.results.records import Recipe, RunRecord, RunSpec, SampleRecord
from prunebench.results.rows import Row
from prunebench.results.store import ResultStore, Stored
from prunebench.toolkit.loading import identify, resolve_model

WINDOWS = 60


def row(
    method: str,
    mean: float,
    rank: tuple[int, int] | None = (1, 1),
    seconds: float = 10.0,
    peak: int | None = 1000,
    shared: bool = False,
) -> Row:
    """A row of a table."""
    return Row(
        method=method,
        values=(mean,),
        seeds=(0,),
        parts={},
        dense=None,
        control=None,
        tuned=None,
        extra_parameters=0,
        prune_seconds=seconds,
        peak_bytes=peak,
        sparsity_prunable=0.5,
        sparsity_total=0.4,
        coverage=1.0,
        shared_machine=shared,
        ids=(method,),
        rank=None if rank is None else RankInterval(*rank),
    )


def verdicts(rows: Sequence[Row], higher_is_better: bool = False, limits: Limits = Limits()) -> dict[str, str]:
    return {choice.row.method: choice.verdict for choice in weigh(rows, higher_is_better, limits, trained=False)}


def slow(first: Row, second: Row, sign: int) -> bool:
    """The rule again, for whole seconds of at least one and unshared machines: sign is 1 where more is better."""
    assert first.rank is not None
    assert second.rank is not None
    assert first.peak_bytes is not None
    assert second.peak_bytes is not None
    if sign * first.mean < sign * second.mean:
        return False
    times = [first.prune_seconds / second.prune_seconds, first.peak_bytes / second.peak_bytes]
    if max(times) > 1.25:
        return False
    certain = all(mine < theirs for mine in _ranks(first) for theirs in _ranks(second))
    return certain or any(1 / time > 1.25 for time in times)


def _ranks(found: Row) -> range:
    assert found.rank is not None
    return range(found.rank.first, found.rank.last + 1)


@pytest.mark.parametrize("higher", [False, True])
def test_who_is_left_is_who_is_beaten_by_nobody(higher: bool) -> None:
    generator = np.random.default_rng(3)
    sign, seen = 1 if higher else -1, {"choose": 0, "beaten": 0}
    for _ in range(300):
        rows = []
        for index in range(int(generator.integers(1, 7))):
            first = int(generator.integers(1, 5))
            ranks = (first, first + int(generator.integers(0, 3)))
            costs = generator.integers(1, 9, 2)
            rows.append(row(f"m{index}", float(generator.integers(1, 6)), ranks, float(costs[0]), int(costs[1])))
        found = weigh(rows, higher, Limits(), trained=False)
        assert {choice.row.method for choice in found} == {one.method for one in rows}
        for choice in found:
            winners = {other.method for other in rows if other is not choice.row and slow(other, choice.row, sign)}
            assert set(choice.reasons) == winners
            assert choice.verdict == ("beaten" if winners else "choose")
            seen[choice.verdict] += 1
        best = max(rows, key=lambda one: sign * one.mean)
        if [one.mean for one in rows].count(best.mean) == 1:
            assert verdicts(rows, higher)[best.method] == "choose"
    assert min(seen.values()) > 100


def test_better_and_no_dearer_beats() -> None:
    better, worse = row("better", 10, (1, 1), 12.0), row("worse", 12, (2, 2), 10.0)
    assert verdicts([better, worse]) == {"better": "choose", "worse": "beaten"}
    assert verdicts([replace(better, prune_seconds=13.0), worse]) == {"better": "choose", "worse": "choose"}
    assert verdicts([replace(better, peak_bytes=1300), worse]) == {"better": "choose", "worse": "choose"}
    alike = [replace(better, rank=RankInterval(1, 2)), replace(worse, rank=RankInterval(1, 2))]
    assert verdicts(alike) == {"better": "choose", "worse": "choose"}, "neither is significantly better, nor cheaper"


def test_as_good_and_cheaper_beats_and_worse_and_cheaper_does_not() -> None:
    cheap, dear = row("cheap", 10, (1, 2), 1.0), row("dear", 10.5, (1, 2), 10.0)
    assert verdicts([cheap, dear]) == {"cheap": "choose", "dear": "beaten"}
    assert verdicts([replace(cheap, values=(11.0,)), dear]) == {"cheap": "choose", "dear": "choose"}
    assert verdicts([replace(cheap, values=(11.0,)), dear], higher_is_better=True) == {"cheap": "choose", "dear": "beaten"}


def test_no_time_at_all_is_not_cheaper_than_hardly_any() -> None:
    assert verdicts([row("a", 10, (1, 2), 0.01), row("b", 11, (1, 2), 0.09)]) == {"a": "choose", "b": "choose"}
    assert verdicts([row("a", 10, (1, 1), 0.09), row("b", 11, (2, 2), 0.01)]) == {"a": "choose", "b": "beaten"}


def test_what_a_shared_machine_may_have_added_beats_nobody() -> None:
    better, starred = row("better", 10, (1, 1), 5.0), row("starred", 12, (2, 2), 10.0, shared=True)
    [_, found] = weigh([better, starred], False, Limits(), trained=False)
    assert (found.verdict, found.reasons) == ("open", (SHARED,))
    assert verdicts([replace(better, prune_seconds=1.0), starred])["starred"] == "beaten", "a tenth is less than an eighth"
    assert verdicts([replace(better, prune_seconds=50.0), starred])["starred"] == "choose", "it is cheaper as it is"
    assert verdicts([starred, replace(better, values=(13.0,), rank=RankInterval(3, 3))])["starred"] == "choose"
    assert (
        verdicts(
            [
                replace(starred, values=(9.0,), rank=RankInterval(1, 1)),
                replace(better, rank=RankInterval(2, 2), prune_seconds=20.0),
            ]
        )["better"]
        == "beaten"
    ), "sharing only adds"


def test_who_has_no_rank_is_open_and_beats_nobody() -> None:
    found = weigh([row("a", 10, None, 1.0), row("b", 12, (1, 1), 10.0)], False, Limits(), trained=False)
    assert [(choice.row.method, choice.verdict, choice.reasons) for choice in found] == [
        ("b", "choose", ()),
        ("a", "open", (UNRANKED,)),
    ]
    assert verdicts([row("a", 10, None)]) == {"a": "choose"}, "nobody is there to compare it with"


def test_unknown_memory_is_neither_more_nor_less() -> None:
    known, unknown = row("a", 10, (1, 1), peak=1000), row("b", 12, (2, 2), peak=None)
    assert verdicts([known, unknown]) == {"a": "choose", "b": "choose"}
    assert verdicts([replace(known, peak_bytes=None), unknown]) == {"a": "choose", "b": "beaten"}


def test_limits_come_first() -> None:
    rows = [row("best", 10, (1, 1), 10.0, 900), row("quick", 12, (2, 2), 9.0, 1000), row("none", 13, (3, 3), 1.0, None)]
    assert verdicts(rows)["quick"] == "beaten"
    found = {choice.row.method: choice for choice in weigh(rows, False, Limits(max_seconds=9.5, max_bytes=1 << 30), False)}
    assert {name: choice.verdict for name, choice in found.items()} == {
        "best": "ruled out",
        "quick": "choose",
        "none": "ruled out",
    }
    assert found["best"].reasons == ("10 s, more than 9.5 s",)
    assert found["none"].reasons == ("its peak memory is not known",)
    assert verdicts(rows, limits=Limits(max_seconds=10.0, max_bytes=900))["best"] == "choose", "as much as the limit is allowed"
    [starred] = weigh([row("a", 1, shared=True, peak=3 << 30)], False, Limits(9.0, 2 << 30), trained=False)
    assert starred.reasons == ("10 s, on a shared machine, more than 9 s", "3 GiB, more than 2 GiB")
    [trained] = weigh([row("a", 1)], False, Limits(no_training=True), trained=True)
    assert (trained.verdict, trained.reasons) == ("ruled out", ("retrained on text",))


# Records


def measured(method: str, above: float, seconds: float = 2.0, spec: RunSpec | None = None, **changes: Any) -> RunRecord:
    """A run whose windows are `above` those of a common text."""
    seed = None if method in ("dense", "magnitude") else 0
    target = "dense" if method == "dense" else "0.5"
    made = make_record(spec or make_spec(method, target, seed), seconds=seconds, **changes)
    noise = np.random.default_rng([len(method), round(1000 * above)]).normal(0, 0.01, WINDOWS)
    nll = np.random.default_rng(7).normal(4, 0.5, WINDOWS) + above + noise
    items = {"nll": nll.tolist(), "document": [index // 3 for index in range(WINDOWS)]}
    sample = SampleRecord(column="nll", exponential=True, documents="document")
    changed = {"items": items, "sample": sample, "value": math.exp(nll.mean())}
    return made.model_copy(update={"scores": {name: s.model_copy(update=changed) for name, s in made.scores.items()}})


def table() -> list[RunRecord]:
    """Wanda is the best and dear, magnitude worse and cheap, gblm worse than both and dear."""
    return [
        measured("dense", 0.0, 0.0),
        measured("wanda", 0.2, 8.0),
        measured("magnitude", 0.4, 1.0),
        measured("gblm", 0.6, 9.0),
    ]


def asked(records: Sequence[RunRecord], question: Question = Question("tiny", "0.5"), **revisions: int) -> Advice:
    stored = [Stored(f"{record.machine}/tiny/{index}.json", record) for index, record in enumerate(records)]
    return advise(question, stored, revisions, lambda _, score: score.items)


def chosen(advice: Advice) -> dict[str, str]:
    [evidence] = advice.evidence
    return {choice.row.method: choice.verdict for choice in evidence.choices}


def test_the_records_answer() -> None:
    found = asked(table())
    assert chosen(found) == {"wanda": "choose", "magnitude": "choose", "gblm": "beaten"}
    [evidence] = found.evidence
    assert evidence.choices[2].reasons == ("wanda", "magnitude")
    assert evidence.parameters == 132, "33 zeros are a quarter of all"
    assert found.elsewhere == ()
    assert chosen(asked(table(), Question("tiny", "0.50"))) == chosen(found)
    assert found.missing(["wanda", "sparsegpt"]) == ["sparsegpt"]


def test_each_set_of_conditions_is_weighed_alone() -> None:
    other = {**CONDITIONS, "window": 256}
    more = [
        measured("wanda", 0.9, 8.0, make_spec("wanda", "0.5", 0, conditions=other)),
        measured("magnitude", 0.1, 1.0, make_spec("magnitude", "0.5", None, conditions=other)),
    ]
    found = asked([*table(), *more])
    assert len(found.evidence) == 2
    assert [(one.method, one.counts["choose"], one.measured) for one in tally(found.evidence)] == [
        ("magnitude", 2, 2),
        ("wanda", 1, 2),
        ("gblm", 0, 1),
    ], "each is the first in one; then by name"


def test_what_was_retrained_is_weighed_apart_and_can_be_ruled_out() -> None:
    training = make_record(make_spec()).spec.recipe.calibration
    spec = make_spec("wanda + perp", "0.5", 0, recipe=Recipe(training=training, training_tokens=1000))
    records = [*table(), measured("wanda + perp", 0.05, 100.0, spec)]
    plain, trained = asked(records).evidence
    assert [choice.verdict for choice in trained.choices] == ["choose"]
    assert len(plain.choices) == 3
    [_, ruled] = asked(records, Question("tiny", "0.5", limits=Limits(no_training=True))).evidence
    assert [choice.verdict for choice in ruled.choices] == ["ruled out"]


def test_a_model_is_known_by_name_source_or_weights() -> None:
    records = table()
    hub = [
        made.model_copy(update={"spec": made.spec.model_copy(update={"model": model})})
        for made in records
        for model in [made.spec.model.model_copy(update={"source": "org/tiny@abc", "name": "tiny-1"})]
    ]
    for question in (Question("tiny-1", "0.5"), Question("org/tiny", "0.5"), Question("org/tiny@abc", "0.5")):
        assert asked(hub, question).evidence
    assert asked(records, Question("any", "0.5", weights="aaaa000011112222")).evidence
    assert not asked(records, Question("tiny", "0.5", weights="other")).evidence, "a name does not stand for other weights"
    assert not asked(records, Question("org/tiny", "0.5")).evidence


def test_where_there_is_no_evidence_it_says_so_and_what_is_near() -> None:
    records = table()
    found = asked(records, Question("large", "0.5"))
    assert (found.evidence, found.models) == ((), ("tiny",))
    assert [(one.kind, one.what) for one in found.elsewhere] == [("another model", "tiny")]
    found = asked(records, Question("tiny", "0.6"))
    assert [(one.kind, one.what) for one in found.elsewhere] == [("another target", "0.5")]
    found = asked(records, Question("tiny", "0.5", machine="mine"))
    assert [(one.kind, one.what) for one in found.elsewhere] == [("another machine", "box")]
    assert asked(records, Question("large", "0.6")).elsewhere == ()
    assert asked([]).elsewhere == ()


def test_the_nearest_target_comes_first() -> None:
    more = [measured("wanda", 0.3, spec=make_spec("wanda", target, 0)) for target in ("0.7", "2:4", "0.4")]
    found = asked([*table(), *more], Question("tiny", "0.65"))
    assert [one.what for one in found.elsewhere] == ["0.7", "0.5", "0.4", "2:4"]


def test_runs_without_a_score_are_told_and_outdated_ones_counted() -> None:
    failed = make_record(make_spec("sparsegpt", "0.5", 0), status="failed", reason="it broke")
    refused = make_record(make_spec("ria", "0.5", 0), status="refused", reason="no")
    elsewhere = make_record(make_spec("ria", "0.6", 0), status="refused", reason="no")
    found = asked([*table(), failed, refused, elsewhere], gblm=2)
    assert {record.spec.method for record in found.without} == {"sparsegpt", "ria"}
    assert found.outdated == 1
    assert "gblm" not in chosen(found)
    assert found.missing(["sparsegpt", "gblm"]) == ["gblm"]


def test_a_suite_by_which_options_were_chosen_is_no_evidence() -> None:
    """Also where those who were tuned were measured at another target."""
    validation = {**CONDITIONS, "split": "validation"}
    means = [
        measured(method, above, spec=make_spec(method, "0.5", 0, conditions=validation), suite="tuning")
        for method, above in (("gblm", 0.1), ("wanda", 0.2))
    ]
    elsewhere = measured("wanda", 0.3, spec=make_spec("wanda", "0.6", 0))
    tuned = elsewhere.model_copy(update={"provenance": elsewhere.provenance.model_copy(update={"tuned": "tuning"})})
    assert len(asked([*table(), *means, elsewhere]).evidence) == 2
    [evidence] = asked([*table(), *means, tuned]).evidence
    assert evidence.section.conditions["split"] == "test"


def test_nothing_is_said_of_what_the_dense_model_cannot_do() -> None:
    def share(made: RunRecord) -> RunRecord:
        conditions = {**CONDITIONS, "least_of_dense": 1e9}
        evals = tuple(one.model_copy(update={"conditions": conditions}) for one in made.spec.evals)
        spec = made.spec.model_copy(update={"evals": evals})
        scores = {name: score.model_copy(update={"conditions": conditions}) for name, score in made.scores.items()}
        return made.model_copy(update={"spec": spec, "id": spec.id, "scores": scores})

    assert asked([share(made) for made in table()]).evidence == ()


def test_the_order_of_records_changes_nothing() -> None:
    assert to_json(asked(table()), []) == to_json(asked(table()[::-1]), [])


# The command


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the table."""
    store = ResultStore(tmp_path / "results", pytest.fail)
    for made in table():
        store.write(made)
    return tmp_path / "results"


def test_the_command_answers(results: Path, command: Callable[..., Ran]) -> None:
    ran = command("advise", "--model", "tiny", "--target", "0.5", "--results", results)
    assert (ran.code, ran.err) == (0, "")
    text = " ".join(ran.out.split())
    for said in ("tiny at 50% unstructured: 1 table of evidence", "wanda 1 of 1 1", "beaten by wanda, magnitude", "prune s"):
        assert said in text
    commands = [line.strip() for line in ran.out.splitlines() if line.strip().startswith("prunebench run")]
    assert "prunebench run standard-1 --model tiny --method sparsegpt --dry-run" in commands
    assert not any("wanda " in line for line in commands)


def test_the_command_keeps_limits(results: Path, command: Callable[..., Ran]) -> None:
    limits = ("--max-seconds", "5", "--max-memory", "4", "--no-training")
    text = " ".join(command("advise", "--model", "tiny", "--target", "0.5", *limits, "--results", results).out.split())
    assert "ruled out: 8 s, more than 5 s" in text
    told = json.loads(command("advise", "--model", "tiny", "--target", "0.5", *limits, "--results", results, "--json").out)
    rows = {one["method"]: one["verdict"] for one in told["evidence"][0]["rows"]}
    assert rows == {"magnitude": "choose", "wanda": "ruled out", "gblm": "ruled out"}
    assert (told["max_seconds"], told["no_training"]) == (5, True)
    assert "sparsegpt" in told["no_evidence"]


def test_no_evidence_is_an_answer(results: Path, command: Callable[..., Ran]) -> None:
    ran = command("advise", "--model", "tiyn", "--target", "0.5", "--results", results)
    text = " ".join(ran.out.split())
    assert ran.code == 0
    for said in ("tiyn at 50% unstructured: no evidence", "did you mean 'tiny'", "Extrapolated, from another model: tiny"):
        assert said in text
    assert "--model tiyn --method wanda --dry-run" in text
    ran = command("advise", "--model", "tiny", "--target", "1:16", "--results", results)
    assert ran.code == 0
    assert 'targets = ["1:16"]' in ran.out
    ran = command("advise", "--model", "tiny", "--target", "0.5", "--machine", "mine", "--results", results)
    assert "tiny at 50% unstructured on mine: no evidence" in ran.out
    told = json.loads(command("advise", "--model", "x", "--target", "0.5", "--results", results, "--json").out)
    assert (told["evidence"], told["elsewhere"][0]["extrapolated_from"]) == ([], "another model")


def test_a_folder_is_known_by_its_weights(bench: Bench, results: Path, command: Callable[..., Ran]) -> None:
    weights = identify(resolve_model(str(bench.model), [Path()])).weights
    assert "no evidence" in command("advise", "--model", bench.model, "--target", "0.5", "--results", results).out
    store = ResultStore(results, pytest.fail)
    for made in table():
        model = made.spec.model.model_copy(update={"weights": weights, "name": "another"})
        spec = made.spec.model_copy(update={"model": model})
        store.write(made.model_copy(update={"spec": spec, "id": spec.id}))
    out = command("advise", "--model", bench.model, "--target", "0.5", "--results", results).out
    assert "1 table of evidence" in out
    assert f"weights {weights[:8]}" in out


def test_wrong_requests_are_one_sentence(results: Path, command: Callable[..., Ran], tmp_path: Path) -> None:
    assert "is not one" in command("advise", "--model", "tiny", "--target", "half", "--results", results).complaint
    assert "prunes nothing" in command("advise", "--model", "tiny", "--target", "dense", "--results", results).complaint
    assert (
        "there is no folder" in command("advise", "--model", "tiny", "--target", "0.5", "--results", tmp_path / "x").complaint
    )


def test_names_of_strangers_are_escaped(tmp_path: Path, command: Callable[..., Ran]) -> None:
    hostile = "[red]x[/red]\x1b[31m\u202e; rm -rf ."
    store = ResultStore(tmp_path, pytest.fail)
    for made in table():
        spec = made.spec.model_copy(update={"model": made.spec.model.model_copy(update={"name": hostile})})
        store.write(made.model_copy(update={"spec": spec, "id": spec.id, "machine": hostile}))
    for name in (hostile, "unknown"):
        out = command("advise", "--model", name, "--target", "0.5", "--results", tmp_path).out
        assert "[red]x" in out.replace("\n", "")
        assert "\x1b" not in out
        assert "\u202e" not in out
    out = command("advise", "--model", hostile, "--target", "0.5", "--results", tmp_path).out
    [line] = [line for line in out.splitlines() if "--method sparsegpt" in line]
    assert shlex.split(line)[3] == "--model"
    assert shlex.split(line)[5] == "--method", "the name stays one word"

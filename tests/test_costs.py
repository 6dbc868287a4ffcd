"""What runs will take: the formula, the rates, what records make of both, and the total of what has been run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import FAMILIES, Bench, cases, make_record, make_spec, tiny

from prunebench.bench import estimate, rates
from prunebench.bench.costs import Work, effort_seconds, eval_bytes, eval_effort, start_seconds, step_bytes, step_seconds
from prunebench.bench.estimate import known_work, with_predictions
from prunebench.bench.experience import Experience, Part, Past, parts, past_of, shape_in, works_of
from prunebench.bench.plan import Planner
from prunebench.bench.rates import Rates, rates_of
from prunebench.bench.runner import run
from prunebench.bench.suite import load_suite
from prunebench.effort import Effort, EffortFacts
from prunebench.errors import PluginError
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore
from prunebench.shipped import suites_folder
from prunebench.spec import Job, Needs, Pruner
from prunebench.toolkit.loading import ModelSource, shape_of
from prunebench.toolkit.model_shape import ModelShape

ROOT = Path(__file__).parents[1]
PLAIN = Rates(products=1e9, attention=1e8, moved=1e7, factored=1e6, launch=1e-4)
SHAPE = ModelShape(
    parameters=2600,
    multiplied=2600,
    layers=2,
    hidden=10,
    vocabulary=20,
    context=64,
    heads=2,
    attention=10,
    matrices=((40, 10), (10, 40)) * 2,
    inputs=(10, 40) * 2,
)
FACTS = EffortFacts(samples=32, length=512, windows=800, window=512, batch_size=8, layers=8)
TOKENS = 32 * 512


def plain(dtype: str) -> Rates:
    return PLAIN


# The formula


@pytest.mark.parametrize(
    ("effort", "seconds"),
    cases(
        {
            "blocks": ({"blocks": 100, "at_once": 10**6}, 100 * (2 * 2400 / 1e9 + 2 * 34 * 10 * 4 / 1e7)),
            "attention": (
                {"blocks": 100, "length": 50, "at_once": 10**6},
                100 * (2 * 2400 / 1e9 + 2 * (4 * 50 * 10 / 1e8 + 34 * 10 * 4 / 1e7)),
            ),
            "calls of one token": ({"blocks": 100, "at_once": 1}, 100 * 2 * 40 * 1e-4),
            "head": ({"head": 100}, 100 * (2 * 200 / 1e9 + 16 * 20 / 1e7)),
            "Gram matrices": ({"grams": 100}, 100 * 2 * (10**2 + 40**2) / 1e9),
            "factors": ({"factors": 3}, 3 * 2 * (10**3 + 40**3) / 1e6),
            "sweeps": ({"sweeps": 1}, 2 * (40 * 10**2 + 10 * 40**2) / 1e9 + 12 * 1e-4 * 100),
            "looks": ({"looks": 5}, 5 * 4 * 1600 / 1e7),
            "nothing": ({}, 0.0),
        }
    ),
)
def test_an_effort_takes_what_the_formula_says(effort: dict[str, float], seconds: float) -> None:
    found = effort_seconds(Effort(phase="other", **effort), SHAPE, "float32", FACTS, plain)  # type: ignore[arg-type]
    assert found == pytest.approx(seconds)


def test_products_are_as_fast_as_in_their_dtype_and_factors_as_in_float32() -> None:
    by_dtype = {"float32": PLAIN, "bfloat16": replace(PLAIN, products=4e9, moved=1e30, launch=0.0)}
    effort = Effort(phase="training", blocks=100, factors=1, dtype="bfloat16")
    expected = 100 * 2 * 2400 / 4e9 + 2 * (10**3 + 40**3) / 1e6
    assert effort_seconds(effort, SHAPE, "float32", FACTS, by_dtype.__getitem__) == pytest.approx(expected)


def test_phases_add_up() -> None:
    efforts = [Effort(phase="a", looks=1), Effort(phase="b", looks=2), Effort(phase="a", looks=3)]
    found = step_seconds(efforts, SHAPE, "float32", FACTS, plain)
    assert (list(found), found["a"]) == (["a", "b"], pytest.approx(2 * found["b"]))


@pytest.mark.parametrize(
    ("conditions", "tokens", "counted"),
    cases(
        {
            "windows": ({"eval": "perplexity", "window": 512, "windows": 100}, 51200, True),
            "two models": ({"eval": "divergence", "window": 512, "windows": 50}, 51200, True),
            "questions": ({"tasks": {"boolq": {"items": 30, "tasks": 1}}, "limit": 10}, 10 * 256, True),
            "pairs": ({"tasks": [{"task": "blimp", "questions": 7}]}, 7 * 32, True),
            "a stranger's": ({"eval": "theirs"}, 100_000, False),
        }
    ),
)
def test_an_evaluation_reads_what_its_conditions_say(conditions: dict[str, Any], tokens: int, counted: bool) -> None:
    effort, known = eval_effort(conditions)
    assert (effort.blocks, effort.head, known) == (tokens, tokens, counted)


# What methods say


def blocks(text: str, facts: EffortFacts = FACTS) -> float:
    """Passes of the calibration set, or of 480 training sequences, through all blocks."""
    efforts = load_registry().pruner(parse_step(text)).effort(facts)
    return sum(effort.blocks for effort in efforts) / TOKENS


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("dense", 0),
        ("magnitude", 0),
        ("wanda", 1 + 7 / 8),
        ("sparsegpt", 1 + 7 / 8),
        ("gblm", 1 + 7 / 8 + 1 + 3),
        ("wanda++[ro=false]", 1 + 7 / 8 + 3),
        ("wanda++[learning_rate=3e-4]", 1 + 7 / 8 + 3 + 5 + 5 * 3),
        ("wanda++[learning_rate=3e-4,ro_samples=8]", 1 + 7 / 8 + 3 + 5 / 4 + 5 * 3 / 4),
        ("wanda++[rgs=false,learning_rate=3e-4,ro_samples=8]", 1 + 7 / 8 + 5 / 4 + 1 + 5 * 3 / 4),
        ("perp[steps=60,subset=all]", 3 * 15),
        ("perp[steps=60]", 3 * 15),
        ("perp[steps=60,subset=norms]", 2 * 15),
        ("perp[steps=60,mode=reconstruct]", 7 / 8 + 4 * 15),
        ("lora[steps=60,batch=8]", 2 * 15),
        ("lora[steps=60,batch=8,merge=masked]", 3 * 15),
        ("imp[rounds=3,retrain.steps=60]", 3 * 3 * 15),
    ],
)
def test_built_in_methods_count_their_passes(text: str, passes: float) -> None:
    assert blocks(text) == pytest.approx(passes)


def test_a_method_that_leaves_the_model_dense_optimises_nothing() -> None:
    assert blocks("wanda++", replace(FACTS, prunes=False)) == blocks("wanda++[ro=false]")


class Stranger(Pruner):
    """Says what it needs, and no more."""

    name = "stranger"

    def __init__(self, needs: Needs) -> None:
        self._needs = needs

    def needs(self) -> Needs:
        return self._needs

    def prune(self, job: Job) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("needs", "passes"),
    [
        (Needs.WEIGHTS, 0),
        (Needs.WEIGHTS | Needs.CALIBRATION, 1 + 7 / 8),
        (Needs.CALIBRATION | Needs.GRADIENTS, 1 + 7 / 8 + 3),
        (Needs.TRAINING, 3 * 800 / 32),
    ],
)
def test_a_strangers_effort_is_the_usual_for_what_it_needs(needs: Needs, passes: float) -> None:
    efforts = Stranger(needs).effort(FACTS)
    assert sum(effort.blocks for effort in efforts) / TOKENS == pytest.approx(passes)
    assert any(effort.looks for effort in efforts), "weights are looked at in any case"


@pytest.mark.parametrize(
    "answer", [None, [1.0], [Effort(phase="other", blocks=-1)], [Effort(phase="other", looks=float("nan"))]]
)
def test_nonsense_of_a_stranger_is_told_with_its_name(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = Stranger(Needs.WEIGHTS)
    monkeypatch.setattr(stranger, "effort", lambda facts: answer)
    with pytest.raises(PluginError, match=r"effort\(\) of the pruner 'stranger' answers"):
        work_of(stranger).efforts()


def work_of(*pruners: Pruner, facts: EffortFacts = FACTS, shape: ModelShape = SHAPE, evals: Sequence[Any] = ()) -> Work:
    return Work(
        model=ModelSource(Path(), "tiny", "local"),
        weights="w",
        shape=shape,
        dtype="float32",
        steps=tuple(pruner.name for pruner in pruners),
        pruners=pruners,
        target="0.5",
        seed=0,
        facts=facts,
        evals=tuple(evals),
    )


# Rates


def test_rates_are_measured_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    found = rates_of(SHAPE, "float32", "cpu", "box")
    assert time.monotonic() - started < 10
    assert all(0 < value < 1e16 for value in vars(found).values())
    monkeypatch.setattr(rates, "_measured", lambda *_: pytest.fail("measured again"))
    assert rates_of(SHAPE, "float32", "cpu", "box") == found
    for other in ((SHAPE, "bfloat16", "cpu", "box"), (SHAPE, "float32", "cpu", "other")):
        with pytest.raises(pytest.fail.Exception):
            rates_of(*other)
    [file] = (own_cache / "rates").iterdir()
    file.write_text('{"products": "fast"}')
    with pytest.raises(pytest.fail.Exception):
        rates_of(SHAPE, "float32", "cpu", "box")


def test_threads_multiply_rates_but_not_launches() -> None:
    assert PLAIN.times(2) == Rates(2e9, 2e8, 2e7, 2e6, 1e-4)


# Records


def part(name: str = "wanda", same: str = "a", dtype: str = "float32", **expected: float) -> Part:
    return Part("step", name, same, dtype, expected or {"statistics": 1.0})


def past(part: Part, threads: int = 1, **found: float) -> Past:
    return Past(part, found, threads)


def test_the_nearest_records_are_asked() -> None:
    records = [
        past(part(same="a"), statistics=2.0),
        past(part(same="b"), statistics=3.0),
        past(part(same="c", dtype="bfloat16"), statistics=5.0),
        past(part("gblm", same="a"), statistics=7.0),
    ]
    asked = part(statistics=10.0)
    assert Experience(1, records).seconds(asked) == (pytest.approx(20), "the same")
    assert Experience(1, records[1:]).seconds(asked) == (pytest.approx(30), "its kind")
    assert Experience(1, records[2:]).seconds(asked) == (pytest.approx(50), "its kind")
    assert Experience(1, records[3:]).seconds(asked) == (pytest.approx(70), "others")
    assert Experience(1, []).seconds(asked) == (10.0, "rates")


def test_records_of_as_many_threads_come_first() -> None:
    records = [past(part(), threads=1, statistics=2.0), past(part(), threads=4, statistics=9.0)]
    assert [Experience(threads, records).seconds(part())[0] for threads in (1, 4)] == [pytest.approx(2), pytest.approx(9)]
    assert Experience(2, records).seconds(part())[0] == pytest.approx((2 * 9) ** 0.5)


def test_other_methods_are_asked_phase_by_phase_and_each_counts_once() -> None:
    of_gblm = part("gblm", statistics=1.0, training=1.0)
    records = [past(of_gblm, statistics=2.0, training=8.0)] * 3 + [past(part("sparsegpt"), statistics=8.0)]
    asked = part(statistics=1.0, training=1.0, propagation=1.0)
    seconds, basis = Experience(1, records).seconds(asked)
    assert (seconds, basis) == (pytest.approx((2 * 8) ** 0.5 + 8 + 1), "others")


def test_phases_that_took_no_time_say_nothing() -> None:
    assert Experience(1, [past(part("gblm"), statistics=0.01)]).seconds(part()) == (1.0, "rates")


def test_what_nobody_counts_is_a_guess_until_it_has_been_run() -> None:
    asked = Part("evaluation", "theirs", "a", "float32", {"evaluation": 3.0}, counted=False)
    assert Experience(1, []).seconds(asked) == (3.0, "guess")
    assert Experience(1, [Past(asked, {"evaluation": 6.0}, 1)]).seconds(asked) == (pytest.approx(6), "the same")


def test_a_run_is_its_start_its_steps_and_its_evaluations() -> None:
    record = make_record(make_spec("magnitude", seed=None))
    spec = record.spec.evals[0]
    work = work_of(load_registry().pruner(parse_step("magnitude")), evals=[spec])
    found = parts(work, plain)
    assert [(part.kind, part.name) for part in found] == [
        ("start", "start"),
        ("step", "magnitude"),
        ("evaluation", str(spec.conditions.get("eval"))),
    ]
    assert found[0].seconds == start_seconds(work)
    [start, step, evaluation] = past_of([record], load_registry(), lambda threads: plain)
    assert start.found["start"] == pytest.approx(12.5 - 2.0 - 1.5)
    assert (sum(step.found.values()), step.peak_bytes, evaluation.found) == (2.0, 300 << 20, {"evaluation": 1.5})


def test_records_of_pruners_that_are_gone_are_left_out() -> None:
    assert past_of([make_record(make_spec("unheard-of"))], load_registry(), lambda threads: plain) == []
    assert past_of([make_record(status="failed")], load_registry(), lambda threads: plain) == []


# Shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_know_the_matrices(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    shape = shape_of(ModelSource(tmp_path, "tiny", "local"))
    assert shape.matrices
    assert sum(outputs * inputs for outputs, inputs in shape.matrices) == shape.prunable <= shape.parameters
    assert shape.layers < len(shape.inputs) <= len(shape.matrices)
    assert shape.attention > 0


def test_a_record_tells_nearly_the_shape_of_its_model() -> None:
    known = shape_of(ModelSource(suites_folder() / "quickstart" / "wiki7m", "wiki7m", "local"))
    record = next(r for r in committed() if r.spec.method == "wanda" and r.spec.model.name == "wiki7m")
    assert record.audit is not None
    found = shape_in(record, round(record.audit.zeros / record.audit.sparsity_total))
    same = ("layers", "hidden", "matrices", "inputs", "attention")
    assert [getattr(found, name) for name in same] == [getattr(known, name) for name in same]
    assert found.parameters == known.parameters
    assert found.vocabulary == pytest.approx(known.vocabulary, rel=0.01)


# Memory


@pytest.mark.parametrize(
    ("effort", "more"),
    cases(
        {
            "nothing": ({}, 0),
            "hidden states": ({"held": 1000}, 1000 * 10 * 4),
            "a batch": ({"blocks": 1, "length": 16}, 4 * 8 * 16 * 170),
            "a batch on a host": ({"blocks": 1, "length": 512}, 4 * 1024 * 170),
            "a graph": ({"graph": 64}, 4 * 64 * 170),
            "logits": ({"head": 1, "at_once": 64}, 4 * 4 * 64 * 20),
            "Gram matrices of a block": ({"grams": 1}, 3 * 4 * (10**2 + 40**2)),
            "copies": ({"copies": 4}, 4 * 4 * 1600),
        }
    ),
)
def test_a_step_holds_the_model_and_what_its_effort_says(effort: dict[str, Any], more: int) -> None:
    work = work_of(Stranger(Needs.WEIGHTS))
    found = [step_bytes([Effort(phase="other", **effort), Effort(phase="other")], work, True), step_bytes([], work, True)]
    assert found[0] - found[1] == more


def test_the_libraries_count_on_the_host_only_and_the_dense_model_where_it_is_read() -> None:
    work = work_of(Stranger(Needs.WEIGHTS))
    assert step_bytes([], work, True) - step_bytes([], work, False) == 320 << 20
    spec = make_spec().evals[0]
    asked = {"eval": "perplexity", "window": 16, "windows": 4}
    one = work_of(Stranger(Needs.WEIGHTS), evals=[spec.model_copy(update={"conditions": asked})])
    two = work_of(Stranger(Needs.WEIGHTS), evals=[spec.model_copy(update={"conditions": asked | {"eval": "divergence"}})])
    assert eval_bytes(two, False) - eval_bytes(one, False) == work.weight_bytes == 4 * 2600
    assert eval_bytes(one, False) == 4 * 2600 + 2 * 4 * 8 * 16 * 20


# Predictions


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "rates_of", lambda *_: PLAIN)


@pytest.mark.usefixtures("known_rates")
def test_requests_get_predictions_and_records_keep_them(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(bench.suite_text("magnitude"))
    planner = Planner(load_suite(str(tmp_path / "small.toml")), load_registry(), "box", "prunebench run", "cpu")
    store = ResultStore(tmp_path / "results", pytest.fail)
    [request] = with_predictions(planner.requests(), [], planner)
    assert request.predicted is not None
    [work] = known_work([request], planner.registry)
    assert request.predicted.seconds == pytest.approx(sum(part.seconds for part in parts(work, plain)))
    record = run(request, lambda *_: None, "inline")
    kept = record.provenance
    assert kept.predicted_seconds == pytest.approx(request.predicted.seconds, abs=1e-3)
    assert kept.predicted_peak_bytes == request.predicted.peak_bytes
    store.write(record)
    [again] = with_predictions([request], [stored.record for stored in store.latest()], planner)
    assert again.predicted is not None
    assert again.predicted.seconds == pytest.approx(kept.seconds, rel=0.1), "now the record says it"


# What has been run


MEASURED = {
    "float32": Rates(products=94.6e9, attention=75.3e9, moved=6.16e9, factored=90.9e9, launch=1.86e-6),
    "bfloat16": Rates(products=438.5e9, attention=68.3e9, moved=5.09e9, factored=90.4e9, launch=1.82e-6),
}
"""Of one thread of the reference machine, at the sizes of wiki7m."""


@cache
def committed() -> list[RunRecord]:
    """The records of the reference machine that went well."""
    stored = ResultStore(ROOT / "results", lambda _: None).latest()
    return [s.record for s in stored if s.record.machine == "amd-epyc-2c" and s.record.status == "ok"]


def of_threads(threads: int) -> Callable[[str], Rates]:
    return lambda dtype: MEASURED[dtype].times(threads)


@cache
def wiki7m() -> list[tuple[RunRecord, Work, list[Part]]]:
    """The runs of the suite, with their parts."""
    runs = works_of(committed(), load_registry())
    return [(r, w, parts(w, of_threads(r.provenance.threads))) for r, w in runs if r.provenance.suite == "wiki7m"]


def ratios(past_without: Callable[[set[str]], list[Past]]) -> tuple[float, list[float]]:
    """Predicted over found seconds, in all and of each run, by the past without some pruners' steps."""
    predicted, found = [], []
    for record, _, planned in wiki7m():
        experience = Experience(record.provenance.threads, past_without({step.pruner for step in record.steps} - {"dense"}))
        predicted.append(sum(experience.seconds(part)[0] for part in planned))
        found.append(record.provenance.seconds)
    assert sum(found) > 20_000, "the suite's records are there"
    return sum(predicted) / sum(found), [one / other for one, other in zip(predicted, found, strict=True)]


@pytest.mark.parametrize("left_out", [False, True], ids=["with all records", "without those of the same method"])
def test_the_total_of_wiki7m_is_within_a_factor_of_one_and_a_half(left_out: bool) -> None:
    whole = past_of(committed(), load_registry(), of_threads)

    @cache
    def without(names: frozenset[str]) -> list[Past]:
        return [past for past in whole if past.part.kind != "step" or past.part.name not in names]

    total, _ = ratios(lambda names: without(frozenset(names)) if left_out else whole)
    assert 1 / 1.5 < total < 1.5


def test_rates_alone_are_mostly_within_a_factor_of_three() -> None:
    """Runs that others disturbed for minutes took up to ten times as long; no rate tells that."""
    _, each = ratios(lambda names: [])
    assert sum(1 / 3 < ratio < 3 for ratio in each) >= 0.9 * len(each)


def test_peaks_are_within_a_factor_of_one_and_a_half() -> None:
    wrong = {}
    for record, work, _ in wiki7m():
        expected, found = max(step_bytes(efforts, work, True) for efforts in work.efforts()), record.peak_bytes or 0
        if not 1 / 1.5 < expected / found < 1.5:
            wrong[record.spec.method] = (expected >> 20, found >> 20)
    assert wrong == {}

"""The data of figures: fronts against their definition, bands against their arithmetic, what is shown and what is left out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support import C4_TEXT, CONDITIONS, cases, make_record, make_spec
from test_exports import TRAINED, answers, board, losses, perplexities, scored

from prunebench.errors import StoreError
from prunebench.report.figures import Figures, SectionFigures, Tradeoff, figures_of
from prunebench.report.marks import COSTS, PEAK_MIB, PRUNE_SECONDS, SPEED_UP, Hollow, Mark, band_of, front_of
from prunebench.report.matrices import ERROR, MOST_MASKS, OVERLAP, SPARSITY, Heat, place_of
from prunebench.report.naming import short_labels
from prunebench.results.beside import Beside, beside
from prunebench.results.mask_files import MaskFile
from prunebench.results.published import WHOLE, PublishedConditions, PublishedRecipe, PublishedScore
from prunebench.results.records import EvalSpec, MatrixAudit, Recipe, RunRecord
from prunebench.results.rows import Row
from prunebench.results.statistics import Difference

Masks = Callable[[RunRecord], MaskFile | None]


def no_masks(_: RunRecord) -> None:
    return None


def figures(*records: RunRecord, placed: Sequence[Beside] = (), masks: Masks = no_masks, **options: Any) -> Figures:
    return figures_of(board(*records), records, placed, masks, **options)


def only_section(*records: RunRecord, **options: Any) -> SectionFigures:
    [section] = figures(*records, **options).sections
    return section


def tradeoff(section: SectionFigures, target: str, cost: str = PRUNE_SECONDS) -> Tradeoff:
    [found] = [one for one in section.tradeoffs if one.title.endswith(target) and one.cost == cost]
    return found


def mark(method: str = "wanda", value: float = 60.0, seconds: float = 2.0, **changes: Any) -> Mark:
    made = Mark(method, "0.5", (method,), value, value, value, seconds, 300 << 20, False, None, False, "", "1")
    return replace(made, **changes)


# Who is beaten by nobody


def front_by_definition(marks: Sequence[Mark], cost: str, higher: bool) -> set[str]:
    """Every mark against every other."""

    def numbers(one: Mark) -> tuple[float, float]:
        paid = one.cost(cost)
        assert paid is not None
        return (-paid if cost == SPEED_UP else paid, -one.value if higher else one.value)

    able = [
        one
        for one in marks
        if one.target != "dense"
        and not (one.shared_machine and cost == SPEED_UP)
        and one.cost(cost) is not None
        and not math.isnan(one.value)
    ]
    found = set()
    for one in able:
        beaten = False
        for other in able:
            (paid, lost), (own_paid, own_lost) = numbers(other), numbers(one)
            beaten |= paid <= own_paid and lost <= own_lost and (paid < own_paid or lost < own_lost)
        if not beaten:
            found.add(one.method)
    return found


@pytest.mark.parametrize("higher", [False, True], ids=["lower", "higher"])
@pytest.mark.parametrize("cost", COSTS)
def test_the_front_is_who_nobody_beats(cost: str, higher: bool) -> None:
    """Random tables with ties in both numbers, missing ones, controls and shared machines."""
    random = np.random.default_rng(3)
    sizes = set()
    for _ in range(300):
        count, steps = int(random.integers(0, 12)), int(random.choice([2, 4, 1000]))
        marks = [
            mark(
                f"m{index}",
                float(random.choice([random.integers(steps), math.nan], p=[0.95, 0.05])),
                float(random.integers(steps)),
                peak_bytes=None if random.random() < 0.1 else int(random.integers(steps)) << 20,
                speedup=None if random.random() < 0.1 else 1.0 + int(random.integers(steps)),
                shared_machine=bool(random.random() < 0.2),
                target="dense" if random.random() < 0.1 else "2:4",
            )
            for index in range(count)
        ]
        front = front_of(marks, cost, higher)
        assert set(front) == front_by_definition(marks, cost, higher)
        paid = [one.cost(cost) for name in front for one in marks if one.method == name]
        assert paid == sorted(paid, key=lambda value: value or 0.0)
        assert front == front_of(marks[::-1], cost, higher)
        sizes.add(len(front))
    assert sizes >= {0, 1, 2, 3}


def test_the_front_by_hand() -> None:
    cheap, good, both = mark("cheap", 90.0, 1.0), mark("good", 50.0, 9.0), mark("neither", 91.0, 9.5)
    assert front_of([both, good, cheap], PRUNE_SECONDS, False) == ("cheap", "good")
    assert front_of([both, good, cheap], PRUNE_SECONDS, True) == ("cheap", "neither")
    assert front_of([good, replace(good, method="twin")], PRUNE_SECONDS, False) == ("good", "twin")
    assert front_of([good, replace(good, method="dearer", prune_seconds=9.1)], PRUNE_SECONDS, False) == ("good",)
    assert front_of([], PRUNE_SECONDS, False) == ()


def test_a_shared_machine_only_adds_to_costs() -> None:
    """What it beats with them is beaten; of a speed-up nothing is known."""
    best = mark("best", 40.0, 1.0, speedup=2.0, shared_machine=True)
    other = mark(speedup=1.5)
    assert front_of([best, other], PRUNE_SECONDS, False) == ("best",)
    assert front_of([best, other], SPEED_UP, False) == ("wanda",)
    [shared] = only_section(losses("wanda", "0.5", 0, 0.1, shared_machine=True)).tradeoffs[:1]
    assert [one.shared_machine for one in shared.marks] == [True]
    assert shared.front == ("wanda",)


# Bands


def row(mean: float, dense: float | None, low: float, high: float, error: float = 0.1) -> Row:
    versus = Difference((low + high) / 2, low, high, 0.5, error, 10.0, 0.95)
    empty: dict[str, Any] = {"parts": {}, "control": None, "tuned": None, "extra_parameters": 0, "peak_bytes": None}
    more: dict[str, Any] = {
        "sparsity_prunable": 0.5,
        "sparsity_total": 0.4,
        "coverage": 1.0,
        "shared_machine": False,
        "ids": (),
    }
    return Row("m", (mean,), (0,), dense=dense, prune_seconds=1.0, versus=versus, **empty, **more)


BANDS = {
    "a ratio": (row(60.0, 50.0, 0.1, 0.3), True, (50 * math.exp(0.1), 50 * math.exp(0.3))),
    "a difference": (row(0.6, 0.7, -0.2, 0.05), False, (0.5, 0.75)),
    "no interval": (row(60.0, 50.0, -math.inf, math.inf, math.inf), True, (60.0, 60.0)),
    "half an interval": (row(60.0, 50.0, -0.1, math.inf), True, (60.0, 60.0)),
    "no dense model": (row(60.0, None, 0.1, 0.3), True, (60.0, 60.0)),
    "nothing compared": (replace(row(60.0, 50.0, 0.1, 0.3), versus=None), True, (60.0, 60.0)),
    "beyond all numbers": (row(60.0, 1e10, 0.1, 700.0), True, (60.0, 60.0)),
}


@pytest.mark.parametrize(("one", "is_ratio", "band"), cases(BANDS))
def test_the_band_is_the_interval_laid_on_dense(one: Row, is_ratio: bool, band: tuple[float, float]) -> None:
    assert band_of(one, is_ratio) == pytest.approx(band, rel=1e-12)


def test_marks_are_rows_of_their_table() -> None:
    records = perplexities()
    section = only_section(*records)
    found = tradeoff(section, "50% unstructured")
    rows = {row.method: row for row in section.section.tables[0].rows}
    assert [one.method for one in found.marks] == [
        row.method for row in section.section.tables[0].rows if row.method != "dense"
    ]
    assert found.dense == section.section.baseline
    for one in found.marks:
        own = rows[one.method]
        assert (one.value, one.ids, one.rank, one.seeds) == (own.mean, own.ids, str(own.rank), own.seeds_shown)
        assert own.versus is not None
        assert own.dense is not None
        assert one.low == pytest.approx(own.dense * math.exp(own.versus.low))
        assert one.low < one.value < one.high
    assert (found.quality, found.higher_is_better, found.logarithmic) == ("perplexity", False, True)
    assert found.subtitle == "calibration 128 x 512 tokens of allenai/c4 (en, train); machine box"


def test_shares_are_in_per_cent() -> None:
    right = [1, 0, 1, 1] * 20
    section = only_section(answers("dense", "dense", [1] * 80), answers("magnitude", "0.5", right))
    [found] = [one for one in section.tradeoffs if one.cost == PRUNE_SECONDS]
    [one] = found.marks
    assert (one.value, found.dense) == (75.0, 100.0)
    assert 60 < one.low < 75 < one.high < 90
    assert (found.quality, found.higher_is_better, found.logarithmic) == ("accuracy %", True, False)


def test_what_has_no_number_is_in_no_picture() -> None:
    without = losses("wanda", "0.5", 0, 0.1, peak_host_bytes=300 << 20)
    steps = [without.steps[0].model_copy(update={"peak_host_bytes": None})]
    section = only_section(without.model_copy(update={"steps": steps}), losses("gblm", "0.5", 0, 0.2))
    assert [one.method for one in tradeoff(section, "50% unstructured", PEAK_MIB).marks] == ["gblm"]
    assert len(tradeoff(section, "50% unstructured").marks) == 2
    assert [one.cost for one in section.tradeoffs] == [PRUNE_SECONDS, PEAK_MIB]
    assert section.tradeoffs[0].dense is None
    valueless = scored(losses("wanda", "0.5", 0, 0.1), value=None)
    assert only_section(valueless).tradeoffs == ()


def test_a_speed_up_is_what_another_score_says() -> None:
    speed = [EvalSpec(text="speed", revision=1, conditions={**CONDITIONS, "eval": "speed"})]
    record = make_record(make_spec("wanda", "2:4", more_evals=speed), 60.0)
    changes = {"unit": SPEED_UP, "value": 1.6, "higher_is_better": True}
    scores = {**record.scores, "eval1": record.scores["eval1"].model_copy(update=changes)}
    made = figures(record.model_copy(update={"scores": scores}), make_record(make_spec("gblm", "2:4"), 70.0))
    [found] = [one for s in made.sections for one in s.tradeoffs if one.cost == SPEED_UP]
    assert found.quality == "perplexity"  # a speed-up is not set against itself
    assert [(one.method, one.speedup) for one in found.marks] == [("wanda", 1.6)]
    assert found.front == ("wanda",)


def test_controls_are_shown_and_lead_no_front() -> None:
    records = [
        losses("dense", "dense", None, 0.0),
        losses("dense + perp", "dense", 0, -0.2, TRAINED, seconds=0.1),
        losses("magnitude + perp", "2:4", 0, 0.1, TRAINED),
    ]
    found = only_section(*records).tradeoffs
    [one] = [one for one in found if one.cost == PRUNE_SECONDS]
    assert [(each.method, each.is_control, each.trained) for each in one.marks] == [
        ("dense + perp", True, True),
        ("magnitude + perp", False, True),
    ]
    assert one.front == ("magnitude + perp",)


def test_retrained_rows_have_figures_of_their_own() -> None:
    records = [losses("wanda", "2:4", 0, 0.1), losses("imp", "2:4", 0, 0.1, TRAINED)]
    found = [one for one in only_section(*records).tradeoffs if one.cost == PRUNE_SECONDS]
    assert [[each.method for each in one.marks] for one in found] == [["wanda"], ["imp"]]
    assert "retrained on text of allenai/c4" in found[1].title


def test_a_model_that_cannot_do_it_has_no_figures() -> None:
    quiet = {**CONDITIONS, "eval": "generation", "least_of_dense": 0.1}
    records = [
        make_record(make_spec(method, target, None, conditions=quiet), value, unit="accuracy", higher_is_better=True)
        for method, target, value in (("dense", "dense", 0.01), ("magnitude", "0.5", 0.02))
    ]
    section = only_section(*records)
    assert (section.tradeoffs, section.curves, section.phases) == ((), None, ())


# Curves and phases


def test_curves_are_over_unstructured_targets_and_patterns_beside_them() -> None:
    curves = only_section(*perplexities()).curves
    assert curves is not None
    assert [
        (one.method, [mark.target for mark in one.points], [mark.target for mark in one.patterns]) for one in curves.curves
    ] == [
        ("magnitude", ["0.5", "0.6"], ["2:4"]),
        ("perp[steps=60,learning_rate=0.003]", [], ["2:4"]),
        ("random", ["0.5", "0.6"], ["2:4"]),
        ("wanda", ["0.5", "0.6"], ["2:4"]),
    ]
    assert [mark.sparsity for mark in curves.curves[0].points] == [0.5, 0.6]
    assert curves.logarithmic
    assert curves.dense is not None


def test_one_sparsity_makes_no_curve() -> None:
    assert only_section(losses("wanda", "0.5", 0, 0.1), losses("wanda", "2:4", 0, 0.1)).curves is None


def test_each_training_has_a_curve() -> None:
    other = TRAINED.model_copy(update={"training_tokens": 8192})
    records = [losses("imp", target, 0, 0.1, recipe) for recipe in (TRAINED, other) for target in ("0.5", "0.6")]
    curves = only_section(*records).curves
    assert curves is not None
    assert [(one.method, one.training, one.trained) for one in curves.curves] == [
        ("imp", "allenai/c4 (en, train), 4,096 tokens", True),
        ("imp", "allenai/c4 (en, train), 8,192 tokens", True),
    ]


def test_seconds_by_phase_add_up_to_those_of_the_table() -> None:
    section = only_section(*perplexities())
    for bars, table in zip(section.phases, section.section.tables, strict=True):
        rows = [row for row in table.rows if row.method != "dense"]
        totals = [sum(part) for part in zip(*bars.phases.values(), strict=True)]
        assert totals == pytest.approx([row.prune_seconds for row in rows])
        assert bars.methods == tuple(row.method for row in rows)
        assert bars.marked == tuple(row.shared_machine for row in rows)
        assert list(bars.phases) == ["scoring", "other"]


def test_phases_of_strangers_stand_before_the_last() -> None:
    record = losses("wanda", "0.5", 0, 0.1)
    step = record.steps[0].model_copy(update={"phases": {"other": 1.0, "zeta": 2.0, "alpha": 0.0, "calibration": 3.0}})
    [bars] = only_section(record.model_copy(update={"steps": [step]})).phases
    assert bars.phases == {"calibration": (3.0,), "zeta": (2.0,), "other": (1.0,)}
    assert list(bars.phases) == ["calibration", "zeta", "other"]


# Published numbers

WIKI = {**CONDITIONS, **WHOLE["wikitext2"], "tokens": 341_469, "window": 2048, "windows": 166}
PAPER = Recipe(calibration=C4_TEXT, sampler="documents-v1", samples=128, length=2048)


def published(value: float, target: str = "0.5", **changes: Any) -> PublishedScore:
    made = PublishedScore(
        value=value,
        printed=str(value),
        metric="perplexity",
        paper="A paper",
        source="a",
        table="1",
        model="org/model",
        model_label="Model",
        method="wanda",
        method_label="Wanda",
        target=target,
        conditions=PublishedConditions(**WHOLE["wikitext2"], window=2048),
        recipe=PublishedRecipe(calibration="allenai/c4", samples=128, length=2048),
        measured_by="A paper",
    )
    return made.model_copy(update=changes)


def run_of(target: str, value: float, seed: int = 0, **conditions: Any) -> RunRecord:
    spec = make_spec("wanda", target, seed, recipe=PAPER, conditions=WIKI | conditions)
    return make_record(spec.model_copy(update={"model": spec.model.model_copy(update={"source": "org/model@1"})}), value)


def test_published_numbers_stand_where_ours_stand_beside_them() -> None:
    numbers = [published(7.25), published(9.0, "0.6"), published(8.0, method="gblm"), published(7.0, window=1)]
    records = [run_of("0.5", 7.26, seed) for seed in (0, 1)] + [run_of("0.6", 9.5)]
    section = only_section(*records, placed=beside(numbers[:3], records))
    half, more = (tradeoff(section, f"{percent}% unstructured").published for percent in (50, 60))
    assert half == (Hollow("A paper, table 1", "wanda", "0.5", 7.25),)
    assert more == (Hollow("A paper, table 1", "wanda", "0.6", 9.0),)
    assert section.curves is not None
    assert section.curves.published == half + more


def test_published_numbers_of_other_conditions_stand_nowhere() -> None:
    records = [run_of("0.5", 7.26), run_of("0.6", 9.0, window=512)]
    made = figures(*records, placed=beside([published(7.25), published(9.0, "0.6")], records))
    found = {one.published for section in made.sections for one in section.tradeoffs}
    assert found == {(Hollow("A paper, table 1", "wanda", "0.5", 7.25),), ()}


# Matrices


class Kept(MaskFile):
    """Keep masks that were never written."""

    def __init__(self, keep: Mapping[str, NDArray[np.bool_]]) -> None:
        shapes = {name: (mask.shape[0], mask.shape[1]) for name, mask in keep.items()}
        super().__init__(shapes, {}, {name: np.packbits(mask) for name, mask in keep.items()})


NAMES = [f"model.layers.{block}.{role}" for block in (0, 1, 10) for role in ("self_attn.q_proj", "mlp.up_proj")]


def audited(record: RunRecord, zeros: Mapping[str, int]) -> RunRecord:
    assert record.audit is not None
    matrices = [MatrixAudit(name=name, shape=(8, 8), removed=count, zeros=count) for name, count in zeros.items()]
    return record.model_copy(update={"audit": record.audit.model_copy(update={"matrices": matrices})})


def heats(made: Figures, what: str) -> list[Heat]:
    return [heat for heat in made.heats if heat.what == what]


PLACES = {
    "llama": ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
    "gpt2": ("transformer.h.11.attn.c_proj", (11, "attn.c_proj")),
    "experts": ("model.layers.2.mlp.experts.7.w1", (2, "mlp.experts.7.w1")),
    "the head": ("lm_head", None),
    "a number at the end": ("layers.3", None),
    "no block": ("x3.y", None),
}


@pytest.mark.parametrize(("name", "place"), cases(PLACES))
def test_a_matrix_is_placed_by_its_name(name: str, place: tuple[int, str] | None) -> None:
    assert place_of(name) == place


def test_sparsity_by_matrix_is_the_mean_over_seeds() -> None:
    zeros = dict(zip(NAMES, (8, 16, 24, 32, 40, 48), strict=True))
    records = [audited(losses("wanda", "0.5", seed, 0.1), {n: z + 16 * seed for n, z in zeros.items()}) for seed in (0, 1)]
    [heat] = heats(figures(*records), SPARSITY)
    assert (heat.roles, heat.blocks, heat.method, heat.title) == (
        ("q_proj", "up_proj"),
        (0, 1, 10),
        "wanda",
        "tiny, 50% unstructured",
    )
    np.testing.assert_allclose(heat.values, 100 / 64 * np.array([[16, 32, 48], [24, 40, 56]]))
    assert heat.ids == tuple(record.id for record in records)


def test_matrices_that_are_not_there_are_no_number_and_like_names_stay_apart() -> None:
    zeros = {"h.0.attn.c_proj": 32, "h.0.mlp.c_proj": 16, "h.1.attn.c_proj": 48, "lm_head": 0}
    [heat] = heats(figures(audited(losses("wanda", "0.5", 0, 0.1), zeros)), SPARSITY)
    assert heat.roles == ("attn.c_proj", "mlp.c_proj")
    np.testing.assert_array_equal(heat.values, [[50, 75], [25, math.nan]])


def test_output_errors_come_from_their_evaluation() -> None:
    asked = [EvalSpec(text="layer_error", revision=1, conditions={**CONDITIONS, "eval": "layer_error"})]
    record = make_record(make_spec("wanda", "0.5", more_evals=asked))
    items: dict[str, list[float | int | str]] = {"matrix": [*NAMES], "error": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    score = record.scores["eval1"].model_copy(update={"items": {}, "unit": "relative error"})
    record = record.model_copy(update={"scores": {**record.scores, "eval1": score}})
    [heat] = heats(figures(record, load=lambda _, __: items), ERROR)
    np.testing.assert_allclose(heat.values, [[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]])

    def gone(*_: Any) -> Any:
        raise StoreError("it is gone")

    assert heats(figures(record, load=gone), ERROR) == []


def masks_by(records: Sequence[RunRecord]) -> tuple[Masks, dict[str, dict[str, NDArray[np.bool_]]]]:
    random = np.random.default_rng(5)
    keep = {record.id: {name: random.random((8, 8)) < 0.5 for name in NAMES} for record in records}
    return lambda record: Kept(keep[record.id]) if record.id in keep else None, keep


def test_overlaps_are_jaccard_indices_of_what_is_removed() -> None:
    records = [losses("wanda", "0.5", seed, 0.1) for seed in (0, 1)] + [losses("gblm", "0.5", 0, 0.2)]
    masks, keep = masks_by(records)
    made = figures(*records, losses("magnitude", "0.5", None, 0.2), masks=masks)
    [square] = made.overlaps
    assert square.labels == ("gblm, seed 0", "wanda, seed 0", "wanda, seed 1")
    assert square.chance == pytest.approx(1 / 3)
    for i, j in itertools.product(range(3), repeat=2):
        one, other = (np.stack([~mask for mask in keep[square.ids[index]].values()]) for index in (i, j))
        assert square.values[i, j] == pytest.approx(np.sum(one & other) / np.sum(one | other))
    [heat] = heats(made, OVERLAP)
    assert heat.method == "gblm / wanda"
    name = "model.layers.10.mlp.up_proj"
    one, other = (~keep[run][name] for run in heat.ids)
    assert heat.values[1, 2] == pytest.approx(np.sum(one & other) / np.sum(one | other))


def test_masks_that_cannot_be_read_or_are_of_other_matrices_are_left_out() -> None:
    records = [losses(method, "0.5", None, 0.1) for method in ("a", "b", "c")]
    masks, _ = masks_by(records)

    def some(record: RunRecord) -> MaskFile | None:
        if record.spec.method == "a":
            raise StoreError("it was cut short")
        return Kept({"other.0.matrix": np.zeros((2, 2), bool)}) if record.spec.method == "b" else masks(record)

    [square] = figures(*records, masks=some).overlaps
    assert square.labels == ("b", "c")
    assert math.isnan(square.values[0, 1])
    assert heats(figures(*records, masks=some), OVERLAP) == []
    assert figures(records[0], records[1], masks=some).overlaps == ()


def test_a_square_of_too_many_masks_says_so() -> None:
    records = [losses("wanda", "0.5", seed, 0.1) for seed in range(MOST_MASKS + 2)]
    masks, _ = masks_by(records)
    [square] = figures(*records, masks=masks).overlaps
    assert len(square.labels) == MOST_MASKS
    assert square.title == f"tiny, 50% unstructured, the first {MOST_MASKS} of {MOST_MASKS + 2} masks"


def test_rows_of_one_method_are_told_apart_by_their_data() -> None:
    other = Recipe(calibration=C4_TEXT.model_copy(update={"name": "a/b", "content": "else"}), sampler="s", samples=1, length=2)
    records = [losses("wanda", "0.5", 0, 0.1), losses("wanda", "0.5", 0, 0.1, other), losses("magnitude", "0.5", None, 0.1)]
    made = figures(*[audited(record, {NAMES[0]: 32}) for record in records])
    assert sorted(heat.method for heat in heats(made, SPARSITY)) == ["magnitude", "wanda (a/b)", "wanda (allenai/c4)"]


def test_only_runs_of_the_board_are_drawn() -> None:
    records = perplexities()
    whole = board(*records)
    assert figures_of(whole.only("nothing"), records, (), no_masks) == Figures((), (), ())


# Names

LABELS = {
    "alone": (["wanda[group=row]", "magnitude"], ["wanda", "magnitude"]),
    "twice": (["wanda[group=row]", "wanda"], ["wanda [group=row]", "wanda"]),
    "what is common is left out": (
        ["magnitude + perp[steps=60,subset=all]", "magnitude + perp[steps=60,subset=norms]", "magnitude + perp[steps=60]"],
        ["magnitude + perp [subset=all]", "magnitude + perp [subset=norms]", "magnitude + perp"],
    ),
    "no label may be that of another": (["a[x=1,x=1]", "a[x=1]"], ["a[x=1,x=1]", "a[x=1]"]),
    "a list stays whole": (["a[b=1+2,c.d=3]", "a"], ["a [b=1+2, c.d=3]", "a"]),
}


@pytest.mark.parametrize(("methods", "labels"), cases(LABELS))
def test_short_names(methods: list[str], labels: list[str]) -> None:
    assert short_labels(methods) == dict(zip(methods, labels, strict=True))

"""Intervals, tests and ranks against cases worked by hand, published values and identities."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from prunebench.errors import NonFiniteError, RequestError, UnknownNameError
from prunebench.results import resampling
from prunebench.results.accuracy import accuracy_interval, macro_accuracy_interval, mcnemar
from prunebench.results.ranks import RankInterval, holm, rank, rank_intervals
from prunebench.results.resampling import BLOCK, Items, equal_weights, macro_weights, satterthwaite
from prunebench.results.statistics import Difference, new_items, new_seeds_too, planned_difference, smallest_detectable

UNKNOWN = (-math.inf, math.inf, 1.0)


def one_stratum(count: int) -> Items:
    return Items(equal_weights(count), strata=np.zeros(count, dtype=np.int64))


def in_documents(*sizes: int) -> Items:
    return Items(equal_weights(sum(sizes)), clusters=np.repeat(np.arange(len(sizes)), sizes))


def in_text(count: int) -> Items:
    return Items(equal_weights(count))


def in_strata(*sizes: int) -> Items:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    return Items(macro_weights(strata), strata=strata)


LAYOUTS = {
    "one stratum": one_stratum(40),
    "strata": in_strata(5, 30, 2, 3),
    "documents": in_documents(9, 1, 7, 7, 7, 5, 4),
    "equal documents": in_documents(*[5] * 8),
    "text": in_text(40),
    "documents in strata": Items(
        equal_weights(40), np.repeat(np.arange(10), [6, 2, 4, 4, 4, 1, 9, 5, 3, 2]), np.repeat([0, 1], 20)
    ),
    "unequal items of a text": Items(np.arange(1.0, 41.0) / 820),
}
layouts = pytest.mark.parametrize("items", LAYOUTS.values(), ids=LAYOUTS)


def draw(items: Items, seeds: int = 3, seed: int = 0) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    return generator.normal(0.1, 1.0, (seeds, len(items.weights)))


def bounds(found: Difference) -> tuple[float, float, float]:
    return found.low, found.high, found.p_value


def test_one_stratum_is_the_paired_t_test() -> None:
    items = one_stratum(40)
    values = draw(items, seeds=1)[0]
    found = new_items(values, items, seed=0)
    expected = stats.ttest_1samp(values, 0.0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (found.estimate, found.degrees_of_freedom) == pytest.approx((values.mean(), 39))


def test_documents_of_one_size_are_a_t_test_of_their_means() -> None:
    items = LAYOUTS["equal documents"]
    values = draw(items)
    found = new_items(values, items, seed=0)
    expected = stats.ttest_1samp(values.mean(axis=0).reshape(8, 5).mean(axis=1), 0.0)
    assert (found.p_value, found.degrees_of_freedom) == (pytest.approx(expected.pvalue, rel=1e-9), pytest.approx(7))


def test_strata_of_two_are_welch() -> None:
    """A macro mean over two tasks is the unequal-variance t statistic of their means, up to sign."""
    items = in_strata(12, 30)
    values = draw(items, seeds=1)[0]
    found = new_items(values, items, seed=0)
    welch = stats.ttest_ind(values[:12], -values[12:], equal_var=False)
    assert (found.p_value, found.degrees_of_freedom) == (pytest.approx(welch.pvalue), pytest.approx(welch.df))


@pytest.mark.parametrize("name", ["one stratum", "strata", "equal documents"])
def test_what_is_not_drawn_agrees_with_drawing(name: str) -> None:
    """The variance of the bootstrap of questions, or of documents of one size, by brute force."""
    items = LAYOUTS[name] if name != "strata" else in_strata(5, 30, 12)
    values = draw(items, seeds=1)[0]
    generator = np.random.default_rng(1)
    units = items.units
    assert units.item is not None
    means = np.bincount(units.item, values * items.weights) / units.size
    total = np.zeros(40_000)
    correction = 0.0
    for stratum, weight in enumerate(units.weight):
        inside = means[units.stratum == stratum]
        drawn = inside[generator.integers(len(inside), size=(len(total), len(inside)))].mean(axis=1)
        total += weight * drawn
        correction += weight**2 * drawn.var() / (len(inside) - 1)
    assert new_items(values, items, seed=0).standard_error ** 2 == pytest.approx(total.var() + correction, rel=0.03)


def test_moving_blocks_agree_with_drawing() -> None:
    items = in_text(64)
    values = draw(items, seeds=1)[0].cumsum()
    blocks = np.lib.stride_tricks.sliding_window_view(values, BLOCK).mean(axis=1)
    drawn = blocks[np.random.default_rng(1).integers(len(blocks), size=(40_000, 8))].mean(axis=1)
    found = new_items(values, items, seed=0)
    assert found.standard_error**2 == pytest.approx(drawn.var() * 8 / 7, rel=0.03)
    assert found.degrees_of_freedom == pytest.approx(7)


def test_documents_of_many_sizes_by_drawing_and_by_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.random.default_rng(3).integers(1, 9, size=400)
    items = in_documents(*sizes)
    values = draw(items)
    drawn = new_items(values, items, seed=0)
    monkeypatch.setattr(resampling, "MANY", 0)
    limit = new_items(values, items, seed=0)
    assert drawn.standard_error == pytest.approx(limit.standard_error, rel=0.03)
    assert drawn.standard_error != limit.standard_error
    assert drawn.degrees_of_freedom == pytest.approx(sum(sizes) ** 2 / sum(sizes**2) - 1)


def test_an_uneven_text_has_few_degrees_of_freedom() -> None:
    found = new_items(draw(in_documents(34, 8, 8, 6, 5, 3)), in_documents(34, 8, 8, 6, 5, 3), seed=0)
    assert found.degrees_of_freedom == pytest.approx(64**2 / (34**2 + 8**2 + 8**2 + 6**2 + 5**2 + 3**2) - 1)


@layouts
def test_swapping_the_methods_turns_the_interval_round(items: Items) -> None:
    values = draw(items, seeds=5)
    for test in (new_items, new_seeds_too):
        one, other = test(values, items, seed=b"ab"), test(-values, items, seed=b"ab")
        assert (other.low, other.high, other.p_value) == (-one.high, -one.low, one.p_value)
        assert other.estimate == -one.estimate


@layouts
def test_p_and_interval_agree(items: Items) -> None:
    """Shifting every value moves the interval; where it touches zero, p is 0.05."""
    values = draw(items, seeds=5)
    for test in (new_items, new_seeds_too):
        found = test(values, items, seed=4)
        assert test(values - found.low, items, seed=4).p_value == pytest.approx(0.05, rel=1e-6)
        for shift in (found.low, found.high, found.estimate):
            for nudge in (-0.01, 0.01):
                moved = test(values - shift + nudge, items, seed=4)
                assert (moved.p_value < 0.05) == (not moved.low <= 0 <= moved.high) == moved.is_significant


@layouts
def test_a_wider_level_contains_a_narrower(items: Items) -> None:
    values = draw(items)
    narrow, wide = new_items(values, items, seed=0, level=0.9), new_items(values, items, seed=0, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide.p_value == narrow.p_value


@layouts
def test_the_same_seed_gives_the_same_bits(items: Items) -> None:
    values = draw(items)
    first = new_items(values, items, seed=b"one"), new_seeds_too(values, items, seed=b"one")
    resampling._times.cache_clear()
    assert (new_items(values, items, seed=b"one"), new_seeds_too(values, items, seed=b"one")) == first


def test_another_seed_draws_other_documents() -> None:
    items = LAYOUTS["documents"]
    errors = {new_items(draw(items), items, seed=seed).standard_error for seed in (0, 1, -1, b"0", b"1")}
    assert len(errors) == 5
    assert max(errors) < 1.1 * min(errors)


def test_names_of_documents_and_strata_do_not_matter() -> None:
    items = LAYOUTS["documents"]
    assert items.clusters is not None
    renamed = Items(items.weights, clusters=items.clusters * 7 + 100)
    assert new_items(draw(items), items, seed=0) == new_items(draw(items), renamed, seed=0)


@layouts
def test_no_difference_at_all(items: Items) -> None:
    for test in (new_items, new_seeds_too):
        found = test(np.zeros((5, len(items.weights))), items, seed=0)
        assert (found.estimate, *bounds(found)) == (0, 0, 0, 1)
        assert found.is_known


@layouts
def test_a_constant_difference(items: Items) -> None:
    """A point, as unlikely under no difference as all signs being alike; with too few units for that, no interval."""
    found = new_items(np.full((3, len(items.weights)), 0.1), items, seed=0)
    count = min(len(items.units.size), int(items.units.drawn.sum()))
    assert found.estimate == pytest.approx(0.1)
    if count < 6:
        assert bounds(found) == UNKNOWN
    else:
        assert bounds(found) == (found.estimate, found.estimate, 2.0 ** (1 - count))


def test_five_answers_changed_alike_are_not_evidence() -> None:
    assert bounds(new_items(np.ones(5), one_stratum(5), seed=0)) == UNKNOWN
    assert new_items(np.ones(6), one_stratum(6), seed=0).p_value == 2**-5
    few = np.zeros(1000)
    few[:4] = 1
    assert new_items(few, one_stratum(1000), seed=0).p_value > 0.05
    few[:12] = 1
    assert new_items(few, one_stratum(1000), seed=0).p_value < 0.05


@pytest.mark.parametrize("items", [in_documents(40), in_text(15), in_text(3), in_strata(1, 1, 1), one_stratum(1)])
def test_a_single_document_gives_no_interval(items: Items) -> None:
    values = draw(items, seeds=5)
    for test in (new_items, new_seeds_too):
        found = test(values, items, seed=0)
        assert bounds(found) == UNKNOWN
        assert not found.is_known
        assert math.isfinite(found.estimate)


def test_a_stratum_of_one_question_takes_the_spread_of_the_others() -> None:
    values = np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    found = new_items(values, in_strata(4, 1), seed=0)
    unit = np.var(values[:4], ddof=1)
    assert found.standard_error**2 == pytest.approx(0.25 * unit / 4 + 0.25 * unit)


def test_a_stratum_without_spread_adds_none() -> None:
    values = np.concatenate([np.ones(10), draw(one_stratum(30), seeds=1)[0]])
    found = new_items(values, in_strata(10, 30), seed=0)
    assert found.standard_error == pytest.approx(0.5 * stats.sem(values[10:]))
    assert found.degrees_of_freedom == pytest.approx(29)


def test_new_seeds_too_is_the_crossed_analysis_of_variance() -> None:
    seeds, count = 4, 30
    generator = np.random.default_rng(5)
    values = generator.normal(0, 1, (seeds, 1)) + generator.normal(0, 2, (1, count)) + generator.normal(0, 1, (seeds, count))
    grand = values.mean()
    by_seed, by_item = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    freedoms = np.array([seeds - 1, count - 1, (seeds - 1) * (count - 1)])
    squares = (
        count * np.sum((by_seed - grand) ** 2),
        seeds * np.sum((by_item - grand) ** 2),
        np.sum((values - by_seed - by_item + grand) ** 2),
    )
    mean_squares = np.array(squares) / freedoms
    combined = mean_squares[0] + mean_squares[1] - mean_squares[2]
    found = new_seeds_too(values, one_stratum(count), seed=0)
    assert found.standard_error**2 == pytest.approx(combined / (seeds * count))
    assert found.degrees_of_freedom == pytest.approx(combined**2 / np.sum(mean_squares**2 / freedoms))


def test_satterthwaite_by_hand() -> None:
    assert satterthwaite((2.0, 1.0), (4, 10)) == pytest.approx(9 / (1 + 0.1))
    assert satterthwaite((3.0, 0.0), (7, 1)) == pytest.approx(7)


def test_seeds_that_do_not_vary_add_nothing() -> None:
    items = LAYOUTS["documents"]
    row = draw(items, seeds=1)
    crossed, plain = new_seeds_too(np.repeat(row, 5, axis=0), items, seed=0), new_items(row, items, seed=0)
    assert bounds(crossed) == pytest.approx(bounds(plain))
    assert crossed.supports_rank


@pytest.mark.parametrize(("seeds", "known", "ranked"), [(1, False, False), (2, True, False), (4, True, False), (5, True, True)])
def test_no_rank_rests_on_few_seeds(seeds: int, known: bool, ranked: bool) -> None:
    items = LAYOUTS["strata"]
    found = new_seeds_too(draw(items, seeds=seeds), items, seed=0)
    assert (found.is_known, found.supports_rank) == (known, ranked)
    assert new_items(draw(items, seeds=seeds), items, seed=0).supports_rank


@layouts
def test_new_seeds_are_never_surer_than_these(items: Items) -> None:
    for seed in range(20):
        values = draw(items, seeds=3, seed=seed)
        assert new_seeds_too(values, items, seed=0).standard_error >= new_items(values, items, seed=0).standard_error


def test_bad_items_are_refused() -> None:
    with pytest.raises(RequestError, match="clusters of shape"):
        Items(equal_weights(4), clusters=np.zeros(3, dtype=np.int64))
    with pytest.raises(RequestError, match="positive and sum to 1"):
        Items(np.ones(4))
    with pytest.raises(RequestError, match="positive and sum to 1"):
        Items(np.array([1.5, -0.5]))
    with pytest.raises(RequestError, match="two strata"):
        _ = Items(equal_weights(4), np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])).units
    with pytest.raises(RequestError, match="do not fit 4 items"):
        new_items(np.zeros((2, 5)), one_stratum(4), seed=0)
    with pytest.raises(NonFiniteError, match="1 of 4 differences"):
        new_items(np.array([0.0, 1.0, math.nan, 1.0]), one_stratum(4), seed=0)


def test_macro_weights() -> None:
    assert macro_weights(np.array([5, 5, 5, 2])).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


@pytest.mark.parametrize("freedom", [5, 20, math.inf])
def test_smallest_detectable_has_that_power(freedom: float) -> None:
    found = smallest_detectable(0.3, freedom) / 0.3
    if math.isinf(freedom):
        assert found == pytest.approx(1.959964 + 0.841621, abs=1e-5)
    else:
        power = stats.nct.sf(stats.t.ppf(0.975, freedom), freedom, found)
        assert power == pytest.approx(0.8, abs=0.03)


def test_a_plan_meets_what_is_found() -> None:
    """Planned with the deviation and correlation that the data are drawn with."""
    items = in_documents(*[4] * 200)
    generator = np.random.default_rng(0)
    values = np.repeat(generator.normal(0, math.sqrt(0.3), 200), 4) + generator.normal(0, math.sqrt(0.7), 800)
    found = new_items(2 * values, items, seed=0)
    planned = planned_difference(items, deviation=2.0, shared=0.3)
    assert planned == pytest.approx(smallest_detectable(found.standard_error, found.degrees_of_freedom), rel=0.1)


def test_plans_by_hand() -> None:
    expected = smallest_detectable(1 / 10, 99)
    assert planned_difference(one_stratum(100), 1.0, shared=0.0) == pytest.approx(expected)
    assert planned_difference(in_text(100), 1.0) > expected
    assert planned_difference(in_text(100), 1.0, shared=0.0) == pytest.approx(smallest_detectable(1 / 10, 100 / 8 - 1))
    for alone in (in_documents(20), in_strata(1, 1, 1), in_text(15)):
        assert planned_difference(alone, 1.0) == math.inf
    seeds = planned_difference(one_stratum(100), 1.0, shared=0.0, seeds=4, seed_deviation=0.2)
    assert seeds == pytest.approx(smallest_detectable(math.sqrt(0.02), satterthwaite((0.01, 0.01), (3, 99))))
    assert planned_difference(one_stratum(100), 1.0, seed_deviation=0.2) == math.inf


def right(*answers: int) -> NDArray[np.bool_]:
    return np.array(answers, dtype=bool)


def test_mcnemar_by_hand() -> None:
    first = np.repeat(right(1, 0, 1, 0), [10, 2, 30, 8])
    second = np.repeat(right(0, 1, 1, 0), [10, 2, 30, 8])
    found = mcnemar(first, second)
    assert (found.right_to_wrong, found.wrong_to_right, found.asked, found.share) == (10, 2, 50, 0.24)
    assert found.p_value == pytest.approx(float(2 * Fraction(1 + 12 + 66, 2**12)))
    assert mcnemar(second, first).p_value == found.p_value
    assert mcnemar(first, first).p_value == 1
    assert mcnemar(right(1, 0), right(0, 1)).p_value == 1
    with pytest.raises(RequestError, match="not pairs"):
        mcnemar(first, second[:-1])


@pytest.mark.parametrize("split", [(0, 5), (3, 4), (7, 7), (1, 40), (200, 260)])
def test_mcnemar_is_the_binomial_test(split: tuple[int, int]) -> None:
    first = np.repeat(right(1, 0), split)
    assert mcnemar(first, ~first).p_value == pytest.approx(stats.binomtest(split[0], sum(split)).pvalue)


@pytest.mark.parametrize(
    ("successes", "asked", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_newcombe(successes: int, asked: int, low: float, high: float) -> None:
    """Table I of Newcombe, Statistics in Medicine 17 (1998), method 3."""
    assert accuracy_interval(successes, asked) == pytest.approx((low, high), abs=5e-5)
    assert accuracy_interval(asked - successes, asked) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_intervals_of_accuracies() -> None:
    assert accuracy_interval(20, 20)[1] == 1
    assert macro_accuracy_interval([15], [148]) == pytest.approx(accuracy_interval(15, 148))
    low, high = macro_accuracy_interval([4000, 9000], [10000, 12000])
    normal = 1.959964 * math.sqrt(0.4 * 0.6 / 10000 + 0.75 * 0.25 / 12000) / 2
    assert (low, high) == pytest.approx((0.575 - normal, 0.575 + normal), abs=2e-5)
    low, high = macro_accuracy_interval([10, 10], [10, 10])
    assert 0.8 < low < high == 1
    for wrong in ((3, 2), (0, 0), (-1, 5)):
        with pytest.raises(RequestError, match="make no accuracy"):
            accuracy_interval(*wrong)
    with pytest.raises(RequestError, match="at least one"):
        macro_accuracy_interval([], [])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9, 0.4]) == [1.0, 1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]
    assert holm([]) == []
    with pytest.raises(RequestError, match="between 0 and 1"):
        holm([0.1, math.nan])


def test_holm_follows_its_values_not_their_order() -> None:
    values = [0.2, 0.001, 0.012, 0.03, 0.012]
    expected = dict(zip(values, holm(values), strict=True))
    for order in itertools.permutations(values):
        assert holm(order) == [expected[p] for p in order]


def test_rank_intervals_of_a_drawn_table() -> None:
    """a beats c and d, b beats d: a and b are not told apart, nor b and c, nor c and d."""
    ranks = rank_intervals("abcd", [("a", "c"), ("a", "d"), ("b", "d")])
    assert {name: str(interval) for name, interval in ranks.items()} == {"a": "1-2", "b": "1-3", "c": "2-4", "d": "3-4"}
    assert [interval.best for interval in ranks.values()] == [True, True, False, False]
    assert str(RankInterval(2, 2)) == "2"


def test_ranks_of_ties_chains_and_circles() -> None:
    assert set(rank_intervals("abc", []).values()) == {RankInterval(1, 3)}
    chain = rank_intervals("abc", [("a", "b"), ("b", "c"), ("a", "c")])
    assert list(chain.values()) == [RankInterval(1, 1), RankInterval(2, 2), RankInterval(3, 3)]
    circle = rank_intervals("abc", [("a", "b"), ("b", "c"), ("c", "a")])
    assert set(circle.values()) == {RankInterval(2, 2)}
    assert rank_intervals(["alone"], []) == {"alone": RankInterval(1, 1)}
    with pytest.raises(UnknownNameError, match="no row 'z'"):
        rank_intervals("ab", [("a", "z")])
    with pytest.raises(RequestError, match="cannot each"):
        rank_intervals("ab", [("a", "b"), ("b", "a")])
    with pytest.raises(RequestError, match="one name"):
        rank_intervals("aa", [])


def test_a_table_is_ranked_from_its_differences() -> None:
    items = one_stratum(200)
    generator = np.random.default_rng(0)
    shared = generator.normal(size=200)
    values = {name: shared + level + 0.3 * generator.normal(size=200) for name, level in (("a", 0), ("b", 0.01), ("c", 1))}
    differences = {
        (first, second): new_items(values[first] - values[second], items, seed=0)
        for first, second in (("c", "a"), ("a", "b"), ("c", "b"))
    }
    found = rank("abc", differences, higher_is_better=False)
    assert {name: str(interval) for name, interval in found.ranks.items()} == {"a": "1-2", "b": "1-2", "c": "3"}
    assert str(rank("abc", differences, higher_is_better=True).ranks["c"]) == "1"
    assert found.adjusted["a", "b"] == differences["a", "b"].p_value
    assert found == rank("abc", dict(reversed(differences.items())), higher_is_better=False)


def test_a_table_needs_every_pair_once() -> None:
    tie = Difference(0.0, -1.0, 1.0, 1.0, 0.5, 9.0, 0.95)
    assert rank("ab", {("b", "a"): tie}, higher_is_better=True).ranks["a"] == RankInterval(1, 2)
    for pairs in ({("a", "b"): tie}, {("a", "b"): tie, ("b", "a"): tie, ("a", "c"): tie}):
        with pytest.raises(RequestError, match="3 pairs"):
            rank("abc", pairs, higher_is_better=True)
    with pytest.raises(UnknownNameError, match="'z'"):
        rank("ab", {("a", "z"): tie}, higher_is_better=True)
    few = Difference(0.0, -1.0, 1.0, 1.0, 0.5, 9.0, 0.95, supports_rank=False)
    with pytest.raises(RequestError, match="too few seeds"):
        rank("ab", {("a", "b"): few}, higher_is_better=True)

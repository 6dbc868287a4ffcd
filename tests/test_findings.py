"""What the committed records of wiki7m say, as `decisions/0004` and `0006` state it.

A difference counts when the mean difference of log-perplexity over the calibration seeds is at least twice its standard error.
"""

from __future__ import annotations

import math
import statistics
from functools import cache
from pathlib import Path

import pytest

from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore

RESULTS = Path(__file__).parents[1] / "results"
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
WIKITEXT = "perplexity[data=wikitext2,window=512,windows=100]"
C4, DOMAIN = "allenai/c4", "Salesforce/wikitext"


@cache
def records() -> tuple[RunRecord, ...]:
    """The committed records of the suite wiki7m."""
    latest = ResultStore(RESULTS, pytest.fail).latest()
    return tuple(item.record for item in latest if item.record.provenance.suite == "wiki7m" and item.record.status == "ok")


pytestmark = pytest.mark.skipif(
    not list(RESULTS.glob("*/wiki7m/sparsegpt-*.json")), reason="no records of wiki7m are committed"
)


def values(pruner: str, target: str, calibration: str | None) -> list[float]:
    """Log-perplexity on WikiText-2 by seed, of a method of one step."""
    found = {}
    for record in records():
        source = record.spec.recipe.calibration
        is_it = [step.pruner for step in record.steps] == [pruner] and record.steps[0].options.get("ro", True)
        if is_it and record.spec.target == target and (source.name if source else None) == calibration:
            found[record.spec.seed] = math.log(record.scores[WIKITEXT].value)
    assert found, f"no record of {pruner} at {target} calibrated on {calibration}"
    return [found[seed] for seed in sorted(found, key=lambda seed: seed or 0)]


def gain(worse: list[float], better: list[float]) -> tuple[float, float]:
    """The mean difference of log-perplexity, and its standard error; a value without seeds stands against each."""
    count = max(len(worse), len(better))
    differences = [a - b for a, b in zip(worse * (count // len(worse)), better * (count // len(better)), strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)


def better(found: tuple[float, float]) -> bool:
    mean, error = found
    return mean >= 2 * error


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("calibration", [C4, DOMAIN])
def test_sparsegpt_is_better_than_magnitude_and_wanda(target: str, calibration: str) -> None:
    sparsegpt = values("sparsegpt", target, calibration)
    assert len(sparsegpt) == 3
    assert better(gain(values("magnitude", target, None), sparsegpt))
    assert better(gain(values("wanda", target, calibration), sparsegpt))


def test_wanda_plus_plus_is_at_least_eight_percent_better_than_wanda() -> None:
    found = gain(values("wanda", "2:4", C4), values("wanda++", "2:4", C4))
    assert better(found)
    assert math.exp(-found[0]) <= 0.92


def test_the_domain_of_calibration_decides_whether_wanda_beats_magnitude() -> None:
    magnitude = values("magnitude", "0.7", None)
    assert better(gain(magnitude, values("wanda", "0.7", DOMAIN)))
    assert not better(gain(magnitude, values("wanda", "0.7", C4)))

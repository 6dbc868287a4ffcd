"""The speed suite compares equal work: its plain implementation makes the masks of the library. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import SPEED, speed_script
from torch.utils.flop_counter import FlopCounterMode

from prunebench.targets import Unstructured, parse_target
from prunebench.toolkit import keep_mask

run = speed_script("run")
baseline = sys.modules["baseline"]
TINY = run.Shape(layers=2, hidden=64, inner=192, heads=4, vocabulary=128, samples=6, length=24)
"""Wide enough for two slabs, and one that is cut short."""


@pytest.mark.parametrize("case", run.cases(TINY), ids=lambda case: case.name)
def test_both_sides_make_the_same_masks(case: object) -> None:
    found = run.measure(case, 1, lambda: 1e9, {"plain": 3.0, "ours": 2.0})
    assert found.ratios[0] > 0
    assert found.floor_seconds > 0
    assert (found.baseline_mebibytes, found.our_mebibytes) == (3.0, 2.0)


@pytest.mark.parametrize("name", ["wanda 0.5", "sparsegpt 2:4", "gblm 0.5", "wanda++ 2:4", "sweep 0.5"])
def test_other_masks_would_be_noticed(name: str) -> None:
    case = next(case for case in run.cases(TINY) if case.name == name)
    plain, ours = case.plain()(), case.ours()()
    run.differing(case, plain, ours)
    wrong = next(iter(ours))
    with pytest.raises(AssertionError, match="differ"):
        run.differing(case, plain, ours | {wrong: ours[wrong].roll(1, dims=1)})


@pytest.mark.parametrize("target", ["0.5", "0.6", "2:4"])
def test_the_plain_rules_are_those_of_the_library(target: str) -> None:
    """Down to the ties in rows; in groups only without ties, because `topk` breaks them as it likes."""
    wanted = parse_target(target)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(9, (24, 40), generator=generator).float()
    if isinstance(wanted, Unstructured):
        assert torch.equal(baseline.kept_of_rows(scores, wanted.sparsity), keep_mask(scores, wanted, "row"))
    else:
        scores = torch.randperm(24 * 40, generator=generator).view(24, 40).float()
        assert torch.equal(baseline.kept_of_groups(scores, run.as_plain(wanted)), keep_mask(scores, wanted, "row"))


def test_the_plain_sweep_without_correlations_is_magnitude_by_slabs() -> None:
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(0))
    swept, keep = baseline.sweep(weight, baseline.factor(torch.eye(200)), 0.5)
    for slab in (slice(0, 128), slice(128, 200)):
        assert torch.equal(keep[:, slab], keep_mask(weight[:, slab].abs(), Unstructured(0.5), "matrix"))
    assert torch.equal(swept, weight * keep)


def test_operations_are_those_of_the_products() -> None:
    """Against torch's own count, which leaves out attention on a host."""
    prepared = next(case for case in run.cases(TINY) if case.name == "wanda 0.5").ours()
    with FlopCounterMode(display=False) as counter:
        prepared()
    tokens, matrices = TINY.samples * TINY.length, sum(2 * rows * columns for rows, columns in TINY.matrices())
    attention = (2 * TINY.layers - 1) * tokens * 2 * TINY.length * TINY.hidden
    # More than must be: one sequence to see what blocks return, and the last matrix in the first batch, here the only one.
    first = TINY.length * matrices + TINY.layers * tokens * 2 * TINY.hidden * TINY.inner
    assert counter.get_total_flops() == TINY.wanda_operations() - attention + first


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(SPEED)!r}); import run; "
        "run.Shape.__init__.__defaults__ = (1, 32, 64, 2, 64, 2, 8); "
        f"sys.argv = ['run', '--repeats', '2', '--only', 'wanda ', '--json', {str(tmp_path / 'found.json')!r}]; run.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wanda 0.5" in done.stdout
    assert "sparsegpt" not in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [case["case"] for case in found["cases"]] == ["wanda 0.5", "wanda 2:4"]
    assert all(len(case["our_seconds"]) == len(case["baseline_seconds"]) == 2 for case in found["cases"])
    assert (
        all(case["our_mebibytes"] > 0 and case["baseline_mebibytes"] > 0 for case in found["cases"]) or sys.platform != "linux"
    )

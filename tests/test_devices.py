"""What must hold on every device: run here on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from support import make_job, tiny, tokens_of

from prunebench.bench.measure import measured
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import keep_mask
from prunebench.toolkit.placement import Resident, Streaming, place_model
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", [Unstructured(0.6), NM(2, 4), NM(4, 8)], ids=str)
@pytest.mark.parametrize("group", ["row", "matrix"])
def test_masks_are_those_of_the_host(device: str, target: Unstructured | NM, group: str) -> None:
    # Few distinct values: the tie rule decides most entries, and it must not depend on the device.
    scores = torch.randint(0, 9, (37, 64), generator=torch.Generator().manual_seed(0)).float()
    expected = keep_mask(scores, target, group)  # type: ignore[call-overload]
    assert torch.equal(keep_mask(scores.to(device), target, group).cpu(), expected)  # type: ignore[call-overload]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", [Resident, Streaming])
def test_wanda_prunes_as_on_the_host(device: str, placement: type[Resident]) -> None:
    host = make_job(tiny("llama"), tokens_of(), target=NM(2, 4))
    Wanda().prune(host)
    job = make_job(tiny("llama"), tokens_of(), target=NM(2, 4), placement=placement(device))
    place_model(job.model, [block.module for block in job.anatomy.blocks], placement(device))
    Wanda().prune(job)
    for matrix, twin in zip(job.anatomy.matrices, host.anatomy.matrices, strict=True):
        differing = int(((matrix.weight.cpu() == 0) != (twin.weight == 0)).sum())
        assert differing <= max(2, matrix.weight.numel() // 10_000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("placement", [Resident, Streaming])
def test_wanda_plus_plus_draws_and_trains_as_on_the_host(device: str, placement: type[Resident]) -> None:
    pruner = WandaPlusPlus(learning_rate=1e-2, rounds=2, ro_samples=3, restart="dense")
    host = make_job(tiny("llama", torch.float64), tokens_of())
    pruner.prune(host)
    job = make_job(tiny("llama", torch.float64), tokens_of(), placement=placement(device))
    place_model(job.model, [block.module for block in job.anatomy.blocks], placement(device))
    pruner.prune(job)
    for matrix, twin in zip(job.anatomy.matrices, host.anatomy.matrices, strict=True):
        torch.testing.assert_close(matrix.weight.cpu(), twin.weight, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_a_measured_part_has_phases_and_peaks(device: str) -> None:
    job = make_job(tiny("llama"), tokens_of(), placement=Resident(device))
    place_model(job.model, [block.module for block in job.anatomy.blocks], Resident(device))
    with measured(torch.device(device)) as cost:
        Wanda().prune(job)
    assert {"calibration", "statistics", "scoring", "update", "propagation"} <= cost.phases.keys()
    assert all(seconds >= 0 for seconds in cost.phases.values())
    assert cost.peak_host_bytes
    assert (cost.peak_device_bytes is not None) == (device == "cuda")

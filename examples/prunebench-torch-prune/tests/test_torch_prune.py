"""torch's global L1 against one sort of all entries in float64, and the conformance kit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from prunebench_torch_prune import TorchL1

from prunebench.spec import Pruner
from prunebench.targets import NM, Unstructured
from prunebench.testing import make_job, parametrize_with_checks, tiny_model


@parametrize_with_checks([TorchL1])
def test_conformance(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
@pytest.mark.parametrize("share", [0.0, 0.29, 0.5, 0.75])
def test_against_one_sort(family: str, share: float) -> None:
    model = tiny_model(family)
    job = make_job(TorchL1(), model, Unstructured(share))
    sizes = np.concatenate([np.abs(matrix.weight.double().numpy()).ravel() for matrix in job.anatomy.matrices])
    wanted = np.ones(sizes.size, dtype=bool)
    wanted[np.argsort(sizes, kind="stable")[: int(sizes.size * share)]] = False
    TorchL1().prune(job)
    found = np.concatenate([(matrix.weight != 0).numpy().ravel() for matrix in job.anatomy.matrices])
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_nothing_is_left(family: str) -> None:
    model = tiny_model(family)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    job = make_job(TorchL1(), model)
    TorchL1().prune(job)
    assert [*before.items()] == [(name, id(parameter)) for name, parameter in model.named_parameters()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(model.state_dict()) == list(tiny_model(family).state_dict())


def test_patterns_are_refused() -> None:
    facts = make_job(TorchL1(), tiny_model()).anatomy
    assert TorchL1().refuses(facts.facts(NM(2, 4))) == (  # type: ignore[attr-defined]
        "torch.nn.utils.prune.global_unstructured knows no patterns such as 2:4."
    )
    assert TorchL1().refuses(facts.facts(Unstructured(0.5))) is None  # type: ignore[attr-defined]

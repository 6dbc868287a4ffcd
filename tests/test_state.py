"""The guard around a step: global state is as it was, and what was left changed is named."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from prunebench.toolkit.state import capture, differences, guarded, restore

backends = torch.backends


@pytest.fixture(autouse=True)
def _untouched() -> Iterator[None]:
    """Whatever a test here does to the state, the next test does not see it."""
    before = capture()
    yield
    restore(before)


def use_newer_interface() -> None:
    backends.cuda.matmul.fp32_precision = "tf32"


def use_newest_interface() -> None:
    backends.fp32_precision = "tf32"


def round_on_the_cpu() -> None:
    backends.mkldnn.matmul.fp32_precision = "bf16"


def allow_in_products() -> None:
    backends.cuda.matmul.allow_tf32 = True


def forbid_in_cudnn() -> None:
    backends.cudnn.allow_tf32 = False


def forbid_in_convolutions() -> None:
    backends.cudnn.conv.fp32_precision = "ieee"


DEEDS: dict[str, tuple[Callable[[], object], str]] = {
    "random.random": (random.random, "Python's random generator"),
    "random.seed": (lambda: random.seed(1), "Python's random generator"),
    "numpy.random": (lambda: np.random.rand(3), "numpy's random generator"),
    "torch.rand": (lambda: torch.rand(3), "torch's random generator"),
    "torch.manual_seed": (lambda: torch.manual_seed(1), "torch's random generator"),
    "grad mode": (lambda: torch.set_grad_enabled(False), "grad mode"),
    "TF32 in products": (allow_in_products, "TF32 in products"),
    "precision high": (lambda: torch.set_float32_matmul_precision("high"), "TF32 in products"),
    "precision medium": (lambda: torch.set_float32_matmul_precision("medium"), "TF32 in products"),
    "precision by the newer interface": (use_newer_interface, "TF32 in products"),
    "precision of everything": (use_newest_interface, "TF32 in products"),
    "bfloat16 products on the CPU": (round_on_the_cpu, "TF32 in products"),
    "TF32 in cuDNN": (forbid_in_cudnn, "TF32 in cuDNN"),
    "TF32 in convolutions": (forbid_in_convolutions, "TF32 in cuDNN"),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), "deterministic algorithms"),
    "deterministic, warning": (lambda: torch.use_deterministic_algorithms(True, warn_only=True), "deterministic algorithms"),
    "the default dtype": (lambda: torch.set_default_dtype(torch.float64), "the default dtype"),
    "threads": (lambda: torch.set_num_threads(3), "the number of threads"),
}
EVERY_DEED = pytest.mark.parametrize(("deed", "name"), DEEDS.values(), ids=DEEDS)


def readable(read: Callable[[], object]) -> object:
    """None where PyTorch's older interface of precision contradicts the newer one."""
    try:
        return read()
    except RuntimeError:
        return None


def precision() -> list[str]:
    """By the newer interface, which can always be read."""
    parts = (backends, backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    return [part.fp32_precision.replace("none", "ieee") for part in parts]


def observable() -> list[object]:
    """What the state does, looked at without the module under test. Draws random numbers."""
    return [
        random.random(),
        float(np.random.rand()),
        float(torch.rand(())),
        torch.is_grad_enabled(),
        readable(torch.get_float32_matmul_precision),
        readable(lambda: backends.cuda.matmul.allow_tf32),
        readable(lambda: backends.cudnn.allow_tf32),
        *precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    ]


def seed_everything() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)


def test_precision_of_all_of_cuda() -> None:
    """First in this file: it reaches products only in a process in which theirs was never set."""
    expected = observable()[3:]
    changed: list[str] = []
    with guarded(changed):
        backends.cudnn.fp32_precision = "tf32"
    assert changed in (["TF32 in products"], [])
    assert observable()[3:] == expected


def test_guards_inside_guards() -> None:
    outer: list[str] = []
    inner: list[str] = []
    with guarded(outer):
        with guarded(inner):
            torch.set_default_dtype(torch.float64)
            torch.set_float32_matmul_precision("high")
        random.random()
    assert sorted(inner) == ["TF32 in products", "the default dtype"]
    assert outer == ["Python's random generator"]


@EVERY_DEED
def test_what_is_left_changed_is_named_and_restored(deed: Callable[[], object], name: str) -> None:
    seed_everything()
    expected = observable()
    seed_everything()
    changed: list[str] = []
    with guarded(changed):
        deed()
    assert changed == [name]
    assert observable() == expected


@EVERY_DEED
def test_also_after_an_error(deed: Callable[[], object], name: str) -> None:
    seed_everything()
    expected = observable()
    seed_everything()
    changed: list[str] = []

    def step() -> None:
        with guarded(changed):
            deed()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert changed == [name]
    assert observable() == expected


@EVERY_DEED
def test_what_was_so_before_stays_so(deed: Callable[[], object], name: str) -> None:
    """A user's own settings are no change, and are not undone."""
    seed_everything()
    deed()
    expected = observable()
    seed_everything()
    deed()
    changed: list[str] = []
    with guarded(changed):
        pass
    assert changed == []
    assert observable() == expected


@pytest.mark.parametrize("own", [name for name, (_, kind) in DEEDS.items() if kind.startswith("TF32")])
def test_precision_is_as_the_user_set_it(own: str) -> None:
    DEEDS[own][0]()
    expected = precision()
    for deed, kind in DEEDS.values():
        if kind.startswith("TF32"):
            with guarded([]):
                deed()
            assert precision() == expected


@pytest.mark.parametrize("warn_only", [False, True])
def test_determinism_is_as_the_user_set_it(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    changed: list[str] = []
    with guarded(changed):
        torch.use_deterministic_algorithms(True, warn_only=not warn_only)
    assert changed == ["deterministic algorithms"]
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only


def test_a_step_that_puts_everything_back() -> None:
    changed: list[str] = []
    with guarded(changed):
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.rand(3)
        kept = random.getstate()
        random.random()
        random.setstate(kept)
    assert changed == []


def test_everything_at_once() -> None:
    seed_everything()
    expected = observable()
    seed_everything()
    changed: list[str] = []
    with guarded(changed):
        for deed, _ in DEEDS.values():
            deed()
    assert set(changed) == {name for _, name in DEEDS.values()}
    assert len(changed) == len(set(changed))
    assert observable() == expected


def test_settings_of_precision_in_any_order() -> None:
    """PyTorch's older settings cannot be read while the newer ones contradict them; the guard must not fall over that."""
    deeds = [deed for deed, name in DEEDS.values() if name.startswith("TF32")]
    expected = observable()[3:]
    for first, second in itertools.permutations(deeds, 2):
        changed: list[str] = []
        with guarded(changed):
            first()
            second()
        assert set(changed) <= {"TF32 in products", "TF32 in cuDNN"}
        assert observable()[3:] == expected


def test_differences_of_whatever_a_state_may_hold() -> None:
    state = {"tensor": torch.zeros(2), "array": np.zeros(2), "dict": {"a": np.zeros(2)}, "none": None, "number": 1}
    assert differences(state, {**state, "tensor": torch.zeros(2), "dict": {"a": np.zeros(2)}}) == []
    others = {"tensor": None, "array": np.ones(2), "dict": {"a": np.ones(2)}, "none": 0, "number": 2}
    assert differences(state, others) == list(state)
    assert differences({"dict": {"a": 1}}, {"dict": {"b": 1}}) == ["dict"]
    assert differences({"x": None}, {"x": torch.zeros(1)}) == ["x"]

"""Global state that a step must leave as it found it: random generators, grad mode, TF32, default dtype, threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_PRODUCTS: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
_CUDNN: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]


def capture() -> dict[str, Any]:
    """The present state, by name."""
    return {
        "Python's random generator": random.getstate(),
        "numpy's random generator": np.random.get_state(legacy=False),
        "torch's random generator": torch.get_rng_state(),
        "the device's random generator": _device_generator(),
        "grad mode": torch.is_grad_enabled(),
        "TF32 in products": (_older(torch.get_float32_matmul_precision), *map(_newer, _PRODUCTS)),
        "TF32 in cuDNN": (_older(lambda: torch.backends.cudnn.allow_tf32), *map(_newer, _CUDNN)),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "the default dtype": torch.get_default_dtype(),
        "the number of threads": torch.get_num_threads(),
    }


def restore(state: dict[str, Any]) -> None:
    """Put a captured state back."""
    random.setstate(state["Python's random generator"])
    np.random.set_state(state["numpy's random generator"])
    torch.set_rng_state(state["torch's random generator"])
    if state["the device's random generator"] is not None:
        torch.cuda.set_rng_state(state["the device's random generator"])
    torch.set_grad_enabled(state["grad mode"])
    _restore_precision(state["TF32 in products"], state["TF32 in cuDNN"])
    torch.set_deterministic_debug_mode(state["deterministic algorithms"])
    torch.set_default_dtype(state["the default dtype"])
    if torch.get_num_threads() != state["the number of threads"]:
        torch.set_num_threads(state["the number of threads"])


def generators() -> dict[str, Any]:
    """The states of all random generators, as `json` can write them."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    device = _device_generator()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
        "device": None if device is None else device.tolist(),
    }


def set_generators(states: dict[str, Any]) -> None:
    """Put all random generators into states that `generators` gave."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if states["device"] is not None:
        torch.cuda.set_rng_state(torch.tensor(states["device"], dtype=torch.uint8))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name, value in before.items() if not _same(value, after[name])]


@contextmanager
def guarded(changed: list[str]) -> Iterator[None]:
    """Restore the state afterwards, and add to `changed` the names of what was left changed."""
    before = capture()
    try:
        yield
    finally:
        changed += differences(before, capture())
        restore(before)


def _older(read: Callable[[], Any]) -> Any:
    """A setting of PyTorch's older interface, or None: it cannot be read once the newer one disagrees with it."""
    try:
        return read()
    except RuntimeError:
        return None


def _newer(part: Any) -> str:
    """A setting of the newer interface; where it was never set, what that means."""
    return str(part.fp32_precision).replace("none", "ieee")


def _restore_precision(products: tuple[Any, ...], cudnn: tuple[Any, ...]) -> None:
    """The older settings first: they overwrite the newer ones."""
    _PRODUCTS[0].fp32_precision = "none"
    if products[0] is not None:
        torch.set_float32_matmul_precision(products[0])
    if cudnn[0] is not None:
        torch.backends.cudnn.allow_tf32 = cudnn[0]
    for part, precision in zip(_PRODUCTS + _CUDNN, products[1:] + cudnn[1:], strict=True):
        part.fp32_precision = precision


def _device_generator() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)

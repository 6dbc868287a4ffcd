"""Synthetic records of shapes, for tests of the board's costs: seconds and floors of a 7B LLaMA on a GPU, made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from support import C4_TEXT, make_record, make_spec

from prunebench.results.records import Recipe, RunRecord, StepRecord, TextSpec

RANDOM_TEXT = TextSpec(name="random", config="", split="", origin="file", content="r" * 16, complete=True)
MACHINE, DEVICE = "intel-xeon-16c-nvidia-h200-x1", "NVIDIA H200"
GIB = 1 << 30

PASS = {"statistics": (4.2, 3.0), "propagation": (4.5, 4.1)}
CHOICE = {"scoring": (0.9, 0.004), "update": (0.05, 0.004)}
METHODS: Mapping[str, Mapping[str, tuple[float, float | None]]] = {
    "wanda": {**PASS, **CHOICE, "calibration": (0.2, None), "other": (1.0, None)},
    "sparsegpt": {**PASS, "statistics": (14.0, 9.1), "scoring": (2.0, None), "update": (22.0, 5.5), "other": (1.0, None)},
    "wanda++": {**PASS, **CHOICE, "statistics": (40.0, 21.0), "training": (25.0, 11.0), "other": (2.0, None)},
    "gblm": {**PASS, **CHOICE, "statistics": (60.0, 35.0), "other": (1.0, None)},
    "magnitude": {"scoring": (1.1, 0.004), "update": (0.06, 0.004), "other": (0.3, None)},
}
TRAINED = "magnitude + perp[batch=1,steps=55]"


def step(name: str, phases: Mapping[str, tuple[float, float | None]], **changes: Any) -> StepRecord:
    """A step with seconds and floor by phase."""
    fields: dict[str, Any] = {
        "pruner": name,
        "options": {},
        "revision": 1,
        "distribution": "prunebench",
        "version": "0.1.0",
        "phases": {phase: found for phase, (found, _) in phases.items()},
        "floors": {phase: floor for phase, (_, floor) in phases.items() if floor is not None},
        "peak_device_bytes": 18 * GIB,
        "peak_host_bytes": 3 * GIB,
        "host_peak_sampled": False,
    }
    return StepRecord(**fields | changes)


def cost_record(
    method: str = "wanda",
    target: str = "0.5",
    *,
    shape: str | None = "llama-2-7b",
    steps: Sequence[StepRecord] | None = None,
    seed: int | None = 0,
    samples: int = 128,
    length: int = 2048,
    machine: str = MACHINE,
    device: str = DEVICE,
    **changes: Any,
) -> RunRecord:
    """A run without evaluations; of a real model where no shape is named."""
    text = RANDOM_TEXT if shape else C4_TEXT
    reads = method.partition("[")[0] not in ("magnitude", "dense", "random") and " + " not in method
    recipe = Recipe(calibration=text, sampler="random-v1", samples=samples, length=length) if reads else Recipe()
    spec = make_spec(
        method, target, seed if reads else None, model=f"{shape} (random weights)" if shape else "tiny", recipe=recipe
    )
    source = f"shape:{shape}" if shape else "local"
    spec = spec.model_copy(
        update={"evals": (), "model": spec.model.model_copy(update={"source": source, "dtype": "bfloat16"}), "recipe": recipe}
    )
    made = steps if steps is not None else [step(method, METHODS[method])]
    record = make_record(spec, machine=machine, suite="speed-7b", steps=list(made), **changes)
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"device": device})})


def trained_record(target: str = "0.5", seconds: float = 0.4, measured: int = 50, **changes: Any) -> RunRecord:
    """Magnitude, then so many timed steps of retraining after five of warm-up."""
    pace = {"steps": 5 + measured, "after": 5, "seconds": seconds}
    training = {"training": (seconds * measured + 4.0, 0.25 * measured)}
    perp = step("perp", training, notes={"seconds a training step": pace}, peak_device_bytes=70 * GIB)
    return cost_record(TRAINED, target, steps=[step("magnitude", METHODS["magnitude"]), perp], **changes)


def costs_of_7b() -> list[RunRecord]:
    """All methods at two targets."""
    made = [cost_record(method, target) for method in METHODS for target in ("0.5", "2:4")]
    return [*made, trained_record("0.5"), trained_record("2:4", shared_machine=True)]

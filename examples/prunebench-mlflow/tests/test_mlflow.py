"""What is logged of a record, with a stand-in for MLflow."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import prunebench_mlflow
import pytest

RECORD: dict[str, Any] = {
    "id": "3f2a3f2a3f2a",
    "machine": "box",
    "status": "ok",
    "reason": None,
    "spec": {
        "model": {"name": "tiny"},
        "steps": [{"text": "wanda"}, {"text": "perp[subset=norms]"}],
        "target": "2:4",
        "seed": 0,
        "recipe": {"calibration": {"name": "c4"}, "training_tokens": None},
    },
    "steps": [
        {"phases": {"scoring": 1.5, "other": 0.5}, "peak_device_bytes": None, "peak_host_bytes": 300},
        {"phases": {"training": 3.0}, "peak_device_bytes": 70, "peak_host_bytes": 900},
    ],
    "audit": {"sparsity_prunable": 0.5, "sparsity_total": 0.4},
    "scores": {
        "perplexity[data=c4,window=256]": {"value": 12.5, "parts": {}},
        "zero_shot": {"value": None, "parts": {"rte": 0.5}},
    },
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What MLflow was asked for."""
    found: list[tuple[str, Any]] = []
    stand_in = ModuleType("mlflow")

    @contextlib.contextmanager
    def start_run(run_name: str) -> Iterator[None]:
        found.append(("start_run", run_name))
        yield
        found.append(("end_run", None))

    stand_in.start_run = start_run  # type: ignore[attr-defined]
    for name in ("set_experiment", "set_tags", "log_params", "log_metrics"):
        setattr(stand_in, name, lambda given, name=name: found.append((name, given)))
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    return found


def test_a_record_is_a_run(calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    prunebench_mlflow.prunebench_record(record=RECORD)
    assert [name for name, _ in calls] == ["set_experiment", "start_run", "set_tags", "log_params", "log_metrics", "end_run"]
    told = dict(calls)
    assert told["set_experiment"] == "prunebench"
    assert told["start_run"] == "wanda + perp[subset=norms] 2:4 3f2a3f2a3f2a"
    assert told["log_params"] == {
        "model": "tiny",
        "method": "wanda + perp[subset=norms]",
        "target": "2:4",
        "seed": "0",
        "calibration": "c4",
        "machine": "box",
    }
    assert told["log_metrics"] == {
        "prune seconds": 5.0,
        "peak bytes": 300,
        "sparsity_prunable": 0.5,
        "sparsity_total": 0.4,
        "perplexity data c4 window 256": 12.5,
        "zero_shot rte": 0.5,
    }


def test_a_failure_is_a_run_too(calls: list[tuple[str, Any]]) -> None:
    failed = {"status": "failed", "reason": "out of memory", "steps": [], "audit": None, "scores": {}}
    prunebench_mlflow.prunebench_record(record=RECORD | failed)
    assert dict(calls)["set_tags"]["reason"] == "out of memory"
    assert dict(calls)["log_metrics"] == {"prune seconds": 0}


def test_without_mlflow_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    prunebench_mlflow.prunebench_record(record=RECORD)

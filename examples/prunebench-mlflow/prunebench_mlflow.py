"""Each record of a sweep as a run of MLflow: method, target and conditions as parameters, scores and costs as metrics.

Where MLflow keeps runs is its own affair (`MLFLOW_TRACKING_URI`); the experiment is called `prunebench` unless
`MLFLOW_EXPERIMENT_NAME` says otherwise. Without MLflow installed nothing happens.
"""

from __future__ import annotations

import os
import re
from typing import Any

from prunebench.spec import hookimpl

api_version = 1

MOST_CHARACTERS = 500
"""Of a parameter: as many as every version of MLflow takes."""


def logged(record: dict[str, Any]) -> tuple[dict[str, str], dict[str, float]]:
    """The parameters and metrics of a record."""
    spec, recipe = record["spec"], record["spec"]["recipe"]
    parameters = {
        "model": spec["model"]["name"],
        "method": " + ".join(step["text"] for step in spec["steps"]),
        "target": spec["target"],
        "seed": spec["seed"],
        "calibration": (recipe["calibration"] or {}).get("name"),
        "training_tokens": recipe["training_tokens"],
        "machine": record["machine"],
    }
    metrics = {"prune seconds": sum(sum(step["phases"].values()) for step in record["steps"])}
    peaks = [step["peak_device_bytes"] or step["peak_host_bytes"] for step in record["steps"]]
    metrics |= {"peak bytes": max(filter(None, peaks))} if any(peaks) else {}
    metrics |= {name: record["audit"][name] for name in ("sparsity_prunable", "sparsity_total")} if record["audit"] else {}
    for name, score in record["scores"].items():
        for part, value in {"": score["value"], **score["parts"]}.items():
            if value is not None:
                metrics[re.sub(r"[^\w./ -]+", " ", f"{name} {part}").strip()] = value  # as MLflow wants names
    return {name: str(value)[:MOST_CHARACTERS] for name, value in parameters.items() if value is not None}, metrics


@hookimpl
def prunebench_record(record: dict[str, Any]) -> None:
    try:
        import mlflow
    except ImportError:
        return
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "prunebench"))
    parameters, metrics = logged(record)
    name = f"{parameters['method']} {parameters['target']} {record['id']}"
    reason = str(record["reason"] or "")
    with mlflow.start_run(run_name=name[:MOST_CHARACTERS]):
        mlflow.set_tags({"id": record["id"], "status": record["status"], "reason": reason[:MOST_CHARACTERS]})
        mlflow.log_params(parameters)
        mlflow.log_metrics(metrics)

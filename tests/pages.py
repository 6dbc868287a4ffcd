"""Records enough for a whole page: models, targets, methods, seeds, several scores each, and what did not work."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from support import C4_TEXT, CONDITIONS, make_record, make_spec

from prunebench.report.figures import Figures, figures_of
from prunebench.report.page import to_html
from prunebench.results.beside import Beside
from prunebench.results.board import Board, build_board
from prunebench.results.records import AuditRecord, EvalSpec, MatrixAudit, Recipe, RunRecord, SampleRecord, ScoreRecord
from prunebench.results.store import Stored

ROLES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ROLES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
METHODS = (
    "magnitude",
    "wanda",
    "sparsegpt",
    "gblm",
    "wanda++[learning_rate=0.0003]",
    "wanda++[ro=false]",
    "wanda + dsnot",
    "ria",
    "wanda + perp[steps=60,learning_rate=0.003,precision=bfloat16,mode=reconstruct]",
    "their-method[share=0.25]",
)
TARGETS = ("0.5", "0.6", "0.7", "2:4", "4:8")
TRAINED = "magnitude + perp[subset=scale_lora,steps=60,learning_rate=0.003,precision=bfloat16]"
C4 = CONDITIONS | {"data": "allenai/c4", "config": "en", "split": "validation", "content": "8899aabbccddeeff", "window": 256}
TRAINING = Recipe(
    calibration=C4_TEXT, sampler="documents-v1", samples=128, length=512, training=C4_TEXT, training_tokens=409600
)


def run_of(
    method: str, target: str, seed: int | None, *, model: str = "tiny", machine: str = "box", **changes: Any
) -> RunRecord:
    """A run with two perplexities, matrices, notes and costs that are never the same twice."""
    recipe = TRAINING if "perp[subset" in method else None
    spec = make_spec(
        method,
        target,
        seed,
        model=model,
        recipe=recipe,
        more_evals=[EvalSpec(text="perplexity[data=c4,window=256]", revision=1, conditions=C4)],
    )
    weights = hashlib.sha256(model.encode()).hexdigest()[:16]
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"weights": weights})})
    dice = random.Random(f"{method} {target} {seed} {model} {machine}")
    sparsity = 0.0 if target == "dense" else 0.5 if ":" in target else float(target)
    harm = 1 + sparsity**3 * (1 + METHODS.index(method) / 5 if method in METHODS else 0.5)
    record = make_record(
        spec,
        machine=machine,
        seconds=round(dice.uniform(0.1, 90), 6),
        sparsity=sparsity,
        peak_host_bytes=int(dice.uniform(3e8, 9e8)),
        shared_machine=dice.random() < 0.2,
        suite="wiki7m",
    )
    if changes.get("status", "ok") != "ok":
        return make_record(spec, machine=machine, **changes)
    scores = {asked.text: _score(asked, 60 * harm, dice) for asked in spec.evals}
    matrices = [_matrix(block, role, sparsity, dice) for block in range(8) for role in ROLES]
    audit = record.audit or AuditRecord.model_construct()
    step = record.steps[0]
    steps = [
        step.model_copy(
            update={
                "phases": {
                    name: round(step.seconds / 6, 6) for name in ("calibration", "statistics", "scoring", "update", "other")
                }
                | {"training" if recipe else "propagation": round(step.seconds / 6, 6)},
                "notes": {"loss_curve": [round(dice.uniform(3, 4), 5) for _ in range(30)], "swapped": dice.randrange(10**6)},
            }
        )
    ]
    made = record.provenance.model_copy(
        update={"command": "prunebench run wiki7m --results …/out", "seconds": round(dice.uniform(10, 400), 3)}
        | {"packages": {"torch": "2.13.0", "transformers": "5.23.0", "numpy": "2.4.6"}}
    )
    whole = {"scores": scores, "audit": audit.model_copy(update={"matrices": matrices}), "steps": steps, "provenance": made}
    return record.model_copy(update=whole | changes)


def _score(asked: EvalSpec, value: float, dice: random.Random) -> ScoreRecord:
    losses = [round(float(np.log(value)) + dice.gauss(0, 0.02), 6) for _ in range(12)]
    return ScoreRecord(
        value=float(np.exp(np.mean(losses))),
        unit="perplexity",
        higher_is_better=False,
        seconds=1.5,
        conditions=asked.conditions,
        sample=SampleRecord(column="nll", exponential=True, documents="document"),
        items={"nll": list(losses), "document": [index // 2 for index in range(12)]},
    )


def _matrix(block: int, role: str, sparsity: float, dice: random.Random) -> MatrixAudit:
    removed = int(4096 * sparsity) + dice.randrange(9) * (sparsity > 0)
    return MatrixAudit(name=f"model.layers.{block}.{role}", shape=(64, 64), removed=removed, zeros=removed)


def many(count: int) -> list[RunRecord]:
    """So many runs of several models; the last ones of each model failed or refused."""
    found: list[RunRecord] = []
    for model in ("tiny", "small", "middle", "large"):
        found += [run_of("dense", "dense", None, model=model), run_of("dense" + TRAINED[9:], "dense", 0, model=model)]
        found += [run_of(TRAINED, "2:4", seed, model=model) for seed in (0, 1, 2)]
        for target in TARGETS:
            for method in METHODS:
                seeds: Sequence[int | None] = (None,) if method == "magnitude" else (0, 1, 2)
                found += [run_of(method, target, seed, model=model) for seed in seeds]
        found.append(run_of("gblm", "0.9", 0, model=model, status="failed", kind="oom", reason="out of memory in block 3"))
        found.append(run_of("wanda", "8:16", 0, model=model, status="refused", reason="its widths are no multiples of 16"))
    return found[:count]


def board_of(records: Sequence[RunRecord]) -> Board:
    """Of records without a folder."""
    return build_board([Stored(f"{r.machine}/{r.spec.model.name}/{r.spec.file_stem}.json", r) for r in records])


def figures(board: Board, records: Sequence[RunRecord], placed: Sequence[Beside] = ()) -> Figures:
    """Of records without masks."""
    return figures_of(board, records, placed, lambda _: None)


def page_of(records: Sequence[RunRecord], placed: Sequence[Beside] = ()) -> str:
    """The page of these records."""
    board = board_of(records)
    return to_html(board, records, figures(board, records, placed), placed)

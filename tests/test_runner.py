"""One run in this process: what its record says when it goes well, and how failures are told apart."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import Bench, cases, changed, fingerprint, tree
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, PreTrainedModel

import prunebench
from prunebench.bench import runner
from prunebench.errors import NonFiniteError, Refused, RunError
from prunebench.results.records import SCHEMA, RunRecord
from prunebench.spec import Changes, Eval, EvalFacts, EvalJob, Job, JobFacts, Needs, Pruner, Sample, Score, option
from prunebench.targets import Unstructured
from prunebench.toolkit import keep_mask, magnitude_scores, phase, walk
from prunebench.toolkit.quiet import quiet_transformers

Register = Callable[..., None]


def halve(job: Job) -> None:
    """Meet the target by magnitude, row by row."""
    for block in walk(job):
        for matrix in block.matrices:
            matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))


def stranger(
    prune: Callable[[Job], None] = halve,
    name: str = "stranger",
    needs: Needs = Needs.WEIGHTS,
    changes: Changes = Changes.MASK_GROWS,
    refuses: Callable[[JobFacts], str | None] = lambda facts: None,
) -> type[Pruner]:
    """A pruner that does as told."""

    @dataclass
    class Stranger(Pruner):
        """A stranger's."""

    Stranger.name = name
    Stranger.prune = lambda self, job: prune(job)  # type: ignore[method-assign]
    Stranger.needs = lambda self: needs  # type: ignore[method-assign]
    Stranger.changes = lambda self: changes  # type: ignore[method-assign]
    Stranger.refuses = lambda self, facts: refuses(facts)  # type: ignore[method-assign]
    Stranger.__abstractmethods__ = frozenset()
    return Stranger


def raising(error: BaseException) -> Callable[[Job], None]:
    """What a pruner does that fails."""

    def prune(job: Job) -> None:
        raise error

    return prune


class Watched:
    """The runner, with a look at the models it loads."""

    def __init__(self, bench: Bench, folder: Path, register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bench, self._folder, self._register = bench, folder, register
        self.models: list[PreTrainedModel] = []
        self.before: list[dict[str, torch.Tensor]] = []
        self.seen: list[tuple[str, int, int]] = []
        load = runner.load_model

        def noted(*args: Any) -> PreTrainedModel:
            model = load(*args)
            self.models.append(model)
            self.before.append(fingerprint(model))
            return model

        monkeypatch.setattr(runner, "load_model", noted)

    def __call__(self, method: str, *classes: type, **changes: Any) -> RunRecord:
        """Register the classes, plan the one run of the method, and do it."""
        self._register(*classes)
        (request,) = self._bench.requests(self._folder, method, **changes)
        record = runner.run(request, lambda *call: self.seen.append(call), "inline")
        assert record.id == request.spec.id
        # Whatever came out can be written and read again.
        assert RunRecord.model_validate_json(record.model_dump_json(by_alias=True)) == record
        assert record.to_json()
        return record

    @property
    def untouched(self) -> bool:
        """Whether the last model is as it was loaded."""
        return not changed(self.models[-1], self.before[-1])


@pytest.fixture
def run(bench: Bench, tmp_path: Path, register: Register, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(bench, tmp_path, register, monkeypatch)


# A run that goes well


def test_a_good_run_fills_every_field(run: Watched, bench: Bench) -> None:
    record = run("wanda", seeds=[3], targets=["2:4"])
    assert (record.status, record.reason, record.failure) == ("ok", None, None)
    assert (record.machine, record.schema_) == ("here", SCHEMA)
    spec = record.spec
    assert (spec.model.name, spec.model.dtype, spec.model.source) == ("tiny", "float32", "local")
    assert (spec.method, spec.target, spec.seed) == ("wanda", "2:4", 3)
    assert spec.recipe.calibration is not None
    assert (spec.recipe.calibration.name, spec.recipe.calibration.origin) == ("calibration.txt", "file")
    assert (spec.recipe.sampler, spec.recipe.samples, spec.recipe.length) == ("documents-v1", 4, 16)
    assert spec.calibration_tokens is not None
    (step,) = record.steps
    assert (step.pruner, step.options, step.revision, step.distribution) == ("wanda", {}, 1, "prunebench")
    assert step.version
    assert step.notes == {}
    assert step.peak_device_bytes is None
    assert step.peak_host_bytes is not None
    assert step.peak_host_bytes > 50 << 20
    assert record.audit is not None
    weights = [tensor for name, tensor in load_file(bench.model / "model.safetensors").items() if "proj" in name]
    assert len(record.audit.matrices) == len(weights) == 14
    assert record.audit.removed == record.audit.zeros == sum(tensor.numel() for tensor in weights) // 2
    assert record.audit.extra_zeros == 0
    assert record.audit.sparsity_prunable == 0.5
    assert 0.1 < record.audit.sparsity_total < 0.5
    assert 0.9 < record.audit.coverage < 1.0
    for matrix in record.audit.matrices:
        assert matrix.removed == matrix.zeros == matrix.shape[0] * matrix.shape[1] // 2
    score = record.scores["perplexity"]
    assert score.value == pytest.approx(math.exp(sum(score.items["nll"]) / 4), rel=1e-5)  # type: ignore[arg-type]
    assert (score.unit, score.higher_is_better) == ("perplexity", False)
    assert (score.conditions["window"], score.conditions["windows"]) == (16, 4)
    assert len(score.items["nll"]) == len(score.items["document"]) == 4
    assert score.seconds > 0
    made = record.provenance
    assert (made.suite, made.command, made.executor) == ("small", "prunebench run small.toml", "inline")
    assert (made.threads, made.batch_size) == (1, 4)
    assert {"prunebench", "torch", "transformers", "numpy"} <= made.packages.keys()
    assert made.packages["torch"] == torch.__version__
    assert made.device
    assert made.platform.startswith("Linux")
    assert made.started.endswith("+00:00")
    assert made.seconds >= record.prune_seconds + score.seconds


def test_the_score_is_that_of_the_pruned_model(run: Watched, bench: Bench) -> None:
    """Computed once more, the plain way, from the model that the run left."""
    record = run("magnitude")
    assert any(bool((tensor == 0).any()) for name, tensor in run.models[-1].named_parameters() if "proj" in name)
    text = bench.evaluation.read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(bench.model)(text)["input_ids"][:64]).view(4, 16)
    with torch.no_grad():
        losses = [float(run.models[-1](input_ids=window[None], labels=window[None]).loss) for window in ids]
    assert record.scores["perplexity"].value == pytest.approx(math.exp(sum(losses) / 4), rel=1e-5)
    assert record.scores["perplexity"].items["nll"] == pytest.approx(losses, rel=1e-5)


def test_dense_is_the_model_as_it_is(run: Watched) -> None:
    record = run("dense")
    assert record.status == "ok"
    assert run.untouched
    assert record.audit is not None
    assert (record.audit.removed, record.audit.zeros, record.audit.sparsity_total, record.audit.coverage) == (0, 0, 0.0, 0.0)


def test_progress_tells_load_steps_audit_and_evaluations(run: Watched) -> None:
    run("magnitude")
    subjects = list(dict.fromkeys(what for what, _, _ in run.seen))
    assert [what.partition("[")[0] for what in subjects] == [
        "load",
        "step magnitude",
        "block",
        "audit",
        "eval perplexity",
        "window",
    ]
    assert run.seen[-1] == ("window", 4, 4)


def test_a_method_without_data_and_chance_runs_once_and_has_no_seed(bench: Bench, tmp_path: Path) -> None:
    seeds = [
        request.spec.seed for request in bench.requests(tmp_path, "magnitude", "dense", "random", "wanda", seeds=[0, 1, 2])
    ]
    assert seeds == [None, None, 0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("needs", "given"),
    [(Needs.WEIGHTS, 0), (Needs.WEIGHTS | Needs.SEED, 5), (Needs.CALIBRATION, 0), (Needs.CALIBRATION | Needs.SEED, 5)],
    ids=str,
)
def test_only_who_declares_a_seed_gets_the_runs(needs: Needs, given: int, run: Watched) -> None:
    """Calibration text is drawn by the run's seed; a method that draws nothing must not depend on it in another way."""
    seen = []
    record = run("stranger", stranger(lambda job: (seen.append(job.seed), halve(job))[0], needs=needs), seeds=[5])
    assert record.status == "ok"
    assert seen == [given]


def test_seeds_draw_different_calibration_and_the_same_seed_the_same(bench: Bench, tmp_path: Path) -> None:
    one, other = bench.requests(tmp_path, "wanda", seeds=[0, 1])
    (again,) = bench.requests(tmp_path, "wanda", seeds=[1])
    assert one.tokens["calibration"] is not None
    assert other.tokens["calibration"] is not None
    assert not np.array_equal(one.tokens["calibration"], other.tokens["calibration"])
    assert np.array_equal(other.tokens["calibration"], again.tokens["calibration"])
    assert one.spec.id != other.spec.id == again.spec.id
    assert one.spec.calibration_tokens != other.spec.calibration_tokens


def test_two_steps_are_taken_in_order_and_both_recorded(run: Watched) -> None:
    found: dict[str, Any] = {}

    def second(job: Job) -> None:
        matrix = job.anatomy.matrices[0]
        found["masks"] = {name: int((~mask).sum()) for name, mask in job.masks.items()}
        found["zeros"] = int((matrix.weight == 0).sum())
        found["dense"] = int((job.dense.weight(matrix) == 0).sum())
        found["calibration"] = tuple(job.calibration.shape)

    changes, needs = Changes.NOTHING, Needs.CALIBRATION
    record = run("magnitude[group=row] + second", stranger(second, "second", needs, changes))
    assert record.status == "ok"
    assert [step.pruner for step in record.steps] == ["magnitude", "second"]
    assert record.spec.method == "magnitude[group=row] + second"
    assert [step.options for step in record.steps] == [{"group": "row"}, {}]
    assert [step.distribution for step in record.steps] == ["prunebench", "their-plugin"]
    assert record.steps[1].version == "1.2.3"
    assert len(found["masks"]) == 14
    assert found["zeros"] == found["masks"][record.audit.matrices[0].name] > 0  # type: ignore[union-attr]
    assert found["dense"] == 0
    assert found["calibration"] == (4, 16)


def test_a_step_without_masks_is_held_to_the_pattern_it_found(run: Watched) -> None:
    # Magnitude compares whole matrices; the null pruner's own group, rows, must not be asked of what magnitude left.
    assert run("magnitude + dense").status == "ok"


def test_an_earlier_steps_mask_may_not_be_undone_in_silence(run: Watched) -> None:
    def revive(job: Job) -> None:
        for matrix in job.anatomy.matrices:
            matrix.write(job.dense.weight(matrix), keep_mask(-magnitude_scores(job.dense.weight(matrix)), job.target, "row"))

    record = run("magnitude[group=row] + revive", stranger(revive, "revive"))
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type, record.failure.step) == ("audit", "ContractError", "revive")
    assert "the step revived" in record.failure.message
    moves = Changes.MASK_MOVES | Changes.MASK_GROWS | Changes.KEPT_WEIGHTS
    assert run("magnitude[group=row] + revive", stranger(revive, "revive", changes=moves)).status == "ok"


def test_two_evaluations_of_one_name_are_told_apart(run: Watched, bench: Bench) -> None:
    other = bench.perplexity.replace("window=16", "window=32")
    record = run("dense", evals=[bench.perplexity, other])
    assert len(record.scores) == 2
    by_window = {score.conditions["window"]: (name, score) for name, score in record.scores.items()}
    assert set(by_window) == {16, 32}
    for window, (name, score) in by_window.items():
        assert f"window={window}" in name
        assert name.startswith("perplexity[")
        assert score.value == run("dense", evals=[other if window == 32 else bench.perplexity]).scores["perplexity"].value


def test_two_files_of_one_name_are_two_scores(run: Watched, bench: Bench, tmp_path: Path) -> None:
    """Records hold no folders of this machine, so both evaluations are spelt alike there."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evaluation.txt").write_text(bench.training.read_text(encoding="utf-8"), encoding="utf-8")
    record = run("dense", evals=[bench.perplexity, bench.perplexity.replace(str(bench.folder), str(tmp_path / "other"))])
    assert len({score.value for score in record.scores.values()}) == 2
    assert {score.conditions["content"] for score in record.scores.values()} == {
        spec.conditions["content"] for spec in record.spec.evals
    }


def test_notes_are_kept(run: Watched) -> None:
    def prune(job: Job) -> None:
        halve(job)
        job.note("retries", 2)
        job.note("rates", {"first": 0.4, "rest": [0.5, None]})
        job.note("retries", 3)

    (step,) = run("stranger", stranger(prune)).steps
    assert step.notes == {"retries": 3, "rates": {"first": 0.4, "rest": [0.5, None]}}


@pytest.mark.parametrize("note", cases({"object": object(), "tensor": torch.ones(2), "nan": math.nan, "infinity": [math.inf]}))
def test_a_note_that_no_record_can_hold_is_the_methods_failure(note: Any, run: Watched) -> None:
    def prune(job: Job) -> None:
        halve(job)
        job.note("strange", note)

    record = run("stranger", stranger(prune))
    assert record.status == "failed"
    assert record.failure is not None
    assert (record.failure.kind, record.failure.step) == ("error", "stranger")
    assert "strange" in record.failure.message


def test_phases_are_there_and_add_up(run: Watched) -> None:
    seconds: list[float] = []

    def prune(job: Job) -> None:
        started = time.perf_counter()
        with phase("statistics"):
            time.sleep(0.03)
            with phase("scoring"):
                time.sleep(0.05)
        time.sleep(0.04)
        halve(job)
        seconds.append(time.perf_counter() - started)

    record = run("stranger", stranger(prune))
    (step,) = record.steps
    assert {"statistics", "scoring", "update", "other"} == set(step.phases)
    assert step.phases["statistics"] >= 0.03
    assert step.phases["scoring"] >= 0.05
    assert step.phases["other"] >= 0.04
    assert step.phases["update"] > 0.0
    assert sum(step.phases.values()) == pytest.approx(seconds[0], abs=0.01)
    assert record.prune_seconds == step.seconds


def test_wanda_spends_its_time_where_it_says(run: Watched) -> None:
    (step,) = run("wanda").steps
    assert {"calibration", "statistics", "scoring", "update", "propagation", "other"} == set(step.phases)


# Refusals


def test_a_refusal_by_the_method_is_an_answer(run: Watched) -> None:
    called = []
    asked: list[JobFacts] = []

    def refuses(facts: JobFacts) -> str | None:
        asked.append(facts)
        return "it takes no half measures."

    record = run("stranger", stranger(lambda job: called.append(job), refuses=refuses))
    assert (record.status, record.reason, record.failure) == ("refused", "it takes no half measures.", None)
    assert (record.steps, record.audit, record.scores, called) == ([], None, {}, [])
    assert run.untouched
    assert asked[0].target == Unstructured(0.5)
    assert len(asked[0].matrices) == 14
    assert asked[0].earlier == ()


def test_every_step_is_asked_before_the_first_starts(run: Watched) -> None:
    asked: list[JobFacts] = []

    def refuses(facts: JobFacts) -> str | None:
        asked.append(facts)
        return "never after magnitude."

    record = run("magnitude + stranger", stranger(refuses=refuses))
    assert (record.status, record.reason, record.steps) == ("refused", "never after magnitude.", [])
    assert run.untouched
    assert asked[0].earlier == ("magnitude",)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "random", "stranger"])
def test_a_pattern_that_does_not_fit_is_refused_for_every_method(method: str, run: Watched) -> None:
    called = []
    record = run(method, stranger(lambda job: called.append(job)), targets=["3:5"])
    assert record.status == "refused"
    assert record.reason == (
        "model.layers.0.self_attn.q_proj has 16 input columns, not a multiple of 5, so 3:5 has no meaning for it."
    )
    assert called == []
    assert run.untouched


def test_a_mixture_of_experts_that_cannot_be_taken_apart_is_refused(run: Watched, bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "mixture"
    shape = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 4}
    with quiet_transformers():  # transposed, with biases
        GptOssForCausalLM(GptOssConfig(**shape, **heads, layer_types=["full_attention"] * 2)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bench.model / name).read_bytes())
    before = tree(folder)
    record = run("magnitude", model=folder)
    assert record.status == "refused"
    assert record.reason is not None
    assert "fused parameters of three or more dimensions" in record.reason
    assert "mixtures of experts" in record.reason
    assert run.untouched
    assert tree(folder) == before


@pytest.mark.parametrize("reason", ["at the last moment.", ""])
def test_a_refusal_in_the_middle_is_one_too(reason: str, run: Watched) -> None:
    """Also one without words is not taken for success."""
    record = run("stranger", stranger(raising(Refused(reason))))
    assert (record.status, record.scores, record.failure) == ("refused", {}, None)
    assert record.reason
    assert reason in record.reason


# Failures


class Unspeakable(Exception):
    """One that cannot even be printed."""

    def __str__(self) -> str:
        raise ValueError("no words")


FAILURES = {
    "error": (ValueError("a is not b"), "error", "ValueError", "a is not b"),
    "without words": (KeyError(), "error", "KeyError", "KeyError"),
    "of ours": (RunError("the step gave up."), "error", "RunError", "the step gave up."),
    "host memory": (MemoryError("cannot allocate"), "oom", "MemoryError", "cannot allocate"),
    "device memory": (torch.OutOfMemoryError("CUDA out of memory"), "oom", "OutOfMemoryError", "CUDA out of memory"),
    "nan": (NonFiniteError("a score is NaN."), "nan", "NonFiniteError", "a score is NaN."),
    "exit": (SystemExit("no licence"), "error", "SystemExit", "sys.exit was called, with 'no licence'."),
    "exit without a word": (SystemExit(), "error", "SystemExit", "sys.exit was called."),
    "exit as if all were well": (SystemExit(0), "error", "SystemExit", "sys.exit was called, with '0'."),
    "cancelled": (asyncio.CancelledError("stop"), "error", "CancelledError", "stop"),
    "recursion": (RecursionError("too deep"), "error", "RecursionError", "too deep"),
    "assertion": (AssertionError(), "error", "AssertionError", "AssertionError"),
    "broken text": (ValueError("a \udc80 b"), "error", "ValueError", "a ? b"),
    "unspeakable": (Unspeakable(), "error", "Unspeakable", "Unspeakable"),
}


@pytest.mark.parametrize(("error", "kind", "name", "message"), cases(FAILURES))
def test_failures_are_told_apart(error: BaseException, kind: str, name: str, message: str, run: Watched) -> None:
    record = run("stranger", stranger(raising(error)))
    assert (record.status, record.reason, record.scores, record.steps) == ("failed", message, {}, [])
    assert record.failure is not None
    assert record.failure.model_dump() == {"kind": kind, "type": name, "message": message, "step": "stranger"}


def test_an_interruption_gets_through(run: Watched) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("stranger", stranger(raising(KeyboardInterrupt())))


def test_a_long_message_is_cut(run: Watched) -> None:
    record = run("stranger", stranger(raising(ValueError("x" * 1_000_000))))
    assert record.failure is not None
    assert record.failure.message == "x" * 2000
    assert len(record.to_json()) < 50_000


def test_no_folder_of_this_machine_gets_into_a_record(run: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    clone = Path(prunebench.__file__).parents[2]
    places = f"{tmp_path}/a.txt, {Path.home()}/b.txt, {clone}/c.txt, /secret/place/d.txt"
    record = run("stranger", stranger(raising(OSError(places))))
    assert record.reason == "./a.txt, $HOME/b.txt, $PRUNEBENCH/c.txt, …/d.txt"
    text = record.to_json()
    for place in (str(tmp_path), "/home/somebody", "/secret", str(clone)):
        assert place not in text


def written_as(value: float) -> Callable[[Job], None]:
    """Prune, and multiply what survives."""

    def prune(job: Job) -> None:
        for matrix in job.anatomy.matrices:
            mask = keep_mask(magnitude_scores(matrix.weight), job.target, group="row")
            matrix.write(matrix.weight * value, mask)

    return prune


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value: float, run: Watched) -> None:
    record = run("stranger", stranger(written_as(value), changes=Changes.MASK_GROWS | Changes.KEPT_WEIGHTS))
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type, record.failure.step) == ("nan", "NonFiniteError", "stranger")
    assert "model.layers.0.self_attn.q_proj holds" in record.failure.message
    assert len(record.steps) == 1
    assert record.scores == {}


def test_a_perplexity_that_is_no_number(run: Watched) -> None:
    """Every weight is finite here, and what they compute is not."""
    record = run("stranger", stranger(written_as(1e37), changes=Changes.MASK_GROWS | Changes.KEPT_WEIGHTS))
    assert record.failure is not None
    assert (record.failure.kind, record.failure.step) == ("nan", None)
    assert "the likelihood of 4 of 4 windows is not finite" in record.failure.message
    assert len(record.steps) == 1
    assert record.audit is not None
    assert record.audit.sparsity_prunable == 0.5
    assert record.scores == {}


def test_a_perplexity_beyond_all_numbers(run: Watched) -> None:
    def prune(job: Job) -> None:
        halve(job)
        with torch.no_grad():
            job.model.get_output_embeddings().weight.mul_(1e6)

    record = run("stranger", stranger(prune, changes=Changes.MASK_GROWS | Changes.HEAD))
    assert record.failure is not None
    assert record.failure.kind == "nan"
    assert "whose exponential is not finite" in record.failure.message


def measuring(value: float, items: dict[str, list[float]] | None = None, sample: Sample | None = None) -> type[Eval]:
    """A stranger's evaluation that finds this value."""

    @dataclass
    class Measure(Eval):
        """A stranger's."""

        name: ClassVar[str] = "measure"

        def conditions(self, facts: EvalFacts) -> dict[str, Any]:
            return {"of": "nothing"}

        def measure(self, job: EvalJob) -> Score:
            assert not job.model.training
            return Score(value, "points", True, items or {}, sample=sample)

    return Measure


def test_a_strangers_evaluation_is_recorded(run: Watched) -> None:
    record = run("dense", measuring(7.5, {"answers": [1.0, 2.0]}), evals=["measure"])
    score = record.scores["measure"]
    assert (score.value, score.unit, score.higher_is_better) == (7.5, "points", True)
    assert score.items == {"answers": [1.0, 2.0]}
    assert score.conditions["of"] == "nothing"
    assert score.conditions["weights"] == record.spec.model.weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_strangers_value_that_is_no_number(value: float, run: Watched) -> None:
    record = run("magnitude", measuring(value), evals=["measure"])
    assert record.failure is not None
    assert record.failure.kind == "nan"
    assert len(record.steps) == 1


@pytest.mark.parametrize(
    ("items", "sample", "said"),
    [
        ({"answers": [1.0, 2.0], "more": [1.0]}, None, "columns of different lengths"),
        ({"answers": [1.0, 2.0]}, Sample("answers", strata="subject"), "'subject', which is none of its items"),
    ],
)
def test_items_that_are_not_what_they_should_be(
    items: dict[str, list[float]], sample: Sample | None, said: str, run: Watched
) -> None:
    """Found before they are stored: the store and every board would stumble over them."""
    record = run("magnitude", measuring(7.5, items, sample), evals=["measure"])
    assert record.failure is not None
    assert said in record.failure.message


def test_an_evaluation_that_fails_keeps_what_was_measured_before(run: Watched, bench: Bench) -> None:
    record = run("magnitude", measuring(math.nan), evals=[bench.perplexity, "measure"])
    assert record.status == "failed"
    assert set(record.scores) == {"perplexity"}
    assert record.audit is not None


def test_a_failure_keeps_the_steps_before_it(run: Watched) -> None:
    record = run("magnitude + stranger", stranger(raising(ValueError("no"))))
    assert record.failure is not None
    assert (record.failure.kind, record.failure.step) == ("error", "stranger")
    assert [step.pruner for step in record.steps] == ["magnitude"]
    assert record.steps[0].seconds > 0
    assert record.audit is not None
    assert record.audit.sparsity_prunable == 0.5
    assert record.scores == {}


# What the audit finds


def too_few(job: Job) -> None:
    for matrix in job.anatomy.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), Unstructured(0.25), group="row"))


def one_row_wrong(job: Job) -> None:
    halve(job)
    mask = job.anatomy.matrices[3].weight != 0
    mask[5] = False
    job.anatomy.matrices[3].keep(mask)


def by_matrix(job: Job) -> None:
    for matrix in job.anatomy.matrices:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="matrix"))


def zeros_without_masks(job: Job) -> None:
    for matrix in job.anatomy.matrices:
        matrix.weight.masked_fill_(~keep_mask(magnitude_scores(matrix.weight), job.target, group="row"), 0)


def one_matrix_left_out(job: Job) -> None:
    for matrix in list(job.anatomy.matrices)[:-1]:
        matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))


def masked_but_not_zero(job: Job) -> None:
    halve(job)
    weight = job.anatomy.matrices[0].weight
    weight[weight == 0] = 0.5


def more_zeros_than_masked(job: Job) -> None:
    halve(job)
    job.anatomy.matrices[0].weight[0] = 0


def changed_survivor(job: Job) -> None:
    halve(job)
    weight = job.anatomy.matrices[0].weight
    weight[tuple(weight.nonzero()[0])] *= 1.5


def changed_parameter(name: str) -> Callable[[Job], None]:
    def prune(job: Job) -> None:
        halve(job)
        with torch.no_grad():
            dict(job.model.named_parameters())[name].view(-1)[0] += 1

    return prune


def reads_training(job: Job) -> None:
    job.training  # noqa: B018 - reading is the offence


def tied_anew(job: Job) -> None:
    halve(job)
    job.model.model.layers[0].input_layernorm.weight = job.model.model.layers[1].input_layernorm.weight


AUDITED = {
    "too few": (too_few, "AuditError", "16 of the 16 rows of model.layers.0.self_attn.q_proj do not have exactly 8 of 16"),
    "one row": (one_row_wrong, "AuditError", "1 of the 16 rows of model.layers.0.self_attn.o_proj do not have exactly 8"),
    "another group": (by_matrix, "AuditError", "says so in `audit_group`"),
    "nothing": (lambda job: None, "AuditError", "model.layers.0.self_attn.q_proj has no keep mask"),
    "zeros without masks": (zeros_without_masks, "ContractError", "128 surviving entries of model.layers.0.self_attn.q_proj"),
    "one left out": (one_matrix_left_out, "AuditError", "model.layers.1.mlp.down_proj has no keep mask"),
    "masked, not zero": (masked_but_not_zero, "AuditError", "that its mask removes are not zero"),
    "extra zeros": (more_zeros_than_masked, "ContractError", "8 surviving entries of model.layers.0.self_attn.q_proj"),
    "survivor": (changed_survivor, "ContractError", "changed 1 surviving entries of model.layers.0.self_attn.q_proj"),
    "norm": (changed_parameter("model.norm.weight"), "ContractError", "changed model.norm.weight"),
    "embedding": (changed_parameter("model.embed_tokens.weight"), "ContractError", "changed model.embed_tokens.weight"),
    "head": (changed_parameter("lm_head.weight"), "ContractError", "changed lm_head.weight"),
    "training": (reads_training, "ContractError", "reads job.training but its needs() do not declare it"),
    "tied": (tied_anew, "ContractError", "the step untied parameters that shared one tensor, or tied others"),
}


@pytest.mark.parametrize(("prune", "name", "said"), cases(AUDITED))
def test_the_audit_is_a_failure_of_its_own_kind(prune: Callable[[Job], None], name: str, said: str, run: Watched) -> None:
    record = run("stranger", stranger(prune))
    assert record.status == "failed"
    assert record.failure is not None
    assert (record.failure.kind, record.failure.type, record.failure.step) == ("audit", name, "stranger")
    assert said in record.failure.message
    assert record.scores == {}


def test_groups_of_a_pattern_are_audited(run: Watched) -> None:
    def prune(job: Job) -> None:
        for matrix in job.anatomy.matrices:
            matrix.keep(keep_mask(magnitude_scores(matrix.weight), Unstructured(0.5), group="row"))

    record = run("stranger", stranger(prune), targets=["2:4"])
    assert record.failure is not None
    assert record.failure.kind == "audit"
    assert "groups of model.layers.0.self_attn.q_proj keep more than 2 of 4 weights" in record.failure.message


def test_extra_zeros_pass_when_they_are_explained(run: Watched) -> None:
    def prune(job: Job) -> None:
        more_zeros_than_masked(job)
        job.note("extra_zeros", "the first output is never read")

    changes = Changes.MASK_GROWS | Changes.KEPT_WEIGHTS
    silent = run("stranger", stranger(more_zeros_than_masked, changes=changes))
    assert silent.failure is not None
    assert "has 8 zeros beyond the 128 its mask removes" in silent.failure.message
    record = run("stranger", stranger(prune, changes=changes))
    assert record.status == "ok"
    assert record.audit is not None
    assert (record.audit.extra_zeros, record.audit.zeros - record.audit.removed) == (8, 8)


def test_training_that_is_declared_is_handed_over(run: Watched, bench: Bench) -> None:
    seen = []

    def prune(job: Job) -> None:
        seen.append(tuple(job.training.shape))
        halve(job)

    section = f'[training]\nsource = "{bench.training}"\ntokens = 100\n'
    record = run("stranger", stranger(prune, needs=Needs.TRAINING), more=section)
    assert record.status == "ok"
    assert seen == [(6, 16)]
    assert record.spec.recipe.training is not None
    assert (record.spec.recipe.training.name, record.spec.recipe.training_tokens) == ("training.txt", 96)


def test_a_model_read_back_from_disk_measures_the_same(bench: Bench, tmp_path: Path) -> None:
    """Weights, an adapter that stays apart, and a head that was untied."""
    section = f'[training]\nsource = "{bench.training}"\ntokens = 200\n'
    method = "magnitude + perp[subset=head,steps=2,batch=2] + lora[steps=2,batch=2,learning_rate=0.1]"
    (request,) = bench.requests(tmp_path, method, more=section)
    kept, reloaded = (runner.run(replace(request, reload=reload), lambda *_: None, "inline") for reload in (False, True))
    assert kept.status == reloaded.status == "ok", reloaded.reason
    assert reloaded.scores["perplexity"].value == pytest.approx(kept.scores["perplexity"].value, rel=1e-6)
    assert reloaded.extra_parameters == kept.extra_parameters > 0


# What a stranger leaves behind


def littering(job: Job) -> None:
    halve(job)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(3)
    job.model.train()


LITTER = [
    "Python's random generator",
    "numpy's random generator",
    "torch's random generator",
    "grad mode",
    "deterministic algorithms",
    "the default dtype",
    "the number of threads",
]


def draws() -> list[float]:
    """What the global generators give next, put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = [random.random(), float(np.random.random()), float(torch.rand(()))]
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return found


def globals_now() -> list[Any]:
    return [
        *draws(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    ]


def test_global_state_is_put_back_and_noted(run: Watched) -> None:
    before = globals_now()
    record = run("stranger", stranger(littering))
    assert record.status == "ok"
    assert globals_now() == before
    assert record.steps[0].notes == {"global state left changed, and restored": ", ".join(LITTER)}
    assert not any(module.training for module in run.models[-1].modules())


def test_global_state_is_put_back_after_a_failure(run: Watched) -> None:
    def prune(job: Job) -> None:
        littering(job)
        raise ValueError("and gone")

    before = globals_now()
    assert run("stranger", stranger(prune)).status == "failed"
    assert globals_now() == before


def test_litter_does_not_change_what_comes_after(run: Watched) -> None:
    """The second step and the score are those of a run without it."""
    clean = run("stranger + random", stranger(halve))
    dirty = run("stranger + random", stranger(littering))
    assert dirty.scores["perplexity"].items == clean.scores["perplexity"].items


def test_a_clean_stranger_has_no_notes(run: Watched) -> None:
    assert run("stranger", stranger()).steps[0].notes == {}


@pytest.mark.parametrize("ends_well", [True, False])
def test_threads_are_those_asked_for_and_put_back(ends_well: bool, bench: Bench, tmp_path: Path, register: Register) -> None:
    seen = []

    def prune(job: Job) -> None:
        seen.append(torch.get_num_threads())
        halve(job)
        assert ends_well

    register(stranger(prune))
    (request,) = bench.requests(tmp_path, "stranger")
    before = torch.get_num_threads()
    record = runner.run(dataclasses.replace(request, threads=before + 1), lambda *call: None, "inline")
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    assert record.provenance.threads == before + 1
    assert record.status == ("ok" if ends_well else "failed")


def test_the_models_own_folder_is_never_written(run: Watched, bench: Bench) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bench.model.iterdir()}
    run("wanda")
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bench.model.iterdir()} == before


def test_the_same_run_twice_gives_the_same_bits(run: Watched) -> None:
    one, other = run("wanda"), run("wanda")
    assert one.scores["perplexity"].items == other.scores["perplexity"].items
    assert one.audit == other.audit
    for first, second in zip(run.models[0].parameters(), run.models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_options_are_recorded_with_their_defaults(run: Watched) -> None:
    @dataclass
    class Optional(Pruner):
        """With options."""

        name: ClassVar[str] = "optional"
        revision: ClassVar[int] = 4
        strength: float = option(0.5, "how much")
        kind: str = option("plain", "which")

        def prune(self, job: Job) -> None:
            assert self.strength == 0.25
            halve(job)

    record = run("optional[strength=0.25]", Optional)
    assert record.status == "ok"
    (step,) = record.steps
    assert (step.options, step.revision) == ({"strength": 0.25, "kind": "plain"}, 4)
    assert record.spec.steps[0].text == "optional[strength=0.25]"
    assert record.spec.steps[0].revision == 4

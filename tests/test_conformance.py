"""Every registered pruner keeps every law and claim; what the kit asks, of whom, and how it takes excuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plain import CLAIMS, Adapts, Plain, Prints
from support import cases as named
from torch import nn

from prunebench.errors import ContractError, UnknownNameError
from prunebench.plugins import load_registry
from prunebench.spec import Changes, Claims, Job, JobFacts, Matrix, Needs, Pruner
from prunebench.targets import NM, Unstructured
from prunebench.testing import (
    CHECKS,
    FAMILIES,
    CheckFailed,
    Declined,
    cases,
    check_better_than_random,
    check_channels_commute,
    check_nested,
    check_pruned_prefix,
    check_pruner,
    check_resumes,
    check_rows_commute,
    check_target_met,
    make_job,
    parametrize_with_checks,
    random_tokens,
    tiny_model,
)
from prunebench.toolkit import Retraining, keep_mask, magnitude_scores
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.audit import Before
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.heads import untie_head
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.imp import Imp
from prunebench_pruners.lora import Lora
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.perp import Perp
from prunebench_pruners.random import RandomPruner
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus

FEW: dict[str, Any] = {"steps": 3, "batch": 4, "learning_rate": 0.01}
OPTIMISED = partial(WandaPlusPlus, learning_rate=1e-2, rounds=2, ro_samples=4)
FEW_STEPS: dict[str, dict[str, Any]] = {
    "lora": FEW,
    "perp": FEW,
    "imp": {"rounds": 3, "retrain": Retraining("all", **FEW)},
    "wanda++": OPTIMISED.keywords,
}
"""Options of those that train, whose own would take minutes a law."""
GENTLE = {
    "imp": {"rounds": 2, "retrain": Retraining("all", **FEW | {"learning_rate": 1e-4})},
    "wanda++": OPTIMISED.keywords | {"learning_rate": 3e-4},
}
"""Where more would spoil a model that has something to lose."""
ONE_SHOT = partial(Imp, rounds=1, retrain=Retraining("norms", **FEW))
PLAIN_RGS = partial(WandaPlusPlus, ro=False)


def registered(options: dict[str, dict[str, Any]]) -> list[Callable[[], Pruner]]:
    return [partial(entry.cls, **options.get(name, {})) for name, entry in sorted(load_registry().pruners.items())]


CLAIM_OF = {
    check_rows_commute: Claims.ROWS,
    check_channels_commute: Claims.CHANNELS,
    check_nested: Claims.NESTED,
    check_pruned_prefix: Claims.PREFIX,
    check_resumes: Claims.BLOCKWISE,
}


def without_unclaimed(asked: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Leave out the claims that a pruner does not make, which would be a hundred lines of skipped tests."""
    names, parameters = asked.args
    made = [p for p in parameters if CLAIM_OF.get(p.values[1], Claims.NOTHING) in p.values[0]().claims()]
    return pytest.mark.parametrize(names, made)


ANOTHER_MIXTURE = "qwen3-moe"


@without_unclaimed(parametrize_with_checks(registered(FEW_STEPS), families=[f for f in FAMILIES if f != ANOTHER_MIXTURE]))
def test_registered(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


@without_unclaimed(
    parametrize_with_checks(
        [Gblm, OPTIMISED, SparseGpt, Wanda, partial(Perp, mode="reconstruct", **FEW)],
        families=["mixtral"],
        checks=["earlier_zeros", "batch_splits", "streaming", "channels_commute", "pruned_prefix", "resumes"],
    )
)
def test_registered_on_a_mixture(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    """Laws that experts, of which each reads tokens of its own, could break, of methods that go block by block."""
    check(pruner, family)


@parametrize_with_checks(registered(FEW_STEPS), families=[ANOTHER_MIXTURE], checks=["declared_changes"])
def test_registered_on_another_mixture(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    """The law that takes a step, an audit and a comparison of everything: the rest is as on the first."""
    check(pruner, family)


@parametrize_with_checks(registered(FEW_STEPS | GENTLE), families=["quickstart"])
def test_registered_on_a_trained_model(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


@without_unclaimed(
    parametrize_with_checks(
        [
            partial(Magnitude, group="row"),
            partial(Lora, merge="masked", **FEW),
            partial(Gblm, norm="l2"),
            partial(Gblm, alpha=0.0),
            *(partial(SparseGpt, mask=mask) for mask in ("wanda", "given")),
            partial(SparseGpt, block_size=16, counts="reference"),
            PLAIN_RGS,
            partial(OPTIMISED, rgs=False, act_norm="mean"),
            partial(OPTIMISED, refresh_gradient=True, restart="dense"),
            *(partial(Perp, subset=subset, **FEW) for subset in ("biases", "norms", "head", "scale_lora", "lora_prune", "all")),
            partial(Perp, mode="reconstruct", **FEW),
            partial(Perp, subset="all", mode="reconstruct", **FEW),
            partial(Imp, rounds=3, schedule="cubic", group="row", retrain=Retraining("norms", **FEW)),
            ONE_SHOT,
        ],
        families=["opt", "gpt2"],
    )
)
def test_options(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


UNCLAIMED = {
    "random": (RandomPruner, {"rows_commute", "channels_commute"}),
    "wanda": (Wanda, {"nested"}),
    "gblm": (Gblm, {"rows_commute", "nested", "pruned_prefix"}),
    "wanda++": (OPTIMISED, {"rows_commute", "nested"}),
    "wanda++ without training": (PLAIN_RGS, {"rows_commute", "nested"}),
    "sparsegpt": (SparseGpt, {"channels_commute", "nested"}),
    "sparsegpt under wanda's mask": (partial(SparseGpt, mask="wanda"), {"channels_commute", "nested"}),
    "imp": (partial(Imp, **FEW_STEPS["imp"]), {"rows_commute", "nested", "pruned_prefix", "resumes"}),
}
"""What does not hold of a method, and so is not claimed. Of imp one claim more is left out: it holds but for rounding."""


@pytest.mark.parametrize(("make", "broken"), named(UNCLAIMED))
def test_what_is_not_claimed_does_not_hold(make: Callable[[], Any], broken: set[str]) -> None:
    def bold() -> Pruner:
        pruner = make()
        pruner.claims = lambda: ~Claims.NOTHING
        return pruner

    laws = [law for law in CHECKS if law in CLAIMS]
    declined = {r.check for r in check_pruner(make, families=["llama"], checks=laws) if r.outcome == "declined"}
    assert declined == broken | ({"channels_commute"} if make().name == "imp" else set())
    assert {r.check for r in check_pruner(bold, families=["llama"], checks=laws) if r.outcome == "failed"} == broken


# Pruners that are right in an unusual way.


class Updates(Plain):
    """Changes survivors, and declares it: each row keeps its sum."""

    name: ClassVar[str] = "updates"

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        lost = (matrix.weight * ~mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        matrix.write(matrix.weight + lost, mask)


class WholeModel(Plain):
    """One comparison group for all matrices."""

    name: ClassVar[str] = "whole-model"

    def audit_group(self) -> str:
        return "model"

    def prune(self, job: Job) -> None:
        matrices = job.anatomy.matrices
        masks = keep_mask([magnitude_scores(matrix.weight) for matrix in matrices], job.target, group="model")
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.keep(mask)


class Moves(Plain):
    """Lets zeros come back to their dense values, and declares it."""

    name: ClassVar[str] = "moves"

    def changes(self) -> Changes:
        return Changes.MASK_MOVES

    def mask(self, job: Job, matrix: Matrix) -> torch.Tensor:
        return keep_mask(magnitude_scores(job.dense.weight(matrix)), job.target, "row")

    def lay(self, job: Job, matrix: Matrix, mask: torch.Tensor) -> None:
        matrix.write(job.dense.weight(matrix), mask)


class MovesWhatItFinds(Moves):
    """Needs the masks of an earlier step, and keeps their counts."""

    name: ClassVar[str] = "moves-what-it-finds"

    def audit_group(self) -> str:
        return "earlier"

    def refuses(self, facts: JobFacts) -> str | None:
        return None if facts.earlier else "there are no masks to move."

    def prune(self, job: Job) -> None:
        assert job.masks
        super().prune(job)


@dataclass
class Trains(Pruner):
    """Makes no masks; moves what earlier steps left, and all biases and norms, down a gradient."""

    name: ClassVar[str] = "trains"

    def needs(self) -> Needs:
        return Needs.TRAINING

    def changes(self) -> Changes:
        return Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS

    def prune(self, job: Job) -> None:
        flags = [(parameter, parameter.requires_grad) for parameter in job.model.parameters()]
        weights = [matrix.module.weight for matrix in job.anatomy.matrices]
        vectors = [p for block in job.anatomy.blocks for p in block.module.parameters() if p.ndim == 1]
        for parameter in weights + vectors:
            parameter.requires_grad_(True)
        logits = job.model(job.training, use_cache=False).logits
        assert job.validation.shape == job.training.shape
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), job.training[:, 1:].flatten())
        found = torch.autograd.grad(loss, weights + vectors, allow_unused=True)
        for matrix, gradient in zip(job.anatomy.matrices, found, strict=False):
            mask = job.masks.get(matrix.name, torch.ones(matrix.shape, dtype=torch.bool))
            matrix.write(matrix.weight - 0.1 * matrix.oriented(gradient), mask)
        for parameter, gradient in zip(vectors, found[len(weights) :], strict=True):
            parameter.data -= 0.1 * gradient
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class MovesHead(Plain):
    """Unties it first, and declares it."""

    name: ClassVar[str] = "moves-head"

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.HEAD

    def finish(self, job: Job) -> None:
        untie_head(job.model)
        job.model.get_output_embeddings().weight.data[0, 0] += 1


class AfterOthersOnly(Trains):
    """Has nothing to do where nothing was removed."""

    name: ClassVar[str] = "after-others"

    def refuses(self, facts: JobFacts) -> str | None:
        return None if facts.earlier else "nothing was removed, so there is nothing to recover."


class TwoOfFour(Plain):
    """For one pattern only, and not on OPT."""

    name: ClassVar[str] = "two-of-four"

    def refuses(self, facts: JobFacts) -> str | None:
        if facts.config.model_type == "opt":
            return "OPT is not supported."
        return None if facts.target == NM(2, 4) else "only 2:4 is supported."


UNUSUAL = [Updates, WholeModel, Moves, MovesWhatItFinds, Trains, AfterOthersOnly, MovesHead, Adapts]


@without_unclaimed(parametrize_with_checks(UNUSUAL, families=["opt", "gemma3", "gpt2"]))
def test_unusual_pruner_passes(pruner: Callable[[], Pruner], check: Callable[..., None], family: str) -> None:
    check(pruner, family)


def outcomes(make: Callable[[], Pruner], family: str) -> dict[str, set[str]]:
    """The laws by what came of them."""
    found: dict[str, set[str]] = {}
    for result in check_pruner(make, families=[family], checks=list(CHECKS)):
        found.setdefault(result.outcome, set()).add(result.check)
    return found


def test_what_is_declined() -> None:
    everything = set(CHECKS) - {"better_than_random"}
    told = {r.check: r.message for r in check_pruner(TwoOfFour, families=["opt"]) if r.outcome == "declined"}
    assert told == dict.fromkeys(everything - CLAIMS - {"refuses_first"}, "two-of-four refuses opt: OPT is not supported.") | {
        law: f"two-of-four does not claim {claim}."
        for law, claim in zip(sorted(CLAIMS), ("CHANNELS", "NESTED", "PREFIX", "BLOCKWISE", "ROWS"), strict=True)
    }
    assert outcomes(TwoOfFour, "llama")["declined"] == {"zero_sparsity", *CLAIMS}
    assert outcomes(Moves, "llama")["declined"] == {"earlier_zeros", *CLAIMS}
    assert outcomes(AfterOthersOnly, "llama")["declined"] == {"zero_sparsity", *CLAIMS} - {"zero_sparsity"}
    with pytest.raises(Declined, match="OPT is not supported"):
        check_target_met(TwoOfFour, "opt")


def test_a_claim_of_no_masks_is_declined() -> None:
    class Boasts(Trains):
        def claims(self) -> Claims:
            return Claims.ROWS

    [result] = check_pruner(Boasts, families=["llama"], checks=["rows_commute"])
    assert result.message == "trains claims ROWS, and has no masks but those of the step before it."


def test_a_trainer_that_lets_zeros_go_is_caught() -> None:
    class Forgets(Trains):
        def prune(self, job: Job) -> None:
            job.masks = {}
            super().prune(job)

    failed = {
        result.check: result.message for result in check_pruner(Forgets, families=["llama"]) if result.outcome == "failed"
    }
    assert failed.keys() == {"target_met", "odd_shapes", "earlier_zeros"}
    assert "came back" in failed["earlier_zeros"]


def test_the_audit_names_a_module_that_is_gone() -> None:
    model = tiny_model()
    anatomy = find_anatomy(model)
    before = Before(anatomy, DenseWeights(anatomy), survivors_changed=False)
    del model.model.layers[1].mlp
    with pytest.raises(ContractError, match=r"changed model\.layers\.1\.mlp\.down_proj\.weight"):
        before.check_declared(Changes.MASK_GROWS)


# Results, excuses, pytest.


def test_which_law_is_asked_where() -> None:
    asked = cases()
    assert len(asked) == 14 * 4 + 2 * 13 + 1
    assert {check for check, family in asked if family == "gemma3"} == {
        "target_met",
        "declared_changes",
        "nothing_left",
        "saves",
    }
    assert [check for check, family in asked if family == "opt"] == [law for law in CHECKS if law != "better_than_random"]
    assert [case for case in asked if "quickstart" in case] == [("better_than_random", "quickstart")]
    assert cases(["gpt2"]) == [case for case in asked if case[1] == "gpt2"]
    assert cases(None, ["silent"]) == [("silent", "llama"), ("silent", "opt")]
    assert cases(["gpt2"], ["silent"]) == [("silent", "gpt2")]  # whoever asks for it may have it
    assert cases(["llama", "quickstart"], ["saves", "better_than_random"]) == [
        ("saves", "llama"),
        ("better_than_random", "quickstart"),
    ]
    assert cases([], ["saves"]) == cases(["llama"], []) == []


@pytest.mark.parametrize(
    ("families", "checks", "says"),
    [
        (["lama"], None, "did you mean 'llama'"),
        (None, ["save"], "did you mean 'saves'"),
        (["llama"], ["better_than_random"], "no family for better_than_random 'llama'. Known: quickstart."),
        (["quickstart"], ["saves"], "no family for saves 'quickstart'"),
    ],
)
def test_cases_that_do_not_exist(families: list[str] | None, checks: list[str] | None, says: str) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(says)):
        cases(families, checks)
    with pytest.raises(UnknownNameError, match=re.escape(says)):
        check_pruner(Plain, families=families, checks=checks)


def test_results_outside_pytest() -> None:
    results = check_pruner(Wanda, families=["opt", "gpt2"])
    assert [(result.check, result.family) for result in results] == cases(["opt", "gpt2"])
    assert {(r.pruner, r.outcome, r.message) for r in results if r.check != "nested"} == {("wanda", "passed", "")}
    assert {r.message for r in results if r.check == "nested"} == {"wanda does not claim NESTED."}
    by_row = check_pruner(partial(Magnitude, group="row"), families=["opt"], checks=["saves"])
    assert [(r.check, r.pruner) for r in by_row] == [("saves", "magnitude[group=row]")]


def test_a_step_that_needs_another_follows_magnitude_pruning() -> None:
    check_better_than_random(MovesWhatItFinds)


def test_a_random_model_has_nothing_to_lose() -> None:
    with pytest.raises(CheckFailed, match="for the family 'quickstart', not 'llama'"):
        check_better_than_random(Plain, "llama")


def test_excuses_are_strict() -> None:
    excuses = {"silent": "it tells a story", "saves/opt": "in doubt"}
    results = check_pruner(Prints, excuses=excuses, families=["llama", "opt"])
    told = {(result.check, result.family): result for result in results if result.outcome not in ("passed", "declined")}
    assert {key: result.outcome for key, result in told.items()} == {
        ("silent", "llama"): "excused",
        ("silent", "opt"): "excused",
        ("saves", "opt"): "failed",
    }
    assert told["silent", "opt"].message.startswith("it tells a story (the pruner printed")
    assert told["saves", "opt"].message == "this law is kept, and yet excused (in doubt); take the excuse away."


@pytest.mark.parametrize(
    ("excuses", "says"),
    [
        ({"save": "?"}, "'saves'"),
        ({"saves/gpt": "?"}, "'gpt2'"),
        ({"silent/gpt2": "?"}, "no family for silent 'gpt2'"),
        ({"better_than_random/llama": "?"}, "no family for better_than_random 'llama'"),
    ],
)
def test_unknown_excuses_are_errors(excuses: dict[str, str], says: str) -> None:
    with pytest.raises(UnknownNameError, match=says):
        check_pruner(Plain, excuses=excuses, families=[])
    with pytest.raises(UnknownNameError, match=says):
        parametrize_with_checks([Plain], excuses={"plain": excuses})
    with pytest.raises(UnknownNameError, match="plain"):
        parametrize_with_checks([Plain], excuses={"plian": {}})


STRANGER = """
from functools import partial

from prunebench.testing import parametrize_with_checks
from prunebench_pruners.magnitude import Magnitude
from plain import Prints
from test_conformance import TwoOfFour

EXCUSES = {"plain": {"silent": "it tells a story", "saves/gpt2": "in doubt"}}
MAKERS = [partial(Magnitude, group="row"), Prints, TwoOfFour]

@parametrize_with_checks(MAKERS, excuses=EXCUSES, families=["gpt2", "opt"])
def test_conformance(pruner, check, family):
    check(pruner, family)
"""


def test_under_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_stranger.py").write_text(STRANGER)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-o", f"pythonpath={Path(__file__).parent}"]
    command += ["--rootdir", str(tmp_path), str(tmp_path)]
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=wide, check=False)
    said = done.stdout
    assert "1 failed, 40 passed, 21 skipped, 1 xfailed" in said, said + done.stderr
    assert "PASSED test_stranger.py::test_conformance[magnitude[group=row]-saves-gpt2]" in said
    assert "FAILED test_stranger.py::test_conformance[plain-saves-gpt2] - [XPASS(strict)] in doubt" in said
    assert "XFAIL test_stranger.py::test_conformance[plain-silent-opt] - it tells a story" in said
    assert "two-of-four refuses opt: OPT is not supported." in said


def test_the_kit_needs_neither_pytest_nor_the_benchmark() -> None:
    code = (
        "import sys, prunebench.testing; "
        "print([m for m in sys.modules if m == 'pytest' or m.startswith(('prunebench.bench', 'prunebench.results', "
        "'prunebench_pruners', 'lm_eval'))])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# The tiny models and their jobs.


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_model(family: str) -> None:
    state = torch.get_rng_state()
    model = tiny_model(family)
    assert torch.equal(state, torch.get_rng_state())
    shapes = {matrix.name.split(".", 1)[1]: matrix.shape for matrix in find_anatomy(model).matrices}
    square = {name for name, shape in shapes.items() if shape[0] == shape[1]}
    as_wide = {"opt": 8, "gpt2": 2, "gpt-neox": 2, "falcon": 2}  # attention as wide as the hidden state
    assert len(square) <= as_wide.get(family, 0), square
    assert all(columns % 8 == 0 for _, columns in shapes.values())
    assert len(set(shapes.values())) >= 4 or family in {"opt", "gpt2", "gpt-neox"}
    tokens = random_tokens(model)
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, tiny_model(family)(tokens).logits)
        assert not torch.equal(logits, tiny_model(family, seed=1)(tokens).logits)
        assert tiny_model(family, dtype=torch.float64)(tokens).logits.dtype == torch.float64
    assert logits.std() > 0.1
    assert logits.argmax(-1).unique().numel() > 3
    assert all(bool(parameter.ne(0).all()) and parameter.std() > 0.1 for parameter in model.parameters())
    model.get_input_embeddings().weight.data.zero_()
    assert tiny_model(family).get_input_embeddings().weight.data.any()


def test_what_the_families_stand_for() -> None:
    assert find_anatomy(tiny_model("qwen2")).matrices[0].module.bias is not None
    assert tiny_model("gemma3").config.layer_types == ["sliding_attention", "full_attention"]
    assert type(find_anatomy(tiny_model("gpt2")).matrices[0].module).__name__ == "Conv1D"
    tied = {family for family in FAMILIES if find_anatomy(tiny_model(family)).tied()}
    assert tied == {"qwen3", "gemma2", "gemma3", "opt", "gpt2", "falcon"}
    assert [m.shape for m in find_anatomy(tiny_model("phi3")).matrices][:3] == [(16, 24), (48, 16), (80, 16)]  # fused
    capped = tiny_model("gemma2")
    assert capped.config._attn_implementation == "eager"  # the other kernel knows no caps
    tokens = random_tokens(capped)
    with torch.no_grad():
        logits = capped(tokens).logits
        for block in capped.model.layers:
            block.self_attn.attn_logit_softcapping = None
        assert not torch.allclose(logits, capped(tokens).logits, atol=0.01)
    assert logits.abs().max() <= capped.config.final_logit_softcapping
    with pytest.raises(UnknownNameError, match="did you mean 'llama'"):
        tiny_model("lama")


def test_job_has_what_is_declared() -> None:
    model = tiny_model()
    plain = make_job(Plain(), model)
    assert plain.target == Unstructured(0.5)
    for text in ("calibration", "training", "validation"):
        with pytest.raises(ContractError, match="do not declare"):
            getattr(plain, text)
    tokens = random_tokens(model, 3, 5)
    notes: dict[str, Any] = {}
    job = make_job(Wanda(), model, NM(2, 4), tokens=tokens, batch_size=1, seed=7, notes=notes)
    assert job.calibration is tokens
    assert (job.target, job.batch_size, job.seed, job.device.type) == (NM(2, 4), 1, 0, "cpu")
    job.note("why", 1)
    assert notes == {"why": 1}
    trains = make_job(Trains(), model, seed=7)
    assert not torch.equal(trains.training, trains.validation)
    assert trains.seed == 7
    assert issubclass(CheckFailed, AssertionError)

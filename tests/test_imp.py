"""Iterative magnitude pruning: its schedules, its masks round by round, and what one round is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support import Bench
from test_perp import QUICK, records_of

from prunebench.errors import OptionError
from prunebench.options import build, canonical, parse_step
from prunebench.spec import Changes, Job, Needs
from prunebench.targets import NM, Dense, Target, Unstructured, parse_target
from prunebench.testing import make_job, random_tokens, tiny_model
from prunebench.testing.trial import contents, differing
from prunebench.toolkit import Retraining, keep_mask, magnitude_scores, retrain
from prunebench.toolkit.anatomy import KeepMasks, ModelAnatomy, find_anatomy
from prunebench_pruners.imp import Imp
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.perp import Perp

Schedule = Literal["geometric", "linear", "cubic"]
SCHEDULES: tuple[Schedule, ...] = ("geometric", "linear", "cubic")
QUICK_ALL = Retraining("all", **QUICK)


class Rounds:
    """An anatomy's masks and weights as each round lays the masks, and at the end."""

    def __init__(self, anatomy: ModelAnatomy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: dict[str, list[torch.Tensor]] = {}
        record = KeepMasks.record

        def see(masks: KeepMasks, name: str, mask: torch.Tensor) -> None:
            if masks is anatomy.masks:
                self.masks.setdefault(name, []).append(mask.clone())
            record(masks, name, mask)

        monkeypatch.setattr(KeepMasks, "record", see)


def imp_job(anatomy: ModelAnatomy, method: Imp, target: Target, notes: dict[str, Any] | None = None) -> Job:
    return make_job(method, anatomy.model, target, anatomy=anatomy, notes=notes)


# Schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rounds", [1, 2, 3, 5, 10, 17])
@pytest.mark.parametrize("final", [0.5, 0.6, 0.7, 0.1, 1 / 3, 0.99])
def test_schedules_rise_and_end_exactly_at_the_target(schedule: Schedule, rounds: int, final: float) -> None:
    method = Imp(rounds=rounds, schedule=schedule)
    shares = [method.sparsity(done, final) for done in range(rounds + 1)]
    assert shares[-1] == final
    assert shares[0] == 0.0
    assert all(earlier < later for earlier, later in itertools.pairwise(shares))
    assert method.target(rounds, Unstructured(final)) == Unstructured(final)


def test_schedules_by_number() -> None:
    """The geometric one as `methods.md` 3 has it; each round removes the same share of what is left."""
    found = [Imp(rounds=5).sparsity(done, 0.5) for done in range(1, 6)]
    assert found == pytest.approx([0.1294, 0.2421, 0.3402, 0.4257, 0.5], abs=1e-4)
    removed = [1 - (1 - later) / (1 - earlier) for earlier, later in itertools.pairwise([0.0, *found])]
    assert removed == pytest.approx([1 - 0.5 ** (1 / 5)] * 5)
    assert [Imp(rounds=4, schedule="linear").sparsity(k, 0.6) for k in range(1, 5)] == pytest.approx([0.15, 0.3, 0.45, 0.6])
    cubic = [0.6 * (1 - (1 - k / 4) ** 3) for k in range(1, 5)]
    assert [Imp(rounds=4, schedule="cubic").sparsity(k, 0.6) for k in range(1, 5)] == pytest.approx(cubic)


NM_ROUNDS: dict[tuple[str, int, Schedule], str] = {
    ("2:4", 1, "geometric"): "2:4",
    ("2:4", 2, "geometric"): "2:4 2:4",  # s_1 / S = 0.59: 1.17 of 2 are removed, so both
    ("2:4", 3, "geometric"): "3:4 2:4 2:4",
    ("2:4", 2, "linear"): "3:4 2:4",
    ("2:4", 4, "linear"): "3:4 3:4 2:4 2:4",
    ("2:4", 3, "cubic"): "2:4 2:4 2:4",
    ("4:8", 3, "geometric"): "6:8 5:8 4:8",
    ("4:8", 4, "linear"): "7:8 6:8 5:8 4:8",
    ("4:8", 3, "linear"): "6:8 5:8 4:8",
    ("1:4", 3, "linear"): "3:4 2:4 1:4",
    ("1:4", 3, "geometric"): "2:4 1:4 1:4",
    ("5:8", 7, "linear"): "7:8 7:8 6:8 6:8 5:8 5:8 5:8",
}


@pytest.mark.parametrize(("case", "wanted"), NM_ROUNDS.items(), ids=lambda value: str(value))
def test_patterns_of_the_rounds(case: tuple[str, int, Schedule], wanted: str) -> None:
    """`M - ceil((M - N) s_k / S)` of each group."""
    target, rounds, schedule = case
    method = Imp(rounds=rounds, schedule=schedule)
    assert " ".join(str(method.target(done, parse_target(target))) for done in range(1, rounds + 1)) == wanted


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("final", [NM(1, 2), NM(2, 4), NM(1, 4), NM(4, 8), NM(1, 8), NM(7, 16)], ids=str)
def test_patterns_never_grow_again(schedule: Schedule, final: NM) -> None:
    for rounds in range(1, 13):
        kept = [Imp(rounds=rounds, schedule=schedule).target(done, final) for done in range(1, rounds + 1)]
        assert kept[-1] == final
        assert all(isinstance(target, NM) and target.of == final.of for target in kept)
        counts = [target.keep for target in kept if isinstance(target, NM)]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] < final.of


# Rounds on a model


@pytest.mark.parametrize("group", ["matrix", "row"])
@pytest.mark.parametrize(
    ("target", "schedule"), [(Unstructured(0.6), "geometric"), (Unstructured(0.5), "cubic"), (NM(1, 4), "linear")], ids=str
)
def test_masks_are_nested_and_exact_in_every_round(
    target: Target, schedule: Schedule, group: Literal["matrix", "row"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights move far between rounds, and still nothing comes back."""
    anatomy = find_anatomy(tiny_model("gpt2"))
    rounds = Rounds(anatomy, monkeypatch)
    method = Imp(rounds=3, schedule=schedule, group=group, retrain=Retraining("all", steps=2, batch=2, learning_rate=0.1))
    notes: dict[str, Any] = {}
    method.prune(imp_job(anatomy, method, target, notes))
    for matrix in anatomy.matrices:
        laid = rounds.masks[matrix.name]
        assert len(laid) == 3
        for done, mask in enumerate(laid, 1):
            now = method.target(done, target)
            if isinstance(now, NM):
                assert bool((mask.reshape(-1, now.of).sum(dim=1) == now.keep).all())
            elif isinstance(now, Unstructured) and group == "row":
                assert (~mask).sum(dim=1).tolist() == [now.removed(mask.shape[1])] * mask.shape[0]
            elif isinstance(now, Unstructured):
                assert int((~mask).sum()) == now.removed(mask.numel())
        assert not any(bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(laid))
        assert not bool(matrix.weight[~laid[-1]].any())
    assert "rounds_that_only_retrain" not in notes


def test_a_round_removes_the_smallest_of_what_was_trained() -> None:
    """Against two rounds by hand; the second mask is not that of the dense weights."""
    anatomy, twin = find_anatomy(tiny_model()), find_anatomy(tiny_model())
    dense = [matrix.weight.clone() for matrix in twin.matrices]
    method = Imp(rounds=2, schedule="linear", retrain=QUICK_ALL)
    method.prune(imp_job(anatomy, method, Unstructured(0.6)))
    for stage, sparsity in enumerate([0.3, 0.6]):
        for matrix in twin.matrices:
            matrix.keep(keep_mask(magnitude_scores(matrix.weight), Unstructured(sparsity), "matrix"))
        retrain(imp_job(twin, method, Unstructured(0.6)), QUICK_ALL, stage=stage)
    assert differing(contents(twin.model), contents(anatomy.model)) == []
    of_dense = [keep_mask(weight.abs(), Unstructured(0.6), "matrix") for weight in dense]
    assert any(not torch.equal(mask, anatomy.masks[m.name]) for mask, m in zip(of_dense, twin.matrices, strict=True))


@pytest.mark.parametrize("target", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("subset", ["all", "mask_lora", "norms"])
def test_one_round_is_magnitude_and_then_perp(target: Target, subset: Any) -> None:
    """To the bit."""
    anatomy, twin = find_anatomy(tiny_model()), find_anatomy(tiny_model())
    method = Imp(rounds=1, retrain=Retraining(subset, **QUICK))
    method.prune(imp_job(anatomy, method, target))
    for step in (Magnitude(), Perp(subset, **QUICK)):
        step.prune(make_job(step, twin.model, target, anatomy=twin))
    assert differing(contents(twin.model), contents(anatomy.model)) == []
    assert anatomy.masks.packed().keys() == twin.masks.packed().keys()
    assert all(torch.equal(mask, anatomy.masks[name]) for name, mask in twin.masks.items())


def test_without_steps_only_the_last_round_shows() -> None:
    """Masks of the weights as they are grow into the one-shot mask."""
    anatomy, twin = find_anatomy(tiny_model()), find_anatomy(tiny_model())
    method = Imp(rounds=4, retrain=Retraining("all", steps=0))
    method.prune(imp_job(anatomy, method, Unstructured(0.6)))
    Magnitude().prune(make_job(Magnitude(), twin.model, Unstructured(0.6), anatomy=twin))
    assert differing(contents(twin.model), contents(anatomy.model)) == []


def test_rounds_that_repeat_the_pattern_only_retrain(monkeypatch: pytest.MonkeyPatch) -> None:
    anatomy = find_anatomy(tiny_model())
    rounds = Rounds(anatomy, monkeypatch)
    method = Imp(rounds=4, schedule="linear", retrain=Retraining("all", steps=1, batch=2, learning_rate=0.01))
    notes: dict[str, Any] = {}
    method.prune(imp_job(anatomy, method, NM(2, 4), notes))
    assert {len(laid) for laid in rounds.masks.values()} == {2}
    assert notes["rounds_that_only_retrain"] == ["round 2 keeps 3:4", "round 4 keeps 2:4"]
    assert len(notes["loss_curve"]) == 4
    assert notes["tokens_seen"] == 4 * 2 * 8
    assert notes["epochs"] == 4 * 2 / 7


def test_optimiser_state_is_new_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """And zeros stay zero though they had moved in the round before."""
    made = []

    class Seen(torch.optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Seen)
    anatomy = find_anatomy(tiny_model())
    method = Imp(rounds=3, retrain=Retraining("all", steps=2, batch=2, learning_rate=0.05))
    method.prune(imp_job(anatomy, method, Unstructured(0.7)))
    assert len(made) == 3
    assert all({int(state["step"]) for state in optimiser.state.values()} == {2} for optimiser in made)
    assert all(not bool(matrix.weight[~anatomy.masks[matrix.name]].any()) for matrix in anatomy.matrices)


@pytest.mark.parametrize("target", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_an_earlier_step_removed_never_comes_back(
    target: Target, schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for the early rounds, which ask for less than that step removed: it would train, and could stay."""
    anatomy = find_anatomy(tiny_model())
    generator = torch.Generator().manual_seed(0)
    earlier = {}
    for matrix in anatomy.matrices:
        earlier[matrix.name] = keep_mask(torch.rand(matrix.shape, generator=generator), target, "matrix")
        matrix.keep(earlier[matrix.name])
    rounds = Rounds(anatomy, monkeypatch)
    method = Imp(rounds=3, schedule=schedule, retrain=Retraining("all", steps=2, batch=2, learning_rate=0.1))
    method.prune(imp_job(anatomy, method, target))
    for matrix in anatomy.matrices:
        assert all(torch.equal(mask, earlier[matrix.name]) for mask in rounds.masks[matrix.name])
        assert not bool(matrix.weight[~earlier[matrix.name]].any())


def test_survivors_that_are_zero_stay_survivors_before_what_was_removed() -> None:
    """Half of an earlier mask's survivors are zero: the rest of the target comes from these, not from the removed."""
    anatomy = find_anatomy(tiny_model())
    earlier = {}
    for matrix in anatomy.matrices:
        matrix.keep(
            keep_mask(torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)), Unstructured(0.3), "matrix")
        )
        earlier[matrix.name] = anatomy.masks[matrix.name]
        weight = matrix.weight.clone()
        weight[:, ::2] = 0
        matrix.write(weight, earlier[matrix.name])
    method = Imp(rounds=1, retrain=Retraining("all", steps=0))
    method.prune(imp_job(anatomy, method, Unstructured(0.4)))
    for matrix in anatomy.matrices:
        mask = anatomy.masks[matrix.name]
        assert int((~mask).sum()) == int(0.4 * mask.numel())
        assert not bool((mask & ~earlier[matrix.name]).any())


def test_a_dense_target_only_retrains() -> None:
    """The control that recovery is compared with."""
    anatomy = find_anatomy(tiny_model())
    method, notes = Imp(rounds=2, retrain=QUICK_ALL), dict[str, Any]()
    method.prune(imp_job(anatomy, method, Dense(), notes))
    assert all(bool(mask.all()) for mask in anatomy.masks.values())
    assert notes["rounds_that_only_retrain"] == ["round 2 keeps dense"]


def test_training_helps() -> None:
    """More rounds than one; both better than without, on the text they train on."""
    losses = []
    for steps, rounds in [(0, 1), (12, 1), (6, 2)]:
        anatomy = find_anatomy(tiny_model())
        method = Imp(rounds=rounds, retrain=Retraining("all", steps=steps, batch=7, learning_rate=0.02))
        method.prune(imp_job(anatomy, method, Unstructured(0.5)))
        tokens = random_tokens(anatomy.model, seed=2)
        with torch.no_grad():
            losses.append(float(anatomy.model(tokens, labels=tokens, use_cache=False).loss))
    assert max(losses[1:]) < 0.8 * losses[0]


# What it says


def test_what_it_declares_and_refuses() -> None:
    method = Imp()
    assert method.needs() == Needs.WEIGHTS | Needs.TRAINING | Needs.SEED
    assert method.changes() == Changes.MASK_GROWS | Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS
    assert Imp(retrain=Retraining("norms")).changes() == Changes.MASK_GROWS | Changes.NORMS
    assert (Imp().audit_group(), Imp(group="row").audit_group()) == ("matrix", "row")
    facts = find_anatomy(tiny_model("llama")).facts(NM(2, 4))
    assert Imp().refuses(facts) is None
    assert "no biases" in (Imp(retrain=Retraining("biases")).refuses(facts) or "")


def test_written_as_options() -> None:
    """What is not given of `retrain` is the method's own: all is trained."""
    step = "imp[rounds=5,schedule=cubic,retrain.steps=60,retrain.schedule=clr]"
    method = build(Imp, parse_step(step))
    assert canonical("imp", method) == step
    assert (method.retrain.subset, method.retrain.highest_rate()) == ("all", 1e-5)
    assert build(Imp, parse_step("imp[retrain.subset=mask_lora]")).retrain.subset == "mask_lora"
    for wrong in ("rounds=0", "schedule=llr", "group=model", "retrain.steps=-1"):
        with pytest.raises(OptionError):
            build(Imp, parse_step(f"imp[{wrong}]"))


def test_what_a_record_keeps(bench: Bench, tmp_path: Path) -> None:
    options = "retrain.steps=2,retrain.batch=2,retrain.learning_rate=0.01"
    (record,) = records_of(bench, tmp_path, f"imp[rounds=3,{options}]")
    assert record.status == "ok", record.reason
    (step,) = record.steps
    assert 0.2 < step.notes["trained_share"] < 0.4  # the embeddings and the head are most of this model
    assert step.notes["tokens_seen"] == 3 * 2 * 2 * 16
    assert step.notes["epochs"] == 3 * 2 * 2 / 16
    assert len(step.notes["loss_curve"]) == 6
    json.dumps(step.notes, allow_nan=False)
    assert record.audit is not None
    assert record.audit.sparsity_prunable == pytest.approx(0.5, abs=1e-3)

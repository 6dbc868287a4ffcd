"""Virtual shapes: blocks that are drawn when they are visited. They come to what models come to that are there, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from support import cases, same_bits
from test_shapes import Speedy

from prunebench.bench import artefacts, drawn, runner
from prunebench.bench.costs import Work
from prunebench.bench.estimate import known_work
from prunebench.bench.measure import free_bytes
from prunebench.bench.plan import Keeping, Planner, RunRequest
from prunebench.bench.suite import Suite
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.results.consistency import VIRTUAL
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Job, Pruner
from prunebench.toolkit import keep_mask, magnitude_scores, walk
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.placement import HostActivations, Resident
from prunebench.toolkit.virtual import LIMIT, Drawing, DrawingToHost, is_large

METHODS = {
    "magnitude": "magnitude",
    "random": "random",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt",
    "gblm": "gblm",
    "wanda++": "wanda++[rounds=2,ro_samples=2,learning_rate=0.001]",
    "wanda after magnitude": "magnitude + wanda",
    "a given mask": "wanda + sparsegpt[mask=given]",
    "reconstruction": "magnitude + perp[mode=reconstruct,steps=2,batch=2]",
    "dense": "dense",
}


def request_of(method: str, shape: str = "tiny-llama", dtype: str = "float32", target: str = "2:4") -> RunRequest:
    suite = Suite.model_validate(
        {
            "suite": {"name": "costs"},
            "model": [{"shape": shape, "dtype": dtype}],
            "calibration": {"source": "random", "samples": 4, "length": 16},
            "training": {"source": "random", "tokens": 64},
            "method": [{"steps": method.split(" + ")}],
            "grid": {"targets": [target]},
            "limits": {"threads": 1, "batch_size": 2},
        }
    )
    (request,) = Planner(suite, load_registry(), "here", "prunebench run costs", "cpu").requests()
    return request


@dataclass
class Watch:
    """What runs left behind, block by block, and how many bytes of blocks were there at once."""

    monkeypatch: pytest.MonkeyPatch
    folder: Path

    def run(self, request: RunRequest, virtual: bool) -> tuple[RunRecord, dict[str, torch.Tensor]]:
        """A record, and every parameter of the blocks as the last step left it."""
        self.monkeypatch.setenv(LIMIT, "0" if virtual else "1000")
        outcome = runner.Outcome()
        left: dict[str, torch.Tensor] = {}
        drop = Drawing.drop

        def noted(placement: Drawing, module: torch.nn.Module) -> None:
            block = placement._blocks[id(module)]
            for name, parameter in module.named_parameters():
                if not parameter.is_meta:
                    left[f"{block.name}.{name}"] = parameter.detach().clone()
            drop(placement, module)

        self.monkeypatch.setattr(Drawing, "drop", noted)
        model = runner.prune(request, lambda *_: None, outcome)
        self.monkeypatch.setattr(Drawing, "drop", drop)
        assert outcome.anatomy is not None
        assert all(parameter.is_meta for block in outcome.anatomy.blocks for parameter in block.module.parameters()) == virtual
        if not virtual:
            for block in outcome.anatomy.blocks:
                left |= {f"{block.name}.{name}": p.detach().clone() for name, p in block.module.named_parameters()}
        assert not any(buffer.is_meta for buffer in model.buffers())
        self.masks = dict(outcome.anatomy.masks)
        return runner.make_record(request, outcome, "inline"), left


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Watch:
    monkeypatch.setenv(artefacts.LIMIT, "0")  # gradients of one run are not another's
    return Watch(monkeypatch, tmp_path)


@pytest.mark.parametrize("method", cases(METHODS))
def test_a_virtual_run_comes_to_what_another_does(watch: Watch, method: str) -> None:
    request = request_of(method)
    here, weights = watch.run(request, virtual=False)
    masks = watch.masks
    drawn_anew, left = watch.run(request, virtual=True)
    assert drawn_anew.audit == here.audit
    assert masks.keys() == watch.masks.keys()
    assert all(torch.equal(masks[name], watch.masks[name]) for name in masks)
    assert left.keys() == weights.keys()
    assert all(same_bits(left[name], weights[name]) for name in weights)
    for step, other in zip(here.steps, drawn_anew.steps, strict=True):
        assert other.notes.pop(VIRTUAL)
        assert other.notes == step.notes


@pytest.mark.parametrize(
    ("method", "shape", "dtype", "target"),
    [("wanda", "tiny-mixtral", "float32", "0.5"), ("sparsegpt", "tiny-llama", "bfloat16", "0.5")],
)
def test_so_it_does_with_experts_and_in_16_bits(watch: Watch, method: str, shape: str, dtype: str, target: str) -> None:
    request = request_of(method, shape, dtype, target)
    (here, weights), (anew, left) = (watch.run(request, virtual) for virtual in (False, True))
    assert anew.audit == here.audit
    assert all(same_bits(left[name], weights[name]) for name in weights)


def test_one_block_is_there_at_a_time(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    bring, most = Drawing.bring, [0]

    def counted(placement: Drawing, module: torch.nn.Module) -> None:
        bring(placement, module)
        parameters = [p for block in placement._anatomy.blocks for p in block.module.parameters()]
        most.append(sum(p.nbytes for p in parameters if not p.is_meta))

    monkeypatch.setattr(Drawing, "bring", counted)
    request = request_of("gblm")
    watch.run(request, virtual=True)
    block = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64)
    assert max(most) == block


def test_a_run_of_a_virtual_shape_expects_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(method: str, limit: str) -> Work:
        monkeypatch.setenv(LIMIT, limit)
        return known_work([request_of(method)], load_registry())[0]

    blocks = 3 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64)
    assert work("wanda", "1000").held_bytes == 4 * 195_008
    assert abs(work("wanda", "0").held_bytes - (4 * 195_008 - blocks * 2 // 3)) <= 4 * 2 * 64 * 3
    perp = work("magnitude + perp[steps=1]", "0")
    assert perp.held_bytes == perp.weight_bytes, "what is trained is there whole"


# What cannot be


@dataclass
class _Plain(Pruner):
    """Magnitude, with something beside it."""

    name: ClassVar[str] = "odd"

    def prune(self, job: Job) -> None:
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))
            self.meddle(job, block)

    def meddle(self, job: Job, block: Any) -> None: ...


@dataclass
class _Nudges(_Plain):
    """Changes survivors."""

    def meddle(self, job: Job, block: Any) -> None:
        block.matrices[0].weight.mul_(1.5)


@dataclass
class _NudgesNorms(_Plain):
    """Changes norms."""

    def meddle(self, job: Job, block: Any) -> None:
        with torch.no_grad():
            block.module.input_layernorm.weight.mul_(2)


@dataclass
class _RevivesOne(_Plain):
    """Fills a whole matrix after its mask was laid."""

    def meddle(self, job: Job, block: Any) -> None:
        block.matrices[1].weight.fill_(1)


@dataclass
class _Forgets(_Plain):
    """Prunes the first block alone."""

    def prune(self, job: Job) -> None:
        for block in walk(job):
            for matrix in block.matrices:
                matrix.keep(keep_mask(magnitude_scores(matrix.weight), job.target, group="row"))
            break


@dataclass
class _NotFinite(_Plain):
    """Leaves a number that is none, as it says it may."""

    def meddle(self, job: Job, block: Any) -> None:
        block.matrices[0].weight[0, 0] = float("nan")

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS


@dataclass
class _PastTheWalk(_Plain):
    """Lays masks without visiting blocks."""

    def prune(self, job: Job) -> None:
        for matrix in job.anatomy.matrices:
            matrix.keep(torch.ones(matrix.shape, dtype=torch.bool))


@dataclass
class _Twice(_Plain):
    """Changes survivors, as it says, and comes again."""

    def changes(self) -> Changes:
        return Changes.MASK_GROWS | Changes.KEPT_WEIGHTS

    def meddle(self, job: Job, block: Any) -> None:
        block.matrices[0].weight.mul_(1.5)

    def prune(self, job: Job) -> None:
        super().prune(job)
        super().prune(job)


WRONG = {
    "survivors": (_Nudges, "failed", "surviving entries of model.layers.0.self_attn.q_proj, and does not declare KEPT_WEIGHTS"),
    "norms": (_NudgesNorms, "failed", "the step changed model.layers.0.input_layernorm.weight, which it does not declare"),
    "left": (_RevivesOne, "failed", "surviving entries of model.layers.0.self_attn.k_proj"),
    "no mask": (_Forgets, "failed", "model.layers.1.self_attn.q_proj has no keep mask"),
    "nan": (_NotFinite, "failed", "model.layers.0.self_attn.q_proj holds 1 entries that are NaN or infinite"),
    "past the walk": (_PastTheWalk, "failed", "is changed inside the walk only"),
    "twice": (_Twice, "refused", "model.layers.0 is visited again after its kept weights were changed"),
}


@pytest.mark.parametrize(("pruner", "status", "said"), cases(WRONG))
def test_what_a_block_was_left_as_is_audited(
    monkeypatch: pytest.MonkeyPatch, register: Callable[..., None], pruner: type[Pruner], status: str, said: str
) -> None:
    register(pruner)
    monkeypatch.setenv(LIMIT, "0")
    record = runner.run(request_of("odd"), lambda *_: None, "inline")
    assert record.status == status
    assert said in (record.reason or "")


def test_a_step_that_changes_more_than_masks_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    record = runner.run(request_of("sparsegpt + wanda"), lambda *_: None, "inline")
    assert record.status == "refused"
    assert "sparsegpt changes more than masks, which shape:tiny-llama would lose before the next step" in (record.reason or "")
    assert not record.steps


def test_a_whole_model_is_trained_where_it_fits_and_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    request = request_of("magnitude + perp[steps=2,batch=1]")
    record = runner.run(request, lambda *_: None, "inline")
    assert record.status == "ok", record.reason
    assert VIRTUAL not in record.steps[0].notes
    monkeypatch.setattr(runner, "free_bytes", lambda *_: 1000)
    record = runner.run(request, lambda *_: None, "inline")
    assert record.status == "refused"
    assert "to train shape:tiny-llama it must be whole on the device" in (record.reason or "")


def test_a_shape_that_leaves_no_room_on_the_device_rests_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is drawn on the device all the same, so its bits are those of the device."""
    request = request_of("wanda")
    places: list[torch.device | None] = []

    def noted(model: Any, dtype: torch.dtype, device: torch.device, rests: Callable[[str], torch.device | None]) -> None:
        places.append(rests("model.layers.0.mlp.up_proj.weight"))

    monkeypatch.setattr(drawn, "filled", noted)
    for free in (free_bytes(torch.device("cpu")), 1000):
        drawn.drawn_model(replace(request, device="cuda"), [], free)
    assert places == [torch.device("cuda"), torch.device("cpu")]


def test_virtual_shapes_are_not_evaluated(monkeypatch: pytest.MonkeyPatch, register: Callable[..., None]) -> None:
    register(Speedy)
    monkeypatch.setenv(LIMIT, "0")
    suite = Suite.model_validate(
        {
            "suite": {"name": "costs"},
            "model": [{"shape": "tiny-llama"}],
            "method": [{"steps": ["magnitude"]}],
            "eval": [{"use": "speedy"}],
            "grid": {"targets": ["0.5"]},
        }
    )
    with pytest.raises(RequestError, match="more than half of this host's memory"):
        Planner(suite, load_registry(), "here", "", "cpu").requests()


def test_masks_of_a_virtual_shape_are_kept_and_nothing_is_checkpointed(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "0")
    folder = watch.folder / "results"
    request = replace(
        request_of("wanda"),
        keep=Keeping(str(folder)),
        checkpoint_every=1,
        checkpoints=str(watch.folder / "checkpoints"),
    )
    record = runner.run(request, lambda *_: None, "inline")
    assert record.status == "ok", record.reason
    assert record.masks is not None
    assert (folder / record.masks.file).is_file()
    assert not (watch.folder / "checkpoints").exists()


def test_the_limit_is_half_of_the_host_or_as_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    assert not is_large(1 << 20)
    assert is_large(1 << 60)
    monkeypatch.setenv(LIMIT, "2")
    assert (is_large(2 << 30), is_large((2 << 30) + 1)) == (False, True)
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(RequestError, match="is a number of GiB, not 'much'"):
        is_large(1)


def test_activations_of_a_virtual_shape_rest_on_the_host_where_they_do_not_fit() -> None:
    request = request_of("wanda")
    model = drawn.left_virtual(drawn.empty_model(request.model), torch.float32, torch.device("cpu"))
    anatomy = find_anatomy(model)
    kinds = [type(drawn.drawing_place(resting, request, anatomy)) for resting in (Resident, HostActivations)]
    assert kinds == [Drawing, DrawingToHost]
    place = DrawingToHost("cpu", anatomy, drawn._weights(request, anatomy))
    module = anatomy.blocks[0].module
    place.bring(module)
    assert not any(parameter.is_meta for parameter in module.parameters())
    place.release(module)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert place.differing(anatomy.matrices[0]) == 0

"""A run that is killed anywhere goes on there: the same bits, masks, notes and scores as one that nobody touched."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, cases, files_no_larger_than, fingerprint, halve, same_bits, tiny, tree
from transformers import PreTrainedTokenizerFast

from prunebench.bench import checkpoint_origin, machine, measure, runner
from prunebench.bench.checkpoint_files import MANIFEST, CheckpointFolder
from prunebench.bench.checkpoint_origin import code_digest
from prunebench.bench.checkpoints import clear, clear_older
from prunebench.bench.plan import RunRequest
from prunebench.results.records import RunRecord
from prunebench.spec import Claims, Job, Progress
from prunebench.toolkit import phase, walk
from prunebench.toolkit.carried import put_back, written
from prunebench_pruners.wanda import Wanda

BLOCKS = 4
METHODS = {
    "magnitude": "magnitude",
    "random": "random",
    "wanda": "wanda",
    "sparsegpt": "sparsegpt[block_size=8]",
    "gblm": "gblm",
    "wanda++": "wanda++[rounds=2,ro_samples=2,learning_rate=0.001]",
}


class Killed(KeyboardInterrupt):
    """Ends a run without a record, as a kill does."""


@dataclass(frozen=True)
class Ended:
    """What a run has come to."""

    record: RunRecord
    model: dict[str, torch.Tensor]
    masks: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def deep(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks, with the bench's tokenizer."""
    folder: Path = tmp_path_factory.mktemp("deep") / "deep"
    shape = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": BLOCKS}
    tiny("llama", bos_token_id=0, eos_token_id=0, **shape).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(bench.model).save_pretrained(folder)
    return folder


@pytest.fixture
def request_of(bench: Bench, deep: Path, tmp_path: Path) -> Callable[..., RunRequest]:
    """The request of a method's run, that keeps checkpoints after every block."""

    def make(method: str, every: int | None = 1, **options: Any) -> RunRequest:
        text = bench.suite_text(method, model=deep, **{"seeds": [3], **options})
        (tmp_path / "small.toml").write_text(text)
        (request,) = bench.requests(tmp_path, method, model=deep, **{"seeds": [3], **options})
        return replace(request, checkpoint_every=every, checkpoints=str(tmp_path / "kept"))

    return make


def run(request: RunRequest, progress: Progress = lambda what, done, total: None) -> Ended:
    """Do a run, and look at what the record does not say."""
    seen: list[Any] = []
    load = runner.load_model
    try:
        runner.load_model = lambda *given: seen.append(load(*given)) or seen[-1]  # type: ignore[func-returns-value]
        outcomes: list[runner.Outcome] = []
        make = runner.Outcome
        runner.Outcome = lambda: outcomes.append(make()) or outcomes[-1]  # type: ignore[assignment,misc,func-returns-value]
        record = runner.run(request, progress, "inline")
    finally:
        runner.load_model, runner.Outcome = load, make  # type: ignore[misc]
    anatomy = outcomes[0].anatomy
    assert anatomy is not None
    adapters = [(adapter.matrix, adapter.down, adapter.up) for adapter in anatomy.adapters]
    model = fingerprint(seen[0]) | {f"{name} {half}": x for name, *both in adapters for half, x in enumerate(both)}
    return Ended(record, model, dict(anatomy.masks))


def kill_at(what: str, done: int) -> Progress:
    """Ends the run when it tells this progress."""

    def progress(said: str, at: int, total: int) -> None:
        if said.startswith(what) and at == done:
            raise Killed

    return progress


def killed(request: RunRequest, what: str, done: int) -> None:
    with pytest.raises(Killed):
        run(request, kill_at(what, done))


def assert_same(one: Ended, other: Ended) -> None:
    """But for costs and for notes of where it went on."""
    assert one.record.status == other.record.status == "ok", (one.record.reason, other.record.reason)
    assert one.model.keys() == other.model.keys()
    assert [name for name in one.model if not same_bits(one.model[name], other.model[name])] == []
    assert one.masks.keys() == other.masks.keys()
    assert [name for name in one.masks if not torch.equal(one.masks[name], other.masks[name])] == []
    assert one.record.audit == other.record.audit
    assert scores_of(one) == scores_of(other)
    assert [notes_of(step) for step in one.record.steps] == [notes_of(step) for step in other.record.steps]


def scores_of(ended: Ended) -> list[Any]:
    return [(name, score.value, score.items) for name, score in ended.record.scores.items()]


def notes_of(step: Any) -> dict[str, Any]:
    return {key: note for key, note in step.notes.items() if key not in ("resumed", "checkpoint discarded")}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_killed_at_any_block_ends_as_if_it_had_not_been(request_of: Callable[..., RunRequest], method: str) -> None:
    request = request_of(method)
    whole = run(replace(request, checkpoint_every=None))
    for block in range(1, BLOCKS):
        killed(request, "block", block)
        again = run(request)
        assert again.record.steps[0].notes["resumed"] == f"at block {block} of {BLOCKS}"
        assert_same(whole, again)
        clear(request)
        assert not Path(request.checkpoints or "").exists()


# Steps, evaluations, and what is beyond matrices

TWO_STEPS = {
    "two that walk": "wanda + sparsegpt[mask=given]",
    "a second that trains": "wanda + perp[subset=biases+norms,mode=reconstruct,steps=2,batch=2]",
    "an adapter": "magnitude + lora[steps=2,batch=2,rank=2] + sparsegpt[mask=given]",
    "a head": "magnitude + perp[subset=head,steps=2,batch=2,rank=2] + sparsegpt[mask=given]",
}


@pytest.fixture
def training(bench: Bench) -> dict[str, str]:
    return {"more": f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 64"}


@pytest.mark.parametrize("method", cases(TWO_STEPS))
def test_steps_that_are_finished_are_not_taken_again(
    request_of: Callable[..., RunRequest], training: dict[str, str], method: str
) -> None:
    request = request_of(method, **training)
    whole = run(replace(request, checkpoint_every=None))
    steps = len(whole.record.steps)
    for step in range(1, steps):
        killed(request, "step", step)
        again = run(request)
        assert again.record.steps[step].notes["resumed"] == f"after step {step} of {steps}"
        assert_same(whole, again)
        clear(request)


def test_a_later_step_goes_on_in_its_midst(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda + sparsegpt[mask=given]")
    whole = run(replace(request, checkpoint_every=None))
    seen: list[tuple[str, int]] = []

    def progress(said: str, at: int, total: int) -> None:
        seen.append((said.partition(" ")[0], at))
        if seen.count(("step", 1)) and seen[-1] == ("block", 2):
            raise Killed

    with pytest.raises(Killed):
        run(request, progress)
    again = run(request)
    assert again.record.steps[0].notes == whole.record.steps[0].notes
    assert again.record.steps[1].notes["resumed"] == f"at block 2 of {BLOCKS}"
    assert_same(whole, again)


def test_scores_that_were_found_are_not_measured_again(bench: Bench, request_of: Callable[..., RunRequest]) -> None:
    other = bench.perplexity.replace("windows=4", "windows=3")
    request = request_of("wanda", evals=[bench.perplexity, other])
    whole = run(replace(request, checkpoint_every=None))
    killed(request, f"eval {other}", 0)
    said: list[str] = []
    again = run(request, lambda what, done, total: said.append(what))
    assert [what for what in said if what.startswith("eval")] == [f"eval {other}"]
    assert "block" not in said
    assert again.record.steps[0].notes == {"resumed": "after step 1 of 1"}
    assert_same(whole, again)


def test_a_method_that_claims_nothing_starts_its_step_again(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wanda, "claims", lambda self: Claims.NOTHING)
    request = request_of("wanda")
    killed(request, "block", 2)
    assert tree(Path(request.checkpoints or "")) == {}
    said: list[tuple[str, int]] = []
    again = run(request, lambda what, done, total: said.append((what, done)))
    assert ("block", 0) in said
    assert again.record.steps[0].notes == {}


def test_a_run_may_be_killed_again_and_again(request_of: Callable[..., RunRequest]) -> None:
    request = request_of(METHODS["sparsegpt"])
    whole = run(replace(request, checkpoint_every=None))
    for block in range(1, BLOCKS):
        killed(request, "block", block)
    assert_same(whole, run(request))


def test_every_n_blocks_is_every_n_blocks(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda", every=2)
    killed(request, "block", 1)
    assert not Path(request.checkpoints or "").exists()
    killed(request, "block", 3)
    said: list[tuple[str, int]] = []
    again = run(request, lambda what, done, total: said.append((what, done)))
    assert again.record.steps[0].notes == {"resumed": f"at block 2 of {BLOCKS}"}
    assert min(done for what, done in said if what == "block") == 2


# Costs


def test_seconds_before_the_kill_count_once_and_those_of_saving_never(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("prunebench.toolkit.phases.time.perf_counter", lambda: clock[0])
    store = CheckpointFolder.store

    def slow(self: CheckpointFolder, name: str, tensors: Any) -> None:
        clock[0] += 1000.0
        store(self, name, tensors)

    def prune(self: Wanda, job: Job) -> None:
        clock[0] += 10.0  # before the walk: done again
        for block in walk(job):
            with phase("scoring"):
                clock[0] += 1.0
            halve(block)

    monkeypatch.setattr(CheckpointFolder, "store", slow)
    monkeypatch.setattr(Wanda, "prune", prune)
    monkeypatch.setattr(Wanda, "audit_group", lambda self: "matrix")
    request = request_of("wanda")
    killed(request, "block", 2)
    killed(request, "block", 3)
    (step,) = run(request).record.steps
    assert step.phases["scoring"] == BLOCKS
    assert sum(step.phases.values()) == 10 + BLOCKS


def test_a_run_began_when_its_killed_part_did(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda")
    killed(request, "block", 3)
    manifest = Path(request.checkpoints or "") / MANIFEST
    said = json.loads(manifest.read_text())["said"]
    made = run(request).record.provenance
    assert made.started == said["started"][:19] + "+00:00"
    assert made.seconds > said["seconds"] > 0


@pytest.mark.parametrize("at", [("block", 2), ("step", 1), ("eval", 0)], ids=lambda at: at[0])
def test_what_shared_the_machine_before_the_kill_is_not_known(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, at: tuple[str, int]
) -> None:
    monkeypatch.setattr(measure, "_busy_seconds", lambda: 0.0)  # nobody now
    request = request_of("wanda + sparsegpt[mask=given]")
    assert not run(request).record.provenance.shared_machine
    clear(request)
    killed(request, *at)
    killed(request, "eval", 0)
    assert run(request).record.provenance.shared_machine


# A batch size that the run chooses


@pytest.mark.parametrize("killed_at", [("block", 2), ("eval", 0)], ids=lambda at: at[0])
def test_a_batch_size_that_was_chosen_is_kept(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, killed_at: tuple[str, int]
) -> None:
    request = replace(request_of("wanda"), batch_size=0)
    monkeypatch.setattr(runner, "free_bytes", lambda device, limit: 1 << 40)
    whole = run(replace(request, checkpoint_every=None))
    killed(request, *killed_at)
    monkeypatch.setattr(runner, "free_bytes", lambda device, limit: 0)
    again = run(request)
    assert "resumed" in again.record.steps[0].notes
    assert again.record.provenance.batch_size == whole.record.provenance.batch_size == 8
    assert_same(whole, again)


def test_without_a_usable_checkpoint_it_is_chosen_anew(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = replace(request_of("wanda"), batch_size=0)
    monkeypatch.setattr(runner, "free_bytes", lambda device, limit: 1 << 40)
    killed(request, "block", 2)
    monkeypatch.setattr(runner, "free_bytes", lambda device, limit: 0)
    elsewhere = run(replace(request, machine="there"))
    assert elsewhere.record.provenance.batch_size == 1
    assert elsewhere.record.steps[0].notes == {"checkpoint discarded": "it was made with another machine."}
    assert json.loads((Path(request.checkpoints or "") / MANIFEST).read_text())["said"]["made"]["batch size"] == 1


# What may not be used


def damaged(how: Callable[[Path], None]) -> Callable[[RunRequest, pytest.MonkeyPatch], RunRequest]:
    def damage(request: RunRequest, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
        how(Path(request.checkpoints or ""))
        return request

    return damage


def first(folder: Path, kind: str) -> Path:
    return sorted(folder.glob(f"{kind}-*.safetensors"))[0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"done": 2', '"done": 1'))


def elsewhere(folder: Path) -> None:
    """Somebody who can compute sums makes the manifest name a file outside."""
    path = folder / MANIFEST
    data = json.loads(path.read_text().replace('"blocks-0-1.safetensors"', '"../blocks-0-1.safetensors"'))
    data["sum"] = hashlib.sha256(json.dumps(data["said"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data))
    (folder / "blocks-0-1.safetensors").rename(folder.parent / "blocks-0-1.safetensors")


def with_other_code(request: RunRequest, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    monkeypatch.setattr(checkpoint_origin, "code_digest", lambda modules: "another")
    return request


def with_other_packages(request: RunRequest, monkeypatch: pytest.MonkeyPatch) -> RunRequest:
    monkeypatch.setattr(machine, "package_versions", lambda: {"torch": "3.0"})
    return request


UNUSABLE: dict[str, tuple[Any, str]] = {
    "blocks cut short": (damaged(lambda folder: cut(first(folder, "blocks"))), "its file blocks-0-1.safetensors is not as it"),
    "a bit of a block": (damaged(lambda folder: flip(first(folder, "blocks"))), "its file blocks-0-1.safetensors is not as it"),
    "hidden states": (damaged(lambda folder: flip(first(folder, "passing"))), "its file passing-0-2.safetensors is not as it"),
    "a file gone": (damaged(lambda folder: first(folder, "blocks").unlink()), "its file blocks-0-1.safetensors is not as it"),
    "manifest cut short": (damaged(lambda folder: cut(folder / MANIFEST)), "its manifest cannot be read"),
    "manifest empty": (damaged(lambda folder: (folder / MANIFEST).write_bytes(b"")), "its manifest cannot be read"),
    "manifest nested": (damaged(lambda folder: (folder / MANIFEST).write_text("[" * 100_000)), "its manifest cannot be read"),
    "manifest a list": (damaged(lambda folder: (folder / MANIFEST).write_text("[]")), "its manifest cannot be read"),
    "manifest edited": (damaged(edit), "its manifest cannot be read"),
    "a file elsewhere": (damaged(elsewhere), "its file ../blocks-0-1.safetensors is not as it was written"),
    "batch size": (lambda request, _: replace(request, batch_size=2), "it was made with another batch size"),
    "threads": (lambda request, _: replace(request, threads=2), "it was made with another number of threads"),
    "machine": (lambda request, _: replace(request, machine="there"), "it was made with another machine"),
    "code": (with_other_code, "it was made with another code"),
    "packages": (with_other_packages, "it was made with another packages"),
}


@pytest.mark.parametrize(("change", "reason"), cases(UNUSABLE))
def test_what_is_torn_or_made_otherwise_is_thrown_away(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    request = request_of("wanda")
    killed(request, "block", 2)
    changed = change(request, monkeypatch)
    said: list[tuple[str, int]] = []
    again = run(changed, lambda what, done, total: said.append((what, done)))
    assert ("block", 0) in said
    notes = again.record.steps[0].notes
    assert list(notes) == ["checkpoint discarded"]
    assert notes["checkpoint discarded"].startswith(reason)
    assert_same(run(replace(changed, checkpoint_every=None)), again)


def test_another_runs_checkpoint_is_not_this_ones(request_of: Callable[..., RunRequest]) -> None:
    killed(request_of("wanda"), "block", 2)
    again = run(request_of("wanda", targets=["2:4"]))
    assert again.record.steps[0].notes == {"checkpoint discarded": "it was made with another run."}


def test_a_checkpoint_that_cannot_be_written_fails_nothing(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda")
    whole = run(replace(request, checkpoint_every=None))
    with files_no_larger_than(4096):
        again = run(request)
    assert list(again.record.steps[0].notes) == ["checkpoint not written"]
    assert again.record.status == "ok"
    assert not (Path(request.checkpoints or "") / MANIFEST).exists()
    assert scores_of(again) == scores_of(whole)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("wanda")
    whole = run(replace(request, checkpoint_every=None))
    commit, calls = CheckpointFolder.commit, [0]

    def full(self: CheckpointFolder, *given: Any) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(28, "No space left on device")
        commit(self, *given)

    monkeypatch.setattr(CheckpointFolder, "commit", full)
    killed(request, "eval", 0)
    monkeypatch.undo()
    assert calls[0] == 3  # the step's end was not even tried
    again = run(request)
    assert again.record.steps[0].notes == {"resumed": f"at block 2 of {BLOCKS}"}
    assert_same(whole, again)


def test_a_disk_that_is_full_when_scores_come_is_noted(
    request_of: Callable[..., RunRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of("wanda", every=BLOCKS)
    commit, calls = CheckpointFolder.commit, [0]

    def full(self: CheckpointFolder, *given: Any) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(28, "No space left on device")
        commit(self, *given)

    monkeypatch.setattr(CheckpointFolder, "commit", full)
    assert run(request).record.steps[0].notes == {"checkpoint not written": "No space left on device"}


def test_without_the_option_nothing_is_taken_or_written_and_what_is_there_goes(
    request_of: Callable[..., RunRequest],
) -> None:
    request = request_of("wanda")
    plain = replace(request, checkpoint_every=None)
    run(plain)
    assert not Path(request.checkpoints or "").exists()
    killed(request, "block", 2)
    left = tree(Path(request.checkpoints or ""))
    assert run(plain).record.steps[0].notes == {}
    assert tree(Path(request.checkpoints or "")) == left
    clear(plain)
    assert not Path(request.checkpoints or "").exists()


def test_a_run_that_is_done_again_takes_no_checkpoint_from_before(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda")
    folder = Path(request.checkpoints or "")
    killed(request, "block", 2)
    clear_older(request, [])
    settled = run(replace(request, checkpoint_every=None)).record
    assert folder.exists()
    clear_older(replace(request, checkpoint_every=None), [settled])
    assert not folder.exists()
    clear_older(request, [settled])
    clear_older(replace(request, checkpoints=None), [settled])
    killed(request, "block", 2)  # the attempt to do it again
    later = folder.joinpath(MANIFEST).stat().st_mtime + 10
    os.utime(folder / MANIFEST, (later, later))
    clear_older(request, [settled])
    assert run(request).record.steps[0].notes == {"resumed": f"at block 2 of {BLOCKS}"}


# Code of plugins


THEIRS = '''
from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Eval, Score


@dataclass
class Theirs(Eval):
    """From a namespace package."""

    name: ClassVar[str] = "theirs"

    def conditions(self, facts):
        return {"eval": "theirs"}

    def measure(self, job):
        return Score(1.0, "of them", True)
'''


def test_plugins_of_a_namespace_package_count_evaluations_too(
    request_of: Callable[..., RunRequest], register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "source" / "theirs_by_name" / "part" / "plugin.py"
    file.parent.mkdir(parents=True)
    file.write_text(THEIRS)
    file.with_name("gone.py").symlink_to("nowhere")  # as an editor's lock
    monkeypatch.syspath_prepend(tmp_path / "source")
    register(importlib.import_module("theirs_by_name.part.plugin").Theirs)
    assert sys.modules["theirs_by_name"].__file__ is None
    request = request_of("wanda", evals=["theirs"])
    killed(request, "block", 2)
    file.write_text(THEIRS + "# another line")
    code_digest.cache_clear()
    assert run(request).record.steps[0].notes == {"checkpoint discarded": "it was made with another code."}


# What a walk carries


def test_generators_are_put_back_wherever_they_are() -> None:
    class Holder:
        def __init__(self) -> None:
            self.own = torch.Generator()

    def made() -> list[Any]:
        return [torch.Generator(), Holder(), [torch.Generator(), (torch.Generator(), 2)], {"a": [torch.Generator()]}]

    def inside(things: list[Any]) -> list[torch.Generator]:
        alone, holder, many, named = things
        return [alone, holder.own, many[0], many[1][0], named["a"][0]]

    first, second = made(), made()
    for seed, generator in enumerate(inside(first)):
        torch.rand(seed + 1, generator=generator.manual_seed(seed))
    tensors, rest = written(first)
    before = inside(second)
    put_back(second, tensors, json.loads(json.dumps(rest)))
    for one, other in zip(inside(first), inside(second), strict=True):
        assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=other))
    assert inside(second)[0] is before[0]
    assert inside(second)[1] is before[1]


def test_a_finished_run_leaves_one_state_and_no_scraps(request_of: Callable[..., RunRequest]) -> None:
    request = request_of("wanda")
    run(request)
    folder = Path(request.checkpoints or "")
    assert {path.partition("-")[0] for path in tree(folder)} == {MANIFEST, "state"}
    (folder / "mine.txt").write_text("not the harness's")
    clear(request)
    assert list(tree(folder)) == ["mine.txt"]


# Really killed


def lives_until(request: RunRequest, block: int) -> None:
    """A process's whole life: it kills itself, as nothing in Python can stop it, when a block begins."""

    def progress(said: str, at: int, total: int) -> None:
        if (said, at) == ("block", block):
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    runner.run(request, progress, "inline")


@pytest.mark.slow
def test_a_process_that_is_killed_at_every_block_in_turn_gets_there(request_of: Callable[..., RunRequest]) -> None:
    request = request_of(METHODS["wanda++"])
    whole = run(replace(request, checkpoint_every=None))
    fresh = multiprocessing.get_context("spawn")
    for block in range(1, BLOCKS):
        child = fresh.Process(target=lives_until, args=(request, block))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    again = run(request)
    assert again.record.steps[0].notes["resumed"] == f"at block {BLOCKS - 1} of {BLOCKS}"
    assert_same(whole, again)

"""The mask bank: what runs keep, and that the pruned model is there again from it, to the last bit, without pruning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Bench, files_no_larger_than, fingerprint, same_bits, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import prunebench
from prunebench.bench import mask_bank, rescoring, room, runner
from prunebench.bench.estimate import known_work
from prunebench.bench.evaluation import evaluate
from prunebench.bench.plan import Keeping, Rescoring, RunRequest
from prunebench.bench.room import check_room, expected_bytes, without_masks
from prunebench.errors import RequestError
from prunebench.plugins import load_registry
from prunebench.results.content import canonical_json
from prunebench.results.mask_files import read_masks
from prunebench.results.records import RunRecord
from prunebench.spec import Changes, Job, Needs, Pruner

Make = Callable[..., RunRequest]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def request_of(bench: Bench, tmp_path: Path, store: Path) -> Make:
    """The request of a method's run that keeps its masks."""

    def make(method: str, weights: bool = False, **options: Any) -> RunRequest:
        training = f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 128\n"
        (request,) = bench.requests(tmp_path, method, **{"more": training, "seeds": [3], **options})
        return replace(request, keep=Keeping(str(store), weights))

    return make


@dataclass
class Ended:
    """What a run came to, and the model that was evaluated."""

    record: RunRecord
    model: dict[str, torch.Tensor]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunRequest], Ended]:
    models: list[dict[str, torch.Tensor]] = []

    def watched(request: RunRequest, model: PreTrainedModel, *more: Any) -> None:
        models.append(fingerprint(model))
        evaluate(request, model, *more)

    monkeypatch.setattr(runner, "evaluate", watched)

    def do(request: RunRequest) -> Ended:
        record = runner.run(request, lambda what, done, total: None, "inline")
        assert record.status == "ok", record.reason
        assert RunRecord.model_validate_json(record.model_dump_json(by_alias=True)) == record
        return Ended(record, models[-1])

    return do


def rescoring_of(request: RunRequest, record: RunRecord, store: Path, **changes: Any) -> RunRequest:
    """The same conditions, nothing of what pruning needs."""
    return replace(request, keep=None, tokens={}, rescoring=Rescoring(record, str(store)), **changes)


@pytest.fixture
def no_pruning(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Pruners that may not prune."""
    called: list[str] = []

    def forbid() -> None:
        for entry in load_registry().pruners.values():
            monkeypatch.setattr(entry.cls, "prune", lambda self, job: called.append(self.name))

    forbid.called = called  # type: ignore[attr-defined]
    yield forbid  # type: ignore[misc]
    assert called == []


# What is kept


def test_masks_are_kept_with_their_manifest(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    ended = run(request_of("wanda"))
    record, kept = ended.record, ended.record.masks
    assert kept is not None
    path = store / kept.file
    assert (kept.bytes, kept.weights_file, kept.note) == (path.stat().st_size, None, None)
    masks = read_masks(path, kept.hash)
    spec = record.spec
    assert masks.manifest == {
        "weights": spec.model.weights,
        "model": "tiny",
        "dtype": "float32",
        "target": "0.5",
        "method": "wanda",
        "recipe": canonical_json(spec.recipe.model_dump(mode="json")),
        "seed": "3",
        "prunebench": prunebench.__version__,
    }
    assert record.audit is not None
    for matrix in record.audit.matrices:
        assert masks.removed(matrix.name) == matrix.removed > 0
        assert masks.shapes[matrix.name] == matrix.shape
        assert (masks.keep(matrix.name) == (ended.model[f"{matrix.name}.weight"] != 0).numpy()).all()


def test_masks_are_a_sixteenth_of_16_bit_weights(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    kept = run(request_of("magnitude")).record.masks
    assert kept is not None
    masks = read_masks(store / kept.file)
    assert 16 * sum(masks.packed(name).nbytes for name in masks.shapes) == 2 * sum(r * c for r, c in masks.shapes.values())


def test_masks_are_no_part_of_what_a_run_is(request_of: Make, run: Callable[[RunRequest], Ended]) -> None:
    with_masks = run(request_of("wanda")).record
    without = run(replace(request_of("wanda"), keep=None)).record
    assert without.masks is None
    assert (with_masks.id, with_masks.spec, with_masks.audit) == (without.id, without.spec, without.audit)
    assert with_masks.scores["perplexity"].items == without.scores["perplexity"].items


def test_the_same_run_twice_is_one_file(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    first, second = run(request_of("sparsegpt[block_size=8]", weights=True)), run(request_of("sparsegpt[block_size=8]", True))
    assert first.record.masks == second.record.masks
    assert len(list((store / "masks").iterdir())) == 2


def test_the_dense_model_and_a_run_that_failed_keep_nothing(
    request_of: Make, run: Callable[[RunRequest], Ended], store: Path, register: Callable[..., None]
) -> None:
    assert run(request_of("dense")).record.masks is None
    register(stranger(lambda job: None, Changes.MASK_GROWS))
    record = runner.run(request_of("stranger"), lambda what, done, total: None, "inline")
    assert (record.status, record.masks) == ("failed", None)
    assert not store.exists()


def test_a_full_disk_costs_the_masks_and_not_the_run(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    with files_no_larger_than(1000):
        record = run(request_of("magnitude")).record
    assert record.masks is None
    assert "cannot be written" in str(record.steps[-1].notes["masks not kept"])
    assert str(store) not in record.to_json()
    assert list((store / "masks").iterdir()) == []


def test_masks_without_the_changed_weights_say_so(request_of: Make, run: Callable[[RunRequest], Ended]) -> None:
    kept = run(request_of("sparsegpt[block_size=8]")).record.masks
    assert kept is not None
    assert kept.note is not None
    assert "surviving weights" in kept.note
    assert "--keep-weights" in kept.note
    assert kept.weights_file is None


# And made again


def stranger(prune: Callable[[Job], None], changes: Changes) -> type[Pruner]:
    """A pruner that does as told."""

    @dataclass
    class Stranger(Pruner):
        """A stranger's."""

    Stranger.name = "stranger"
    Stranger.prune = lambda self, job: prune(job)  # type: ignore[method-assign]
    Stranger.needs = lambda self: Needs.WEIGHTS  # type: ignore[method-assign]
    Stranger.changes = lambda self: changes  # type: ignore[method-assign]
    Stranger.__abstractmethods__ = frozenset()
    return Stranger


METHODS = {
    "masks alone": "wanda",
    "masks of a pattern": "wanda 2:4",
    "masks of columns": "magnitude[group=row]",
    "surviving weights": "sparsegpt[block_size=8]",
    "norms and biases": "magnitude[group=row] + perp[subset=norms,steps=2,batch=2]",
    "the head": "magnitude[group=row] + perp[subset=head,steps=2,batch=2]",
    "merged adapters": "magnitude[group=row] + perp[subset=mask_lora,steps=2,batch=2]",
    "adapters apart": "magnitude[group=row] + lora[rank=2,steps=2,batch=2]",
    "wanda++": "wanda++[rounds=1,ro_samples=2]",
}


@pytest.mark.parametrize("name", METHODS)
def test_rescoring_gives_the_bits_of_the_run_without_pruning(
    name: str, request_of: Make, run: Callable[[RunRequest], Ended], store: Path, no_pruning: Any
) -> None:
    method, _, target = METHODS[name].partition(" 2:")
    request = request_of(method, weights=True, targets=[f"2:{target}" if target else "0.5"])
    first = run(request)
    assert first.record.masks is not None
    assert first.record.masks.note is None
    no_pruning()
    again = run(rescoring_of(request, first.record, store))
    assert [key for key in first.model if not same_bits(first.model[key], again.model[key])] == []
    assert first.model.keys() == again.model.keys()
    one, other = first.record, again.record
    assert one.scores["perplexity"].items == other.scores["perplexity"].items
    assert one.scores["perplexity"].value == other.scores["perplexity"].value
    assert (other.rescored_from, one.rescored_from) == (one.id, None)
    same = ("id", "machine", "spec", "status", "audit", "extra_parameters", "masks", "steps")
    assert [field for field in same if getattr(one, field) != getattr(other, field)] == []


def test_a_tied_head_that_was_changed_is_untied_again(
    bench: Bench, tmp_path: Path, request_of: Make, run: Callable[[RunRequest], Ended], store: Path
) -> None:
    shape = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 0}
    tiny("llama", tie_word_embeddings=True, **shape).save_pretrained(tmp_path / "tied")
    PreTrainedTokenizerFast.from_pretrained(bench.model).save_pretrained(tmp_path / "tied")
    request = request_of("magnitude + perp[subset=head,steps=2,batch=2]", weights=True, model=tmp_path / "tied")
    first = run(request)
    assert first.record.extra_parameters > 0
    again = run(rescoring_of(request, first.record, store))
    assert again.record.extra_parameters == first.record.extra_parameters
    assert again.record.scores["perplexity"].items == first.record.scores["perplexity"].items


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_come_back(dtype: str, request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    request = request_of("sparsegpt[block_size=8]", weights=True)
    request = replace(
        request, spec=request.spec.model_copy(update={"model": request.spec.model.model_copy(update={"dtype": dtype})})
    )
    first = run(request)
    again = run(rescoring_of(request, first.record, store))
    assert [key for key in first.model if not same_bits(first.model[key], again.model[key])] == []
    assert first.record.masks is not None
    assert first.record.masks.weights_file is not None
    size = (store / first.record.masks.weights_file).stat().st_size
    prunable = sum(m.shape[0] * m.shape[1] for m in first.record.audit.matrices)  # type: ignore[union-attr]
    assert 0 < size - 2 * prunable < 4000


def test_only_what_changed_is_kept(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    from safetensors import safe_open

    kept = run(request_of("magnitude + perp[subset=norms,steps=2,batch=2]", weights=True)).record.masks
    assert kept is not None
    assert kept.weights_file is not None
    with safe_open(store / kept.weights_file, "pt") as file:
        names = set(file.keys())
        assert file.metadata()["method"].startswith("magnitude + perp")
    assert names
    assert all("norm" in name for name in names)


def test_another_machines_costs_are_not_ranked(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    request = request_of("wanda")
    first = run(request).record
    here = run(rescoring_of(request, first, store)).record
    there = run(rescoring_of(request, first, store, machine="there")).record
    assert here.provenance.shared_machine == first.provenance.shared_machine
    assert there.provenance.shared_machine
    assert there.machine == "there"
    assert run(rescoring_of(request, there, store)).record.rescored_from == first.id


def with_audit(record: RunRecord, **changes: Any) -> RunRecord:
    assert record.audit is not None
    return record.model_copy(update={"audit": record.audit.model_copy(update=changes)})


def fewer_zeros(record: RunRecord, store: Path) -> RunRecord:
    assert record.audit is not None
    first, *others = record.audit.matrices
    return with_audit(record, matrices=[first.model_copy(update={"zeros": first.zeros - 1}), *others])


def one_matrix(record: RunRecord, store: Path) -> RunRecord:
    assert record.audit is not None
    return with_audit(record, matrices=record.audit.matrices[:-1])


def other_share(record: RunRecord, store: Path) -> RunRecord:
    return with_audit(record, sparsity_total=0.25)


def cut_masks(record: RunRecord, store: Path) -> RunRecord:
    assert record.masks is not None
    path = store / record.masks.file
    path.write_bytes(path.read_bytes()[:-1])
    return record


def no_weights(record: RunRecord, store: Path) -> RunRecord:
    assert record.masks is not None
    assert record.masks.weights_file is not None
    (store / record.masks.weights_file).unlink()
    return record


def swapped(record: RunRecord, store: Path) -> RunRecord:
    """The masks in the place of the weights."""
    assert record.masks is not None
    masks = {"weights_file": record.masks.file, "weights_hash": record.masks.hash}
    return record.model_copy(update={"masks": record.masks.model_copy(update=masks)})


WRONG = {
    "fewer zeros": (fewer_zeros, "zeros and"),
    "a matrix less": (one_matrix, "says something else"),
    "another share": (other_share, "says something else"),
    "masks that were cut": (cut_masks, "cut short or changed"),
    "no weights": (no_weights, "No such file"),
    "masks in the place of weights": (swapped, "no file of kept weights"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_pruned_model_is_not_scored(
    name: str, request_of: Make, run: Callable[[RunRequest], Ended], store: Path
) -> None:
    request = request_of("sparsegpt[block_size=8]", weights=True)
    record = run(request).record
    change, said = WRONG[name]
    failed = runner.run(rescoring_of(request, change(record, store), store), lambda *_: None, "inline")
    assert (failed.status, failed.scores, failed.rescored_from) == ("failed", {}, record.id)
    assert said in str(failed.reason)


def test_masks_of_another_model_are_not_laid(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    request = request_of("wanda")
    record = run(request).record
    model = record.spec.model.model_copy(update={"weights": "0" * 16})
    other = record.model_copy(update={"spec": record.spec.model_copy(update={"model": model})})
    failed = runner.run(rescoring_of(request, other, store), lambda *_: None, "inline")
    assert "belong to another model" in str(failed.reason)


def test_kept_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from prunebench.results.tensor_files import Tensor, write_tensors
    from prunebench.toolkit.anatomy import find_anatomy

    def kept(tensors: dict[str, Tensor], adapters: str = "[]") -> rescoring._Kept:
        metadata = {"format": mask_bank.WEIGHTS_FORMAT, "adapters": adapters}
        return rescoring._Kept.read(*write_tensors(tmp_path, tensors, metadata))

    four = Tensor("F32", (4,), lambda: bytes(16))
    wrong = {
        "a name of nothing": kept({"no.such.weight": four}),
        "another shape": kept({"model.norm.weight": four}),
        "another dtype": kept({"model.norm.weight": Tensor("F16", (32,), lambda: bytes(64))}),
        "an adapter without factors": kept({}, '[["model.layers.0.self_attn.q_proj", 1.0]]'),
        "an adapter of nothing": kept({"adapter 0 down": four, "adapter 0 up": four}, '[["no.such.matrix", 1.0]]'),
    }
    for each in wrong.values():
        with pytest.raises(RequestError, match="does not fit the model"):
            rescoring._put_weights(each, find_anatomy(tiny()), None)
    with pytest.raises(RequestError, match="does not say what its adapters are"):
        kept({}, "[[1]]")


# Room


def test_what_will_be_kept_is_told_before(request_of: Make, run: Callable[[RunRequest], Ended], store: Path) -> None:
    for method, weights in (("wanda", False), ("sparsegpt[block_size=8]", True), ("dense", True), ("wanda", True)):
        request = request_of(method, weights)
        expected = expected_bytes(known_work([request], load_registry()), weights)
        kept = run(request).record.masks
        assert 0 <= (kept.bytes if kept else 0) - expected < 8000, method  # headers
    both = [request_of("wanda"), request_of("magnitude")]
    assert expected_bytes(known_work(both, load_registry()), False) == 2 * expected_bytes(
        known_work(both[:1], load_registry()), False
    )


def test_too_little_room_is_found_before_any_work(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(store, 1000)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 30})())
    check_room(store, 900 << 20)
    with pytest.raises(RequestError, match=r"takes up to 1 GiB, and the disk of .* has 1 GiB free"):
        check_room(store, 1 << 30)
    assert not store.exists()


def test_runs_without_masks_are_counted(request_of: Make, run: Callable[[RunRequest], Ended]) -> None:
    records = [run(replace(request_of("wanda"), keep=None)).record, run(request_of("dense")).record]
    records += [run(request_of("magnitude")).record, run(request_of("sparsegpt[block_size=8]")).record]
    assert (without_masks(records, weights=False), without_masks(records, weights=True)) == (1, 2)

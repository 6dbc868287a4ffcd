"""A replay takes nothing from a bundle that the method does not declare, and no part for the whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Bench, cases
from test_bundles import Data, Forger, look, wrong
from test_mask_bank import stranger

from prunebench.bench import runner
from prunebench.bench.mask_bank import WEIGHTS_FORMAT, factor
from prunebench.bench.plan import Keeping, Rescoring
from prunebench.results.inspection import Examination
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore
from prunebench.results.tensor_files import Tensor, read_tensors, write_tensors
from prunebench.spec import Changes, Job
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.loading import load_model

Weights = dict[str, Tensor]
MATRIX = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def kept(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder: one run that changes masks only, and one that changes survivors."""
    aside, results = tmp_path_factory.mktemp("suite"), tmp_path_factory.mktemp("kept")
    evals = [f"perplexity[data={bench.evaluation},window=16,windows=4]"]
    for method, target in (("magnitude", "0.5"), ("sparsegpt", "2:4")):
        (request,) = bench.requests(aside, method, evals=evals, seeds=(0,), targets=(target,))
        record = runner.run(replace(request, keep=Keeping(str(results), weights=True)), lambda *_: None, "inline")
        assert record.status == "ok", record.reason
        ResultStore(results, pytest.fail).write(record)
    return results


@pytest.fixture
def forger(kept: Path, tmp_path: Path) -> Forger:
    shutil.copytree(kept, tmp_path / "forged")
    return Forger(tmp_path / "forged", tmp_path)


def tensor(values: Any) -> Tensor:
    array = np.ascontiguousarray(values, dtype=np.float32)
    return Tensor("F32", array.shape, array.tobytes)


def put(
    forger: Forger, bench: Bench, method: str, change: Callable[[Weights, dict[str, Any]], list[list[Any]]], **more: Any
) -> str:
    """Give a record a file of kept weights of which all but the content fits; whose file it is comes back."""
    path = forger.path(method, 0)
    masks = json.loads(path.read_bytes())["masks"]
    tensors, metadata = read_tensors(forger.folder / (masks["weights_file"] or masks["file"]), None, "it")
    there = {name: Tensor(t.dtype, t.shape, t.content.tobytes) for name, t in tensors.items()} if masks["weights_file"] else {}
    if masks["weights_file"]:
        (forger.folder / masks["weights_file"]).unlink()
    model = load_model(bench.requests(forger.folder.parent, "dense")[0].model, "float32")
    dense = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    adapters = change(there, dense)
    said = {**metadata, "format": WEIGHTS_FORMAT, "adapters": json.dumps(adapters)}
    _, digest = write_tensors(forger.folder / "masks", there, said)

    def refer(data: Data) -> None:
        data["masks"] |= {"weights_hash": digest, "weights_file": f"masks/{digest}.safetensors"}
        data.update(more)

    return forger.edit(path, refer).relative_to(forger.folder).as_posix()


def norm(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    tensors["model.norm.weight"] = tensor(dense["model.norm.weight"] * 0.6)
    return []


def head(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    tensors["lm_head.weight"] = tensor(dense.get("lm_head.weight", dense["model.embed_tokens.weight"]) * 1.1)
    return []


def embedding(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    tensors["model.embed_tokens.weight"] = tensor(dense["model.embed_tokens.weight"] * 1.1)
    return []


def survivors(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    tensors[f"{MATRIX}.weight"] = tensor(dense[f"{MATRIX}.weight"] * 1.1)
    return []


def adapter(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    """One that puts back what the mask removes."""
    outputs, inputs = dense[f"{MATRIX}.weight"].shape
    tensors[factor(0, "down")] = tensor(np.ones((1, inputs)))
    tensors[factor(0, "up")] = tensor(np.full((outputs, 1), 0.01))
    return [[MATRIX, 1.0]]


def fewer(tensors: Weights, dense: dict[str, Any]) -> list[list[Any]]:
    del tensors[f"{MATRIX}.weight"]
    return []


UNDECLARED = {
    "a norm": ("magnitude", norm, {}, "'model.norm.weight', which no step declares to change"),
    "the head": ("magnitude", head, {}, "'lm_head.weight', which no step declares to change"),
    "the embedding": ("sparsegpt", embedding, {}, "'model.embed_tokens.weight', which no step declares to change"),
    "survivors": ("magnitude", survivors, {}, f"'{MATRIX}.weight', which no step declares to change"),
    "an adapter": ("magnitude", adapter, {}, f"an adapter of '{MATRIX}', and no step declares adapters"),
    "a norm beside survivors": ("sparsegpt", norm, {}, "'model.norm.weight', which no step declares to change"),
    "fewer matrices": ("sparsegpt", fewer, {}, f"lacks {MATRIX}, whose survivors the method declares to change"),
    "extra parameters": ("sparsegpt", lambda *_: [], {"extra_parameters": 7}, "0 extra parameters, and the record"),
}


@pytest.mark.parametrize(("method", "change", "more", "said"), cases(UNDECLARED))
def test_kept_weights_are_held_to_what_the_steps_declare(
    forger: Forger, bench: Bench, tmp_path: Path, method: str, change: Any, more: Data, said: str
) -> None:
    """In a replay it is a finding, and nothing is scored again with it."""
    name = put(forger, bench, method, change, **more)
    found = look(forger.folder, model=bench.model, data=(bench.folder,))
    about = [finding for finding in wrong(found) if finding.check == "replayed answers"]
    assert {finding.where for finding in about} == {name}
    assert said in about[0].message
    assert grades(found)[name] == "reported"
    evals = [f"perplexity[data={bench.evaluation},window=16,windows=2]"]
    target = "0.5" if method == "magnitude" else "2:4"
    (request,) = bench.requests(tmp_path, method, evals=evals, seeds=(0,), targets=(target,))
    record = RunRecord.model_validate(
        {k: v for k, v in json.loads((forger.folder / name).read_bytes()).items() if k != "checksum"}
    )
    failed = runner.run(replace(request, tokens={}, rescoring=Rescoring(record, str(forger.folder))), lambda *_: None, "inline")
    assert (failed.status, failed.scores) == ("failed", {})
    assert said in str(failed.reason)


def test_survivors_that_are_not_there_are_missed(forger: Forger, bench: Bench) -> None:
    """A method that changes them, without a word of why they were not kept: the answers would be of other weights."""
    path = forger.path("sparsegpt", 0)
    (forger.folder / json.loads(path.read_bytes())["masks"]["weights_file"]).unlink()
    forger.edit(path, lambda data: data["masks"].update(weights_hash=None, weights_file=None))
    found = look(forger.folder, model=bench.model, data=(bench.folder,))
    assert any("declares to change surviving weights" in finding.message for finding in wrong(found))


def grades(found: Examination) -> dict[str, str]:
    return {entry.path: found.grade(entry) for entry in found.entries}


def replayed(forger: Forger, bench: Bench, record: RunRecord) -> tuple[str, str]:
    """The grade of a record that is written among the others, and what could not be looked at."""
    assert record.status == "ok", record.reason
    ResultStore(forger.folder, pytest.fail).write(record)
    found = look(forger.folder, model=bench.model, data=(bench.folder,))
    assert not wrong(found)
    [entry] = [entry for entry in found.entries if entry.record.id == record.id]
    return found.grade(entry), " ".join(found.unseen[entry.path])


def test_survivors_that_a_second_step_changes_are_compared_with_its_own(forger: Forger, bench: Bench, tmp_path: Path) -> None:
    evals = [f"perplexity[data={bench.evaluation},window=16,windows=4]"]
    (request,) = bench.requests(tmp_path, "magnitude + sparsegpt[mask=given]", evals=evals, seeds=(0,))
    record = runner.run(replace(request, keep=Keeping(str(forger.folder), weights=True)), lambda *_: None, "inline")
    assert replayed(forger, bench, record) == ("replayed", "")


def test_one_score_replayed_does_not_speak_for_the_others(forger: Forger, bench: Bench, tmp_path: Path) -> None:
    """Another text's answers are all better, and the text is not at hand."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(bench.evaluation.read_bytes())
    evals = [f"perplexity[data={text},window=16,windows=4]" for text in (bench.evaluation, secret)]
    (request,) = bench.requests(tmp_path, "magnitude", evals=evals)
    record = runner.run(replace(request, keep=Keeping(str(forger.folder))), lambda *_: None, "inline")
    secret.unlink()
    name, score = next((name, score) for name, score in record.scores.items() if "secret" in str(score.conditions))
    answers = [round(float(value) - 0.5, 6) for value in score.items["nll"]]
    better = {"items": {**score.items, "nll": answers}, "value": math.exp(math.fsum(answers) / len(answers))}
    record = record.model_copy(update={"scores": {**record.scores, name: score.model_copy(update=better)}})
    grade, unseen = replayed(forger, bench, record)
    assert f"the data of {name} are not at hand" in unseen
    assert grade == "checked"


def halved(job: Job) -> None:
    for matrix in job.anatomy.matrices:
        weight = matrix.weight
        matrix.keep(weight.abs().argsort(dim=1).argsort(dim=1) >= weight.shape[1] // 2)
    norm_changed(job)


def norm_changed(job: Job) -> None:
    job.model.get_parameter("model.norm.weight").data.mul_(0.9)


@pytest.mark.parametrize(
    ("prune", "changes", "said"),
    cases(
        {
            "norms": (halved, Changes.MASK_GROWS | Changes.NORMS, "more than a block's matrices (norms)"),
            "norms of the dense model": (norm_changed, Changes.NORMS, "nothing is removed, so there is no mask to compare"),
        }
    ),
)
def test_what_no_block_shows_is_checked_at_most(
    forger: Forger, bench: Bench, tmp_path: Path, register: Callable[..., None], prune: Any, changes: Changes, said: str
) -> None:
    """Methods that train nothing and declare more than a block's matrices show."""
    register(stranger(prune, changes))
    evals = [f"perplexity[data={bench.evaluation},window=16,windows=4]"]
    (request,) = bench.requests(tmp_path, "stranger", evals=evals)
    record = runner.run(replace(request, keep=Keeping(str(forger.folder), weights=True)), lambda *_: None, "inline")
    grade, unseen = replayed(forger, bench, record)
    assert said in unseen
    assert grade == "checked"


@pytest.mark.parametrize(
    ("change", "field", "said"),
    cases(
        {
            "another value": ({"block_size": 7}, "block_size", "is 7, and the spec gives 128"),
            "an option of nothing": ({"slab": 7}, "slab", "is 7, and sparsegpt has no such option"),
        }
    ),
)
def test_options_are_those_of_the_spec(forger: Forger, change: Data, field: str, said: str) -> None:
    """Widths of slabs come from them, by which other counts would fit."""
    forger.edit(forger.path("sparsegpt", 0), lambda data: data["steps"][0]["options"].update(change))
    found = wrong(look(forger.folder))
    assert [(finding.check, finding.field) for finding in found] == [("steps", f"steps.0.options.{field}")]
    assert said in found[0].message


def test_names_of_tensors_are_known(bench: Bench, tmp_path: Path) -> None:
    """That the forgeries above are of places that the model has."""
    model = load_model(bench.requests(tmp_path, "dense")[0].model, "float32")
    assert MATRIX in {matrix.name for matrix in find_anatomy(model).matrices}

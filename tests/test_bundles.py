"""Bundles of records: what is honest passes and is replayed; each kind of tampering is caught, and the field is named."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import stat
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import Bench, Ran, cases, tree

from prunebench.bench import at_hand, runner
from prunebench.bench.plan import Keeping
from prunebench.bench.replay_answers import differences
from prunebench.bench.verifying import Request, verified
from prunebench.errors import RequestError, StoreError, WriteError
from prunebench.results import recomputed, unpacking
from prunebench.results.bundle import MANIFEST, manifest_of, write_bundle
from prunebench.results.content import checksum
from prunebench.results.findings import Finding
from prunebench.results.inspection import ABOUT, Examination
from prunebench.results.mask_files import mask_metadata, mask_tensors, read_masks
from prunebench.results.records import RunRecord, RunSpec, SampleRecord
from prunebench.results.store import ResultStore
from prunebench.results.tensor_files import Tensor, read_tensors, write_tensors
from prunebench.results.verdicts import Verdicts, content_checksum, lowest

MODEL = "here/tiny"
Data = dict[str, Any]


@pytest.fixture(scope="module")
def honest(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder of six runs with all that they keep: dense, without data, with data and two seeds, with new weights."""
    aside, results = tmp_path_factory.mktemp("suite"), tmp_path_factory.mktemp("honest")
    store = ResultStore(results, pytest.fail)
    text = f"[data={bench.evaluation},window=16,windows=12]"
    options: Data = {"evals": [f"perplexity{text}", f"divergence{text}"], "seeds": (0, 1)}
    requests = bench.requests(aside, "dense", "magnitude", "wanda", **options)
    requests += bench.requests(aside, "sparsegpt", **{**options, "targets": ("2:4",), "seeds": (0,)})
    for request in requests:
        record = runner.run(replace(request, keep=Keeping(str(results), weights=True)), lambda *_: None, "inline")
        assert record.status == "ok", record.reason
        store.write(record)
    assert len(store.all()) == 5
    return results


@pytest.fixture
def forger(honest: Path, tmp_path: Path) -> Forger:
    shutil.copytree(honest, tmp_path / "forged")
    return Forger(tmp_path / "forged", tmp_path)


class Forger:
    """Somebody who knows the formats as well as we do: whatever he changes, he makes checksums, names and manifest fit."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self._aside = folder, aside

    def path(self, method: str, seed: int | None = None) -> Path:
        for path in sorted(self.folder.glob("here/tiny/*.json")):
            spec = json.loads(path.read_bytes())["spec"]
            if spec["steps"][0]["text"] == method and spec["seed"] in (seed, None):
                return path
        raise AssertionError(method)

    def edit(self, path: Path, change: Callable[[Data], None]) -> Path:
        """Change a record; id, file name and checksum are made anew."""
        data = json.loads(path.read_bytes())
        change(data)
        spec = RunSpec.model_validate(data["spec"])
        data["id"] = spec.id
        path.unlink()
        data["checksum"] = checksum({key: value for key, value in data.items() if key != "checksum"})
        path = path.with_name(f"{spec.file_stem}.json")
        path.write_text(json.dumps(data))
        return path

    def masks(self, path: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], None], fit_audit: bool = False) -> Path:
        """Change a record's masks; the file's name and the record's hash of it are made anew, and the audit if asked."""
        record = RunRecord.model_validate({k: v for k, v in json.loads(path.read_bytes()).items() if k != "checksum"})
        assert record.masks is not None
        old = self.folder / record.masks.file
        found = read_masks(old)
        keep = {name: found.keep(name).copy() for name in found.shapes}
        manifest = dict(found.manifest)
        old.unlink()
        change(keep)
        packed = {name: np.packbits(mask) for name, mask in keep.items()}
        _, digest = write_tensors(self.folder / "masks", mask_tensors(packed), mask_metadata(found.shapes, manifest))

        def refer(data: Data) -> None:
            data["masks"] |= {"hash": digest, "file": f"masks/{digest}.safetensors"}
            if fit_audit:
                for matrix in data["audit"]["matrices"]:
                    matrix["removed"] = matrix["zeros"] = int((~keep[matrix["name"]]).sum())

        return self.edit(path, refer)

    def bundle(self, more: dict[str, bytes] | None = None) -> Path:
        """All files of the folder, with a manifest that fits."""
        files = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*")) if path.is_file()}
        listed = {name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size) for name, path in files.items()}
        out = self._aside / "forged.zip"
        with zipfile.ZipFile(out, "w") as archive:
            for name, path in files.items():
                archive.write(path, name)
            archive.writestr(MANIFEST, manifest_of(listed))
            for name, content in (more or {}).items():
                archive.writestr(name, content)
        return out


def look(path: Path, results: Path | None = None, model: Path | None = None, seed: int = 1, **asked: Any) -> Examination:
    models = (str(model),) if model else ()
    nowhere = path.parent / "nowhere"
    request = Request(path, results or nowhere, models, asked.pop("data", ()), True, seed, "cpu")
    with verified(request, lambda folder: ResultStore(folder, pytest.fail)) as found:
        for finding in found.findings:
            assert finding.check in ABOUT
            assert finding.sentence().endswith(".")
        return found


def wrong(found: Examination) -> list[Finding]:
    return [finding for finding in found.findings if finding.level == "error"]


# What is honest


def test_what_is_honest_passes_and_is_replayed(honest: Path, bench: Bench, tmp_path: Path) -> None:
    store = ResultStore(honest, pytest.fail)
    contents = write_bundle(store, store.latest(), tmp_path / "bundle.zip")
    assert (len(contents.records), contents.masks, contents.missing, contents.left_out) == (5, 5, [], [])
    found = look(tmp_path / "bundle.zip", model=bench.model, data=(bench.folder,))
    assert not found.findings
    assert {entry.path: found.grade(entry) for entry in found.entries} == dict.fromkeys(contents.records, "replayed")
    assert not any(found.unseen.values())
    assert {name for name in ABOUT if not found.looked[name]} == set()
    assert found.looked["replayed answers"] == 5
    assert found.looked["replayed block"] == 4
    done = " ".join(found.replayed.values())
    assert "12 of 12 answers of perplexity" in done
    assert "of divergence" in done
    assert "block " in done


def test_without_the_model_it_is_checked(honest: Path, tmp_path: Path) -> None:
    store = ResultStore(honest, pytest.fail)
    write_bundle(store, store.latest(), tmp_path / "bundle.zip")
    for known in (None, honest):
        found = look(tmp_path / "bundle.zip", known)
        assert not found.findings
        assert {found.grade(entry) for entry in found.entries} == {"checked"}


def test_a_folder_can_be_verified_too(honest: Path) -> None:
    found = look(honest, honest)
    assert not found.findings
    assert {found.grade(entry) for entry in found.entries} == {"checked"}


def test_equal_records_give_equal_bytes(honest: Path, tmp_path: Path) -> None:
    store = ResultStore(honest, pytest.fail)
    write_bundle(store, store.latest(), tmp_path / "one.zip")
    for path in sorted(honest.rglob("*.json"), reverse=True):
        path.touch()
    write_bundle(store, reversed(store.latest()), tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.zip", "two.zip"]


def test_a_bundle_is_of_whole_present_records(forger: Forger, tmp_path: Path) -> None:
    store = ResultStore(forger.folder, pytest.fail)
    latest = store.latest()
    next((forger.folder / "masks").glob("*")).unlink()
    outdated = next(stored.record.id for stored in latest if stored.record.spec.method == "dense")
    contents = write_bundle(store, latest, tmp_path / "bundle.zip", [outdated])
    assert len(contents.records) == 3
    assert any("another revision" in said for said in contents.left_out)
    assert any("is not whole" in said for said in contents.left_out)


def test_a_bundle_of_nothing_is_none(honest: Path, tmp_path: Path) -> None:
    store = ResultStore(honest, pytest.fail)
    with pytest.raises(StoreError, match="no record"):
        write_bundle(store, [], tmp_path / "bundle.zip")
    with pytest.raises(StoreError, match="cannot be written"):
        write_bundle(store, store.latest(), tmp_path / "absent" / "bundle.zip")
    with pytest.raises(StoreError, match="is a folder"):
        write_bundle(store, store.latest(), tmp_path)


# Tampering that shows in the bundle alone


def scores_of(data: Data) -> Data:
    found: Data = data["scores"]["perplexity"]
    return found


def conditions_of(data: Data) -> list[Data]:
    """Of the perplexity: in the score, and in the spec."""
    spec = next(spec for spec in data["spec"]["evals"] if spec["conditions"]["eval"] == "perplexity")
    return [scores_of(data)["conditions"], spec["conditions"]]


def better(data: Data, by: float = 0.5) -> None:
    """All answers of the perplexity better, and the value that they give."""
    score = scores_of(data)
    score["items"]["nll"] = [round(value - by, 6) for value in score["items"]["nll"]]
    score["value"] = math.exp(math.fsum(score["items"]["nll"]) / len(score["items"]["nll"]))


def test_value(forger: Forger) -> None:
    forger.edit(forger.path("wanda", 0), lambda data: scores_of(data).update(value=scores_of(data)["value"] * 0.99))
    assert [f.field for f in wrong(look(forger.bundle()))] == ["scores.perplexity.value"]


def change_part(data: Data) -> None:
    data["scores"]["divergence"]["parts"]["top-1 agreement"] += 0.01


def change_answer(data: Data) -> None:
    scores_of(data)["items"]["nll"][3] -= 0.4


def change_window_of_score(data: Data) -> None:
    conditions_of(data)[0]["window"] = 8


def change_window_everywhere(data: Data) -> None:
    for said in conditions_of(data):
        said["window"] = 2048


def change_number_of_windows(data: Data) -> None:
    for said in conditions_of(data):
        said["windows"] = 11


def drop_condition(data: Data) -> None:
    for said in conditions_of(data):
        del said["token_hash"]


def replace_weights(data: Data) -> None:
    data["spec"]["model"]["weights"] = "0123456789abcdef"


def change_target(data: Data) -> None:
    data["spec"]["target"] = "0.6"


def fake_zeros(data: Data) -> None:
    data["audit"]["zeros"] += 100


def fake_sparsity(data: Data) -> None:
    data["audit"]["sparsity_prunable"] = 0.6


def fake_counts(data: Data) -> None:
    """Consistently, as if all matrices were pruned to 60%."""
    audit = data["audit"]
    for matrix in audit["matrices"]:
        matrix["removed"] = matrix["zeros"] = matrix["shape"][0] * int(matrix["shape"][1] * 0.6)
    total = audit["zeros"] / audit["sparsity_total"]
    audit["removed"] = audit["zeros"] = sum(matrix["removed"] for matrix in audit["matrices"])
    audit["sparsity_prunable"] = audit["zeros"] / sum(m["shape"][0] * m["shape"][1] for m in audit["matrices"])
    audit["sparsity_total"] = audit["zeros"] / round(total)


def change_seed(data: Data) -> None:
    data["spec"]["seed"] = 7


def change_tokens(data: Data) -> None:
    data["spec"]["calibration_tokens"] = "0123456789abcdef"


def drop_tokens(data: Data) -> None:
    data["spec"]["calibration_tokens"] = None


def another_column(data: Data) -> None:
    """The share of equal choices in the place of the divergence: a value that follows from the answers too."""
    score = data["scores"]["divergence"]
    score["sample"]["column"] = "agreement"
    score["value"] = score["parts"]["top-1 agreement"]


def upside_down(data: Data) -> None:
    scores_of(data)["higher_is_better"] = True


def negative_phase(data: Data) -> None:
    data["steps"][0]["phases"]["scoring"] = -1.0


def quick_run(data: Data) -> None:
    data["steps"][0]["phases"]["statistics"] = data["provenance"]["seconds"] + 10


def small_peak(data: Data) -> None:
    data["steps"][0]["peak_host_bytes"] = 100


def another_step(data: Data) -> None:
    data["steps"][0]["pruner"] = "sparsegpt"


@pytest.mark.parametrize(
    ("change", "field"),
    cases(
        {
            "a part of a score": (change_part, "scores.divergence.parts.top-1 agreement"),
            "an answer": (change_answer, "scores.perplexity.value"),
            "conditions of the score only": (change_window_of_score, "scores.perplexity.conditions.window"),
            "conditions in the spec too": (change_window_everywhere, "scores.perplexity.conditions.window"),
            "fewer windows": (change_number_of_windows, "scores.perplexity.conditions.windows"),
            "a condition left out": (drop_condition, "spec.evals.0.conditions.token_hash"),
            "another model's weights": (replace_weights, "spec.evals.0.conditions.weights"),
            "another target": (change_target, "audit.matrices.model.layers.0.self_attn.q_proj.removed"),
            "a sum of the audit": (fake_zeros, "audit.zeros"),
            "a share of the audit": (fake_sparsity, "audit.sparsity_prunable"),
            "all counts of the audit": (fake_counts, "audit.matrices.model.layers.0.self_attn.q_proj.removed"),
            "another column": (another_column, "scores.divergence.sample"),
            "another direction": (upside_down, "scores.perplexity.higher_is_better"),
            "no tokens": (drop_tokens, "spec.calibration_tokens"),
            "a negative phase": (negative_phase, "steps.0.phases.scoring"),
            "a run shorter than its steps": (quick_run, "provenance.seconds"),
            "a peak below the weights": (small_peak, "steps.0.peak_host_bytes"),
            "another step": (another_step, "steps.0.pruner"),
        }
    ),
)
def test_tampering_is_caught_and_its_field_named(forger: Forger, change: Callable[[Data], None], field: str) -> None:
    path = forger.edit(forger.path("wanda", 0), change)
    found = look(forger.bundle())
    assert field in [finding.field for finding in wrong(found)]
    blamed = {finding.where for finding in wrong(found)}
    assert blamed == {path.relative_to(forger.folder).as_posix()}, "the others are not blamed"
    grades = {entry.path: found.grade(entry) for entry in found.entries}
    assert grades.pop(blamed.pop()) == "reported"
    assert set(grades.values()) == {"checked"}


def test_a_record_whose_checksum_was_left_alone(forger: Forger) -> None:
    path = forger.path("magnitude")
    path.write_text(path.read_text().replace('"status":"ok"', '"status": "ok"').replace('"threads":1', '"threads":2', 1))
    data = json.loads(path.read_bytes())
    data["provenance"]["threads"] = 3
    path.write_text(json.dumps(data))
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["checksum"]


def test_an_id_that_is_not_of_its_spec(forger: Forger) -> None:
    path = forger.path("magnitude")
    data = json.loads(path.read_bytes())
    data["spec"]["target"] = "0.6"
    del data["checksum"]
    path.write_text(json.dumps({**data, "checksum": checksum(data)}))
    assert [finding.field for finding in wrong(look(forger.bundle()))][:1] == ["id"]


def test_a_field_of_another_type(forger: Forger) -> None:
    path = forger.path("magnitude")
    data = json.loads(path.read_bytes())
    data["audit"]["coverage"] = "much"
    del data["checksum"]
    path.write_text(json.dumps({**data, "checksum": checksum(data)}))
    assert [finding.field for finding in wrong(look(forger.bundle()))][:1] == ["audit.coverage"]


def test_a_record_in_another_place(forger: Forger) -> None:
    path = forger.path("magnitude")
    moved = forger.folder / "there" / "tiny" / path.name
    moved.parent.mkdir(parents=True)
    path.rename(moved)
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["machine"]


def test_a_record_twice(forger: Forger) -> None:
    path = forger.path("magnitude")
    shutil.copyfile(path, path.with_suffix(".2.json"))
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["id"]


def test_answers_of_another_run_beside_a_record(forger: Forger, tmp_path: Path) -> None:
    """Raw answers by the thousand stand in a file, whose hash the record has."""

    def many(data: Data) -> None:
        score = scores_of(data)
        score["items"] = {name: values * 100 for name, values in score["items"].items()}

    record = ResultStore(forger.folder, pytest.fail).all()[-1].record
    data = record.model_dump(mode="json", by_alias=True)
    many(data)
    store = ResultStore(tmp_path / "many", pytest.fail)
    shutil.copytree(forger.folder / "masks", tmp_path / "many" / "masks")
    path = store.write(RunRecord.model_validate(data))
    many_forger = Forger(tmp_path / "many", tmp_path)
    [file] = (tmp_path / "many").rglob("*.parquet")
    for name in (tmp_path / "many" / "masks").iterdir():
        if record.masks is None or name.stem not in (record.masks.hash, record.masks.weights_hash):
            name.unlink()
    content = file.read_bytes()
    assert [f.field for f in wrong(look(many_forger.bundle()))] == ["scores.perplexity.conditions.windows"], "12 were asked for"
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    found = wrong(look(many_forger.bundle()))
    assert "scores.perplexity.items" in [finding.field for finding in found]
    assert any("changed after their record" in finding.message for finding in found)
    file.rename(file.with_name("another.parquet"))
    found = wrong(look(many_forger.bundle()))
    assert {(finding.where, finding.field) for finding in found} >= {
        ("here/tiny/another.parquet", "file"),
        (path.relative_to(tmp_path / "many").as_posix(), "scores.perplexity.items"),
    }


# Masks


def test_masks_of_another_run(forger: Forger) -> None:
    """Of the other seed, by reference."""
    theirs = json.loads(forger.path("wanda", 1).read_bytes())["masks"]
    forger.edit(forger.path("wanda", 0), lambda data: data.update(masks=theirs))
    fields = [finding.field for finding in wrong(look(forger.bundle()))]
    assert "masks.hash" in fields, "two prunings cannot have one file"
    assert "masks.file" in fields, "it says whose it is"


def test_masks_with_one_matrix_changed(forger: Forger) -> None:
    name = "model.layers.1.mlp.down_proj"

    def change(keep: dict[str, np.ndarray[Any, Any]]) -> None:
        keep[name][0, :] = True

    forger.masks(forger.path("wanda", 0), change)
    assert [finding.field for finding in wrong(look(forger.bundle()))] == [f"audit.matrices.{name}.removed"]


def test_masks_that_break_the_pattern(forger: Forger) -> None:
    name = "model.layers.1.mlp.down_proj"

    def change(keep: dict[str, np.ndarray[Any, Any]]) -> None:
        keep[name][0, :4] = [True, True, True, False]
        keep[name][0, 4:8] = [True, False, False, False]

    forger.masks(forger.path("sparsegpt", 0), change)
    found = wrong(look(forger.bundle()))
    assert [f.field for f in found if "keep more than 2 of 4" in f.message] == [f"audit.matrices.{name}.removed"]
    assert {finding.field for finding in found} == {f"audit.matrices.{name}.removed", "masks.weights_file"}


def test_kept_weights_that_are_not_zero_where_the_mask_says(forger: Forger) -> None:
    """The file is made anew with another number, and the record refers to it."""
    path = forger.path("sparsegpt", 0)
    kept = json.loads(path.read_bytes())["masks"]
    old = forger.folder / kept["weights_file"]
    found, metadata = read_tensors(old, None, "it")
    name = "model.layers.0.self_attn.k_proj.weight"
    contents = {each: tensor.content.copy() for each, tensor in found.items()}
    values = contents[name].view(np.float32)
    values[np.flatnonzero(values == 0)[0]] = 0.5
    tensors = {each: Tensor(found[each].dtype, found[each].shape, contents[each].tobytes) for each in found}
    old.unlink()
    _, digest = write_tensors(forger.folder / "masks", tensors, metadata)
    refer = {"weights_hash": digest, "weights_file": f"masks/{digest}.safetensors"}
    forger.edit(path, lambda data: data["masks"].update(refer))
    fields = [finding.field for finding in wrong(look(forger.bundle()))]
    assert fields == ["audit.matrices.model.layers.0.self_attn.k_proj.zeros", "masks.weights_file"]


def test_a_mask_file_with_other_bytes(forger: Forger) -> None:
    record = json.loads(forger.path("wanda", 0).read_bytes())
    file = forger.folder / record["masks"]["file"]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["masks.hash"]


# Among records


def test_a_seed_that_is_another_seeds_run(forger: Forger) -> None:
    """Seed 0 handed in as seed 7 too."""
    shutil.copyfile(forger.path("wanda", 0), forger.path("wanda", 0).with_name("copy.json"))
    forger.edit(forger.path("wanda", 0).with_name("copy.json"), change_seed)
    fields = {finding.field for finding in wrong(look(forger.bundle()))}
    assert {"spec.seed", "masks.hash"} <= fields


def test_a_seed_with_tokens_made_up(forger: Forger) -> None:
    """The same, with another hash of tokens: the answers are another run's."""
    copy = forger.path("wanda", 0).with_name("copy.json")
    shutil.copyfile(forger.path("wanda", 0), copy)

    def change(data: Data) -> None:
        change_seed(data)
        change_tokens(data)
        data["masks"] = None

    forger.edit(copy, change)
    fields = {finding.field for finding in wrong(look(forger.bundle()))}
    assert {"scores.perplexity.items", "scores.divergence.items"} <= fields


def test_tokens_that_are_not_those_of_known_records(forger: Forger, honest: Path) -> None:
    forger.edit(forger.path("wanda", 0), change_tokens)
    assert "spec.calibration_tokens" in [finding.field for finding in wrong(look(forger.bundle(), honest))]


def test_a_dense_model_that_was_made_worse(forger: Forger, honest: Path) -> None:
    forger.edit(forger.path("dense"), lambda data: better(data, -0.2))
    assert not wrong(look(forger.bundle())), "by itself it is consistent"
    found = wrong(look(forger.bundle(), honest))
    assert {(finding.check, finding.field) for finding in found} == {("plausible", "scores.perplexity.value")}


def test_a_run_that_is_known_with_another_score(forger: Forger, honest: Path) -> None:
    forger.edit(forger.path("magnitude"), lambda data: better(data, 0.1))
    [finding] = wrong(look(forger.bundle(), honest))
    assert (finding.check, finding.field) == ("plausible", "scores.perplexity.value")


def test_questions_that_are_not_those_of_known_records(forger: Forger, honest: Path) -> None:
    forger.edit(forger.path("magnitude"), lambda data: scores_of(data)["items"].update(document=[*range(12)]))
    assert "scores.perplexity.items.document" in [finding.field for finding in wrong(look(forger.bundle(), honest))]


def test_a_model_with_other_matrices(forger: Forger, honest: Path) -> None:
    def change(data: Data) -> None:
        data["audit"]["matrices"][0]["shape"] = data["audit"]["matrices"][0]["shape"][::-1]
        data["audit"]["matrices"][1]["shape"] = data["audit"]["matrices"][1]["shape"][::-1]
        data["masks"] = None

    forger.edit(forger.path("magnitude"), change)
    fields = [finding.field for finding in wrong(look(forger.bundle(), honest))]
    assert any(field.endswith(".shape") for field in fields)


def test_a_pruned_model_that_is_better_than_dense_is_odd(forger: Forger) -> None:
    forger.edit(forger.path("magnitude"), lambda data: better(data, 3.0))
    found = look(forger.bundle())
    assert not wrong(found)
    assert ("odd", "scores.perplexity.value") in [(finding.check, finding.field) for finding in found.findings]


def test_a_cost_far_from_what_is_known_is_odd(forger: Forger, honest: Path) -> None:
    def change(data: Data) -> None:
        data["steps"][0]["phases"]["other"] = 5000.0
        data["provenance"] |= {"seconds": 6000.0, "shared_machine": False}

    for path in honest.glob("here/tiny/*.json"):
        if json.loads(path.read_bytes())["provenance"]["shared_machine"]:
            pytest.skip("the machine was shared while the honest runs were made, so their costs are not looked at")
    forger.edit(forger.path("wanda", 0), change)
    found = look(forger.bundle(), honest)
    assert ("odd", "steps.phases") in [(finding.check, finding.field) for finding in found.findings]


# Replaying


def test_a_replay_catches_answers_that_are_consistently_forged(forger: Forger, bench: Bench) -> None:
    """Answers, value, hashes and names all fit; only the model knows better."""
    path = forger.edit(forger.path("wanda", 0), better)
    name = path.relative_to(forger.folder).as_posix()
    assert not wrong(look(forger.bundle()))
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    assert {(f.check, f.where, f.field) for f in wrong(found)} == {("replayed answers", name, "scores.perplexity.items.nll")}
    assert {entry.path: found.grade(entry) for entry in found.entries}[name] == "reported"


def test_a_replay_catches_masks_that_the_method_does_not_leave(forger: Forger, bench: Bench) -> None:
    """Rows of a matrix interchanged: all counts fit. Where the block is drawn the method says so, and the answers always."""

    def change(keep: dict[str, np.ndarray[Any, Any]]) -> None:
        for mask in keep.values():
            mask[:] = mask[::-1].copy()

    forger.masks(forger.path("wanda", 0), change)
    assert not wrong(look(forger.bundle()))
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    checks = {finding.check for finding in wrong(found)}
    assert checks == {"replayed answers", "replayed block"}
    assert {finding.field for finding in wrong(found) if finding.check == "replayed block"} == {"masks.file"}


def test_a_replay_catches_weights_that_the_method_does_not_leave(forger: Forger, bench: Bench) -> None:
    """Survivors trained on, say, the evaluation's text: masks, zeros and answers of a model with such weights would all fit."""
    path = forger.path("sparsegpt", 0)
    kept = json.loads(path.read_bytes())["masks"]
    found, metadata = read_tensors(forger.folder / kept["weights_file"], None, "it")
    tensors = {}
    for name, tensor in found.items():
        values = (tensor.content.copy().view(np.float32) * 1.1).astype(np.float32)
        tensors[name] = Tensor(tensor.dtype, tensor.shape, values.tobytes)
    (forger.folder / kept["weights_file"]).unlink()
    _, digest = write_tensors(forger.folder / "masks", tensors, metadata)
    refer = {"weights_hash": digest, "weights_file": f"masks/{digest}.safetensors"}
    forger.edit(path, lambda data: data["masks"].update(refer))
    assert not wrong(look(forger.bundle()))
    found_again = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    fields = [finding.field for finding in wrong(found_again) if finding.check == "replayed block"]
    assert set(fields) == {"masks.weights_file"}


def test_what_was_trained_is_checked_at_most(forger: Forger, bench: Bench, tmp_path: Path) -> None:
    training = f"[training]\nsource = {json.dumps(str(bench.training))}\ntokens = 128\n"
    evals = [f"perplexity[data={bench.evaluation},window=16,windows=12]"]
    methods = "magnitude + perp[steps=2,batch=2]"
    [request] = [r for r in bench.requests(tmp_path, methods, evals=evals, more=training) if r.spec.target != "dense"]
    record = runner.run(replace(request, keep=Keeping(str(forger.folder), weights=True)), lambda *_: None, "inline")
    assert record.status == "ok", record.reason
    ResultStore(forger.folder, pytest.fail).write(record)
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    assert not wrong(found)
    [entry] = [entry for entry in found.entries if entry.record.id == record.id]
    assert found.grade(entry) == "checked"
    assert any("trains the model" in sentence for sentence in found.unseen[entry.path])


def test_a_replay_catches_tokens_that_the_seed_does_not_draw(forger: Forger, bench: Bench) -> None:
    forger.edit(forger.path("sparsegpt", 0), change_tokens)
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    assert ("replayed block", "spec.calibration_tokens") in [(finding.check, finding.field) for finding in wrong(found)]


def test_a_replay_catches_conditions_that_the_data_do_not_have(forger: Forger, bench: Bench) -> None:
    def change(data: Data) -> None:
        for said in conditions_of(data):
            said["token_hash"] = "0123456789abcdef"

    forger.edit(forger.path("magnitude"), change)
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    assert ("replayed answers", "scores.perplexity.conditions.token_hash") in [(f.check, f.field) for f in wrong(found)]


def test_what_is_replayed_is_drawn_by_the_seed(forger: Forger, bench: Bench) -> None:
    for path in forger.folder.glob("here/tiny/*.json"):
        if path != forger.path("magnitude"):
            path.unlink()
    told = [look(forger.folder, model=bench.model, data=(bench.folder,), seed=seed).replayed for seed in (1, 1, *range(2, 6))]
    assert told[0] == told[1]
    assert len({json.dumps(each, sort_keys=True) for each in told}) > 1, "another seed draws other blocks"


def test_what_is_not_at_hand_is_said(honest: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    found = look(honest, model=bench.model, data=(tmp_path / "nothing",))
    assert not found.findings
    assert {found.grade(entry) for entry in found.entries} == {"checked"}
    said = {sentence for sentences in found.unseen.values() for sentence in sentences}
    assert any("the data of perplexity are not at hand" in sentence for sentence in said)
    assert any("calibration text is not at hand" in sentence for sentence in said)


# Archives of strangers


def attack(forger: Forger, name: str, content: bytes = b"x", **info: Any) -> Path:
    """An honest bundle with one more entry."""
    out = forger.bundle()
    with zipfile.ZipFile(out, "a") as archive:
        entry = zipfile.ZipInfo(name)
        for key, value in info.items():
            setattr(entry, key, value)
        archive.writestr(entry, content)
    return out


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.json",
        "/tmp/escaped.json",
        "here/tiny/../../../escaped.json",
        "here\\tiny\\escaped.json",
        "here/tiny/.hidden.json",
        "here/tiny/run.sh",
        "here/run.json",
        "masks/short.safetensors",
        "verdicts/tiny/0123456789abcdef.json",
        "published/tiny/paper.json",
        "here/tiny/" + "x" * 300 + ".json",
        "here/tiny/",
    ],
)
def test_names_that_no_bundle_has(forger: Forger, name: str, tmp_path: Path) -> None:
    before = set(tree(tmp_path))
    found = look(attack(forger, name))
    assert {finding.check for finding in wrong(found)} == {"archive"}
    assert found.entries == [], "nothing was unpacked"
    assert set(tree(tmp_path)) - before == {"forged.zip"}


def test_links_and_files_twice(forger: Forger) -> None:
    link = attack(forger, "here/tiny/link.json", b"/etc/passwd", external_attr=(stat.S_IFLNK | 0o777) << 16)
    assert "a link" in wrong(look(link))[0].message
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = attack(forger, forger.path("magnitude").relative_to(forger.folder).as_posix())
    assert wrong(look(twice))[0].message == "is there twice"


def test_bombs(forger: Forger, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = attack(forger, "here/tiny/bomb.json", bytes(8 << 20), compress_type=zipfile.ZIP_DEFLATED)
    assert "as no record does" in wrong(look(bomb))[0].message
    monkeypatch.setattr(unpacking, "MOST_FILES", 3)
    assert wrong(look(forger.bundle()))[0].field == "entries"
    monkeypatch.undo()
    monkeypatch.setattr(unpacking, "MOST_BYTES", 1000)
    assert wrong(look(forger.bundle()))[0].field == "size"


def test_an_entry_that_holds_more_than_it_claims(forger: Forger, tmp_path: Path) -> None:
    """The size in the archive's directory is changed."""
    content = bytearray(forger.bundle().read_bytes())
    at = content.rindex(b"PK\x01\x02")
    size = int.from_bytes(content[at + 24 : at + 28], "little")
    content[at + 24 : at + 28] = (size - 1).to_bytes(4, "little")
    lying = tmp_path / "lying.zip"
    lying.write_bytes(content)
    found = look(lying)
    assert {finding.check for finding in wrong(found)} == {"archive"}
    assert found.entries == []


def test_what_is_no_bundle(tmp_path: Path) -> None:
    path = tmp_path / "bundle.zip"
    for content in (b"", b"PK\x05\x06", b"text", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(StoreError, match="cannot be read"):
            look(path)
    with pytest.raises(RequestError, match="there is no bundle"):
        look(tmp_path / "absent.zip")


def test_a_manifest_that_does_not_fit(forger: Forger, tmp_path: Path) -> None:
    out = forger.bundle()
    names = zipfile.ZipFile(out).namelist()

    def rewritten(change: Callable[[dict[str, bytes]], None]) -> list[Finding]:
        with zipfile.ZipFile(out) as archive:
            files = {name: archive.read(name) for name in names}
        change(files)
        path = tmp_path / "rewritten.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        found = look(path)
        assert {found.grade(entry) for entry in found.entries} == {"reported"}, "nothing of it is believed"
        return wrong(found)

    record = forger.path("magnitude").relative_to(forger.folder).as_posix()
    missing = rewritten(lambda files: files.pop(record))
    assert ("manifest", f"files.{record}") in [(finding.check, finding.field) for finding in missing]
    extra = rewritten(lambda files: files.update({"here/tiny/extra.json": files[record]}))
    assert ("manifest", "here/tiny/extra.json") in [(finding.check, finding.where) for finding in extra]
    other = rewritten(lambda files: files.update({record: files[record] + b" "}))
    assert ("manifest", record, "sha256") in [(finding.check, finding.where, finding.field) for finding in other]
    none = rewritten(lambda files: files.pop(MANIFEST))
    assert "there is no manifest" in none[0].message
    for content in (b"{}", b"[]", b"{", b'{"format": "prunebench-bundle-1", "files": []}', b"\xff"):
        assert rewritten(lambda files, content=content: files.update({MANIFEST: content}))[0].where == MANIFEST


# Verdicts and accepting


def test_accepted_records_are_copied_with_all_that_belongs_to_them(
    honest: Path, bench: Bench, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    bundle, into = tmp_path / "bundle.zip", tmp_path / "into"
    assert command("submit", "--results", honest, "--out", bundle).code == 0
    ran = command("verify", bundle, "--results", into, "--model", bench.model, "--data", bench.folder, "--accept", "--seed", 3)
    assert ran.code == 0, ran
    assert "5 records replayed" in ran.out
    assert "--seed 3" in ran.out
    mine, theirs = ({s.record.id: s.record for s in ResultStore(f, pytest.fail).all()} for f in (into, honest))
    assert mine == theirs
    verdicts = Verdicts.of(into)
    assert {verdicts.grade(record) for record in mine.values()} == {"replayed"}
    for record in mine.values():
        ResultStore(into, pytest.fail).masks(record)
    before = tree(into)
    again = command("verify", bundle, "--results", into, "--accept")
    assert again.code == 0, again
    assert tree(into) == before, "nothing is there twice, and what was replayed stays so"


def test_what_was_changed_since_is_as_it_was_handed_in(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    shutil.copytree(honest, tmp_path / "results")
    assert command("verify", tmp_path / "results", "--accept").code == 0
    store = ResultStore(tmp_path / "results", pytest.fail)
    verdicts = Verdicts.of(tmp_path / "results")
    record = store.all()[0].record
    assert verdicts.grade(record) == "checked"
    changed = record.model_copy(update={"extra_parameters": 1})
    assert content_checksum(changed) != content_checksum(record)
    assert verdicts.grade(changed) == "reported"
    found = verdicts.find(record)
    assert found is not None
    assert found.checksum == content_checksum(record)
    assert (tmp_path / "results" / "verdicts" / f"{found.checksum[:16]}.json").is_file()
    assert "arithmetic" in found.looked_at


def test_grades_of_rows() -> None:
    assert lowest(["replayed", "checked"]) == "checked"
    assert lowest(["replayed", "replayed"]) == "replayed"
    assert lowest(["checked", "reported", "replayed"]) == "reported"
    assert lowest([]) == "reported"


def test_foreign_files_among_verdicts_count_for_nothing(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    shutil.copytree(honest, tmp_path / "results")
    assert command("verify", tmp_path / "results", "--accept").code == 0
    folder = tmp_path / "results" / "verdicts"
    files = sorted(folder.iterdir())
    files[0].rename(folder / "0123456789abcdef.json")
    files[1].write_text("{")
    files[2].write_text("[" * 100_000)
    files[3].unlink()
    files[3].mkdir()
    records = [stored.record for stored in ResultStore(tmp_path / "results", pytest.fail).all()]
    grades = [Verdicts.of(tmp_path / "results").grade(record) for record in records]
    assert sorted(grades) == ["checked", "reported", "reported", "reported", "reported"]


def test_nothing_of_a_tampered_bundle_is_accepted(forger: Forger, tmp_path: Path, command: Callable[..., Ran]) -> None:
    forger.edit(forger.path("wanda", 0), change_answer)
    ran = command("verify", forger.bundle(), "--results", tmp_path / "into", "--accept")
    assert ran.code == 1
    assert "scores.perplexity.value is" in ran.out.replace("\n", " ")
    assert not (tmp_path / "into").exists()
    told = json.loads(command("verify", forger.bundle(), "--results", tmp_path / "into", "--json").out)
    assert told["passed"] is False
    assert [finding["field"] for finding in told["findings"]] == ["scores.perplexity.value"]
    assert sorted(record["grade"] for record in told["records"]) == ["checked"] * 4 + ["reported"]


def test_accepting_overwrites_nothing(honest: Path, tmp_path: Path) -> None:
    from prunebench.results.accepting import accept

    store = ResultStore(honest, pytest.fail)
    write_bundle(store, store.latest(), tmp_path / "bundle.zip")
    record = next(stored.record for stored in store.all() if stored.record.masks)
    assert record.masks is not None
    into = tmp_path / "into"
    (into / "masks").mkdir(parents=True)
    (into / record.masks.file).write_bytes(b"another")
    request = Request(tmp_path / "bundle.zip", into, (), (), False, 0, "cpu")
    refused = pytest.raises(WriteError, match="with another content; nothing was overwritten")
    with verified(request, lambda folder: ResultStore(folder, pytest.fail)) as found, refused:
        accept(found, ResultStore(into, pytest.fail), None, "1.0")
    assert (into / record.masks.file).read_bytes() == b"another"


def test_submit_chooses(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    out = tmp_path / "bundle.zip"
    record = ResultStore(honest, pytest.fail).all()[0].record

    def packed(*args: object) -> int:
        assert command("submit", "--results", honest, "--out", out, *args).code == 0
        return sum(name.startswith("here/") for name in zipfile.ZipFile(io.BytesIO(out.read_bytes())).namelist())

    assert packed(record.id[:8]) == 1
    assert packed("--only", "wanda at 0.5") == 2
    assert packed("--suite", "small") == 5
    assert "no run has an id" in command("submit", "nothing", "--results", honest, "--out", out).complaint
    assert "none" not in command("submit", "--suite", "other", "--results", honest, "--out", out).complaint
    assert "there is no folder" in command("submit", "--results", tmp_path / "absent", "--out", out).complaint


def test_whatever_a_record_holds_is_a_finding_and_no_crash(forger: Forger, honest: Path) -> None:
    """Values of other kinds in places that no schema fixes: answers and conditions."""
    values: list[Any] = ["text", -1, None, {}, [1, 2]]
    path, before = forger.path("wanda", 0), forger.path("wanda", 0).read_bytes()
    places: list[Callable[[Data, Any], None]] = [
        lambda data, value: scores_of(data)["items"].update(nll=[value] * 12),
        lambda data, value: scores_of(data)["items"].update(nll=value),
        lambda data, value: scores_of(data)["items"].update(document=[value] * 11),
        lambda data, value: [said.update(window=value) for said in conditions_of(data)] and None,
        lambda data, value: [said.update(tokens=value, windows=value) for said in conditions_of(data)] and None,
        lambda data, value: [said.update(eval="zero_shot", tasks=value, limit=value) for said in conditions_of(data)] and None,
        lambda data, value: [said.update(eval="zero_shot", tasks={"a": value}) for said in conditions_of(data)] and None,
        lambda data, value: [said.update(eval="generation", questions=value) for said in conditions_of(data)] and None,
        lambda data, value: data["scores"]["divergence"].update(parts={"top-1 agreement": value}),
    ]
    for place in places:
        for value in values:
            path.unlink()
            path.write_bytes(before)
            path = forger.edit(path, lambda data, place=place, value=value: place(data, value))  # type: ignore[misc]
            assert wrong(look(forger.folder, honest)), (place, value)


def test_a_record_leads_to_no_file_outside_the_folders_that_were_named(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for path in (tmp_path / "outside.yaml", tmp_path / "inside" / "text.txt"):
        path.write_text("text")
    found = [text for text, _ in at_hand._spellings("perplexity[data=../far/text.txt,window=16]", [tmp_path / "inside"])]
    assert found == [f"perplexity[data={tmp_path / 'inside' / 'text.txt'},window=16]"], "by the last part of its name"
    for name in ("../outside.yaml", str(tmp_path / "outside.yaml"), "absent.yaml"):
        assert not list(at_hand._spellings(f"zero_shot[tasks={name}]", [tmp_path / "inside"]))
    assert not list(at_hand._spellings("perplexity[data=owner/name]", [tmp_path])), "nothing is fetched"
    assert list(at_hand._spellings("perplexity[data=wikitext2]", [tmp_path]))


@pytest.mark.parametrize(
    ("column", "then", "now", "dtype", "same"),
    [
        ("nll", 3.0, 3.0029, "float32", True),
        ("nll", 3.0, 3.0031, "float32", False),
        ("nll", 3.0, 3.0085, "bfloat16", True),
        ("nll", 3.0, 3.0095, "bfloat16", False),
        ("kl", 0.0, 9e-6, "float32", True),
        ("kl", 0.0, 2e-5, "float32", False),
        ("agreement", 0.5, 0.5 + 3 / 15, "float32", True),
        ("agreement", 0.5, 0.5 + 4 / 15, "float32", False),
        ("likelihoods", "-10.000 -12.000", "-10.009 -12.000", "float32", True),
        ("likelihoods", "-10.000 -12.000", "-10.012 -12.000", "float32", False),
        ("likelihoods", "-10.000 -12.000", "-10.000", "float32", False),
        ("gold", 1, 0, "float32", False),
        ("document", 1, 2, "float32", False),
        ("task", "a", "b", "float32", False),
    ],
)
def test_how_far_answers_may_be_apart(column: str, then: Any, now: Any, dtype: str, same: bool) -> None:
    found = list(differences({column: [0, then]}, {column: [now]}, [1], dtype, 16))
    assert [name for name, _ in found] == ([] if same else [column])


def test_choices_near_a_tie_may_turn_and_others_may_not() -> None:
    kept: Any = {"choice": [0, 0], "right": [1, 1], "likelihoods": ["-10.000 -10.001", "-10.000 -11.000"]}
    turned: Any = {"choice": [1], "right": [0]}
    assert not list(differences(kept, turned, [0], "float32", 0))
    assert [name for name, _ in differences(kept, turned, [1], "float32", 0)] == ["choice", "right"]
    words: Any = {"answer": [f"word {row}" for row in range(60)]}
    few: Any = {"answer": ["other"] * 3 + [f"word {row}" for row in range(3, 60)]}
    many: Any = {"answer": ["other"] * 4 + [f"word {row}" for row in range(4, 60)]}
    assert not list(differences(words, few, range(60), "float32", 0))
    assert "others in 4 of 60" in next(said for _, said in differences(words, many, range(60), "float32", 0))


# What a reviewer's forgeries came through with


def edit_all(forger: Forger, change: Callable[[Data], None]) -> None:
    for path in sorted(forger.folder.glob("here/tiny/*.json")):
        forger.edit(path, change)


@pytest.mark.parametrize("score", ["perplexity", "divergence"])
def test_a_replay_catches_documents_that_the_text_does_not_have(forger: Forger, bench: Bench, score: str) -> None:
    """In all records alike, so that none contradicts another; intervals rest on the documents."""
    edit_all(forger, lambda data: data["scores"][score]["items"].update(document=[*range(100, 112)]))
    assert not wrong(look(forger.bundle()))
    found = look(forger.bundle(), model=bench.model, data=(bench.folder,))
    assert {(f.check, f.field) for f in wrong(found)} == {("replayed answers", f"scores.{score}.items.document")}
    assert {found.grade(entry) for entry in found.entries} == {"reported"}


def test_a_score_that_follows_from_its_answers_is_not_left_out(forger: Forger) -> None:
    forger.edit(forger.path("wanda", 0), lambda data: scores_of(data).update(value=None))
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["scores.perplexity.value"]


def test_a_score_of_a_set_without_one_of_its_tasks_has_no_value() -> None:
    items: Any = {"right": [1, 0], "stratum": ["a", "a"], "task": ["a", "a"]}
    made = SampleRecord(column="right", strata="stratum", tasks="task")

    def found(**conditions: Any) -> list[str]:
        score = SimpleNamespace(value=None, sample=made, conditions=conditions, parts={"a": 0.5}, items=items)
        record = SimpleNamespace(scores={"zero_shot": score})
        entry: Any = SimpleNamespace(record=record, unreadable={}, answers={"zero_shot": items})
        entry.finding = lambda *said: Finding(said[0], "", said[1], said[2])
        return [finding.field for finding in recomputed.scores(entry)]

    assert found(eval="zero_shot", missing=["b"]) == []
    assert "scores.zero_shot.value" in found(eval="zero_shot", missing=[])
    assert "scores.zero_shot.value" in found(eval="generation", missing=["b"])


def test_what_is_accepted_twice_is_there_once_however_long_its_answers(
    honest: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    """Long answers inside the record, where other programs than this one may leave them."""
    record = next(s.record for s in ResultStore(honest, pytest.fail).all() if s.record.spec.method == "dense")
    data = record.model_dump(mode="json", by_alias=True)
    score = scores_of(data)
    score["items"] = {name: [values[0]] * 600 for name, values in score["items"].items()}
    score["value"] = math.exp(score["items"]["nll"][0])
    for said in conditions_of(data):
        said.update(windows=600, tokens=10_000)
    spec = next(spec for spec in data["spec"]["evals"] if spec["conditions"]["eval"] == "perplexity")
    spec["text"] = spec["text"].replace("windows=12", "windows=600")
    data["id"] = RunSpec.model_validate(data["spec"]).id
    handed_in = RunRecord.model_validate(data)
    path = tmp_path / "long" / "here" / "tiny" / f"{handed_in.spec.file_stem}.json"
    path.parent.mkdir(parents=True)
    path.write_text(handed_in.to_json())
    bundle, into = Forger(tmp_path / "long", tmp_path).bundle(), tmp_path / "into"
    first = command("verify", bundle, "--results", into, "--accept")
    assert first.code == 0, first
    before = tree(into)
    [stored] = ResultStore(into, pytest.fail).all()
    assert stored.record == handed_in
    assert Verdicts.of(into).grade(stored.record) == "checked"
    again = command("verify", bundle, "--results", into, "--accept")
    assert again.code == 0, again
    assert "0 new records" in again.out
    assert tree(into).keys() == before.keys()


def test_a_wrong_place_of_known_records_is_said(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    bundle, file, empty = tmp_path / "bundle.zip", tmp_path / "file", tmp_path / "empty"
    assert command("submit", "--results", honest, "--out", bundle).code == 0
    file.write_text("text")
    empty.mkdir()
    ran = command("verify", bundle, "--results", file)
    assert (ran.code, "is no folder" in ran.complaint) == (2, True), ran
    for place in (empty, tmp_path / "absent"):
        ran = command("verify", bundle, "--results", place)
        assert ran.code == 0, ran
        assert f"nothing is known in {place}" in ran.out
    assert "nothing is known" not in command("verify", bundle, "--results", honest).out
    assert "nothing is known" not in command("verify", honest, "--results", honest).out
    ran = command("verify", bundle, "--results", file / "below", "--accept")
    assert (ran.code, "is no folder" in ran.complaint) == (2, True), ran
    assert "arithmetic" not in ran.out, "before any work"


def test_submit_replaces_bundles_only(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    out = tmp_path / "thesis.tex"
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("text", "text")
    for content in (b"text", b"", (tmp_path / "other.zip").read_bytes()):
        out.write_bytes(content)
        ran = command("submit", "--results", honest, "--out", out)
        assert (ran.code, "not replaced" in ran.complaint) == (2, True), ran
        assert out.read_bytes() == content
    out.unlink()
    assert [command("submit", "--results", honest, "--out", out).code for _ in range(2)] == [0, 0]


def test_parameters_that_no_step_adds(forger: Forger) -> None:
    forger.edit(forger.path("magnitude"), lambda data: data.update(extra_parameters=1000))
    assert [finding.field for finding in wrong(look(forger.bundle()))] == ["extra_parameters"]


def test_added_parameters_explain_no_more_than_themselves(forger: Forger) -> None:
    """Of all parameters twice as many: a smaller share of zeros would follow."""

    def change(data: Data) -> None:
        data["extra_parameters"] = 1
        data["audit"]["sparsity_total"] = data["audit"]["zeros"] / (
            2 * round(data["audit"]["zeros"] / data["audit"]["sparsity_total"])
        )

    forger.edit(forger.path("wanda", 1), change)
    assert "audit.sparsity_total" in [finding.field for finding in wrong(look(forger.bundle()))]


def test_what_cannot_be_accepted_is_said_in_words(honest: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    bundle, into = tmp_path / "bundle.zip", tmp_path / "into"
    assert command("submit", "--results", honest, "--out", bundle).code == 0
    into.mkdir()
    (into / "masks").write_text("a file in the place of a folder")
    ran = command("verify", bundle, "--results", into, "--accept")
    assert (ran.code, "cannot be written: File exists." in ran.err, "Errno" in ran.err) == (1, True, False), ran

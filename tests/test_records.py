"""Records and specs: what an id stands for, and that JSON keeps everything."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from support import C4_TEXT, CONDITIONS, make_record, make_spec

from prunebench.results.content import canonical_json, checksum, fingerprint, slug
from prunebench.results.records import EvalSpec, KeptMasks, Recipe, RunRecord, RunSpec, ScoreRecord, StepSpec, upgraded
from prunebench.results.verdicts import content_checksum
from prunebench.targets import parse_target

FILE_NAME = re.compile(r"[a-z0-9.+-]+")


def with_model(spec: RunSpec, **changes: Any) -> RunSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update=changes)})


def with_recipe(spec: RunSpec, **changes: Any) -> RunSpec:
    return spec.model_copy(update={"recipe": spec.recipe.model_copy(update=changes)})


def with_text(spec: RunSpec, **changes: Any) -> RunSpec:
    assert spec.recipe.calibration is not None
    return with_recipe(spec, calibration=spec.recipe.calibration.model_copy(update=changes))


def with_eval(spec: RunSpec, **changes: Any) -> RunSpec:
    return spec.model_copy(update={"evals": (spec.evals[0].model_copy(update=changes), *spec.evals[1:])})


def with_conditions(spec: RunSpec, **changes: Any) -> RunSpec:
    return with_eval(spec, conditions={**spec.evals[0].conditions, **changes})


def with_steps(spec: RunSpec, *steps: tuple[str, int]) -> RunSpec:
    return spec.model_copy(update={"steps": tuple(StepSpec(text=text, revision=revision) for text, revision in steps)})


Change = Callable[[RunSpec], RunSpec]

SAME: dict[str, Change] = {
    "the model's name": lambda spec: with_model(spec, name="another"),
    "the model's source": lambda spec: with_model(spec, source="org/name@0123"),
    "the calibration text's origin": lambda spec: with_text(spec, origin="mirror"),
    "whether the calibration text is called an excerpt": lambda spec: with_text(spec, complete=False),
    "the spelling of an evaluation": lambda spec: with_eval(spec, text="perplexity[window=512, data=wikitext2]"),
    "the evaluation text's origin": lambda spec: with_conditions(spec, origin="mirror", complete=False),
    "the order of conditions": lambda spec: with_eval(spec, conditions=dict(reversed(spec.evals[0].conditions.items()))),
}

OTHER: dict[str, Change] = {
    "weights": lambda spec: with_model(spec, weights="aaaa000011112223"),
    "tokenizer": lambda spec: with_model(spec, tokenizer="bbbb000011112223"),
    "dtype": lambda spec: with_model(spec, dtype="bfloat16"),
    "an option": lambda spec: with_steps(spec, ("wanda[group=matrix]", 1)),
    "a revision of a pruner": lambda spec: with_steps(spec, ("wanda", 2)),
    "another step": lambda spec: with_steps(spec, ("wanda", 1), ("perp", 1)),
    "steps in another order": lambda spec: with_steps(spec, ("perp", 1), ("wanda", 1)),
    "target": lambda spec: spec.model_copy(update={"target": "2:4"}),
    "seed": lambda spec: spec.model_copy(update={"seed": 1}),
    "no seed": lambda spec: spec.model_copy(update={"seed": None}),
    "the calibration text": lambda spec: with_text(spec, content="c4c4c4c4c4c4c4c5"),
    "the number of samples": lambda spec: with_recipe(spec, samples=64),
    "the length of samples": lambda spec: with_recipe(spec, length=256),
    "the sampler": lambda spec: with_recipe(spec, sampler="documents-v2"),
    "a training text": lambda spec: with_recipe(spec, training=C4_TEXT),
    "the training budget": lambda spec: with_recipe(spec, training_tokens=4096),
    "calibration tokens": lambda spec: spec.model_copy(update={"calibration_tokens": "1"}),
    "training tokens": lambda spec: spec.model_copy(update={"training_tokens": "1"}),
    "validation tokens": lambda spec: spec.model_copy(update={"validation_tokens": "1"}),
    "a revision of an evaluation": lambda spec: with_eval(spec, revision=2),
    "the evaluation's text": lambda spec: with_conditions(spec, content="0011223344556678"),
    "the evaluation's window": lambda spec: with_conditions(spec, window=256),
    "no evaluation": lambda spec: spec.model_copy(update={"evals": ()}),
    "another evaluation": lambda spec: spec.model_copy(update={"evals": spec.evals * 2}),
}


def test_canonical_json_has_one_spelling() -> None:
    data = {"b": [1, 2.5, None, True], "a": {"z": "é\n", "y": {}}}
    assert canonical_json(data) == '{"a":{"y":{},"z":"é\\n"},"b":[1,2.5,null,true]}'
    assert canonical_json({"a": {"y": {}, "z": "é\n"}, "b": [1, 2.5, None, True]}) == canonical_json(data)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_canonical_json_refuses_what_json_cannot_say(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"a": [value]})


def test_an_id_is_twelve_hex_digits_and_never_moves() -> None:
    """Another id for the same run would make every committed record a stranger's."""
    assert re.fullmatch("[0-9a-f]{12}", make_spec().id)
    assert make_spec().id == "66cc06c9f08e"


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_an_id_leaves_out(change: Change) -> None:
    assert change(make_spec()) != make_spec() or change is SAME["the order of conditions"]
    assert change(make_spec()).id == make_spec().id


def test_ids_of_other_runs_are_others() -> None:
    ids = {make_spec().id: "unchanged"}
    for name, change in OTHER.items():
        found = change(make_spec()).id
        assert found not in ids, f"{name} and {ids[found]} have one id"
        ids[found] = name


def test_fingerprints_tell_conditions_but_not_where_the_text_came_from() -> None:
    assert re.fullmatch("[0-9a-f]{8}", fingerprint(CONDITIONS))
    assert fingerprint(CONDITIONS | {"origin": "mirror", "complete": False}) == fingerprint(CONDITIONS)
    assert fingerprint(dict(reversed(CONDITIONS.items()))) == fingerprint(CONDITIONS)
    changed = [fingerprint(CONDITIONS | {key: "else"}) for key in CONDITIONS if key not in ("origin", "complete")]
    assert len({fingerprint(CONDITIONS), *changed}) == len(changed) + 1


def test_fingerprints_of_recipes() -> None:
    recipe = make_spec().recipe
    moved = with_text(make_spec(), origin="mirror", complete=False).recipe
    assert fingerprint(moved) == fingerprint(recipe)
    assert fingerprint(Recipe()) != fingerprint(recipe)
    assert fingerprint(with_text(make_spec(), content="else").recipe) != fingerprint(recipe)


@pytest.mark.parametrize(
    "record",
    [
        make_record(),
        make_record(status="refused", reason="2:4 has no meaning for it: “odd” columns."),
        make_record(status="failed", kind="oom"),
        make_record(make_spec("dense", "dense", None)),
        make_record(masks=KeptMasks(file=f"masks/{'a' * 64}.safetensors", hash="a" * 64, bytes=8), rescored_from="0" * 12),
        make_record(make_spec("magnitude + perp[subset=norms,retrain.steps=40]", "4:8"), extra_parameters=7),
    ],
    ids=lambda record: f"{record.spec.method} {record.status}",
)
def test_a_record_survives_json(record: RunRecord) -> None:
    text = record.to_json()
    data = json.loads(text)
    assert data.pop("checksum") == checksum(data)
    back = RunRecord.model_validate(data)
    assert back == record
    assert back.to_json() == text
    assert back.id == back.spec.id


def test_the_json_is_readable_and_ends_with_its_checksum() -> None:
    text = make_record().to_json()
    assert text.endswith('"\n}\n')
    assert next(iter(json.loads(text))) == "schema"
    assert list(json.loads(text))[-1] == "checksum"
    assert "naïve" in text
    assert text.count("\n") > 50


def leaves(data: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The places of all values that are no containers."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*place, key))
    else:
        yield place


def test_the_checksum_sees_every_value() -> None:
    data = json.loads(make_record().to_json())
    kept = data.pop("checksum")
    places = list(leaves(data))
    assert len(places) > 80
    for place in places:
        changed = json.loads(json.dumps(data))
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = "changed"
        assert checksum(changed) != kept, place


def test_the_checksum_does_not_count_itself_or_the_order() -> None:
    data = json.loads(make_record().to_json())
    assert checksum(data) == data["checksum"]
    assert checksum(dict(reversed(data.items()))) == data["checksum"]
    plain = {key: value for key, value in data.items() if key != "checksum"}
    assert data["checksum"] == hashlib.sha256(canonical_json(plain).encode()).hexdigest()


def test_records_cannot_be_changed_or_extended() -> None:
    record = make_record()
    with pytest.raises(ValidationError):
        record.status = "failed"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        record.spec.model.weights = "x"  # type: ignore[misc]
    data = json.loads(record.to_json())
    data.pop("checksum")
    for place in (data, data["spec"], data["steps"][0], data["provenance"], data["scores"]["eval0"]):
        place["surprise"] = 1
        with pytest.raises(ValidationError, match="surprise"):
            RunRecord.model_validate(data)
        del place["surprise"]
    assert RunRecord.model_validate(data) == record


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_no_value(value: float) -> None:
    whole: dict[str, Any] = {"value": 1.0, "unit": "x", "higher_is_better": True, "seconds": 1.0, "conditions": {}, "items": {}}
    ScoreRecord(**whole)
    for bad in ({"value": value}, {"seconds": value}, {"conditions": {"a": [value]}}, {"items": {"nll": [1.0, value]}}):
        with pytest.raises(ValidationError, match="finite"):
            ScoreRecord(**whole | bad)
    step = make_record().steps[0].model_dump()
    with pytest.raises(ValidationError, match="finite"):
        type(make_record().steps[0])(**step | {"notes": {"share": value}})


@pytest.mark.parametrize(
    ("status", "device", "host", "peak"),
    [("ok", None, 5, 5), ("ok", 7, 900, 7), ("refused", None, 5, None)],
    ids=["on the host", "on a device", "without steps"],
)
def test_the_peak_is_the_devices_where_there_is_one(status: str, device: int | None, host: int, peak: int | None) -> None:
    record = make_record(status=status, peak_device_bytes=device, peak_host_bytes=host)
    assert record.peak_bytes == peak


def test_a_run_takes_as_long_as_its_steps() -> None:
    step = make_record(seconds=2.0).steps[0]
    assert step.seconds == 2.0
    assert make_record(steps=[step, step]).prune_seconds == 4.0
    assert make_record(status="refused").prune_seconds == 0


def test_a_text_is_called_an_excerpt_where_it_may_be_one() -> None:
    assert C4_TEXT.label() == "allenai/c4 (en, train)"
    assert C4_TEXT.model_copy(update={"complete": False}).label() == "allenai/c4 (en, train) (excerpt)"
    assert C4_TEXT.model_copy(update={"name": "my.txt", "config": "", "split": ""}).label() == "my.txt"


# File names

METHODS = [
    "wanda",
    "wanda++[alpha=100]",
    "magnitude + perp[subset=mask_lora,retrain.steps=40]",
    "../../etc/passwd",
    "ÜBER[größe=1]",
    "a|b\n<c>",
    "x" * 500,
    "random[scale=1e-05] + " * 40 + "wanda",
]


@pytest.mark.parametrize("method", METHODS, ids=range(len(METHODS)))
@pytest.mark.parametrize("target", ["dense", "0.5", "0.29", "2:4", "4:8", "1e-05"])
def test_file_stems(method: str, target: str) -> None:
    spec = make_spec(method, target)
    stem = spec.file_stem
    assert FILE_NAME.fullmatch(stem), stem
    assert stem.endswith(f"-{parse_target(target).slug}-{spec.id}")
    assert len(stem) < 120
    assert not stem.startswith((".", "-"))


def test_a_file_stem_names_method_and_target() -> None:
    stem = make_spec("magnitude + perp[subset=norms]", "2:4").file_stem
    assert stem.startswith("magnitude-+-perp-subset-norms-2of4-")


NAMES = [
    "../../evil",
    "..",
    ".",
    "",
    "/",
    "/etc/passwd",
    "a/../../b",
    "C:\\Windows\\..",
    "....//....//x",
    "-rf",
    ".hidden",
    "a\x00b",
    "tab\tand\nnewline",
    "Größe",
    "模型",
    "İstanbul",
    "‮evil",
    "a" * 5000,
    "-" * 5000,
    "." * 5000 + "/x",
    "~root",
    "$HOME",
    "%2e%2e%2f",
    "con.",
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_slug_never_leaves_its_folder(name: str, tmp_path: Path) -> None:
    found = slug(name)
    assert FILE_NAME.fullmatch(found), found
    assert 1 <= len(found) <= 100
    assert not found.startswith((".", "-"))
    (tmp_path / found).mkdir()
    assert [path.name for path in tmp_path.iterdir()] == [found]


def test_a_slug_keeps_what_it_can() -> None:
    assert slug("NVIDIA H200 x1") == "nvidia-h200-x1"
    assert slug("Llama-3.2+1B") == "llama-3.2+1b"
    assert slug(slug("Intel(R) Xeon(R)")) == slug("Intel(R) Xeon(R)") == "intel-r-xeon-r"


# JSON Schema


def fits(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any]) -> bool:
    """As much of JSON Schema as the records' schema uses; an unknown keyword is an error."""
    if "$ref" in schema:
        found = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return fits(value, found, root)
    checks: dict[str, Callable[[Any], bool]] = {
        "type": lambda kind: is_a(value, kind),
        "const": lambda only: value == only,
        "enum": lambda known: value in known,
        "anyOf": lambda choices: any(fits(value, choice, root) for choice in choices),
        "required": lambda names: all(name in value for name in names),
        "properties": lambda known: all(fits(value[name], known[name], root) for name in known if name in value),
        "additionalProperties": lambda rest: all(
            rest if isinstance(rest, bool) else fits(value[name], rest, root)
            for name in value
            if name not in schema.get("properties", {})
        ),
        "items": lambda item: all(fits(entry, item, root) for entry in value),
        "prefixItems": lambda items: all(fits(entry, item, root) for entry, item in zip(value, items, strict=True)),
        "minItems": lambda count: len(value) >= count,
        "maxItems": lambda count: len(value) <= count,
    }
    if "type" in schema and not checks["type"](schema["type"]):
        return False
    return all(checks[key](schema[key]) for key in schema if key not in ("title", "description", "default", "$defs"))


def is_a(value: Any, kind: str) -> bool:
    kinds: dict[str, type | tuple[type, ...]] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": (int, float),
    }
    return isinstance(value, kinds[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))


@pytest.mark.parametrize("status", ["ok", "refused", "failed"])
def test_the_json_schema_fits_the_files(status: str) -> None:
    schema = json.loads(json.dumps(RunRecord.model_json_schema()))
    data = json.loads(make_record(status=status).to_json())
    assert fits(data, schema, schema)
    assert set(data) == set(schema["properties"])


@pytest.mark.parametrize("schema", [1, 2, 3, 4])
def test_older_records_are_read_without_what_they_did_not_have(schema: int) -> None:
    data = json.loads(make_record().to_json())
    del data["checksum"], data["provenance"]["predicted_seconds"], data["provenance"]["predicted_peak_bytes"]
    del data["masks"], data["rescored_from"], data["steps"][0]["floors"], data["scores"]["eval0"]["reason"]
    data["schema"] = schema
    record = RunRecord.model_validate(upgraded(data))
    assert (record.schema_, record.provenance.predicted_seconds, record.provenance.predicted_peak_bytes) == (5, None, None)
    assert (record.masks, record.rescored_from) == (None, None)
    assert (record.steps[0].floors, record.scores["eval0"].reason) == ({}, None)
    assert schema == 1 or content_checksum(record) == content_checksum(make_record()), (
        "what was said of it holds of the upgraded one"
    )
    assert data["schema"] == schema, "what was read stays as it is"


@pytest.mark.parametrize(
    ("file", "digest"),
    [
        ("../../etc/passwd", "a" * 64),
        (f"masks/{'b' * 64}.safetensors", "a" * 64),
        ("masks/../x.safetensors", "../x"),
        (f"/masks/{'a' * 64}.safetensors", "a" * 64),
        ("masks/.safetensors", ""),
    ],
)
def test_kept_masks_are_named_by_their_content_and_nothing_else(file: str, digest: str) -> None:
    good = {"file": f"masks/{'a' * 64}.safetensors", "hash": "a" * 64, "bytes": 8}
    for wrong in ({"file": file, "hash": digest}, {"weights_file": file, "weights_hash": digest}, {"weights_file": file}):
        with pytest.raises(ValidationError, match="a file of kept masks is"):
            KeptMasks.model_validate({**good, **wrong})


def test_the_json_schema_refuses_other_files() -> None:
    schema = RunRecord.model_json_schema()
    good = make_record().to_json()

    def changed(change: Callable[[Any], object]) -> Any:
        data = json.loads(good)
        change(data)
        return data

    wrong = [
        changed(lambda data: data.update(schema=1)),
        changed(lambda data: data.update(status="done")),
        changed(lambda data: data.update(surprise=1)),
        changed(lambda data: data.update(checksum=1)),
        changed(lambda data: data.pop("machine")),
        changed(lambda data: data["spec"]["model"].pop("weights")),
        changed(lambda data: data["spec"].update(seed="0")),
        changed(lambda data: data["steps"][0]["phases"].update(other="1")),
        changed(lambda data: data["audit"]["matrices"][0].update(shape=[8])),
        changed(lambda data: data["scores"]["eval0"].update(value="61")),
    ]
    assert [fits(data, schema, schema) for data in wrong] == [False] * len(wrong)


def test_every_field_of_the_schema_has_a_type() -> None:
    schema = RunRecord.model_json_schema()
    for kind in [schema, *schema["$defs"].values()]:
        for name, field in kind.get("properties", {}).items():
            assert {"type", "$ref", "anyOf", "const", "enum"} & field.keys(), name


def test_an_evaluation_may_have_any_json_as_conditions() -> None:
    deep = {"list": [1, "a", None, {"x": [True]}], "none": None}
    spec = EvalSpec(text="theirs", revision=3, conditions=deep)
    assert json.loads(spec.model_dump_json())["conditions"] == deep
    with pytest.raises(ValidationError, match="JSON"):
        EvalSpec(text="theirs", revision=3, conditions={"path": Path()})  # type: ignore[dict-item]

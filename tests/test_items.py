"""Raw answers beside the record: long columns leave it, come back as they were, and are known by their hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import make_record

from prunebench.errors import StoreError
from prunebench.results.content import checksum
from prunebench.results.items import MOST_INSIDE
from prunebench.results.records import RunRecord, RunSpec, ScoreRecord
from prunebench.results.store import ResultStore


def with_items(count: int) -> RunRecord:
    record = make_record()
    columns: dict[str, list[Any]] = {
        "right": [index % 2 for index in range(count)],
        "task": [f"task {index % 3}" for index in range(count)],
        "likelihood": [-index / 4 for index in range(count)],
        "document": [70_000 + index for index in range(count)],
    }
    score = next(iter(record.scores.values())).model_copy(update={"items": columns})
    return record.model_copy(update={"scores": {"zero_shot[tasks=a+b]": score}})


def stored(store: ResultStore) -> tuple[RunRecord, ScoreRecord]:
    [item] = store.all()
    [score] = item.record.scores.values()
    return item.record, score


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path, pytest.fail)


def test_few_items_stay_in_the_record(store: ResultStore, tmp_path: Path) -> None:
    record = with_items(MOST_INSIDE)
    store.write(record)
    found, score = stored(store)
    assert found == record
    assert store.items(found, score) == score.items
    assert not list(tmp_path.rglob("*.parquet"))


def test_many_items_are_kept_beside_it(store: ResultStore, tmp_path: Path) -> None:
    record = with_items(MOST_INSIDE + 1)
    path = store.write(record)
    found, score = stored(store)
    assert score.items == {}
    assert score.items_file is not None
    assert (path.parent / score.items_file).is_file()
    assert store.items(found, score) == record.scores["zero_shot[tasks=a+b]"].items
    assert list(store.items(found, score)) == ["right", "task", "likelihood", "document"]
    assert len(path.read_text()) < 10_000
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_run_again_overwrites_nothing(store: ResultStore, tmp_path: Path) -> None:
    first, second = with_items(600), with_items(601)
    paths = [store.write(first), store.write(second)]
    assert paths[0] != paths[1]
    assert sorted(len(store.items(s.record, next(iter(s.record.scores.values())))["right"]) for s in store.all()) == [600, 601]


def test_items_that_were_changed_or_lost_are_an_error(store: ResultStore, tmp_path: Path) -> None:
    store.write(with_items(600))
    found, score = stored(store)
    [file] = tmp_path.rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="were changed after their record"):
        store.items(found, score)
    file.unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        store.items(found, score)


def test_a_record_cannot_point_out_of_its_folder(store: ResultStore, tmp_path: Path) -> None:
    secret = tmp_path / "secret.parquet"
    secret.write_bytes(b"x")
    store.write(with_items(600))
    found, score = stored(store)
    with pytest.raises(StoreError):
        store.items(found, score.model_copy(update={"items_file": "../../secret.parquet"}))


def test_a_record_of_schema_1_gets_its_sample(store: ResultStore) -> None:
    path = store.write(make_record())
    data = json.loads(path.read_text())
    data["schema"] = 1
    for score in data["scores"].values():
        score["conditions"]["eval"] = "perplexity"
        for name in ("sample", "parts", "items_file", "items_hash"):
            del score[name]
    for spec in data["spec"]["evals"]:
        spec["conditions"]["eval"] = "perplexity"
    data["id"] = RunSpec.model_validate(data["spec"]).id
    data["checksum"] = checksum({k: v for k, v in data.items() if k != "checksum"})
    path.write_text(json.dumps(data))
    _, score = stored(store)
    assert score.sample is not None
    assert (score.sample.column, score.sample.exponential, score.sample.documents) == ("nll", True, "document")

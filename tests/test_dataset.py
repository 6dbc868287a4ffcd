"""The records as a data set: `datasets` loads it without network, and the card says what every column is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import CONDITIONS, make_record, make_spec

from prunebench.errors import RequestError
from prunebench.results.content import fingerprint
from prunebench.results.dataset import TABLES, card, write_dataset
from prunebench.results.records import EvalSpec, RunRecord

C4 = CONDITIONS | {"data": "allenai/c4", "window": 256}


def records() -> list[RunRecord]:
    both = [EvalSpec(text="perplexity[data=c4]", revision=3, conditions=C4)]
    return [
        make_record(make_spec("dense", "dense", None), 60.0, sparsity=0.0),
        *(make_record(make_spec("wanda", "2:4", seed, more_evals=both), 70.0 + seed) for seed in range(2)),
        make_record(make_spec("gblm", "4:8"), status="refused", reason="172 | is no multiple of 8."),
        make_record(make_spec("imp"), status="failed", kind="oom"),
        make_record(make_spec("old"), machine="another", shared_machine=True),
    ]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`load_dataset` that can reach nothing and keeps nothing outside this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def loaded(folder: Path, *names: str) -> Any:
        return datasets.load_dataset(str(folder), *names, split="train", cache_dir=str(tmp_path / "cache"))

    return loaded


def test_datasets_loads_every_table(tmp_path: Path, load: Any) -> None:
    folder = tmp_path / "set"
    counts = write_dataset(folder, records(), {"old": 2})
    assert counts == {"runs": 6, "scores": 6, "matrices": 4}
    for name, columns in TABLES.items():
        found = load(folder, name)
        assert len(found) == counts[name]
        assert {each: feature.dtype for each, feature in found.features.items()} == {c.name: c.type for c in columns}
    assert load(folder).column_names == load(folder, "runs").column_names, "the first is what one gets without a name"


def test_runs_say_what_became_of_them(tmp_path: Path, load: Any) -> None:
    write_dataset(tmp_path / "set", records(), {"old": 2}, lambda record: "checked" if record.spec.seed == 1 else "reported")
    rows = {(row["method"], row["seed"]): row for row in load(tmp_path / "set", "runs")}
    assert {key: row["status"] for key, row in rows.items()} == {
        ("dense", None): "ok",
        ("wanda", 0): "ok",
        ("wanda", 1): "ok",
        ("gblm", 0): "refused",
        ("imp", 0): "failed",
        ("old", 0): "ok",
    }
    assert (rows["gblm", 0]["reason"], rows["gblm", 0]["prune_seconds"]) == ("172 | is no multiple of 8.", None)
    assert (rows["imp", 0]["failure"], rows["wanda", 0]["reason"]) == ("oom", None)
    assert [key for key, row in rows.items() if row["outdated"]] == [("old", 0)]
    assert [key for key, row in rows.items() if row["shared_machine"]] == [("old", 0)]
    assert [key for key, row in rows.items() if row["grade"] == "checked"] == [("wanda", 1)]
    wanda = rows["wanda", 1]
    assert (wanda["prune_seconds"], wanda["peak_bytes"], wanda["sparsity_prunable"]) == (2.0, 300 << 20, 0.5)
    assert json.loads(wanda["phases"]) == {"other": 1.0, "scoring": 1.0}
    assert (wanda["calibration_samples"], wanda["calibration_length"], wanda["training"]) == (128, 512, None)
    assert (rows["dense", None]["recipe"], rows["dense", None]["calibration"]) == (None, None)


def test_scores_and_matrices_belong_to_runs(tmp_path: Path, load: Any) -> None:
    write_dataset(tmp_path / "set", records())
    runs = {(row["machine"], row["id"]) for row in load(tmp_path / "set", "runs")}
    scores, matrices = load(tmp_path / "set", "scores"), load(tmp_path / "set", "matrices")
    assert {(row["machine"], row["id"]) for table in (scores, matrices) for row in table} <= runs
    found = [row for row in scores if row["method"] == "wanda" and row["seed"] == 1]
    assert {(row["data"], row["value"], row["revision"]) for row in found} == {
        ("Salesforce/wikitext", 71.0, 1),
        ("allenai/c4", 71.0, 3),
    }
    assert {row["conditions"] for row in found} == {fingerprint(CONDITIONS), fingerprint(C4)}
    assert json.loads(found[0]["conditions_json"])["dtype"] == "float32"
    assert (matrices[0]["outputs"], matrices[0]["inputs"], matrices[0]["sparsity"]) == (8, 8, 33 / 64)


def test_the_card_says_what_every_column_is() -> None:
    text = card(records(), dict.fromkeys(TABLES, 1))
    front = yaml.safe_load(text.split("---\n")[1])
    assert [config["config_name"] for config in front["configs"]] == list(TABLES)
    assert [config.get("default") for config in front["configs"]] == [True, None, None]
    assert front["license"] == "apache-2.0"
    for columns in TABLES.values():
        for column in columns:
            assert f"| `{column.name}` | {column.type} | {column.unit} | {column.meaning} |" in text
            assert column.meaning
    for part in ("## What may not be compared", "`conditions`", "## Licence and citation", "CITATION.cff"):
        assert part in text


def test_a_table_without_rows_is_left_out(tmp_path: Path, load: Any) -> None:
    folder = tmp_path / "set"
    write_dataset(folder, records())
    assert write_dataset(folder, [make_record(status="refused")]) == {"runs": 1}
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "runs.parquet"]
    assert len(load(folder)) == 1
    with pytest.raises(RequestError, match="no records"):
        write_dataset(folder, [])


def test_equal_records_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    for folder, found in (("a", records()), ("b", records()[::-1])):
        write_dataset(tmp_path / folder, found)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_only_an_earlier_data_set_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_dataset(folder, records())
    write_dataset(folder, records()[:1])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "matrices.parquet", "runs.parquet", "scores.parquet"]
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(RequestError, match=r"holds other things, for example thesis\.tex"):
        write_dataset(folder, records())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RequestError, match="is no folder"):
        write_dataset(tmp_path / "file", records())


def test_names_of_strangers_cannot_break_the_card() -> None:
    hostile = "a\n---\n# heading <script>alert(1)</script>"
    text = card([make_record(make_spec(model=hostile), machine=hostile)], dict.fromkeys(TABLES, 1))
    assert "<script" not in text
    assert "\n# heading" not in text
    assert text.count("\n---\n") == 1

"""Faults at the store: nothing finished is lost, nothing half-written is believed, whatever the clock and the disk do."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import make_record, make_spec, tree

from prunebench.errors import PrunebenchError, StoreError, WriteError
from prunebench.results.items import MOST_INSIDE
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore, parse_record


def no_remains(results: Path) -> None:
    assert not [path for path in tree(results) if path.endswith(".tmp")]


# The clock


EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


def test_the_latest_is_what_was_written_last_when_the_clock_jumped_back(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    for value, started in ((1.0, LATE), (2.0, EARLY)):
        store.write(make_record(value=value, started=started))
    [latest] = store.latest()
    assert latest.record.scores["eval0"].value == 2.0
    store.write(make_record(status="failed", started=LATE))
    [latest] = store.latest()
    assert latest.record.scores["eval0"].value == 2.0


def test_numbers_of_records_never_go_back(tmp_path: Path) -> None:
    """A record that somebody took away leaves a gap, which would make the next one older than it is."""
    store = ResultStore(tmp_path, pytest.fail)
    first, second = (store.write(make_record(value=value, started=LATE)) for value in (1.0, 2.0))
    first.unlink()
    third = store.write(make_record(value=3.0, started=EARLY))
    assert third.name == second.name.replace(".2.json", ".3.json")
    assert [stored.record.scores["eval0"].value for stored in store.latest()] == [3.0]


def test_a_model_of_two_names_has_the_run_that_began_last(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    for name, started, value in (("a", LATE, 1.0), ("b", EARLY, 2.0)):
        store.write(make_record(make_spec(model=name), value, started=started))
    assert [stored.record.scores["eval0"].value for stored in store.latest()] == [1.0]


# Bits


def small() -> bytes:
    record = make_record()
    return record.model_copy(update={"audit": None, "steps": []}).to_json().encode()


def test_no_flipped_bit_of_a_record_is_believed() -> None:
    """Every byte once: what is read is equal, or nothing is."""
    good, draw = small(), random.Random(0)
    record = parse_record(good)
    believed = 0
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        try:
            assert parse_record(bytes(flipped)) == record
            believed += 1
        except (ValueError, PrunebenchError):
            continue
    assert believed < len(good) / 5, "white space"


def test_no_cut_record_is_believed() -> None:
    good = small()
    for size in range(0, len(good) - 2, 3):
        with pytest.raises((ValueError, PrunebenchError)):
            parse_record(good[:size])


def many() -> RunRecord:
    record = make_record()
    columns: dict[str, list[float | int | str]] = {"nll": [0.25] * (MOST_INSIDE + 1), "document": [0] * (MOST_INSIDE + 1)}
    return record.model_copy(update={"scores": {"eval0": record.scores["eval0"].model_copy(update={"items": columns})}})


def test_no_flipped_bit_and_no_cut_of_raw_answers_is_believed(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, pytest.fail)
    store.write(many())
    [stored], [file] = store.all(), list(tmp_path.rglob("*.parquet"))
    score, good, draw = stored.record.scores["eval0"], file.read_bytes(), random.Random(0)
    for place in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[place] ^= 1 << draw.randrange(8)
        for broken in (bytes(flipped), good[:place]):
            file.write_bytes(broken)
            with pytest.raises(StoreError, match=r"the raw answers [^\n]+ were changed after their record was written\."):
                store.items(stored.record, score)
    file.write_bytes(good)
    assert store.items(stored.record, score) == many().scores["eval0"].items


@pytest.mark.parametrize("break_it", [lambda path: path.write_bytes(path.read_bytes()[:99]), Path.unlink], ids=["cut", "gone"])
def test_one_warning_names_the_file_and_the_others_are_read(tmp_path: Path, break_it: Callable[[Path], object]) -> None:
    warned: list[str] = []
    store = ResultStore(tmp_path, warned.append)
    paths = [store.write(make_record(make_spec(seed=seed))) for seed in range(3)]
    break_it(paths[1])
    assert [stored.record.spec.seed for stored in store.all()] == [0, 2] or len(store.all()) == 2
    assert all(paths[1].name in warning for warning in warned)
    store.write(make_record(make_spec(seed=1), started=LATE))
    assert {stored.record.spec.seed for stored in store.latest()} == {0, 1, 2}


# Every call that writing makes, failing


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EIO", "EDQUOT"])
@pytest.mark.parametrize("name", ["fsync", "link"])
def test_whatever_call_fails_no_half_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str
) -> None:
    """At its first use, at its second, …; items and record together."""
    store = ResultStore(tmp_path, pytest.fail)
    kept = store.write(make_record(value=1.0))
    call: Any = getattr(os, name)
    for nth in range(1, 4):
        used = 0

        def failing(*args: Any, nth: int = nth, **options: Any) -> Any:
            nonlocal used
            used += 1
            if used == nth:
                raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))
            return call(*args, **options)

        before = {stored.path for stored in store.all()}
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            with contextlib.suppress(WriteError):
                store.write(many())
            assert used <= nth, "nothing is tried again on a disk that fails"
        assert before <= {stored.path for stored in store.all()}
        no_remains(tmp_path)
        assert kept.exists()
    store.write(many())
    for stored in store.all():
        store.items(stored.record, stored.record.scores["eval0"])

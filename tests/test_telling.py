"""Plugins hear of records: what they are given, and that nothing they do harms a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Bench, install_plugin, make_record, make_spec, run_command

from prunebench.bench.telling import Telling
from prunebench.plugins import Listener, registry_of
from prunebench.results.records import RunRecord
from prunebench.spec import hookimpl

SOURCE = """
import json
from pathlib import Path

from prunebench.spec import hookimpl


@hookimpl
def prunebench_record(record):
    print("heard")
    with Path("heard.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\\n")
"""


class Shows:
    """A watcher that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def run_began(self, number: int, request: Any, where: str) -> None:
        self.told.append(f"began {number}")

    def progress(self, number: int, what: str, done: int, total: int) -> None:
        self.told.append(f"progress {number}")

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        self.told.append(f"ended {number}")

    def run_taken(self, number: int, request: Any) -> None:
        self.told.append(f"taken {number}")

    def run_done_elsewhere(self, number: int) -> None:
        self.told.append(f"elsewhere {number}")


def end(told: Telling, *records: RunRecord) -> None:
    for number, record in enumerate(records, start=1):
        told.run_ended(number, record, 1.0, b"", None)


def test_a_listener_gets_the_record_as_its_file_has_it_after_it_was_shown() -> None:
    shows = Shows()
    heard: list[dict[str, Any]] = []
    record = make_record()
    listener = Listener("good", lambda record: (heard.append(record), shows.told.append("heard")))
    end(Telling(shows, [listener], pytest.fail), record)
    assert shows.told == ["ended 1", "heard"]
    written = json.loads(record.to_json())
    written.pop("checksum")
    assert heard == [written]


def test_everything_else_goes_to_the_watcher() -> None:
    shows = Shows()
    told = Telling(shows, [], pytest.fail)
    told.run_began(1, SimpleNamespace(), "")
    told.progress(1, "load", 0, 1)
    told.run_taken(2, SimpleNamespace())
    told.run_done_elsewhere(3)
    assert shows.told == ["began 1", "progress 1", "taken 2", "elsewhere 3"]


def test_one_that_fails_is_named_once_and_the_others_hear_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(record: dict[str, Any]) -> None:
        print("about to fail")
        record.clear()
        raise ConnectionError("no server")

    heard: list[str] = []
    listeners = [Listener("bad", fails), Listener("good", lambda record: heard.append(record["id"]))]
    records = [make_record(make_spec(seed=seed)) for seed in range(3)]
    warnings: list[str] = []
    end(Telling(Shows(), listeners, warnings.append), *records)
    assert warnings == ["the plugin bad hears of no more records: ConnectionError: no server."]
    assert heard == [record.id for record in records]
    assert capsys.readouterr() == ("", "about to fail\n")


def test_an_interruption_is_the_users() -> None:
    def interrupted(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end(Telling(Shows(), [Listener("slow", interrupted)], pytest.fail), make_record())


def test_a_plugin_may_only_listen() -> None:
    heard: list[Any] = []

    class Plugin:
        @hookimpl
        def prunebench_record(self, record: dict[str, Any]) -> None:
            heard.append(record)

    registry = registry_of([("logger", "theirs", "1.0", Plugin)])
    assert (registry.broken, registry.pruners, registry.evals) == ([], {}, {})
    [listener] = registry.listeners
    listener.hear(record={"id": "x"})
    assert (listener.plugin, heard) == ("logger", [{"id": "x"}])


def test_a_listener_with_another_argument_is_broken() -> None:
    class Plugin:
        @hookimpl
        def prunebench_record(self, run: dict[str, Any]) -> None:
            pytest.fail("never called")

    registry = registry_of([("logger", "theirs", "1.0", Plugin)])
    assert registry.listeners == []
    assert "a hook that prunebench does not know" in registry.broken[0].reason


def test_an_installed_plugin_hears_of_a_sweep(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(bench.suite_text("magnitude", "wanda"))
    path = install_plugin(tmp_path / "theirs", SOURCE, "logger")
    ran = run_command("run", "small.toml", "--executor", "inline", "--machine", "here", path=path, cwd=tmp_path)
    assert ran.code == 0, ran
    assert "heard" not in ran.out
    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert {(record["status"], record["spec"]["steps"][0]["text"]) for record in heard} == {
        ("ok", method) for method in ("dense", "magnitude", "wanda")
    }
    kept = {json.loads(path.read_text())["id"] for path in tmp_path.glob("results/here/*/*.json")}
    assert kept == {record["id"] for record in heard}

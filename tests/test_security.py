"""Records, suites, plugins and models of strangers: they show nothing but text, reach nothing but their folder, run nothing."""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import xml.dom.minidom
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from support import Bench, Ran, cases, make_record, make_spec, tree

from prunebench.bench.suite import load_suite
from prunebench.errors import ModelError, PrunebenchError, RequestError, StoreError, WriteError
from prunebench.plain import escape, markdown, plain
from prunebench.results import store as store_module
from prunebench.results.board import build_board
from prunebench.results.content import checksum
from prunebench.results.files import read_file, write_aside, write_text
from prunebench.results.items import MOST_INSIDE
from prunebench.results.leaderboard import to_markdown
from prunebench.results.records import RunRecord, RunSpec
from prunebench.results.store import ResultStore
from prunebench.show import draw_board, print_board, print_record
from prunebench.toolkit.loading import ModelSource, identify, load_model

HOSTILE = (
    "\x1b]8;;http://e.vil\x07click\x1b]8;;\x07\x1b[2J\x1b[31m\x9b2J\r\x08\u202eevil\u2066\u200b\u2028\nok: all is well "
    "[/a] [/] [bold red]x[link=http://e.vil]y <script>alert(1)</script> <img src=x onerror=alert(1)> ![p](http://e.vil/p.png) "
    "[x](javascript:alert(1)) [a]: http://e.vil | cell | **bold** `code \\"
)
Data = dict[str, Any]


def seen(text: str) -> None:
    """A text that shows what it says, and nothing else."""
    assert [each for each in text if not each.isprintable() and each != "\n"] == []


# One mechanism for each place where text is shown


def test_nothing_steers_the_terminal() -> None:
    assert plain("a\x1b[31mb\x07\x9bc") == r"a\x1b[31mb\x07\x9bc"
    assert plain("a\u202eb\u2066c\u200bd\ufeff") == r"a\u202eb\u2066c\u200bd\ufeff"
    assert plain("one\r\ntwo\tthree\u2028four\x0bfive") == "one  two three four five"
    assert plain("half a \ud800 character\x00") == r"half a \ud800 character\x00"
    assert plain("naïve 模型 ± ≈ –") == "naïve 模型 ± ≈ –"


BRACKETS = [
    "[/a] [b]x",
    "[",
    "]",
    "[/",
    "[link=http://e.vil]",
    "a\\",
    "\\[b]",
    "[red",
    "x]",
    "[/]",
    "[@click=f]",
    "wanda[a=b+c]",
]


@pytest.mark.parametrize("first", BRACKETS)
def test_no_bracket_is_taken_for_markup(first: str) -> None:
    """Neither by itself nor with what stands beside it."""
    for second in BRACKETS:
        console = Console(file=io.StringIO(), force_terminal=True, emoji=False, highlight=False, width=200)
        console.print(f"{escape(first)}: {escape(second)} end")
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "\x1b" not in shown
        assert shown.replace("\\", "") == f"{first}: {second} end\n".replace("\\", "")


INERT = {
    "a tag": ("<b>x", "&lt;b>x"),
    "an entity": ("&lt;b> &#60; R&D a & b", "&amp;lt;b> &amp;#60; R&amp;D a & b"),
    "a cell": ("a|b", "a\\|b"),
    "a cell behind an escape": ("a\\|b", "a\\\\\\|b"),
    "a link": ("[x](y)", "[x\\](y)"),
    "a link behind an escape": ("[x\\](y)", "[x\\\\\\](y)"),
    "a picture": ("![x](y)", "![x\\](y)"),
    "a link by reference": ("[x][y]", "[x\\][y]"),
    "a definition of a link": ("[x]: y", "[x\\]: y"),
    "an address": ("http://e.vil WWW.e.vil a@e.vil", "http&#58;//e.vil www&#46;e.vil a&#64;e.vil"),
    "bold": ("**x** __x__", "\\*\\*x\\** \\__x__"),
    "struck out": ("~~x~~", "\\~~x\\~~"),
    "a heading": ("# x", "\\# x"),
    "a quote": ("> x", "\\> x"),
    "a fence": ("``` x", "\\``` x"),
    "a list": ("- x", "\\- x"),
    "lines": ("a\n\n# b\n", "a # b"),
    "options": ("perp[subset=mask_lora,rank=4] (tuned)", "perp[subset=mask_lora,rank=4] (tuned)"),
    "numbers": ("-1.2 [-2, +3] 0.35*", "-1.2 [-2, +3] 0.35*"),
}


@pytest.mark.parametrize(("text", "written"), cases(INERT))
def test_nothing_is_more_than_text_on_a_page(text: str, written: str) -> None:
    assert markdown(text) == written


def test_a_text_on_a_page_has_an_end() -> None:
    assert len(markdown("x" * 10**6)) == 2001


# Hostile records in every command


def leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in nested data."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*place, key))
    else:
        yield place


def changed(data: Data, place: tuple[Any, ...], value: Any) -> Data:
    """A copy with another value at a place."""
    found = copy.deepcopy(data)
    at: Any = found
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return found


def sealed(data: Data) -> str:
    """As a file, with the id and the checksum that a forger would give it."""
    data = {key: value for key, value in data.items() if key not in ("id", "checksum")}
    with contextlib.suppress(ValidationError):
        data["id"] = RunSpec.model_validate(data["spec"]).id
    data["checksum"] = checksum(data)
    return json.dumps(data)


def answered(record: RunRecord) -> Data:
    """A record whose score says what it is made of."""
    data: Data = json.loads(record.to_json())
    for score in data["scores"].values():
        score["sample"] = {"column": "nll", "exponential": True, "documents": "document", "strata": None, "tasks": None}
    return data


FREE_KEYS = ("options", "notes", "phases", "packages", "parts", "scores")
MEANT = ("status", "target", "column", "documents", "unit", "kind")
"""Strings that mean something, and would only be refused."""


def poisoned(data: Any, place: str = "") -> Any:
    """Every text and every free name with something hostile at its end."""
    if isinstance(data, dict):
        return {(f"{key}{HOSTILE}" if place in FREE_KEYS else key): poisoned(value, key) for key, value in data.items()}
    if isinstance(data, list):
        return [poisoned(value, place) for value in data]
    return f"{data}{HOSTILE}" if isinstance(data, str) and place not in MEANT else data


def hostile_records() -> dict[str, str]:
    """Several poisoned records by the names of their files, and one good one."""
    good = [answered(make_record(make_spec(method), value=value)) for method, value in (("dense", 50.0), ("wanda", 60.0))]
    bad = poisoned(good[1])
    other = changed(bad, ("spec", "seed"), 1)
    other["spec"]["steps"][0]["text"] = f"magnitude[{HOSTILE}]"
    failure = {"kind": "error", "type": HOSTILE, "message": HOSTILE, "step": HOSTILE}
    failed = {**changed(bad, ("spec", "seed"), 2), "status": "failed", "failure": failure}
    refused = {**changed(bad, ("spec", "seed"), 3), "status": "refused", "reason": HOSTILE}
    foreign = changed(bad, ("steps", 0, "distribution"), f"their{HOSTILE}")
    files = {f"{index}.json": sealed(data) for index, data in enumerate((*good, bad, other, failed, refused, foreign))}
    return files | {"x\x1b[31m\n\u202e[red].json": "{", "broken.json": '{"schema": "\\u001b[2J\\n[/a]"}'}


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A results folder that a stranger made."""
    folder = tmp_path / "results" / "box" / "tiny"
    folder.mkdir(parents=True)
    for name, content in hostile_records().items():
        (folder / name).write_text(content, encoding="utf-8")
    return tmp_path / "results"


def test_a_hostile_record_shows_text_on_the_terminal(hostile: Path, command: Callable[..., Ran]) -> None:
    stored = ResultStore(hostile, lambda _: None).latest()
    ids = [item.record.id for item in stored if item.record.status == "ok"]
    calls = [["show", ""], ["report"], ["show", HOSTILE], ["report", "--only", f"not{HOSTILE}"]]
    calls += [[verb, ids[0], run_id] for verb in ("explain", "compare") for run_id in ids[1:3]]
    poisoned_names = 0
    for call in calls:
        ran = command(*call, "--results", hostile)
        assert ran.code in (0, 2), ran
        seen(ran.out + ran.err)
        poisoned_names += "[boldred]x[link=http://e.vil]y" in re.sub(r"\s", "", ran.out + ran.err)
    assert poisoned_names > 3, "it is shown as text"


def test_a_hostile_record_shows_text_on_a_page(hostile: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    page, picture = tmp_path / "board.md", tmp_path / "board.svg"
    assert command("report", "--results", hostile, "--out", page, "--picture", picture).code == 0
    text = page.read_text(encoding="utf-8")
    own = r"[0-9a-f]{8}-(?:[0-9a-f]{8}|any)(?:-\d+)?|(?:refused|failed|outdated)-runs"
    text = re.sub(rf"(?m)^<a id=\"(?:{own})\"></a>$", "", text)  # the page's own anchors, and its links to them
    text = re.sub(rf"\]\(#(?:{own})\)", "", text)
    seen(text)
    assert "<" not in text
    assert "alert(1)" in text
    assert re.findall(r"(?<!\\)\]\(", text) == re.findall(r"(?<!\\)\]:", text) == []
    assert "://" not in text
    assert text.count("\n## ") == text.count("\n\n## ")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "no cell holds another"
    drawn = xml.dom.minidom.parseString(picture.read_bytes())
    assert not drawn.getElementsByTagName("script")
    assert not drawn.getElementsByTagName("image")
    assert not [a for a in drawn.getElementsByTagName("a") if a.hasAttribute("href") or a.hasAttribute("xlink:href")]
    seen("".join(node.data for tag in drawn.getElementsByTagName("text") for node in tag.childNodes).replace("\xa0", " "))


def test_a_hostile_record_shows_text_in_files_for_programs(hostile: Path, tmp_path: Path, command: Callable[..., Ran]) -> None:
    sheet, tables, data = tmp_path / "board.csv", tmp_path / "board.tex", tmp_path / "board.json"
    assert command("report", "--results", hostile, "--csv", sheet, "--latex", tables, "--json", data).code == 0
    lines = list(csv.reader(sheet.read_text(encoding="utf-8").splitlines()))
    assert len({len(line) for line in lines}) == 1
    for cell in (cell for line in lines for cell in line):
        assert not cell.startswith(("=", "+", "@")), cell
    assert tables.read_bytes().isascii()
    assert not re.search(r"\\(?:input|include|write|def|catcode)\b", tables.read_text())
    assert json.loads(data.read_text(encoding="utf-8"))["sections"]
    assert command("export", tmp_path / "set", "--results", hostile).code == 0
    card = (tmp_path / "set" / "README.md").read_text(encoding="utf-8")
    seen(card)
    assert "<" not in card


ODD: list[Any] = [0, -1, 1e308, 10**29, 10**400, None, "", "nan", HOSTILE, [], {"a": [HOSTILE]}, "0:0", "1e999"]
TOLD = [
    ("spec", "target"),
    ("spec", "model", "name"),
    ("scores", "eval0", "value"),
    ("scores", "eval0", "unit"),
    ("scores", "eval0", "conditions", "windows"),
    ("scores", "eval0", "parts"),
    ("scores", "eval0", "sample", "documents"),
    ("scores", "eval0", "sample", "tasks"),
    ("scores", "eval0", "items", "nll"),
    ("scores", "eval0", "items", "nll", 0),
    ("scores", "eval0", "items", "document", 1),
    ("scores", "eval0", "items_file"),
    ("steps", 0, "peak_device_bytes"),
    ("provenance", "started"),
]


@pytest.mark.parametrize("place", TOLD, ids=lambda place: ".".join(map(str, place)))
def test_no_value_in_one_record_stops_the_others(tmp_path: Path, place: tuple[Any, ...]) -> None:
    """It is skipped with a warning, or shown; the board stands either way."""
    folder = tmp_path / "box" / "tiny"
    folder.mkdir(parents=True)
    good = answered(make_record(make_spec("magnitude"), value=70.0))
    (folder / "dense.json").write_text(sealed(answered(make_record(make_spec("dense", "dense", None)))))
    (folder / "good.json").write_text(sealed(good))
    for value in ODD:
        (folder / "odd.json").write_text(sealed(changed(answered(make_record()), place, value)))
        warned: list[str] = []
        store = ResultStore(tmp_path, warned.append)
        found = store.latest()
        assert len(found) + len(warned) == 3
        console = Console(file=io.StringIO(), width=120)
        board = build_board(found, {}, store.items)
        print_board(board, console)
        for stored in found:
            print_record(stored.record, stored.path, console)
        page = to_markdown(board)
        assert "magnitude" in page
        seen(page + "".join(warned) + console.file.getvalue())  # type: ignore[attr-defined]
    draw_board(board)


# What a file in the results folder may be


def with_items(name: str | None = None, digest: str | None = None) -> RunRecord:
    """A record with more answers than it keeps itself, and perhaps another file named."""
    record = make_record()
    columns: dict[str, list[float | int | str]] = {"nll": [0.5] * (MOST_INSIDE + 1), "document": [0] * (MOST_INSIDE + 1)}
    changes: Data = {"items": columns} if name is None else {"items": {}, "items_file": name, "items_hash": digest}
    return record.model_copy(update={"scores": {"eval0": record.scores["eval0"].model_copy(update=changes)}})


def of_items(store: ResultStore) -> Any:
    [stored] = store.all()
    return store.items(stored.record, stored.record.scores["eval0"])


@pytest.mark.parametrize("make", ["pipe", "folder", "device", "link out", "folder that is a link out"])
def test_what_is_no_record_file_is_skipped_at_once(tmp_path: Path, make: str) -> None:
    """A pipe would be waited for, a device read for ever; a link may show what is not in the folder."""
    warned: list[str] = []
    store = ResultStore(tmp_path / "results", warned.append)
    good = store.write(make_record(make_spec("magnitude")))
    outside = ResultStore(tmp_path / "elsewhere", pytest.fail).write(make_record())
    place = good.with_name("odd.json")
    if make == "pipe":
        os.mkfifo(place)
    elif make == "folder":
        place.mkdir()
    elif make == "device":
        place.symlink_to("/dev/zero")
    elif make == "link out":
        place.symlink_to(outside)
    else:
        (store.folder / "box" / "linked").symlink_to(outside.parent)
    assert [stored.record.spec.method for stored in store.all()] == ["magnitude"]
    [warning] = warned
    assert warning.startswith("skipped box/")
    assert (r"leads out of" in warning) == ("link" in make or make == "device")


def test_a_link_inside_is_followed_and_a_linked_results_folder_too(tmp_path: Path) -> None:
    path = ResultStore(tmp_path / "results", pytest.fail).write(make_record())
    path.with_name("same.json").symlink_to(path.name)
    (tmp_path / "link").symlink_to(tmp_path / "results")
    assert len(ResultStore(tmp_path / "link", pytest.fail).all()) == 2


@pytest.mark.parametrize("level", ["machine", "model"])
def test_nothing_is_written_through_a_link_out(tmp_path: Path, level: str) -> None:
    """A repository of records can hold links."""
    store = ResultStore(tmp_path / "results", pytest.fail)
    (tmp_path / "elsewhere").mkdir()
    link = store.folder / "box" if level == "machine" else store.folder / "box" / "tiny"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="is a link that leads out of the results folder"):
        store.write(with_items())
    assert tree(tmp_path / "elsewhere") == {}


def test_a_link_in_the_place_of_a_file_is_never_written_through(tmp_path: Path) -> None:
    store, secret = ResultStore(tmp_path / "results", lambda _: None), tmp_path / "secret"
    secret.write_text("mine")
    stem, folder = make_spec().file_stem, store.folder / "box" / "tiny"
    path = store.write(with_items())
    [items] = folder.glob("*.parquet")
    for taken in (items, path, folder / f"{stem}.2.json", folder / f"{stem}.3.log", folder / f"{stem}.4.log"):
        taken.unlink(missing_ok=True)
        taken.symlink_to(secret)
    assert store.write(with_items(), b"what it wrote").name == f"{stem}.3.json"
    assert (folder / f"{stem}.3.log").read_bytes() == b"what it wrote"
    assert secret.read_text() == "mine"
    page = tmp_path / "board.md"
    page.symlink_to(secret)
    write_text(page, "a board")
    assert secret.read_text() == "mine"


NOWHERE = [
    "../../secret.parquet",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "x" * 5000,
    "link",
    "pipe",
    "../tiny/../../../secret.parquet",
]


@pytest.mark.parametrize("name", NOWHERE, ids=lambda name: repr(name[:12]))
def test_raw_answers_are_beside_their_record_or_nowhere(tmp_path: Path, name: str) -> None:
    store = ResultStore(tmp_path / "results", pytest.fail)
    secret = tmp_path / "secret.parquet"
    pd.DataFrame({"nll": [1.0]}).to_parquet(secret)
    path = store.write(with_items(name, hashlib.sha256(secret.read_bytes()).hexdigest()))
    (path.parent / "link").symlink_to(secret)
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(StoreError, match=r"the raw answers .* cannot be read: "):
        of_items(store)


FORGED: dict[str, Callable[[Path], object]] = {
    "no Parquet": lambda path: path.write_bytes(b"PAR1" * 100),
    "nothing": lambda path: path.write_bytes(b""),
    "other kinds": lambda path: pd.DataFrame({"nll": [[1.0], [2.0]]}).to_parquet(path),
    "times": lambda path: pd.DataFrame({"nll": pd.to_datetime(["2026-01-01"])}).to_parquet(path),
    "not a number": lambda path: pd.DataFrame({"nll": [float("nan")]}).to_parquet(path),
    "infinity": lambda path: pd.DataFrame({"nll": [float("inf")]}).to_parquet(path),
    "bytes": lambda path: pd.DataFrame({"nll": [b"x"]}).to_parquet(path),
    "holes": lambda path: pd.DataFrame({"nll": pd.array([1, None], dtype="Int64")}).to_parquet(path),
    "too many": lambda path: pd.DataFrame({"nll": [0.0]} | {str(n): [0.0] for n in range(9)}).to_parquet(path),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_forged_raw_answers_are_an_error_that_the_board_survives(
    tmp_path: Path, forge: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hash in the record, which whoever forges one knows too."""
    monkeypatch.setattr("prunebench.results.items.MOST_VALUES", 8)
    file = tmp_path / "box" / "tiny" / "x.parquet"
    file.parent.mkdir(parents=True)
    forge(file)
    record = with_items(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    data = answered(record)
    (file.parent / "x.json").write_text(sealed(data))
    store = ResultStore(tmp_path, pytest.fail)
    with pytest.raises(StoreError, match=r"the raw answers x\.parquet are none: [^\n]+\.$"):
        of_items(store)
    assert "Without intervals and ranks" in to_markdown(build_board(store.latest(), {}, store.items))


# Names


NAMES = [
    "../../x",
    "..",
    "/etc/cron.d/x",
    "a/b",
    "a\\b",
    "x" * 5000,
    "nul\0l",
    "published",
    ".journal",
    "-",
    "Tiny",
    "TINY",
    "tiny ",
    "~",
    "$HOME",
]


def test_no_name_leaves_its_folder_nor_meets_another(tmp_path: Path) -> None:
    """Of models, methods, options, machines and evaluations; those that become one file name stay apart."""
    store = ResultStore(tmp_path / "results", pytest.fail)
    written = []
    for name in NAMES:
        for machine in (name, "box"):
            record = with_items().model_copy(update={"machine": machine})
            spec = make_spec(f"wanda[x={name}]", "0.5", len(written), model=name)
            [score] = record.scores.values()
            record = record.model_copy(update={"spec": spec, "id": spec.id, "scores": {name: score}})
            written.append(record)
            path = store.write(record, b"log")
            assert path.resolve().is_relative_to((tmp_path / "results").resolve())
            assert len(path.relative_to(store.folder).parts) == 3
            assert store.is_settled(machine, record.id)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]
    found = {stored.record.id: stored.record for stored in store.all()}
    assert len(found) == len(written)
    for record in written:
        assert found[record.id].machine == record.machine
        [name] = record.scores
        assert store.items(found[record.id], found[record.id].scores[name])["nll"] == [0.5] * (MOST_INSIDE + 1)


# Too large, too deep


MEASURED = """
import json, resource, sys, time
from pathlib import Path
from prunebench.bench.suite import load_suite
from prunebench.errors import RequestError
from prunebench.results.store import ResultStore

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

folder = Path(sys.argv[1])
warned = []
ResultStore(folder / "none", warned.append).all()
for suite in ("small.toml", "none"):
    try:
        load_suite(suite)
    except RequestError:
        pass
found = {}
for path in sorted(folder.iterdir()):
    before, started = peak(), time.process_time()
    if path.suffix == ".toml":
        try:
            load_suite(str(path))
        except RequestError as error:
            warned.append(str(error))
    else:
        ResultStore(path, warned.append).all()
    found[path.name] = [time.process_time() - started, (peak() - before) / 1024, warned.pop()]
assert not warned
print(json.dumps(found))
"""


def test_what_is_far_too_large_or_deep_is_refused_quickly(tmp_path: Path) -> None:
    """In a process of its own, that its memory can be told."""

    def record(name: str, content: bytes, size: int | None = None) -> None:
        path = tmp_path / name / "box" / "tiny" / "x.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        if size is not None:
            os.truncate(path, size)  # a hole, which takes no room on the disk

    record("1 GB", b'{"schema": 1', 1 << 30)
    record("deep lists", b"[" * 10_000 + b"]" * 10_000)
    record("deep objects", b'{"schema": 1, "x": ' + b'{"a":' * 10_000 + b"0" + b"}" * 10_001)
    record("many lists", b'{"schema": 1, "x": [' + b"[]," * (10 << 20) + b"[]]}")
    record("a million steps", b'{"schema": 1, "steps": [' + b"{}," * 1_000_000 + b"{}]}")
    record("many numbers", b'{"schema": 1, "x": [' + b"0," * (1 << 20) + b"0]}")
    record("long digits", b'{"schema": 1, "x": ' + b"9" * (1 << 20) + b"}")
    (tmp_path / "large.toml").write_bytes(b"[suite]\n")
    os.truncate(tmp_path / "large.toml", 1 << 30)
    (tmp_path / "deep.toml").write_text("x = " + "[" * 10_000 + "]" * 10_000)
    (tmp_path / "tables.toml").write_text("x = " + "{a = " * 10_000 + "1" + "}" * 10_000)
    (tmp_path / "keys.toml").write_text(".".join("a" * 10_000) + " = 1")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == 11
    for name, (seconds, mebibytes, said) in found.items():
        assert seconds < 5, (name, seconds)
        assert mebibytes < 150, (name, mebibytes)
        assert re.fullmatch(r"(skipped|the suite) [^\n]{5,400}", said), (name, said)


def test_a_run_whose_record_nobody_could_read_again_leaves_one_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plugin may note anything."""
    monkeypatch.setattr(store_module, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(store_module, "MOST_PARTS", 1000)
    store = ResultStore(tmp_path, pytest.fail)
    for notes in ({"all": "x" * (1 << 16)}, {"all": [[]] * 1000}, {"all": 10**100}):
        record = make_record()
        step = record.steps[0].model_copy(update={"notes": notes})
        path = store.write(record.model_copy(update={"steps": [step]}))
        assert path.stat().st_size < 20_000
        [kept] = store.latest()
        assert kept.record.status == "failed"
        assert kept.record.failure is not None
        assert "cannot be kept: it " in kept.record.failure.message


# Files that pass


def test_files_on_their_way_are_private_and_nobody_knows_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen_modes: list[tuple[str, int]] = []
    fsync = os.fsync

    def watched(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").resolve()
        if path.is_file():
            seen_modes.append((path.name, stat.S_IMODE(os.fstat(handle).st_mode)))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    before = os.umask(0)
    try:
        ResultStore(tmp_path, pytest.fail).write(with_items(), b"log")
        write_aside(tmp_path, b"x").unlink()
    finally:
        os.umask(before)
    assert len(seen_modes) == len({name for name, _ in seen_modes}) == 4
    assert {mode for _, mode in seen_modes} == {0o600}
    assert not any(make_spec().id in name for name, _ in seen_modes)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_is_read_as_far_as_it_was_when_it_was_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert len(read_file(tmp_path / "x", tmp_path, 100)) == 100
    with pytest.raises(ValueError, match="larger than"):
        read_file(tmp_path / "x", tmp_path, 99)


# Suites are data


EXPANDED = [
    "$HOME",
    "${HOME}",
    "%(HOME)s",
    "{0.__class__}",
    "`touch owned`",
    "$(touch owned)",
    "~/x.txt",
    "a\nb.txt",
    "../x.txt",
    "\x1b[2J.txt",
]


@pytest.mark.parametrize("text", EXPANDED)
def test_nothing_in_a_suite_is_executed_or_expanded(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes out as it went in, and names a file of exactly that name or none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("text\n" * 1000)
    quoted = json.dumps(text)
    suite = tmp_path / "suites" / "mine.toml"
    suite.parent.mkdir()
    suite.write_text(
        f'[suite]\nname = "mine"\n[[model]]\npath = {quoted}\n[calibration]\nsource = {quoted}\n'
        f"[[method]]\nsteps = [{quoted}]\n[[eval]]\nuse = {quoted}\n[grid]\ntargets = [{quoted}]\n"
    )
    read = load_suite(str(suite))
    assert read.calibration is not None
    assert {read.model[0].path, read.calibration.source, *read.method[0].steps, read.eval[0].use, *read.grid.targets} == {text}
    before = tree(tmp_path)
    from prunebench.bench.plan import Planner
    from prunebench.plugins import load_registry

    with pytest.raises(PrunebenchError) as caught:
        Planner(read, load_registry(), "here", "", "cpu").requests()
    assert "\n" not in plain(str(caught.value))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", "mine\n.toml", "/dev/zero", "/dev/stdin"])
def test_a_suite_of_an_odd_name_is_none(name: str) -> None:
    with pytest.raises(RequestError):
        load_suite(name)


def test_a_pipe_is_no_suite(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(RequestError):
        load_suite(str(tmp_path / "pipe.toml"))


# Models


@pytest.fixture
def model(bench: Bench, tmp_path: Path) -> Path:
    shutil.copytree(bench.model, tmp_path / "tiny")
    return tmp_path / "tiny"


def settings(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusals(model: Path, *allowed: str) -> list[str]:
    """What is said before a model is planned, and before it is loaded."""
    found = []
    source = ModelSource(model, model.name, "local", frozenset(allowed))
    for action in (lambda: identify(source), lambda: load_model(source, "float32")):
        with pytest.raises(ModelError) as caught:
            action()
        found.append(str(caught.value))
    return found


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_no_kernel_of_the_hub_is_run_unless_allowed(model: Path, key: str) -> None:
    """transformers would fetch it and run it, whatever it is told of remote code."""
    settings(model / "config.json", **{key: "evil/kernel"})
    said = "tiny wants to run code from the Hub (evil/kernel); allow it by name (--allow remote-code) if you trust it."
    assert refusals(model) == refusals(model, "pickle") == [said] * 2
    settings(model / "config.json", **{key: None}, text_config={key: "evil/kernel"})
    assert refusals(model) == [said] * 2


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_model_is_run_unless_allowed(model: Path, place: str) -> None:
    owned = model / "owned"
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(owned)!r}).touch()\nclass C: pass\n")
    classes = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"], "AutoModelForCausalLM": "evil.C"}
    settings(model / place, auto_map=classes, tokenizer_class="C")
    with pytest.raises(ModelError, match="code"):
        identify(ModelSource(model, "tiny", "local"))
    load = ModelSource(model, "tiny", "local")
    with contextlib.suppress(ModelError):
        load_model(load, "float32")
    assert not owned.exists()


@pytest.mark.parametrize("named", ["../tiny2/model.safetensors", "/etc/passwd", "evil.bin", "absent.safetensors", 7])
def test_what_is_loaded_is_what_was_hashed(model: Path, named: Any) -> None:
    """An index may name any file: one elsewhere, or a pickle; a file that fits lies beside it to be hashed."""
    shutil.copytree(model, model.with_name("tiny2"))
    (model / "evil.bin").write_bytes(b"x")
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "decoy.safetensors")}))
    load_model(ModelSource(model, "tiny", "local"), "float32")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, named)}))
    said = f"tiny/{index.name} names {str(named)!r}, which is no .safetensors file of its folder."
    assert refusals(model) == [said] * 2

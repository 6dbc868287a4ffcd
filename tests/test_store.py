"""The results folder: what is written stays, what is broken is named, two commands never do one run twice."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Process, files_no_larger_than, heard, make_record, make_spec, programs, tree

from prunebench.errors import StoreError, WriteError
from prunebench.results import store as store_module
from prunebench.results.content import checksum
from prunebench.results.files import write_text
from prunebench.results.journal import Journal
from prunebench.results.store import ResultStore

EARLY, LATE = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> ResultStore:
    return ResultStore(tmp_path / "results", warnings.append)


def files(folder: Path) -> list[str]:
    """Names of everything below a folder that is no folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# Writing and reading


def test_what_is_written_is_read(store: ResultStore, warnings: list[str]) -> None:
    first, second = make_record(), make_record(make_spec("magnitude", "2:4", None), machine="Other Box")
    paths = [store.write(first), store.write(second)]
    assert [path.relative_to(store.folder).as_posix() for path in paths] == [
        f"box/tiny/wanda-0.5-{first.id}.json",
        f"other-box/tiny/magnitude-2of4-{second.id}.json",
    ]
    assert [(stored.path, stored.record) for stored in store.all()] == [
        (path.relative_to(store.folder).as_posix(), record) for path, record in zip(paths, (first, second), strict=True)
    ]
    assert warnings == []


def test_nothing_else_is_left_and_others_may_read(store: ResultStore) -> None:
    path = store.write(make_record())
    assert files(store.folder) == [path.relative_to(store.folder).as_posix()]
    assert path.read_text(encoding="utf-8") == make_record().to_json()
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_absent_or_empty_folder_holds_nothing(store: ResultStore) -> None:
    assert store.all() == store.latest() == []
    store.check_writable()
    assert store.all() == []
    assert tree(store.folder) == {}


def test_nothing_is_ever_overwritten(store: ResultStore) -> None:
    kept = {}
    for attempt in range(1, 13):
        path = store.write(make_record(value=float(attempt)))
        assert path.name == f"wanda-0.5-{make_spec().id}{'' if attempt == 1 else f'.{attempt}'}.json"
        kept[path] = path.read_bytes()
        assert all(path.read_bytes() == content for path, content in kept.items())
    assert len(store.all()) == 12


def test_numbers_from_papers_are_no_records(store: ResultStore, warnings: list[str]) -> None:
    store.write(make_record())
    published = store.folder / "published" / "wanda"
    published.mkdir(parents=True)
    (published / "table3.json").write_text("{}")
    assert len(store.all()) == 1
    assert warnings == []


# The latest counts


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ([("ok", EARLY), ("ok", LATE)], 1),
        ([("ok", LATE), ("ok", EARLY)], 1),
        ([("failed", EARLY), ("ok", LATE)], 1),
        ([("ok", EARLY), ("failed", LATE)], 0),
        ([("failed", LATE), ("ok", EARLY)], 1),
        ([("refused", EARLY), ("failed", LATE)], 0),
        ([("ok", EARLY), ("refused", LATE)], 1),
        ([("refused", EARLY), ("ok", LATE)], 1),
        ([("failed", EARLY), ("failed", LATE)], 1),
        ([("failed", LATE), ("failed", EARLY)], 1),
        ([("ok", EARLY)] * 2, 1),
        ([("failed", EARLY)] * 3, 2),
        ([("ok", EARLY)] * 11, 10),
    ],
    ids=lambda value: " ".join(f"{s}@{'early' if t == EARLY else 'late'}" for s, t in value) if isinstance(value, list) else "",
)
def test_the_latest(store: ResultStore, runs: list[tuple[str, str]], chosen: int) -> None:
    """A later `ok` wins, a later failure undoes nothing; later is what was written later, whatever the clock said."""
    paths = [store.write(make_record(status=status, started=started)) for status, started in runs]
    [latest] = store.latest()
    assert latest.path == paths[chosen].relative_to(store.folder).as_posix()


def test_machines_seeds_and_targets_are_apart(store: ResultStore) -> None:
    records = [
        make_record(machine="a"),
        make_record(machine="b"),
        make_record(make_spec(seed=1), machine="a"),
        make_record(make_spec(target="2:4"), machine="a"),
    ]
    for record in records:
        store.write(record)
    latest = store.latest()
    assert len(latest) == 4
    assert [stored.path for stored in latest] == sorted(stored.path for stored in latest)


def test_what_is_settled(store: ResultStore) -> None:
    ok, refused, failed = (
        make_record(make_spec(seed=seed), status=status) for seed, status in enumerate(("ok", "refused", "failed"))
    )
    for record in (ok, refused, failed):
        store.write(record)
    assert [store.is_settled("box", record.id) for record in (ok, refused, failed)] == [True, True, False]
    assert not store.is_settled("another box", ok.id)
    store.write(make_record(make_spec(seed=0), status="failed", started=LATE))
    assert store.is_settled("box", ok.id)


def test_a_retry_settles_a_failed_run(store: ResultStore) -> None:
    store.write(make_record(status="failed", started=EARLY))
    assert not store.is_settled("box", make_spec().id)
    store.write(make_record(started=LATE))
    assert store.is_settled("box", make_spec().id)
    assert [stored.record.status for stored in store.latest()] == ["ok"]


def test_asking_for_one_run_reads_only_its_files(store: ResultStore, warnings: list[str]) -> None:
    ok = store.write(make_record())
    (ok.parent / "broken-0.5-000000000000.json").write_text("{")
    assert store.is_settled("box", make_spec().id)
    renamed = store.write(make_record(make_spec(model="renamed")))
    assert renamed.name == ok.name
    paths = {path.relative_to(store.folder).as_posix() for path in (ok, renamed)}
    assert store.paths_of_run("box", make_spec().id) == paths
    assert warnings == []
    store.all()
    assert len(warnings) == 1


# Files that are no records


def changed(change: Callable[[dict[str, Any]], object], again: bool = True) -> bytes:
    """A record with a change; with its checksum made again, so that only the change is wrong."""
    data = json.loads(make_record().to_json())
    change(data)
    if again:
        data["checksum"] = checksum(data)
    return json.dumps(data).encode()


GOOD = make_record().to_json().encode()
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "cut short": GOOD[: len(GOOD) // 2],
    "without its last bracket": GOOD[:-2],
    "changed": GOOD.replace(b'"value": 100.0', b'"value": 100.5'),
    "without a checksum": changed(lambda data: data.pop("checksum"), again=False),
    "zeros": bytes(len(GOOD)),
    "not UTF-8": GOOD.replace("naïve".encode(), b"na\xefve"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "another object": b'{"a": 1}',
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a text": b'"schema"',
    "deeply nested": b"[" * 200_000,
    "a deeply nested field": b'{"schema": 1, "x":' + b'{"a":' * 100_000,
    "a number of many digits": b'{"schema": ' + b"9" * 10_000 + b"}",
    "a newer schema": changed(lambda data: data.update(schema=6)),
    "a much newer schema": changed(lambda data: data.update(schema=10**12)),
    "a schema that is a text": changed(lambda data: data.update(schema="1")),
    "a schema that is null": changed(lambda data: data.update(schema=None)),
    "an older schema than the first": changed(lambda data: data.update(schema=0)),
    "NaN": GOOD.replace(b"100.0", b"NaN"),
    "half a character": changed(lambda data: data.update(reason="\ud800"), again=False),
    "another status": changed(lambda data: data.update(status="done")),
    "an unknown field": changed(lambda data: data.update(surprise=1)),
    "a missing field": changed(lambda data: data.pop("spec")),
    "the id of another run": changed(lambda data: data.update(id="0123456789ab")),
    "a spec of another run": changed(lambda data: data["spec"].update(seed=9)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_skipped_and_kept(store: ResultStore, warnings: list[str], content: bytes) -> None:
    good = make_record(make_spec("magnitude"))
    store.write(good)
    path = store.write(make_record())
    path.write_bytes(content)
    assert [stored.record for stored in store.all()] == [good]
    [warning] = warnings
    assert warning.startswith(f"skipped {path.relative_to(store.folder)}: ")
    assert warning.endswith(".")
    assert "\n" not in warning
    assert not store.is_settled("box", make_spec().id)
    again = store.write(make_record(started=LATE))
    assert again.name.endswith(".2.json")
    assert path.read_bytes() == content
    assert store.is_settled("box", make_spec().id)


@pytest.mark.parametrize("kind", ["directory", "link to nowhere", "link in a circle"])
def test_what_is_no_file_is_named_and_skipped(store: ResultStore, warnings: list[str], kind: str) -> None:
    path = store.write(make_record())
    path.unlink()
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path if kind == "link in a circle" else path.with_name("nowhere"))
    assert store.all() == []
    assert path.name in warnings[0]
    again = store.write(make_record())
    assert again.name.endswith(".2.json")
    assert [stored.path.endswith(".2.json") for stored in store.all()] == [True]


def test_a_file_that_is_too_large_is_not_read(store: ResultStore, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.write(make_record())
    with path.open("ab") as file:
        file.truncate(store_module.MAX_RECORD_BYTES + 1)  # a hole: takes no room on the disk
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("it was read"))
    assert store.all() == []
    assert warnings == [f"skipped {path.relative_to(store.folder)}: it is larger than 32 MiB."]


def test_the_reasons_say_what_is_wrong(store: ResultStore, warnings: list[str]) -> None:
    expected = {
        "cut short": "",
        "changed": "its checksum does not match, so it was cut short or changed",
        "another object": "it is no record of prunebench",
        "a newer schema": "its schema 6 is newer than 5; update prunebench to read it",
        "another status": "its field status does not fit",
        "an unknown field": "its field surprise does not fit",
        "the id of another run": "its id does not belong to its spec",
    }
    path = store.write(make_record())
    for name, reason in expected.items():
        path.write_bytes(BROKEN[name])
        warnings.clear()
        store.all()
        assert reason in warnings[0], name


def test_no_cut_and_no_flipped_bit_is_believed(store: ResultStore, warnings: list[str]) -> None:
    path = store.write(make_record())
    draw = random.Random(0)
    for _ in range(150):
        place = draw.randrange(len(GOOD))
        path.write_bytes(GOOD[:place])
        assert store.all() == [] or GOOD[place:].isspace()
        flipped = bytearray(GOOD)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        read = store.all()  # a flip in white space, or one that JSON does not see, changes nothing
        assert [stored.record for stored in read] in ([], [make_record()])
    assert len(warnings) > 200


# Names


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "..",
        "/etc/cron.d/evil",
        "a/b/c",
        "模型",
        "C:\\evil",
        "x" * 3000,
        ".journal",
        "published",
        "masks",
        "verdicts",
        "\n",
        "*",
    ],
)
def test_names_cannot_leave_the_folder(store: ResultStore, tmp_path: Path, name: str) -> None:
    record = make_record(make_spec(f"wanda[x={name}]", model=name), machine=f"m {name}")
    path = store.write(record)
    assert path.resolve().is_relative_to(store.folder.resolve())
    assert len(path.relative_to(store.folder).parts) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]
    assert [stored.record for stored in store.all()] == [record]
    assert store.is_settled(record.machine, record.id)
    claim = Journal(store.folder).claim(record.machine, record.id, "a run")
    assert claim is not None
    claim.release()
    assert [entry.name for entry in tmp_path.iterdir()] == ["results"]


# Folders that cannot be written


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A results folder that anyone can look into; not below pytest's own, which only its owner may enter."""
    top = Path(tempfile.mkdtemp(prefix="prunebench-public-"))
    top.chmod(0o755)
    (top / "results").mkdir()
    (top / "results").chmod(0o755)
    yield top / "results"
    shutil.rmtree(top)


@pytest.fixture
def read_only(public: Path) -> Iterator[Path]:
    """A results folder that cannot be written."""
    public.chmod(0o555)
    with as_nobody():
        yield public
    public.chmod(0o755)


def test_an_unreadable_file_is_named_and_skipped(public: Path, warnings: list[str]) -> None:
    store = ResultStore(public, warnings.append)
    kept = store.write(make_record())
    hidden = store.write(make_record())
    hidden.chmod(0)
    with as_nobody():
        assert [stored.path for stored in store.all()] == [kept.relative_to(public).as_posix()]
    [warning] = warnings
    assert hidden.name in warning
    assert "Permission denied" in warning


def test_a_read_only_folder(read_only: Path) -> None:
    store = ResultStore(read_only, pytest.fail)
    with pytest.raises(StoreError, match=re.escape(f"the results folder {read_only} cannot be written: Permission denied.")):
        store.check_writable()
    with pytest.raises(WriteError, match=rf"the record {make_record().id} cannot be written to .*: Permission denied\."):
        store.write(make_record())
    assert store.all() == []
    with pytest.raises(StoreError, match=re.escape(f"{read_only / 'board.md'} cannot be written: Permission denied.")):
        write_text(read_only / "board.md", "x")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("mine")
    store = ResultStore(tmp_path / "results", pytest.fail)
    with pytest.raises(StoreError, match="results"):
        store.check_writable()
    with pytest.raises(WriteError, match="results"):
        store.write(make_record())
    assert (tmp_path / "results").read_text() == "mine"


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["fsync", "link"])
def test_a_full_disk_leaves_no_half_file(store: ResultStore, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    kept = store.write(make_record(value=1.0))
    before = tree(store.folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, where, full_disk)
        with pytest.raises(WriteError, match="No space left on device"):
            store.write(make_record(value=2.0))
    assert tree(store.folder) == before
    assert kept.exists()
    store.write(make_record(value=3.0))
    assert len(store.all()) == 2


def test_a_disk_that_fills_while_writing_leaves_no_half_file(store: ResultStore, tmp_path: Path) -> None:
    store.write(make_record(value=1.0))
    before = tree(store.folder)
    board = tmp_path / "board.md"
    write_text(board, "old")
    with files_no_larger_than(1500):
        with pytest.raises(WriteError, match="File too large"):
            store.write(make_record(value=2.0))
        with pytest.raises(StoreError, match="File too large"):
            write_text(board, "new" * 5000)
    assert tree(store.folder) == before
    assert board.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.md", "results"]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "board.md"
    write_text(path, "first ±")
    write_text(path, "second")
    assert tree(tmp_path) == {"new": None, "new/board.md": b"second"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(StoreError, match=re.escape(f"{path} cannot be written: No space left on device.")):
            write_text(path, "third")
    assert tree(tmp_path) == {"new": None, "new/board.md": b"second"}


def test_a_record_is_on_the_disk_before_it_has_its_name(store: ResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fsync, link = os.fsync, os.link

    def watched(handle: int) -> None:
        seen.append("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "link", lambda *paths: (seen.append("name"), link(*paths)))
    store.write(make_record())
    assert seen == ["file", "name", "folder"]


# Several commands on one folder

PROGRAM = """
import sys
from pathlib import Path
from prunebench.results.records import RunRecord
from prunebench.results.store import ResultStore
import json

what, folder = sys.argv[1:3]
store = ResultStore(Path(folder), print)

def say(text):
    print(text, flush=True)

def wait():
    sys.stdin.readline()

if what == "write":
    data = json.loads(Path(sys.argv[3]).read_text())
    data.pop("checksum")
    record = RunRecord.model_validate(data)
    say("ready")
    wait()
    say(" ".join(store.write(record).name for _ in range(10)))
say("done")
"""


@pytest.fixture
def start(store: ResultStore) -> Iterator[Callable[..., Process]]:
    """Starts a process that says `ready` and goes on for each line it gets."""
    with programs() as begin:
        yield lambda what, *args: begin(PROGRAM, what, store.folder, *args)


def tell(*processes: Process) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def test_writers_of_one_stem_get_different_names(
    store: ResultStore, start: Callable[..., Process], tmp_path: Path, warnings: list[str]
) -> None:
    sources = []
    for index in range(3):
        source = tmp_path / f"{index}.json"
        source.write_text(make_record(value=float(index)).to_json())
        sources.append(start("write", str(source)))
    assert [heard(process) for process in sources] == ["ready"] * 3
    tell(*sources)
    names = [name for process in sources for name in heard(process).split()]
    stem = make_spec().file_stem
    assert sorted(names) == sorted(f"{stem}{'' if count == 1 else f'.{count}'}.json" for count in range(1, 31))
    values = [stored.record.scores["eval0"].value for stored in store.all()]
    assert sorted(values) == [0.0] * 10 + [1.0] * 10 + [2.0] * 10
    assert warnings == []

"""The work behind `prunebench verify`: open a bundle or a folder, examine what is in it, replay what can be replayed."""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prunebench.bench.at_hand import find_models
from prunebench.bench.declared import declared, options
from prunebench.bench.replay import ANSWERS, BLOCK, Replay
from prunebench.errors import RequestError
from prunebench.results.findings import Entry, Finding
from prunebench.results.inspection import Examination, examine, read_entries
from prunebench.results.store import ResultStore
from prunebench.results.unpacking import unpack
from prunebench.spec import Changes, Progress


@dataclass(frozen=True)
class Request:
    """What `verify` was asked."""

    path: Path
    """A bundle, or a folder of results."""
    results: Path
    """The folder of known records."""
    models: tuple[str, ...]
    data: tuple[Path, ...]
    replay: bool
    seed: int
    device: str


@contextmanager
def verified(
    request: Request, open_store: Callable[[Path], ResultStore], progress: Progress = lambda *_: None
) -> Iterator[Examination]:
    """Examine, and replay; what was unpacked is there while it is looked at.

    Raises:
        RequestError: there is no such bundle, folder or model, or the known records' place is no folder.
    """
    if os.path.lexists(request.results) and not request.results.is_dir():
        raise RequestError(f"{request.results} is no folder, so there are no known records to compare with.")
    replay = None
    if request.replay and request.models:
        replay = Replay(find_models(request.models), request.seed, request.device, request.data, progress)
    with _opened(request.path, open_store) as (entries, findings, looked):
        known = _known(request, open_store)
        found = examine(entries, known, progress)
        found.findings = [*findings, *found.findings, *_added(entries, known)]
        found.looked.update(looked)
        found.findings += [finding for entry in entries for finding in options(entry)]
        if not known and not _is_examined(request):
            found.alone = f"nothing is known in {request.results}; records were compared with each other only."
        if replay is not None:
            for number, entry in enumerate(entries):
                progress("replay", number, len(entries))
                _replayed(found, entry, replay)
        yield found


def _added(entries: Sequence[Entry], known: Sequence[Entry]) -> Iterator[Finding]:
    """Parameters beside the model's own, where no step declares to add any.

    A model may come with adapters, which count too: then its dense records have as many.
    """
    own = defaultdict[str, set[int]](set)
    for entry in (*known, *entries):
        if entry.record.spec.method == "dense":
            own[entry.record.spec.model.weights].add(entry.record.extra_parameters)
    for entry in entries:
        record = entry.record
        changes = declared(record.spec) if record.extra_parameters else None
        if changes is None or changes & (Changes.ADAPTER | Changes.HEAD):
            continue
        dense = own[record.spec.model.weights]
        if record.extra_parameters not in dense:
            said = f"is {record.extra_parameters}, and no step declares an adapter or an untied head"
            yield entry.finding("audit", "extra_parameters", said)
        elif record.spec.method == "dense":
            said = f"is {record.extra_parameters}, which only a model has that came with adapters"
            yield entry.finding("audit", "extra_parameters", said, "warning")


def _replayed(found: Examination, entry: Entry, replay: Replay) -> None:
    """Replay a record, and add what came of it."""
    result = replay(entry)
    entry.forget()
    found.findings += result.findings
    found.unseen.setdefault(entry.path, []).extend(result.left_out)
    found.looked[ANSWERS] += result.answered
    found.looked[BLOCK] += result.pruned and entry.record.spec.target != "dense"
    if result.whole:
        found.replayed[entry.path] = f"replayed {', '.join(result.done)}"


@contextmanager
def _opened(
    path: Path, open_store: Callable[[Path], ResultStore]
) -> Iterator[tuple[Sequence[Entry], list[Finding], Counter[str]]]:
    """The records of a bundle or a folder, what is wrong before any is looked at, and how much was looked at for that."""
    if path.is_dir():
        store, complaints = open_store(path), list[str]()
        quiet = ResultStore(path, complaints.append)
        entries = [Entry(stored, store) for stored in quiet.latest()]
        if not entries and not complaints:
            raise RequestError(f"the folder {path} holds no records.")
        findings = [Finding("schema", path.name, "content", f"is not all readable: {said}") for said in complaints]
        yield entries, findings, Counter({"schema": len(entries) + len(findings)})
        return
    if not path.is_file():
        raise RequestError(f"there is no bundle {path}; `prunebench submit --out {path}` makes one.")
    with tempfile.TemporaryDirectory(prefix="prunebench-bundle-") as aside:  # only its owner may look into it
        folder = Path(aside)
        findings = unpack(path, folder)
        if any(finding.check == "archive" for finding in findings):
            yield [], findings, Counter({"archive": 1})
            return
        entries, unreadable = read_entries(folder, ResultStore(folder, lambda _: None))
        files = sum(file.is_file() for file in folder.rglob("*"))
        looked = Counter({"archive": files, "manifest": files, "schema": len(entries) + len(unreadable)})
        yield entries, [*findings, *unreadable], looked


def _known(request: Request, open_store: Callable[[Path], ResultStore]) -> list[Entry]:
    """Records to compare with; none where the folder is the one that is examined."""
    if not request.results.is_dir() or _is_examined(request):
        return []
    store = open_store(request.results)
    return [Entry(stored, store) for stored in store.latest()]


def _is_examined(request: Request) -> bool:
    """Whether the folder of known records is the one that is examined."""
    return request.results.resolve() == request.path.resolve()

"""What a sweep shows: plain lines anywhere, and on a terminal a line for each run that is at work."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console
from support import Bench, make_record

from prunebench.bench import display as display_module
from prunebench.bench.display import LOG_LINES, MOST_LINES, SweepDisplay
from prunebench.bench.plan import Prediction, RunRequest
from prunebench.results.records import Failure, RunRecord


@pytest.fixture
def requests(bench: Bench, tmp_path: Path) -> list[RunRequest]:
    return bench.requests(tmp_path, "dense", "magnitude", "random", "wanda")


def shown_on(terminal: bool) -> tuple[SweepDisplay, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=150, highlight=False, color_system=None)
    return SweepDisplay(console), file


def ended(request: RunRequest, status: str = "ok", failure: Failure | None = None, **changes: str) -> RunRecord:
    return make_record(request.spec, machine="here", status=status, failure=failure, **changes)


def test_plain_lines_where_there_is_no_terminal(requests: list[RunRequest]) -> None:
    display, file = shown_on(terminal=False)
    display.started(requests, settled=2, jobs=2)
    for number, request in enumerate(requests[1:3], start=2):
        display.run_began(number, request, "process 1")
        display.progress(number, "step x", 0, 1)
        display.progress(number, "block", 1, 2)
    display.run_ended(2, ended(requests[1]), 10.0, b"", None)
    display.run_ended(3, ended(requests[2], "refused", reason="not this one."), 20.0, b"", None)
    display.run_taken(4, requests[3])
    display.close()
    assert file.getvalue().splitlines() == [
        "4 runs to do, 2 at a time; 2 found done.",
        "[  2/4] ok tiny magnitude 0.5: eval0 100.00  (10.0 s), about 15 s left",
        "[  3/4] refused tiny random 0.5, seed 0: not this one.  (20.0 s), about 15 s left",
        "[  4/4] tiny wanda 0.5, seed 0: running in another command",
    ]


def test_a_terminal_has_a_line_for_each_run_at_work(requests: list[RunRequest]) -> None:
    display, _ = shown_on(terminal=True)
    display.started(requests, settled=0, jobs=2)
    display.run_began(1, requests[0], "process 1")
    display.run_began(2, requests[1], "node7, process 2, GPU 1")
    display.run_began(2, requests[1], "node8, process 3, GPU 0")  # its worker died
    display.progress(2, "step magnitude[group=matrix]", 0, 1)
    display.progress(2, "block", 1, 6)
    assert display._live is not None
    assert len(display._live.tasks) == 3
    page = io.StringIO()
    Console(file=page, width=150).print(display._live.get_renderable())
    overall, first, second = page.getvalue().splitlines()
    assert "sweep" in overall
    assert "1 tiny dense" in first
    assert "on process" not in first
    assert "2 tiny magnitude 0.5 on node7, process 2, GPU 1" in second
    assert "step magnitude, block 2 of 6" in second
    display.run_ended(1, ended(requests[0]), 1.0, b"", None)
    assert len(display._live.tasks) == 2
    display.close()


def test_many_runs_do_not_fill_the_terminal(requests: list[RunRequest]) -> None:
    display, _ = shown_on(terminal=True)
    display.started(list(itertools.repeat(requests[0], 40)), settled=0, jobs=40)
    for number in range(1, 41):
        display.run_began(number, requests[0], "process 1")
        display.progress(number, "block", 1, 2)
    assert display._live is not None
    assert len(display._live.tasks) == 1 + MOST_LINES
    display.close()


def test_the_last_lines_of_a_failed_run_are_shown(requests: list[RunRequest], tmp_path: Path) -> None:
    failure = Failure(kind="error", type="ValueError", message="no", step="wanda")
    log = b"".join(b"line %d \x1b]0;evil\x07[bold]\n" % number for number in range(20))
    display, file = shown_on(terminal=False)
    display.started(requests[:1], settled=0, jobs=1)
    display.run_ended(1, ended(requests[0], "failed", failure, reason="no"), 1.0, log, tmp_path / "a-record.json")
    lines = file.getvalue().splitlines()[2:]
    assert [line.strip() for line in lines[:LOG_LINES]] == [
        f"line {n} \\x1b]0;evil\\x07[bold]" for n in range(20 - LOG_LINES, 20)
    ]
    assert lines[-1].strip() == "the rest is in a-record.log"


def test_predictions_tell_how_long_it_will_take(requests: list[RunRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    """Less what runs have been at work for; runs take twice what was expected."""
    clock = [0.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: clock[0])
    for request, seconds in zip(requests, (10.0, 100.0, 1000.0, 40.0), strict=True):
        object.__setattr__(request, "predicted", Prediction(seconds, 1))
    display, file = shown_on(terminal=False)
    display.started(requests, settled=0, jobs=1)
    display.run_began(2, requests[1], "process 1")
    clock[0] = 20.0
    display.run_ended(1, ended(requests[0]), 20.0, b"", None)
    assert file.getvalue().splitlines()[-1].endswith("(20.0 s), about 37 min left")  # 2 x (100 + 1000 + 40) - 20 s

"""Where a run happens: in this process, or in a fresh one, so that a crash, a kill or running out of memory is a record."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prunebench.bench.plan import RunRequest
from prunebench.children import ASKED_TO_END, GRACE_SECONDS, POLL_SECONDS, end_child, ended_by, last_lines, settle_in
from prunebench.errors import UnknownNameError
from prunebench.results.records import Failure, RunRecord
from prunebench.spec import Progress


class Executor(Protocol):
    """Does one run after another."""

    name: str

    def execute(self, request: RunRequest, progress: Progress) -> RunRecord:
        """Do one run; whatever happens to it becomes its record. Only KeyboardInterrupt gets through."""

    def close(self) -> None:
        """Let go of what is held between runs."""


class InlineExecutor:
    """Runs in this process: simple to debug, but a crash ends the sweep."""

    name = "inline"

    def execute(self, request: RunRequest, progress: Progress) -> RunRecord:
        """Do the run here."""
        from prunebench.bench.runner import run

        return run(request, progress, self.name)

    def close(self) -> None:
        """Nothing is held."""


class SubprocessExecutor:
    """Runs each in a fresh process, forked from a server that has the libraries loaded."""

    name = "subprocess"

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["prunebench.bench.preload"])

    def execute(self, request: RunRequest, progress: Progress) -> RunRecord:
        """Do the run in a child; a child that dies leaves a failed record with the last lines it wrote."""
        started = time.monotonic()
        kills = _out_of_memory_kills()
        with tempfile.TemporaryDirectory(prefix="prunebench-") as folder:
            log = Path(folder) / "log"
            log.touch(mode=0o600)
            ours, theirs = self._context.Pipe(duplex=False)
            child = self._context.Process(target=_work, args=(theirs, request, str(log)), daemon=True)
            child.start()
            theirs.close()
            try:
                answer = _listen(ours, child, progress, request.timeout, started)
            finally:
                ours.close()
                end_child(child, GRACE_SECONDS)
            if isinstance(answer, str):
                return RunRecord.model_validate_json(answer)
            failure = answer or _explain_death(child.exitcode, _out_of_memory_kills() > kills, log)
        return _failed(request, failure, self.name, started)

    def close(self) -> None:
        """The fork server ends with this process."""


EXECUTORS: dict[str, Callable[[], Executor]] = {"inline": InlineExecutor, "subprocess": SubprocessExecutor}


def make_executor(name: str) -> Executor:
    """An executor by name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in EXECUTORS:
        raise UnknownNameError.among("executor", name, EXECUTORS)
    return EXECUTORS[name]()


def _listen(
    pipe: multiprocessing.connection.Connection,
    child: multiprocessing.process.BaseProcess,
    progress: Progress,
    timeout: float | None,
    started: float,
) -> str | Failure | None:
    """Pass progress on until the child sends its record. None when it died without one."""
    while True:
        try:
            if pipe.poll(POLL_SECONDS):
                kind, content = pipe.recv()
                if kind == "record":
                    return str(content)
                progress(*content)
        except (EOFError, OSError):
            child.join(GRACE_SECONDS)
            return None
        if timeout is not None and time.monotonic() - started > timeout:
            message = f"the run took longer than its limit of {timeout:g} seconds."
            return Failure(kind="timeout", type="TimeoutError", message=message, step=None)


def _explain_death(exitcode: int | None, out_of_memory: bool, log: Path) -> Failure:
    wrote, name = last_lines(log), ended_by(exitcode)
    if name is None:
        message = f"the process ended with exit code {exitcode} and no record.{wrote}"
        return Failure(kind="killed", type="ProcessExit", message=message, step=None)
    if out_of_memory and name == "SIGKILL":
        message = f"the process was killed by the system, which was out of memory.{wrote}"
        return Failure(kind="oom", type=name, message=message, step=None)
    return Failure(kind="killed", type=name, message=f"the process was ended by {name}.{wrote}", step=None)


def _out_of_memory_kills() -> int:
    """How often the kernel killed for want of memory in this control group; 0 where it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/sys/fs/cgroup/memory.events").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _failed(request: RunRequest, failure: Failure, executor: str, started: float) -> RunRecord:
    from prunebench.bench.runner import Outcome, make_record

    message = failure.model_copy(update={"message": failure.message[:2000]})
    outcome = Outcome()
    outcome.clock -= time.monotonic() - started
    return make_record(request, outcome, executor, failure=message)


def _work(pipe: multiprocessing.connection.Connection, request: RunRequest, log: str) -> None:
    """The child: run, send progress now and then, send the record."""
    if not settle_in(Path(log)):
        return
    from prunebench.bench.runner import run

    try:
        record = run(request, _Throttled(pipe), "subprocess")
    except KeyboardInterrupt:
        sys.exit(ASKED_TO_END)
    pipe.send(("record", record.model_dump_json(by_alias=True)))
    pipe.close()
    sys.stdout.flush()


class _Throttled:
    """Sends progress through a pipe, at most ten times a second, but every new subject at once."""

    def __init__(self, pipe: multiprocessing.connection.Connection) -> None:
        self._pipe, self._what, self._last = pipe, "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._last > POLL_SECONDS:
            self._what, self._last = what, now
            self._pipe.send(("progress", (what, done, total)))

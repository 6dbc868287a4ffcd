"""Each run in a fresh process of this machine, so that a crash, a kill or running out of memory is a record.

Several at a time where asked: on CUDA one for each GPU, on a CPU as many as `--jobs` says. The threads of a run are the suite's
whatever the number of jobs, so its bits are the same; its costs are marked, because it shared the machine.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from prunebench.bench.executors import Listener, beyond_memory, beyond_time, failed_record
from prunebench.bench.plan import RunRequest
from prunebench.children import (
    ASKED_TO_END,
    GRACE_SECONDS,
    POLL_SECONDS,
    end_child,
    ended_by,
    last_lines,
    log_failures,
    settle_in,
)
from prunebench.errors import RequestError, StoreError
from prunebench.results.journal import Journal
from prunebench.results.records import Failure, RunRecord
from prunebench.toolkit.spread import devices_of

MOST_MESSAGES = 1000
"""Taken from one run before the others are looked at, so that a chattering one does not hold them up."""

MEMORY_SECONDS = 0.25
"""Between two looks at how much memory a run uses, which take a millisecond each."""

LOG_BYTES, LONGEST_LOG = 1 << 20, 64 << 20
"""Kept of what a run wrote, its end; and what it may write before the file is begun anew."""


class SubprocessExecutor:
    """Runs each in a process forked from a server that has the libraries loaded."""

    name = "subprocess"
    keeps_records = False

    def __init__(self, jobs: int, device: str, results: Path) -> None:
        """See `make_executor`.

        Raises:
            RequestError: there are fewer GPUs than jobs.
        """
        self._free = leases(device, jobs)
        self._journal = Journal(results)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["prunebench.bench.preload"])
        self._children: list[Child] = []

    def check(self, requests: Sequence[RunRequest]) -> None:
        """Leases were found when it was made; nothing else is asked for."""

    def room(self) -> int:
        """One run for each free lease."""
        return len(self._free)

    def start(self, requests: Sequence[RunRequest]) -> None:
        """Start a process for each.

        Raises:
            StoreError: its log cannot be written.
        """
        for request in requests:
            lease = self._free.pop(0)
            log = self._journal.scratch(request.machine, request.spec.id, "log")
            self._children.append(Child(self._context, request.on(lease), log))
        if len(self._children) > 1:
            for child in self._children:
                child.shared = True

    def wait(self, listener: Listener, seconds: float) -> None:
        """Pass on what the processes say, and end those that are beyond a limit."""
        if not self._children:
            return
        multiprocessing.connection.wait([child.pipe for child in self._children], min(seconds, POLL_SECONDS))
        for child in list(self._children):
            record = child.listen(listener)
            if record is not None:
                self._children.remove(child)
                self._free.append(child.request.on_text)
                log = child.read_log()
                child.remove_log()
                listener.ended(child.request.spec.id, record, log)

    def close(self) -> None:
        """End the runs that are still at work; the fork server ends with this process."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.end()
            child.remove_log()
        self._children = []


class Child:
    """A run in a process of its own."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, request: RunRequest, log: Path) -> None:
        self.request, self.log = request, log
        self.shared = False
        """Another run was at work at the same time."""
        self._kills, self._started, self._looked, self._began = _out_of_memory_kills(), time.monotonic(), 0.0, False
        try:
            log.unlink(missing_ok=True)
            log.touch(mode=0o600)
        except OSError as error:
            raise StoreError(f"the log of a run cannot be written to {log.parent}: {error.strerror}.") from None
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs, request, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def listen(self, listener: Listener) -> RunRecord | None:
        """Pass on what the run says; its record once it has ended, by itself or because it went beyond a limit."""
        run = self.request.spec.id
        if not self._began:
            self._began = True
            on = "" if self.request.device == "cpu" else f", {self.request.on_text}"
            listener.began(run, f"process {self.process.pid}{on}")
        try:
            for _ in range(MOST_MESSAGES):
                if not self.pipe.poll():
                    break
                kind, content = self.pipe.recv()
                if kind == "record":
                    self.end()
                    return self._marked(RunRecord.model_validate_json(content))
                listener.progress(run, *content)
        except (EOFError, OSError):
            self.process.join(GRACE_SECONDS)
            failure: Failure | None = _explain_death(self.process.exitcode, _out_of_memory_kills() > self._kills, self.log)
        else:
            failure = self._beyond_limits()
        if failure is None:
            return None
        self.end()
        return self._marked(failed_record(self.request, failure, SubprocessExecutor.name, self._started))

    def end(self) -> None:
        """Wait a moment for the process, then end it."""
        self.pipe.close()
        end_child(self.process, GRACE_SECONDS)

    def read_log(self) -> bytes:
        """The end of what the process wrote."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - LOG_BYTES))
                return file.read()
        except OSError:
            return b""

    def remove_log(self) -> None:
        """Its end is in the record's own; in a folder that became read-only it stays."""
        with suppress(OSError):
            self.log.unlink(missing_ok=True)

    def _beyond_limits(self) -> Failure | None:
        """Why the run has to be ended now, if it has."""
        timeout, now = self.request.timeout, time.monotonic()
        if timeout is not None and now - self._started > timeout:
            return beyond_time(timeout)
        if now - self._looked > MEMORY_SECONDS:
            self._looked = now
            self._shorten_log()
            limit = self.request.memory
            if limit is not None and self.process.pid is not None and used_bytes(self.process.pid) > limit:
                return beyond_memory(limit)
        return None

    def _shorten_log(self) -> None:
        with suppress(OSError):
            if self.log.stat().st_size > LONGEST_LOG:
                self.log.write_bytes(self.read_log())

    def _marked(self, record: RunRecord) -> RunRecord:
        return record.on_shared_machine() if self.shared else record


def leases(device: str, jobs: int) -> list[str]:
    """The device for each of several runs at a time; of several GPUs that were named, as many for each run, those first.

    `cuda+` shares out all GPUs.

    Raises:
        RequestError: there are fewer GPUs than jobs.
    """
    if jobs == 1 or device == "cpu":
        return [device] * jobs
    there = torch.cuda.device_count()
    named = [] if device in ("cuda", "cuda+") else [found.index or 0 for found in devices_of(device)]
    if len(named) == 1:
        raise RequestError(f"--jobs {jobs} needs as many GPUs, one for each run at work, and {device} is one GPU.")
    each = len(named) or (there // jobs if device == "cuda+" else 1)
    order = named + [index for index in range(there) if index not in named]
    if each * jobs > there or not each:
        needed = f"{each} for each run" if each > 1 else "one for each run"
        raise RequestError(f"--jobs {jobs} needs as many GPUs, {needed} at work, and this machine has {there}.")
    groups = [order[start : start + each] for start in range(0, each * jobs, each)]
    return [f"cuda:{'+'.join(map(str, group))}" for group in groups]


def used_bytes(process: int) -> int:
    """Resident memory of a process and of those that it started; 0 when it has gone."""
    try:
        family = [psutil.Process(process)]
        family += family[0].children(recursive=True)
    except psutil.Error:
        return 0
    total = 0
    for member in family:
        with suppress(psutil.Error):
            total += int(member.memory_info().rss)
    return total


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
        for group in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            _, controllers, path = group.split(":", 2)
            if controllers in ("", "memory"):  # version 2, or 1
                folder = Path("/sys/fs/cgroup", controllers, path.lstrip("/"))
                for name in ("memory.events", "memory.oom_control"):
                    with suppress(OSError):
                        counts = dict(line.split() for line in (folder / name).read_text(encoding="ascii").splitlines())
                        if "oom_kill" in counts:
                            return int(counts["oom_kill"])
    return 0


def _work(pipe: multiprocessing.connection.Connection, request: RunRequest, log: str) -> None:
    """The child: run, send progress now and then, send the record."""
    if not settle_in(Path(log)):
        return
    log_failures()
    if request.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(request.device))  # a method that says plain "cuda" means this one
    from prunebench.bench.runner import run

    try:
        record = run(request, Throttled(pipe.send), SubprocessExecutor.name)
    except KeyboardInterrupt:
        sys.exit(ASKED_TO_END)
    pipe.send(("record", record.model_dump_json(by_alias=True)))
    pipe.close()
    sys.stdout.flush()


class Throttled:
    """Sends progress on, at most ten times a second, but every new subject at once."""

    def __init__(self, send: Callable[[tuple[str, tuple[str, int, int]]], None]) -> None:
        self._send, self._what, self._last = send, "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._last > POLL_SECONDS:
            self._what, self._last = what, now
            self._send(("progress", (what, done, total)))

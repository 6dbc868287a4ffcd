"""Child processes that run a stranger's code: they may hang, exit or crash, and the parent says what happened."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import multiprocessing.process
import os
import signal
import sys
import threading
from pathlib import Path

PRELOAD = ("prunebench.bench.preload", "prunebench.testing")
"""What children that check a pruner have imported when they start."""

POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0
LOG_LINES = 12
ASKED_TO_END = 128 + signal.SIGTERM
"""The exit code of a child that was sent SIGTERM."""


def start_server(*modules: str) -> multiprocessing.context.ForkServerContext:
    """Start the process that children are forked from; it imports the modules while this one goes on.

    One server serves the whole process: a later call changes nothing of what it has imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    multiprocessing.forkserver.ensure_running()
    return context


def end_child(child: multiprocessing.process.BaseProcess, grace: float = GRACE_SECONDS) -> None:
    """Wait a moment for a child that is done, then ask it to end, then kill it."""
    child.join(0.5)
    for stop in (child.terminate, child.kill):
        if child.is_alive():
            stop()
            child.join(grace)


def ended_by(exitcode: int | None) -> str | None:
    """The name of the signal that ended a child, or None where it left by itself."""
    if exitcode == ASKED_TO_END:
        return signal.SIGTERM.name
    return signal.Signals(-exitcode).name if exitcode is not None and exitcode < 0 else None


def last_lines(log: Path) -> str:
    """What a child wrote last, as the end of a sentence; nothing where it was silent."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    except OSError:  # somebody has removed it
        return ""
    return f" Its last lines: {' | '.join(line.strip() for line in lines if line.strip())}" if lines else ""


def settle_in(log: Path) -> bool:
    """In the child: leave interruptions to the parent, end with it, and write into the log. False when the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGTERM, _leave)
    _die_with_parent()
    try:
        with log.open("a", encoding="utf-8", buffering=1) as file:  # so that the parent may shorten it
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    except FileNotFoundError:
        return False  # the command was interrupted while this process started
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what is printed outlives a crash
    return True


def log_failures() -> None:
    """In the child: what a failed run raised, with its traceback, is for the log; the record has the message."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("prunebench").setLevel(logging.INFO)


def forget_lines() -> None:
    """In the child: what was written so far is no part of what comes next."""
    sys.stdout.flush()
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)


def _leave(*_: object) -> None:
    """End in good order, or the semaphores of progress bars are reported as leaked; only this exception gets through runs."""
    raise KeyboardInterrupt


def _die_with_parent() -> None:
    """End when the command that started this process is gone: nobody would take what it finds."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

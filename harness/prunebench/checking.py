"""`prunebench check`: the laws of the conformance kit, each with a time limit, in a child process that may die of them.

A pruner that hangs, calls `sys.exit` or ends its process fails the law that was being checked; the others go on in a fresh
child.
"""

from __future__ import annotations

import multiprocessing.connection
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from prunebench.children import (
    GRACE_SECONDS,
    POLL_SECONDS,
    PRELOAD,
    end_child,
    ended_by,
    forget_lines,
    last_lines,
    settle_in,
    start_server,
)
from prunebench.errors import described
from prunebench.plugins import find_pruner
from prunebench.testing import CheckResult, cases, check_pruner
from prunebench.testing.running import Outcome

LOADING_SECONDS = 120.0
"""For importing torch and the plugin, before the first law."""

MOST_TIMEOUTS = 3
"""Laws that ran out of time; after so many the pruner is taken to hang always, and nobody waits for the rest."""

Case = tuple[str, str]
"""A law and a family of tiny models."""


@dataclass(frozen=True)
class Checked:
    """What one law said on one family."""

    check: str
    family: str
    outcome: Outcome
    """`declined`: it was not asked, for the reason in the message."""
    message: str
    seconds: float


@dataclass
class Report:
    """What all laws said of a pruner."""

    pruner: str
    """As a step is written."""
    distribution: str
    version: str
    revision: int
    results: list[Checked] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[Outcome, int]:
        """How many passed, failed, were excused and were not asked."""
        found = Counter(result.outcome for result in self.results)
        return {outcome: found[outcome] for outcome in ("passed", "failed", "excused", "declined")}


def check(
    text: str,
    families: Sequence[str] | None,
    checks: Sequence[str] | None,
    timeout: float,
    started: Callable[[str, str, int, int], None],
) -> Report:
    """Put a pruner to the laws.

    Args:
        text: `name[opt=value]`, or `module:Class[opt=value]` of a class that nobody registered.
        families: only these, of `prunebench.testing.FAMILIES`.
        checks: only these, of `prunebench.testing.CHECKS`.
        timeout: seconds that a law may take on one family.
        started: told the law, the family, and how many of how many are done.

    Raises:
        RequestError: there is no such pruner, option, law or family, or the module cannot be imported.
        PluginError: the class is no pruner, or its excuses are none.
    """
    found = find_pruner(text)
    check_pruner(found.make, families=(), checks=())  # are the excuses for laws that there are?
    wanted = cases(families, checks)
    report = Report(found.label, found.distribution, found.version, found.make().revision)
    clock, watch = time.monotonic(), _Watch(text, timeout, started, len(wanted))
    while len(report.results) < len(wanted):
        left = wanted[len(report.results) :]
        if watch.timeouts >= MOST_TIMEOUTS:
            reason = f"{watch.timeouts} laws before it ran into the limit of {timeout:g} seconds."
            report.results += [Checked(*case, "declined", reason, 0.0) for case in left]
        else:
            report.results += watch.child(left)
    report.seconds = time.monotonic() - clock
    return report


class _Watch:
    """Starts children, waits for what they say, and puts their deaths into words."""

    def __init__(self, text: str, timeout: float, started: Callable[[str, str, int, int], None], total: int) -> None:
        self._text, self._timeout, self._started, self._total = text, timeout, started, total
        self._context = start_server(*PRELOAD)
        self.timeouts = 0

    def child(self, left: Sequence[Case]) -> list[Checked]:
        """What one child says of the first cases: of all, or up to the one that it does not outlive."""
        found: list[Checked] = []
        with tempfile.TemporaryDirectory(prefix="prunebench-") as folder:
            log = Path(folder) / "log"
            log.touch(mode=0o600)
            ours, theirs = self._context.Pipe(duplex=False)
            child = self._context.Process(target=_work, args=(theirs, self._text, list(left), str(log)), daemon=True)
            child.start()
            theirs.close()
            try:
                begun = self._listen(ours, child, left, found)
            finally:
                ours.close()
                end_child(child)
            if len(found) < len(left) and begun is not None:
                found.append(self._death(left[len(found)], child, begun, log))
        return found

    def _listen(
        self, pipe: multiprocessing.connection.Connection, child: BaseProcess, left: Sequence[Case], found: list[Checked]
    ) -> float | None:
        """Take answers until the child ends or one is overdue.

        Returns:
            When the case that it left unanswered was begun; None where it answered the last one that it took.
        """
        since, limit, answered = time.monotonic(), LOADING_SECONDS, False
        while len(found) < len(left):
            try:
                if pipe.poll(POLL_SECONDS):
                    result, now = pipe.recv(), time.monotonic()
                    if result is None:  # the next law begins
                        self._started(*left[len(found)], self._total - len(left) + len(found), self._total)
                        limit, answered = self._timeout, False
                    else:
                        found.append(Checked(result.check, result.family, result.outcome, result.message, now - since))
                        limit, answered = GRACE_SECONDS, True
                    since = now
            except (EOFError, OSError):
                child.join(GRACE_SECONDS)
                return None if answered else since
            if time.monotonic() - since > limit:
                return None if answered else since
        return None

    def _death(self, case: Case, child: BaseProcess, begun: float, log: Path) -> Checked:
        taken, name = time.monotonic() - begun, ended_by(child.exitcode)
        if taken > self._timeout:
            self.timeouts += 1
            reason = f"it took longer than the limit of {self._timeout:g} seconds."
        elif name:
            reason = f"the process was ended by {name}.{last_lines(log)}"
        else:
            reason = f"the process ended with exit code {child.exitcode} in the middle of the law.{last_lines(log)}"
        return Checked(*case, "failed", reason, taken)


def _work(pipe: multiprocessing.connection.Connection, text: str, left: Sequence[Case], log: str) -> None:
    """The child: check one case after the other; `None` goes before each, its result after it."""
    if not settle_in(Path(log)):
        return
    make = find_pruner(text).make
    for check_name, family in left:
        forget_lines()
        pipe.send(None)
        try:
            [result] = check_pruner(make, families=[family], checks=[check_name])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a stranger's method may raise anything; it breaks the law
            reason = f"it raised {described(error)}, which ends the program."
            pipe.send(CheckResult(check_name, text, family, "failed", reason))
            return
        pipe.send(result)

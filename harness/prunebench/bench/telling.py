"""Plugins hear of every record that a sweep keeps: loggers, notifications, dashboards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from prunebench.bench.sweep import Watcher
from prunebench.errors import described
from prunebench.plugins import Listener
from prunebench.results.records import RunRecord


class Telling:
    """A sweep's watcher that tells plugins of each record after another watcher has shown it.

    Args:
        watcher: shows the sweep.
        listeners: plugins that want to hear; see `Registry.listeners`.
        warn: is told of a plugin that failed, once; it hears no more.
    """

    def __init__(self, watcher: Watcher, listeners: Sequence[Listener], warn: Callable[[str], None]) -> None:
        self.run_began, self.progress = watcher.run_began, watcher.progress
        self.run_taken, self.run_done_elsewhere = watcher.run_taken, watcher.run_done_elsewhere
        self._show, self._listeners, self._warn = watcher.run_ended, list(listeners), warn

    def run_ended(self, number: int, record: RunRecord, seconds: float, log: bytes, path: Path | None) -> None:
        """See `Watcher`; the record is kept by now."""
        self._show(number, record, seconds, log, path)
        for listener in list(self._listeners):
            try:
                with redirect_stdout(sys.stderr):  # what it prints would stand in the midst of the display
                    listener.hear(record=record.model_dump(mode="json", by_alias=True))
            except Exception as error:  # noqa: BLE001 - a stranger's logger may raise anything; the sweep goes on
                self._listeners.remove(listener)
                self._warn(f"the plugin {listener.plugin} hears of no more records: {described(error)}.")

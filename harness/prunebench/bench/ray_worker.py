"""The side of Ray's workers: a run's task, which tells of itself in letters, and the mailbox that keeps them.

Nothing heavy is imported with this module, because the mailbox's process imports it too.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

from prunebench.children import log_failures

if TYPE_CHECKING:
    from prunebench.bench.plan import RunRequest

EXECUTOR = "ray"
"""As records name it."""

MEMORY_SECONDS = 0.25
"""Between two looks at a run's memory."""

Letter = tuple[str, str, tuple[Any, ...]]
"""A run's id, what is told of it, and its content."""


class Mailbox:
    """Where runs leave word of how they are getting on; an actor of Ray."""

    def __init__(self) -> None:
        self._letters: list[Letter] = []

    def put(self, letter: Letter) -> None:
        """Leave a letter."""
        self._letters.append(letter)

    def take(self) -> list[Letter]:
        """All letters since the last call."""
        letters, self._letters = self._letters, []
        return letters


def work(request: RunRequest, mailbox: Any) -> tuple[str, bytes]:
    """The task: do the run in this worker; its record as JSON, and the end of what the worker wrote."""
    import ray

    log = own_log()
    from prunebench.bench.runner import run
    from prunebench.bench.subprocesses import Throttled

    def tell(letter: tuple[str, tuple[Any, ...]]) -> None:
        mailbox.put.remote((request.spec.id, *letter))

    gpus = "".join(f", GPU {index}" for index in ray.get_gpu_ids())
    node, process = ray.get_runtime_context().get_node_id(), os.getpid()
    tell(("began", (node, process, f"{socket.gethostname()}, process {process}{gpus}")))
    if request.memory is not None:
        threading.Thread(target=watch_memory, args=(request.memory, tell), daemon=True).start()
    record = run(request, Throttled(tell), EXECUTOR)
    return record.model_dump_json(by_alias=True), end_of(log)


def own_log() -> IO[bytes]:
    """From here on what this worker writes goes to a file of its own, which ends with it; no other task comes after."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - see above
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(file.fileno(), descriptor)
    log_failures()
    return file


def end_of(log: IO[bytes]) -> bytes:
    """As much of it as is kept."""
    from prunebench.bench.subprocesses import LOG_BYTES

    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), LOG_BYTES, max(0, size - LOG_BYTES))


def watch_memory(limit: float, tell: Callable[[tuple[str, tuple[Any, ...]]], None]) -> None:
    """Tell the command once this process uses more than so many bytes."""
    from prunebench.bench.subprocesses import used_bytes

    while used_bytes(os.getpid()) <= limit:
        time.sleep(MEMORY_SECONDS)
    tell(("beyond", (limit,)))

"""Runs as array jobs of Slurm, by submitit: one array for each set of resources, one task of it for each run.

A task goes the way of a local sweep of one run: it claims the run in the journal, leaves what is settled, starts the run in a
process of its own with its limits, and writes the record into the results folder, which all nodes share. So nothing is lost
when the command that submitted dies; while it lives it looks for records and asks Slurm about jobs that left none. A job that
is preempted is queued anew and begins its run again, from the last checkpoint where there are any.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prunebench.bench.executors import Listener, failed_record
from prunebench.bench.plan import RunRequest
from prunebench.bench.slurm_job import EXECUTOR, OneRun
from prunebench.bench.specs import run_label
from prunebench.children import last_lines
from prunebench.errors import RequestError, first_line
from prunebench.results.journal import Journal
from prunebench.results.records import Failure, FailureKind, RunRecord
from prunebench.results.store import ResultStore

MOST_TASKS = 1000
"""Of one array: Slurm's own limit (`MaxArraySize`) is 1001 where nobody changed it."""

SPARE_MINUTES, SPARE_BYTES = 10.0, 2 << 30
"""Beside what a run may take itself: to start, to write the record; for the process that watches it."""

LOOK_SECONDS = 5.0
"""Between two looks at the results folder, which may be on a busy disk."""

PATIENCE_SECONDS, PREEMPTED_SECONDS = 60.0, 600.0
"""How long a job that ended may be without a record: other machines' files show late; a preempted job may be queued anew."""

KINDS: dict[str, FailureKind] = {"TIMEOUT": "timeout", "DEADLINE": "timeout", "OUT_OF_MEMORY": "oom"}
"""States of Slurm that are a kind of failure; all others are `killed`."""

FLAGS = ("licenses", "reservation")
"""Options of `sbatch` that submitit has no name for."""

QUEUED_ANEW = 10
"""How often submitit queues a job anew that it takes for one at the end of its time (see `OneRun`); others without end."""


@dataclass
class Submitted:
    """A run and its job."""

    request: RunRequest
    job: Any
    before: frozenset[str]
    """Files of the run that were there already."""
    page: datetime | None = None
    """When the run that is at work began, as its page says; a preempted one begins again."""
    began: float | None = None
    """The same by the clock of this command."""
    ended: float | None = None
    """When its job was first found to have ended."""


class SlurmExecutor:
    """Submits runs, and tells what becomes of them."""

    name = EXECUTOR
    keeps_records = True

    def __init__(self, jobs: int | None, results: Path, again: bool = False, cluster: str = "slurm") -> None:
        """Nothing is submitted yet.

        Args:
            jobs: runs of one array that may be at work at a time; None for as many as Slurm finds places for.
            results: the results folder, shared by all nodes.
            again: do runs also that are settled.
            cluster: `slurm`, or `local` for jobs of this machine, as submitit names them.

        Raises:
            RequestError: submitit is not installed.
        """
        if not is_installed():
            raise RequestError("--executor slurm needs submitit, which is not installed: pip install 'prunebench[slurm]'.")
        self._jobs, self._results, self._again, self._cluster = jobs or MOST_TASKS, results.resolve(), again, cluster
        self._store, self._journal = ResultStore(self._results, lambda _: None), Journal(self._results)
        self._folder = self._journal.folder / "slurm"
        self._waiting: list[RunRequest] = []
        self._submitted: dict[str, Submitted] = {}
        self._looked = 0.0

    def room(self) -> int:
        """As many as may be at work; more wait with Slurm."""
        return self._jobs

    def check(self, requests: Sequence[RunRequest]) -> None:
        """Whether Slurm could be asked for what all runs need.

        Raises:
            RequestError: nobody said how long a run may take.
        """
        for request in requests:
            parameters(request)

    def start(self, requests: Sequence[RunRequest]) -> None:
        """Keep the runs until `wait`, so that those that are handed over one by one come into one array."""
        self._waiting += [on_a_node(request) for request in requests]

    def batch_scripts(self, requests: Sequence[RunRequest]) -> list[str]:
        """What `sbatch` would be given, one script for each array.

        Raises:
            RequestError: nobody said how long a run may take.
        """
        from submitit.slurm import slurm

        # The text is submitit's own, `_make_sbatch_string`, with the words that `SlurmExecutor` has for the parameters; its
        # methods would do, but the class cannot be made where there is no Slurm, and a dry run should be possible there.
        words, scripts = slurm.SlurmExecutor._equivalence_dict(), []
        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(self._folder))}"
        for chosen, group in self._arrays([on_a_node(request) for request in requests]):
            options = {words.get(name, name.removeprefix("slurm_")): value for name, value in chosen.items()}
            if "mem" in options:
                options["mem"] = slurm._convert_mem(options["mem"])
            several = {"map_count": len(group)} if len(group) > 1 else {}
            scripts.append(slurm._make_sbatch_string(command=command, folder=self._folder, **options, **several))
        return scripts

    def wait(self, listener: Listener, seconds: float) -> None:
        """Submit what waits; look for what jobs have done.

        Raises:
            RequestError: Slurm takes no jobs; nothing was submitted.
        """
        if self._waiting:
            self._submit(listener)
        rest = self._looked + LOOK_SECONDS - time.monotonic()
        if rest > 0:
            time.sleep(min(seconds, rest))
            return
        self._looked = time.monotonic()
        self._read_journal(listener)
        for run, submitted in list(self._submitted.items()):
            if submitted.job.done() or _state(submitted.job) == "PREEMPTED":
                record = self._outcome(submitted)
                if record is not None:
                    del self._submitted[run]
                    self._clear(submitted, printed=record.status != "failed")
                    listener.ended(run, record)
            else:
                submitted.ended = None

    def close(self) -> None:
        """Cancel the jobs that have not ended."""
        for submitted in self._submitted.values():
            ended = submitted.job.done()
            if not ended:
                submitted.job.cancel(check=False)
            self._clear(submitted, printed=not ended)
        self._submitted, self._waiting = {}, []

    def _submit(self, listener: Listener) -> None:
        import submitit

        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)  # jobs load what lies there
        arrays, self._waiting = self._arrays(self._waiting), []
        for options, group in arrays:
            known = [self._store.paths_of_run(request.machine, request.spec.id) for request in group]
            try:
                executor = submitit.AutoExecutor(self._folder, cluster=self._cluster, slurm_max_num_timeout=QUEUED_ANEW)
                executor.update_parameters(**options)
                with executor.batch():
                    minutes = options["timeout_min"]
                    jobs = [executor.submit(OneRun(request, self._results, self._again, minutes)) for request in group]
            except (RuntimeError, OSError, ValueError) as error:
                if not self._submitted:
                    raise RequestError(f"Slurm takes no jobs here: {first_line(error).rstrip('.')}.") from None
                self._turn_down(group, error, listener)
                continue
            for request, job, before in zip(group, jobs, known, strict=True):
                self._submitted[request.spec.id] = Submitted(request, job, before)

    def _turn_down(self, requests: Sequence[RunRequest], error: Exception, listener: Listener) -> None:
        """Runs of an array that Slurm did not take, after it took others."""
        message = f"Slurm did not take the job: {first_line(error).rstrip('.')}."
        failure = Failure(kind="error", type=type(error).__name__, message=message, step=None)
        for request in requests:
            record = failed_record(request, failure, self.name, time.monotonic())
            self._store.write(record)
            listener.ended(request.spec.id, record)

    def _arrays(self, requests: Sequence[RunRequest]) -> list[tuple[dict[str, Any], list[RunRequest]]]:
        """Runs of equal resources together, with submitit's parameters for them."""
        groups: list[tuple[dict[str, Any], list[RunRequest]]] = []
        for request in requests:
            options = {**parameters(request), "slurm_array_parallelism": self._jobs}
            for known, group in groups:
                if known == options and len(group) < MOST_TASKS:
                    group.append(request)
                    break
            else:
                groups.append((options, [request]))
        return groups

    def _read_journal(self, listener: Listener) -> None:
        """Tell how far the runs are that are at work."""
        for entry in self._journal.runs():
            page, submitted = entry.page, self._submitted.get(entry.page.id)
            if submitted is None or not entry.alive or not page.where or page.machine != submitted.request.machine:
                continue
            if page.started != submitted.page:
                submitted.page, submitted.began = page.started, time.monotonic()
                listener.began(page.id, f"job {submitted.job.job_id}, {page.where}")
            listener.progress(page.id, page.doing, 0, 1)
            if page.total:
                listener.progress(page.id, page.what, page.done, page.total)

    def _outcome(self, submitted: Submitted) -> RunRecord | None:
        """The record of a run whose job has ended; None while there may still come one."""
        record = self._written(submitted)
        if record is not None:
            return record
        state, now = _state(submitted.job), time.monotonic()
        submitted.ended = submitted.ended or now
        if now - submitted.ended < (PREEMPTED_SECONDS if state == "PREEMPTED" else PATIENCE_SECONDS):
            return None
        request = submitted.request
        claim = self._journal.claim(request.machine, request.spec.id, run_label(request.spec))
        if claim is None:
            submitted.ended = None
            return None  # somebody else has the run, so the job left it
        try:
            return self._written(submitted) or self._explain(submitted, state)
        finally:
            claim.release()

    def _written(self, submitted: Submitted) -> RunRecord | None:
        """The record that a run came to, whoever wrote it."""
        stored = self._store.of_run(submitted.request.machine, submitted.request.spec.id)
        new = [found.record for found in stored if found.path not in submitted.before]
        settled = [found.record for found in stored if found.record.status != "failed" and not self._again]
        return next(reversed(new or settled), None)

    def _explain(self, submitted: Submitted, state: str) -> RunRecord:
        """Write the record of a run whose job left none. One that was never seen at work took no time."""
        paths = submitted.job.paths
        wrote = last_lines(paths.stderr) if paths.stderr.exists() else ""
        where = paths.stdout.relative_to(self._results)
        message = f"the job {submitted.job.job_id} ended as {state} and left no record; what it printed is in {where}.{wrote}"
        failure = Failure(kind=KINDS.get(state, "killed"), type=state, message=message, step=None)
        record = failed_record(submitted.request, failure, self.name, submitted.began or time.monotonic())
        self._store.write(record)
        return record

    def _clear(self, submitted: Submitted, printed: bool) -> None:
        """Take away what submitit needed, a few MiB a run with its tokens, and what the job printed."""
        paths = submitted.job.paths
        for path in (paths.submitted_pickle, paths.result_pickle, *([paths.stdout, paths.stderr] if printed else ())):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def is_installed() -> bool:
    """Whether the extra `slurm` is there, without importing it."""
    return importlib.util.find_spec("submitit") is not None


def on_a_node(request: RunRequest) -> RunRequest:
    """The run as its node sees it: Slurm says which GPU by CUDA_VISIBLE_DEVICES."""
    return request.on_any() if request.device.startswith("cuda") else request


def parameters(request: RunRequest) -> dict[str, Any]:
    """What submitit is told of a run's resources, in its words.

    Raises:
        RequestError: nobody said how long a run may take.
    """
    given = request.resources
    if given.minutes is None and request.timeout is None:
        raise RequestError(
            "Slurm needs to know how long a run may take: give --timeout, or minutes in the suite's [resources]."
        )
    minutes = given.minutes or (request.timeout or 0) / 60 + SPARE_MINUTES
    memory = given.memory or (request.memory + SPARE_BYTES if request.memory else None)
    options: dict[str, Any] = {
        "name": "prunebench",
        "timeout_min": math.ceil(minutes),
        "nodes": 1,
        "tasks_per_node": 1,
        "cpus_per_task": given.cpus,
        **({"gpus_per_node": given.gpus} if given.gpus else {}),
        **({"mem_gb": memory / (1 << 30)} if memory else {}),
    }
    options |= {f"slurm_{name}": value for name, value in given.slurm if name not in FLAGS}
    flags = {name: value for name, value in given.slurm if name in FLAGS}
    return {**options, **({"slurm_additional_parameters": flags} if flags else {})}


def _state(job: Any) -> str:
    """In one word: `CANCELLED by 1000` and `CANCELLED+` are CANCELLED."""
    return (str(job.state).split() or ["UNKNOWN"])[0].rstrip("+").upper()

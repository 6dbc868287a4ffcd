"""What a sweep saves by sharing: the standard matrix of eight methods and three targets, against the same runs one by one.

    python benchmarks/speed/sharing.py [--model quickstart/wiki7m] [--threads 2] [--windows 50] [--only TEXT] [--json FILE]

Together: all runs with one cache that is empty at the start. Apart: each run with an empty cache of its own. Both are planned
and run in this process, one after the other, so that neither pays for starting processes; what that takes is measured once and
told beside it, as a sweep's server pays it once and 24 commands pay it 24 times. Libraries and files are warm on both sides.
Shared are token arrays, GBLM's gradients and the dense model's last hidden states. Every score of both sides is compared, bit
for bit. Costs in records are stand-alone on both sides: what is saved here is the machine's time, and no method's rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from prunebench.bench import runner
from prunebench.bench.machine import machine_slug
from prunebench.bench.plan import Planner, RunRequest
from prunebench.bench.suite import load_suite
from prunebench.plugins import load_registry
from prunebench.results.records import RunRecord
from prunebench.shipped import suites_folder

CACHE = "PRUNEBENCH_CACHE"

METHODS = (
    "random",
    "magnitude",
    "wanda",
    "sparsegpt",
    "gblm",
    "wanda++[ro=false]",
    "wanda++[learning_rate=3e-4]",
    "wanda + perp[steps=40,batch=4,learning_rate=3e-3]",
)
TARGETS = ("0.5", "2:4", "4:8")


@dataclass(frozen=True)
class Matrix:
    """The runs: every method at every target, on one model."""

    model: str = "quickstart/wiki7m"
    methods: tuple[str, ...] = METHODS
    targets: tuple[str, ...] = TARGETS
    texts: Path = suites_folder() / "quickstart" / "texts"
    samples: int = 32
    length: int = 256
    windows: int = 50
    threads: int = 0

    def suite(self) -> str:
        """As TOML."""
        text = f"data={self.texts}/evaluation.txt,window={self.length},windows={self.windows}"
        return "\n".join(
            [
                f'[suite]\nname = "sharing"\n[[model]]\npath = "{self.model}"\ndtype = "float32"',
                f'[calibration]\nsource = "{self.texts}/calibration.txt"\nsamples = {self.samples}\nlength = {self.length}',
                f'[training]\nsource = "{self.texts}/training.txt"\ntokens = {40 * 4 * self.length}',
                *(f"[[method]]\nsteps = {json.dumps(method.split(' + '))}" for method in self.methods),
                f'[[eval]]\nuse = "perplexity[{text}]"\n[[eval]]\nuse = "divergence[{text}]"',
                f"[grid]\ntargets = {json.dumps(self.targets)}\nseeds = [0]",
                "[limits]\nbatch_size = 8" + (f"\nthreads = {self.threads}" if self.threads else ""),
            ]
        )


@dataclass
class Side:
    """Runs that were done, together or apart."""

    wall: float = 0.0
    """Seconds of planning and running."""
    processor: float = 0.0
    """Seconds of all cores, which others at work on the machine disturb less."""
    records: list[RunRecord] = field(default_factory=list)

    def pruning(self) -> float:
        """Seconds of pruning as the records tell them: those of what was reused are in them."""
        return sum(step.seconds for record in self.records for step in record.steps)

    def reused(self) -> Counter[str]:
        """What was taken from other runs, how often."""
        found: Counter[str] = Counter()
        for record in self.records:
            for step in record.steps:
                found.update(f"{step.pruner}: {name}" for name in step.reused)
                found.update(f"{key}'s last hidden states" for key in step.notes if key.endswith(": the dense model"))
        return found


def together(suite: Path, only: str) -> Side:
    """All runs, with one cache."""
    side = Side()
    with _empty_cache(), _clocked(side):
        side.records += [_ran(request) for request in _planned(suite, only)]
    return side


def apart(suite: Path, only: str) -> Side:
    """Each run planned and done with a cache of its own, as if it were the only one."""
    with _empty_cache():
        ids = [request.spec.id for request in _planned(suite, only)]
    side = Side()
    for wanted in ids:
        with _empty_cache(), _clocked(side):
            [request] = [request for request in _planned(suite, only) if request.spec.id == wanted]
            side.records.append(_ran(request))
    return side


def differing(one: Side, other: Side) -> list[str]:
    """Runs and scores that are not bit for bit the same."""
    found = []
    for mine, theirs in zip(one.records, other.records, strict=True):
        answers = [{name: (score.value, score.items) for name, score in record.scores.items()} for record in (mine, theirs)]
        wrong = [name for name in mine.scores if answers[0][name] != answers[1].get(name)]
        found += [f"{mine.spec.method} {mine.spec.target}: {name}" for name in wrong]
    return found


def start_seconds() -> float:
    """Seconds until a fresh process has imported what a run needs."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import prunebench.bench.runner"], check=True)
    return time.perf_counter() - started


def table(both: tuple[Side, Side], start: float | None) -> str:
    """What is printed."""
    one, other = both
    count = len(one.records)
    lines = [f"{count} runs{'':12} {'together':>10} {'apart':>10} {'ratio':>7}"]
    rows = [("wall", one.wall, other.wall), ("processor", one.processor, other.processor)]
    rows += [("pruning, in records", one.pruning(), other.pruning())]
    if start is not None:
        rows.append((f"wall and {start:.1f} s a start", one.wall + start, other.wall + count * start))
    lines += [f"{name:20} {mine:9.1f}s {theirs:9.1f}s {theirs / mine:6.2f}x" for name, mine, theirs in rows]
    lines += [f"reused {times}x: {name}" for name, times in sorted(one.reused().items())] or ["nothing was reused"]
    wrong = differing(one, other)
    lines.append(f"{len(wrong)} scores differ: {', '.join(wrong[:3])}" if wrong else "all scores are the same, bit for bit")
    return "\n".join(lines)


def _planned(suite: Path, only: str) -> list[RunRequest]:
    requests = Planner(load_suite(str(suite)), load_registry(), machine_slug(), "benchmarks/speed/sharing.py", "cpu").requests()
    return [request for request in requests if only in f"{request.spec.method} {request.spec.target}"]


def _ran(request: RunRequest) -> RunRecord:
    record = runner.run(request, lambda *_: None, "inline")
    if record.status == "failed":  # a refusal is an answer
        raise SystemExit(f"{request.spec.method} {request.spec.target}: {record.reason}")
    print(f"{request.spec.method} {request.spec.target}", file=sys.stderr, flush=True)
    return record


@contextmanager
def _empty_cache() -> Iterator[None]:
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            os.environ.pop(CACHE)
            if before is not None:
                os.environ[CACHE] = before


@contextmanager
def _clocked(side: Side) -> Iterator[None]:
    wall, processor = time.perf_counter(), time.process_time()
    yield
    side.wall += time.perf_counter() - wall
    side.processor += time.process_time() - processor


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Times a sweep that shares against its runs one by one.")
    parser.add_argument("--model", default=Matrix.model, help="as in a suite")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--windows", type=int, default=Matrix.windows, help="of each evaluation")
    parser.add_argument("--only", default="", help="runs whose method and target hold this text")
    parser.add_argument("--json", type=Path, help="a file for the sums")
    asked = parser.parse_args(arguments)
    matrix = Matrix(model=asked.model, threads=asked.threads, windows=asked.windows)
    start = start_seconds()
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "sharing.toml"
        suite.write_text(matrix.suite(), encoding="utf-8")
        both = together(suite, asked.only), apart(suite, asked.only)
    print(f"{machine_slug()}, {matrix.model}, load {os.getloadavg()[0]:.1f}\n{table(both, start)}")
    if asked.json:
        sides = [asdict(replace(side, records=[])) | {"pruning": side.pruning(), "reused": side.reused()} for side in both]
        about = asdict(matrix) | {"texts": matrix.texts.name}
        found = {"matrix": about, "start": start, "together": sides[0], "apart": sides[1]}
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

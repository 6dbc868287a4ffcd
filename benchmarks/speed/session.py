"""What `gpu.sh` asks of Python: `python session.py COMMAND …`, in the repository's root. The commands are functions below."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

SMALL = {"samples": 4, "length": 32, "tokens": 640}
"""What a suite reads where it is made small."""

PROFILED_SAMPLES = 16
"""Calibration sequences of a run that is profiled: the same work by the block, an eighth as often."""

ROWS = 40


def register(site: Path) -> None:
    """Make the clone a distribution with entry points, in a folder on the path: nothing is built, nothing fetched."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = site / f"{project['name']}-{project['version']}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    said = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (about / "METADATA").write_text(said, encoding="utf-8")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in points.items()), ""]
    (about / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")


def versions() -> None:
    """Print the versions of what prunebench requires, and say what is missing."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing = []
    for requirement in project["dependencies"]:
        name = re.split(r"[\[=<>~!; ]", requirement, maxsplit=1)[0]
        try:
            print(f"{name} {metadata.version(name)} (asked: {requirement})")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        print(f"missing: {', '.join(missing)}; only what draws figures or asks lm-eval's tasks goes without some of them")


def limited(suite: Path, out: Path, gib: str) -> None:
    """Write a suite again, with a limit on the device's memory."""
    text = suite.read_text(encoding="utf-8")
    out.write_text(f"{text}\n[limits]\ndevice_memory = {float(gib)}\n", encoding="utf-8")


def small(suite: Path, out: Path, shape: str, dtype: str) -> None:
    """Write a suite of shapes again, at another shape and on a few short sequences."""
    text = suite.read_text(encoding="utf-8")
    text = re.sub(r'(?m)^shape = "[^"]*"', f'shape = "{shape}"', text)
    text = re.sub(r'(?m)^dtype = "[^"]*"', f'dtype = "{dtype}"', text)
    for key, value in SMALL.items():
        text = re.sub(rf"(?m)^{key} = \d+", f"{key} = {value}", text)
    text = re.sub(r"steps=55", "steps=3", text)
    text = re.sub(r'use = "speed\[[^]]*]"', 'use = "speed[batches=1+2,prompt=8,tokens=4]"', text)
    out.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Cost:
    """What a run cost."""

    model: str
    method: str
    target: str
    status: str
    seconds: float
    floor: float
    phases: str
    peak: int | None
    score: str


def costs(results: Path, since: float = 0.0) -> Iterator[Cost]:
    """Of every record in a results folder that was written at a time or later, in seconds since the epoch."""
    for path in sorted(results.glob("[!.]*/*/*.json")):  # <machine>/<model>/: no pages of what is at work
        if path.stat().st_mtime < since:
            continue
        record = json.loads(path.read_text(encoding="utf-8"))
        if "spec" not in record or "steps" not in record:
            continue
        phases: dict[str, float] = {}
        floors: dict[str, float] = {}
        for step in record["steps"]:
            for told, kept in ((step["phases"], phases), (step.get("floors", {}), floors)):
                for name, seconds in told.items():
                    kept[name] = kept.get(name, 0.0) + seconds
        by_time = sorted(phases.items(), key=lambda item: -item[1])
        device = [step["peak_device_bytes"] or step["peak_host_bytes"] for step in record["steps"]]
        scores = {name: score["value"] or score.get("reason") for name, score in record.get("scores", {}).items()}
        yield Cost(
            model=record["spec"]["model"]["name"],
            method=" + ".join(step["text"] for step in record["spec"]["steps"]),
            target=record["spec"]["target"],
            status=record["status"] if record["status"] == "ok" else f"{record['status']}: {record.get('reason')}",
            seconds=sum(phases.values()),
            floor=sum(floors.values()),
            phases=", ".join(f"{name} {seconds:.2f}" for name, seconds in by_time[:4]),
            peak=max((bytes_ for bytes_ in device if bytes_), default=None),
            score=", ".join(f"{name} {value}" for name, value in scores.items()),
        )


def summary(folders: list[Path]) -> None:
    """Print a line for every run: seconds, found over floor, the longest phases, the peak of memory, scores."""
    for folder in folders:
        for cost in costs(folder) if folder.is_dir() else ():
            floor = f"{cost.seconds / cost.floor:.2f}x its floor" if cost.floor else "no floor"
            peak = "" if cost.peak is None else f", peak {cost.peak / 2**30:.1f} GiB"
            end = f" [{cost.score}]" if cost.score else ""
            told = f"{cost.seconds:.2f} s, {floor} ({cost.phases}){peak}"
            what = f"{folder.name} | {cost.model} | {cost.method} | {cost.target}"
            print(f"{what} | {told if cost.status == 'ok' else cost.status}{end}")


def failed(results: Path, since: float = 0.0) -> int:
    """0 where a run failed or was refused and another did not, as records since then say; 1 where that explains nothing."""
    statuses = [cost.status == "ok" for cost in costs(results, since)]
    return int(all(statuses) or not any(statuses))


def slowest(results: Path) -> str | None:
    """The method whose run is farthest above its floor, or took longest where none has a floor."""
    found = [cost for cost in costs(results) if cost.status == "ok" and cost.seconds]
    if not found:
        return None
    return max(found, key=lambda cost: (cost.seconds / cost.floor if cost.floor else 0.0, cost.seconds)).method


def profile(suite: Path, method: str, device: str, out: Path) -> None:
    """Run a method once more, on fewer sequences, under PyTorch's profiler; write where the time went."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from prunebench.bench import runner
    from prunebench.bench.commands import narrowed
    from prunebench.bench.plan import Planner
    from prunebench.bench.suite import load_suite
    from prunebench.plugins import load_registry

    chosen = narrowed(load_suite(str(suite)), [], [method])
    if chosen.calibration is not None:
        fewer = min(chosen.calibration.samples, PROFILED_SAMPLES)
        chosen = chosen.model_copy(update={"calibration": chosen.calibration.model_copy(update={"samples": fewer})})
    request = Planner(chosen, load_registry(), "profiled", "session.py profile", device).requests()[-1]
    runner.run(request, lambda *_: None, "inline")  # what is made once, compiled or measured is made now
    on_gpu = device.startswith("cuda")
    with profiled(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        record = runner.run(request, lambda *_: None, "inline")
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    phases = [dict(step.phases) for step in record.steps]
    head = f"{method} at {request.spec.target}: {record.status}, phases {phases}\n"
    out.write_text(head + found.key_averages().table(sort_by=by, row_limit=ROWS), encoding="utf-8")
    print(head.strip())


def main() -> int:
    """One command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("register").add_argument("site", type=Path)
    commands.add_parser("versions")
    for command, names in (("small", ("shape", "dtype")), ("limited", ("gib",))):
        making = commands.add_parser(command)
        for name in ("suite", "out"):
            making.add_argument(name, type=Path)
        for name in names:
            making.add_argument(name)
    commands.add_parser("summary").add_argument("folders", type=Path, nargs="+")
    commands.add_parser("slowest").add_argument("results", type=Path)
    failing = commands.add_parser("failed")
    failing.add_argument("results", type=Path)
    failing.add_argument("since", type=float)
    profiling = commands.add_parser("profile")
    profiling.add_argument("suite", type=Path)
    profiling.add_argument("method")
    profiling.add_argument("device")
    profiling.add_argument("out", type=Path)
    asked = vars(parser.parse_args())
    command = asked.pop("command")
    found = globals()[command](**asked)
    if command == "slowest":
        print(found or "", end="")
    return found if command == "failed" else 0


if __name__ == "__main__":
    sys.exit(main())

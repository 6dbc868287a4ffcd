"""What a dry run prints."""

from __future__ import annotations

import math
from dataclasses import replace

from rich.console import Console

from prunebench.bench.estimate import Estimate
from prunebench.bench.experience import Basis
from prunebench.bench.preview import Cost, Preview
from prunebench.bench.specs import run_label
from prunebench.plain import duration_text, escape, size_text
from prunebench.results.leaderboard import difference_size
from prunebench.results.planning import ANSWERS_DIFFER, WINDOW_DEVIATION, Figure

_BASES: dict[Basis, str] = {
    "the same": "records of the same runs",
    "its kind": "records of the same methods and evaluations",
    "others": "records of other methods",
    "rates": "this machine's rates alone (rough: mostly within a factor of 3)",
    "guess": "a guess, where nobody says how much is computed",
}


def print_preview(preview: Preview, console: Console) -> None:
    """The runs, what they would download and cost, and what they could show."""
    if any(work.id is None for work in preview.todo):
        _print_outlined(preview, console)
    else:
        for work in preview.done:
            console.print(f"  done  {work.id}  {'':{_TIME}}  {'':{_SIZE}}  {escape(run_label(work))}", soft_wrap=True)
        for work, estimate in zip(preview.todo, preview.estimates, strict=True):
            console.print(f" to do  {work.id}  {_expected(estimate)}  {escape(run_label(work))}", soft_wrap=True)
        console.print(f"{len(preview.todo)} to do, {len(preview.done)} done; nothing was run.")
    _print_downloads(preview, console)
    if not preview.here:
        console.print("\nHow long it would take is not known here: the cost model measures the machine that runs it.")
    elif preview.todo:
        _print_costs(preview, console)
    if not preview.figures:
        return
    console.print("\nDifferences of two methods that would be found four times of five, before the correction for many pairs:")
    several = len({name for name, _, _ in preview.figures}) > 1
    for name, text, found in preview.figures:
        console.print(f"  {escape(f'{name} {text}' if several else text)}: {_figure_text(found)}", soft_wrap=True)


_TIME, _SIZE = 10, 8
"""Columns of a run's seconds and bytes."""


def _print_outlined(preview: Preview, console: Console) -> None:
    """Runs by what they are called without their seeds, each with what the longest of them takes."""
    labels: dict[str, list[Estimate | None]] = {}
    for work, estimate in zip(preview.todo, preview.estimates, strict=True):
        labels.setdefault(run_label(replace(work, seed=None)), []).append(estimate)
    for label, found in labels.items():
        longest = max(found, key=lambda estimate: estimate.prediction.seconds if estimate else 0.0)
        console.print(f" to do  {len(found):>3} x  {_expected(longest)}  {escape(label)}", soft_wrap=True)
    console.print(f"{len(preview.todo)} runs; which of them are done is known when the data are here. Nothing was run.")


def _expected(estimate: Estimate | None) -> str:
    if estimate is None:
        return f"{'':{_TIME}}  {'':{_SIZE}}"
    prediction = estimate.prediction
    return f"{duration_text(prediction.seconds):>{_TIME}}  {size_text(prediction.peak_bytes):>{_SIZE}}"


def _print_downloads(preview: Preview, console: Console) -> None:
    if not preview.downloads:
        console.print("\nNothing would be downloaded.")
        return
    console.print("\nWould be downloaded:")
    for download in preview.downloads:
        size = "size not known" if download.size is None else size_text(download.size)
        console.print(f"  {download.kind} {escape(download.name)}: {size}", soft_wrap=True)
    sizes = [download.size for download in preview.downloads if download.size is not None]
    more = " and what the Hub does not say" if len(sizes) < len(preview.downloads) else ""
    console.print(f"  in all {size_text(sum(sizes))}{more}")


def _print_costs(preview: Preview, console: Console) -> None:
    console.print("\nWould take about, one run at a time:")
    where = "on the device" if preview.planner.device.startswith("cuda") else "on the host"
    for cost in preview.costs:
        console.print(f"  {escape(cost.model)}: {_cost_text(cost)} {where}", soft_wrap=True)
    if len(preview.costs) > 1:
        whole = Cost(
            "in all",
            sum(cost.runs for cost in preview.costs),
            sum(cost.seconds for cost in preview.costs),
            max(cost.peak_bytes for cost in preview.costs),
        )
        console.print(f"  in all: {_cost_text(whole)} {where}")
    shares = [(basis, share) for basis in _BASES if (share := preview.bases.get(basis, 0.0)) >= 0.005]
    console.print("  rests on " + ", ".join(f"{_BASES[basis]} {share:.0%}" for basis, share in shares), soft_wrap=True)
    if any(basis in ("rates", "guess") for basis, _ in shares):
        rates = {f"{name} in {dtype}": found.products / 1e9 for (name, dtype), found in preview.estimator.rates.items()}
        measured = ", ".join(f"{rate:,.0f} GFLOP/s at the sizes of {escape(of)}" for of, rate in rates.items())
        console.print(f"  measured here{_of_one_thread(preview)}: {measured}", soft_wrap=True)


def _of_one_thread(preview: Preview) -> str:
    return "" if preview.planner.device.startswith("cuda") else ", by one thread"


def _cost_text(cost: Cost) -> str:
    runs = f"{cost.runs} {'run' if cost.runs == 1 else 'runs'}"
    return f"{runs}, {duration_text(cost.seconds)}, peak {size_text(cost.peak_bytes)}"


def _figure_text(found: Figure | None) -> str:
    """What an evaluation could show, and what that rests on."""
    if found is None:
        return "not known before there are records of it"
    items = f"{found.items:,} {'questions' if found.share else 'windows'}"
    basis = f"from {found.pairs} pairs in records"
    if not found.pairs:
        basis = (
            f"assumed: {ANSWERS_DIFFER:.0%} of answers differ" if found.share else f"assumed deviation {WINDOW_DEVIATION} nats"
        )
    if math.isinf(found.difference):
        return f"no difference would show, {items} are too few"
    size = difference_size(found.difference, found.exponential, found.share)
    unit = "" if found.exponential or found.share else " nats"
    return f"differences from about {size}{unit} on would show ({items}; {basis})"

"""What a dry run prints."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from rich.console import Console
from rich.markup import escape

from prunebench.bench.preview import Cost, Preview
from prunebench.bench.specs import run_label
from prunebench.plain import duration_text, size_text
from prunebench.results.leaderboard import difference_size
from prunebench.results.planning import ANSWERS_DIFFER, WINDOW_DEVIATION, Figure


def print_preview(preview: Preview, console: Console) -> None:
    """The runs, what they would download and cost, and what they could show."""
    if any(work.id is None for work in preview.todo):
        labels = Counter(run_label(replace(work, seed=None)) for work in preview.todo)
        for label, count in labels.items():
            console.print(f" to do  {count:>3} x  {escape(label)}")
        console.print(f"{len(preview.todo)} runs; which of them are done is known when the data are here. Nothing was run.")
    else:
        for mark, works in (("done", preview.done), ("to do", preview.todo)):
            for work in works:
                console.print(f"{mark:>6}  {work.id}  {escape(run_label(work))}")
        console.print(f"{len(preview.todo)} to do, {len(preview.done)} done; nothing was run.")
    _print_downloads(preview, console)
    if preview.todo:
        _print_costs(preview, console)
    console.print("\nDifferences of two methods that would be found four times of five, before the correction for many pairs:")
    several = len({name for name, _, _ in preview.figures}) > 1
    for name, text, found in preview.figures:
        console.print(f"  {escape(f'{name} {text}' if several else text)}: {_figure_text(found)}", soft_wrap=True)


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
    console.print("\nWould take about:")
    where = "on the device" if preview.planner.device.startswith("cuda") else "on the host"
    for cost in preview.costs:
        console.print(f"  {escape(cost.model)}: {_cost_text(cost, where)}", soft_wrap=True)
    if len(preview.costs) > 1:
        peak = size_text(max(cost.peak_bytes for cost in preview.costs))
        runs, seconds = sum(cost.runs for cost in preview.costs), sum(cost.seconds for cost in preview.costs)
        console.print(f"  in all: {runs} runs, {duration_text(seconds)}, peak {peak} {where}")
    if preview.rates:
        rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in preview.rates.items())
        limits = "mostly within a factor of 3, far too little for methods that optimise block by block"
        console.print(f"  rough: operations at the measured rate, {rates}; {limits}", soft_wrap=True)


def _cost_text(cost: Cost, where: str) -> str:
    runs = f"{cost.runs} {'run' if cost.runs == 1 else 'runs'}"
    basis = "rough" if not cost.records else f"from {cost.records} records"
    if cost.records and cost.assumed:
        basis += f", {cost.assumed} runs in part rough"
    return f"{runs}, {duration_text(cost.seconds)}, peak {size_text(cost.peak_bytes)} {where} ({basis})"


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

"""Short names of methods that stand side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable

from prunebench.report.palette import family


def short_labels(methods: Iterable[str]) -> dict[str, str]:
    """Each method without its options, with those alone that tell it from others of the same steps.

    `wanda[group=row]` and `magnitude` are `wanda` and `magnitude`; beside `wanda` it is `wanda [group=row]`.
    """
    together: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        together.setdefault(family(method), []).append(method)
    labels = {}
    for name, several in together.items():
        options = {method: _options(method) for method in several}
        common = set.intersection(*map(set, options.values()))
        for method in several:
            own = [text for text in options[method] if text not in common]
            labels[method] = f"{name} [{', '.join(own)}]" if own else name
    return labels if len(set(labels.values())) == len(labels) else {method: method for method in labels}


def _options(method: str) -> list[str]:
    """`a=1`, `b=2` of all steps; commas within an option stay."""
    found = re.findall(r"\[(.*?)\](?= \+ |$)", method)
    return [option for inside in found for option in re.split(r",(?=[\w.]+=)", inside)]

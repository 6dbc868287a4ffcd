"""The hooks of the entry-point group `prunebench`, by which classes are registered and records are heard of, and the version of
the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from prunebench.spec import Eval, Pruner

API_VERSION = 1
"""Of the contract. A plugin's module says as `api_version` for which it was written; `decisions/0009` says when it rises."""

hookspec = pluggy.HookspecMarker("prunebench")
hookimpl = pluggy.HookimplMarker("prunebench")


class Hooks:
    """Those that register take no arguments and return classes."""

    @hookspec
    def prunebench_pruners(self) -> Sequence[type[Pruner]]:  # type: ignore[empty-body]
        """Pruner classes to register."""

    @hookspec
    def prunebench_evals(self) -> Sequence[type[Eval]]:  # type: ignore[empty-body]
        """Evaluation classes to register."""

    @hookspec
    def prunebench_record(self, record: dict[str, Any]) -> None:
        """Called with each record of a sweep, as its file has it, when it is kept. What goes wrong here harms no run."""

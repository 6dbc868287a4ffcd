"""The null pruner: the model as it is, so that every table has the numbers to compare with.

Needs nothing; changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Changes, Effort, EffortFacts, Job, Pruner


@dataclass
class DensePruner(Pruner):
    """The identity."""

    name: ClassVar[str] = "dense"

    def changes(self) -> Changes:
        """Nothing."""
        return Changes.NOTHING

    def effort(self, facts: EffortFacts) -> Sequence[Effort]:  # noqa: ARG002 - the signature is the contract
        """None."""
        return ()

    def prune(self, job: Job) -> None:
        """Leave the model alone."""

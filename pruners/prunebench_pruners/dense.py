"""The null pruner: the model as it is, so that every table has the numbers to compare with.

Needs nothing; changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunebench.spec import Changes, Job, Pruner


@dataclass
class DensePruner(Pruner):
    """The identity."""

    name: ClassVar[str] = "dense"

    def changes(self) -> Changes:
        """Nothing."""
        return Changes.NOTHING

    def prune(self, job: Job) -> None:
        """Leave the model alone."""

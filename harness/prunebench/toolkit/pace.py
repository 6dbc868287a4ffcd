"""Seconds a training step, once the first ones have warmed up what they use: by these a longer training is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from prunebench.spec import JsonDict
from prunebench.toolkit.phases import so_far

WARM = 5
"""Steps that are left out: kernels are loaded and chosen in them, and memory is asked for."""


@dataclass
class Pace:
    """Looks at the step's clock after `WARM` steps and at the end: two synchronisations. Without a clock it knows nothing."""

    steps: int
    """That will be taken."""
    _started: float | None = field(default=None, init=False)
    _seconds: float | None = field(default=None, init=False)

    def step(self, done: int) -> None:
        """So many steps are done."""
        if self.steps > WARM and done in (WARM, self.steps):
            found = so_far().get("training")
            if done == WARM:
                self._started = found
            elif found is not None and self._started is not None:
                self._seconds = (found - self._started) / (done - WARM)

    def noted(self) -> JsonDict | None:
        """`steps` taken, `after` how many the clock began, and mean `seconds` of one; None where they are not known."""
        return None if self._seconds is None else {"steps": self.steps, "after": WARM, "seconds": self._seconds}

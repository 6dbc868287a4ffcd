"""A checkpoint in memory that kills the step it serves, and what goes on from there."""

from __future__ import annotations

import json

import torch

from prunebench.handles import WalkState


class Killed(BaseException):
    """The process ends here."""


class Kept:
    """Keeps the state after some block, and ends the step there; afterwards it hands that state to another one's walk."""

    def __init__(self, last: int) -> None:
        """`last` is after how many blocks the step is killed."""
        self._last = last
        self._state: WalkState | None = None
        self._blocks: dict[str, torch.Tensor] = {}
        self._taken = False

    def take(self) -> WalkState | None:
        """The state of the killed step's walk, for the first walk of the next."""
        found, self._taken = (None if self._taken else self._state), self._state is not None
        return found

    def due(self, done: int) -> bool:
        """After every block, until it is killed."""
        return not self._taken and done <= self._last

    def keep(self, state: WalkState) -> None:
        """Keep copies.

        Raises:
            Killed: this was the last block.
        """
        self._blocks |= {name: tensor.clone() for name, tensor in state.blocks.items()}
        passing = {name: tensor.clone() for name, tensor in state.passing.items()}
        # What is written down is text: what becomes of numbers and tuples on the way shows.
        self._state = WalkState(state.done, state.of, self._blocks, passing, json.loads(json.dumps(state.facts)))
        if state.done == self._last:
            raise Killed

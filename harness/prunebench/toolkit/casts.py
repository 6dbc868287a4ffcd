"""What the cast to a model's own dtype leaves of training."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Cast:
    """What the cast to the model's dtype leaves of training."""

    changed: int = 0
    """Numbers that training changed."""
    survived: int = 0
    """Those of them that differ after the cast too."""

    def count(self, trained: torch.Tensor, before: torch.Tensor) -> None:
        """Add a trained tensor, in the dtype of training, and the one that it replaces."""
        self.changed += int((trained != before.to(trained.dtype)).sum())
        self.survived += int((trained.to(before.dtype) != before).sum())

    @property
    def share(self) -> float:
        """Of the changes, those that survive; 1 where there is no cast, or no change."""
        return self.survived / self.changed if self.changed else 1.0

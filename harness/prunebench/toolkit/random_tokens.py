"""Token ids drawn at random, for shapes: what a run costs does not depend on which tokens it reads.

A mixture of experts is the exception: where random ids go says nothing of where text would go.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from prunebench.toolkit.cache import digest, digest_array
from prunebench.toolkit.calibration import Tokens
from prunebench.toolkit.texts import Source

RANDOM = "random"
"""What the source is called in a suite."""

DRAWN = "uniform-v1"
"""How ids are drawn; in the place of a recipe's sampler."""

Purpose = Literal["calibration", "training"]


def random_tokens(purpose: Purpose, vocabulary: int, sequences: int, length: int, seed: int) -> Tokens:
    """Ids below `vocabulary`, each as likely as the other, [sequences, length]; calibration and training share none of them."""
    first = ("calibration", "training").index(purpose)
    array = np.random.default_rng([first, seed]).integers(0, vocabulary, (sequences, length), dtype=np.int64)
    source = Source(RANDOM, "", purpose, "seed", digest([DRAWN, purpose, str(vocabulary)]), True)
    return Tokens(array, source, digest_array(array))

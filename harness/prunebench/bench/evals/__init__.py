"""The built-in evaluations, registered by the same door as a stranger's."""

from __future__ import annotations

from prunebench.bench.evals.divergence import Divergence
from prunebench.bench.evals.generation import Generation
from prunebench.bench.evals.layer_error import LayerError
from prunebench.bench.evals.perplexity import Perplexity
from prunebench.bench.evals.speed import Speed
from prunebench.bench.evals.zero_shot import ZeroShot
from prunebench.spec import Eval, hookimpl


@hookimpl
def prunebench_evals() -> list[type[Eval]]:
    """The evaluations."""
    return [Perplexity, Divergence, LayerError, Generation, ZeroShot, Speed]

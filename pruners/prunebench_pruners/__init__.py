"""The built-in pruning methods, one file each, registered by the same door as a stranger's."""

from __future__ import annotations

from prunebench.spec import Pruner, hookimpl
from prunebench_pruners.dense import DensePruner
from prunebench_pruners.gblm import Gblm
from prunebench_pruners.imp import Imp
from prunebench_pruners.lora import Lora
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.perp import Perp
from prunebench_pruners.random import RandomPruner
from prunebench_pruners.sparsegpt import SparseGpt
from prunebench_pruners.wanda import Wanda
from prunebench_pruners.wanda_plus_plus import WandaPlusPlus


@hookimpl
def prunebench_pruners() -> list[type[Pruner]]:
    """The methods, from the null pruner up."""
    return [DensePruner, RandomPruner, Magnitude, Imp, Wanda, Gblm, WandaPlusPlus, SparseGpt, Perp, Lora]

"""What authors of pruners build with."""

from prunebench.toolkit.gradients import loss_gradients
from prunebench.toolkit.masks import keep_mask
from prunebench.toolkit.phases import phase
from prunebench.toolkit.recovery import reconstruct, report, retrain
from prunebench.toolkit.retrain import Retraining
from prunebench.toolkit.scores import gradient_scores, magnitude_scores, wanda_scores
from prunebench.toolkit.stats import Gram, InputNorm, Statistic
from prunebench.toolkit.walk import Block, Replica, walk

__all__ = [
    "Block",
    "Gram",
    "InputNorm",
    "Replica",
    "Retraining",
    "Statistic",
    "gradient_scores",
    "keep_mask",
    "loss_gradients",
    "magnitude_scores",
    "phase",
    "reconstruct",
    "report",
    "retrain",
    "walk",
    "wanda_scores",
]

"""The conformance kit: laws that every pruner keeps, on tiny random models, for a plugin's own tests.

    from functools import partial

    from my_plugin import Mine
    from prunebench.testing import parametrize_with_checks

    EXCUSES = {"mine": {"batch_splits/opt": "the loss is summed over the batch; see issue 7"}}

    @parametrize_with_checks([Mine, partial(Mine, group="matrix")], excuses=EXCUSES)
    def test_conformance(pruner, check, family):
        check(pruner, family)

An excuse names a law (`CHECKS`), or a law and a family (`FAMILIES`); it must be true: a law that is kept may not be excused.
Outside pytest, `check_pruner(Mine)` returns the results as a list. For tests of one's own there are `tiny_model`,
`random_tokens` and `make_job`:

    model = tiny_model("qwen3")
    pruner = Mine()
    pruner.prune(make_job(pruner, model, NM(2, 4)))

Nothing here needs pytest but `parametrize_with_checks`, nor the evaluation stack.
"""

from prunebench.testing.checks import (
    TARGETS,
    check_declared_changes,
    check_earlier_zeros,
    check_odd_shapes,
    check_saves,
    check_target_met,
    check_zero_sparsity,
)
from prunebench.testing.claims import check_channels_commute, check_nested, check_pruned_prefix, check_rows_commute
from prunebench.testing.conduct import (
    check_batch_splits,
    check_nothing_left,
    check_refuses_first,
    check_same_seed,
    check_silent,
    check_streaming,
)
from prunebench.testing.models import FAMILIES, make_job, random_tokens, tiny_model
from prunebench.testing.running import (
    CHECKS,
    CheckResult,
    Excuses,
    cases,
    check_pruner,
    parametrize_with_checks,
)
from prunebench.testing.trained import QUICKSTART, check_better_than_random
from prunebench.testing.trial import CheckFailed, Declined, Factory

__all__ = [
    "CHECKS",
    "FAMILIES",
    "QUICKSTART",
    "TARGETS",
    "CheckFailed",
    "CheckResult",
    "Declined",
    "Excuses",
    "Factory",
    "cases",
    "check_batch_splits",
    "check_better_than_random",
    "check_channels_commute",
    "check_declared_changes",
    "check_earlier_zeros",
    "check_nested",
    "check_nothing_left",
    "check_odd_shapes",
    "check_pruned_prefix",
    "check_pruner",
    "check_refuses_first",
    "check_rows_commute",
    "check_same_seed",
    "check_saves",
    "check_silent",
    "check_streaming",
    "check_target_met",
    "check_zero_sparsity",
    "make_job",
    "parametrize_with_checks",
    "random_tokens",
    "tiny_model",
]

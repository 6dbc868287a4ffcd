"""The conformance kit: laws that every pruner keeps, for a plugin's own tests.

    from functools import partial

    from my_plugin import Mine
    from prunebench.testing import parametrize_with_checks

    EXCUSES = {"mine": {"batch_splits/opt": "the loss is summed over the batch; see issue 7"}}

    @parametrize_with_checks([Mine, partial(Mine, group="matrix")], excuses=EXCUSES)
    def test_conformance(pruner, check, family):
        check(pruner, family)

Outside pytest, `check_pruner(Mine)` returns the results as a list, and `prunebench check mine` prints them. Methods that train
for minutes are put to it with options that make them quick: `partial(Mine, steps=3)`.

Laws on all fourteen families of tiny random models (`FAMILIES`):

* `target_met`: the zeros are exactly those of the target, in the group that `audit_group` names, and the audit agrees;
* `declared_changes`: nothing differs in a bit that `changes` does not declare;
* `nothing_left`: no hook, gradient, flag, attribute, setting, global state or open walk stays behind;
* `saves`: the model is the same when it was saved and read back.

Laws on two of them, llama and opt:

* `odd_shapes`: the target is met where widths are no powers of two, and shares of them no whole numbers;
* `zero_sparsity`: at a sparsity of 0 nothing is removed;
* `earlier_zeros`: what an earlier step removed stays removed, unless MASK_MOVES is declared;
* `same_seed`: the same job gives the same bits;
* `batch_splits`: masks do not depend on the batch size, but for the last bits of sums, and in float64 not at all;
* `streaming`: the same bits when blocks move to a device and back, one at a time;
* `silent`: no output, no log, no warning;
* `refuses_first`: what does not fit is refused, and being asked changes nothing;
* `rows_commute`, `channels_commute`, `nested`, `pruned_prefix`: in float64, for those that claim it (`Pruner.claims`);
* `resumes`: killed after a block and taken up there it ends with the same bits, for those that claim it.

And on the trained model that ships with the package (the family `quickstart`):

* `better_than_random`: it loses clearly less than after random pruning, on text that the pruner has not seen.

`cases()` lists these pairs. Families or laws that are named restrict them; with both, any law may be asked of any tiny family.
A law that the pruner refuses everywhere, or does not claim, is `declined`, with the reason: not asked, which is not passed.

An excuse names a law, or a law and a family; it must be true: a law that is kept may not be excused. A class may bring its
own (`Pruner.excuses`). For tests of one's own there are `tiny_model`, `random_tokens` and `make_job`:

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
from prunebench.testing.claims import (
    check_channels_commute,
    check_nested,
    check_pruned_prefix,
    check_resumes,
    check_rows_commute,
)
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
    "check_resumes",
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

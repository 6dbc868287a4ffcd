"""All laws, each on the families that it is for: as a list of results, or as parameters of a pytest function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunebench.errors import PluginError, UnknownNameError
from prunebench.testing.checks import (
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
from prunebench.testing.models import FAMILIES
from prunebench.testing.trained import QUICKSTART, check_better_than_random
from prunebench.testing.trial import CheckFailed, Declined, Factory, label

if TYPE_CHECKING:
    import pytest

CHECKS: Mapping[str, Callable[[Factory, str], None]] = {
    "target_met": check_target_met,
    "odd_shapes": check_odd_shapes,
    "zero_sparsity": check_zero_sparsity,
    "declared_changes": check_declared_changes,
    "earlier_zeros": check_earlier_zeros,
    "same_seed": check_same_seed,
    "batch_splits": check_batch_splits,
    "streaming": check_streaming,
    "nothing_left": check_nothing_left,
    "silent": check_silent,
    "saves": check_saves,
    "refuses_first": check_refuses_first,
    "rows_commute": check_rows_commute,
    "channels_commute": check_channels_commute,
    "nested": check_nested,
    "pruned_prefix": check_pruned_prefix,
    "resumes": check_resumes,
    "better_than_random": check_better_than_random,
}
"""The laws by name, as excuses and test ids call them."""

EVERYWHERE = frozenset({"target_met", "declared_changes", "nothing_left", "saves"})
"""Laws of all families: each family has broken one of them. What the others ask no family answers in a way of its own."""

FEW = frozenset({"llama", "opt"})
"""Families of the other laws: without and with biases, apart and tied, gated and plain."""

TRAINED = "better_than_random"
"""The law of the trained model, `QUICKSTART`."""

Excuses = Mapping[str, str]
"""Reasons by law ('same_seed') or by law and family ('same_seed/opt'). An excused law must fail: an excuse goes stale."""

Outcome = Literal["passed", "failed", "excused", "declined"]


@dataclass(frozen=True)
class CheckResult:
    """What one law said of one pruner on one family."""

    check: str
    pruner: str
    family: str
    outcome: Outcome
    """`declined`: not asked, as the pruner refuses all that the law would ask on this family, or does not claim what the law is
    about; the message says which."""
    message: str = ""


def cases(families: Sequence[str] | None = None, checks: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """The (law, family) pairs that the kit puts a pruner to, family by family.

    Four laws (`EVERYWHERE`) are for all families, the rest for two, `better_than_random` for the trained model alone. Where
    both arguments are given, any law may be asked of any tiny family.

    Args:
        families: only these, of `FAMILIES` and `quickstart`.
        checks: only these, of `CHECKS`.

    Raises:
        UnknownNameError: a law or family that does not exist, or no law that is for any of the families.
    """
    chosen = (*FAMILIES, QUICKSTART) if families is None else families
    laws = tuple(CHECKS) if checks is None else checks
    for check in laws:
        _known("law", check, CHECKS)
    for family in chosen:
        _known("family", family, (*FAMILIES, QUICKSTART))
    asked = _rule(families, checks)
    found = [(check, family) for family in chosen for check in laws if asked(check, family)]
    if chosen and laws and not found:
        places = sorted({family for check in laws for family in (*FAMILIES, QUICKSTART) if asked(check, family)})
        raise UnknownNameError.among(f"family for {' and '.join(laws)}", " and ".join(chosen), places)
    return found


def check_pruner(
    make: Factory,
    *,
    excuses: Excuses | None = None,
    families: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
) -> list[CheckResult]:
    """Put a pruner to every law, each on the families that it is for.

    Args:
        make: the pruner's class, or a function that makes one with options.
        excuses: reasons for laws that it is known to break, besides those of its class; one for a law that it
            keeps counts as a failure.
        families: as for `cases`.
        checks: as for `cases`.

    Raises:
        UnknownNameError: a law or family that does not exist, also in an excuse, or an excuse for what is never asked.
        PluginError: the class's excuses are none.
    """
    asked, known = cases(families, checks), _excuses_of(make, excuses)
    _check_excuses(known, _rule(families, checks))
    return [_result(make, check, family, _excuse(known, check, family)) for check, family in asked]


def parametrize_with_checks(
    classes: Iterable[Factory],
    *,
    excuses: Mapping[str, Excuses] | None = None,
    families: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
) -> pytest.MarkDecorator:
    """A pytest decorator that calls the test with every `pruner`, `check` and `family`.

    Args:
        classes: pruner classes, or functions that make a pruner with options.
        excuses: for each pruner, by its name as a step is written, the reasons for laws that it is known to break, besides
            those of its class.
        families: as for `cases`.
        checks: as for `cases`.

    Raises:
        UnknownNameError: a law or family that does not exist, or an excuse for a pruner, law or family that is not asked.
        PluginError: a class's excuses are none.
    """
    import pytest

    makers, asked = [(label(make), make) for make in classes], cases(families, checks)
    excuses = excuses or {}
    for name in excuses:
        _known("pruner under test", name, dict(makers))
    parameters = []
    for name, make in makers:
        known = _excuses_of(make, excuses.get(name))
        _check_excuses(known, _rule(families, checks))
        for check, family in asked:
            reason = _excuse(known, check, family)
            marks = [pytest.mark.xfail(reason=reason, raises=CheckFailed, strict=True)] if reason else []
            parameters.append(pytest.param(make, CHECKS[check], family, id=f"{name}-{check}-{family}", marks=marks))
    return pytest.mark.parametrize(("pruner", "check", "family"), parameters)


def _result(make: Factory, check: str, family: str, excuse: str | None) -> CheckResult:
    name = label(make)
    try:
        CHECKS[check](make, family)
    except Declined as refused:
        return CheckResult(check, name, family, "declined", str(refused))
    except CheckFailed as failure:
        if excuse:
            return CheckResult(check, name, family, "excused", f"{excuse} ({failure})")
        return CheckResult(check, name, family, "failed", str(failure))
    if excuse:
        message = f"this law is kept, and yet excused ({excuse}); take the excuse away."
        return CheckResult(check, name, family, "failed", message)
    return CheckResult(check, name, family, "passed")


def _possible(check: str, family: str) -> bool:
    """Whether the law can be asked of the family at all."""
    return (check == TRAINED) == (family == QUICKSTART)


def _usual(check: str, family: str) -> bool:
    """Whether the kit asks it where nobody says otherwise."""
    return _possible(check, family) and (check in EVERYWHERE or family in FEW or family == QUICKSTART)


def _rule(families: Sequence[str] | None, checks: Sequence[str] | None) -> Callable[[str, str], bool]:
    """Which pairs there are: whoever names both families and laws may ask more."""
    return _usual if families is None or checks is None else _possible


def _excuses_of(make: Factory, more: Excuses | None) -> Excuses:
    """Those of the class, and what is said besides."""
    own = make().excuses
    if not isinstance(own, Mapping) or not all(isinstance(part, str) for item in own.items() for part in item):
        raise PluginError("the class variable `excuses` of a pruner maps names of laws to reasons, both strings.")
    return {**own, **(more or {})}


def _excuse(excuses: Excuses, check: str, family: str) -> str | None:
    return excuses.get(f"{check}/{family}") or excuses.get(check)


def _check_excuses(excuses: Excuses, asked: Callable[[str, str], bool]) -> None:
    """Refuse an excuse that nothing would ever hold against the facts; one for a case that is left out this time may stand."""
    for key in excuses:
        check, slash, family = key.partition("/")
        _known("law", check, CHECKS)
        if slash:
            _known("family", family, (*FAMILIES, QUICKSTART))
            _known(f"family for {check}", family, [place for place in (*FAMILIES, QUICKSTART) if asked(check, place)])


def _known(kind: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise UnknownNameError.among(kind, name, names)

"""All laws on all families: as a list of results, or as parameters of a pytest function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunebench.errors import UnknownNameError
from prunebench.testing.checks import CHECKS
from prunebench.testing.models import FAMILIES
from prunebench.testing.trial import CheckFailed, Declined, Factory, label

if TYPE_CHECKING:
    import pytest

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
    """`declined`: the pruner refuses all that the law would ask on this family."""
    message: str = ""


def check_pruner(
    make: Factory, *, excuses: Excuses | None = None, families: Sequence[str] = FAMILIES, checks: Sequence[str] = tuple(CHECKS)
) -> list[CheckResult]:
    """Put a pruner to every law on every family.

    Args:
        make: the pruner's class, or a function that makes one with options.
        excuses: reasons for laws that it is known to break; an excuse for a law that it keeps counts as a failure.
        families: of `FAMILIES`.
        checks: of `CHECKS`.

    Raises:
        UnknownNameError: a law or family that does not exist, also in an excuse.
    """
    _check_names(excuses or {}, families, checks)
    return [_result(make, check, family, _excuse(excuses or {}, check, family)) for check, family in _all(families, checks)]


def parametrize_with_checks(
    classes: Iterable[Factory], *, excuses: Mapping[str, Excuses] | None = None, families: Sequence[str] = FAMILIES
) -> pytest.MarkDecorator:
    """A pytest decorator that calls the test with every `pruner`, `check` and `family`.

    Args:
        classes: pruner classes, or functions that make a pruner with options.
        excuses: for each pruner, by its name as a step is written, the reasons for laws that it is known to break.
        families: of `FAMILIES`.

    Raises:
        UnknownNameError: an excuse for a pruner, law or family that does not exist.
    """
    import pytest

    makers = [(label(make), make) for make in classes]
    excuses = excuses or {}
    for name in excuses:
        if name not in dict(makers):
            raise UnknownNameError.among("pruner under test", name, dict(makers))
        _check_names(excuses[name], families, ())
    parameters = []
    for name, make in makers:
        for check, family in _all(families, tuple(CHECKS)):
            reason = _excuse(excuses.get(name, {}), check, family)
            marks = [pytest.mark.xfail(reason=reason, raises=CheckFailed, strict=True)] if reason else []
            parameters.append(pytest.param(make, CHECKS[check], family, id=f"{name}-{check}-{family}", marks=marks))
    return pytest.mark.parametrize(("pruner", "check", "family"), parameters)


def cases(families: Sequence[str] | None = None, checks: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """The (law, family) pairs that the kit puts a pruner to, family by family.

    Args:
        families: only these of `FAMILIES`.
        checks: only these of `CHECKS`.

    Raises:
        UnknownNameError: a law or family that does not exist.
    """
    wanted = FAMILIES if families is None else families, tuple(CHECKS) if checks is None else checks
    _check_names({}, *wanted)
    return list(_all(*wanted))


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


def _all(families: Sequence[str], checks: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((check, family) for family in families for check in checks)


def _excuse(excuses: Excuses, check: str, family: str) -> str | None:
    return excuses.get(f"{check}/{family}") or excuses.get(check)


def _check_names(excuses: Excuses, families: Sequence[str], checks: Sequence[str]) -> None:
    excused = [key.partition("/") for key in excuses]
    for check in [*checks, *(check for check, _, _ in excused)]:
        if check not in CHECKS:
            raise UnknownNameError.among("law", check, CHECKS)
    for family in [*families, *(family for _, slash, family in excused if slash)]:
        if family not in FAMILIES:
            raise UnknownNameError.among("family of tiny models", family, FAMILIES)

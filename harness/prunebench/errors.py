"""The exceptions of prunebench.

    PrunebenchError
    ├── RequestError          what was asked cannot be done; found before any work (exit code 2)
    │   ├── UnknownNameError  no such pruner, evaluation, suite, option or key
    │   ├── OptionError       an option's value does not fit its type
    │   ├── ModelError        a model folder is missing, unreadable or not allowed
    │   ├── DataError         a text or token source is missing, too short or outside the vocabulary
    │   └── StoreError        a results or output folder cannot be used
    ├── PluginError           a plugin broke the rules of registration
    ├── WriteError            what was worked out cannot be written (exit code 1)
    ├── Refused               a method or the harness declines this model and target: an answer, not a failure
    └── RunError              a run failed; the record says why
        ├── ContractError     a pruner did what it did not declare
        ├── AuditError        the pruned model is not what the target says
        └── NonFiniteError    NaN or infinity in scores, weights or a measured value

Messages are one or two sentences: what was asked, what was found, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PrunebenchError(Exception):
    """Anything that prunebench itself raises."""


class RequestError(PrunebenchError):
    """The request is wrong; nothing was started."""


MANY = 100
"""Names that nobody wants to read in a message."""


class UnknownNameError(RequestError):
    """A name that nothing answers to."""

    @classmethod
    def among(cls, kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
        """Say what was asked, the nearest known name, and all of them where they are few."""
        names = sorted(known)
        listing = f" Known: {', '.join(names)}." if names else " There are none."
        if len(names) > MANY:
            listing = f" Near ones: {', '.join(difflib.get_close_matches(name, names, n=8)) or 'none'}."
        return cls(f"there is no {kind} {name!r}{did_you_mean(name, names)}{listing}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the nearest known one, if any is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def first_line(error: BaseException) -> str:
    """What an exception of somebody else's says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def described(error: BaseException) -> str:
    """A stranger's exception by kind and first line; it may fail at telling what it is."""
    try:
        said = first_line(error)
    except Exception:  # noqa: BLE001 - its own `__str__` raises
        said = type(error).__name__
    name = type(error).__name__
    return name if said == name else f"{name}: {said.rstrip('.')}"


class OptionError(RequestError):
    """An option that does not parse, or whose value does not fit its type."""


class ModelError(RequestError):
    """A model that cannot be found, read or allowed."""


class DataError(RequestError):
    """A text or token source that cannot be used."""


class StoreError(RequestError):
    """A results or output folder that cannot be used."""


class WriteError(PrunebenchError):
    """What was worked out cannot be written: a disk is full, or was made read-only meanwhile."""


class PluginError(PrunebenchError):
    """A plugin that broke the rules of registration."""


class Refused(PrunebenchError):
    """The method, or the harness, declines this model and target; the message is the reason."""


class RunError(PrunebenchError):
    """A run failed."""


class ContractError(RunError):
    """A pruner did what it did not declare."""


class AuditError(RunError):
    """The pruned model is not what the target and the method's declaration say."""


class NonFiniteError(RunError):
    """NaN or infinity where a number must be."""

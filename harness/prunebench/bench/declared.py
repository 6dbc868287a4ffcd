"""What a record's steps are by the pruners that are here: their options, and what they declare to change.

A file of kept weights may hold what they declare, and must.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prunebench.bench.mask_bank import BESIDE, named_tensors
from prunebench.errors import PrunebenchError, StoreError
from prunebench.options import option_values, parse_step
from prunebench.plugins import load_registry
from prunebench.results.findings import Entry, Finding
from prunebench.results.records import RunSpec, StepSpec
from prunebench.spec import Changes, Pruner
from prunebench.toolkit.anatomy import ModelAnatomy
from prunebench.toolkit.audit import kind_of

OUTSIDE = Changes.BIASES | Changes.NORMS | Changes.HEAD | Changes.ADAPTER
"""What the masks and weights of a block's matrices do not show."""


def declared(spec: RunSpec) -> Changes | None:
    """All that the steps may change; None where one is not here, or is of another revision, which may change anything."""
    found = Changes.NOTHING
    for step in spec.steps:
        pruner = _pruner(step)
        if pruner is None:
            return None
        try:
            found |= pruner.changes()
        except Exception:  # noqa: BLE001 - a stranger wrote the options, and a plugin may raise anything
            return None
    return found


def options(entry: Entry) -> Iterator[Finding]:
    """Options of the steps against those that their texts give; the shares of a matrix that may be removed hang on them."""
    for number, (done, asked) in enumerate(zip(entry.record.steps, entry.record.spec.steps, strict=False)):
        pruner = _pruner(asked)
        if pruner is None:
            continue
        wanted, given = option_values(pruner), parse_step(asked.text).options
        for name in sorted(done.options.keys() | given.keys()):
            said = repr(done.options[name]) if name in done.options else "absent"
            if name not in wanted:
                yield entry.finding(
                    "steps", f"steps.{number}.options.{name}", f"is {said[:60]}, and {pruner.name} has no such option"
                )
            elif name not in done.options or done.options[name] != wanted[name]:
                message = f"is {said[:60]}, and the spec gives {wanted[name]!r}"
                yield entry.finding("steps", f"steps.{number}.options.{name}", message)


def _pruner(step: StepSpec) -> Pruner | None:
    """A step as it is here; None where it is not, or is of another revision."""
    try:
        pruner = load_registry().pruner(parse_step(step.text))
    except PrunebenchError:
        return None
    return pruner if pruner.revision == step.revision else None


def named(changes: Changes) -> str:
    """What of it the masks do not say, in words."""
    return ", ".join(text for flag, text in BESIDE.items() if changes & flag)


def check_kept(
    file: str | None, tensors: Iterable[str], adapters: Iterable[str], anatomy: ModelAnatomy, changes: Changes
) -> None:
    """Compare what a run kept beside its masks with what its steps declare.

    Args:
        file: the name of the file of kept weights; None where there is none.
        tensors: names of the parameters and buffers in it; a head that was tied has its own by now.
        adapters: the matrices of its adapters.
        anatomy: the model.
        changes: what the steps declare.

    Raises:
        StoreError: it holds what no step declares to change, or lacks matrices of which survivors were changed.
    """
    if file is None:
        if missing := named(changes):
            raise StoreError(f"no weights were kept, and the method declares to change {missing}.")
        return
    for matrix in adapters:
        if not changes & Changes.ADAPTER:
            raise StoreError(
                f"the file of kept weights {file} has an adapter of {matrix[:100]!r}, and no step declares adapters."
            )
    places = named_tensors(anatomy)
    inside, there = {id(matrix.parameter): matrix.name for matrix in anatomy.matrices}, set()
    for name in tensors:
        tensor = places.get(name)
        kind = Changes.KEPT_WEIGHTS if id(tensor) in inside else kind_of(name, anatomy)
        if tensor is not None and not changes & kind:
            raise StoreError(f"the file of kept weights {file} has {name[:100]!r}, which no step declares to change.")
        there.add(id(tensor))
    lacking = [name for place, name in inside.items() if place not in there]
    if changes & Changes.KEPT_WEIGHTS and lacking:
        raise StoreError(f"the file of kept weights {file} lacks {lacking[0]}, whose survivors the method declares to change.")

"""Steps as text: `wanda`, `perp[subset=norms,retrain.steps=40]`, joined by `+`.

The grammar is `name[opt=value,group.opt=value]`; a dotted option reaches into a nested dataclass, a list is joined by `+`,
and `none` is no value where an option may have none. Values become the typed fields of the pruner's or evaluation's
dataclass, and errors name the options and their types.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prunebench.errors import OptionError, PluginError, PrunebenchError, UnknownNameError, described, did_you_mean

T = TypeVar("T")

_STEP = re.compile(r"(?P<name>[a-z0-9][a-z0-9._+-]*)\s*(\[(?P<options>.*)\])?", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A name and its options as written."""

    name: str
    options: Mapping[str, str]


@dataclass(frozen=True)
class OptionFacts:
    """An option, for listings and messages."""

    name: str
    type: str
    default: str
    doc: str


def parse_step(text: str) -> Step:
    """Read one `name[opt=value,...]`.

    Raises:
        OptionError: the text does not follow the grammar.
    """
    match = _STEP.fullmatch(text.strip())
    if match is None:
        raise OptionError(f"cannot read the step {text!r}: write NAME or NAME[option=value,option=value].")
    options: dict[str, str] = {}
    for part in (match["options"] or "").split(","):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key:
            raise OptionError(f"cannot read {part.strip()!r} in {text!r}: write option=value.")
        if key in options:
            raise OptionError(f"the option {key!r} stands twice in {text!r}.")
        options[key] = value
    return Step(match["name"], options)


def split_steps(text: str) -> list[str]:
    """Split steps joined by ` + `; a `+` inside brackets or inside a name (`wanda++`) does not split.

    Raises:
        OptionError: there is no step.
    """
    parts = [part for part in re.split(r"\s+\+\s+(?![^\[]*\])", text.strip()) if part]
    if not parts:
        raise OptionError("a method needs at least one step.")
    return parts


def build(cls: type[T], step: Step) -> T:
    """Make the pruner or evaluation that a step asks for.

    Raises:
        UnknownNameError: an option that the class does not have.
        OptionError: a value that does not fit its type, or that the class itself declines.
        PluginError: the class raises what no value explains.
    """
    adapters = _adapters(cls)  # type: ignore[arg-type]  # a class is hashable
    nested: dict[str, Any] = {}
    for key, text in step.options.items():
        if key not in adapters:
            listing = "; ".join(f"{fact.name} ({fact.type})" for fact in option_facts(cls)) or "none"
            near = did_you_mean(key, adapters)
            raise UnknownNameError(f"{step.name} has no option {key!r}{near} Its options: {listing}.")
        try:
            value = adapters[key][1].validate_python(_read(adapters[key][0], text))
        except ValidationError:
            kind = _type_name(adapters[key][0])
            raise OptionError(f"{step.name}: the option {key} is {kind}, and {text!r} is not.") from None
        *groups, leaf = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    try:
        return _replaced(cls(), nested)
    except PrunebenchError:
        raise
    except (ValueError, TypeError) as error:
        raise OptionError(f"{step.name}: {error}") from None
    except Exception as error:
        raise PluginError(f"{cls.__name__}, which is {step.name}, cannot be built: {described(error)}.") from error


def canonical(name: str, instance: object) -> str:
    """The step as text with only the options that differ from their defaults, in field order: what a run's id hashes."""
    changed = [f"{path}={_plain(value)}" for path, value in _walk_values(instance) if value != _default_at(instance, path)]
    return f"{name}[{','.join(changed)}]" if changed else name


def option_values(instance: object) -> dict[str, Any]:
    """All options of a pruner or evaluation, dotted, with their values."""
    return {path: value if isinstance(value, bool | int | float) else _plain(value) for path, value in _walk_values(instance)}


def option_facts(cls: type) -> list[OptionFacts]:
    """The options of a class, for listings."""
    defaults = cls()
    docs = dict(_walk_docs(cls))
    kinds = _adapters(cls)
    return [
        OptionFacts(path, _type_name(kinds[path][0]), _plain(value), docs.get(path, ""))
        for path, value in _walk_values(defaults)
    ]


@cache
def _adapters(cls: Any) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    found: dict[str, tuple[Any, TypeAdapter[Any]]] = {}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found |= {f"{item.name}.{path}": adapter for path, adapter in _adapters(kind).items()}
        else:
            found[item.name] = (kind, TypeAdapter(kind, config=ConfigDict(allow_inf_nan=False)))
    return found


def _replaced(default: T, values: Mapping[str, Any]) -> T:
    """An instance with some values changed; a group keeps the defaults that its owner gave it."""
    changed = {k: _replaced(getattr(default, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(default, **changed)  # type: ignore[type-var]


def _walk_values(instance: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for item in dataclasses.fields(instance):
        value = getattr(instance, item.name)
        path = prefix + item.name
        found += _walk_values(value, path + ".") if dataclasses.is_dataclass(value) else [(path, value)]
    return found


def _walk_docs(cls: Any, prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            found += _walk_docs(hints[item.name], f"{prefix}{item.name}.")
        else:
            found.append((prefix + item.name, item.metadata.get("doc", "")))
    return found


def _default_at(instance: object, path: str) -> Any:
    value: Any = type(instance)()
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _read(kind: Any, text: str) -> Any:
    if typing.get_origin(kind) in (list, tuple):
        return [part.strip() for part in text.split("+")] if text else []
    return None if text == "none" and type(None) in typing.get_args(kind) else text


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(_plain, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}" if float(f"{value:g}") == value else str(value)
        return short.replace("e+", "e")  # a plus would part a list
    return str(value)


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) in (list, tuple):
        return f"{_type_name(typing.get_args(kind)[0])}, joined by +"
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(kind)))
    if kind is type(None):
        return "none"  # as it is written in a step
    return str(getattr(kind, "__name__", kind))

"""The registry: every pruner and evaluation, the built-in ones too, comes in by the entry-point group `prunebench`.

With `hooks.py` this is the only file that knows pluggy. Plugins are loaded one by one, so that a broken one is listed with its
distribution and the reason, and stops nobody else.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar

import pluggy

from prunebench.errors import PluginError, RequestError, UnknownNameError, described
from prunebench.options import Step, build, canonical, option_facts, parse_step
from prunebench.spec import API_VERSION, Eval, Hooks, JsonDict, Pruner

GROUP = "prunebench"
OLDEST_API = 1
"""The oldest version of the contract that plugins may be written for; one that does not say is taken for this."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")

T = TypeVar("T", Pruner, Eval)


@dataclass(frozen=True)
class Registered(Generic[T]):
    """A registered class and where it comes from."""

    cls: type[T]
    distribution: str
    version: str


@dataclass(frozen=True)
class Broken:
    """A plugin that could not be used, and why."""

    plugin: str
    distribution: str
    reason: str


@dataclass(frozen=True)
class Listener:
    """A plugin that hears of every record."""

    plugin: str
    hear: Callable[..., object]
    """Takes `record`, as its file has it; may raise anything."""


@dataclass
class Registry:
    """What is registered: pruners and evaluations by name, who hears of records, and the plugins that failed."""

    pruners: dict[str, Registered[Pruner]] = field(default_factory=dict)
    evals: dict[str, Registered[Eval]] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)
    listeners: list[Listener] = field(default_factory=list)
    _disputed: dict[tuple[str, str], str] = field(default_factory=dict)

    def pruner(self, step: Step) -> Pruner:
        """Build the pruner that a step asks for.

        Raises:
            UnknownNameError: nobody registered that name, or it has no such option.
            PluginError: two plugins claim the name.
            OptionError: a value does not fit.
        """
        return build(self._find("pruner", self.pruners, step.name).cls, step)

    def eval(self, step: Step) -> Eval:
        """Build the evaluation that a step asks for; raises as `pruner` does."""
        return build(self._find("evaluation", self.evals, step.name).cls, step)

    def describe_pruners(self) -> dict[str, JsonDict]:
        """Pruners with their options, for listings."""
        return {name: _describe(entry) for name, entry in sorted(self.pruners.items())}

    def revisions(self) -> dict[str, int]:
        """The present revisions of pruners by name, and of evaluations by `eval NAME`."""
        pruners = {name: entry.cls.revision for name, entry in self.pruners.items()}
        return pruners | {f"eval {name}": entry.cls.revision for name, entry in self.evals.items()}

    def describe_evals(self) -> dict[str, JsonDict]:
        """Evaluations with their options, for listings."""
        return {name: _describe(entry) for name, entry in sorted(self.evals.items())}

    def add(self, kind: str, cls: type[Any], distribution: str, version: str) -> None:
        """Register one class.

        Raises:
            PluginError: it is not a concrete dataclass of its kind with a usable name.
        """
        base, table = (Pruner, self.pruners) if kind == "pruner" else (Eval, self.evals)
        _check(cls, base, kind)
        name = cls.name
        if name in table or (kind, name) in self._disputed:
            before = self._claims(kind, name)
            owners = self._disputed.get((kind, name)) or _origin(table.pop(name))
            entry: Registered[Any] = Registered(cls, distribution, version)
            self._disputed[kind, name] = f"{owners} and {_origin(entry)}"
            others = [broken for broken in self.broken if broken.reason != before]
            self.broken = [*others, Broken(name, distribution, self._claims(kind, name))]
            return
        table[name] = Registered(cls, distribution, version)

    def _find(self, kind: str, table: dict[str, Registered[T]], name: str) -> Registered[T]:
        if (kind, name) in self._disputed:
            raise PluginError(self._claims(kind, name))
        if name not in table:
            for broken in self.broken:
                if name in (broken.plugin, broken.distribution):
                    raise PluginError(f"the plugin {broken.plugin} of {broken.distribution} cannot be used: {broken.reason}")
            raise UnknownNameError.among(kind, name, table)
        return table[name]

    def _claims(self, kind: str, name: str) -> str:
        owners = self._disputed.get((kind, name))
        return f"the {kind} name {name!r} is claimed by {owners}; uninstall one or rename it."


@cache
def load_registry() -> Registry:
    """Load every installed plugin, once for the process."""
    entries = sorted(
        metadata.entry_points(group=GROUP),
        key=lambda entry: (_dist(entry)[0] != "prunebench", _dist(entry), entry.name),
    )
    return registry_of([(entry.name, *_dist(entry), entry.load) for entry in entries])


def registry_of(plugins: Iterable[tuple[str, str, str, Callable[[], object]]]) -> Registry:
    """A registry of (entry point, distribution, version, loader) in this order."""
    registry = Registry()
    for name, distribution, version, load in plugins:
        try:
            with redirect_stdout(sys.stderr):  # what it prints would stand in the midst of a listing
                found, hear = _hooked(name, load())
                for kind, classes in found.items():
                    for cls in classes:
                        registry.add(kind, cls, distribution, version)
                if hear is not None:
                    registry.listeners.append(Listener(name, hear))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a stranger's import may raise anything; it is listed
            reason = str(error) if isinstance(error, PluginError) else described(error)
            registry.broken.append(Broken(name, distribution, reason))
    return registry


@dataclass(frozen=True)
class Found:
    """A pruner that was asked for by text."""

    make: Callable[[], Pruner]
    label: str
    """As a step is written, with the options that differ from their defaults."""
    distribution: str
    version: str


def find_pruner(text: str) -> Found:
    """A registered pruner, `name[opt=value]`, or any other class, `module:Class[opt=value]`, the current folder on the path.

    Raises:
        RequestError: there is no such name or option, or the module cannot be imported or has no such class.
        PluginError: the class is no pruner, or the name is claimed twice.
    """
    place, bracket, options = text.strip().partition("[")
    if ":" in place:
        cls, registry = _imported(place), Registry()
        registry.add("pruner", cls, place, "not registered")
        step = parse_step(f"{cls.name}{bracket}{options}")
    else:
        registry, step = load_registry(), parse_step(text)
    pruner, entry = registry.pruner(step), registry.pruners[step.name]
    return Found(partial(registry.pruner, step), canonical(step.name, pruner), entry.distribution, entry.version)


def _imported(place: str) -> Any:
    """The class that `module:Class` names.

    Raises:
        RequestError: there is none.
    """
    module_name, _, path = place.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # the last: a file `random.py` there hides nothing
    try:
        with redirect_stdout(sys.stderr):
            module = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stranger's import may raise anything
        raise RequestError(f"cannot import the module {module_name!r}: {described(error)}.") from error
    try:
        return operator.attrgetter(path)(module)
    except AttributeError:
        where = getattr(module, "__file__", None) or "no file"
        raise RequestError(f"the module {module_name!r} ({where}) has no {path!r}.") from None


def _hooked(name: str, plugin: object) -> tuple[dict[str, list[type]], Callable[..., object] | None]:
    """Call one plugin's hooks through a manager of its own, so that nothing of it touches another plugin.

    Returns:
        Classes by kind, and what to call with each record, if the plugin wants to hear of them.
    """
    _check_api(name, plugin)
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(plugin, name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"the plugin {name!r} has a hook that prunebench does not know: {error}") from error
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"the plugin {name!r} implements no hook: mark prunebench_pruners or another with hookimpl.")
    found: dict[str, list[type]] = {}
    for kind, hook in (("pruner", "prunebench_pruners"), ("evaluation", "prunebench_evals")):
        found[kind] = []
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            classes = implementation.function()  # called so, pluggy does not drop a None
            if not isinstance(classes, list | tuple):
                raise PluginError(f"{hook} of the plugin {name!r} returned {type(classes).__name__}, not a list of classes.")
            found[kind] += classes
    hear = manager.hook.prunebench_record
    return found, hear if hear.get_hookimpls() else None


def _check_api(name: str, plugin: object) -> None:
    written_for = getattr(plugin, "api_version", OLDEST_API)
    if type(written_for) is not int:
        raise PluginError(f"the api_version of the plugin {name!r} is {written_for!r}, not a whole number.")
    if written_for > API_VERSION:
        raise PluginError(
            f"the plugin {name!r} was written for version {written_for} of the contract, and this prunebench has "
            f"{API_VERSION}: upgrade prunebench."
        )
    if written_for < OLDEST_API:
        raise PluginError(
            f"the plugin {name!r} was written for version {written_for} of the contract, and this prunebench takes none "
            f"before {OLDEST_API}: upgrade the plugin."
        )


def _check(cls: Any, base: type, kind: str) -> None:
    if not (inspect.isclass(cls) and issubclass(cls, base)):
        raise PluginError(f"{cls!r} is not a {base.__name__} class.")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(vars(cls)["__abstractmethods__"]))
        raise PluginError(f"{cls.__name__} is abstract: it does not define {missing}.")
    if not _NAME.fullmatch(str(getattr(cls, "name", ""))):
        raise PluginError(f"{cls.__name__} needs a class variable `name` of lower case letters, digits and '._+-'.")
    revision = getattr(cls, "revision", None)
    if type(revision) is not int:
        raise PluginError(f"the revision of {cls.__name__} is {revision!r}, not a whole number.")
    if "__dataclass_fields__" not in vars(cls):
        raise PluginError(f"{cls.__name__} is not a dataclass: decorate it with @dataclass.")
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]  # that it is a dataclass was seen above
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise PluginError(f"the option {item.name!r} of the {kind} {cls.__name__} has no default.")
    option_facts(cls)  # raises now, not in a listing, where a type or a default cannot be read


def _describe(entry: Registered[Any]) -> JsonDict:
    return {
        "distribution": entry.distribution,
        "version": entry.version,
        "revision": entry.cls.revision,
        "summary": (entry.cls.__doc__ or "").strip().partition("\n")[0],
        "options": [vars(fact) for fact in option_facts(entry.cls)],
    }


def _origin(entry: Registered[Any]) -> str:
    return f"{entry.distribution} {entry.version} ({entry.cls.__module__}.{entry.cls.__qualname__})"


def _dist(entry: metadata.EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")

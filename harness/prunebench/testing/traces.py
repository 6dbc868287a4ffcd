"""What a step may leave behind on a model: hooks, attributes, gradients, flags, modules, settings."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from transformers import PretrainedConfig, PreTrainedModel

_TENSORS = {"_parameters", "_buffers", "_modules"}
_KEPT_BY_TORCH = {"_is_full_backward_hook"}
"""Set by registering a backward hook, and not unset by removing it."""

_TIES = "all_tied_weights_keys"
"""Where transformers keeps what its settings say of ties."""

Attributes = dict[str, Any]


class Traces:
    """A model's state besides its numbers, taken before a step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._modules = _modules(model)
        self._tensors = _tensors(model)
        self._attributes = {name: _attributes(module) for name, module in self._modules.items()}
        self._parameters = {name: _facts(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._config, self._untied = model.config.to_dict(), _untied(model.config)
        self._head_tied = _head_is_tied(model)
        self._global_hooks = _global_hooks()

    def left(self, may_untie: bool = False) -> Iterator[str]:
        """What differs now, one end of a sentence each: "left ...".

        `may_untie`: a head that was tied may have a weight of its own now, and then the settings have to say so.
        """
        untied = may_untie and self._head_tied and not _head_is_tied(self._model)
        modules = _modules(self._model)
        for name in sorted(self._modules.keys() ^ modules.keys()):
            yield f"left a changed module tree: {name} was {'removed' if name in self._modules else 'added'}"
        for name in sorted(self._modules.keys() & modules.keys()):
            if modules[name] is not self._modules[name]:
                yield f"left another module in the place of {name}"
            else:
                now = _attributes(modules[name])
                if untied and _TIES in now:
                    now[_TIES] = self._attributes[name].get(_TIES)
                yield from _attributes_left(name or "the model", self._attributes[name], now)
        for name in sorted(self._tensors ^ _tensors(self._model)):
            yield f"left a parameter or buffer {'missing' if name in self._tensors else 'too many'}: {name}"
        for name, parameter in self._model.named_parameters():
            yield from _facts_left(name, self._parameters.get(name), _facts(parameter))
        config, wanted = self._model.config.to_dict(), self._untied if untied else self._config
        for key in sorted(wanted.keys() | config.keys()):
            if wanted.get(key) != config.get(key):
                was = "should be" if untied else "was"
                yield f"left the model's config changed: {key} is {config.get(key)!r} and {was} {wanted.get(key)!r}"
        if _global_hooks() != self._global_hooks:
            yield "left a hook on all modules of the process"


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _untied(config: PretrainedConfig) -> dict[str, Any]:
    """The settings as they are to be when the head is untied."""
    other = copy.deepcopy(config)
    for part in (other, other.get_text_config()):
        part.tie_word_embeddings = False
    return other.to_dict()


def _head_is_tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _tensors(model: nn.Module) -> set[str]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name for name, _ in named}


def _attributes(module: nn.Module) -> Attributes:
    """The module's own attributes; dictionaries, as hooks are kept in, by their present items."""
    found = {key: value for key, value in vars(module).items() if key not in _TENSORS | _KEPT_BY_TORCH}
    return {key: list(value.items()) if isinstance(value, dict) else value for key, value in found.items()}


def _attributes_left(name: str, before: Attributes, now: Attributes) -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        if key not in now:
            yield f"left {name} without its attribute {key}"
        elif key not in before:
            yield f"left an attribute {key} on {name}"
        elif not _same(before[key], now[key]):
            if key.endswith("_hooks"):
                yield f"left a hook ({key.strip('_')}) on {name}"
            elif key == "training":
                yield f"left {name} in {'training' if now[key] else 'eval'} mode"
            else:
                yield f"left the attribute {key} of {name} changed"


def _facts(parameter: nn.Parameter) -> dict[str, Any]:
    """What a parameter carries besides its numbers, by what to call it."""
    return {
        "requires_grad": parameter.requires_grad,
        "a gradient": parameter.grad,
        "a hook": len(parameter._backward_hooks or ()),  # an emptied dictionary stays after the last hook is removed
        "a hook after gradients": len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ()),
        "attributes": sorted(vars(parameter)),
    }


def _facts_left(name: str, before: dict[str, Any] | None, now: dict[str, Any]) -> Iterator[str]:
    if before is not None:  # a parameter too many was told of already
        for what, value in now.items():
            if not _same(before[what], value):
                yield f"left requires_grad of {name} as {value}" if what == "requires_grad" else f"left {what} on {name}"


def _global_hooks() -> list[int]:
    tables = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
    return [len(getattr(global_hooks, table)) for table in tables]


def _same(one: Any, other: Any) -> bool:
    """The same object, or equal plain values: a tensor put in the place of another is not the same."""
    if one is other:
        return True
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    plain = (bool, int, float, str, torch.dtype, torch.device, set)
    return isinstance(one, plain) and isinstance(other, plain) and one == other

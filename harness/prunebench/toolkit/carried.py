"""What a method keeps from block to block, written down and put back in place: generators, lists, dictionaries, objects.

Inside may be tensors, generators, None, booleans, numbers, strings, lists, tuples and dictionaries. Objects stay the ones they
are: a generator is set, a list or dictionary filled anew, and of any other object the attributes are, each in the same way.
What is inside lists, tuples and dictionaries is made anew, generators too.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from prunebench.errors import ContractError

Tensors = dict[str, torch.Tensor]

_PLAIN = (bool, int, float, str, type(None))


def written(things: Sequence[object]) -> tuple[Tensors, list[Any]]:
    """The contents of several objects: the tensors in them by name, on the host, and the rest as `json` can write it.

    Raises:
        ContractError: something in them cannot be written down.
    """
    tensors: Tensors = {}
    return tensors, [_write(_contents(thing), tensors) for thing in things]


def put_back(things: Sequence[object], tensors: Mapping[str, torch.Tensor], written: Sequence[Any]) -> None:
    """Give objects the contents that `written` found.

    Raises:
        ContractError: there are more or fewer of them now.
    """
    if len(things) != len(written):
        raise ContractError(f"the walk carries {len(things)} things, and {len(written)} were written down.")
    for thing, content in zip(things, written, strict=True):
        _fill(thing, _read(content, tensors))


def _contents(thing: object) -> Any:
    return thing if isinstance(thing, torch.Generator | list | dict) else vars(thing)


def _fill(thing: object, content: Any) -> None:
    if isinstance(thing, torch.Generator):
        thing.set_state(content.get_state())
    elif isinstance(thing, list):
        thing[:] = content
    elif isinstance(thing, MutableMapping):
        thing.clear()
        thing.update(content)
    else:
        for name, value in content.items():
            own = getattr(thing, name, None)
            if isinstance(own, torch.Generator | list | dict):  # a Counter stays a Counter
                _fill(own, value)
            else:
                setattr(thing, name, value)


def _write(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, torch.Generator):
        return {"generator": [_keep(value.get_state(), tensors), str(value.device)]}
    if isinstance(value, torch.Tensor):
        return {"tensor": [_keep(value, tensors), str(value.device)]}
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list):
        return [_write(part, tensors) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [_write(part, tensors) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[_write(key, tensors), _write(part, tensors)] for key, part in value.items()]}
    raise ContractError(
        f"a walk cannot carry {type(value).__name__}: only tensors, generators, numbers, strings, lists, tuples and dicts."
    )


def _keep(tensor: torch.Tensor, tensors: Tensors) -> str:
    """Its name among the tensors."""
    name = f"carried {len(tensors)}"
    tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return name


def _read(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_read(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content[0]].clone().to(content[1])
    if kind == "generator":
        return torch.Generator(content[1]).set_state(tensors[content[0]])
    if kind == "tuple":
        return tuple(_read(part, tensors) for part in content)
    return {_read(key, tensors): _read(part, tensors) for key, part in content}

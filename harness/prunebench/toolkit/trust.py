"""What of a model's folder may be read and run: safetensors inside it, and no code unless the user allows it by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from prunebench.errors import ModelError, first_line

INDEX = "model.safetensors.index.json"
"""Names the file of each weight where there are several; transformers follows it, wherever it leads."""


def weight_files(folder: Path, name: str, allowed: frozenset[str]) -> list[Path]:
    """The files that a model's weights are read from.

    Raises:
        ModelError: there are none, they are not allowed, or its index names others.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        _check_index(folder, name, {path.name for path in weights})
        return weights
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles and "pickle" in allowed:
        return pickles
    if pickles:
        raise ModelError(
            f"{name} has only pickled weights ({pickles[0].name}), which can run any code; convert them to "
            "safetensors, or allow them by name (--allow pickle) if you trust it."
        )
    raise ModelError(f"the folder of {name} holds no .safetensors file.")


def check_whole(weights: list[Path], name: str) -> None:
    """Find out before any work whether files of weights were cut short, from their headers alone.

    Raises:
        ModelError: one was.
    """
    for path in weights:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except Exception as error:  # noqa: BLE001 - safetensors' own kind is none of Python's
                said = first_line(error).rstrip(".")
                raise ModelError(
                    f"the weights of {name} cannot be read: {path.name} is cut short or damaged ({said})."
                ) from None


def trusts_code(folder: Path, name: str, allowed: frozenset[str]) -> bool:
    """Whether code that comes with the model, or that it asks for from the Hub, may run.

    Raises:
        ModelError: it wants to, and may not.
    """
    trust = "remote-code" in allowed
    settings = _read_json(folder / "config.json", f"{folder.name}/config.json")
    asked = next(_kernels(settings), None)
    if not trust and ("auto_map" in settings or asked):
        what = f"code from the Hub ({asked})" if asked else "code that comes with it"
        raise ModelError(f"{name} wants to run {what}; allow it by name (--allow remote-code) if you trust it.")
    return trust


def _kernels(settings: Any) -> Iterator[str]:
    """Implementations that settings name by a repository, out of which transformers would load and run them."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            if str(key).endswith("_implementation") and isinstance(value, str) and "/" in value:
                yield value
            yield from _kernels(value)


def _check_index(folder: Path, name: str, files: set[str]) -> None:
    """What is loaded is what was hashed.

    Raises:
        ModelError: the index names a file that is not one of `files`.
    """
    if not (folder / INDEX).exists():
        return
    found = _read_json(folder / INDEX, f"{folder.name}/{INDEX}").get("weight_map")
    named = found.values() if isinstance(found, dict) else [found]
    for file in named:
        if file not in files:
            raise ModelError(f"{name}/{INDEX} names {str(file)!r}, which is no .safetensors file of its folder.")


def _read_json(path: Path, shown: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{shown} cannot be read: {reason}.") from None
    if not isinstance(found, dict):
        raise ModelError(f"{shown} holds no settings: it is not a JSON object.")
    return found

"""What a record was made with, found again: its model, its evaluations' data, its calibration tokens.

A record names texts and has no paths. They are looked for where runs look for them; what is found counts only when its hash is
the one in the record, so that nothing is replayed with other data. Files must be in the folders that were named, wherever a
stranger's record would lead; of data sets only those are fetched that have a short name here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunebench.bench.specs import AskedEval, eval_specs
from prunebench.errors import PrunebenchError
from prunebench.options import parse_step
from prunebench.plugins import load_registry
from prunebench.results.content import fingerprint
from prunebench.results.files import is_within
from prunebench.results.records import EvalSpec, RunRecord, TextSpec
from prunebench.shipped import suites_folder
from prunebench.spec import Eval, JsonDict
from prunebench.toolkit.calibration import Tokens, calibration_tokens
from prunebench.toolkit.loading import ModelIdentity, ModelSource, identify, resolve_model
from prunebench.toolkit.texts import KNOWN, mirror

MOST_TOKENS = 1 << 26
"""Of a calibration set: more than any method was ever given."""

_FILE = re.compile(r"[^\[\],=+]+\.(?:txt|npy|jsonl|yaml)(?=[\],+]|$)")
"""A file among the options of an evaluation."""

_DATA_SET = re.compile(r"(?<=data=)[^\[\],=+]+/[^\[\],=+]+")

_ELSEWHERE = {"attention", "lm_eval", "origin", "complete", "reloaded"}
"""Conditions that another machine or another version may have."""


@dataclass(frozen=True)
class Model:
    """A model of this machine, and what identifies it."""

    source: ModelSource
    identity: ModelIdentity


class OtherData(Exception):
    """The data are at hand, and what the record says of them is not so: the field, and both values."""

    def __init__(self, field: str, said: object, found: object) -> None:
        self.field, self.said, self.found = field, said, found
        super().__init__(f"is {said!r}, and the same data give {found!r}")


def find_models(names: Sequence[str]) -> dict[str, Model]:
    """Models by the hash of their weights.

    Raises:
        ModelError: one is not there, or may not be loaded.
    """
    found = {}
    for name in names:
        source = resolve_model(name, [Path(), suites_folder()])
        identity = identify(source)
        found[identity.weights] = Model(source, identity)
    return found


def folders(data: Sequence[Path]) -> list[Path]:
    """Where texts and tasks are looked for: as asked, here, and among what ships."""
    shipped = suites_folder()
    return [*data, Path.cwd(), shipped, shipped / "quickstart" / "texts", shipped / "quickstart" / "tasks"]


def find_eval(spec: EvalSpec, model: Model, record: RunRecord, places: Sequence[Path]) -> tuple[Eval, JsonDict] | None:
    """An evaluation with the same conditions as one of a record; None where its data are not at hand.

    Raises:
        OtherData: they are, and have other conditions than the record says.
    """
    other: OtherData | None = None
    for text, folder in _spellings(spec.text, places):
        try:
            evaluation = load_registry().eval(parse_step(text))
            reloaded = bool(spec.conditions.get("reloaded"))
            asked = AskedEval(text, evaluation)
            [again] = eval_specs([asked], model.identity, record.spec.model.dtype, folder, reloaded)
        except PrunebenchError:
            continue
        if evaluation.revision != spec.revision:
            return None
        if fingerprint(again.conditions) == fingerprint(spec.conditions):
            return evaluation, again.conditions
        other = other or _contradiction(spec.conditions, again.conditions)
    if other is not None:
        raise other
    return None


def _contradiction(said: JsonDict, found: JsonDict) -> OtherData | None:
    """The first condition in which the same data differ from what a record says of them."""
    if said.get("content") is None or said.get("content") != found.get("content"):
        return None
    differing = [key for key in sorted(said.keys() | found.keys()) if said.get(key) != found.get(key)]
    if set(differing) & {"attention", "lm_eval"}:  # another version may have other prompts too
        return None
    key = next((key for key in differing if key not in _ELSEWHERE), None)
    return OtherData(key, said.get(key), found.get(key)) if key else None


def find_calibration(record: RunRecord, model: Model, places: Sequence[Path]) -> Tokens | None:
    """The calibration tokens of a record; None where its text is not at hand.

    Raises:
        OtherData: it is, and its sample of this seed is another.
    """
    recipe, spec = record.spec.recipe, record.spec
    if recipe.calibration is None or recipe.samples is None or recipe.length is None:
        return None
    if recipe.samples * recipe.length > MOST_TOKENS:
        return None
    for name, folder in _texts(recipe.calibration, places):
        try:
            vocabulary = model.identity.vocabulary()
            found = calibration_tokens(name, vocabulary, recipe.samples, recipe.length, spec.seed or 0, folder)
        except PrunebenchError:
            continue
        if found.content == spec.calibration_tokens:
            return found
        if found.source.content == recipe.calibration.content and recipe.sampler != "as given":
            raise OtherData("spec.calibration_tokens", spec.calibration_tokens, found.content)
    return None


def _texts(text: TextSpec, places: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Names by which a text may be had, and the folder each is relative to."""
    if text.origin == "file":
        yield from ((text.name, folder) for folder in places if (folder / text.name).is_file())
        return
    short = next((name for name, known in KNOWN.items() if known.repo == text.name), None)
    if short or mirror():
        yield f"{short or f'{text.name}/{text.config}'}:{text.split}", Path.cwd()


def _spellings(text: str, places: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """An evaluation as it was written, with its files where they may be: as named, or by the last part of their names."""
    text = text.replace("$MIRROR", os.environ.get("PRUNEBENCH_MIRROR", "$MIRROR"))
    text = text.replace("$PRUNEBENCH", str(suites_folder().parent))
    names = _FILE.findall(text)
    if not names:
        if mirror() or not _DATA_SET.search(text):
            yield text, Path.cwd()
        return
    for folder in places:
        found: dict[str, Path] = {}
        for name in names:
            there = (folder / name, folder / name.rsplit("/", 1)[-1])
            path = next((path.resolve() for path in there if path.is_file() and is_within(path, folder)), None)
            if path is not None:
                found[name] = path
        if found.keys() == set(names):
            yield _FILE.sub(lambda match, found=found: str(found[match[0]]), text), folder  # type: ignore[misc]

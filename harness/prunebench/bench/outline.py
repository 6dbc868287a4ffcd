"""Runs of a suite of which a model or a text is not here yet: what would be downloaded, and what can be said without it.

Nothing large is fetched: of a model on the Hub only its settings. Runs have no ids yet, and how much an evaluation will read is
assumed where the suite does not say it.
"""

from __future__ import annotations

from pathlib import Path

from prunebench.bench.costs import Work
from prunebench.bench.evals.generation import Generation
from prunebench.bench.evals.questions import LAMBADA
from prunebench.bench.evals.task_index import data_of
from prunebench.bench.evals.windows import C4_ROWS, C4_WINDOWS, WindowEval
from prunebench.bench.evals.zero_shot import ZeroShot
from prunebench.bench.machine import default_dtype, portable
from prunebench.bench.plan import Planner
from prunebench.bench.specs import CALIBRATED, Cell, sequence_length
from prunebench.bench.suite import ModelEntry
from prunebench.effort import EffortFacts
from prunebench.results.records import EvalSpec
from prunebench.spec import Eval, JsonDict, Needs
from prunebench.toolkit.calibration import DEFAULT_LENGTH
from prunebench.toolkit.hub import Download, data_download, fetch_description, model_download, pinned
from prunebench.toolkit.loading import ModelSource, find_model, shape_of
from prunebench.toolkit.placement import MOST_SEQUENCES
from prunebench.toolkit.random_tokens import RANDOM
from prunebench.toolkit.texts import KNOWN, find_set, mirror, resolve_file

TEXT_TOKENS, C4_TOKENS, TASK_QUESTIONS = 300_000, 480, 1000
"""Assumed of data that are not here: WikiText-2's test text has 250,000 to 380,000 tokens, a document of C4 about 480, a task
250 to 10,000 questions."""

TOKEN_BYTES = 4
"""Assumed of text, and about as much as a token takes in a file of tokens."""

_Parts = set[tuple[str, str | None]]
"""Configurations of a data set, each with the one file that is read of it."""


def downloads(planner: Planner) -> list[Download]:
    """What running a suite would fetch: models first, then data sets by name.

    Raises:
        RequestError: a name that nothing answers to, or the Hub cannot be reached or refuses.
    """
    found = []
    for entry in planner.suite.model:
        allowed = frozenset(entry.allow)
        if find_model(entry.name, planner.folders, allowed) is None:
            found.append(model_download(entry.name, pinned(entry.name, entry.revision), allowed))
    if mirror() is None:
        found += [data_download(repo, parts) for repo, parts in sorted(_data_sets(planner).items())]
    return [download for download in found if download is not None]


def _data_sets(planner: Planner) -> dict[str, _Parts]:
    """The data sets that calibration, training, validation and evaluations read, by repository."""
    suite = planner.suite
    texts: list[tuple[str, str]] = []
    found: dict[str, _Parts] = {}
    for cell in planner.cells():
        if cell.method.needs & CALIBRATED and cell.method.calibration:
            texts.append((cell.method.calibration.source, "train"))
        if cell.method.needs & Needs.TRAINING:
            texts += [(suite.training.source, "train")] if suite.training else []
            texts += [(suite.validation.source, "validation")] if suite.validation else []
    for asked in planner.evals():
        evaluation = asked.evaluation
        if isinstance(evaluation, WindowEval):
            texts.append((evaluation.data, "validation" if _is_c4(evaluation.data) else "test"))
        elif isinstance(evaluation, Generation):
            texts += [(LAMBADA, "test")] if "lambada" in evaluation.tasks else []
        elif isinstance(evaluation, ZeroShot):
            names = {name for leaves in data_of(evaluation.tasks, suite.folder).values() for name in leaves}
            for repo, _, config in (name.rpartition("/") for name in names):
                if repo != "json":
                    found.setdefault(repo, set()).add((config, None))
    for name, split in texts:
        if not _is_file(name) and name != RANDOM:
            place = find_set(name, split)
            found.setdefault(place.repo, set()).add((place.config, place.shard))
    return found


def outlined_work(planner: Planner) -> list[Work]:
    """Runs of a suite of which something must be downloaded first: of a model on the Hub only its settings are fetched.

    Raises:
        RequestError: anything that can be found out without the rest.
    """
    return [work for entry in planner.suite.model for work in _outlined(planner, entry)]


def _outlined(planner: Planner, entry: ModelEntry) -> list[Work]:
    allowed = frozenset(entry.allow)
    source = find_model(entry.name, planner.folders, allowed)
    if source is None:
        revision = pinned(entry.name, entry.revision)
        folder = fetch_description(entry.name, revision, allowed)
        source = ModelSource(folder, entry.name.rsplit("/", 1)[-1], f"{entry.name}@{revision}", allowed)
    shape, evals = shape_of(source), planner.evals()
    described = [
        EvalSpec(
            text=portable(asked.text),
            revision=asked.evaluation.revision,
            conditions=_guessed(asked.evaluation, shape.context, planner.suite.folder),
        )
        for asked in evals
    ]

    def work(cell: Cell) -> Work:
        method, training = cell.method, planner.suite.training
        calibrated = method.calibration if method.needs & CALIBRATED else None
        window = sequence_length(planner.suite.calibration, shape.context)
        trained = training.tokens if training and method.needs & Needs.TRAINING else 0
        return Work(
            model=source,
            weights=None,
            shape=shape,
            dtype=entry.dtype or default_dtype(planner.device),
            steps=tuple(spec.text for spec in method.specs),
            pruners=tuple(method.pruners),
            target=str(cell.target),
            seed=cell.seed,
            facts=EffortFacts(
                samples=calibrated.samples if calibrated else 0,
                length=sequence_length(calibrated, shape.context) if calibrated else 0,
                windows=trained // window,
                window=window if trained else 0,
                batch_size=planner.suite.limits.batch_size or MOST_SEQUENCES,
                layers=shape.layers,
                prunes=str(cell.target) != "dense",
            ),
            evals=tuple(spec for asked, spec in zip(evals, described, strict=True) if asked.wanted_at(cell.target, cell.seed)),
        )

    return [work(cell) for cell in planner.cells()]


def _guessed(evaluation: Eval, context: int, folder: Path) -> JsonDict:
    """As much of an evaluation's conditions as says how much it reads, without its data."""
    known: JsonDict = {"eval": evaluation.name}
    if isinstance(evaluation, WindowEval):
        window = evaluation.window or min(context, DEFAULT_LENGTH)
        path = resolve_file(evaluation.data, folder) if _is_file(evaluation.data) else None
        c4 = _is_c4(evaluation.data)
        there = path.stat().st_size // TOKEN_BYTES if path else C4_ROWS * C4_TOKENS if c4 else TEXT_TOKENS
        counts = (max(1, there // window), evaluation.windows, C4_WINDOWS if c4 else 0)
        return known | {"window": window, "windows": min(count for count in counts if count)}
    if isinstance(evaluation, ZeroShot):
        tasks = {
            name: {"items": TASK_QUESTIONS * len(leaves), "tasks": len(leaves)}
            for name, leaves in data_of(evaluation.tasks, folder).items()
        }
        return known | {"tasks": tasks, "limit": evaluation.limit or None}
    if isinstance(evaluation, Generation):
        questions = min(evaluation.limit or TASK_QUESTIONS, TASK_QUESTIONS)
        return known | {"tasks": [{"task": name, "questions": questions} for name in evaluation.tasks]}
    return known


def _is_file(name: str) -> bool:
    return name.endswith((".txt", ".npy"))


def _is_c4(name: str) -> bool:
    return not _is_file(name) and find_set(name, "").repo == KNOWN["c4"].repo

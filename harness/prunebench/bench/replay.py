"""A record replayed with its model: a sample of its answers by what it kept, and one block pruned again by its method.

Answers show that the kept masks (and weights) give the scores; the block shows that the method gives the masks. Which segments,
questions and block is drawn by a seed that whoever made the record could not know.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from prunebench.bench.at_hand import Model, OtherData, find_calibration, find_eval, folders
from prunebench.bench.declared import OUTSIDE, declared, named
from prunebench.bench.lodging import Lodging
from prunebench.bench.machine import available_cores, machine_slug
from prunebench.bench.plan import Rescoring, RunRequest
from prunebench.bench.replay_answers import Repeatable, differences, drawn
from prunebench.bench.replay_block import CannotReplay, replay_block
from prunebench.bench.rescoring import rescored
from prunebench.bench.runner import Outcome, threads
from prunebench.bench.specs import eval_facts
from prunebench.errors import AuditError, StoreError, described
from prunebench.results.findings import Entry, Finding
from prunebench.results.records import EvalSpec, ScoreRecord
from prunebench.results.tensor_files import Found, read_tensors
from prunebench.spec import EvalJob, JsonDict, Progress
from prunebench.toolkit.adapter_files import load_adapters
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.loading import load_model
from prunebench.toolkit.state import guarded
from prunebench.toolkit.stream import evaluating

ANSWERS, BLOCK = "replayed answers", "replayed block"
"""The names of the checks."""

MOST_SEQUENCES = 64
"""At a time, whatever a record says."""


@dataclass
class Replayed:
    """What replaying a record came to."""

    findings: list[Finding] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """What could not be replayed, and why: a sentence each."""
    done: list[str] = field(default_factory=list)
    """What was replayed and came out the same."""
    answered: bool = False
    """Answers of every score that has raw answers were given again."""
    pruned: bool = False
    """A block was pruned again and shows all that the method changes, or there is nothing to prune."""

    @property
    def whole(self) -> bool:
        """Whether this is what a grade of `replayed` needs."""
        return self.answered and self.pruned and not self.findings


class Replay:
    """Replays records with the models that are at hand."""

    def __init__(
        self,
        models: Mapping[str, Model],
        seed: int,
        device: str,
        data: Sequence[Path] = (),
        progress: Progress = lambda *_: None,
    ) -> None:
        """`models` by the hash of their weights; `data` are folders with texts and tasks."""
        self._models, self._seed, self._device, self._places = models, seed, device, folders(data)
        self._progress = progress

    def __call__(self, entry: Entry) -> Replayed:
        """Replay one record; whatever goes wrong is a reason why it was not."""
        found, record = Replayed(), entry.record
        if record.status != "ok":
            found.left_out.append(f"it is {record.status}, so there is nothing to replay.")
            return found
        model = self._models.get(record.spec.model.weights)
        if model is None:
            found.left_out.append(f"no model with the weights {record.spec.model.weights} was given, so nothing was replayed.")
            return found
        draw = random.Random(f"{self._seed} {record.machine} {record.id}")
        request = self._request(entry, model)
        with threads(request.threads):
            for part in (self._answers, self._block):
                try:
                    part(entry, model, request, draw, found)
                except CannotReplay as reason:
                    found.left_out.append(str(reason))
                except (AuditError, StoreError) as error:  # what was kept is not what the record says
                    check = ANSWERS if part == self._answers else BLOCK
                    found.findings.append(entry.finding(check, "masks.file", f"cannot be replayed: {error}"))
                except Exception as error:  # noqa: BLE001 - a stranger's record and a method may raise anything
                    found.left_out.append(f"replaying it failed: {described(error)}.")
        return found

    def _request(self, entry: Entry, model: Model) -> RunRequest:
        """As the run was asked for, as far as its record tells."""
        record = entry.record
        return RunRequest(
            spec=record.spec,
            model=model.source,
            folder=str(Path.cwd()),
            tokens={"calibration": None, "training": None, "validation": None},
            eval_texts=tuple(spec.text for spec in record.spec.evals),
            machine=machine_slug(),
            suite=None,
            command="",
            device=self._device,
            threads=min(max(0, record.provenance.threads), available_cores()) if record.machine == machine_slug() else 0,
            batch_size=min(max(1, record.provenance.batch_size), MOST_SEQUENCES),
            rescoring=Rescoring(record, str(entry.store.folder)) if record.masks else None,
        ).on(self._device)

    def _answers(self, entry: Entry, model: Model, request: RunRequest, draw: random.Random, found: Replayed) -> None:
        asked = list(self._at_hand(entry, model, found))
        if not asked:
            raise CannotReplay("the data of no evaluation are at hand, so no answer was given again.")
        pruned = self._pruned(entry, request)
        lodging = Lodging(request, pruned)
        for name, score, evaluation, conditions in asked:
            columns = entry.answers.get(name, {})
            count = len(next(iter(columns.values()), []))
            chosen = drawn(count, score.sample is not None and score.sample.strata is not None, draw)
            self._progress(f"replay {name}", 0, 1)
            job = EvalJob(
                model=pruned,
                facts=eval_facts(model.identity, Path(request.folder)),
                conditions=conditions,
                device=lodging.device,
                batch_size=request.batch_size,
                progress=self._progress,
                dense=lodging.dense,
                placement=lodging.placement,
            )
            with guarded([]), evaluating(pruned):
                again = evaluation.again(job, chosen)
            window = int(conditions.get("window") or 0)
            wrong = list(differences(columns, again, chosen, entry.record.spec.model.dtype, window))
            found.findings += [entry.finding(ANSWERS, f"scores.{name}.items.{column}", said) for column, said in wrong]
            if not wrong:
                found.done.append(f"{len(chosen)} of {count} answers of {name}")
        found.answered = {name for name, columns in entry.answers.items() if columns} <= {name for name, *_ in asked}

    def _at_hand(self, entry: Entry, model: Model, found: Replayed) -> Iterator[tuple[str, ScoreRecord, Repeatable, JsonDict]]:
        """Scores whose evaluation can be asked again here."""
        for name, score in entry.record.scores.items():
            spec: EvalSpec | None = next((s for s in entry.record.spec.evals if s.conditions == score.conditions), None)
            if spec is None or not entry.answers.get(name):
                continue
            try:
                evaluation = find_eval(spec, model, entry.record, self._places)
            except OtherData as other:
                found.findings.append(entry.finding(ANSWERS, f"scores.{name}.conditions.{other.field}", str(other)))
                continue
            if evaluation is None:
                found.left_out.append(f"the data of {name} are not at hand as they were, so none of it was answered again.")
            elif not isinstance(evaluation[0], Repeatable):
                found.left_out.append(f"{name} cannot be asked a part of its items, so none of it was answered again.")
            else:
                yield name, score, evaluation[0], evaluation[1]

    def _pruned(self, entry: Entry, request: RunRequest) -> PreTrainedModel:
        """The model whose answers these are.

        Raises:
            CannotReplay: it was not kept.
        """
        record = entry.record
        if record.spec.method == "dense":
            model = load_model(request.model, record.spec.model.dtype)
            load_adapters(find_anatomy(model), request.model.folder)
            return model
        if record.masks is None:
            raise CannotReplay("no masks were kept, so its pruned model cannot be made again.")
        if record.masks.note:
            raise CannotReplay(f"its pruned model cannot be made again: {record.masks.note}")
        return rescored(request, self._progress, Outcome())

    def _block(self, entry: Entry, model: Model, request: RunRequest, draw: random.Random, found: Replayed) -> None:
        if entry.record.spec.target == "dense":
            found.pruned = entry.record.spec.method == "dense"
            if not found.pruned:
                raise CannotReplay(
                    "nothing is removed, so there is no mask to compare, and what else was changed was not done again."
                )
            return
        masks = entry.store.masks(entry.record)
        if masks is None:
            raise CannotReplay("no masks were kept, so no block's can be compared.")
        tokens = None
        if entry.record.spec.recipe.calibration is not None:
            try:
                tokens = find_calibration(entry.record, model, self._places)
            except OtherData as other:
                found.findings.append(entry.finding(BLOCK, other.field, str(other)))
                return
            if tokens is None:
                raise CannotReplay("its calibration text is not at hand, so no block was pruned again.")
        arrays = {**request.tokens, "calibration": tokens.array if tokens else None}
        again = replace(request, tokens=arrays, rescoring=None)
        kept, weights = entry.record.masks, dict[str, Found]()
        if kept is not None and kept.weights_file is not None:
            path = entry.store.folder / kept.weights_file
            weights, _ = read_tensors(path, kept.weights_hash, "the file of kept weights")
        done, wrong = replay_block(again, entry.record, masks, weights, draw, self._progress)
        found.findings += [entry.finding(BLOCK, name, said) for name, said in wrong]
        changes = declared(entry.record.spec)
        outside = OUTSIDE if changes is None else changes & OUTSIDE
        found.pruned = not outside
        if outside:
            found.left_out.append(
                f"the method may change more than a block's matrices ({named(outside)}), which was not done again."
            )
        if not wrong:
            found.done.append(done)

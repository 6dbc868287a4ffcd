"""What the page's panel shows of a record: small groups of facts, of which equal ones are kept once.

Records of a sweep share their conditions, packages and machine, so a page with hundreds of them stays small. Long lists (a
number a matrix, raw answers) are left out: heat maps have the first, the record's own files the second.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunebench.plain import plain, size_text
from prunebench.results.content import canonical_json, fingerprint, slug
from prunebench.results.leaderboard import describe, reason, value_text
from prunebench.results.records import RunRecord, ScoreRecord, StepRecord
from prunebench.results.rows import target_title

MOST_CHARACTERS = 400
"""Of one fact; `prunebench show` has all of it."""

MOST_FACTS = 100
"""Of one group; what is left out is counted."""

Value = str | dict[str, list[tuple[str, float]]]
Facts = list[tuple[str, Value]]


@dataclass
class Panels:
    """The records of a page by key, in groups of facts."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """`{"title", "facts": [[name, value]]}`; a value is a text, or `{"bars": [[name, seconds]]}`."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By key, in the order given; `groups` are indexes."""
    _keys: dict[tuple[str, str], str] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)
    _places: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[RunRecord], grade: Callable[[RunRecord], str] | None = None) -> Panels:
        """Panels of all records.

        Args:
            records: one a machine and id.
            grade: how far a record is trusted, where that is known.
        """
        made, found = cls(), list(records)
        times = Counter(record.id for record in found)
        for record in found:
            key = record.id if times[record.id] == 1 else f"{slug(record.machine)}/{record.id}"
            while key in made.records:  # two machines whose names differ in what a link cannot hold
                key += "~"
            made._keys[record.machine, record.id] = key
            made._first.setdefault(record.id, key)
            made.records[key] = made._entry(record, grade(record) if grade else None)
        return made

    def key(self, machine: str, run_id: str) -> str | None:
        """The key of a run: its id, or machine and id where several machines have it; None where it is not on the page."""
        return self._keys.get((machine, run_id))

    def keys(self, ids: Sequence[str], machine: str | None = None) -> list[str]:
        """The keys of runs, of one machine, or of the first that has them; what is not on the page is left out."""
        found = (self._first.get(run_id) if machine is None else self.key(machine, run_id) for run_id in ids)
        return [key for key in found if key is not None]

    def _entry(self, record: RunRecord, grade: str | None) -> dict[str, Any]:
        spec = record.spec
        groups = [("Result", _result(record, grade)), *_steps(record), ("Zeros found", _audit(record)), *_scores(record)]
        groups += [("Specification", _specification(record)), ("Provenance", _provenance(record))]
        groups.append(("Packages", [(name, _text(version)) for name, version in record.provenance.packages.items()]))
        places = [self._place(title, facts) for title, facts in groups if facts]
        seed = "" if spec.seed is None else f", seed {spec.seed}"
        return {
            "title": plain(spec.method),
            "where": plain(f"{spec.model.name} at {target_title(spec.target)}{seed}, on {record.machine}"),
            "short": "no seed" if spec.seed is None else f"seed {spec.seed}",
            "status": record.status,
            "id": record.id,
            "model": plain(spec.model.name),
            "machine": plain(record.machine),
            "target": target_title(spec.target),
            "groups": places,
            **({"command": command} if (command := rerun(record)) else {}),
        }

    def _place(self, title: str, facts: Facts) -> int:
        more = [("…", f"{len(facts) - MOST_FACTS:,} more")] if len(facts) > MOST_FACTS else []
        group = {"title": plain(title), "facts": [[plain(name), value] for name, value in [*facts[:MOST_FACTS], *more]]}
        place = self._places.setdefault(canonical_json(group), len(self.groups))
        if place == len(self.groups):
            self.groups.append(group)
        return place


def rerun(record: RunRecord) -> str | None:
    """The command that does just this run again, or None where the recorded one is no `prunebench run`.

    It is what was typed without what chose runs and places, quoted anew, so that nothing else can hide in it.
    """
    try:
        words = shlex.split(record.provenance.command)
    except ValueError:
        return None
    if words[:2] != ["prunebench", "run"] or len(words) < 3 or words[2].startswith("-"):
        return None
    kept, rest = words[:3], words[3:]
    while rest:
        option, *rest = rest
        if option in ("--model", "--method", "--machine", "--device") and rest:
            kept += [option, rest.pop(0)]
        elif option.startswith("--") and rest and not rest[0].startswith("--"):
            rest.pop(0)
    spec = record.spec
    seed = "" if spec.seed is None else f", seed {spec.seed}"
    target = "" if spec.method == spec.target else f" {spec.target}"
    only = f"{spec.model.name} {spec.method}{target}{seed}"
    return plain(shlex.join([*kept, "--only", only, "--again"]))


def _text(value: Any) -> str:
    """A fact of any kind as one line that is not too long."""
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = plain(told)
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}… ({len(line):,} characters)"


def _result(record: RunRecord, grade: str | None) -> Facts:
    facts: Facts = [("status", record.status)]
    if record.status != "ok":
        facts.append(("reason", _text(reason(record))))
    if record.failure is not None:
        facts.append(("exception", _text(record.failure.type)))
        if record.failure.step:
            facts.append(("in step", _text(record.failure.step)))
    for name, score in record.scores.items():
        shown = score.reason or "no mean" if score.value is None else value_text(score.value, score.is_share)
        facts.append((name, _text(f"{shown} {score.unit}{' %' if score.is_share else ''}")))
    if record.status == "ok":
        shared = " (the machine was shared)" if record.provenance.shared_machine else ""
        facts.append(("pruning", f"{record.prune_seconds:.2f} s{shared}"))
    if record.peak_bytes is not None:
        facts.append(("peak memory", size_text(record.peak_bytes)))
    if record.masks is not None:
        note = f" ({record.masks.note})" if record.masks.note else ""
        facts.append(("masks kept", _text(f"{record.masks.file}, {size_text(record.masks.bytes)} in all{note}")))
    if record.rescored_from is not None:
        facts.append(("masks taken from", _text(record.rescored_from)))
    if grade is not None:
        facts.append(("trust", _text(grade)))
    return facts


def _steps(record: RunRecord) -> list[tuple[str, Facts]]:
    return [
        (f"Step {index}: {step.pruner}" if len(record.steps) > 1 else f"Step: {step.pruner}", _step(step))
        for index, step in enumerate(record.steps, start=1)
    ]


def _step(step: StepRecord) -> Facts:
    options = ", ".join(f"{name}={_text(value)}" for name, value in step.options.items())
    facts: Facts = [
        ("options", _text(options) if options else "none"),
        ("revision", _text(f"{step.revision} ({step.distribution} {step.version})")),
        ("seconds", {"bars": [(plain(name), round(seconds, 3)) for name, seconds in step.phases.items()]}),
    ]
    if step.floors:
        facts.append(("seconds no implementation avoids", {"bars": [(plain(n), round(s, 3)) for n, s in step.floors.items()]}))
    if step.peak_host_bytes is not None:
        facts.append(
            ("peak of the process", size_text(step.peak_host_bytes) + (" (sampled)" if step.host_peak_sampled else ""))
        )
    if step.peak_device_bytes is not None:
        facts.append(("peak on the device", size_text(step.peak_device_bytes)))
    if step.reused:
        facts.append(("reused", _text(", ".join(step.reused))))
    return facts + [(f"note: {name}", _text(note)) for name, note in step.notes.items()]


def _audit(record: RunRecord) -> Facts:
    audit = record.audit
    if audit is None:
        return []
    return [
        ("of prunable weights", f"{audit.sparsity_prunable:.4%}"),
        ("of all parameters", f"{audit.sparsity_total:.4%}"),
        ("removed by masks", f"{audit.removed:,}"),
        ("zeros among survivors", f"{audit.extra_zeros:,}"),
        ("coverage of the blocks", f"{audit.coverage:.2%}"),
        ("matrices", f"{len(audit.matrices):,}"),
        *([("parameters added", f"{record.extra_parameters:,}")] if record.extra_parameters else []),
    ]  # fmt: skip


def _scores(record: RunRecord) -> list[tuple[str, Facts]]:
    found = []
    for name, score in record.scores.items():
        found.append((f"Score: {name}", _score(score)))
        conditions: Facts = [(key, _text(value)) for key, value in score.conditions.items()]
        found.append((f"Conditions {fingerprint(dict(score.conditions))} of {name}", conditions))
    return found


def _score(score: ScoreRecord) -> Facts:
    value = f"{value_text(score.value, score.is_share)}{' %' if score.is_share else ''}"
    shown = _text(score.reason or "no mean") if score.value is None else value
    kept = score.items_file or f"{max(map(len, score.items.values()), default=0):,} in the record"
    return [
        (score.unit, shown),
        *((part, value_text(value, score.is_share)) for part, value in score.parts.items()),
        ("took", f"{score.seconds:.1f} s"),
        ("raw answers", _text(kept)),
    ]


def _specification(record: RunRecord) -> Facts:
    spec, recipe = record.spec, record.spec.recipe
    facts: Facts = [
        ("model", _text(f"{spec.model.name}, {spec.model.dtype}, {spec.model.source}")),
        ("weights", _text(spec.model.weights)),
        ("tokenizer", _text(spec.model.tokenizer)),
        ("target", spec.target),
        ("seed", "none: neither data nor randomness" if spec.seed is None else str(spec.seed)),
    ]
    if recipe.calibration is not None:
        facts.append(("calibration", _text(f"{recipe.samples} × {recipe.length} tokens of {recipe.calibration.label()}")))
        facts.append(("sampler", _text(recipe.sampler)))
    if recipe.training is not None:
        facts.append(("training", _text(f"{recipe.training_tokens} tokens of {recipe.training.label()}")))
    tokens: Mapping[str, str | None] = {
        "calibration tokens": spec.calibration_tokens,
        "training tokens": spec.training_tokens,
        "validation tokens": spec.validation_tokens,
    }
    return facts + [(name, _text(value)) for name, value in tokens.items() if value]


def _provenance(record: RunRecord) -> Facts:
    made = record.provenance
    facts: Facts = [
        ("made by", _text(made.command)),
        ("started", _text(re.sub(r"\+00:00$", " UTC", made.started).replace("T", " "))),
        (
            "whole run",
            f"{made.seconds:.1f} s" + (f", predicted {made.predicted_seconds:.1f} s" if made.predicted_seconds else ""),
        ),
        ("commit", _text(f"{made.commit or 'not from a clone'}{' with changes' if made.dirty else ''}")),
        ("machine", _text(record.machine)),
        ("device", _text(f"{made.device}{f', driver {made.driver}' if made.driver else ''}")),
        ("platform", _text(f"{made.platform}, Python {made.python}")),
        ("executor", _text(f"{made.executor}, {made.threads} threads, batches of {made.batch_size}")),
    ]
    if made.tuned:
        facts.append(("options chosen by", _text(made.tuned)))
    return facts


def of_no_table(record: RunRecord) -> dict[str, str]:
    """A failed, refused or outdated run for its list."""
    return {
        "what": plain(describe(record).replace("`", "")),
        "why": _text(reason(record)),
        "model": plain(record.spec.model.name),
        "machine": plain(record.machine),
        "target": target_title(record.spec.target),
        "method": plain(record.spec.method),
    }

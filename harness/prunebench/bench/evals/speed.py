"""How much faster a pruned model is, on this device, with the kernels that PyTorch has for its masks.

Two things are measured. Of every distinct shape of prunable matrix the dense product and each kernel's, for prefill (tokens =
batch x prompt) and decoding (tokens = batch), with the pruned model's own weights, through as many matrices as no cache of the
device holds. And the whole model, dense and with every matrix that a kernel takes multiplied by it: the prefill and greedy
decoding, same random prompts, same dtype. The kernel of a shape is the one that decodes the smallest batch quickest.

The value is the speed-up of whole decoding at the smallest batch: seconds a token of the dense model over seconds a token of
the pruned one. That is what whoever waits for an answer sees: nearly all of its time passes there, and there all weights are
read for every token, which is where a smaller model has something to save. Prefill and larger batches are parts. A value below
1 is a loss, and shown. Where no kernel takes the masks there is a reason in place of a value, and the dense model's tokens a
second all the same. The dense model's value is 1: it is what the others are measured against.

Seconds are those of a device: only values of the same device, driver and versions are comparable, and other work there harms
them. Each kernel runs as PyTorch calls it, without a search for the best of its algorithms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import transformers
from transformers import PreTrainedModel

from prunebench.bench.evals.clocks import device_state, power_limit
from prunebench.bench.evals.layer_speed import Row, Shape, columns, points, time_layers
from prunebench.bench.evals.serving import Form, random_prompts, serve_alike
from prunebench.bench.evals.sparse_kernels import (
    DENSE,
    KERNELS,
    Choice,
    Kernel,
    Product,
    kernels_for,
    made,
    pattern_of,
    replaced,
)
from prunebench.bench.lodging import NoRoomError
from prunebench.bench.machine import device_name, driver_version
from prunebench.errors import DataError, OptionError, RequestError
from prunebench.handles import Matrix
from prunebench.spec import Eval, EvalFacts, EvalJob, JsonDict, Score, option
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.calibration import context_of
from prunebench.toolkit.memory import is_out_of_memory, let_go

LONGEST_PROMPT = 512
"""Tokens of a prompt where the option names none and the model's context has room."""

WHOLE = "whole model"
"""What stands in place of a shape in rows of the whole model."""

OUT_OF_MEMORY = "out of memory"


@dataclass
class Speed(Eval):
    """Realised speed-up of decoding and prefill against the dense model, by kernels for the masks."""

    name: ClassVar[str] = "speed"
    revision: ClassVar[int] = 1
    measures_cost: ClassVar[bool] = True

    batches: tuple[int, ...] = option((1, 8, 64), "sequences at a time; the value is that of the fewest")
    prompt: int = option(0, "tokens of each prompt; 0 is what the model's context has room for, at most 512")
    tokens: int = option(64, "tokens that are written behind each prompt")

    def __post_init__(self) -> None:
        self.batches = tuple(sorted(set(self.batches)))
        if not self.batches or self.batches[0] < 1:
            raise OptionError("speed: batches are whole numbers above 0, joined by +.")
        if self.prompt < 0 or self.tokens < 1:
            raise OptionError(f"speed: a prompt of {self.prompt} tokens and {self.tokens} new ones cannot be measured.")

    def conditions(self, facts: EvalFacts) -> JsonDict:
        """The device, the versions on which seconds depend, and what is run."""
        context = context_of(facts.config)
        prompt = self.prompt or min(LONGEST_PROMPT, context - self.tokens)
        if prompt < 1 or prompt + self.tokens > context:
            asked = f"a prompt of {max(prompt, 1)} tokens and {self.tokens} new ones"
            raise DataError(f"speed: {asked} do not fit into the model's context of {context}.")
        return {
            "data": "random tokens",
            "device": device_name(facts.device),
            "driver": driver_version() if facts.device.startswith("cuda") else None,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "kernels": [kernel.name for kernel in KERNELS],
            "batches": list(self.batches),
            "prompt": prompt,
            "written": self.tokens,
            "value": "seconds a token of greedy decoding at the smallest batch, dense over pruned",
        }

    def measure(self, job: EvalJob) -> Score:
        """Layers by shape where a kernel takes them, then the whole model, dense and with its kernels."""
        if job.placement is not None or any(parameter.is_meta for parameter in job.model.parameters()):
            return Score(None, "speed-up", True, reason="the model is not whole on the device")
        matrices = find_anatomy(job.model).matrices
        patterns = {matrix.name: pattern_of(matrix.weight) for matrix in matrices}
        pruned = [matrix for matrix in matrices if patterns[matrix.name] != DENSE]
        dense, remark = _dense(job) if pruned else (job.model, "")
        choice = _choice(pruned, patterns, job.device)
        with torch.cuda.device(job.device) if job.device.type == "cuda" else nullcontext(), torch.inference_mode():
            layers, taken = self._layers(job, dense, pruned, choice)
            whole = _whole(job, dense, pruned, taken)
        told = (whole[0].note, choice.details, remark, power_limit(job.device))
        whole[0] = replace(whole[0], note="; ".join(part for part in told if part))
        reason = choice.reason or _why_none(whole, pruned, taken)
        value = None if reason else whole[0].speed_up if pruned else 1.0
        return Score(value, "speed-up", True, columns([*whole, *layers]), _parts(whole), reason=reason)

    def _layers(
        self, job: EvalJob, dense: PreTrainedModel, pruned: Sequence[Matrix], choice: Choice
    ) -> tuple[list[Row], Taken]:
        """Rows of single products, and what the kernels take."""
        if not choice.kernels:
            return [], Taken()
        weights = {matrix.name: matrix.weight for matrix in find_anatomy(dense).matrices}
        found = time_layers(pruned, weights, choice.kernels, points(self.batches, job.conditions["prompt"]), job.progress)
        try:
            return found.rows, _taken(pruned, found.best)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        let_go()
        return found.rows, Taken(no_room=True)


@dataclass
class Taken:
    """The matrices that kernels take."""

    products: dict[str, Product] = field(default_factory=dict)
    """By the matrix's name."""
    by: Counter[str] = field(default_factory=Counter)
    """How many each kernel takes."""

    no_room: bool = False
    """There is no memory for their compressed weights beside the models."""

    def label(self, of: int) -> str:
        """Which kernels take how many, of so many that are pruned."""
        return f"{' + '.join(f'{kernel} {count}' for kernel, count in self.by.items())} of {of}" if self.by else ""


def _taken(pruned: Sequence[Matrix], best: Mapping[Shape, Kernel]) -> Taken:
    """Every pruned matrix by its shape's kernel, where that takes it."""
    taken = Taken()
    for matrix in pruned:
        kernel = best.get(matrix.shape)
        product = made(kernel, matrix.weight) if kernel else ""
        if kernel and not isinstance(product, str):
            taken.products[matrix.name] = product
            taken.by[kernel.name] += 1
    return taken


def _dense(job: EvalJob) -> tuple[PreTrainedModel, str]:
    """The dense model to compare with, and a remark where it is none: dense products cost nearly the same on zeros."""
    try:
        return job.dense(), ""
    except RequestError:  # it was not pruned here
        remark = "compared with its own weights, their zeros stored"
    except (NoRoomError, RuntimeError, MemoryError) as error:
        if not isinstance(error, NoRoomError) and not is_out_of_memory(error):
            raise
        remark = "compared with its own weights, their zeros stored: there is no memory for the dense model beside it"
    let_go()
    return job.model, remark


def _choice(pruned: Sequence[Matrix], patterns: Mapping[str, str], device: torch.device) -> Choice:
    """The kernels for the pattern that most pruned matrices have; none is missed where nothing is pruned."""
    if not pruned:
        return Choice((), "")
    [(pattern, _)] = Counter(patterns[matrix.name] for matrix in pruned).most_common(1)
    return kernels_for(pattern, device, pruned[0].weight.dtype)


def _why_none(whole: Sequence[Row], pruned: Sequence[Matrix], taken: Taken) -> str:
    """Why there is no value although kernels run here; empty where there is one."""
    if not pruned:
        return ""
    if taken.no_room or (taken.products and not whole[0].sparse_ms):
        return OUT_OF_MEMORY
    return "" if taken.products else "no kernel takes these shapes"


def _whole(job: EvalJob, dense: PreTrainedModel, pruned: Sequence[Matrix], taken: Taken) -> list[Row]:
    """Rows of the whole model, decoding of the smallest batch first; a batch for which there is no memory is the last."""
    vocabulary = int(job.model.config.get_text_config().vocab_size)
    forms: list[Callable[[], Form]] = [lambda: (dense, nullcontext())]
    if taken.products:
        forms.append(lambda: (job.model, replaced(pruned, taken.products)))
    batches, prompt, written = (job.conditions[name] for name in ("batches", "prompt", "written"))
    decoding: list[Row] = []
    prefill: list[Row] = []
    for done, batch in enumerate(batches):
        job.progress("batch", done, len(batches))
        try:
            launch, served = serve_alike(forms, random_prompts(batch, prompt, vocabulary, job.device), written)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            decoding.append(Row(WHOLE, "decode", batch, batch, note=OUT_OF_MEMORY))
            break
        note = f"{launch}, {device_state(job.device)}"
        steps, reads = [one.step for one in served], [one.prefill for one in served]
        for rows, phase, tokens, seconds in ((decoding, "decode", batch, steps), (prefill, "prefill", batch * prompt, reads)):
            sparse = seconds[1] if taken.products else 0.0
            rows.append(Row.timed(WHOLE, phase, batch, tokens, seconds[0], sparse, taken.label(len(pruned)), note))
    return decoding + prefill


def _parts(whole: Sequence[Row]) -> dict[str, float]:
    """Speed-ups by batch, and tokens a second of the smallest and the largest batch."""
    timed = [row for row in whole if row.dense_ms]
    parts = {f"{row.phase}, batch {row.batch}": row.speed_up for row in timed if row.sparse_ms}
    batches = [row.batch for row in timed]
    for row in timed:
        if row.batch in (min(batches), max(batches)):
            parts[f"{row.phase}, batch {row.batch}: dense tokens/s"] = round(1e3 * row.tokens / row.dense_ms, 1)
            if row.sparse_ms:
                parts[f"{row.phase}, batch {row.batch}: pruned tokens/s"] = round(1e3 * row.tokens / row.sparse_ms, 1)
    return parts

"""The evaluations' half of the contract: what one is, what the harness hands it, and what it gives back.

`spec.py` has it too, and is where plugins import it from. Torch and transformers are imported for type checking only.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from prunebench.handles import Placement

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

JsonDict = dict[str, Any]
"""A mapping that `json` can write: strings, numbers, booleans, None, lists and such mappings."""

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`: how far a step has come; called often, must be cheap."""


@dataclass(frozen=True)
class EvalFacts:
    """What an evaluation may look at to say under which conditions it measures."""

    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_hash: str
    folder: str
    """Where relative file names in options start."""
    device: str = "cpu"
    """Where the run works, as `--device` says it; for what is measured in seconds."""


@dataclass(kw_only=True)
class EvalJob:
    """One evaluation's work. The model is in eval mode on `device`."""

    model: PreTrainedModel
    facts: EvalFacts
    conditions: JsonDict
    """What `conditions` returned when the run was planned."""
    device: torch.device
    batch_size: int
    progress: Progress
    dense: Callable[[], PreTrainedModel]
    """The model as it was before the first step, on `device` and in the run's dtype; loaded when first asked for."""
    placement: Placement | None = None
    """Brings the blocks of `model` and `dense()` to `device` when they are called; None where both models are there whole."""
    artefact: Callable[[str, Callable[[], torch.Tensor]], torch.Tensor] | None = None
    """`artefact(name, make)`: a tensor on the host that depends on the dense weights, where and how work is done, and `name`
    alone; a later run may find it in the cache. None where nothing is kept. Do not write into it."""


@dataclass(frozen=True)
class Sample:
    """How a value is made of its items, so that two models can be compared item by item."""

    column: str
    """The column of items that is averaged."""
    exponential: bool = False
    """The value is the exponential of the mean, as perplexity is."""
    documents: str | None = None
    """The column that says which items belong together and are drawn together; without it neighbours are."""
    strata: str | None = None
    """The column of subjects or phenomena that every sample of items has in equal shares. Items are questions then, each of
    which could have been another."""
    tasks: str | None = None
    """The column of tasks that count equally, whatever their number of items."""


@dataclass(frozen=True)
class Score:
    """What an evaluation found."""

    value: float | None
    """None where no one number stands for the whole: a set of tasks of which one is missing has no mean."""
    unit: str
    higher_is_better: bool
    items: Mapping[str, Sequence[float | int | str]] = field(default_factory=dict)
    """Raw answers as columns of equal length, e.g. a negative log-likelihood and a document for each segment."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Further numbers that a table shows beside the value, e.g. each task's accuracy."""
    sample: Sample | None = None
    """How the value is made of the items; without it no rank rests on them."""
    reason: str = ""
    """Why there is no value, in a few words that a table shows in its place: "no kernel for unstructured masks"."""


@dataclass
class Eval(abc.ABC):
    """One evaluation. The fields of the dataclass are its options."""

    name: ClassVar[str]
    revision: ClassVar[int] = 1
    measures_cost: ClassVar[bool] = False
    """Whether the value says what a model costs and nothing of what it can: such a one may be measured on random weights."""

    @abc.abstractmethod
    def conditions(self, facts: EvalFacts) -> JsonDict:
        """Everything that makes two values comparable; asked when a run is planned, before any model is loaded.

        `least_of_dense` among them is the value below which the dense model's makes every other meaningless: tables of such a
        score are left out.

        Raises:
            DataError: the data cannot be had, or does not fit the model.
        """

    def texts(self, facts: EvalFacts) -> Sequence[str]:  # noqa: ARG002 - the signature is the contract
        """The texts it reads, for finding them in training text; none where it asks questions."""
        return ()

    @abc.abstractmethod
    def measure(self, job: EvalJob) -> Score:
        """Evaluate `job.model`.

        Raises:
            NonFiniteError: the value is not a number.
        """

"""How large a model is: what costs, floors and forecasts are worked out from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

from transformers import PretrainedConfig

from prunebench.errors import ModelError, Refused
from prunebench.toolkit.anatomy import find_anatomy
from prunebench.toolkit.calibration import context_of
from prunebench.toolkit.experts import idle_weights


@dataclass(frozen=True)
class ModelShape:
    """How large a model is, known from its settings alone."""

    parameters: int
    multiplied: int
    """Parameters that a token is multiplied with: all but the input embedding, which counts where it is the head too."""
    layers: int
    hidden: int
    vocabulary: int
    context: int
    """The longest sequence."""
    heads: int = 1
    attention: int = 0
    """Width of all heads' queries together."""
    matrices: tuple[tuple[int, int], ...] = ()
    """(outputs, inputs) of every prunable matrix; none where blocks are not found, which a run will say."""
    inputs: tuple[int, ...] = ()
    """Widths of what these matrices read; siblings, of one parent and not its last, read the same."""
    active: int = 0
    """Weights of the blocks that a token meets: of experts those that it is sent to; 0 where nobody has counted."""

    @property
    def prunable(self) -> int:
        """Weights in prunable matrices."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def in_blocks(self) -> int:
        """Weights of all blocks: what a token is multiplied with, but for the head."""
        return max(self.multiplied - self.vocabulary * self.hidden, self.prunable)


def counted(config: PretrainedConfig, shell: Any) -> ModelShape:
    """Count in a causal language model, which may be without weights (on the device `meta`), with fused experts taken apart."""
    settings = config.get_text_config()
    parameters = sum(parameter.numel() for parameter in shell.parameters())
    embedding = shell.get_input_embeddings().weight
    head = shell.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    matrices = _matrices(shell)
    heads, width = int(getattr(settings, "num_attention_heads", None) or 1), int(settings.hidden_size)
    multiplied = parameters - (0 if tied else embedding.numel())
    shape = ModelShape(
        parameters=parameters,
        multiplied=multiplied,
        layers=int(settings.num_hidden_layers),
        hidden=width,
        vocabulary=int(settings.vocab_size),
        context=context_of(config),
        heads=heads,
        attention=heads * int(getattr(settings, "head_dim", None) or width // heads),
        matrices=tuple(shape for _, shape in matrices),
        inputs=tuple(width for _, siblings in groupby(matrices, key=itemgetter(0)) for width in _read(siblings)),
    )
    return replace(shape, active=shape.in_blocks - idle_weights(shell, getattr(settings, "num_experts_per_tok", None)))


def _matrices(shell: Any) -> list[tuple[str, tuple[int, int]]]:
    """Of every prunable matrix its parent's name and its shape; none where a run would be refused."""
    try:
        return [(matrix.name.rpartition(".")[0], matrix.shape) for matrix in find_anatomy(shell).matrices]
    except (ModelError, Refused):
        return []


def _read(siblings: Iterable[tuple[str, tuple[int, int]]]) -> list[int]:
    return read_widths([inputs for _, (_, inputs) in siblings])


def read_widths(siblings: list[int]) -> list[int]:
    """Widths of what the matrices of one parent read, by those of each: the first the same, the last what they made of it."""
    return [siblings[0], siblings[-1]] if len(siblings) > 1 else siblings

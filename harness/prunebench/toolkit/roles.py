"""What a matrix does in its block: query, key, value, output, gate, up or down; told by its name, in fused ones by rows.

Structure does not tell query from key, so this is the one place that knows names. A fused matrix is read only for the families
below, whose order of rows was looked up in transformers: a wrong guess would train other rows than it says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from prunebench.errors import ModelError
from prunebench.handles import Matrix
from prunebench.spec import JobFacts, MatrixFacts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Role = Literal["query", "key", "value", "output", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)

_NAMES: dict[str, Role] = {
    **dict.fromkeys(("q_proj", "q_lin", "query"), "query"),
    **dict.fromkeys(("k_proj", "k_lin", "key"), "key"),
    **dict.fromkeys(("v_proj", "v_lin", "value"), "value"),
    **dict.fromkeys(("o_proj", "out_proj", "out_lin", "dense"), "output"),
    "gate_proj": "gate",
    **dict.fromkeys(("up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h"), "up"),
    **dict.fromkeys(("down_proj", "fc2", "fc_out", "dense_4h_to_h"), "down"),
}
"""By the last part of a matrix's name. `c_proj` is told by the part before: GPT-2 calls the last matrix of both halves so."""

_FUSED = ("qkv_proj", "c_attn", "query_key_value", "Wqkv")
_THIRDS = ("gpt2", "mpt")
"""Model types whose fused rows are all queries, then all keys, then all values."""
_BY_HEAD = ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
"""Those in which each head has its query, key and value rows together."""


@dataclass(frozen=True)
class _Layout:
    """Rows in `groups` equal groups, one after the other; in each the shares of query, key and value rows."""

    groups: int
    shares: tuple[int, int, int]


def rows_with(roles: Iterable[Role], matrix: Matrix | MatrixFacts, config: PretrainedConfig) -> torch.Tensor:
    """Which output rows of a matrix play one of the roles: boolean, [outputs].

    Raises:
        ModelError: the matrix is a fused one of a family whose order of rows is not known.
    """
    wanted, outputs = set(roles), matrix.shape[0]
    *_, parent, last = ["", *matrix.name.split(".")]
    if last in _FUSED:
        return _qkv_rows(wanted, matrix, config.get_text_config())
    if last == "gate_up_proj":  # as Phi-3 and GLM stack them
        half = outputs // 2
        return torch.tensor(["gate" in wanted] * half + ["up" in wanted] * (outputs - half))
    role = _NAMES.get(last)
    if last == "c_proj":
        role = "output" if "attn" in parent or "attention" in parent else "down"
    return torch.full((outputs,), role in wanted)


def unknown_roles(roles: Iterable[Role], facts: JobFacts) -> str | None:
    """Why the roles cannot be told apart in a model, or are not played in it, in one sentence; None where all is well."""
    try:
        played = [r for r in ROLES if any(bool(rows_with([r], m, facts.config).any()) for m in facts.matrices)]
    except ModelError as error:
        return str(error)
    for role in roles:
        if role not in played:
            known = f"those found are {', '.join(played)}" if played else "no matrix has a known name"
            return f"no matrix of this model ({facts.config.model_type}) plays the role {role}; {known}."
    return None


def _qkv_rows(wanted: set[Role], matrix: Matrix | MatrixFacts, config: PretrainedConfig) -> torch.Tensor:
    layout, outputs = _layout(config), matrix.shape[0]
    if layout is None or outputs % (layout.groups * sum(layout.shares)):
        raise ModelError(
            f"{matrix.name} holds query, key and value, and how a {config.model_type} model orders its rows is not known."
        )
    unit = outputs // layout.groups // sum(layout.shares)
    group = torch.tensor([role in wanted for role in ("query", "key", "value")])
    return group.repeat_interleave(torch.tensor(layout.shares) * unit).repeat(layout.groups)


def _layout(config: PretrainedConfig) -> _Layout | None:
    kind, heads = config.model_type, int(getattr(config, "num_attention_heads", None) or 1)
    if kind in _THIRDS:
        return _Layout(1, (1, 1, 1))
    if kind in _BY_HEAD:
        return _Layout(heads, (1, 1, 1))
    if kind == "phi3":
        return _Layout(1, (heads, config.num_key_value_heads, config.num_key_value_heads))
    if kind == "falcon" and config.new_decoder_architecture:  # each key's queries, then the key, then its value
        return _Layout(config.num_kv_heads, (heads // config.num_kv_heads, 1, 1))
    if kind == "falcon":  # one key and value for all heads, or one each
        return _Layout(1, (heads, 1, 1)) if config.multi_query else _Layout(heads, (1, 1, 1))
    return None

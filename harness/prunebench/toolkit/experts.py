"""Mixtures of experts: their fused parameters taken apart when a model is loaded, and put together when it is written.

transformers 5 keeps all experts of a block in two parameters, `gate_up_proj` [experts, 2 inner, hidden] and `down_proj`
[experts, hidden, inner]. Here each expert gets two `nn.Linear` of its own, `experts.3.gate_up_proj` and `experts.3.down_proj`,
whose weights are views of the fused ones: each is then a prunable matrix like any other, which reads the tokens that the router
sends to it. The forward is the loop that transformers calls `eager`, in its order; an expert without tokens is not called.

Which modules are such experts is not told by their class: one is tried, with small weights of its own, and what does not
compute the formula is left as it is, which `find_anatomy` refuses by name (transposed layouts, biases, norms inside).

Routers stay as they are, as in the papers: they are no prunable matrices (`gates_of`), and count as not covered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

UP, DOWN = "gate_up_proj", "down_proj"
"""The two fused parameters, and the two matrices of an expert."""

_IN_FILES = ((("gate_proj", "up_proj"), "down_proj"), (("w1", "w3"), "w2"))
"""What checkpoints with a tensor for each expert and half call them: Qwen's way, and Mixtral's."""

_BLOCK_NAMES = ((".mlp.", ".block_sparse_moe."),)
"""What transformers renames on loading: here, and in the files."""


class _Kind:
    """What experts of a kind do between their two matrices; the fused module without its parameters, out of the module tree."""

    def __init__(self, shell: nn.Module) -> None:
        self.shell: Any = shell

    def __deepcopy__(self, _memo: object) -> _Kind:
        return self  # it holds no numbers

    def inner(self, gate_up: torch.Tensor) -> torch.Tensor:
        """From the output of the first matrix [tokens, 2 inner] to the input of the second, [tokens, inner]."""
        if hasattr(self.shell, "_apply_gate"):
            found: torch.Tensor = self.shell._apply_gate(gate_up)
            return found
        gate, up = gate_up.chunk(2, dim=-1)
        product: torch.Tensor = self.shell.act_fn(gate) * up
        return product


class Expert(nn.Module):
    """One expert: two matrices."""

    def __init__(self, up: nn.Parameter, down: nn.Parameter, kind: _Kind) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = _linear(up), _linear(down)
        self._kind = kind

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its output, not weighted, for some tokens [tokens, hidden]."""
        found: torch.Tensor = self.down_proj(self._kind.inner(self.gate_up_proj(hidden)))
        return found


class Experts(nn.ModuleList):
    """All experts of a block, in place of the fused module."""

    def __init__(self, fused: nn.Module) -> None:
        """Share the numbers of a fused module, which has no parameters afterwards."""
        up, down = (fused._parameters.pop(name) for name in (UP, DOWN))
        assert up is not None
        assert down is not None
        kind = _Kind(fused)
        super().__init__(Expert(_view(up, index), _view(down, index), kind) for index in range(len(up)))
        self._kind = kind
        self._shown: frozenset[int] = frozenset()
        self.chosen: torch.Tensor | None = None
        """While an expert computes, the tokens that it was given; None where these are all."""

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of the outputs of each token's experts, [tokens, hidden].

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, ways]: each token's experts; the number of experts itself means none.
            top_k_weights: [tokens, ways].
        """
        total = torch.zeros_like(hidden_states)
        tokens = hidden_states.shape[0]
        # Sorted once for all experts: one wait for the device. By way, then by token, as the fused forward takes them.
        sent = top_k_index.t().reshape(-1)
        order = torch.argsort(sent, stable=True)
        ends = torch.bincount(sent, minlength=len(self) + 1).cumsum(0).tolist()
        for index, expert in enumerate(self):
            rows = order[ends[index - 1] if index else 0 : ends[index]]
            ways, chosen = rows // tokens, rows % tokens
            if index in self._shown:
                found = expert(hidden_states)[chosen]
            elif len(rows):
                self.chosen = chosen
                try:
                    found = expert(hidden_states[chosen])
                finally:
                    self.chosen = None
            else:
                continue
            found = found * top_k_weights[chosen, ways, None]
            total.index_add_(0, chosen, found.to(total.dtype))
        return total

    @contextmanager
    def showing(self, indices: Iterable[int]) -> Iterator[None]:
        """Call these experts with all tokens for the time inside; what the block computes stays the same, but for last bits."""
        before, self._shown = self._shown, frozenset(indices)
        try:
            yield
        finally:
            self._shown = before

    def fused(self) -> nn.Module:
        """A fused module with these experts' numbers, which from then on are views of its parameters."""
        shell = _with_parameters(self._kind.shell, {})
        for name in (UP, DOWN):
            weights = [expert.get_parameter(f"{name}.weight") for expert in self]
            parameter = nn.Parameter(torch.stack([w.detach() for w in weights]), weights[0].requires_grad)
            for weight, part in zip(weights, parameter.data, strict=True):
                weight.data = part  # the numbers are in memory once
            setattr(shell, name, parameter)
        return shell


def take_apart(model: nn.Module) -> None:
    """Give every expert of a model matrices of its own, which share the memory of the fused ones; also on `meta`.

    Fused modules that are not understood stay as they are.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_fused(child):
                with torch.device("cpu"):
                    understood = _understood(child)
                if understood:
                    setattr(parent, name, Experts(child))


@contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """The model with its experts fused again for the time inside, as transformers writes and reads them.

    Handles on matrices stay valid. At most one module's experts are in memory twice at a time.
    """
    apart = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Experts)
    ]
    try:
        for parent, name, experts in apart:
            setattr(parent, name, experts.fused())
        yield
    finally:
        for parent, name, experts in apart:
            setattr(parent, name, experts)


def experts_in(root: nn.Module) -> dict[nn.Module, tuple[Experts, int]]:
    """For each matrix's module of an expert inside a module: all experts of its block, and which of them it belongs to."""
    return {
        matrix: (experts, index)
        for experts in root.modules()
        if isinstance(experts, Experts)
        for index, expert in enumerate(experts)
        for matrix in expert.children()
    }


def is_of_expert(name: str) -> bool:
    """Whether a matrix's name is that of an expert that was fused."""
    *_, index, last = ["", "", *name.split(".")]
    return index.isdecimal() and last in (UP, DOWN)


def gates_of(block: nn.Module) -> set[nn.Module]:
    """Linear layers of a block that choose experts, or weigh a shared one: as many outputs as there are experts, or one,
    beside a list of experts."""
    found = set[nn.Module]()
    for parent in block.modules():
        for experts in parent.children():
            if isinstance(experts, nn.ModuleList) and len(experts) > 1:
                inside = set(experts.modules())
                found |= {m for m in parent.children() if isinstance(m, nn.Linear) and m.out_features == 1}
                beside = (m for m in parent.modules() if isinstance(m, nn.Linear) and m not in inside)
                found |= {m for m in beside if m.out_features == len(experts)}
    return found


def idle_weights(model: nn.Module, ways: int | None) -> int:
    """Weights of experts that a token passes by.

    Args:
        model: taken apart.
        ways: experts that a token is sent to, as the settings have it; modules that say so themselves (`top_k`) come first.
    """
    idle = 0
    for parent in model.modules():
        for experts in parent.children():
            if isinstance(experts, Experts):
                said = (getattr(module, "top_k", None) for module in parent.modules())
                met = next((top for top in said if isinstance(top, int)), ways or len(experts))
                weights = sum(parameter.numel() for parameter in experts.parameters())
                idle += weights - weights * met // len(experts)
    return idle


Piece = tuple[str, int | None]
"""A tensor in a file, and which part of it along the first dimension; None where it is the whole."""


def names_in_files(name: str) -> Iterator[tuple[Piece, ...]]:
    """Under which names a parameter of a model that was taken apart may be found in the model's files.

    Each answer gives the pieces that make the parameter, one below the other; the parameter's own name comes first.
    """
    for here, there in (("", ""), *_BLOCK_NAMES):
        renamed = name.replace(here, there) if here else name
        yield ((renamed, None),)
        *before, index, matrix, _ = ["", "", "", *renamed.split(".")]
        if index.isdecimal() and matrix in (UP, DOWN):
            prefix = ".".join(filter(None, before))
            yield ((f"{prefix}.{matrix}", int(index)),)
            for ups, down in _IN_FILES:
                yield tuple((f"{prefix}.{index}.{part}.weight", None) for part in (ups if matrix == UP else (down,)))


def _linear(weight: nn.Parameter) -> nn.Linear:
    outputs, inputs = weight.shape
    found = nn.Linear(inputs, outputs, bias=False, device="meta")  # draws no random numbers
    found.weight = weight
    return found


def _with_parameters(module: nn.Module, numbers: Mapping[str, torch.Tensor]) -> nn.Module:
    """A shallow copy of a module with other parameters."""
    other = copy.copy(module)
    other.__dict__["_parameters"] = {name: nn.Parameter(tensor) for name, tensor in numbers.items()}
    return other


def _view(fused: nn.Parameter, index: int) -> nn.Parameter:
    """One expert's part. `data` again: parts that share a count of writes could not be trained one after the other."""
    return nn.Parameter(fused.data[index].data, requires_grad=fused.requires_grad)


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds what gated experts hold, and nothing else."""
    held: Mapping[str, nn.Parameter | None] = module._parameters
    if {UP, DOWN} != held.keys() or len(list(module.parameters())) != 2 or any(True for _ in module.buffers()):
        return False
    up, down = held[UP], held[DOWN]
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or len(up) < 2:
        return False
    count, doubled, hidden = up.shape
    return tuple(down.shape) == (count, hidden, doubled // 2) and doubled % 2 == 0


def _understood(fused: nn.Module, tokens: int = 12, hidden: int = 5, inner: int = 3) -> bool:
    """Whether a fused module computes what `Experts` would, tried in float64 on small weights of its shape.

    Inputs reach from a tenth to a hundred, so that a clamp shows, and some tokens are sent to no expert.
    """
    generator, (count, *_) = torch.Generator().manual_seed(0), fused._parameters[UP].shape  # type: ignore[union-attr]
    few = torch.randint(0, count, (4,), generator=generator)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def trial() -> Any:
        other: Any = _with_parameters(fused, {UP: up, DOWN: down})
        other.config = SimpleNamespace(_experts_implementation="eager")
        return other

    up, down = (
        torch.zeros(count, 2 * inner, hidden, dtype=torch.float64),
        torch.zeros(count, hidden, inner, dtype=torch.float64),
    )
    up[few], down[few] = drawn(len(few), 2 * inner, hidden), drawn(len(few), hidden, inner)
    inputs = drawn(tokens, hidden) * torch.logspace(-1, 2, tokens, dtype=torch.float64)[:, None]
    sent = torch.stack([few.repeat(tokens)[:tokens], few.roll(1).repeat(tokens)[:tokens]], dim=1)
    sent[::5, 1] = count
    arguments = (inputs, sent, torch.rand(tokens, 2, generator=generator, dtype=torch.float64))
    try:
        with torch.no_grad():
            wanted = trial()(*arguments)
            return torch.allclose(Experts(trial())(*arguments), wanted, rtol=1e-12, atol=1e-12)
    except Exception:  # noqa: BLE001 - a module of another kind may raise anything, which is the answer
        return False

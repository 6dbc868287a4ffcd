"""Models of unusual make: their blocks' arguments are replayed as the model gives them, or the model is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support import (
    EXACT,
    LENGTH,
    PlainBlock,
    PlainModel,
    Rescaling,
    changed,
    fingerprint,
    halve,
    make_job,
    same_bits,
    tiny,
    tokens_of,
    traces,
)
from torch import nn
from transformers import PreTrainedModel

from prunebench.errors import Refused
from prunebench.toolkit import InputNorm, walk
from prunebench_pruners.wanda import Wanda


def plain_inputs(model: PlainModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What each block reads in the model's own forward."""
    seen: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for block in model.blocks]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return seen


class Tupled(PlainBlock):
    """Returns a tuple, as transformers' blocks did before version 5."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return (self.mix(hidden_states),)


class TupledWithNothing(PlainBlock):
    """Returns the hidden state and an empty place for a cache."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.mix(hidden_states), None


class Unpacking(PlainModel):
    """Takes the first of what its blocks return, which of a tensor would be the first sequence."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden)[0]


@pytest.mark.parametrize(
    ("make", "kind"),
    [(PlainModel, PlainBlock), (Unpacking, Tupled), (Unpacking, TupledWithNothing)],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_blocks_may_return_a_tensor_or_a_tuple(make: type[PlainModel], kind: type[PlainBlock], batch_size: int) -> None:
    model = make(kind).double().eval()
    job = make_job(model, tokens_of(), batch_size=batch_size)
    for block in walk(job):
        wanted = plain_inputs(model, job.calibration)[block.index]
        torch.testing.assert_close(torch.cat(list(block.batches())), wanted, **EXACT)
        assert block.replica(torch.float64).forward(wanted).shape == wanted.shape
        block.collect(InputNorm)
        halve(block)


class Named(PlainModel):
    """Hands the hidden state on by name."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden_states=hidden)


def test_the_hidden_state_may_be_given_by_name() -> None:
    tokens = tokens_of()
    model = Named().double().eval()
    by_position = PlainModel().double().eval()
    by_position.load_state_dict(model.state_dict())
    wanted = plain_inputs(by_position, tokens)
    for block in walk(make_job(model, tokens)):
        torch.testing.assert_close(torch.cat(list(block.batches())), wanted[block.index], **EXACT)


class Chatty(PlainBlock):
    """Returns a tensor that the next block reads beside the hidden state."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.mix(hidden_states), hidden_states


class RescalingInPlace(PlainModel):
    """Changes the hidden state between its blocks, in the same tensor."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden).mul_(0.5)


class Skipping(PlainModel):
    """Runs all blocks but the second."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return hidden if block is self.blocks[1] else block(hidden)


class SkippingTheLast(PlainModel):
    """Leaves before the last block."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return hidden if block is self.blocks[-1] else block(hidden)


class Repeating(PlainModel):
    """Runs every block twice."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(block(hidden))


class Shifted(PlainBlock):
    """Takes one more argument."""

    def forward(self, hidden_states: torch.Tensor, shift: Any = None) -> Any:
        if isinstance(shift, dict):
            shift = shift["inner"][0]
        if isinstance(shift, tuple):
            shift = shift[0].view(len(hidden_states), shift[1], LENGTH, 1).sum(dim=1)
        return self.mix(hidden_states if shift is None else hidden_states + shift)


def by_token(hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """[sequences, length, 1]: another for every sequence."""
    return input_ids[..., None].to(hidden.dtype)


class TokenDependent(PlainModel):
    """Gives its blocks something computed from the tokens, by position."""

    def __init__(self) -> None:
        super().__init__(Shifted)

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden, by_token(hidden, input_ids))


class TokenDependentInside(TokenDependent):
    """The same, deep inside a named argument and in the last block only."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        if block is not self.blocks[-1]:
            return block(hidden)
        return block(hidden, shift={"inner": (by_token(hidden, input_ids), None)})


class TokenDependentNumber(TokenDependent):
    """The same, as a number of the whole batch."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden, float(input_ids.sum()))


class TokenDependentScalar(TokenDependent):
    """The same, as a tensor without dimensions."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden, input_ids.sum().to(hidden.dtype))


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PlainModel(Chatty), "return more than the hidden state"),
        (Rescaling, "changes the hidden state between its blocks"),
        (RescalingInPlace, "changes the hidden state between its blocks"),
        (Skipping, "changes the hidden state between its blocks"),
        (SkippingTheLast, "ran 2 of its 3 blocks"),
        (Repeating, "changes the hidden state between its blocks"),
        (TokenDependent, "depend on the tokens"),
        (TokenDependentInside, "depend on the tokens"),
        (TokenDependentNumber, "depend on the tokens"),
        (TokenDependentScalar, "depend on the tokens"),
    ],
)
def test_what_the_walk_cannot_follow_is_refused_by_name(
    make: Callable[[], PreTrainedModel], reason: str, batch_size: int
) -> None:
    model = make().eval()
    before, weights = traces(model), fingerprint(model)
    job = make_job(model, tokens_of(), batch_size=batch_size)
    with pytest.raises(Refused, match=reason) as caught:
        Wanda().prune(job)
    assert type(model).__name__ in str(caught.value)
    assert traces(model) == before
    assert not changed(model, weights)


class Constant(TokenDependent):
    """Gives its blocks tensors that are the same for every sequence, in every shape that such tensors have."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        number = 1.0 + list(self.blocks).index(block)
        if self.shape == "scalar":
            return block(hidden, torch.tensor(number, dtype=hidden.dtype))
        if self.shape == "by position":
            return block(hidden, torch.linspace(0, number, LENGTH, dtype=hidden.dtype)[:, None])
        if self.shape == "one row":
            return block(hidden, torch.linspace(0, number, LENGTH, dtype=hidden.dtype)[None, :, None])
        by_position = torch.linspace(0, number, LENGTH, dtype=hidden.dtype)[None, :, None]
        if self.shape == "by head and sequence":  # as Bloom's position biases
            heads = torch.cat([by_position, -0.5 * by_position])
            return block(hidden, Heads(heads.repeat(len(hidden), 1, 1), 2))
        return block(hidden, by_position.repeat(len(hidden), 1, 1))


class Heads(NamedTuple):
    """Numbers of several heads for every sequence."""

    numbers: torch.Tensor
    heads: int


SHAPES = ["scalar", "one row", "by sequence", "by position", "by head and sequence"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 2, 5, LENGTH])
def test_arguments_that_do_not_depend_on_tokens_are_replayed_block_by_block(shape: str, batch_size: int) -> None:
    model = Constant(shape).double().eval()
    job = make_job(model, tokens_of(samples=LENGTH + 2), batch_size=batch_size)
    for block in walk(job):
        wanted = plain_inputs(model, job.calibration)[block.index]
        torch.testing.assert_close(torch.cat(list(block.batches())), wanted, **EXACT)
        assert block.forward(wanted[:3]).shape == (3, LENGTH, 8)
        halve(block)


class InPlace(PlainBlock):
    """Writes its output over its input."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return hidden_states.add_(self.down(torch.tanh(self.up(hidden_states))))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_blocks_that_write_into_their_input_do_not_spoil_the_set(batch_size: int) -> None:
    model = PlainModel(InPlace).double().eval()
    tokens = tokens_of()
    wanted = plain_inputs(model, tokens)
    for block in walk(make_job(model, tokens, batch_size=batch_size)):
        block.collect(InputNorm)
        for _ in range(2):
            list(map(block.forward, block.batches()))
        torch.testing.assert_close(torch.cat(list(block.batches())), wanted[block.index], **EXACT)


class Precise(PlainBlock):
    """Adds an argument in more digits than the hidden state has."""

    def forward(self, hidden_states: torch.Tensor, shift: Any = None) -> Any:
        assert shift.dtype in (torch.float32, hidden_states.dtype)
        return self.mix((hidden_states + shift).to(hidden_states.dtype))


class Strict(PlainBlock):
    """Takes an argument of the hidden state's dtype only, as attention does with a mask of numbers."""

    def forward(self, hidden_states: torch.Tensor, shift: Any = None) -> Any:
        assert shift.dtype == hidden_states.dtype
        return self.mix(hidden_states + shift)


class WithPositions(PlainModel):
    """A bfloat16 model that computes positions in a dtype of their own."""

    def __init__(self, block: type[PlainBlock], dtype: torch.dtype) -> None:
        super().__init__(block)
        self.positions = torch.linspace(0, 1, LENGTH)[None, :, None].to(dtype)

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return block(hidden, self.positions)


@pytest.mark.parametrize(("kind", "dtype"), [(Precise, torch.float32), (Strict, torch.bfloat16)])
def test_arguments_keep_their_dtype_and_follow_a_replicas(kind: type[PlainBlock], dtype: torch.dtype) -> None:
    model = WithPositions(kind, dtype).bfloat16().eval()
    tokens = tokens_of()
    wanted = plain_inputs(model, tokens)
    for block in walk(make_job(model, tokens, batch_size=5)):
        (hidden,) = block.batches()
        assert same_bits(hidden, wanted[block.index])
        for other in (torch.float32, torch.float64):
            assert block.replica(other).forward(hidden).dtype == other


class FinishingInPlace(PlainModel):
    """Writes into the last block's output, which the recorders hand through from the first."""

    def step(self, block: nn.Module, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        output = block(hidden)
        return output.zero_() if block is self.blocks[-1] else output


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_what_the_model_does_after_its_last_block_is_its_own_affair(batch_size: int) -> None:
    model = FinishingInPlace().double().eval()
    tokens = tokens_of()
    wanted = plain_inputs(model, tokens)
    for block in walk(make_job(model, tokens, batch_size=batch_size)):
        torch.testing.assert_close(torch.cat(list(block.batches())), wanted[block.index], **EXACT)


def test_what_all_blocks_are_given_is_compared_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison has the host wait for a device."""

    def compared(depth: int) -> int:
        count = 0

        def counting(one: torch.Tensor, other: torch.Tensor) -> bool:
            nonlocal count
            count += 1
            return equal(one, other)

        monkeypatch.setattr(torch, "equal", counting)
        for block in walk(make_job(tiny(num_hidden_layers=depth), tokens_of(6))):
            list(block.batches())
            break
        return count

    equal = torch.equal
    assert 0 < compared(3) == compared(6)

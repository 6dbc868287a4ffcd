"""The walk gives every block the inputs that the model itself would give it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import (
    DEPTH,
    EXACT,
    FAMILIES,
    LENGTH,
    PlainBlock,
    PlainModel,
    changed,
    counted_calls,
    fingerprint,
    halve,
    make_job,
    masks_of,
    same_bits,
    tiny,
    tokens_of,
    traces,
    visit_all,
)
from torch import nn
from transformers import PreTrainedModel

from prunebench.errors import ContractError
from prunebench.spec import Job, Matrix, Needs
from prunebench.targets import NM, Unstructured
from prunebench.toolkit import Block, InputNorm, Statistic, keep_mask, walk, wanda_scores
from prunebench_pruners.magnitude import Magnitude
from prunebench_pruners.random import RandomPruner
from prunebench_pruners.wanda import Wanda


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def true_inputs(job: Job, index: int) -> torch.Tensor:
    """What the model as it now is gives block `index`, by its own forward over the whole set at once."""
    with torch.no_grad():
        return job.model(job.calibration, output_hidden_states=True, use_cache=False).hidden_states[index]


def matrix_inputs(job: Job, matrices: list[Matrix]) -> dict[str, torch.Tensor]:
    """What every matrix reads in the model's own forward over the whole set, [..., inputs]."""
    seen: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].detach().clone())

    handles = [matrix.module.register_forward_pre_hook(hook_for(matrix.name)) for matrix in matrices]
    with torch.no_grad():
        job.model(job.calibration, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def first_block(job: Job) -> Iterator[Block]:
    """A visit to the first block only."""
    visits = walk(job)
    yield next(visits)
    del visits


# What a block reads


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_inputs_are_those_of_the_model_with_the_earlier_blocks_pruned(family: str, batch_size: int) -> None:
    model = tiny(family, torch.float64)
    job = make_job(model, tokens_of(), batch_size=batch_size)
    for block in walk(job):
        batches = list(block.batches())
        assert [len(batch) for batch in batches] == [len(rows) for rows in job.calibration.split(batch_size)]
        torch.testing.assert_close(torch.cat(batches), true_inputs(job, block.index), **EXACT)
        outputs = torch.cat([block.forward(batch) for batch in batches])
        if block.index + 1 < DEPTH:
            torch.testing.assert_close(outputs, true_inputs(job, block.index + 1), **EXACT)
        halve(block)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_masks_given_as_numbers_are_replayed_too(family: str, batch_size: int) -> None:
    """Eager attention adds a mask of the model's dtype where SDPA takes none or a boolean one."""
    job = make_job(tiny(family, torch.float64, attn_implementation="eager"), tokens_of(), batch_size=batch_size)
    for block in walk(job):
        torch.testing.assert_close(torch.cat(list(block.batches())), true_inputs(job, block.index), **EXACT)
        halve(block)


def test_a_batch_may_be_as_large_as_a_sequence_is_long(family: str) -> None:
    """Nothing tells a batch dimension from another one of the same size but what is in it."""
    job = make_job(tiny(family, torch.float64), tokens_of(samples=LENGTH + 2), batch_size=LENGTH)
    for block in walk(job):
        torch.testing.assert_close(torch.cat(list(block.batches())), true_inputs(job, block.index), **EXACT)


@pytest.mark.parametrize("first", [1, DEPTH - 1])
def test_data_may_be_asked_for_first_at_a_later_block(family: str, first: int) -> None:
    """The blocks before it are pruned by then."""
    job = make_job(tiny(family, torch.float64), tokens_of())
    for block in walk(job):
        if block.index >= first:
            torch.testing.assert_close(torch.cat(list(block.batches())), true_inputs(job, block.index), **EXACT)
        halve(block)


def test_data_may_be_skipped_for_a_block_and_read_twice(family: str) -> None:
    job = make_job(tiny(family, torch.float64), tokens_of())
    for block in walk(job):
        if block.index != 1:
            for _ in range(2):
                torch.testing.assert_close(torch.cat(list(block.batches())), true_inputs(job, block.index), **EXACT)
        halve(block)


def test_a_forward_needs_no_data_first(family: str) -> None:
    job = make_job(tiny(family, torch.float64), tokens_of())
    hidden = true_inputs(job, 1)[:3]
    for block in walk(job):
        if block.index == 1:
            torch.testing.assert_close(block.forward(hidden), true_inputs(job, 2)[:3], **EXACT)


def test_changes_after_a_visit_come_too_late_for_the_next_block() -> None:
    """Its inputs are there when its visit begins."""
    job = make_job(tiny(dtype=torch.float64), tokens_of())
    for block in walk(job):
        if block.index == 0:
            wanted = torch.cat([block.forward(batch) for batch in block.batches()])
        if block.index == 1:
            job.anatomy.blocks[0].matrices[0].module.weight.data.zero_()
            torch.testing.assert_close(torch.cat(list(block.batches())), wanted, **EXACT)


def test_dropout_and_training_mode_do_not_reach_the_data() -> None:
    model = tiny("opt", torch.float64, dropout=0.5, attention_dropout=0.5, layerdrop=0.9).train()
    model.model.decoder.layers[1].eval()
    job = make_job(model, tokens_of())
    before = traces(model)
    found = []
    for block in walk(job):
        found.append(torch.cat(list(block.batches())))
        block.collect(InputNorm)
        assert traces(model) == before
    assert traces(model) == before
    model.eval()
    for index, inputs in enumerate(found):
        torch.testing.assert_close(inputs, true_inputs(job, index), **EXACT)


def test_a_bfloat16_model_keeps_its_dtype_and_has_float32_statistics(family: str) -> None:
    job = make_job(tiny(family, torch.bfloat16), tokens_of(), batch_size=5)
    for block in walk(job):
        hidden = torch.cat(list(block.batches()))
        assert hidden.dtype == torch.bfloat16
        # One batch of the whole set on both sides: the same operations, so the same bits.
        assert same_bits(hidden, true_inputs(job, block.index))
        read = matrix_inputs(job, block.matrices)
        for matrix, norm in block.collect(InputNorm).items():
            assert norm.dtype == torch.float32
            wanted = (read[matrix.name].double().flatten(0, -2).square().sum(dim=0) / 5).sqrt().float()
            torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
        gradients = block.gradients(lambda output: output.square().mean())
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        halve(block)


# Statistics


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_statistics_equal_the_plain_computation(family: str, batch_size: int) -> None:
    job = make_job(tiny(family, torch.float64), tokens_of(), batch_size=batch_size)
    for block in walk(job):
        read = matrix_inputs(job, block.matrices)
        norms = block.collect(InputNorm)
        assert list(norms) == block.matrices
        for matrix, norm in norms.items():
            assert norm.dtype == torch.float64
            assert norm.shape == matrix.shape[1:]
            torch.testing.assert_close(norm, (read[matrix.name].flatten(0, -2).square().sum(dim=0) / 5).sqrt(), **EXACT)
        halve(block)


@pytest.mark.parametrize("target", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_the_batch_size_changes_no_mask_in_float64(family: str, target: Any) -> None:
    found = []
    for batch_size in (1, 3, 5):
        job = make_job(tiny(family, torch.float64), tokens_of(), target=target, batch_size=batch_size)
        Wanda().prune(job)
        found.append(masks_of(job))
        assert len(found[-1]) == len(job.anatomy.matrices)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        assert all(torch.equal(mask, other[name]) for name, mask in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_batch_size_changes_statistics_in_the_last_bits_only(family: str, dtype: torch.dtype) -> None:
    """Of the first block, that is: what is read there does not depend on the batch size."""
    found = []
    for batch_size in (1, 3, 5):
        job = make_job(tiny(family, dtype), tokens_of(), batch_size=batch_size)
        with first_block(job) as block:
            norms = block.collect(InputNorm)
        read = [m for m in block.matrices if dtype == torch.float32 or m is block.matrices[0]]
        found.append([norms[matrix] for matrix in read])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=0)


class Tally(Statistic):
    """Counts what it is given, and how many of it there are."""

    made: list[Tally] = []  # noqa: RUF012 - emptied by the test that reads it

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(width, device, dtype)
        self.shapes: list[tuple[int, ...]] = []
        self.sequences: list[int] = []
        self.made.append(self)

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        assert inputs.dtype == self.dtype
        self.shapes.append(tuple(inputs.shape))
        self.sequences.append(sequences)

    def value(self) -> torch.Tensor:
        return torch.tensor(float(len(self.made)))


SIBLINGS = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gemma3": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt-neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "olmo2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi3": [["o_proj"], ["qkv_proj"], ["gate_up_proj"], ["down_proj"]],
    "falcon": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


@pytest.mark.parametrize("family", SIBLINGS)
def test_matrices_that_read_one_tensor_share_one_statistic(family: str) -> None:
    job = make_job(tiny(family), tokens_of(), batch_size=2)
    for block in walk(job):
        Tally.made.clear()
        values = block.collect(Tally)
        assert len(Tally.made) == len(SIBLINGS[family])
        for tally in Tally.made:
            assert tally.sequences == [2, 2, 1]
            assert tally.shapes == [(n * LENGTH, tally.width) for n in (2, 2, 1)]
        groups: dict[int, list[str]] = {}
        for matrix, value in values.items():
            groups.setdefault(id(value), []).append(matrix.name.split(".")[-1])
        assert list(groups.values()) == SIBLINGS[family]


def test_several_statistics_come_from_one_pass() -> None:
    job = make_job(tiny(), tokens_of(), batch_size=2)
    for block in walk(job):
        list(block.batches())
        Tally.made.clear()
        with counted_calls(block.module) as calls:
            norms, tallies, again = block.collect(InputNorm, Tally, InputNorm)
        assert calls["count"] == 3
        assert all(torch.equal(norms[matrix], again[matrix]) for matrix in block.matrices)
        assert set(tallies) == set(norms) == set(block.matrices)
        assert torch.equal(block.collect(InputNorm)[block.matrices[0]], norms[block.matrices[0]])


def test_a_matrix_that_the_forward_leaves_out_has_no_statistics() -> None:
    class Idle(PlainBlock):
        """One linear is never used."""

        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(8, 8)

    model = PlainModel(Idle)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.spare was not called"):
        visit_all(make_job(model, tokens_of()), lambda block: block.collect(InputNorm))
    assert traces(model)["blocks.0.spare"][0] == [0, 0, 0, 0]


# What a walk costs


def test_a_loop_that_asks_for_no_data_runs_no_forward(family: str) -> None:
    model = tiny(family)
    with counted_calls(*model.modules()) as calls:
        job = make_job(model, needs=Needs.WEIGHTS | Needs.SEED)
        Magnitude().prune(job)
        RandomPruner().prune(job)
    assert calls["count"] == 0
    assert len(masks_of(job)) == len(job.anatomy.matrices)


def test_wanda_runs_every_block_twice_a_batch_and_the_last_once(family: str) -> None:
    """Once for the statistics, once pruned; the one call more is the first block on one sequence while recording."""
    job = make_job(tiny(family), tokens_of(), batch_size=2)
    first, middle, last = (block.matrices[0].module for block in job.anatomy.blocks)
    with counted_calls(first) as of_first, counted_calls(middle) as of_middle, counted_calls(last) as of_last:
        Wanda().prune(job)
    assert (of_first["count"], of_middle["count"], of_last["count"]) == (7, 6, 3)


def test_statistics_end_a_forward_when_every_matrix_has_read_its_input() -> None:
    """The first batch runs to the end, to see what is called; in the later ones the last matrix need not be multiplied."""
    job = make_job(tiny(), tokens_of(), batch_size=2)
    for block in walk(job):
        list(block.batches())
        finished = {"count": 0}
        last = block.matrices[-1].module.register_forward_hook(lambda *_, seen=finished: seen.update(count=seen["count"] + 1))
        block.collect(InputNorm)
        last.remove()
        assert finished["count"] == 1


@pytest.mark.parametrize(("length", "size"), [(7, 5), (400, 2), (1024, 1), (1500, 1)])
def test_a_host_takes_no_more_tokens_at_a_time_than_pay(length: int, size: int) -> None:
    job = make_job(PlainModel().eval(), tokens_of(5, length), batch_size=5)
    with first_block(job) as block:
        assert [len(batch) for batch in block.batches()] == [size] * (5 // size) + [5 % size] * (5 % size > 0)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_matrix_that_is_called_twice_has_statistics_of_both_calls(batch_size: int) -> None:
    class Twice(PlainBlock):
        """Runs all of itself a second time."""

        def forward(self, hidden_states: torch.Tensor) -> Any:
            return self.mix(self.mix(hidden_states))

    job = make_job(PlainModel(Twice).double().eval(), tokens_of(), batch_size=batch_size)
    for block in walk(job):
        norms, (up, down) = block.collect(InputNorm), block.matrices
        first = torch.cat(list(block.batches()))
        with torch.no_grad():
            second = block.module.mix(first)
            squares = first.square().sum(dim=(0, 1)) + second.square().sum(dim=(0, 1))
            inner = sum(torch.tanh(block.module.up(hidden)).square().sum(dim=(0, 1)) for hidden in (first, second))
        calls = 2 * len(first)  # each counts as a sequence, a factor that no ranking sees
        torch.testing.assert_close(norms[up], (squares / calls).sqrt(), **EXACT)
        torch.testing.assert_close(norms[down], (inner / calls).sqrt(), **EXACT)


def test_the_head_is_not_run(family: str) -> None:
    """Logits over a whole vocabulary would be thrown away."""
    model = tiny(family)
    with counted_calls(model.get_output_embeddings()) as calls:
        Wanda().prune(make_job(model, tokens_of()))
    assert calls["count"] == 0


def test_progress_is_told_block_by_block() -> None:
    told: list[tuple[str, int, int]] = []
    job = make_job(tiny(), tokens_of())
    job.progress = lambda what, done, total: told.append((what, done, total))
    Wanda().prune(job)
    assert told == [("block", done, DEPTH) for done in range(DEPTH + 1)]


# What a walk leaves behind


def stop_by_break(job: Job) -> None:
    for block in walk(job):
        block.collect(InputNorm)
        if block.index == 1:
            break


def stop_by_error(job: Job) -> None:
    def visit(block: Block) -> None:
        block.collect(InputNorm)
        if block.index == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_all(job, visit)


def stop_inside_a_pass(job: Job) -> None:
    class Failing(InputNorm):
        """Fails with all hooks in place."""

        def add(self, inputs: torch.Tensor, sequences: int) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_all(job, lambda block: block.collect(Failing))


def stop_inside_a_loss(job: Job) -> None:
    def loss(output: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        visit_all(job, lambda block: block.gradients(loss))


def stop_while_recording(job: Job) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = job.anatomy.blocks[0].matrices[0].module.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        visit_all(job, lambda block: list(block.batches()))
    handle.remove()


def stop_with_batches_open(job: Job) -> None:
    for block in walk(job):
        next(block.batches())
        break


def to_the_end(job: Job) -> None:
    for block in walk(job):
        block.collect(InputNorm)
        block.gradients(lambda output: output.mean())


STOPS = [
    stop_by_break,
    stop_by_error,
    stop_inside_a_pass,
    stop_inside_a_loss,
    stop_while_recording,
    stop_with_batches_open,
    to_the_end,
]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: stop.__name__)
def test_however_the_loop_ends_nothing_is_left(stop: Callable[[Job], None], family: str) -> None:
    model = tiny(family)
    for module in list(model.modules())[::2]:
        module.training = True
    job = make_job(model, tokens_of())
    before, weights = traces(model), fingerprint(model)
    stop(job)
    assert traces(model) == before
    assert not changed(model, weights)
    assert torch.is_grad_enabled()


def test_a_forward_that_was_replaced_before_is_still_replaced_after() -> None:
    """As accelerate and others do, by instance attribute."""
    model = tiny(dtype=torch.float64)
    job = make_job(model, tokens_of())
    calls: list[int] = []
    block = model.model.layers[1]
    own = block.forward

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    block.forward = replaced
    wanted = true_inputs(job, 2)
    calls.clear()
    found = [torch.cat(list(visit.batches())) for visit in walk(job)]
    assert block.forward is replaced
    assert len(calls) == 3
    torch.testing.assert_close(found[2], wanted, **EXACT)


def test_nothing_is_held_while_the_body_runs() -> None:
    model = tiny()
    job = make_job(model, tokens_of())
    before = traces(model)
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            for block in walk(job):
                assert torch.is_grad_enabled() is mode
                block.collect(InputNorm)
                assert torch.is_grad_enabled() is mode
                for _ in block.batches():
                    assert torch.is_grad_enabled() is mode
                    assert traces(model) == before
                assert not torch.is_autocast_enabled("cpu")
                assert traces(model) == before
            assert torch.is_grad_enabled() is mode


def test_training_inside_the_body_does_not_reach_the_walk() -> None:
    """A body that turns gradients off and on and steps an optimiser sees tensors without history."""
    job = make_job(tiny(), tokens_of())
    for block in walk(job):
        hidden = next(block.batches())
        assert not hidden.requires_grad
        assert not block.forward(hidden).requires_grad
        for norm in block.collect(InputNorm).values():
            assert not norm.requires_grad


def test_two_walks_may_be_under_way_at_once() -> None:
    job = make_job(tiny(dtype=torch.float64), tokens_of())
    for one, other in zip(walk(job), walk(job), strict=True):
        first, second = torch.cat(list(one.batches())), torch.cat(list(other.batches()))
        assert same_bits(first, second)


def test_a_block_whose_visit_is_over_has_no_inputs() -> None:
    job = make_job(tiny(), tokens_of())
    visits = []
    for block in walk(job):
        list(block.batches())
        visits.append(block)
        if block.index:
            with pytest.raises(ContractError, match="block 0 was left"):
                list(visits[0].batches())
    for visit in visits:
        with pytest.raises(ContractError, match="closed"):
            list(visit.batches())


def test_a_block_kept_from_a_walk_without_data_has_no_inputs_either() -> None:
    job = make_job(tiny(), tokens_of())
    hidden = true_inputs(job, 0)
    visits = walk(job)
    block = next(visits)
    del visits
    for ask in (lambda: list(block.batches()), lambda: block.forward(hidden), lambda: block.collect(InputNorm)):
        with pytest.raises(ContractError, match="closed"):
            ask()


def test_calibration_must_be_declared() -> None:
    job = make_job(tiny(), tokens_of(), needs=Needs.WEIGHTS)
    with pytest.raises(ContractError, match=r"reads job\.calibration"):
        Wanda().prune(job)
    with pytest.raises(ContractError, match="no calibration text"):
        Wanda().prune(make_job(tiny()))


# Gradients and replicas


def gradients_by_sample(
    block: Block, call: tuple[tuple[Any, ...], dict[str, Any]], hidden: torch.Tensor, loss: Callable[[torch.Tensor], Any]
) -> dict[str, torch.Tensor]:
    """Of every matrix's stored parameter, [samples, ...], by torch.func on the block with the model's own arguments."""
    names = [matrix.name.removeprefix(block.name + ".") + ".weight" for matrix in block.matrices]
    held = {name: tensor.detach() for name, tensor in block.module.state_dict().items()}

    def value(weights: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(block.module, held | weights, (sample[None], *call[0]), call[1])
        return loss(output[0] if isinstance(output, tuple) else output)

    weights = {name: held[name] for name in names}
    found = [torch.func.grad(value)(weights, sample) for sample in hidden]
    return {name.removesuffix(".weight"): torch.stack([of[name] for of in found]) for name in names}


def own_call(job: Job, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model's own forward gives a block besides the hidden state, for one sequence."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = job.anatomy.blocks[index].module
    handle = module.register_forward_pre_hook(lambda _, args, named: seen.append((args[1:], named)), with_kwargs=True)
    with torch.no_grad():
        job.model(job.calibration[:1], use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("reduce", ["rms", "l1", "l2"])
def test_gradients_are_those_of_torch_func_a_sample_at_a_time(family: str, reduce: Any) -> None:
    job = make_job(tiny(family, torch.float64), tokens_of(), batch_size=3)

    def loss(output: torch.Tensor) -> torch.Tensor:
        assert output.shape[:2] == (1, LENGTH)
        return output.square().sum().sqrt()

    for block in walk(job):
        found = block.gradients(loss, reduce=reduce)
        wanted = gradients_by_sample(block, own_call(job, block.index), torch.cat(list(block.batches())), loss)
        assert list(found) == block.matrices
        for matrix, gradient in found.items():
            each = wanted[matrix.name.removeprefix(block.name + ".")]
            reduced = {
                "rms": each.square().mean(dim=0).sqrt(),
                "l1": each.abs().sum(dim=0),
                "l2": each.square().sum(dim=0).sqrt(),
            }[reduce]
            assert gradient.shape == matrix.shape
            assert not gradient.requires_grad
            torch.testing.assert_close(gradient, matrix.oriented(reduced), rtol=1e-8, atol=1e-12)
        halve(block)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_gradients_do_not_depend_on_modes_or_frozen_parameters(grad_mode: bool) -> None:
    job = make_job(tiny(dtype=torch.float64), tokens_of())
    with first_block(job) as block:
        plain = block.gradients(lambda output: output.square().mean())
    model = tiny(dtype=torch.float64).train().requires_grad_(False)
    job = make_job(model, tokens_of())
    with torch.set_grad_enabled(grad_mode), first_block(job) as block:
        found = block.gradients(lambda output: output.square().mean())
    for gradient, wanted in zip(found.values(), plain.values(), strict=True):
        assert same_bits(gradient, wanted)


def test_a_replica_is_detached(family: str) -> None:
    model = tiny(family, torch.bfloat16).requires_grad_(False)
    job = make_job(model, tokens_of(), batch_size=5)
    before, weights = traces(model), fingerprint(model)
    for block in walk(job):
        replica = block.replica()
        assert all(p.dtype == torch.float32 and p.requires_grad for p in replica.module.parameters())
        assert not {id(p) for p in replica.module.parameters()} & {id(p) for p in model.parameters()}
        (hidden,) = block.batches()
        output = replica.forward(hidden)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, block.forward(hidden).float(), rtol=0.05, atol=0.2)
        output.sum().backward()
        with torch.no_grad():
            for matrix in block.matrices:
                assert torch.equal(replica.weight(matrix), matrix.weight.float())
                assert replica.weight(matrix).shape == matrix.shape
                assert bool(replica.parameter(matrix).grad.any())
                replica.parameter(matrix).zero_()
        assert not torch.equal(replica.forward(hidden), output)
    assert traces(model) == before
    assert not changed(model, weights)


def test_a_replica_in_the_models_dtype_gives_the_blocks_outputs(family: str) -> None:
    job = make_job(tiny(family, torch.float64), tokens_of())
    for block in walk(job):
        replica = block.replica(torch.float64)
        for hidden in block.batches():
            assert same_bits(replica.forward(hidden), block.forward(hidden))
        halve(block)
        for hidden in block.batches():
            assert not torch.equal(replica.forward(hidden), block.forward(hidden))


def test_a_pruner_may_work_in_inference_mode(family: str) -> None:
    found = []
    for mode in (False, True):
        job = make_job(tiny(family), tokens_of())
        with torch.inference_mode(mode):
            Wanda().prune(job)
        found.append(masks_of(job))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def gpt2_wanda_masks(model: PreTrainedModel, tokens: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    job = make_job(model, tokens)
    for block in walk(job):
        norms = block.collect(InputNorm)
        for matrix in block.matrices:
            yield matrix.name, keep_mask(wanda_scores(matrix.weight, norms[matrix]), Unstructured(0.5), "row")


def test_wandas_rows_are_outputs_on_transposed_storage_too() -> None:
    """GPT-2: every output loses half of its inputs."""
    for name, mask in gpt2_wanda_masks(tiny("gpt2"), tokens_of()):
        assert mask.sum(dim=1).tolist() == [mask.shape[1] // 2] * mask.shape[0], name

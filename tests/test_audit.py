"""The audit: counts are exact, and whatever a step changed without saying so is found, down to one bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import tiny
from torch import nn
from transformers import PreTrainedModel

from prunebench.errors import AuditError, ContractError, NonFiniteError
from prunebench.spec import Changes
from prunebench.targets import NM, Dense, Target, Unstructured
from prunebench.toolkit.anatomy import LinearMatrix, ModelAnatomy, find_anatomy
from prunebench.toolkit.audit import Before, audit
from prunebench.toolkit.dense import DenseWeights
from prunebench.toolkit.quiet import quiet_transformers

HALF = Unstructured(0.5)
UP, DOWN, QUERY = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
ALL = Changes.MASKS | Changes.KEPT_WEIGHTS | Changes.BIASES | Changes.NORMS | Changes.HEAD


def named(anatomy: ModelAnatomy, name: str) -> LinearMatrix:
    [matrix] = [matrix for matrix in anatomy.matrices if matrix.name == name]
    return matrix


def first_columns(shape: tuple[int, int], target: Target) -> torch.Tensor:
    """A mask that removes what the target asks for: in each row, or in each group, the first entries."""
    rows, columns = shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if isinstance(target, NM):
        keep.view(rows, -1, target.of)[:, :, : target.of - target.keep] = False
    else:
        keep[:, : int(columns * target.sparsity)] = False
    return keep


def pruned(family: str = "llama", target: Target = HALF, **options: int) -> ModelAnatomy:
    """A model with exactly the target's share removed from every row or group."""
    anatomy = find_anatomy(tiny(family, **options))
    for matrix in anatomy.matrices:
        matrix.keep(first_columns(matrix.shape, target))
    return anatomy


def flip(anatomy: ModelAnatomy, name: str, row: int, column: int) -> None:
    """Remove an entry that was kept, or keep one that was removed."""
    matrix = named(anatomy, name)
    mask = anatomy.masks[name].clone()
    mask[row, column] = ~mask[row, column]
    matrix.keep(mask)


# Counts


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.7, 0.99])
def test_what_was_found_is_counted(family: str, sparsity: float) -> None:
    anatomy = pruned(family, Unstructured(sparsity))
    found = audit(anatomy, Unstructured(sparsity), "row")
    expected = {m.name: m.shape[0] * int(m.shape[1] * sparsity) for m in anatomy.matrices}
    assert {m.name: m.removed for m in found.matrices} == expected
    assert {m.name: m.zeros for m in found.matrices} == expected
    assert found.removed == found.zeros == sum(expected.values())
    assert found.extra == 0
    sizes = [m.parameter.numel() for m in anatomy.matrices]
    blocks = [block.module for block in anatomy.blocks]
    assert found.prunable_parameters == sum(sizes)
    assert found.block_parameters == sum(p.numel() for block in blocks for p in block.parameters())
    assert found.total_parameters == sum(p.numel() for p in anatomy.model.parameters())
    assert found.coverage == (sum(sizes) / found.block_parameters if sparsity else 0)


def test_coverage_is_of_matrices_from_which_something_was_removed() -> None:
    anatomy = find_anatomy(tiny())
    for matrix in anatomy.matrices:
        matrix.keep(first_columns(matrix.shape, HALF if matrix.name == UP else Unstructured(0.0)))
    share = 192 / anatomy.prunable_parameters
    target = Unstructured(math.nextafter(share, 1))
    assert audit(anatomy, target, "model").coverage == 384 / anatomy.block_parameters


@pytest.mark.parametrize(("column", "found"), [(20, 13), (3, 11)], ids=["one too many", "one too few"])
@pytest.mark.parametrize("name", [QUERY, UP, DOWN])
def test_one_entry_too_many_or_few_in_a_row(name: str, column: int, found: int) -> None:
    anatomy = pruned()
    columns = named(anatomy, name).shape[1]
    column, found = (column, found) if columns == 24 else (column // 2, found - 4)
    audit(anatomy, HALF, "row")
    flip(anatomy, name, 5, column)
    weights_follow(anatomy, name)
    with pytest.raises(AuditError) as error:
        audit(anatomy, HALF, "row")
    assert str(error.value).startswith(
        f"1 of the {named(anatomy, name).shape[0]} rows of {name} do not have exactly {columns // 2} of {columns} entries "
        f"removed (one has {found});"
    )


def weights_follow(anatomy: ModelAnatomy, name: str) -> None:
    """Give entries that were kept again a value, so that only the mask is wrong."""
    matrix = named(anatomy, name)
    matrix.write(torch.ones(matrix.shape), anatomy.masks[name])


def test_rows_are_not_made_up_by_others() -> None:
    anatomy = pruned()
    flip(anatomy, UP, 2, 0)
    flip(anatomy, UP, 7, 15)
    weights_follow(anatomy, UP)
    assert audit(anatomy, HALF, "matrix").removed == anatomy.prunable_parameters // 2
    with pytest.raises(AuditError, match=rf"^2 of the 24 rows of {UP} do not have exactly 8 of 16 entries removed"):
        audit(anatomy, HALF, "row")


@pytest.mark.parametrize(("column", "removed"), [(15, 193), (0, 191)], ids=["one too many", "one too few"])
def test_one_entry_too_many_or_few_in_a_matrix(column: int, removed: int) -> None:
    anatomy = pruned()
    flip(anatomy, UP, 2, column)
    weights_follow(anatomy, UP)
    with pytest.raises(AuditError, match=rf"^{removed} entries of {UP} are removed; 0\.5 of 384 are 192\.$"):
        audit(anatomy, HALF, "matrix")


def test_a_matrix_is_not_made_up_by_another() -> None:
    anatomy = pruned()
    flip(anatomy, UP, 2, 0)
    flip(anatomy, DOWN, 2, 20)
    weights_follow(anatomy, UP)
    with pytest.raises(AuditError, match=UP):
        audit(anatomy, HALF, "matrix")
    found = audit(anatomy, HALF, "model")
    assert {m.name: m.removed for m in found.matrices if m.removed != m.shape[0] * m.shape[1] // 2} == {UP: 191, DOWN: 193}


@pytest.mark.parametrize(("column", "change"), [(15, 1), (0, -1)], ids=["one too many", "one too few"])
def test_one_entry_too_many_or_few_in_the_model(column: int, change: int) -> None:
    anatomy = pruned()
    wanted = anatomy.prunable_parameters // 2
    flip(anatomy, UP, 2, column)
    weights_follow(anatomy, UP)
    with pytest.raises(
        AuditError, match=rf"^{wanted + change} entries of the model are removed; 0\.5 of all of them are {wanted}"
    ):
        audit(anatomy, HALF, "model")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("target", [NM(2, 4), NM(4, 8), NM(1, 4), NM(3, 4)], ids=str)
def test_groups_keep_at_most_so_many(family: str, target: NM) -> None:
    anatomy = pruned(family, target)
    assert audit(anatomy, target, "row").removed == sum(
        m.parameter.numel() // target.of * (target.of - target.keep) for m in anatomy.matrices
    )
    name = anatomy.matrices[-1].name
    flip(anatomy, name, 3, target.of)  # the first of the second group, which was removed
    weights_follow(anatomy, name)
    message = rf"^1 groups of {name} keep more than {target.keep} of {target.of} weights\.$"
    with pytest.raises(AuditError, match=message):
        audit(anatomy, target, "row")


def test_groups_may_keep_fewer() -> None:
    anatomy = pruned(target=NM(2, 4))
    flip(anatomy, UP, 3, 3)
    assert audit(anatomy, NM(2, 4), "row").removed == anatomy.prunable_parameters // 2 + 1


def test_groups_begin_at_column_0() -> None:
    """Two of every four from column 2 on; from column 0 on, all or none."""
    anatomy = find_anatomy(tiny())
    for matrix in anatomy.matrices:
        mask = torch.ones(matrix.shape, dtype=torch.bool)
        mask[:, torch.arange(matrix.shape[1]) % 8 >= 4] = False
        matrix.keep(mask)
    audit(anatomy, HALF, "row")
    audit(anatomy, NM(4, 8), "row")
    with pytest.raises(AuditError, match=rf"^32 groups of {QUERY} keep more than 2 of 4 weights"):
        audit(anatomy, NM(2, 4), "row")


def test_a_dense_model_loses_nothing() -> None:
    anatomy = find_anatomy(tiny())
    with torch.no_grad():
        named(anatomy, UP).weight[0] = 0
    found = audit(anatomy, Dense(), "row")
    assert (found.removed, found.zeros, found.extra, found.coverage) == (0, 16, 16, 0)
    flip_to = torch.ones(24, 16, dtype=torch.bool)
    flip_to[0, 0] = False
    named(anatomy, UP).keep(flip_to)
    with pytest.raises(AuditError, match=rf"^1 entries of {UP} are removed, and the target is dense"):
        audit(anatomy, Dense(), "row")


def test_a_matrix_that_was_left_out() -> None:
    anatomy = find_anatomy(tiny())
    for matrix in anatomy.matrices:
        if matrix.name != UP:
            matrix.keep(first_columns(matrix.shape, HALF))
    with torch.no_grad():
        named(anatomy, UP).weight[:, :8] = 0
    with pytest.raises(AuditError, match=rf"^{UP} has no keep mask: the method did not prune it"):
        audit(anatomy, HALF, "row")
    assert audit(find_anatomy(tiny()), Unstructured(0.0), "row").removed == 0


def test_removed_entries_must_be_zero() -> None:
    anatomy = pruned()
    with torch.no_grad():
        named(anatomy, UP).weight[3, 2] = 1e-30
        named(anatomy, UP).weight[4, 2] = -0.0
    with pytest.raises(AuditError, match=rf"^1 entries of {UP} that its mask removes are not zero in the weights"):
        audit(anatomy, HALF, "row")


def test_a_comparison_group_that_is_none() -> None:
    with pytest.raises(AuditError, match="'column' is none of row, matrix, model and columns:N"):
        audit(pruned(), HALF, "column")


@pytest.mark.parametrize("group", ["columns:", "columns:0", "columns:x", "columns:-4"])
def test_slabs_of_no_width(group: str) -> None:
    with pytest.raises(AuditError, match="names no number of columns"):
        audit(pruned(), HALF, group)


def slabs_removed(shape: tuple[int, int], width: int, target: Unstructured) -> torch.Tensor:
    """A mask that removes the target's share of every slab: its first rows, and part of one."""
    keep = torch.ones(shape, dtype=torch.bool)
    for slab in keep.split(width, dim=1):
        flat = torch.ones(slab.numel(), dtype=torch.bool)
        flat[: int(slab.numel() * target.sparsity)] = False
        slab.copy_(flat.view(slab.shape))
    return keep


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("width", [1, 7, 10, 16, 24, 128])
def test_slabs_of_columns(family: str, width: int) -> None:
    """Widths that divide the matrices, leave a narrower slab, or are wider than a matrix."""
    target = Unstructured(0.6)
    anatomy = find_anatomy(tiny(family))
    for matrix in anatomy.matrices:
        matrix.keep(slabs_removed(matrix.shape, width, target))
    found = audit(anatomy, target, f"columns:{width}")
    for matrix in found.matrices:
        rows, columns = matrix.shape
        assert matrix.removed == columns // width * int(rows * width * 0.6) + int(rows * (columns % width) * 0.6)


@pytest.mark.parametrize(
    ("row", "column", "says"),
    [
        (2, 0, rf"^79 entries of columns 0 to 9 of {DOWN} are removed; 0\.5 of 160 are 80\.$"),
        (15, 23, rf"^33 entries of columns 20 to 23 of {DOWN} are removed; 0\.5 of 64 are 32\.$"),
    ],
    ids=["one too few", "one too many in the narrow slab"],
)
def test_one_entry_too_many_or_few_in_a_slab(row: int, column: int, says: str) -> None:
    anatomy = find_anatomy(tiny())
    for matrix in anatomy.matrices:
        matrix.keep(slabs_removed(matrix.shape, 10, HALF))
    audit(anatomy, HALF, "columns:10")
    flip(anatomy, DOWN, row, column)
    weights_follow(anatomy, DOWN)
    with pytest.raises(AuditError, match=says):
        audit(anatomy, HALF, "columns:10")


def test_slabs_are_not_made_up_by_others() -> None:
    anatomy = find_anatomy(tiny())
    for matrix in anatomy.matrices:
        matrix.keep(first_columns(matrix.shape, HALF))
    assert audit(anatomy, HALF, "matrix").removed == anatomy.prunable_parameters // 2
    with pytest.raises(AuditError, match=r"^64 entries of columns 0 to 3 of .*q_proj are removed; 0\.5 of 64 are 32\.$"):
        audit(anatomy, HALF, "columns:4")


# Zeros beyond the mask, and what is no number


@pytest.mark.parametrize("extra", [16, 17])
def test_extra_zeros_up_to_a_thousandth(extra: int) -> None:
    """A matrix of 16,384 may have 16."""
    anatomy = pruned(hidden_size=64, intermediate_size=256)
    with torch.no_grad():
        named(anatomy, UP).weight[0, 32 : 32 + extra] = 0
    if extra == 17:
        with pytest.raises(AuditError, match=rf"^{UP} has 17 zeros beyond the 8192 its mask removes, more than 0\.1% of"):
            audit(anatomy, HALF, "row")
    found = audit(anatomy, HALF, "row", explained=extra == 17)
    assert (found.extra, found.zeros - found.removed) == (extra, extra)
    [matrix] = [matrix for matrix in found.matrices if matrix.extra]
    assert (matrix.name, matrix.shape, matrix.removed, matrix.zeros) == (UP, (256, 64), 8192, 8192 + extra)


def test_explained_zeros_do_not_explain_a_wrong_count() -> None:
    anatomy = pruned()
    flip(anatomy, UP, 0, 12)
    with pytest.raises(AuditError, match="rows of"):
        audit(anatomy, HALF, "row", explained=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", [HALF, Dense()], ids=str)
def test_weights_that_are_no_numbers(value: float, target: Target) -> None:
    anatomy = pruned(target=target) if target == HALF else find_anatomy(tiny())
    with torch.no_grad():
        named(anatomy, DOWN).weight[2, 20:22] = value
    with pytest.raises(NonFiniteError, match=rf"^{DOWN} holds 2 entries that are NaN or infinite"):
        audit(anatomy, target, "row", explained=True)


# Undeclared changes


@dataclass(frozen=True)
class Deed:
    """Something a step may do, and what it must declare for it; None where nothing allows it."""

    family: str
    do: Callable[[PreTrainedModel], object]
    names: str
    declares: Changes | None


def parameter(model: PreTrainedModel, name: str) -> nn.Parameter:
    return model.get_parameter(name)


def nudge(name: str, index: tuple[int, ...] = (0,)) -> Callable[[PreTrainedModel], object]:
    """Change the last bit of one entry."""

    def do(model: PreTrainedModel) -> None:
        entry = parameter(model, name).data[index]
        entry.copy_(torch.nextafter(entry, torch.tensor(math.inf)))

    return do


def negative_zero(model: PreTrainedModel) -> None:
    assert parameter(model, f"{UP}.weight")[3, 12] == 0
    parameter(model, f"{UP}.weight").data[3, 12] = -0.0


def untie(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


def tie(model: PreTrainedModel) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


def replace_norm(model: PreTrainedModel) -> None:
    norm = model.get_submodule("model.norm")
    norm.weight = nn.Parameter(norm.weight.detach().to(torch.float64))


def widen_matrix(model: PreTrainedModel) -> None:
    matrix = model.get_submodule(UP)
    matrix.weight = nn.Parameter(matrix.weight.detach().to(torch.float64))


def nudge_buffer(model: PreTrainedModel) -> None:
    model.get_buffer("model.rotary_emb.inv_freq")[1] *= 1.0001


def add_parameter(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.mlp").register_parameter("extra", nn.Parameter(torch.zeros(2)))


OPT = "model.decoder.layers.2"
DEEDS = {
    "a survivor's last bit": Deed("llama", nudge(f"{UP}.weight", (3, 9)), f"1 surviving entries of {UP}", Changes.KEPT_WEIGHTS),
    "-0.0 for 0.0": Deed("llama", negative_zero, f"1 surviving entries of {UP}", Changes.KEPT_WEIGHTS),
    "a survivor of a transposed matrix": Deed(
        "gpt2", nudge("transformer.h.1.mlp.c_fc.weight", (12, 3)), "entries of transformer.h.1.mlp.c_fc,", Changes.KEPT_WEIGHTS
    ),
    "a norm": Deed(
        "llama", nudge("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight", Changes.NORMS
    ),
    "the last norm": Deed("llama", nudge("model.norm.weight"), "model.norm.weight", Changes.NORMS),
    "a norm's dtype": Deed("llama", replace_norm, "model.norm.weight", Changes.NORMS),
    "a bias": Deed("opt", nudge(f"{OPT}.fc1.bias"), f"{OPT}.fc1.bias", Changes.BIASES),
    "a bias of GPT-2": Deed(
        "gpt2", nudge("transformer.h.0.attn.c_attn.bias"), "transformer.h.0.attn.c_attn.bias", Changes.BIASES
    ),
    "a norm's bias": Deed(
        "opt", nudge(f"{OPT}.final_layer_norm.bias"), f"{OPT}.final_layer_norm.bias", Changes.BIASES | Changes.NORMS
    ),
    "the head": Deed("llama", nudge("lm_head.weight", (5, 5)), "lm_head.weight", Changes.HEAD),
    "a matrix's dtype": Deed("llama", widen_matrix, f"{UP}.weight, which it does not declare", None),
    "the embedding": Deed("llama", nudge("model.embed_tokens.weight", (5, 5)), "model.embed_tokens.weight", None),
    "the tied embedding": Deed(
        "opt", nudge("model.decoder.embed_tokens.weight", (5, 5)), "model.decoder.embed_tokens.weight", None
    ),
    "positions": Deed("gpt2", nudge("transformer.wpe.weight", (5, 5)), "transformer.wpe.weight", None),
    "a buffer": Deed("llama", nudge_buffer, "model.rotary_emb.inv_freq", None),
    "a new parameter": Deed("llama", add_parameter, "model.layers.0.mlp.extra", None),
    "untying": Deed("opt", untie, "untied parameters", Changes.HEAD),
    "tying": Deed("llama", tie, "untied parameters that shared one tensor, or tied others", None),
}


def step(family: str) -> tuple[ModelAnatomy, Before]:
    """A model before a step, with one exact zero among those that survive it."""
    model = tiny(family)
    if family == "llama":
        parameter(model, f"{UP}.weight").data[3, 12] = 0.0
    anatomy = find_anatomy(model)
    return anatomy, Before(anatomy, DenseWeights(anatomy), survivors_changed=False)


def keep_second_half(anatomy: ModelAnatomy) -> None:
    for matrix in anatomy.matrices:
        matrix.keep(first_columns(matrix.shape, HALF))


@pytest.mark.parametrize("deed", DEEDS.values(), ids=DEEDS)
def test_an_undeclared_change_is_caught_and_a_declared_one_allowed(deed: Deed) -> None:
    anatomy, before = step(deed.family)
    keep_second_half(anatomy)
    before.check_declared(Changes.MASK_GROWS)
    before.check_masks(Changes.MASK_GROWS)
    deed.do(anatomy.model)
    others = ALL if deed.declares is None else ALL & ~deed.declares
    for declared in (Changes.MASK_GROWS, others):
        with pytest.raises(ContractError) as error:
            before.check_declared(declared)
        assert deed.names in str(error.value)
    if deed.declares is not None:
        for declared in deed.declares:
            before.check_declared(Changes.MASK_GROWS | declared)


def test_nothing_changed() -> None:
    for family in ("llama", "opt", "gpt2", "gemma3"):
        _, before = step(family)
        before.check_declared(Changes.NOTHING)
        before.check_masks(Changes.NOTHING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bit_in_any_dtype(dtype: torch.dtype) -> None:
    anatomy = find_anatomy(tiny(dtype=dtype))
    before = Before(anatomy, DenseWeights(anatomy), survivors_changed=False)
    keep_second_half(anatomy)
    before.check_declared(Changes.MASK_GROWS)
    weight = parameter(anatomy.model, f"{UP}.weight").data
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    weight.view(whole)[3, 9] ^= 1
    with pytest.raises(ContractError, match=f"1 surviving entries of {UP}"):
        before.check_declared(Changes.MASK_GROWS)


def test_every_matrix_is_compared() -> None:
    for index in range(len(find_anatomy(tiny()).matrices)):
        anatomy, before = step("llama")
        keep_second_half(anatomy)
        matrix = anatomy.matrices[index]
        nudge(f"{matrix.name}.weight", (-1, -1))(anatomy.model)
        with pytest.raises(ContractError, match=f"1 surviving entries of {matrix.name}, and does not declare KEPT_WEIGHTS"):
            before.check_declared(Changes.MASK_GROWS)


# Masks that grow and masks that move


def second_step(survivors_changed: bool = False, folder: Path | None = None) -> tuple[ModelAnatomy, Before]:
    """A model with half of every row removed, before the next step; its dense weights in memory, or in a folder."""
    model = tiny()
    if folder is not None:
        with quiet_transformers():
            model.save_pretrained(folder)
    anatomy = find_anatomy(model)
    dense = DenseWeights(anatomy, folder)
    keep_second_half(anatomy)
    if survivors_changed:
        for matrix in anatomy.matrices:
            matrix.write(matrix.weight * 1.5, anatomy.masks[matrix.name])
    return anatomy, Before(anatomy, dense, survivors_changed)


def revive(anatomy: ModelAnatomy, before: Before, value: float | None = None) -> None:
    """Bring one entry back, with its dense value or another, and remove another instead."""
    matrix, mask = named(anatomy, UP), anatomy.masks[UP].clone()
    weight = matrix.weight.clone()
    dense = before._dense.weight(matrix)
    mask[3, 2], mask[3, 9] = True, False
    weight[3, 2] = dense[3, 2] if value is None else value
    matrix.write(weight, mask)


def verdict(before: Before, changes: Changes) -> str:
    try:
        before.check_masks(changes)
        before.check_declared(changes)
    except ContractError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("survivors_changed", [False, True], ids=["dense survivors", "changed survivors"])
def test_a_step_that_does_nothing(survivors_changed: bool) -> None:
    _, before = second_step(survivors_changed)
    assert verdict(before, Changes.NOTHING) == ""


def test_after_changed_survivors_the_dense_weights_no_longer_tell() -> None:
    anatomy, _ = second_step(survivors_changed=True)
    fresh = DenseWeights(find_anatomy(tiny()))
    names = {id(module): name for name, module in anatomy.model.named_modules()}
    fresh._names = names
    assert "surviving entries" in verdict(Before(anatomy, fresh, survivors_changed=False), Changes.NOTHING)
    assert verdict(Before(anatomy, fresh, survivors_changed=True), Changes.NOTHING) == ""


@pytest.mark.parametrize("survivors_changed", [False, True], ids=["dense survivors", "changed survivors"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_mask_that_grows(survivors_changed: bool, on_disk: bool, tmp_path: Path) -> None:
    anatomy, before = second_step(survivors_changed, tmp_path if on_disk else None)
    flip(anatomy, UP, 3, 9)
    assert verdict(before, Changes.MASK_GROWS) == ""
    assert verdict(before, Changes.MASK_MOVES) == ""
    assert verdict(before, Changes.NOTHING) == f"the step changed the mask of {UP}, and does not declare to change masks."
    assert verdict(before, Changes.KEPT_WEIGHTS) == verdict(before, Changes.NOTHING)


def test_the_first_mask_must_be_declared() -> None:
    anatomy, before = step("llama")
    keep_second_half(anatomy)
    assert verdict(before, Changes.KEPT_WEIGHTS).endswith("and does not declare to change masks.")
    assert verdict(before, Changes.MASK_MOVES) == ""


@pytest.mark.parametrize("survivors_changed", [False, True], ids=["dense survivors", "changed survivors"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["in memory", "on disk"])
def test_a_mask_that_moves(survivors_changed: bool, on_disk: bool, tmp_path: Path) -> None:
    anatomy, before = second_step(survivors_changed, tmp_path if on_disk else None)
    revive(anatomy, before)
    revived = f"the step revived 1 entries of {UP}, which it does not declare."
    assert verdict(before, Changes.MASK_GROWS) == revived
    assert verdict(before, Changes.NOTHING) == revived
    assert verdict(before, Changes.KEPT_WEIGHTS) == revived
    assert verdict(before, Changes.MASK_MOVES) == ""
    assert audit(anatomy, HALF, "row").removed == anatomy.prunable_parameters // 2


@pytest.mark.parametrize("survivors_changed", [False, True], ids=["dense survivors", "changed survivors"])
def test_what_comes_back_comes_back_as_it_was_or_is_declared(survivors_changed: bool) -> None:
    anatomy, before = second_step(survivors_changed)
    revive(anatomy, before, value=0.125)
    assert f"1 surviving entries of {UP}" in verdict(before, Changes.MASK_MOVES)
    assert verdict(before, Changes.MASK_MOVES | Changes.KEPT_WEIGHTS) == ""


@pytest.mark.parametrize("survivors_changed", [False, True], ids=["dense survivors", "changed survivors"])
@pytest.mark.parametrize("changes", [Changes.MASK_GROWS, Changes.MASK_MOVES, Changes.NOTHING], ids=str)
def test_survivors_of_the_second_step(survivors_changed: bool, changes: Changes) -> None:
    anatomy, before = second_step(survivors_changed)
    nudge(f"{UP}.weight", (3, 9))(anatomy.model)
    assert verdict(before, changes) == (f"the step changed 1 surviving entries of {UP}, and does not declare KEPT_WEIGHTS.")
    assert verdict(before, changes | Changes.KEPT_WEIGHTS) == ""


def test_changed_survivors_do_not_take_back_zeros() -> None:
    """A step that trains the survivors and forgets the mask is not saved by its declaration."""
    anatomy, before = second_step()
    matrix = named(anatomy, UP)
    with torch.no_grad():
        matrix.weight.add_(0.01)
    assert verdict(before, Changes.KEPT_WEIGHTS) == ""
    with pytest.raises(AuditError, match=rf"192 entries of {UP} that its mask removes are not zero"):
        audit(anatomy, HALF, "row")


def test_three_steps() -> None:
    """Prune a quarter, retrain, prune to a half: each step is measured from where the one before left."""
    anatomy = find_anatomy(tiny())
    dense = DenseWeights(anatomy)
    quarter = Unstructured(0.25)

    before = Before(anatomy, dense, survivors_changed=False)
    for matrix in anatomy.matrices:
        matrix.keep(first_columns(matrix.shape, quarter))
    assert verdict(before, Changes.MASK_GROWS) == ""
    audit(anatomy, quarter, "row")

    before = Before(anatomy, dense, survivors_changed=False)
    for matrix in anatomy.matrices:
        matrix.write(matrix.weight + 0.5, anatomy.masks[matrix.name])
    assert "does not declare KEPT_WEIGHTS" in verdict(before, Changes.MASK_GROWS)
    assert verdict(before, Changes.KEPT_WEIGHTS) == ""
    audit(anatomy, quarter, "row")

    before = Before(anatomy, dense, survivors_changed=True)
    keep_second_half(anatomy)
    assert verdict(before, Changes.MASK_GROWS) == ""
    assert audit(anatomy, HALF, "row").removed == anatomy.prunable_parameters // 2
    nudge(f"{UP}.weight", (3, 9))(anatomy.model)
    assert "1 surviving entries" in verdict(before, Changes.MASK_GROWS)

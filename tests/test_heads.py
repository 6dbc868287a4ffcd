"""A tied head gets a weight of its own: in memory, on disk, and read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunebench.testing import FAMILIES, random_tokens, tiny_model
from prunebench.testing.trial import contents, differing, ties
from prunebench.toolkit.heads import untie_head
from prunebench.toolkit.loading import load_model, resolve_model
from prunebench.toolkit.quiet import quiet_transformers

TIED = [family for family in FAMILIES if ties(tiny_model(family))]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(model)).logits


def read_back(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    with quiet_transformers():
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)


def check_untied(model: PreTrainedModel, folder: Path) -> None:
    before, found, count = logits(model), contents(model), sum(p.numel() for p in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight.requires_grad_(False)
    assert untie_head(model)
    assert ties(model) == set()
    assert sum(p.numel() for p in model.parameters()) == count + head.weight.numel()
    assert not head.weight.requires_grad
    assert differing(found, contents(model)) == []
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        head.weight[0] += 1
    assert torch.equal(embedding.weight, found[next(n for n, p in model.named_parameters() if p is embedding.weight)])
    model.tie_weights()  # what loading and resizing call: nothing is tied again
    again = read_back(model, folder)
    assert ties(again) == set()
    assert differing(contents(model), contents(again)) == []
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), before)
    assert not untie_head(again)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_is_untied_and_stays_so_on_disk(family: str, tmp_path: Path) -> None:
    check_untied(tiny_model(family), tmp_path)


def test_a_real_tied_model(mirror: Path, tmp_path: Path) -> None:
    check_untied(load_model(resolve_model("stories260K", [Path()]), "float32"), tmp_path)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TIED])
def test_a_head_of_its_own_is_left_alone(family: str) -> None:
    model = tiny_model(family)
    before, config = contents(model), model.config.to_dict()
    assert not untie_head(model)
    assert differing(before, contents(model)) == []
    assert model.config.to_dict() == config

"""The head of a language model: the matrix that makes logits, which many models tie to their embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def untie_head(model: PreTrainedModel) -> bool:
    """Give a head that shares the embedding's weight a copy of its own, so that it can be changed alone.

    The settings say so from then on (`tie_word_embeddings`), also what transformers has derived from them, so that the saved
    model is read back untied. The copy counts as extra parameters.

    Returns:
        Whether the head was tied; where it was not, or there is none, nothing is changed.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return False
    shared: torch.Tensor = head.weight
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # the outer model's table holds those of the inner ones
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
    return True

"""Score formulas that several methods share. Float32 whatever the weights' dtype (float64 stays float64, for exact tests)."""

from __future__ import annotations

import torch

from prunebench.toolkit.phases import phase


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """`|W|`, [outputs, inputs]."""
    with phase("scoring"):
        return at_least_float32(weight.abs())


def wanda_scores(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """`|W_ij| * ||X_j||_2` (Sun et al. 2023, section 3): weight [outputs, inputs], norms [inputs] of the input features."""
    with phase("scoring"):
        return weight.abs() * at_least_float32(norms)  # of 16 bits, too, the product is in the norms' dtype


def gradient_scores(weight: torch.Tensor, norms: torch.Tensor, gradients: torch.Tensor, alpha: float) -> torch.Tensor:
    """`|W_ij| * (||X_j||_2 + alpha * G_ij)` (GBLM-Pruner, Das et al. 2023; Wanda++, Yang et al. 2025).

    Args:
        weight: [outputs, inputs].
        norms: of the input features, [inputs].
        gradients: magnitudes reduced over samples, [outputs, inputs], anywhere; they follow the weight's device.
        alpha: how much the gradients count; 0 is Wanda.
    """
    with phase("scoring"):
        dtype = at_least_float32(weight[:0]).dtype
        scores = alpha * gradients.to(weight.device, dtype)  # then in place: three tensors less of a matrix's size
        return scores.add_(at_least_float32(norms)).mul_(weight.abs())

"""2:4 zeros in the layout that torch's sparse kernels run: half of the values and their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.errors import RecipeError

#: Rows and inputs must be multiples of these for torch's kernels in 16 bits.
ROWS, INPUTS = 32, 64


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four consecutive inputs of each row are not zero, (p, q)."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())


def semi_structured(model: Any) -> list[str]:
    """Put every 2:4 weight of a model into torch's semi-structured layout, in place.

    Half of the memory of these weights, and faster products of many tokens on GPUs that have the
    kernels (NVIDIA from Ampere on).

    Args:
        model: a transformers model on a GPU, in float16 or bfloat16.

    Returns:
        paths of the layers that were put into it.

    Raises:
        RecipeError: the model is not on such a GPU, or not in 16 bits.
    """
    from torch.sparse import to_sparse_semi_structured

    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features % ROWS == 0
        and layer.in_features % INPUTS == 0
        and is_two_of_four(layer.weight)
    }
    for name, layer in found.items():
        weight = layer.weight
        if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
            short = str(weight.dtype).removeprefix("torch.")
            raise RecipeError(
                f"{name} is {short} on {weight.device.type}: torch's 2:4 kernels run in float16 or "
                "bfloat16 on an NVIDIA GPU from Ampere on; use model.half().cuda()"
            )
        layer.weight = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
    return list(found)

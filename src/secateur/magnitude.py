"""Magnitude compensation: what a removed block did to the size of the hidden state.

Each block adds to the hidden state, which grows on its way. Without one of them the blocks behind
add to a smaller state than they were made for, and count for too much. Its growth by the removed
block, g = ||h behind|| / ||h in front||, is the median over tokens. To give the state its size back
would take other embeddings and other blocks in front. Whatever reads the state divides it by its
size first, so that the same is had by making all blocks behind add 1 / g as much: their attention
and FFN outputs are scaled, and the ratio of what is added to what is there is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from secateur.methods.base import Block
from secateur.plans import BlockCut

#: The key of a block's notes under which its factor stands.
ADDS = "adds"


def growth(inputs: torch.Tensor, outputs: torch.Tensor) -> float:
    """g, the median over tokens of ||outputs|| / ||inputs||.

    Args:
        inputs, outputs: hidden states in front of a block and behind it, (windows, length, hidden).
    """
    before = inputs.float().norm(dim=-1)
    return float((outputs.float().norm(dim=-1) / before.clamp(min=1e-12)).median())


def factors(layers: Sequence[int], growths: Mapping[int, float]) -> dict[int, float]:
    """What each block that stays is to add, as a part of what it added.

    Args:
        layers: blocks that stay.
        growths: g of the blocks that went.
    """
    found = {}
    for layer in layers:
        found[layer] = 1.0
        for gone, grown in growths.items():
            if gone < layer and grown > 0:
                found[layer] /= grown
    return found


def scaled(cut: BlockCut, block: Block) -> BlockCut:
    """The cut of a block that adds :attr:`Block.factor` times what it would."""
    factor = block.factor
    inputs, scales, biases = dict(cut.inputs), dict(cut.scales), dict(cut.biases)
    weights = dict(cut.weights)
    for coupling in block.anatomy.family.couplings:
        name = coupling.consumer
        if name in weights:
            weights[name] = weights[name] * factor
        else:
            inputs.setdefault(name, torch.arange(block.anatomy.denses[name].inputs))
            scales[name] = scales.get(name, torch.ones(len(inputs[name]))) * factor
        bias = biases.get(name, block.biases.get(name))
        if bias is not None:
            biases[name] = bias.cpu() * factor
    notes = {**cut.notes, ADDS: factor}
    return replace(cut, inputs=inputs, scales=scales, weights=weights, biases=biases, notes=notes)


def said(notes: Iterable[Mapping[str, Any]]) -> str:
    """A sentence on the blocks that add less than they did; empty where none does.

    Args:
        notes: of the blocks that stay.
    """
    found = sorted({f"{own[ADDS]:.3f}" for own in notes if ADDS in own})
    if not found:
        return ""
    range_ = found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
    return (
        f"Blocks behind removed ones add {range_} times what they did to the hidden state, which "
        "the removed ones made grow."
    )

"""The cut of a block by its method, with what its solvers had to do noted, and the last step taken.

:mod:`secateur.solvers.ladder` has the steps. A solver cannot know the type that is written: here
fitted numbers that are not finite, or too large for it, give way to the original ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from secateur.magnitude import scaled
from secateur.methods import Block, Method
from secateur.plans import STEPS, BlockCut
from secateur.solvers.ladder import NO_TUNING, climbed, listening, solving_for, texts
from secateur.surveys import finite_statistics


def noting_steps(
    cut_block: Callable[..., tuple[BlockCut, torch.Tensor | None]],
) -> Callable[..., tuple[BlockCut, torch.Tensor | None]]:
    """Let the notes of the cut that a function makes say what solvers had to do meanwhile."""

    @functools.wraps(cut_block)
    def noted(*args: Any, **kwargs: Any) -> tuple[BlockCut, torch.Tensor | None]:
        with listening() as steps:
            cut, out = cut_block(*args, **kwargs)
        if steps:
            cut.notes[STEPS] = texts(steps)
        return cut, out

    return noted


def cut_by(method: Method, block: Block, quota: int, dtype: torch.dtype) -> BlockCut:
    """The method's cut of a block, on the CPU, every number in it finite in the type written.

    Args:
        quota: parameters that the block shall lose.
        dtype: of the written weights.

    Raises:
        SourceError: the block's statistics are not finite.
    """
    with finite_statistics(block.source):
        cut = method.cut(block, quota).on_cpu()
    most = torch.finfo(dtype).max
    for name, new in list(cut.weights.items()):
        if not _fits(new, most):
            with solving_for(name):
                climbed(NO_TUNING, f"fitted weights do not fit {_short(dtype)}")
            cut.weights = {**cut.weights, name: _original(block, cut, name, new)}
    for name in [n for n, scale in cut.scales.items() if not _scaled_fits(block, n, scale, most)]:
        with solving_for(name):
            climbed(NO_TUNING, f"scaled weights do not fit {_short(dtype)}")
        del cut.scales[name]
    for name in [n for n, bias in cut.biases.items() if not _fits(bias, most)]:
        with solving_for(name):
            climbed(NO_TUNING, f"a fitted bias does not fit {_short(dtype)}")
        del cut.biases[name]
    cut.notes = {key: _without_infinite(value) for key, value in cut.notes.items()}
    return cut if block.factor == 1 else scaled(cut, block)


def _fits(tensor: torch.Tensor, most: float) -> bool:
    # NaN stays NaN in both extremes, and compares as false.
    low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.sum(), tensor.sum())
    return bool(low >= -most) and bool(high <= most)


def _scaled_fits(block: Block, name: str, scale: torch.Tensor, most: float) -> bool:
    if not _fits(scale, most):
        return False
    if most > 1e38 or name not in block.weights:  # of a norm, which is no linear layer
        return True
    return float(block.weights[name].abs().max()) * float(scale.abs().max()) <= most


def _original(block: Block, cut: BlockCut, name: str, new: torch.Tensor) -> torch.Tensor:
    """The block's own weights where something stays, zero where the method has put a zero."""
    weight = block.weights[name].to(new)  # type and device
    if name in cut.rows:
        weight = weight[cut.rows[name]]
    if name in cut.inputs:
        weight = weight[:, cut.inputs[name]]
    return weight.masked_fill(new == 0, 0)


def _without_infinite(value: Any) -> Any:
    """Notes are JSON, which has no NaN: an error that could not be computed is left out."""
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if not isinstance(v, float) or math.isfinite(v)}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

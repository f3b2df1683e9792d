"""The same cut in the original model: projections of the stream instead of a smaller width.

This is the other way to compute what the written model computes; the two must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from secateur.plans import Tensors
from secateur.rotation.plan import RotationPlan
from secateur.rotation.weights import lift_block, lift_outside, rotate_block, rotate_outside
from secateur.streaming import Stream

#: What a residual becomes behind a stage: (what went into it, what came out) -> the stream.
Carry = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ProjectedOriginal(Stream):
    """The original model, its own blocks and full width, with the stream projected at every stage.

    In float32 the original weights and norms are used as they are, and x -> x Q_s Q_s^T in front of
    stage s is all that is added. A file in 16 bits holds rounded products of weights and bases; for
    those, the rounded matrices are led back to full width.

    Args:
        origin: stream of the original model.
        plan: with bases.
        dtype: of the written weights.
    """

    def __init__(self, origin: Stream, plan: RotationPlan, dtype: torch.dtype) -> None:
        super().__init__(origin.checkpoint, origin.device, origin.dtype)
        self.plan = plan
        self.rounded = None if dtype == torch.float32 else dtype
        self._last: tuple[int, Tensors, list[torch.Tensor]] | None = None
        if self.rounded is not None and plan.stream.norm_bias:
            self._make_room_for_biases()

    def _make_room_for_biases(self) -> None:
        """Biases of norms have become biases of linear layers, of which some had none."""
        layers: list[Any] = [self.model.get_submodule(self.plan.stream.reader)]
        for block in self._blocks:
            for stage in self.plan.stream.stages:
                layers += [block.get_submodule(name) for name in stage.readers]
        for layer in layers:
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.empty(layer.out_features, device="meta"))

    def _bases(self, block: int) -> list[torch.Tensor]:
        assert self.plan.bases is not None
        return self.plan.bases.of_block(block)

    def _lifted(self, index: int) -> tuple[Tensors, list[torch.Tensor]]:
        """A block as the file has it, led back to full width; the last one asked for is kept."""
        if self._last is None or self._last[0] != index:
            assert self.rounded is not None
            bases, stream = self._bases(index), self.plan.stream
            rotated = rotate_block(super().read_block(index), stream, bases, self.rounded)
            self._last = index, *lift_block(rotated, stream, bases)
        return self._last[1:]

    def read_block(self, index: int, dtype: torch.dtype | None = None) -> Tensors:
        return super().read_block(index, dtype) if self.rounded is None else self._lifted(index)[0]

    def read_outside(self, dtype: torch.dtype | None = None, *, head: bool = True) -> Tensors:
        if self.rounded is None:
            return super().read_outside(dtype, head=head)
        ends = self._bases(0)[0], self._bases(self.anatomy.layers - 1)[-1]
        stream = self.plan.stream
        rotated = rotate_outside(super().read_outside(), stream, *ends, self.rounded)
        return lift_outside(rotated, stream, *ends)

    def embed(self, tokens: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        hidden = super().embed(tokens, dtype)
        if self.rounded is not None:
            return hidden
        first = self._bases(0)[0].to(hidden)
        return hidden @ first @ first.T

    def forward_block(self, index: int, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        projected = _Projected(block, self._carries(index, hidden), self.plan)
        return super().forward_block(index, projected, hidden)

    def _carries(self, index: int, like: torch.Tensor) -> list[Carry]:
        """For each stage of a block, how the stream leaves it."""
        if self.rounded is None:
            return [partial(_project, basis.to(like)) for basis in self._bases(index)[1:]]
        return [partial(_pass_shortcut, s.to(like)) for s in self._lifted(index)[1]]


def _project(basis: torch.Tensor, _: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out @ basis @ basis.T


def _pass_shortcut(shortcut: torch.Tensor, came: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out - came + came @ shortcut


class _Projected(nn.Module):
    """A family's block; its residuals pass through ``carries`` on the way."""

    def __init__(self, block: nn.Module, carries: list[Carry], plan: RotationPlan) -> None:
        super().__init__()
        self.block = block
        self.carries = carries
        self.stages = plan.stream.stages

    def forward(self, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        with self._between_stages(hidden) as track:
            out = self.block(hidden, **context)
        out = out[0] if isinstance(out, tuple) else out
        # The block has added up residuals as they came; take their difference off.
        entered, surplus = track["entered"].reshape(out.shape), track["surplus"]
        if surplus is not None:
            out = out - surplus.reshape(out.shape)
        return self.carries[-1](entered, out)

    @contextmanager
    def _between_stages(self, hidden: torch.Tensor) -> Iterator[dict[str, Any]]:
        """Change what enters each norm but the first, and note by how much the residual is off."""
        track: dict[str, Any] = {"entered": hidden, "surplus": None}
        handles = []
        for place, stage in enumerate(self.stages[1:]):

            def hook(
                _: nn.Module, args: tuple[Any, ...], carry: Carry = self.carries[place]
            ) -> Any:
                came = args[0]
                surplus = track["surplus"]
                if surplus is not None:
                    came = came - surplus
                entered = carry(track["entered"].reshape(came.shape), came)
                track["surplus"] = args[0] - entered
                track["entered"] = entered
                return (entered, *args[1:])

            norm = self.block.get_submodule(stage.norm)
            handles.append(norm.register_forward_pre_hook(hook))
        try:
            yield track
        finally:
            for handle in handles:
                handle.remove()

"""Weights in the rotated and sliced basis of the stream, and the same led back to full width.

With Q_s, (d, d'), the basis in front of stage s, x -> x Q_s on the stream (SliceGPT, Ashkboos et
al., ICLR 2024, section 3): what reads it becomes W diag(g) Q_s, g the scale of the norm between;
what writes it Q_{s+1}^T W; a residual passes S_s = Q_s^T Q_{s+1}. LayerNorm becomes an RMSNorm once
everything that writes has its mean taken off: x (I - 1 1^T / d).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from secateur.anatomy import ResidualStream
from secateur.plans import Tensors


def rotate_block(
    state: Tensors, stream: ResidualStream, bases: Sequence[torch.Tensor], dtype: torch.dtype
) -> Tensors:
    """The tensors of a smaller block, as they go into the file.

    Args:
        state: the original block by name inside it.
        bases: in front of each stage and behind the last, (d, d') each.
        dtype: floating type to write.
    """
    out = dict(state)
    for place, stage in enumerate(stream.stages):
        before, behind = bases[place].double(), bases[place + 1].double()
        scale, shift = _norm(out, stage.norm)
        for name in stage.readers:
            out |= _read(out, name, scale, shift, before)
        for name in stage.writers:
            out |= _write(out, name, behind, stream.centred)
        # A linear layer's weight is the transpose of what rows of x are multiplied by.
        out[f"shortcuts.{place}.weight"] = behind.T @ before
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in out.items()}


def rotate_outside(
    tensors: Tensors,
    stream: ResidualStream,
    first: torch.Tensor,
    last: torch.Tensor,
    dtype: torch.dtype,
) -> Tensors:
    """Embeddings and head of the smaller model.

    Args:
        tensors: everything outside the blocks by name; a tied head is not among them.
        first, last: bases in front of the first stage and behind the last block.
    """
    out = dict(tensors)
    scale, shift = _norm(out, stream.norm)
    if stream.tied:  # one tensor until here
        out[f"{stream.reader}.weight"] = out[f"{stream.tied}.weight"]
    out |= _read(out, stream.reader, scale, shift, last.double())
    for path in stream.sources:
        if path in stream.embeddings:
            embedded = _centred(out[f"{path}.weight"].double().T, stream.centred).T
            out[f"{path}.weight"] = embedded @ first.double()
        else:
            out |= _write(out, path, first.double(), stream.centred)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in out.items()}


def lift_block(
    state: Tensors, stream: ResidualStream, bases: Sequence[torch.Tensor]
) -> tuple[Tensors, list[torch.Tensor]]:
    """A block of :func:`rotate_block` led back to full width, and its shortcuts, (d, d) each.

    Norms get the scale 1 that is left of them, so that the family's own block computes with it, in
    the original basis, what the smaller one computes in its own. All float32.
    """
    out = {name: tensor.float() for name, tensor in state.items()}
    shortcuts = []
    for place, stage in enumerate(stream.stages):
        before, behind = bases[place].float(), bases[place + 1].float()
        _lift_norm(out, stage.norm, stream)
        for name in stage.readers:
            out[f"{name}.weight"] = out[f"{name}.weight"] @ before.T
        for name in stage.writers:
            _lift_writer(out, name, behind)
        shortcuts.append(before @ out.pop(f"shortcuts.{place}.weight").T @ behind.T)
    return out, shortcuts


def lift_outside(
    tensors: Tensors, stream: ResidualStream, first: torch.Tensor, last: torch.Tensor
) -> Tensors:
    """The tensors of :func:`rotate_outside` led back to full width, float32."""
    out = {name: tensor.float() for name, tensor in tensors.items()}
    _lift_norm(out, stream.norm, stream)
    out[f"{stream.reader}.weight"] = out[f"{stream.reader}.weight"] @ last.float().T
    for path in stream.sources:
        if path in stream.embeddings:
            out[f"{path}.weight"] = out[f"{path}.weight"] @ first.float().T
        else:
            _lift_writer(out, path, first.float())
    return out


def _norm(state: Tensors, path: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and bias of a norm, float64, which go out of ``state``."""
    scale, shift = state.pop(f"{path}.weight", None), state.pop(f"{path}.bias", None)
    return (
        None if scale is None else scale.double(),
        None if shift is None else shift.double(),
    )


def _read(
    state: Tensors,
    name: str,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    basis: torch.Tensor,
) -> Tensors:
    """A linear layer behind a norm: W (g * n + b) = (W diag(g) Q) (n Q) + W b."""
    weight, bias = state[f"{name}.weight"].double(), state.get(f"{name}.bias")
    scaled = weight if scale is None else weight * scale
    made = {f"{name}.weight": scaled @ basis}
    if shift is not None:
        moved = weight @ shift
        made[f"{name}.bias"] = moved if bias is None else bias.double() + moved
    return made


def _write(state: Tensors, name: str, basis: torch.Tensor, centred: bool) -> Tensors:
    """A linear layer whose output is added to the stream: Q^T (I - 1 1^T / d) W."""
    made = {f"{name}.weight": basis.T @ _centred(state[f"{name}.weight"].double(), centred)}
    if f"{name}.bias" in state:
        made[f"{name}.bias"] = basis.T @ _centred(state[f"{name}.bias"].double(), centred)
    return made


def _centred(columns: torch.Tensor, centred: bool) -> torch.Tensor:
    """What is written, (d, ...), without its mean over d, where the norms take it off anyway."""
    return columns - columns.mean(0) if centred else columns


def _lift_norm(state: Tensors, path: str, stream: ResidualStream) -> None:
    if stream.norm_weight:
        state[f"{path}.weight"] = torch.ones(stream.width)
    if stream.norm_bias:
        state[f"{path}.bias"] = torch.zeros(stream.width)


def _lift_writer(state: Tensors, name: str, basis: torch.Tensor) -> None:
    for part in ("weight", "bias"):
        if f"{name}.{part}" in state:
            state[f"{name}.{part}"] = basis @ state[f"{name}.{part}"]

"""A block cut by its plan: sliced, as it goes into the file, or masked, in its original shapes."""

from __future__ import annotations

import torch

from secateur.plans import BlockCut, Plan, Tensors


def slice_block(state: Tensors, plan: Plan, cut: BlockCut, dtype: torch.dtype) -> Tensors:
    """The tensors of the smaller block, as they go into the file.

    Args:
        state: the original block by name inside it.
        dtype: floating type to write.

    Returns:
        weights scaled and cut, the indices of gathers and scatters, everything else as it was.
    """
    state = {**state, **{f"{name}.bias": bias for name, bias in cut.biases.items()}}
    out = {k: _cast(v, dtype) for k, v in state.items()}
    for name in cut.weights.keys() - cut.inputs.keys() - cut.rows.keys():
        out[f"{name}.weight"] = _cast(cut.weights[name], dtype)
    for name, (kept_in, full_in, kept_out, full_out) in plan.shapes(cut).items():
        weight = _scaled(state[f"{name}.weight"], cut, name)
        if name in cut.inputs:
            weight = weight[:, cut.inputs[name]]
        if name in cut.rows:
            weight = weight[cut.rows[name]]
            if f"{name}.bias" in state:
                out[f"{name}.bias"] = _cast(state[f"{name}.bias"][cut.rows[name]], dtype)
        out[f"{name}.weight"] = _cast(weight, dtype)
        if kept_in != full_in:
            out[f"{name}.in_index"] = cut.inputs[name]
        if kept_out != full_out:
            out[f"{name}.out_index"] = cut.rows[name]
    for name in plan.lengths(cut):
        out[name] = _cast(state[name][cut.rows[name]].float() * _row_scale(cut, name), dtype)
    return out


def mask_block(state: Tensors, cut: BlockCut, dtype: torch.dtype) -> Tensors:
    """The same cut as zeros and scales in the original shapes: what :func:`slice_block` must equal.

    Values pass through ``dtype`` as they would in the file and come back as float32.
    """
    state = {**state, **{f"{name}.bias": bias for name, bias in cut.biases.items()}}
    changed = {*cut.inputs, *cut.rows, *cut.weights}
    out = {
        k: _through(v, dtype)
        for k, v in state.items()
        if k not in changed and k.removesuffix(".weight") not in changed
    }
    for name in changed:
        if name in state:  # a tensor of no linear layer
            rows, scale = cut.rows[name], _row_scale(cut, name)
            out[name] = torch.zeros_like(state[name], dtype=torch.float32)
            out[name][rows] = _cast(state[name][rows].float() * scale, dtype).float() / scale
            continue
        weight = _scaled(state[f"{name}.weight"], cut, name)
        if name in cut.inputs:
            keep = torch.zeros(weight.shape[1], dtype=torch.bool)
            keep[cut.inputs[name]] = True
            weight = weight * keep
        rows = cut.rows.get(name, torch.arange(weight.shape[0]))
        if name in cut.rows:
            alive = torch.zeros(len(weight), dtype=torch.bool)
            alive[rows] = True
            weight = weight * alive[:, None]
        out[f"{name}.weight"] = _cast(weight, dtype).float()
        if name in cut.rows and f"{name}.bias" in state:
            alive = torch.zeros(len(weight), dtype=torch.bool)
            alive[rows] = True
            out[f"{name}.bias"] = out[f"{name}.bias"] * alive
    return out


def _through(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as a file of this type would give them back; the same tensor where nothing changes."""
    if not tensor.is_floating_point():
        return tensor
    back = tensor.to(dtype).to(torch.float32)
    return tensor if tensor.dtype == torch.float32 and torch.equal(tensor, back) else back


def _scaled(weight: torch.Tensor, cut: BlockCut, name: str) -> torch.Tensor:
    """W in float32, its kept columns times their scales, or replaced by new ones."""
    weight = weight.to(torch.float32)
    if name in cut.weights:
        rows = cut.rows.get(name, torch.arange(weight.shape[0]))
        inputs = cut.inputs.get(name, torch.arange(weight.shape[1]))
        weight = torch.zeros_like(weight)
        weight[rows[:, None], inputs] = cut.weights[name]
    if name in cut.scales:
        factor = torch.ones(weight.shape[1])
        factor[cut.inputs[name]] = cut.scales[name]
        weight = weight * factor
    return weight


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _row_scale(cut: BlockCut, name: str) -> torch.Tensor | float:
    """Factor of each row of a tensor of no linear layer: what a norm of fewer takes in its weight.

    It belongs to the sliced tensor alone; masked, the norm still sees all.
    """
    return cut.scales.get(name, 1.0)

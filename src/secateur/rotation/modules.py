"""What a model with a rotated and sliced hidden width is made of at run time.

Between the two marks stands the code that is shipped, word for word, as ``modeling_secateur.py``
in the folder of such a model; it may import torch and transformers only. See
:mod:`secateur.modules` for how that file is made.
"""

from __future__ import annotations

# [shipped]
from typing import Any

import torch
from torch import nn


class BareRMSNorm(nn.Module):
    """x / sqrt(|x|^2 / d + eps) with d the width before slicing; scale and bias are folded away.

    Slicing leaves |x| nearly as it was, so that the mean must still be taken over d.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = x.float()
        square = full.pow(2).sum(-1, keepdim=True) / self.width
        return (full * torch.rsqrt(square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"mean over {self.width}, eps={self.eps}"


def added(
    block: Any, stage: dict[str, Any], hidden: torch.Tensor, context: dict[str, Any]
) -> torch.Tensor:
    """What one stage of ``block`` adds to the stream ``hidden``, (..., width behind the stage).

    ``stage`` names its norm and its branches, chains of modules; the attention alone is handed
    masks, positions and the cache, which ``context`` holds.
    """
    normed = getattr(block, stage["norm"])(hidden)
    total: Any = None
    for branch in stage["branches"]:
        y = normed
        for name in branch:
            part = getattr(block, name)
            y = part(hidden_states=y, **context) if name == stage["attention"] else part(y)
            y = y[0] if isinstance(y, tuple) else y
        y = nn.functional.dropout(y, getattr(block, "dropout", 0.0), block.training)
        total = y if total is None else total + y
    return total * getattr(block, "residual_multiplier", 1.0)


class ShortcutBlock:
    """Mixed into a family's block: the stream changes its basis at every addition.

    x_out = S x + f(norm(x)), where S, the shortcut, leads from the basis and width in front of the
    stage to those behind it.
    """

    def forward(self: Any, hidden_states: torch.Tensor, **context: Any) -> torch.Tensor:
        for stage, shortcut in zip(self.stages, self.shortcuts, strict=True):
            change = added(self, stage, hidden_states, context)
            hidden_states = shortcut(hidden_states) + change
        return hidden_states


def slice_stream(model: Any, blocks_path: str, plan: dict[str, Any]) -> None:
    """Give every part of ``model`` the widths of ``plan``, the config's entry "rotation"."""
    full, kept = plan["width"], plan["kept"]
    blocks = list(model.get_submodule(blocks_path).children())
    kinds: dict[type, type] = {}
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        widths = [kept] * len(plan["stages"]) + [plan["kept_last"] if last else kept]
        shortcuts = []
        for place, stage in enumerate(plan["stages"]):
            before, behind = widths[place], widths[place + 1]
            _bare_norm(block, stage["norm"], full)
            for name in stage["readers"]:
                _resize(block.get_submodule(name), columns=before, bias=plan["biases"])
            for name in stage["writers"]:
                _resize(block.get_submodule(name), rows=behind)
            like = block.get_submodule(stage["readers"][0]).weight
            shortcuts.append(
                nn.Linear(before, behind, bias=False, device=like.device, dtype=like.dtype)
            )
        block.stages, block.shortcuts = plan["stages"], nn.ModuleList(shortcuts)
        kind = type(block)
        # By the same name, which tools that place blocks on devices go by.
        kinds.setdefault(kind, type(kind.__name__, (ShortcutBlock, kind), {}))
        block.__class__ = kinds[kind]
    for name in plan["sources"]:
        source = model.get_submodule(name)
        if isinstance(source, nn.Embedding):
            _resize(source, columns=kept)
            source.embedding_dim = kept
        else:
            _resize(source, rows=kept)
    parent, _, leaf = plan["norm"].rpartition(".")
    _bare_norm(model.get_submodule(parent), leaf, full)
    _resize(model.get_submodule(plan["reader"]), columns=plan["kept_last"], bias=plan["biases"])


def _bare_norm(owner: nn.Module, name: str, width: int) -> None:
    old = getattr(owner, name)
    eps = old.eps if hasattr(old, "eps") else old.variance_epsilon
    setattr(owner, name, BareRMSNorm(width, eps))


def _resize(
    layer: Any, rows: int | None = None, columns: int | None = None, bias: bool = False
) -> None:
    """Empty parameters of another size; ``bias`` asks for a bias also where there was none."""
    old = layer.weight
    rows, columns = rows or old.shape[0], columns or old.shape[1]
    layer.weight = nn.Parameter(torch.empty(rows, columns, device=old.device, dtype=old.dtype))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = rows, columns
        if bias or layer.bias is not None:
            layer.bias = nn.Parameter(torch.empty(rows, device=old.device, dtype=old.dtype))


# [/shipped]

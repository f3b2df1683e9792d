"""The linear layers of a whole model's decoder blocks, as plain ``nn.Linear`` to train on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy
from secateur.modules import SlicedLinear


class Placed(nn.Module):
    """A :class:`SlicedLinear` taken apart: what it gathers, a plain linear layer, where it writes.

    Args:
        sliced: the layer as the folder has it; its parameters are shared, not copied.
    """

    def __init__(self, sliced: SlicedLinear) -> None:
        super().__init__()
        rows, inputs = sliced.weight.shape
        self.linear = nn.Linear(inputs, rows, bias=sliced.bias is not None, device="meta")
        self.linear.weight = sliced.weight
        self.linear.register_parameter("bias", sliced.bias)
        self.in_index, self.out_index = sliced.in_index, sliced.out_index
        self.out_features = sliced.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.in_index is not None:
            x = x.index_select(-1, self.in_index)
        y = self.linear(x)
        if self.out_index is not None:
            full = y.new_zeros(*y.shape[:-1], self.out_features)
            y = full.index_copy(-1, self.out_index, y)
        return y


def open_linears(model: Any, anatomy: Anatomy) -> dict[str, nn.Linear]:
    """The decoder's linear layers by number of block and path, such as ``3.mlp.up_proj``.

    Layers that read or write through an index are replaced in ``model`` by :class:`Placed`. Layers
    whose weights the model reads without calling them (``dt_proj`` of Mamba) are left out: an
    adapter there would do nothing.
    """
    blocks = model.get_submodule(anatomy.family.blocks)
    found: dict[str, nn.Linear] = {}
    for number, block in enumerate(blocks.children()):
        for path in anatomy.denses:
            layer = block.get_submodule(path)
            if hasattr(layer, "in_index"):
                placed = Placed(layer)
                put(block, path, placed)
                found[f"{number}.{path}.linear"] = placed.linear
            else:
                found[f"{number}.{path}"] = layer
    called = _called(model, found)
    return {name: layer for name, layer in found.items() if name in called}


def _called(model: Any, layers: dict[str, nn.Linear]) -> set[str]:
    """Names of the layers that take part as modules when the model runs."""
    seen: set[str] = set()
    hooks = [
        layer.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        for name, layer in layers.items()
    ]
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=next(iter(layers.values())).weight.device)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def put(owner: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, leaf = path.rpartition(".")
    setattr(owner.get_submodule(parent), leaf, layer)


def stored_name(anatomy: Anatomy, name: str) -> str:
    """The name in the folder of the weight of a layer that :func:`open_linears` found."""
    return f"{anatomy.family.blocks}.{name.removesuffix('.linear')}.weight"

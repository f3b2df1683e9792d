"""LoRA through peft: adapters on every linear layer of the blocks, merged at the end.

Hu et al., "LoRA", ICLR 2022: y = W x + s B A x with A (r, q) random and B (p, r) zero, so that
training starts at the pruned model; merged, W' = W + s B A.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.recovery.linears import open_linears
from secateur.recovery.settings import SCALING, HealSettings

ADAPTER = "default"


def require_peft() -> None:
    """Raises:
    RecipeError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise RecipeError(
            "--method lora needs the package peft, which is not installed: pip install "
            "'secateur[heal]', or use --method groupwise"
        )


class Lora:
    """Adapters on the decoder's linear layers; see :class:`~secateur.recovery.healing.Adapters`."""

    def __init__(self, model: Any, anatomy: Anatomy, settings: HealSettings) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        linears = open_linears(model, anatomy)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=SCALING * settings.rank,
            target_modules=list(linears),
            lora_dropout=0.0,
        )
        # Into the list of blocks, not the model: peft would refuse layers by the model's type that
        # fused kernels of its family may pass by; the layers here have been seen taking part.
        blocks = model.get_submodule(anatomy.family.blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(config, blocks, ADAPTER)
        self._layers = {name: blocks.get_submodule(name) for name in linears}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, layer in self._layers.items():
            for side in ("lora_A", "lora_B"):
                part: Any = getattr(layer, side)[ADAPTER]
                # Adapters stay float32 whatever the model runs in: their steps are small.
                part.weight = nn.Parameter(part.weight.detach().float())
                self.parameters[f"{name}.{side}"] = part.weight

    def merged(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """W + s B A in float32, (p, q)."""
        layer: Any = self._layers[name]
        return stored.float() + layer.get_delta_weight(ADAPTER).detach().float().cpu()

    @property
    def names(self) -> list[str]:
        return list(self._layers)

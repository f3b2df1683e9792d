"""ShortGPT (Men et al., arXiv 2403.03853): whole blocks that change the stream least go.

``docs/shortgpt.md`` has the equations, our readings, and what was measured.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.methods.registry import register
from secateur.methods.whole_blocks import WholeBlocks


class ShortGptOptions(BaseModel):
    """Settings of ShortGPT."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    order: Literal["one-shot", "iterative"] = Field(
        "one-shot",
        description="importances taken once from the whole model (the paper), or again on the "
        "shortened model after each removal",
    )
    distance: Literal["cosine", "angular"] = Field(
        "cosine", description="1 - E cos (the paper), or E arccos(cos) / pi"
    )
    compensate: bool = Field(
        False,
        description="blocks behind a removed one add as much less to the hidden state as that made "
        "it grow (not in the paper)",
    )


@register
class ShortGpt(WholeBlocks):
    """See the module and ``docs/shortgpt.md``."""

    name = "shortgpt"
    summary = "whole blocks that change the stream least, by block influence"
    Options = ShortGptOptions
    options: ShortGptOptions

    @property
    def looks_again(self) -> bool:
        return self.options.order == "iterative"

    @property
    def compensates(self) -> bool:
        return self.options.compensate

    def layer_importance(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        """BI_l = 1 - E_t cos(x_t^l, x_t^{l+1}), or the mean angle between them over pi."""
        if self.options.distance == "cosine":
            return super().layer_importance(inputs, outputs)
        cosine = torch.nn.functional.cosine_similarity(inputs.double(), outputs.double(), dim=-1)
        return float(cosine.clamp(-1, 1).arccos().mean()) / math.pi

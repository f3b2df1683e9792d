"""SLEB (Song et al., arXiv 2402.09025): the block whose removal raises the loss least goes, again
and again.

``docs/sleb.md`` has the equations, our readings, and what was measured. The search itself, which
runs the model, is :func:`secateur.layers.by_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.methods.registry import register
from secateur.methods.whole_blocks import WholeBlocks


class SlebOptions(BaseModel):
    """Settings of SLEB."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exempt_first: int = Field(1, ge=0, description="first blocks that stay")
    exempt_last: int = Field(1, ge=0, description="last blocks that stay")


@register
class Sleb(WholeBlocks):
    """See the module and ``docs/sleb.md``."""

    name = "sleb"
    summary = "whole blocks without which the loss on the calibration text rises least"
    Options = SlebOptions
    options: SlebOptions
    ranking: ClassVar[Literal["influence", "loss"] | None] = "loss"

    def candidates(self, layers: Sequence[int]) -> Sequence[int]:
        return layers[self.options.exempt_first : max(0, len(layers) - self.options.exempt_last)]

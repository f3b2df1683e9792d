"""SliceGPT (Ashkboos et al., ICLR 2024): hidden width rotated to its principal directions, sliced.

Equations, our readings and what each was measured to do stand in ``docs/slicegpt.md``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.methods.registry import register
from secateur.methods.rotating import Rotating
from secateur.solvers.principal import principal_directions, second_moment


class SliceGptOptions(BaseModel):
    """Settings of SliceGPT."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    multiple: int = Field(
        8, ge=1, description="the kept width is rounded down to a multiple of this"
    )
    signal: Literal["stream", "normed"] = Field(
        "stream",
        description="what principal directions are taken of: the stream in front of each norm (the "
        "authors' program), or the same behind it (the paper's letter), all tokens alike",
    )
    head: Literal["sliced", "whole"] = Field(
        "sliced", description="width that the head reads: sliced as all others, or the full one"
    )


@register
class SliceGpt(Rotating):
    """See the module and ``docs/slicegpt.md``."""

    name = "slicegpt"
    summary = "hidden width rotated to its principal directions and sliced, shortcuts on residuals"
    Options = SliceGptOptions
    options: SliceGptOptions

    @property
    def multiple(self) -> int:
        return self.options.multiple

    @property
    def slices_head(self) -> bool:
        return self.options.head == "sliced"

    def basis(
        self, hidden: torch.Tensor, kept: int, *, centred: bool
    ) -> tuple[torch.Tensor, float]:
        """Q = the first d' eigenvectors of C = sum_i X_i^T X_i (section 3.3)."""
        second = second_moment(hidden, alike=self.options.signal == "normed")
        values, vectors = principal_directions(second, centred=centred)
        total = float(values.sum())
        held = float(values[:kept].sum()) / total if total > 0 else 1.0
        return vectors[:, :kept].float(), held

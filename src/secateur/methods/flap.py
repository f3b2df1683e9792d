"""FLAP (An et al., AAAI 2024, arXiv 2312.11983): units whose outputs hardly move go, and a bias
puts out in their place what they put out on average.

``docs/flap.md`` has the equations, our readings where the paper is silent or its code differs, and
what was measured.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.scored import Scored, ScoredOptions, Scores, by_unit
from secateur.plans import BlockCut
from secateur.solvers.pooling import standardised


class FlapOptions(ScoredOptions):
    """Settings of FLAP."""

    metric: Literal["WIFV", "IFV", "WIFN"] = Field(
        "WIFV",
        description="score of a channel: its variance times the norm of its weights, its variance, "
        "or the size of its weights times its norm",
    )
    shares: Literal["AL-AM", "UL-UM"] = Field(
        "AL-AM",
        description="AL-AM: scores standardised in each layer, then one order of the heads and "
        "neurons of all blocks; UL-UM: the same share of each block",
    )
    square_heads: bool = Field(
        True, description="square the score of attention channels, as the authors' code does"
    )
    bias: bool | Literal["auto"] = Field(
        "auto",
        description="make up for what went with a bias of the attention output and the FFN's last "
        "layer; auto: where the output can hold one",
    )


@register
class Flap(Scored):
    """See the module and ``docs/flap.md``."""

    name = "flap"
    summary = "heads and neurons that fluctuate least, all blocks ranked together, with a new bias"
    Options = FlapOptions
    options: FlapOptions
    same_shares = "UL-UM"
    needs: ClassVar[Literal["moments", "channels"]] = "channels"

    @property
    def pooled(self) -> bool:
        return self.options.shares == "AL-AM"

    # ---- which outputs can be made up for ------------------------------------------------------

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        lacking = self._lacking(anatomy)
        if self.options.bias is True and lacking:
            raise RecipeError(
                f"bias is true, but {' and '.join(lacking)} can have no bias here: "
                f"{self.form.no_biases}; use --set bias=auto to do without"
            )

    def notes(self, anatomy: Anatomy) -> list[str]:
        lacking = self._lacking(anatomy)
        if self.options.bias != "auto" or not lacking:
            return []
        return [f"no new bias in {' and '.join(lacking)}: {self.form.no_biases}"]

    def _lacking(self, anatomy: Anatomy) -> list[str]:
        """Layers that would need a bias which the output cannot hold."""
        dense = anatomy.denses
        return [n for n in self._denses(anatomy) if self.form.no_biases and not dense[n].bias]

    def _compensated(self, anatomy: Anatomy, name: str) -> bool:
        return self.options.bias is not False and name not in self._lacking(anatomy)

    def extra(self, anatomy: Anatomy, name: str) -> int:
        dense = anatomy.denses[name]
        return dense.rows if self._compensated(anatomy, name) and not dense.bias else 0

    # ---- scores --------------------------------------------------------------------------------

    def scores(self, block: Block) -> Scores:
        """Of each KV group, through all its query heads, and of each neuron."""
        anatomy, found = block.anatomy, {}
        for name in self._denses(anatomy):
            channels, width = self._channel_scores(block, name), self._unit_width(anatomy, name)
            if anatomy.denses[name].reads == "heads" and self.options.square_heads:
                channels = channels.square()
            if self.pooled:
                channels = standardised(channels)
            found[name] = by_unit(channels, width) / width
        return found

    def _channel_scores(self, block: Block, name: str) -> torch.Tensor:
        """One of the paper's three metrics of each input j of a layer, (q,), float64.

        WIFV: Var(x_j) ||W_:j||^2. IFV: Var(x_j). WIFN: mean_i |W_ij| ||x_j||.
        """
        weight = block.weights[name].double()
        channels = block.channels[block.anatomy.denses[name].reads]
        if self.options.metric == "IFV":
            return channels.variance
        if self.options.metric == "WIFV":
            return channels.variance * weight.square().sum(0)
        return weight.abs().mean(0) * channels.norm

    def finish(self, block: Block, cut: BlockCut) -> None:
        """b' = b + W_:P E[x_P] for the removed inputs P."""
        for name in self._denses(block.anatomy):
            kept = cut.inputs.get(name)
            if kept is None or not self._compensated(block.anatomy, name):
                continue
            mean = block.channels[block.anatomy.denses[name].reads].mean.clone()
            mean[kept] = 0
            bias = block.weights[name].double() @ mean
            if name in block.biases:
                bias += block.biases[name]
            cut.biases[name] = bias.to(torch.float32)

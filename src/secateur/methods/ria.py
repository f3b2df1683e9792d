"""RIA (Zhang et al., ICLR 2024): relative importance and activations, with channel permutation.

Equations and our readings stand in ``docs/ria.md``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy, Coupling
from secateur.methods.base import Block
from secateur.methods.registry import register
from secateur.methods.sparse import SparseMethod, SparseOptions
from secateur.plans import BlockCut
from secateur.solvers.permutation import assign, deal


class RiaOptions(SparseOptions):
    """Settings of RIA."""

    power: float = Field(0.5, ge=0, description="of the input norm, a in the paper")
    compete: Literal["layer", "row"] = Field(
        "layer", description="weights compete in the whole layer, or in their row"
    )
    permute: Literal["assign", "deal", "none"] = Field(
        "assign",
        description="N:M: put FFN neurons, and dimensions inside heads, in an order whose groups "
        "mix strong and weak inputs: by linear sum assignment, dealt out alone, or not at all",
    )


@register
class Ria(SparseMethod):
    """See the module."""

    name = "ria"
    summary = "zeros by relative importance and activations; N:M in a better order of inputs"
    Options = RiaOptions
    options: RiaOptions

    needs = "channels"

    def scores(self, weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||_2^a, (p, q) float32."""
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny
        relative = size / size.sum(0).clamp(min=tiny) + size / size.sum(1, True).clamp(min=tiny)
        return relative * squares.to(size.dtype).pow(self.options.power / 2)

    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        return self.zeroed(weight, self.scores(weight, self.squares(block, name)), count)

    # ---- channel permutation -----------------------------------------------------------------

    def cut(self, block: Block, quota: int) -> BlockCut:
        """As every sparse method; with N:M first in a better order of the inputs of some layers.

        Only of inputs that rows of another layer of the block make: these rows follow, so that
        the block computes what it did, and nothing has to be gathered at run time.
        """
        orders = self._orders(block) if self.pattern.grouped else {}
        inputs = {c.consumer: orders[c.consumer] for c in self._couplings(block.anatomy, orders)}
        weights = {n: w[:, inputs[n]] if n in inputs else w for n, w in block.weights.items()}
        channels = dict(block.channels)
        for name, order in inputs.items():
            reads = block.anatomy.denses[name].reads
            channels[reads] = channels[reads].of(order)
        cut = super().cut(replace(block, weights=weights, channels=channels), quota)
        made = dict(cut.weights)
        for coupling in self._couplings(block.anatomy, orders):
            for producer in coupling.producers:
                rows = orders[producer]
                made[producer] = made.get(producer, block.weights[producer])[rows]
                if producer in block.biases:
                    cut.biases[producer] = block.biases[producer][rows]
        cut.weights = made
        return cut

    def _couplings(self, anatomy: Anatomy, orders: dict[str, torch.Tensor]) -> list[Coupling]:
        return [c for c in anatomy.family.couplings if c.consumer in orders]

    def _orders(self, block: Block) -> dict[str, torch.Tensor]:
        """Orders of the inputs of consumers and of the rows of their producers."""
        anatomy, found = block.anatomy, {}
        if self.options.permute == "none":
            return {}
        for coupling in anatomy.family.couplings:
            name = coupling.consumer
            if coupling.layout or coupling.tensors or coupling.readers:
                continue  # more would have to follow than rows of the producers
            if name not in self.layers(anatomy) or anatomy.denses[name].reads not in block.channels:
                continue
            scores = self.scores(block.weights[name], self.squares(block, name))
            if coupling.kind == "neurons":
                rows = columns = self._order(scores)
            elif anatomy.head_size % self.pattern.group == 0:
                columns, rows = self._inside_heads(scores, anatomy)
            else:
                continue  # groups would reach over heads
            found[name] = columns
            found |= dict.fromkeys(coupling.producers, rows)
        return found

    def _order(self, scores: torch.Tensor) -> torch.Tensor:
        pattern = self.pattern
        order = deal(scores, pattern.group)
        if self.options.permute == "assign":
            order = assign(scores, pattern.kept, pattern.group, order)
        return order

    def _inside_heads(
        self, scores: torch.Tensor, anatomy: Anatomy
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One order of dimensions for the heads of each KV group, whose values they share.

        Returns:
            order of the attention output's inputs, and of the value rows.
        """
        size, heads = anatomy.head_size, anatomy.heads_per_group
        by_head = scores.view(len(scores), anatomy.kv_heads, heads, size)
        columns, rows = [], []
        for group in range(anatomy.kv_heads):
            order = self._order(by_head[:, group].reshape(-1, size))
            rows.append(group * size + order)
            columns += [(group * heads + head) * size + order for head in range(heads)]
        return torch.cat(columns), torch.cat(rows)

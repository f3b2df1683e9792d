"""SAAP (Zheng et al., arXiv 2412.15127), OUR READING: the text of the paper was not at hand.

What is known of it: two scores of each coupled structure, fused under homoscedastic uncertainty,
and a search over all structures at once that removes unstable ones. The indicator of instability
and how it meets the importance are ours. The defaults are what measures best, not what is nearest
to the abstract: that is ``recipes/saap-abstract.yaml``. ``docs/saap.md`` says which is which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field

from secateur.methods.base import Block
from secateur.methods.by_gradient import ByGradient, GradientOptions
from secateur.methods.registry import register
from secateur.methods.scored import Scores
from secateur.methods.units import members
from secateur.solvers.fusion import (
    TINY,
    fluctuation,
    fused,
    learned_variances,
    noise,
    variances,
)
from secateur.solvers.pooling import standardised
from secateur.solvers.taylor import GradientSums, loss_change, of_sums, over_units


class SaapOptions(GradientOptions):
    """Settings of SAAP as we read it."""

    order: Literal["second", "mixed"] = Field(
        "second",
        description="of the Taylor series: the second term alone, or both as LLM-Pruner's "
        "param_mix, of which the first is nearly all",
    )
    fusion: Literal["adaptive", "coarse", "fine", "sum", "product"] = Field(
        "adaptive", description="of the two scores of a unit: adaptive is the paper's"
    )
    sigma: Literal["model", "module", "layer", "group"] = Field(
        "module",
        description="which units share the noise of adaptive fusion: all, those of one kind, those "
        "of one kind in one block, or none",
    )
    fit: Literal["measured", "closed", "learned"] = Field(
        "measured",
        description="the noise: as the score fluctuates over windows; where the sum of the fused "
        "scores is least, in closed form; or by gradient descent to the same end",
    )
    fluctuation: Literal["penalty", "alone", "off"] = Field(
        "off",
        description="penalty: importance less fluctuation over windows, both standardised in each "
        "layer; alone: what fluctuates most goes; off: importance alone, as it is",
    )
    shares: Literal["uniform", "global"] = Field(
        "uniform", description="the same share of each block, or one order over all"
    )


@register
class Saap(ByGradient):
    """See the module."""

    name = "saap"
    summary = "our reading of SAAP: coarse and fine gradient scores fused, less their fluctuation"
    Options = SaapOptions
    options: SaapOptions

    @property
    def pooled(self) -> bool:
        return self.options.shares == "global"

    def scores(self, block: Block) -> Scores:
        """Coarse and fine score of each unit, of all windows and of each, (2, 1 + windows, units).

        Over the layers that a unit is made of, coarse is the sum of |sum of c| and fine that of sum
        of |c|, with c = W g - W^2 F / 2 of each weight: of one window, g is its own gradient and F
        = g^2; of all, g and F are means. By the second order alone, coarse is the sum of (sum of W
        g)^2 and fine that of sum of (W g)^2; of all windows, these are the means over them.
        """
        if self.options.order == "second":
            each = [self._both(block, gradient, None) for gradient in block.gradients]
            whole = {name: torch.stack([own[name] for own in each]).mean(0) for name in each[0]}
        else:
            each, whole = self._mixed(block)
        return {name: torch.stack([own, *(one[name] for one in each)], 1).cpu()
                for name, own in whole.items()}  # fmt: skip

    def _mixed(self, block: Block) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Both scores by both orders, of each window and of all; gradients come once."""
        each: list[dict[str, torch.Tensor]] = []

        def watched() -> Iterator[dict[str, torch.Tensor]]:
            for gradient in block.gradients:
                each.append(self._both(block, gradient, {n: g * g for n, g in gradient.items()}))
                yield gradient

        sums = GradientSums.of(watched(), squares=True)
        whole = self._both(
            block,
            {name: g / sums.calls for name, g in sums.total.items()},
            {name: f / sums.calls for name, f in sums.squares.items()},
        )
        return each, whole

    def _both(
        self,
        block: Block,
        gradient: Mapping[str, torch.Tensor],
        fisher: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """Coarse and fine score of each unit by layer, (2, units); without F, by second order."""
        found = {}
        for name in self._denses(block.anatomy):
            coarse, fine = [], []
            for part in members(block.anatomy, name):
                weight, g = block.weights[part.path], gradient[part.path]
                if fisher is None:
                    first = loss_change(weight, g, None, "first")
                    coarse.append(of_sums(first, part.axis, part.width).square())
                    fine.append(over_units(first.square(), part.axis, part.width, vector=False))
                else:
                    change = loss_change(weight, g, fisher[part.path], "mixed")
                    coarse.append(of_sums(change, part.axis, part.width))
                    fine.append(over_units(change, part.axis, part.width, vector=False))
            found[name] = torch.stack([torch.stack(coarse).sum(0), torch.stack(fine).sum(0)])
        return found

    # ---- one score out of two ------------------------------------------------------------------

    def ranked(self, surveys: Mapping[int, Any]) -> dict[int, Scores]:
        """Importance as it is; less fluctuation, or that alone, each standardised in its layer."""
        shared = self._noise(surveys)
        found: dict[int, Scores] = {}
        for layer, survey in surveys.items():
            found[layer] = {}
            for name, scores in survey.items():
                variance = shared[layer, name]
                ranks = self._fused(scores[:, 0], variance)
                if self.options.fluctuation != "off":
                    unstable = standardised(fluctuation(self._of_windows(scores[:, 1:], variance)))
                    alone = self.options.fluctuation == "alone"
                    ranks = -unstable if alone else standardised(ranks) - unstable
                found[layer][name] = ranks
        return found

    def _noise(self, surveys: Mapping[int, Any]) -> dict[tuple[int, str], torch.Tensor]:
        """s1^2 and s2^2 of each layer's units, (2,), or (2, units) where each has its own.

        A unit that shares with nobody has nothing to be measured by: the closed form.
        """
        options = self.options
        shared: dict[tuple[int | str, ...], list[torch.Tensor]] = {}
        keys: dict[tuple[int, str], tuple[int | str, ...]] = {}
        for layer, survey in surveys.items():
            for name, scores in survey.items():
                own = (layer, name)
                scopes = {"model": (), "module": (name,), "layer": own, "group": own}
                keys[own] = scopes[options.sigma]
                shared.setdefault(keys[own], []).append(scores)
        if options.sigma == "group":
            return {key: shared[keys[key]][0][:, 0].clamp_min(TINY) for key in keys}
        solved = {}
        for scope, parts in shared.items():
            units = torch.cat(parts, -1)
            solve = learned_variances if options.fit == "learned" else variances
            solved[scope] = solve(units[:, 0])
            if options.fit == "measured":
                solved[scope] = (solved[scope] * noise(units[:, 1:])).clamp_min(TINY)
        return {key: solved[scope] for key, scope in keys.items()}

    def _fused(self, scores: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """One score of each unit from its two, (2, units)."""
        kind = self.options.fusion
        if kind == "adaptive":
            return fused(scores, variance)
        coarse, fine = scores
        alone = {"coarse": coarse, "fine": fine, "sum": coarse + fine, "product": coarse * fine}
        return alone[kind]

    def _of_windows(self, scores: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        """The same of each window, (2, windows, units) to (windows, units), none below 0.

        The logarithm of the noise, which is the same for all windows, stays out: a variation
        relative to a mean needs a scale that begins at 0.
        """
        if self.options.fusion == "adaptive":
            return (scores / (2 * variance.reshape(2, 1, -1))).sum(0)
        return torch.stack([self._fused(both, variance) for both in scores.unbind(1)])

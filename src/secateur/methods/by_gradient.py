"""What methods share that score units by gradients of the loss: one pass back, then the choice.

Gradients are there in the survey alone, so the units that go are named for all blocks at once
(:attr:`~secateur.methods.base.Share.units`) and the pass that cuts needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.methods.base import Share, Shares, SurveyBy
from secateur.methods.scored import Scored, ScoredOptions, Scores, lowest_units
from secateur.methods.units import Exempt, check_members, not_exempt

#: First and last blocks that LLM-Pruner spares of 32.
EXEMPT = (4, 2)


class GradientOptions(ScoredOptions):
    """Settings that methods with gradients have in common."""

    exempt_first: Exempt = Field(
        "auto", description="first blocks that lose nothing; auto: 4 of 32, fewer of few"
    )
    exempt_last: Exempt = Field(
        "auto", description="last blocks that lose nothing; auto: 2 of 32, fewer of few"
    )


class ByGradient(Scored):
    """See the module."""

    options: GradientOptions

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        check_members(anatomy, f"method {self.name}", "use --method obs")

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        return "gradients"

    def signals(self, anatomy: Anatomy) -> set[str]:
        return set()  # of the pass that cuts

    def surveyed(self, layers: Sequence[int]) -> Sequence[int]:
        """The blocks that are not exempt; where all must have one width, none is."""
        if self.form.uniform:
            return layers
        return not_exempt(layers, self.options, EXEMPT, len(layers))

    def ranked(self, surveys: Mapping[int, Any]) -> dict[int, Scores]:
        """Scores of the units of each block from what was remembered of all."""
        return dict(surveys)

    def chosen(self, survey: Any, scores: Scores, name: str, count: int) -> torch.Tensor:
        """The ``count`` units of a block's layer that go, ascending; those with the lowest scores.

        Args:
            survey: what was remembered of the block.
            scores: of its units.
        """
        return lowest_units(scores[name], count)

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Any],
        total: int,
    ) -> Shares:
        """Numbers as for all methods with scores, and the units by name."""
        open_ = self.surveyed(layers)
        scores = self.ranked({layer: surveys[layer] for layer in open_})
        shares = super().allocate(anatomy, open_, importances, scores, total)
        for layer, share in shares.items():
            units = {
                name: self.chosen(
                    surveys[layer], scores[layer], name, lost // self._unit_width(anatomy, name)
                ).tolist()
                for name, lost in share.inputs.items()
            }
            shares[layer] = replace(share, units=units)
        return {layer: shares.get(layer, Share(0)) for layer in layers}

    def _ways_out(self) -> list[str]:
        none = self.form.uniform or (self.options.exempt_first, self.options.exempt_last) == (0, 0)
        more = [] if none else ["set exempt_first and exempt_last"]
        return [*super()._ways_out(), *more]

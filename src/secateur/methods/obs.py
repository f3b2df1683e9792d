"""Structured Optimal Brain Surgeon with a refit that is never worse than none.

Units go greedily by what their removal costs once all others have made up for it; what is kept is
then fitted in closed form, pulled to the original weights as strongly as windows that were kept out
of the fit ask for. ``docs/obs.md`` has the equations, the choices and what each is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.finite import all_finite
from secateur.methods.base import Block, Shares, SurveyBy
from secateur.methods.by_gradient import EXEMPT as BY_GRADIENTS
from secateur.methods.registry import register
from secateur.methods.scored import Scores
from secateur.methods.structured import Structured, StructuredOptions, short
from secateur.methods.units import Exempt, check_members, exempt, has_members, members
from secateur.neurons import Neurons, parts_of
from secateur.plans import BlockCut
from secateur.solvers import brain_surgeon, gauss_newton, refit
from secateur.solvers.brain_surgeon import GreedyOrder
from secateur.solvers.gauss_newton import NeuronFit
from secateur.solvers.inverses import inverse_from
from secateur.solvers.ladder import solving_for
from secateur.solvers.refit import PULLS, chosen_pull, fitted_weights, relative_error
from secateur.solvers.taylor import over_units
from secateur.statistics import are_few

#: Tokens that the model writes itself where nothing is said; more were no better (docs/obs.md).
WRITTEN_TOKENS = 8_192
#: It does where its blocks are at most this large in float32: writing takes all of them at once.
SMALL = 2**30
#: Calibration tokens beyond which copies are not worth their time, and most copies that auto makes.
ENOUGH_TOKENS = 12_000
MOST_COPIES = 8
#: Most copies that auto makes beside windows that the model writes.
COPIES_BESIDE = 4
#: Inputs of a layer above which auto makes no more copies than leave its tokens few
#: (:attr:`Moments.rows`): inverses of the second moment would take ten times what its weight does.
WIDE = 4096
#: Tokens from which auto fits the layers that make neurons, and rounds of it; calibration tokens
#: from which it asks gradients too, and their part in the order.
MANY_TOKENS = 30_000
ROUNDS = 2
GRADIENTS = 0.5


class ObsOptions(StructuredOptions):
    """Settings of structured OBS."""

    inputs: Literal["identical", "sequential"] = Field(
        "sequential", description="statistics from the cut prefix, or from the uncut model"
    )
    choice_damping: float = Field(
        0.01, gt=0, description="damping of H where units are chosen, of mean diag H"
    )
    refit: bool = Field(True, description="fit the kept weights in closed form")
    pull: float | Literal["auto"] = Field(
        "auto",
        description="pull of fitted weights to the original, of mean diag H; auto: the best on "
        "windows kept out of the fit",
    )
    copies: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="copies of the calibration windows with tokens that the model drew anew, to "
        "fit to as well; auto: as many as make 12,000 tokens of it, at most 8, or 4 beside written "
        "windows; where a layer has more than 4,096 inputs, no more than half as many tokens",
    )
    written: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="windows that the model writes itself, to fit to as well; auto: 8,192 tokens "
        "of them where calibration text is short and the blocks are below 1 GiB in float32, since "
        "all must be in memory",
    )
    tokens: Literal["relative", "alike"] = Field(
        "relative",
        description="what a token weighs in choice and fit: by the size of the hidden state that "
        "the layer's output is added to, or all the same",
    )
    gradients: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="part of gradients of the loss in the order of units, which takes one pass "
        "back through the uncut model; 0: none; auto: 0.5 from 30,000 tokens of calibration text "
        "on where the blocks are below 1 GiB in float32",
    )
    groups: Annotated[int, Field(ge=1)] | Literal["auto", "keep"] = Field(
        "auto",
        description="KV groups that each cut block keeps; auto: all where three quarters of "
        "the neurons are enough, else by the common threshold, and with layout uniform as many as "
        "the FFN's width allows; keep: all",
    )
    shares: Literal["auto", "importance", "uniform"] = Field(  # type: ignore[assignment]
        "auto",
        description="share of each block: by 1/importance (COMP's Eq. 10), or the same; auto: the "
        "same where gradients take part",
    )
    exempt_first: Exempt = Field(
        "auto",
        description="first blocks that lose no inputs; auto: 2 of 32, 4 where gradients take part, "
        "fewer of few",
    )
    exempt_last: Exempt = Field(
        "auto",
        description="last blocks that lose no inputs; auto: 1 of 32, 2 where gradients take part, "
        "none of few",
    )
    rounds: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="rounds in which the layers that make the neurons are fitted too; auto: 2 from "
        "30,000 tokens on where the blocks are below 1 GiB in float32, which takes as long again",
    )
    steps: int = Field(256, ge=8, description="steps of the greedy removal in each layer")


@register
class Obs(Structured):
    """See the module and ``docs/obs.md``."""

    name = "obs"
    summary = "heads and neurons by Optimal Brain Surgeon, kept weights fitted in closed form"
    Options = ObsOptions
    options: ObsOptions

    #: Share of the windows whose statistics are also kept apart, to judge fits by.
    held_out = 0.3
    #: Share of the tokens that each copy of the calibration windows draws anew.
    resampled = 0.2

    def check(self, anatomy: Anatomy) -> None:
        super().check(anatomy)
        if self.form.structure == "inputs":
            raise RecipeError(
                "method obs removes whole units, not inputs of single layers: use --structure "
                "coupled, or --method comp"
            )
        if self.options.rounds not in (0, "auto") and parts_of(anatomy) is None:
            raise RecipeError(
                f"rounds is {self.options.rounds}, but blocks of {anatomy.model_type} do not end "
                "with an FFN of their own: leave it out, or set it to 0"
            )
        if self.options.gradients not in (0, "auto"):
            check_members(anatomy, "--set gradients", "leave it out")

    def _heads_lost(self, anatomy: Anatomy, quota: int) -> int | None:
        """None where three quarters of the neurons are enough: a threshold takes heads too soon."""
        kinds = anatomy.consumers("values", "neurons")
        if self.options.groups == "auto" and not self.form.uniform and len(kinds) == 2:
            neurons = kinds[1]
            quarter = torch.arange(anatomy.denses[neurons].inputs // 4)
            if quota <= self._removed(anatomy, {neurons: quarter}):
                return 0
        return super()._heads_lost(anatomy, quota)

    def copies(self, anatomy: Anatomy, windows: int, length: int) -> int:
        if not self.options.refit:
            return 0
        if self.options.copies != "auto":
            return int(self.options.copies)
        written = self.written(anatomy, windows, length)
        wanted = min(COPIES_BESIDE if written else MOST_COPIES, self._lacking(windows, length))
        signals = self.signals(anatomy)
        widest = max((d.inputs for d in anatomy.denses.values() if d.reads in signals), default=0)

        def few(copies: int) -> bool:
            return are_few(self.windows_seen(windows, copies, written) * length, widest)

        if widest <= WIDE or not few(0):
            return wanted
        return max(copies for copies in range(wanted + 1) if few(copies))

    def chains_copies(self, anatomy: Anatomy) -> bool:
        return is_small(anatomy)

    def written(self, anatomy: Anatomy, windows: int, length: int) -> int:
        if not self.options.refit:
            return 0
        if self.options.written == "auto":
            small = is_small(anatomy)
            lacking = bool(self._lacking(windows, length))
            return WRITTEN_TOKENS // length if small and lacking else 0
        return int(self.options.written)

    def _lacking(self, windows: int, length: int) -> int:
        """How many times the calibration text would have to be there once more."""
        return max(0, ENOUGH_TOKENS // (windows * length) - 1)

    def rounds(self, anatomy: Anatomy, tokens: int) -> int:
        """Rounds of :class:`NeuronFit` with so many tokens."""
        if not self.options.refit or parts_of(anatomy) is None:
            return 0
        if self.options.rounds != "auto":
            return int(self.options.rounds)
        return ROUNDS if is_small(anatomy) and tokens >= MANY_TOKENS else 0

    def fits_neurons(self, anatomy: Anatomy, tokens: int) -> bool:
        return self.rounds(anatomy, tokens) > 0

    def followed(self) -> Obs:
        if self.options.rounds not in (0, "auto"):
            raise RecipeError(
                f"rounds is {self.options.rounds}, but --then needs the neurons that stay as they "
                "were: leave it out, or set it to 0"
            )
        return Obs(self.options.model_copy(update={"rounds": 0}), self.form)

    def cut(self, block: Block, quota: int) -> BlockCut:
        cut = super().cut(block, quota)
        if block.neurons is not None:
            self._fit_neurons(block, block.neurons, cut)
        return cut

    def _fit_neurons(self, block: Block, neurons: Neurons, cut: BlockCut) -> None:
        """New weights of the layers that make neurons and of the one that reads them."""
        name, parts = neurons.parts.consumer, neurons.parts
        pull = cut.notes.get("pull", {}).get(name)
        if pull is None:  # nothing went, or no fit was better than none
            return
        with solving_for(name):
            weights = {path: block.weights[path] for path in parts.changed}
            fit = NeuronFit(neurons, weights, block.biases, cut.inputs[name], cut.rows, pull)
            found = fit.run(self.rounds(block.anatomy, len(neurons.inputs)))
        cut.notes["rounds"] = 0 if found is None else found.rounds
        if found is not None:
            cut.notes["error"][name] = short(found.error)
            new = {**found.producers, name: found.reader.to(torch.float32)}
            cut.weights = {**cut.weights, **new}

    def signals(self, anatomy: Anatomy) -> set[str]:
        """Also those of layers that read the same units, which are fitted too."""
        found = super().signals(anatomy)
        if self.options.refit:
            for coupling in anatomy.family.couplings:
                if anatomy.denses[coupling.consumer].reads in found:
                    found |= {anatomy.denses[name].reads for name in coupling.readers}
        return found

    def solving(self, anatomy: Anatomy, tokens: int) -> float:
        """With a factor for every pull that is tried, and the fit and its error, in float64."""
        found = super().solving(anatomy, tokens)
        if not self.options.refit:
            return found
        pulls = len(PULLS) if self.options.pull == "auto" else 1
        for name in self._denses(anatomy):
            rows, width = anatomy.denses[name].rows, anatomy.denses[name].inputs
            size = min(tokens, width)
            found += 2 * (pulls * size**3 / 3 + 6 * rows * width * size)
        if rounds := self.rounds(anatomy, tokens):
            found += gauss_newton.work(*self._ffn(anatomy), tokens, rounds)
        return found

    def layer_bytes(self, rows: int, inputs: int, tokens: int) -> int:
        """Of few tokens no matrix of all inputs is made."""
        if not are_few(tokens, inputs):
            return super().layer_bytes(rows, inputs, tokens)
        order = brain_surgeon.bytes_of_few(rows, inputs, tokens)
        return max(order, self.options.refit * refit.bytes_of_few(rows, inputs, tokens))

    def held(self, anatomy: Anatomy, tokens: int) -> int:
        if not self.rounds(anatomy, tokens):
            return 0
        return gauss_newton.held(*self._ffn(anatomy), tokens)

    def _ffn(self, anatomy: Anatomy) -> tuple[int, int, int]:
        """Hidden size, producers and neurons of the uncut FFN."""
        parts = parts_of(anatomy)
        assert parts is not None
        consumer = anatomy.denses[parts.consumer]
        made = sum(anatomy.denses[name].rows for name in parts.producers)
        return consumer.rows, made // consumer.inputs, consumer.inputs

    # ---- what the loss says of units -----------------------------------------------------------

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        asked = self.options.gradients
        if asked == "auto":
            asked = is_small(anatomy) and tokens >= MANY_TOKENS and has_members(anatomy)
        return "gradients" if asked else None

    @property
    def gradients_held(self) -> int:
        """Those of a window, and what is made of those of one layer."""
        return 2

    def survey(self, block: Block) -> Scores:
        """f of each unit: the mean over windows of the sum over its weights of (W g)^2, (units,).

        That is what the loss changes by as Fisher's information has it, all weights alone.
        """
        found: dict[str, torch.Tensor] = {}
        windows = 0
        for gradient in block.gradients:
            windows += 1
            for name in self._denses(block.anatomy):
                parts = [
                    over_units(
                        (block.weights[m.path] * gradient[m.path]).square(),
                        m.axis, m.width, vector=False,
                    )
                    for m in members(block.anatomy, name)
                ]  # fmt: skip
                own = torch.stack(parts).sum(0)
                found[name] = found[name] + own if name in found else own
        if not all(all_finite(total) for total in found.values()):
            raise ArithmeticError("gradients of its weights are not finite")
        return {name: total / windows for name, total in found.items()}

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Scores],
        total: int,
    ) -> Shares:
        """What gradients say goes to the cut of each block, and both ends are left to others.

        There gradients mislead, and blocks that all lose the same do best beside them.
        """
        if not surveys:
            return super().allocate(anatomy, layers, importances, surveys, total)
        try:
            shares = super(Obs, self._alike(anatomy)).allocate(
                anatomy, layers, importances, surveys, total
            )
        except RecipeError:  # so much only goes with the blocks that this spares
            shares = super().allocate(anatomy, layers, importances, surveys, total)
        for layer, survey in surveys.items():
            # Six digits: as they come back from the journal.
            scores = {name: [short(f) for f in own.tolist()] for name, own in survey.items()}
            shares[layer] = replace(shares[layer], scores=scores)
        return shares

    def _alike(self, anatomy: Anatomy) -> Obs:
        """The same with blocks alike but for those at both ends, where nothing else is said."""
        options, depth = self.options, anatomy.layers
        settled = {
            "shares": "uniform" if options.shares == "auto" else options.shares,
            "exempt_first": exempt(options.exempt_first, BY_GRADIENTS[0], depth),
            "exempt_last": exempt(options.exempt_last, BY_GRADIENTS[1], depth),
        }
        return Obs(options.model_copy(update=settled), self.form)

    def relative(self, anatomy: Anatomy) -> set[str]:
        if self.options.tokens == "alike":
            return set()
        return {anatomy.denses[coupling.consumer].reads for coupling in anatomy.family.couplings}

    def removal(self, block: Block, name: str, unit: int) -> RefitRemoval:
        return RefitRemoval(block, name, unit, self.options)

    def finish_reader(self, block: Block, cut: BlockCut, name: str) -> None:
        if self.options.refit:
            Fit(block, name, self.options).finish(cut, name)


def is_small(anatomy: Anatomy) -> bool:
    """Whether all blocks may be in memory at once, or much beside one of them."""
    return 4 * anatomy.decoder_parameters <= SMALL


class Fit:
    """The fit of the inputs that one layer keeps."""

    def __init__(self, block: Block, name: str, options: ObsOptions) -> None:
        reads = block.anatomy.denses[name].reads
        self._weights, self._name = block.weights, name
        self._all = block.moments[reads]
        self._apart = block.held_out[reads]
        self._options = options

    def finish(self, cut: BlockCut, name: str) -> None:
        """New weights of the kept inputs, or the original ones where no fit is better."""
        kept, weight, seen = cut.inputs[name], self._weights[self._name], self._all
        pull: float | None = None
        if self._options.refit:
            pull = self._options.pull if self._options.pull != "auto" else self._best(weight, kept)
        new = weight[:, kept] if pull is None else fitted_weights(weight, seen, kept, pull)
        cut.notes["error"][name] = short(relative_error(weight, seen, kept, new))
        if pull is not None:
            cut.weights = {**cut.weights, name: new.to(torch.float32)}
            cut.notes.setdefault("pull", {})[name] = pull

    def _best(self, weight: torch.Tensor, kept: torch.Tensor) -> float | None:
        rest = self._all.less(self._apart)
        return chosen_pull(weight, rest, self._apart, kept)


class RefitRemoval:
    """Units of one layer in greedy order, and the fit of what is kept."""

    def __init__(self, block: Block, name: str, unit: int, options: ObsOptions) -> None:
        self._fit = Fit(block, name, options)
        scores = block.scores.get(name)
        self._order = GreedyOrder(
            block.weights[name],
            inverse_from(block.moments[block.anatomy.denses[name].reads], options.choice_damping),
            unit=unit,
            steps=options.steps,
            scores=None if scores is None else torch.tensor(scores, dtype=torch.float64),
            part=GRADIENTS if options.gradients == "auto" else options.gradients,
        )

    def kept(self, removed: int) -> torch.Tensor:
        return self._order.kept(removed)

    def cost(self, removed: int) -> float:
        return self._order.error(removed)

    def finish(self, removed: int, cut: BlockCut, name: str) -> None:
        """See :meth:`Fit.finish`. The order's matrices go first: they are larger than the fit's."""
        del self._order
        self._fit.finish(cut, name)

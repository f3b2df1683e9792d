"""What a method is: options, the share of each block, and a pure step for one block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel

from secateur.anatomy import Anatomy
from secateur.forms import Form
from secateur.neurons import Neurons
from secateur.plans import BlockCut
from secateur.solvers.budget import in_units
from secateur.statistics import SOLVER_MATRICES, Channels, Moments, moments_work

Quotas = dict[int, int]
SurveyBy = Literal["statistics", "gradients"]


@dataclass(frozen=True)
class Share:
    """What one block shall lose.

    Attributes:
        parameters: together.
        inputs: numbers of inputs by linear layer, where the method fixes them for all blocks at
            once (:meth:`Method.allocate`); else it is for the cut of the block to find them. Of a
            sparse method, numbers of weights.
        units: the units themselves that go, KV groups or neurons by linear layer, where the method
            knows them from its survey.
        scores: what the survey says of each unit by linear layer, where the cut of the block
            decides by that and by what it sees itself.
        factor: what the block is to add to the hidden state, as a part of what it added
            (:mod:`secateur.magnitude`).
    """

    parameters: int
    inputs: dict[str, int] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    factor: float = 1.0


Shares = dict[int, Share]


@dataclass(frozen=True)
class Block:
    """What a method sees of a block.

    Attributes:
        source: its number in the original model.
        anatomy: of the model.
        weights: weight of each linear layer by path, (p, q), float32; of a large block read from
            the source each time one is asked for (:mod:`secateur.rereading`).
        moments: statistics of each signal that the method asked for.
        generator: for methods that draw; seeded from the recipe's seed and the block's number.
        held_out: the same of the windows that a method keeps apart (:attr:`Method.held_out`); they
            are in ``moments`` too.
        channels: the statistics in place of ``moments`` for methods that need no more.
        biases: bias of each linear layer that has one, (p,), float32.
        lose: inputs to lose by linear layer, where :class:`Share` says.
        units: units to lose by linear layer, where :class:`Share` names them.
        scores: of units by linear layer, where :class:`Share` has them.
        factor: of what the block adds to the hidden state (:class:`Share`).
        gradients: of the loss by the weight of each linear layer, (p, q), call after call, in a
            survey by gradients (:attr:`Method.survey_by`). Each can be looked at once.
        prepared: what :meth:`Method.prepare` said of the block, where it was asked first.
        influence: how much the uncut block changes the hidden state
            (:meth:`Method.layer_importance`), in a survey by statistics that runs the blocks.
        neurons: what went into the FFN, where the method asked (:meth:`Method.fits_neurons`).
    """

    source: int
    anatomy: Anatomy
    weights: Mapping[str, torch.Tensor]
    moments: dict[str, Moments]
    generator: torch.Generator
    held_out: dict[str, Moments] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    lose: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, Sequence[int]] = field(default_factory=dict)
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    factor: float = 1.0
    gradients: Iterator[dict[str, torch.Tensor]] = field(default_factory=lambda: iter(()))
    prepared: Any = None
    influence: float = 1.0
    neurons: Neurons | None = None


class AnyMethod(ABC):
    """A pruning method. It never opens a file, moves a device or prints.

    Attributes:
        name: what the user types.
        summary: one line for ``--help`` and the docs.
        Options: pydantic model of its own settings.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    Options: ClassVar[type[BaseModel]]
    #: Whether it makes weights zero and removes nothing; parameters to be lost are weights then.
    makes_zeros: ClassVar[bool] = False

    def __init__(self, options: BaseModel, form: Form) -> None:
        self.options: Any = options
        self.form = form

    def check(self, anatomy: Anatomy) -> None:  # noqa: B027, most have nothing to refuse
        """Refuse options that this model cannot have, before any work is done.

        Raises:
            RecipeError: with what is allowed.
        """

    def notes(self, anatomy: Anatomy) -> list[str]:
        """What the user should know before the work begins, a line each."""
        return []


class Method(AnyMethod):
    """A method that removes whole blocks, or units inside each block by itself."""

    #: Share of the windows whose statistics a method also wants apart, to judge fits by.
    held_out: ClassVar[float] = 0.0
    #: Share of the tokens that copies of the calibration windows draw anew (:meth:`copies`).
    resampled: ClassVar[float] = 0.0
    #: What whole blocks are ranked by: what goes in and comes out of each
    #: (:meth:`layer_importance`), or the loss of the model without it. None: all blocks stay.
    ranking: ClassVar[Literal["influence", "loss"] | None] = "influence"
    #: Statistics of the signals: second moments, or mean, variance and norm of each channel.
    needs: ClassVar[Literal["moments", "channels"]] = "moments"
    #: Whether anything goes inside blocks.
    cuts_inside: ClassVar[bool] = True

    @property
    def survey_needs(self) -> Literal["moments", "channels"]:
        """The statistics that a survey looks at, where it looks at any."""
        return self.needs

    def followed(self) -> Method:
        """The method as it works in front of another, which reads the same statistics.

        Raises:
            RecipeError: it is asked for something that makes them wrong.
        """
        return self

    def layer_counts(self, worth: float) -> Sequence[int]:
        """Numbers of whole blocks to try removing; one means: no choice.

        Args:
            worth: blocks that the parameters to be removed make.

        Raises:
            RecipeError: a number that the options name does not go with that.
        """
        return (0,)

    @property
    def looks_again(self) -> bool:
        """Whether blocks are ranked anew, on the shortened model, after each removal."""
        return True

    def candidates(self, layers: Sequence[int]) -> Sequence[int]:
        """Which of the blocks that are left may go next."""
        return layers

    def layer_importance(self, inputs: torch.Tensor, outputs: torch.Tensor) -> float:
        """Importance of a block from what goes in and comes out, (windows, length, hidden).

        1 - E_t cos(x_t^l, x_t^{l+1}): ShortGPT's block influence, COMP's Eq. 3.
        """
        cosine = torch.nn.functional.cosine_similarity(inputs, outputs, dim=-1)
        return 1 - float(cosine.double().mean())

    def copies(self, anatomy: Anatomy, windows: int, length: int) -> int:
        """Resampled copies of the calibration windows that statistics are taken from as well."""
        return 0

    def chains_copies(self, anatomy: Anatomy) -> bool:
        """Whether each copy starts from the one before, which takes a pass over the model each."""
        return True

    def written(self, anatomy: Anatomy, windows: int, length: int) -> int:
        """Windows that the model writes itself, from which statistics are taken as well."""
        return 0

    def windows_seen(self, windows: int, copies: int, written: int) -> int:
        """Windows that statistics are taken from: those that are kept apart are not copied."""
        return windows + copies * (windows - self.windows_apart(windows)) + written

    def windows_apart(self, windows: int) -> int:
        """Windows at the end that are kept apart (:attr:`held_out`)."""
        return math.ceil(self.held_out * windows)

    def fits_neurons(self, anatomy: Anatomy, tokens: int) -> bool:
        """Whether layers that make neurons get new weights, for which the FFN's inputs are kept.

        Args:
            tokens: that statistics are taken from.
        """
        return False

    def signals(self, anatomy: Anatomy) -> set[str]:
        """Signals of which statistics are needed; none need no run of the model."""
        return set()

    def solving(self, anatomy: Anatomy, tokens: int) -> float:
        """Operations that cut one block, its run aside, for the estimate of time.

        Counted as float32 products: twice as many where they are done in float64. By default what
        statistics take, and factor and inverse of every second moment.
        """
        if self.needs != "moments":
            return 0.0
        signals = self.signals(anatomy)
        widths = {d.reads: d.inputs for d in anatomy.denses.values() if d.reads in signals}
        return sum(moments_work(width, tokens) for width in widths.values())

    def solver_bytes(self, anatomy: Anatomy, tokens: int) -> int:
        """Bytes that solving one layer takes at most, beside its weight and statistics.

        For the estimate. Layers are solved one after the other, so that it is those of one.
        """
        if self.needs != "moments":
            return 0
        signals = self.signals(anatomy)
        read = [dense for dense in anatomy.denses.values() if dense.reads in signals]
        return max((self.layer_bytes(d.rows, d.inputs, tokens) for d in read), default=0)

    def layer_bytes(self, rows: int, inputs: int, tokens: int) -> int:
        """:meth:`solver_bytes` of a layer (p, q): by default of what makes q x q matrices."""
        return SOLVER_MATRICES * 8 * inputs**2

    def held(self, anatomy: Anatomy, tokens: int) -> int:
        """Bytes of activations that the cut of a block holds beside statistics, for the estimate.

        Args:
            tokens: that statistics are taken from.
        """
        return 0

    def relative(self, anatomy: Anatomy) -> set[str]:
        """Signals whose tokens count by :func:`secateur.statistics.relative_to`."""
        return set()

    def stages(self, anatomy: Anatomy) -> list[set[str]]:
        """Signals in groups whose readers are cut one group after the other, in order of the data.

        Statistics of a group see the block with the groups before it cut. By default there are
        none: one look at the whole block is enough.
        """
        return []

    def quotas(self, anatomy: Anatomy, importances: dict[int, float], total: int) -> Quotas:
        """Parameters that remaining blocks shall lose, ``total`` together; none by default.

        Raises:
            RecipeError: the blocks cannot lose that much.
        """
        return {}

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        """Whether every block is surveyed, uncut, before it is known what each shall lose.

        Args:
            tokens: of the calibration text.

        Returns:
            what the survey sees of a block: statistics of its signals, or gradients of its weights
            (:attr:`Block.gradients`), for which the loss of the uncut model is passed back once.
            None: there is no survey.
        """
        return None

    @property
    def compensates(self) -> bool:
        """Whether blocks behind a removed one add as much less as it made the state grow."""
        return False

    def surveyed(self, layers: Sequence[int]) -> Sequence[int]:
        """Which of the blocks that are left the survey looks at."""
        return layers

    @property
    def gradients_held(self) -> int:
        """How many times a block's gradients are in memory at once during a survey by them.

        Those of a call, their sum and the sum of their squares; fewer where a survey keeps less.
        """
        return 3

    @property
    def windows_per_gradient(self) -> int | None:
        """In a survey by gradients: windows whose gradients come as one sum; None: as many as fit.

        The gradient is that of each window's mean loss per token, summed over the windows.
        """
        return 1

    def survey(self, block: Block) -> Any:
        """What to remember of a block until :meth:`allocate`; small, since all are kept at once."""

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Any],
        total: int,
    ) -> Shares:
        """What each of the blocks that are left shall lose; by default, as :meth:`quotas` say.

        Args:
            layers: blocks that are left.
            importances: of the layer stage, where it ranks.
            surveys: answers of :meth:`survey` by block, where there is one (:meth:`survey_by`).
            total: parameters that all together shall lose.

        Raises:
            RecipeError: the blocks cannot lose that much.
        """
        exact = self.quotas(anatomy, importances, total)
        if not self.carries:  # which keeps the total; equal parts in units may all be off
            exact = in_units(exact, self.unit(anatomy))
        return {layer: Share(exact.get(layer, 0)) for layer in layers}

    def unit(self, anatomy: Anatomy) -> int:
        """Parameters of the smallest piece that can go; quotas are made multiples of it."""
        return 1

    @property
    def carries(self) -> bool:
        """Whether a block's miss of its quota is made up for by the next: pieces of two sizes."""
        return False

    @property
    def cuts_every_block(self) -> bool:
        """Whether blocks that shall lose nothing are cut too, and so need statistics."""
        return False

    def prepare(self, block: Block) -> Any:
        """The part of :meth:`cut` that does not depend on the quota, for :attr:`Block.prepared`.

        Blocks that are worked on side by side get this far by themselves, also where each has to
        wait for the miss of the one before it (:attr:`carries`).
        """

    @abstractmethod
    def cut(self, block: Block, quota: int) -> BlockCut:
        """Choose what stays of one block so that ``quota`` parameters go."""

    @property
    def identical_inputs(self) -> bool:
        """Whether statistics come from the uncut model rather than from the cut prefix."""
        return True

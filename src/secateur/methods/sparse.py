"""What methods share that make zeros: how many where, in which order, in which layers.

The model keeps its size: a zero takes as much memory as any other weight. What zeros are good for
stands in ``docs/apt.md``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from secateur.anatomy import Anatomy
from secateur.errors import RecipeError
from secateur.methods.base import Block, Method, Share, Shares, SurveyBy
from secateur.plans import BlockCut
from secateur.solvers.ladder import solving_for
from secateur.solvers.patterns import (
    lowest,
    lowest_in_groups,
    lowest_in_rows,
)
from secateur.solvers.removal import relative_error
from secateur.solvers.sparsity_budget import by_error, by_outliers, error_curve, outlier_ratio
from secateur.sparsity import Pattern, check_groups

#: Said wherever someone might take zeros for less memory.
SAME_SIZE = (
    "zeros take as much memory as other weights: the model keeps its size, and runs faster only "
    "where a kernel knows the pattern"
)


Allocation = Literal["uniform", "error", "owl"]
#: How far layers go from the mean where nothing is said.
SPREADS: dict[Allocation, float] = {"error": 0.15, "owl": 0.08}


class SparseOptions(BaseModel):
    """Settings that all methods which make zeros have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    leave: list[str] = Field(
        default_factory=list, description="linear layers of a block that stay dense, by path"
    )
    scope: Literal["block", "sublayer", "layer"] = Field(
        "sublayer",
        description="how far a cut is seen by the statistics of what follows: from block to block, "
        "from attention to FFN as well, or from every layer to the next",
    )
    allocation: Allocation | Literal["auto"] = Field(
        "auto",
        description="sparsity of layers: all the same; where it costs the least error; less of it "
        "in blocks with more outliers (OWL); auto: the method's own, uniform but for apt (error)",
    )
    spread: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        "auto",
        description="a layer's sparsity is off the mean by this at most; auto: 0.15 (error) or "
        "0.08 (owl, as its paper), but no more than half the way to 0% or 100%",
    )
    outlier: float = Field(
        5.0, gt=0, description="OWL: an outlier's score is above this many times the mean"
    )


class SparseMethod(Method):
    """A method that keeps all shapes and makes weights zero."""

    makes_zeros: ClassVar[bool] = True
    #: How a share is shared out among layers where nothing else is asked for and possible.
    own_allocation: ClassVar[Allocation] = "uniform"
    ranking = None
    cuts_inside = True
    identical_inputs = False
    options: SparseOptions

    @abstractmethod
    def sparse(self, block: Block, name: str, weight: torch.Tensor, count: int) -> torch.Tensor:
        """The new weight of one linear layer.

        Args:
            name: its path.
            weight: W, (p, q), float32.
            count: weights that become zero, where the pattern is a share.

        Returns:
            (p, q) float32.
        """

    @property
    def pattern(self) -> Pattern:
        """What ``--sparsity`` asks for."""
        assert self.form.sparsity is not None
        return self.form.sparsity

    def notes(self, anatomy: Anatomy) -> list[str]:
        return [SAME_SIZE]

    def check(self, anatomy: Anatomy) -> None:
        unknown = [name for name in self.options.leave if name not in anatomy.denses]
        if unknown:
            raise RecipeError(
                f"leave names {unknown[0]}, which is no linear layer of a {anatomy.model_type} "
                f"block: there are {', '.join(anatomy.denses)}"
            )
        layers = self.layers(anatomy)
        if not layers:
            raise RecipeError("leave names all linear layers, so that nothing could become zero")
        for name in layers:
            check_groups(self.pattern, name, anatomy.denses[name].inputs)
        if self.pattern.grouped and self.allocation != "uniform":
            raise RecipeError(
                f"allocation is {self.allocation}, but {self.pattern} gives every layer "
                "the same sparsity: use --allocation uniform, or a share such as --sparsity 50%"
            )
        share, spread = self.pattern.share, self.spread
        if self.allocation != "uniform" and (share - spread < 0 or share + spread >= 1):
            raise RecipeError(
                f"spread is {spread}, which takes layers of sparsity {share:.0%} below 0% or "
                "to 100%: lower it with --set spread"
            )

    @property
    def allocation(self) -> Allocation:
        """How sparsity is shared out among layers."""
        if self.options.allocation != "auto":
            return self.options.allocation
        return "uniform" if self.pattern.grouped else self.own_allocation

    @property
    def spread(self) -> float:
        """How far a layer's sparsity may be off the mean."""
        if self.options.spread != "auto":
            return self.options.spread
        share = self.pattern.share
        return min(SPREADS.get(self.allocation, 0.0), share / 2, (1 - share) / 2)

    def layers(self, anatomy: Anatomy) -> list[str]:
        """Linear layers that get zeros, in the order of the data."""
        return [name for name in anatomy.denses if name not in self.options.leave]

    def weights(self, anatomy: Anatomy) -> int:
        """Weights of one block that may become zero."""
        shapes = [anatomy.denses[name] for name in self.layers(anatomy)]
        return sum(shape.rows * shape.inputs for shape in shapes)

    def signals(self, anatomy: Anatomy) -> set[str]:
        return {anatomy.denses[name].reads for name in self.layers(anatomy)}

    def stages(self, anatomy: Anatomy) -> list[set[str]]:
        """Signals whose readers are cut together; later stages see what earlier ones have done."""
        if self.options.scope == "block" or not self.signals(anatomy):
            return []
        found: list[tuple[str, set[str]]] = []
        for name in self.layers(anatomy):
            signal = anatomy.denses[name].reads
            place = signal if self.options.scope == "layer" else name.rpartition(".")[0]
            if found and found[-1][0] == place:
                found[-1][1].add(signal)
            else:
                found.append((place, {signal}))
        return [signals for _, signals in found]

    # ---- how many ----------------------------------------------------------------------------

    def survey_by(self, anatomy: Anatomy, tokens: int) -> SurveyBy | None:
        return None if self.allocation == "uniform" else "statistics"

    @property
    def survey_needs(self) -> Literal["moments", "channels"]:
        """Outliers are told by norms alone."""
        return "channels" if self.allocation == "owl" else self.needs

    def survey(self, block: Block) -> dict[str, Any]:
        """Of each layer: its curve of errors, or its ratio of outliers."""
        found: dict[str, Any] = {}
        if not math.isfinite(block.influence):
            raise ArithmeticError("what it puts out is not finite")
        for name in self.layers(block.anatomy):
            weight = block.weights[name]
            if self.allocation == "error":
                curve = error_curve(weight, self.second(block, name))
                found[name] = [block.influence * error for error in curve]
            else:
                squares = self.squares(block, name)
                found[name] = outlier_ratio(weight, squares, self.options.outlier)
        return found

    def allocate(
        self,
        anatomy: Anatomy,
        layers: Sequence[int],
        importances: dict[int, float],
        surveys: Mapping[int, Any],
        total: int,
    ) -> Shares:
        names = self.layers(anatomy)
        sizes = {n: anatomy.denses[n].rows * anatomy.denses[n].inputs for n in names}
        share, spread = self.pattern.share, self.spread
        if self.allocation == "error":
            counts = by_error(surveys, sizes, share, spread)
        elif self.allocation == "owl":
            counts = by_outliers(surveys, sizes, share, spread)
        else:
            alike = {name: round(size * share) for name, size in sizes.items()}
            counts = dict.fromkeys(layers, alike)
        return {layer: Share(sum(c.values()), dict(c)) for layer, c in counts.items()}

    def zeroed(self, weight: torch.Tensor, scores: torch.Tensor, count: int) -> torch.Tensor:
        """W with zeros where scores are lowest: in each group, in each row or in the layer."""
        if self.pattern.grouped:
            mask = lowest_in_groups(scores, self.pattern.kept, self.pattern.group)
        elif getattr(self.options, "compete", "layer") == "row":
            mask = lowest_in_rows(scores, count)
        else:
            mask = lowest(scores, count)
        return weight.masked_fill(mask, 0)

    def solving(self, anatomy: Anatomy, tokens: int) -> float:
        """With what each layer takes besides, where second moments decide."""
        if self.needs != "moments" or not self.signals(anatomy):
            return 0.0
        shapes = [anatomy.denses[name] for name in self.layers(anatomy)]
        own = sum(self.layer_work(shape.rows, shape.inputs) for shape in shapes)
        return super().solving(anatomy, tokens) + own

    def layer_work(self, rows: int, inputs: int) -> float:
        """Operations for the zeros of one layer; here for its error alone."""
        return 2.0 * rows * inputs**2

    # ---- inside a block ----------------------------------------------------------------------

    def second(self, block: Block, name: str) -> torch.Tensor:
        """H = E[x x^T] of what a layer reads, (q, q), float64; at least its diagonal."""
        reads = block.anatomy.denses[name].reads
        if reads in block.moments:
            return block.moments[reads].covariance
        return torch.diag(self.squares(block, name))

    def squares(self, block: Block, name: str) -> torch.Tensor:
        """E[x_j^2] of what a layer reads, (q,), float64."""
        reads = block.anatomy.denses[name].reads
        if reads in block.moments:
            return block.moments[reads].squares / block.moments[reads].tokens
        found = block.channels[reads]
        return found.norm.square() / found.tokens

    def cut(self, block: Block, quota: int) -> BlockCut:
        cut = BlockCut(block.source)
        read = block.moments.keys() | block.channels.keys()
        errors: dict[str, float] = {}
        zeros: dict[str, int] = {}
        new: dict[str, torch.Tensor] = {}
        for name in self.layers(block.anatomy):
            reads = block.anatomy.denses[name].reads
            if self.signals(block.anatomy) and reads not in read:
                continue  # of another stage
            weight = block.weights[name]
            with solving_for(name):
                new[name] = self.sparse(block, name, weight, block.lose[name])
            zeros[name] = int((new[name] == 0).sum())
            if reads in block.moments:
                second = block.moments[reads].covariance
                errors[name] = float(f"{relative_error(weight, new[name], second):.4g}")
        cut.weights = new
        cut.notes["zeros"] = zeros
        if errors:
            cut.notes["error"] = errors
        return cut

"""What ``--sparsity`` means: a share of zeros, or N of every M consecutive inputs kept."""

from __future__ import annotations

import re
from dataclasses import dataclass

from secateur.errors import RecipeError


@dataclass(frozen=True)
class Pattern:
    """What ``--sparsity`` asks for.

    Attributes:
        share: of the weights that become zero, between 0 and 1.
        kept, group: with N:M, N weights of every M consecutive inputs of a row are kept.
    """

    share: float
    kept: int = 0
    group: int = 0

    @property
    def grouped(self) -> bool:
        """Whether this is N:M."""
        return self.group > 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.grouped else f"{self.share:.4g}"


def parse_sparsity(text: str) -> Pattern:
    """``"50%"`` or ``"2:4"``.

    Raises:
        RecipeError: neither; or a share or pattern that cannot be.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match:
        kept, group = int(match[1]), int(match[2])
        if not 0 < kept < group:
            raise RecipeError(
                f"sparsity is {text!r}: N:M keeps N of every M inputs, so N must be from 1 to M - "
                "1, such as 2:4"
            )
        return Pattern(1 - kept / group, kept, group)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not match:
        raise RecipeError(
            f"sparsity is {text!r}: write the share of zeros with a percent sign, such as 50%, or "
            "how many of consecutive inputs are kept, such as 2:4"
        )
    share = float(match[1]) / 100
    if not 0 < share < 1:
        raise RecipeError(f"sparsity is {text!r}: the share must be above 0% and below 100%")
    return Pattern(share)


def check_groups(pattern: Pattern, name: str, width: int) -> None:
    """Whether a layer's inputs fall into whole groups.

    Raises:
        RecipeError: they do not.
    """
    if pattern.grouped and width % pattern.group:
        raise RecipeError(
            f"sparsity {pattern} wants inputs in groups of {pattern.group}, but {name} has "
            f"{width}: leave it out with --set leave='[{name}]', or choose a group that divides it"
        )

"""Where each model family keeps its parts. Families are data; :mod:`families` is the table."""

from __future__ import annotations

from secateur.anatomy.describe import Anatomy, describe
from secateur.anatomy.families import (
    FAMILIES,
    Count,
    Coupling,
    Dense,
    Family,
    Residual,
    Stage,
)
from secateur.anatomy.residual import ResidualStream, describe_residual

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Count",
    "Coupling",
    "Dense",
    "Family",
    "Residual",
    "ResidualStream",
    "Stage",
    "describe",
    "describe_residual",
]

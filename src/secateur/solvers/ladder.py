"""What solvers do about a matrix that cannot be solved as it is, one step after the other.

1. *more damping*: 100, 10,000 and a million times the share of the mean diagonal that was asked.
   Rounding leaves a singular matrix (dead or duplicate inputs, fewer tokens than inputs) with
   eigenvalues slightly below zero; damping lifts them.
2. *float64*: what is done in float32 for speed is done again, where a number has overflowed or a
   factor does not exist.
3. *least squares*: the pseudoinverse. Directions whose eigenvalue is below :data:`RCOND` of the
   largest are left out instead of divided by.
4. *no tuning*: what stays keeps the weights that it has. Which inputs or weights go is still
   decided, only nothing is fitted to make up for them.

A solver takes the steps that make sense for it, in this order, and tells each by :func:`climbed`.
Whoever listens (the engine, for the block's notes) hears which layer it was for. Where nobody
listens nothing is kept. What no step helps with, since statistics themselves are not finite, is an
ArithmeticError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from secateur.finite import all_finite

MORE_DAMPING = "more damping"
FLOAT64 = "float64"
LEAST_SQUARES = "least squares"
NO_TUNING = "no tuning"

#: Dampings tried one after the other until a Cholesky factor exists, times the asked share.
DAMPINGS = (1.0, 1e2, 1e4, 1e6)
#: Eigenvalues below this share of the largest are rounding of zero, for matrices of any size here.
RCOND = 1e-10


@dataclass(frozen=True)
class Step:
    """One step that a solver took: for which layer or signal, which step, and with what."""

    layer: str
    step: str
    detail: str

    def text(self) -> str:
        said = f" ({self.detail})" if self.detail else ""
        return f"{self.layer}: {self.step}{said}" if self.layer else f"{self.step}{said}"


_heard: ContextVar[list[Step] | None] = ContextVar("heard", default=None)
_layer: ContextVar[str] = ContextVar("layer", default="")


@contextmanager
def listening() -> Iterator[list[Step]]:
    """The steps that solvers take meanwhile, in their order; each layer's step once."""
    steps: list[Step] = []
    token = _heard.set(steps)
    try:
        yield steps
    finally:
        _heard.reset(token)


@contextmanager
def solving_for(layer: str) -> Iterator[None]:
    """What is solved meanwhile is for this linear layer or signal."""
    token = _layer.set(layer)
    try:
        yield
    finally:
        _layer.reset(token)


def climbed(step: str, detail: str = "") -> None:
    """Tell whoever listens that this step was taken."""
    steps = _heard.get()
    told = Step(_layer.get(), step, detail)
    if steps is not None and told not in steps:
        steps.append(told)


def texts(steps: Sequence[Step]) -> list[str]:
    """Steps as the lines of a report."""
    return [step.text() for step in steps]


def inverse(matrix: torch.Tensor) -> torch.Tensor:
    """A^-1 of a symmetric matrix or a batch of them, (..., n, n); by least squares if it has none.

    Raises:
        ArithmeticError: A is not finite.
    """
    found, info = torch.linalg.inv_ex(matrix)
    if not bool(info.any()) and _finite(matrix, found):  # the inverse of infinity looks like zero
        return found
    return _pseudoinverse(matrix)


def solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A^-1 B of symmetric matrices, (..., n, n) and (..., n, m); by least squares if need be.

    Raises:
        ArithmeticError: A is not finite.
    """
    found, info = torch.linalg.solve_ex(matrix, right)
    if not bool(info.any()) and _finite(matrix, found):
        return found
    return _pseudoinverse(matrix) @ right


def _finite(*tensors: torch.Tensor) -> bool:
    return all(all_finite(tensor) for tensor in tensors)


def _pseudoinverse(matrix: torch.Tensor) -> torch.Tensor:
    if not _finite(matrix):
        raise ArithmeticError("a matrix to invert is not finite")
    climbed(LEAST_SQUARES)
    found = torch.linalg.pinv(matrix.double(), rtol=RCOND, hermitian=True)
    return found.to(matrix.dtype)


def factors(systems: torch.Tensor) -> torch.Tensor:
    """Lower Cholesky factors of a batch, (r, n, n), each by the first step that it takes.

    Raises:
        ArithmeticError: a system is not finite.
    """
    found, info = torch.linalg.cholesky_ex(systems)
    bad = (info != 0) | ~torch.isfinite(found.diagonal(dim1=1, dim2=2)).all(1)
    failed = bad.nonzero()[:, 0]
    if not len(failed):
        return found
    if not _finite(systems):
        raise ArithmeticError("a system of kept weights is not finite")
    wide = systems[failed].double()
    mean = wide.diagonal(dim1=1, dim2=2).mean(1)
    for share in (0.0, 1e-6, 1e-4, 1e-2):
        matrix = wide.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(share * mean[:, None])
        lower, info = torch.linalg.cholesky_ex(matrix)
        good = (info == 0) & torch.isfinite(lower).all(2).all(1)
        found[failed[good]] = lower[good].to(found.dtype)
        if bool(good.any()):
            climbed(MORE_DAMPING, f"{share:g}") if share else climbed(FLOAT64)
        failed, wide, mean = failed[~good], wide[~good], mean[~good]
        if not len(failed):
            return found
    # Each weight by itself: what removed ones do to each other is left out.
    climbed(NO_TUNING)
    diagonal = wide.diagonal(dim1=1, dim2=2).clamp(min=torch.finfo(systems.dtype).tiny)
    found[failed] = torch.diag_embed(diagonal.sqrt()).to(found.dtype)
    return found

"""Methods that cut the hidden width: what they decide is a basis for every place in the stream."""

from __future__ import annotations

from abc import abstractmethod

import torch

from secateur.methods.base import AnyMethod


class Rotating(AnyMethod):
    """A method whose plan is a rotation; how the pass goes on is in :mod:`secateur.rotation`."""

    @property
    @abstractmethod
    def multiple(self) -> int:
        """The kept width is a multiple of this."""

    @property
    @abstractmethod
    def slices_head(self) -> bool:
        """Whether what the head reads is sliced too."""

    @abstractmethod
    def basis(
        self, hidden: torch.Tensor, kept: int, *, centred: bool
    ) -> tuple[torch.Tensor, float]:
        """The directions that stay, and the share of the second moment that they hold.

        Args:
            hidden: the stream in front of a norm, (windows, length, d).
            kept: d'.
            centred: whether no token of the stream has a mean over d.

        Returns:
            Q, (d, d'), float32 with orthonormal columns; and a share from 0 to 1.

        Raises:
            ArithmeticError: the stream is not finite.
        """

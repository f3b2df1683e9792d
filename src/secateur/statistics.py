"""Running sums over tokens, gathered by hooks while a block runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from secateur.finite import all_finite
from secateur.recording import Enough
from secateur.solvers.ladder import FLOAT64, climbed, solving_for

#: Rows of a chunk whose products are summed in float32 before they join the float64 total.
TOKENS_PER_CHUNK = 2048
#: Inputs of which products of tokens are summed in float32.
INPUTS_PER_CHUNK = 2048
#: Rows of a second moment that are made in one product.
PANEL = 256


def _with_itself(x: torch.Tensor) -> torch.Tensor:
    """x^T x of tokens (t, q), in float32 where that holds it."""
    found = _by_panels(x)
    # By Cauchy and Schwarz no other entry is larger than the largest of the diagonal.
    if not all_finite(found.diagonal()):
        climbed(FLOAT64, "an activation above 1e19")
        found = _by_panels(x.double())
    return found


def inner_products(x: torch.Tensor) -> torch.Tensor:
    """x x^T of tokens (t, q), (t, t), float64: products in float32, sums in float64."""
    out = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for part in x.split(INPUTS_PER_CHUNK, dim=1):
        out += _with_itself(part.T)
    return out


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, float64, made in float32 where that holds it.

    Half the time, and exact enough for what is fitted to and for sums.
    """
    out = a.float() @ b.float()
    if all_finite(out):
        return out.double()
    climbed(FLOAT64, "a product above 1e38")
    return a.double() @ b.double()


def are_few(tokens: int, width: int) -> bool:
    """Whether so many tokens of a layer's inputs are kept as they are (:class:`Moments`)."""
    return 2 * tokens <= width


def _by_panels(x: torch.Tensor) -> torch.Tensor:
    """x^T x of which the part above the diagonal is copied from below, not made."""
    width = x.shape[1]
    out = x.new_empty(width, width)
    for start in range(0, width, PANEL):
        end = min(start + PANEL, width)
        part = x[:, start:end].T @ x[:, :end]
        out[start:end, :end] = part
        out[:start, start:end] = part[:, :start].T
    return out


#: Matrices (q, q) in float64 that are there at once where all of them are made, besides second
#: moments: mean and damped second moment, factor, inverse and half of it on the way, one temporary.
SOLVER_MATRICES = 6


def moments_work(width: int, tokens: int) -> float:
    """Operations for a second moment, its factor and its inverse, as :meth:`Method.solving` counts.

    Of few tokens (:class:`Moments`) only their products with each other are factorised.
    """
    if are_few(tokens, width):
        return 6.0 * width * tokens**2
    # Products of panels, up to the diagonal; a factor, and an inverse of as many operations as two
    # thirds of a product, both in float64.
    return float(tokens * width * (width + min(PANEL, width))) + 3.0 * width**3


class Moments:
    """Second moment and mean of the inputs of a linear layer.

    While there are few tokens, they are kept as they are: fewer than half as many as inputs take
    less than an eighth of the memory of their second moment, and what is solved with them is a
    system of as many equations as there are tokens.

    Args:
        second: sum over tokens of x x^T, (q, q), float64; None where ``rows`` has the tokens.
        total: sum over tokens of x, (q,), float64.
        tokens: number of tokens.
        rows: the tokens themselves, each (t, q), float32.
    """

    def __init__(
        self,
        second: torch.Tensor | None,
        total: torch.Tensor,
        tokens: int = 0,
        rows: list[torch.Tensor] | None = None,
    ) -> None:
        self._second = second
        self.total = total
        self.tokens = tokens
        self._rows = rows

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Moments:
        return cls(None, torch.zeros(width, dtype=torch.float64, device=device), rows=[])

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens x, (..., q). Products in float32, sums in float64."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += len(flat)
        if self._rows is not None and not self._few(self.tokens):
            self._second, self._rows = self.second, None
        for chunk in flat.split(TOKENS_PER_CHUNK):
            self.total += chunk.sum(0, dtype=torch.float64)
            if self._rows is not None:
                self._rows.append(chunk.clone())
            elif self._second is not None:
                self._second += _with_itself(chunk)

    def _few(self, tokens: int) -> bool:
        return are_few(tokens, len(self.total))

    @property
    def second(self) -> torch.Tensor:
        """Sum over tokens of x x^T, (q, q), float64; made anew each time of few tokens."""
        if self._second is not None:
            return self._second
        width = len(self.total)
        out = torch.zeros(width, width, dtype=torch.float64, device=self.total.device)
        for chunk in self._rows or ():
            out += _with_itself(chunk)
        return out

    @property
    def rows(self) -> torch.Tensor | None:
        """The tokens, (tokens, q), float32, where they are few; else None."""
        if self._rows is None:
            return None
        if len(self._rows) != 1:
            whole = self.total.new_empty((0, len(self.total)), dtype=torch.float32)
            return torch.cat(self._rows or [whole])
        return self._rows[0]

    def less(self, part: Moments) -> Moments:
        """The moments of the tokens that are not in ``part``, which were added last."""
        total, tokens = self.total - part.total, self.tokens - part.tokens
        rows = self._rows
        if rows is not None and part._rows is not None:
            count = len(rows) - len(part._rows)
            if all(one is other for one, other in zip(rows[count:], part._rows, strict=True)):
                return Moments(None, total, tokens, rows[:count])
        return Moments(self.second - part.second, total, tokens)

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of tokens."""
        total, tokens = self.total + other.total, self.tokens + other.tokens
        if self._rows is not None and other._rows is not None and self._few(tokens):
            return Moments(None, total, tokens, [*self._rows, *other._rows])
        return Moments(self.second + other.second, total, tokens)

    def of(self, inputs: torch.Tensor) -> Moments:
        """The moments of some of the inputs."""
        if self._rows is not None:
            rows = [chunk[:, inputs] for chunk in self._rows]
            return Moments(None, self.total[inputs], self.tokens, rows)
        return Moments(self.second[inputs][:, inputs], self.total[inputs], self.tokens)

    def channels(self) -> Channels:
        """Mean and variance of each input by itself."""
        squares = self.squares - self.total.square() / max(1, self.tokens)
        return Channels(self.mean, squares.clamp(min=0), self.tokens)

    @property
    def squares(self) -> torch.Tensor:
        """Sum over tokens of x_j^2, (q,), float64: the diagonal of the second moment."""
        if self._second is not None:
            return self._second.diagonal()
        out = torch.zeros_like(self.total)
        for chunk in self._rows or ():
            out += chunk.double().square().sum(0)
        return out

    @property
    def covariance(self) -> torch.Tensor:
        """H / T = E[x x^T], (q, q), float64."""
        return self.second / self.tokens

    @property
    def mean(self) -> torch.Tensor:
        """E[x], (q,), float64."""
        return self.total / self.tokens


@dataclass
class Channels:
    """Mean, variance and norm of each input of a linear layer on its own: no q x q matrix.

    Squares are summed about the mean of their own chunk, and chunks joined by the rule of Chan,
    Golub and LeVeque (1979), so that a channel that is large and hardly moves keeps its variance.

    Attributes:
        mean: E[x], (q,), float64.
        squares: sum over tokens of (x - E[x])^2, (q,), float64.
        tokens: number of tokens.
    """

    mean: torch.Tensor
    squares: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Channels:
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(zeros, zeros.clone())

    def add(self, x: torch.Tensor) -> None:
        """Take in tokens x, (..., q)."""
        flat = x.detach().reshape(-1, x.shape[-1])
        for chunk in flat.split(TOKENS_PER_CHUNK) if len(flat) else ():
            mean = chunk.mean(0, dtype=torch.float64)
            # Off the mean by its rounding, in float32, is off by a square of that.
            off = (chunk - mean.to(chunk.dtype)).float()
            squares = off.square().sum(0, dtype=torch.float64)
            if not all_finite(squares):
                climbed(FLOAT64, "an activation above 1e19")
                squares = off.double().square().sum(0)
            both = self.plus(Channels(mean, squares, len(chunk)))
            self.mean, self.squares, self.tokens = both.mean, both.squares, both.tokens

    def plus(self, other: Channels) -> Channels:
        """The statistics of both sets of tokens."""
        tokens = self.tokens + other.tokens
        if not tokens:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.tokens / tokens)
        between = step.square() * (self.tokens * other.tokens / tokens)
        return Channels(mean, self.squares + other.squares + between, tokens)

    def of(self, inputs: torch.Tensor) -> Channels:
        """The statistics of some of the inputs, in this order."""
        return Channels(self.mean[inputs], self.squares[inputs], self.tokens)

    @property
    def variance(self) -> torch.Tensor:
        """Var[x] of the sample, sum of squares / (tokens - 1), (q,), float64."""
        return self.squares / max(1, self.tokens - 1)

    @property
    def norm(self) -> torch.Tensor:
        """||x_j||_2 over all tokens, (q,), float64."""
        return (self.squares + self.tokens * self.mean.square()).sqrt()


def relative_to(hidden: torch.Tensor) -> torch.Tensor:
    """What tokens are multiplied with so that errors count in relation to a hidden state.

    What a sublayer puts out is added to the hidden state, and whatever reads the sum divides it by
    its size first. So an error is worth what it is as a part of that: each token weighs
    ``1 / mean h^2``. Without it the few tokens with massive activations decide.

    Args:
        hidden: h, (..., hidden size).

    Returns:
        square roots of the weights, (tokens, 1) float32.
    """
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    power = flat.double().square().mean(-1, keepdim=True)
    return power.clamp(min=1e-12).rsqrt().float()


S = TypeVar("S", Moments, Channels)


@contextmanager
def gather_moments(
    block: nn.Module, layer_of_signal: Mapping[str, str], apart: int | None = None
) -> Iterator[tuple[dict[str, Moments], dict[str, Moments]]]:
    """:func:`gather` second moments."""
    with gather(block, layer_of_signal, Moments, apart) as found:
        yield found


@contextmanager
def gather(
    block: nn.Module,
    layer_of_signal: Mapping[str, str],
    kind: type[S],
    apart: int | None = None,
    behind: Mapping[str, tuple[str, int]] | None = None,
    relative: Collection[str] = (),
    only: bool = False,
) -> Iterator[tuple[dict[str, S], dict[str, S]]]:
    """Gather statistics of each signal while ``block`` runs.

    Args:
        layer_of_signal: for each signal wanted, one linear layer of the block that reads it.
        behind: for signals that pass no entry, the layer whose first outputs they are, and how
            many (:meth:`Anatomy.behind`).
        kind: :class:`Moments`, or :class:`Channels`.
        apart: number of the token from which on statistics are also taken on their own.
        relative: signals whose tokens count in relation to what the block puts out, by
            :func:`relative_to`.
        only: nobody wants what the block puts out: a call ends by :class:`Enough` at the last
            signal, unless signals are relative to what it puts out.

    Yields:
        the statistics of all tokens, and of those from ``apart`` on; filled while the block runs.
    """
    found: dict[str, S] = {}
    late: dict[str, S] = {}
    seen = dict.fromkeys(layer_of_signal, 0)

    waiting: list[tuple[str, torch.Tensor]] = []  # until it is known what the block puts out
    here: set[str] = set()  # signals that this call has met

    def take(signal: str, x: torch.Tensor) -> None:
        for part in (found, late):
            part.setdefault(signal, kind.empty(x.shape[-1], x.device))
        early = len(x) if apart is None else min(max(apart - seen[signal], 0), len(x))
        seen[signal] += len(x)
        with solving_for(signal):
            if early:
                found[signal].add(x[:early])
            if early < len(x):
                late[signal].add(x[early:])

    def met(signal: str, signals: torch.Tensor) -> None:
        x = signals.reshape(-1, signals.shape[-1])
        if signal in relative:
            waiting.append((signal, x))
        else:
            take(signal, x)
        here.add(signal)
        if only and not waiting and here == layer_of_signal.keys():
            raise Enough

    def put_out(_: nn.Module, __: Any, out: Any) -> None:
        factors = relative_to(out[0] if isinstance(out, tuple) else out)
        for signal, x in waiting:
            take(signal, x * factors)
        waiting.clear()

    def at_entry(signal: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: met(signal, args[0])

    def at_exit(signal: str, count: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _, __, out: met(signal, out[..., :count])

    handles = [block.register_forward_pre_hook(lambda *_: here.clear())]
    handles += [
        block.get_submodule(path).register_forward_pre_hook(at_entry(signal))
        for signal, path in layer_of_signal.items()
        if signal not in (behind or {})
    ]
    handles += [
        block.get_submodule(path).register_forward_hook(at_exit(signal, count))
        for signal, (path, count) in (behind or {}).items()
        if signal in layer_of_signal
    ]
    if any(signal in relative for signal in layer_of_signal):
        handles.append(block.register_forward_hook(put_out))
    try:
        yield found, late
    finally:
        for handle in handles:
            handle.remove()
    if apart is not None:
        for signal, part in late.items():
            found[signal] = found[signal].plus(part)

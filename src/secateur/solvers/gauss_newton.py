"""A fit of the layers that make neurons, beside the one that reads them, by Gauss-Newton.

Fewer neurons can come nearer to what all of them put out when they may be other neurons. With z the
neurons that stay, made by layers A_i of x through the FFN's own function, V the layer that reads
them, y what all neurons put out, and w what a token weighs:

    min over A, V   sum_t w_t ||V z(A_1 x_t, A_2 x_t) - y_t||^2

To first order the change D_i of A_i changes what is put out by

    (J D)_t = V sum_i s_it * (D_i x_t)        s_i = dz / d(A_i x), by neuron

so that a step solves (J^T w J + damping) D = J^T w (y - V z), a system of millions of unknowns, by
a few steps of conjugate gradients: products with J and J^T are products with V and with the tokens.
The preconditioner is the part of J^T w J that one neuron has by itself, with what its slope does
to the tokens left out:

    P = M_i (x) C       M_ij = sum_t w_t s_ijt^2 ||v_j||^2      C = E[x x^T]

Then V is fitted anew in closed form, pulled to what it was. Tokens that are kept apart say whether
a round has been of use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from secateur.finite import all_finite
from secateur.neurons import Neurons
from secateur.solvers.ladder import NO_TUNING, climbed
from secateur.solvers.refit import with_a_pull
from secateur.statistics import Moments, product

#: Steps of conjugate gradients in a round: with more, the first order is left behind sooner than
#: the system is solved (docs/obs.md).
STEPS = 2
#: Damping of the system, of the mean of M (x) C, and of C itself, of its mean diagonal.
DAMPING = 0.03
#: Tokens that are worked on at a time.
CHUNK = 4096

#: Weights by the path of their layer.
Weights = dict[str, torch.Tensor]


def work(hidden: int, producers: int, neurons: int, tokens: int, rounds: int) -> float:
    """Operations of a fit, for the estimate of time.

    Args:
        producers: layers that make neurons.
        neurons: that stay.
    """
    layer = 2.0 * tokens * hidden * neurons
    fed, pair = producers + 1, 2 * (producers + 1)  # the FFN once; J and J^T once
    reader = fed + neurons / hidden / 2
    return layer * (fed + reader + rounds * (fed + pair / 2 + STEPS * pair + reader))


def held(hidden: int, producers: int, neurons: int, tokens: int) -> int:
    """Bytes that a fit holds: what the FFN reads and puts out, and slopes of all tokens."""
    return 4 * tokens * (3 * hidden + producers * neurons)


@dataclass(frozen=True)
class Fitted:
    """Layers after a fit.

    Attributes:
        producers: A_i of the neurons that stay, (rows, hidden), float32.
        reader: V, (p, q'), float64.
        rounds: how many were of use.
        error: of all tokens, as a share of what is put out.
    """

    producers: Weights
    reader: torch.Tensor
    rounds: int
    error: float


@dataclass(frozen=True)
class Chunk:
    """Some tokens, as one round sees them.

    Attributes:
        x: (t, hidden).
        slopes: s_i times the square root of the token's weight, by producer, (t, rows).
        off: y - V z times the same, (t, p).
    """

    x: torch.Tensor
    slopes: Weights
    off: torch.Tensor


class NeuronFit:
    """The FFN of one block of which some neurons went.

    Args:
        neurons: what went into it; the last :attr:`Neurons.late` tokens judge.
        weights: of producers and consumer as they were, (p, q), float32.
        biases: of those that have one, (p,), float32.
        inputs: the neurons that stay, (q',).
        rows: the rows of each producer that make them.
        pull: of V to what it was, of mean diag E[z z^T].
    """

    def __init__(
        self,
        neurons: Neurons,
        weights: Mapping[str, torch.Tensor],
        biases: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
        rows: Mapping[str, torch.Tensor],
        pull: float,
    ) -> None:
        self._neurons, self._pull = neurons, pull
        parts = neurons.parts
        whole = {name: weights[name] for name in parts.producers}
        reader = weights[parts.consumer]
        # y times the roots of the weights, of all tokens: it is wanted in every round.
        outputs = [
            neurons.activations(_fed(x, whole, biases)) @ reader.T * weight
            for x, weight in _split(neurons.inputs, neurons.weights)
        ]
        self._wanted = torch.cat(outputs)
        self._own = {name: whole[name][rows[name]] for name in parts.producers}
        self._biases = {n: b[rows[n]] for n, b in biases.items() if n in self._own}
        self._reader = reader[:, inputs].double()
        self._fit = len(neurons.inputs) - neurons.late

    def run(self, rounds: int) -> Fitted | None:
        """As many rounds as are of use, at most ``rounds``; None where none is.

        Producers are fitted to the tokens that do not judge, V in the end to all.
        """
        producers, reader = self._own, self._reader_for(self._own, self._reader, self._fit)
        least = self._error(producers, reader, self._fit)
        used = 0
        for _ in range(rounds):
            new = self._round(producers, reader)
            if new is None:
                break
            read = self._reader_for(new, reader, self._fit)
            error = self._error(new, read, self._fit)
            if not error < least:
                break
            producers, reader, least, used = new, read, error, used + 1
        if not used:
            return None
        last = self._reader_for(producers, reader, len(self._wanted))
        return Fitted(producers, last, used, self._error(producers, last, 0))

    # ---- one round ---------------------------------------------------------------------------

    def _round(self, producers: Weights, reader: torch.Tensor) -> Weights | None:
        """A_i + D_i by one system; None where it cannot be solved."""
        system = System(list(self._seen(producers, reader.float())), reader.float())
        step = system.solved(STEPS)
        if not all(all_finite(each) for each in step.values()):
            climbed(NO_TUNING)
            return None
        return {name: weight + step[name] for name, weight in producers.items()}

    def _seen(self, producers: Weights, reader: torch.Tensor) -> Iterator[Chunk]:
        neurons, end = self._neurons, self._fit
        for x, weight, wanted in _split(neurons.inputs, neurons.weights, self._wanted, end=end):
            z, slopes = neurons.slopes(_fed(x, producers, self._biases))
            off = wanted - z @ reader.T * weight
            yield Chunk(x, {name: slope * weight for name, slope in slopes.items()}, off)

    def _reader_for(self, producers: Weights, old: torch.Tensor, tokens: int) -> torch.Tensor:
        """V fitted to the first tokens, pulled to the old one; (p, q'), float64.

        V = (E[w y z^T] + s V_old) (E[w z z^T] + s I)^-1,   s = pull * mean diag E[w z z^T]
        """
        neurons = self._neurons
        moments = Moments.empty(old.shape[1], old.device)
        across = torch.zeros_like(old)
        for x, weight, wanted in _split(neurons.inputs, neurons.weights, self._wanted, end=tokens):
            z = neurons.activations(_fed(x, producers, self._biases)) * weight
            moments.add(z)
            across += product(wanted.T, z)
        second = moments.covariance
        mean = float(second.diagonal().mean())
        first = self._pull * mean if mean > 0 else 1.0

        def solved(step: float) -> torch.Tensor | None:
            damped = second.clone()
            damped.diagonal().add_(first * step)
            factor, info = torch.linalg.cholesky_ex(damped)
            if int(info):
                return None
            right = across / moments.tokens + first * step * old
            return torch.cholesky_solve(right.T, factor).T

        found = with_a_pull(self._pull, solved)
        return old if found is None else found

    def _error(self, producers: Weights, reader: torch.Tensor, first: int) -> float:
        """What is off of the tokens from ``first`` on, as a share of what they put out."""
        neurons, reader = self._neurons, reader.float()
        off = whole = 0.0
        for x, weight, wanted in _split(
            neurons.inputs[first:], neurons.weights[first:], self._wanted[first:]
        ):
            z = neurons.activations(_fed(x, producers, self._biases))
            off += float((z @ reader.T * weight - wanted).square().sum(dtype=torch.float64))
            whole += float(wanted.square().sum(dtype=torch.float64))
        return off / whole if whole > 0 else 0.0


class System:
    """(J^T w J + damping) D = J^T w (y - V z).

    Args:
        chunks: the tokens.
        reader: V, (p, q'), float32.
    """

    def __init__(self, chunks: list[Chunk], reader: torch.Tensor) -> None:
        self._chunks, self._reader = chunks, reader
        first = chunks[0]
        hidden = first.x.shape[1]
        tokens = Moments.empty(hidden, reader.device)
        lengths = {name: slope.new_zeros(slope.shape[1]) for name, slope in first.slopes.items()}
        for chunk in chunks:
            tokens.add(chunk.x)
            for name, slope in chunk.slopes.items():
                lengths[name] += slope.square().sum(0)
        reads = reader.square().sum(0)
        alone = {name: m * reads.repeat(len(m) // len(reads)) for name, m in lengths.items()}  # M_i
        self._damping = {name: DAMPING * float(m.mean()) for name, m in alone.items()}
        self._alone = {name: m[:, None] + self._damping[name] for name, m in alone.items()}
        second = tokens.covariance
        mean = float(second.diagonal().mean())
        second.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        self._metric = second.float()  # C
        self._inverse = torch.linalg.inv(second).float()

    def right(self) -> Weights:
        """J^T w (y - V z)."""
        return self._back(chunk.off for chunk in self._chunks)

    def times(self, step: Weights) -> Weights:
        """(J^T w J + damping) D."""
        found = self._back(self._forth(chunk, step) for chunk in self._chunks)
        for name, each in found.items():
            each.addmm_(step[name], self._metric, alpha=self._damping[name])
        return found

    def solved(self, steps: int) -> Weights:
        """D after so many steps of preconditioned conjugate gradients from zero."""
        left = self.right()
        found = {name: torch.zeros_like(each) for name, each in left.items()}
        along = self._preconditioned(left)
        direction, height = dict(along), _inner(left, along)
        for _ in range(steps):
            if not height > 0:
                break
            bent = self.times(direction)
            length = height / _inner(direction, bent)
            for name, each in direction.items():
                found[name].add_(each, alpha=length)
                left[name].sub_(bent[name], alpha=length)
            along = self._preconditioned(left)
            new = _inner(left, along)
            direction = {n: along[n].add(each, alpha=new / height) for n, each in direction.items()}
            height = new
        return found

    def _forth(self, chunk: Chunk, step: Weights) -> torch.Tensor:
        """J D of some tokens, (t, p)."""
        count = self._reader.shape[1]
        moved = chunk.x.new_zeros(len(chunk.x), count)
        for name, slope in chunk.slopes.items():
            for part in (chunk.x @ step[name].T).mul_(slope).split(count, dim=1):
                moved += part
        return moved @ self._reader.T

    def _back(self, offs: Iterator[torch.Tensor]) -> Weights:
        """J^T of errors, (t, p) each."""
        found: Weights = {}
        for chunk, off in zip(self._chunks, offs, strict=True):
            at = off @ self._reader
            for name, slope in chunk.slopes.items():
                times = slope.shape[1] // at.shape[1]
                part = (slope * at.repeat(1, times)).T @ chunk.x
                found[name] = found[name].add_(part) if name in found else part
        return found

    def _preconditioned(self, each: Weights) -> Weights:
        return {name: (part @ self._inverse) / self._alone[name] for name, part in each.items()}


def _split(*tensors: torch.Tensor, end: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
    """The first ``end`` tokens of each, some at a time."""
    return zip(*(tensor[:end].split(CHUNK) for tensor in tensors), strict=True)


def _fed(x: torch.Tensor, weights: Weights, biases: Mapping[str, torch.Tensor]) -> Weights:
    """What the layers put out of x."""
    return {n: torch.nn.functional.linear(x, w, biases.get(n)) for n, w in weights.items()}


def _inner(one: Weights, other: Weights) -> float:
    return sum(float((one[name] * other[name]).sum(dtype=torch.float64)) for name in one)

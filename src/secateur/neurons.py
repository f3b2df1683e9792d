"""A block's FFN from outside: where its neurons are made and read, and what goes into them.

The FFN is one of a block's modules, or several in a row; what stands between the linear layers is
taken from the model's own code, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy
from secateur.statistics import relative_to

#: Outputs by the path of the layer that puts them out.
Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Parts:
    """Modules of a block around its neurons.

    Attributes:
        before: modules whose outputs go into the residual stream before the FFN.
        chain: modules of the FFN; either one that holds it all, or the last is the consumer.
        producers: the linear layers that make the neurons.
        consumer: the linear layer that reads them.
    """

    before: tuple[str, ...]
    chain: tuple[str, ...]
    producers: tuple[str, ...]
    consumer: str

    @property
    def changed(self) -> frozenset[str]:
        """The linear layers that neurons go from, which are all of the FFN."""
        return frozenset((*self.producers, self.consumer))


def parts_of(anatomy: Anatomy) -> Parts | None:
    """The parts of a family whose FFN is the last thing in a block; None of others."""
    residual, coupling = anatomy.family.residual, anatomy.find("neurons")
    if residual is None or coupling is None or coupling.readers:
        return None
    *others, last = residual.stages
    branches = [branch for stage in others for branch in stage.branches]
    alone = len(last.branches) == 1 and anatomy.denses[coupling.consumer].reads in last.writes
    if not alone or any(len(branch) > 1 for branch in branches):
        return None
    return Parts(
        before=tuple(branch[0] for branch in branches),
        chain=last.branches[0],
        producers=coupling.producers,
        consumer=coupling.consumer,
    )


@dataclass(frozen=True)
class Neurons:
    """What went into the FFN of one block, and what its neurons make of the layers that feed them.

    Attributes:
        parts: of the block.
        inputs: x of the layers that make neurons, (T, hidden), float32.
        weights: square roots of what tokens weigh, (T, 1), float32.
        late: tokens at the end that are kept apart to judge fits by.
        activations: z, (t, neurons), from the outputs of the producers, (t, rows) each; of some of
            the neurons alone where all outputs are of these.
    """

    parts: Parts
    inputs: torch.Tensor
    weights: torch.Tensor
    late: int
    activations: Callable[[Outputs], torch.Tensor]

    def slopes(self, outputs: Outputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """z, (t, neurons), and its derivative by each output, (t, rows) by producer.

        A neuron hangs on its own outputs alone, so that the derivative of the sum of all neurons is
        that of each.
        """
        with torch.enable_grad():
            taken = {name: out.detach().requires_grad_() for name, out in outputs.items()}
            z = self.activations(taken)
            found = torch.autograd.grad(z.sum(), list(taken.values()))
        return z.detach(), dict(zip(taken, found, strict=True))


@contextmanager
def noted_neurons(
    block: nn.Module, anatomy: Anatomy, *, late: int, relative: bool
) -> Iterator[list[Neurons]]:
    """Note what goes into the FFN while a block runs.

    Args:
        late: see :class:`Neurons`.
        relative: whether tokens weigh by the hidden state behind the block, by
            :func:`secateur.statistics.relative_to`; it must run to its end then.

    Yields:
        a list that has the one answer when the block has run.
    """
    parts = parts_of(anatomy)
    assert parts is not None
    inputs: list[torch.Tensor] = []
    weights: list[torch.Tensor] = []

    def read(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())

    def put_out(_: nn.Module, __: Any, out: Any) -> None:
        weights.append(relative_to(out[0] if isinstance(out, tuple) else out))

    handles = [block.get_submodule(parts.producers[0]).register_forward_pre_hook(read)]
    if relative:
        handles.append(block.register_forward_hook(put_out))
    found: list[Neurons] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    x = torch.cat(inputs)
    weight = torch.cat(weights) if relative else x.new_ones(len(x), 1)
    found.append(Neurons(parts, x, weight, late, lambda outputs: _activate(block, parts, outputs)))


def _activate(block: nn.Module, parts: Parts, outputs: Outputs) -> torch.Tensor:
    """The FFN's own code with given outputs in the place of its linear layers, up to the last."""
    z = next(iter(outputs.values()))
    with ExitStack() as stack:
        for name, out in outputs.items():
            stack.enter_context(stood_in(block, name, _always(out)))
        stack.enter_context(stood_in(block, parts.consumer, lambda x: x))
        for path in parts.chain:
            z = block.get_submodule(path)(z)
    return z


def _always(out: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    return lambda _: out


@contextmanager
def stood_in(block: nn.Module, path: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function run in the place of a module's own code."""
    module: Any = block.get_submodule(path)
    module.forward = function
    try:
        yield
    finally:
        del module.forward

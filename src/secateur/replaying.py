"""The pass of a block behind its cut, without what the cut has not changed.

Statistics of a cut prefix take two passes of every block: one of the block as it was, and one of
what is left of it. Where only neurons of the FFN went, attention puts out the same again, and so
does every neuron that stays; what is new is the layer that reads them. So what passed in front of
the cut is kept, as long as that takes little memory, and handed out in the second pass, in which
the block's own code runs around it. What is handed out was made by weights that are not rounded to
the type that is written.

A method that cuts a block in stages looks at it once more for each. What attention put out in the
last of them, which already has the cuts of those before, stays as it is when only layers of the
FFN are cut then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from secateur.anatomy import Anatomy
from secateur.methods import Method
from secateur.neurons import parts_of, stood_in
from secateur.plans import BlockCut

#: Bytes of one block's activations that are kept for the second pass; more than these are not.
MOST_KEPT = 3 * 2**27


def kept_bytes(method: Method, anatomy: Anatomy, tokens: int) -> int:
    """Bytes that are kept of one block: what attention put out, and neurons; 0: none are."""
    parts = parts_of(anatomy)
    if parts is None or method.identical_inputs:  # then there is no second pass
        return 0
    if stages := method.stages(anatomy):
        last = {name for name, dense in anatomy.denses.items() if dense.reads in stages[-1]}
        useful, neurons = last <= parts.changed, 0
    else:
        units = {anatomy.denses[name].reads for name in anatomy.consumers("values", "neurons")}
        useful = method.signals(anatomy) <= units
        made_anew = method.fits_neurons(anatomy, tokens)
        neurons = 0 if made_anew else anatomy.denses[parts.consumer].inputs
    found = 4 * tokens * (neurons + len(parts.before) * anatomy.denses[parts.consumer].rows)
    return found if useful and found <= MOST_KEPT else 0


def first_passes(method: Method, anatomy: Anatomy) -> float:
    """The passes that statistics take, in whole passes of the block, for the estimate of time.

    One for each stage, as far as the last signal that it looks for where the pass behind the cut
    is the one that goes on.
    """
    wanted = method.signals(anatomy)
    stages = method.stages(anatomy) or ([wanted] if wanted else [])
    if method.identical_inputs:
        return float(len(stages))
    return sum(
        1.0
        if signals & method.relative(anatomy)
        else _in_front(anatomy, signals) / anatomy.block_parameters
        for signals in stages
    )


def _in_front(anatomy: Anatomy, signals: set[str]) -> int:
    """Parameters of the linear layers that run before the last signal is there."""
    first_readers = {anatomy.by_signal[signal][0] for signal in signals}
    found = passed = 0
    for name, dense in anatomy.denses.items():
        found = passed if name in first_readers else found
        passed += dense.parameters
    return found


def second_pass(method: Method, anatomy: Anatomy, tokens: int) -> float:
    """The pass behind the cut as a part of a whole pass of the block, for the estimate of time.

    It is whole wherever a KV group has gone, which nobody knows beforehand.
    """
    if method.identical_inputs or not method.signals(anatomy):
        return 0.0
    parts = parts_of(anatomy)
    if parts is None or not kept_bytes(method, anatomy, tokens):
        return 1.0
    if method.stages(anatomy) or method.fits_neurons(anatomy, tokens):
        runs = parts.changed
    elif method.signals(anatomy) == {anatomy.denses[parts.consumer].reads}:
        runs = frozenset({parts.consumer})
    else:
        return 1.0
    return sum(anatomy.denses[name].parameters for name in runs) / anatomy.block_parameters


class Passed:
    """What passed one block in front of its cut, call by call.

    Args:
        method: that cuts.
        anatomy: of the model.
        tokens: that pass.
    """

    def __init__(self, method: Method, anatomy: Anatomy, tokens: int) -> None:
        self._parts = parts_of(anatomy) if kept_bytes(method, anatomy, tokens) else None
        self._in_stages = bool(method.stages(anatomy))
        self._keeps_neurons = not self._in_stages and not method.fits_neurons(anatomy, tokens)
        self._outputs: dict[str, list[Any]] = {}
        self._neurons: list[torch.Tensor] = []

    @property
    def before_cut(self) -> bool:
        """Whether what is kept is of the block as it was, before any cut."""
        return self._parts is not None and not self._in_stages

    @contextmanager
    def noted(self, block: nn.Module) -> Iterator[None]:
        """Keep what passes the block meanwhile."""
        if self._parts is None:
            yield
            return

        def put_out(path: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _, __, out: self._outputs.setdefault(path, []).append(out)

        def read(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._neurons.append(args[0])

        handles = [
            block.get_submodule(path).register_forward_hook(put_out(path))
            for path in self._parts.before
        ]
        if self._keeps_neurons:
            consumer = block.get_submodule(self._parts.consumer)
            handles.append(consumer.register_forward_pre_hook(read))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replayed(self, block: nn.Module, cut: BlockCut) -> Iterator[None]:
        """Let the block, which has the cut, put out what it does for the same calls once more.

        Where the cut has changed more than stands behind what was kept, all of it runs.
        """
        parts = self._parts
        if parts is None or not self._outputs:
            yield
            return
        if self._in_stages:
            with ExitStack() as stack:
                self._stand_in_before(block, stack)
                yield
            return
        changed = {*cut.inputs, *cut.rows, *cut.weights, *cut.scales, *cut.biases}
        if not changed <= parts.changed:
            yield
            return
        if not self._keeps_neurons:
            with ExitStack() as stack:
                self._stand_in_before(block, stack)
                yield
            return
        consumer, neurons = block.get_submodule(parts.consumer), iter(self._neurons)

        def read(x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = consumer(x)
            return found

        with ExitStack() as stack:
            self._stand_in_before(block, stack)
            first, *others = parts.chain
            if others:  # the last of them reads the neurons by itself
                stack.enter_context(stood_in(block, first, lambda _: next(neurons)))
            else:
                stack.enter_context(stood_in(block, first, lambda _: read(next(neurons))))
            for path in others[:-1]:
                stack.enter_context(stood_in(block, path, lambda x: x))
            yield

    def _stand_in_before(self, block: nn.Module, stack: ExitStack) -> None:
        for path, outputs in self._outputs.items():
            stack.enter_context(stood_in(block, path, _each(outputs)))


def _each(outputs: Sequence[Any]) -> Callable[..., Any]:
    again = iter(outputs)
    return lambda *_, **__: next(again)

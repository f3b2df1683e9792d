"""A look at every block, uncut, before it is known what each shall lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from secateur.backward import Gradients, backward
from secateur.errors import SourceError
from secateur.methods import Block, Method
from secateur.progress import Progress
from secateur.streaming import Stream


def by_gradients(
    stream: Stream,
    method: Method,
    tokens: torch.Tensor,
    layers: Sequence[int],
    look: Callable[..., Block],
    progress: Progress,
) -> dict[int, Any]:
    """What the method remembers of each block, from one pass back through the uncut model.

    Args:
        tokens: (windows, length).
        layers: blocks that are left; of a method that surveys by gradients, all.
        look: makes a method's view of a block from its number, the block and what is seen of it.

    Returns:
        the method's answers by block, in the order of the blocks.

    Raises:
        SourceError: the model's loss or its gradients are not finite.
    """
    wanted = method.surveyed(layers)
    found: dict[int, Any] = {}
    depth = stream.anatomy.layers
    progress.stage("gradients", 2 * depth + 1 - min(wanted, default=depth))

    def use(layer: int, module: torch.nn.Module, gradients: Iterator[Gradients]) -> None:
        paths = {name: f"{name}.weight" for name in stream.anatomy.denses}
        calls = ({name: call[path] for name, path in paths.items()} for call in gradients)
        with finite_statistics(layer):
            found[layer] = method.survey(look(layer, module, gradients=calls))

    backward(
        stream,
        tokens,
        use,
        blocks=wanted,
        per_call=method.windows_per_gradient,
        step=lambda layer: progress.step("head" if layer is None else f"block {layer}"),
    )
    progress.finish()
    return {layer: found[layer] for layer in wanted}


def by_statistics(
    stream: Stream,
    method: Method,
    tokens: torch.Tensor,
    layers: Sequence[int],
    look: Callable[..., tuple[Block, torch.Tensor | None]],
    progress: Progress,
) -> dict[int, Any]:
    """What the method remembers of each block, from statistics of its signals.

    Args:
        tokens: (windows, length).
        layers: blocks that are left.
        look: makes a method's view of a block from its number, the block and what goes into it, and
            gives what comes out besides.

    Returns:
        the method's answers by block; nothing else is kept.
    """
    found: dict[int, Any] = {}
    layers = list(method.surveyed(layers))
    progress.stage("survey", len(layers))
    hidden = stream.embed(tokens) if method.signals(stream.anatomy) else None
    for layer in layers:
        with stream.block(layer) as module:
            before = hidden
            block, hidden = look(layer, module, hidden)
            with finite_statistics(layer):
                if before is not None and hidden is not None:
                    block = replace(block, influence=method.layer_importance(before, hidden))
                found[layer] = method.survey(block)
            del before
        progress.step(f"block {layer}")
    progress.finish()
    return found


@contextmanager
def finite_statistics(layer: int) -> Iterator[None]:
    """Say whose fault it is when numbers of a block are not finite."""
    try:
        yield
    except ArithmeticError as error:
        raise SourceError(
            f"block {layer} cannot be cut: {error}; its activations on the calibration text "
            "are not finite: check the weights, or try other text with --calibration"
        ) from error

"""Gradients of the loss with the weights of one block in memory at a time.

Forward block by block, keeping what goes into each; the loss at the head; then from the last block
to the first: the block's weights are read again, its forward repeated with a graph, and the
gradient that came back from behind passed through it. Weight gradients live until the next call:
who wants them adds them up. So memory holds one block with its gradients, or the head, and the
activations between blocks, which move to disk when they are much; a model with all its gradients
would be twice its size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Literal

import torch
from torch import nn

from secateur.boundaries import IN_MEMORY, Boundaries
from secateur.streaming import Stream

#: Gradient of the loss by parameter of the block, in the parameter's shape and type.
Gradients = dict[str, torch.Tensor]
#: Takes a block's number, the block with its weights, and the gradients of one call after another.
Use = Callable[[int, nn.Module, Iterator[Gradients]], None]


def backward(
    stream: Stream,
    tokens: torch.Tensor,
    use: Use,
    *,
    blocks: Collection[int] | None = None,
    per_call: int | None = 1,
    loss: Literal["mean", "sum"] = "mean",
    limit: int = IN_MEMORY,
    step: Callable[[int | None], None] = lambda _: None,
) -> torch.Tensor:
    """Hand on the gradients of each block's parameters, the last block first.

    The loss is the sum over windows s of L_s, the next-token negative log likelihood of one window
    in nats, as a mean over its predicted tokens or as their sum. Windows do not see each other, so
    the gradient of a call is that of its own windows: the sum of all is that of the loss, and with
    one window a call, the sum of their squares is the diagonal of the empirical Fisher matrix.

    Args:
        tokens: (windows, length), length at least 2.
        use: called once for each block that is wanted. What it leaves of the gradients is passed
            through for the blocks before. The parameters of the block must not be changed.
        blocks: those whose gradients are wanted; by default all. The pass ends at the first.
        per_call: windows of one call; None: as many as fit. More are faster and take more memory.
        limit: bytes of activations between blocks held in memory; the rest goes to disk.
        step: called with each block's number when it is done, forward and again backward, and with
            None when the head is.

    Returns:
        L_s of each window, (windows,), float64.
    """
    layers = stream.anatomy.layers
    wanted = set(range(layers) if blocks is None else blocks)
    first = min(wanted, default=layers)
    for parameter in stream.model.parameters():  # values that come in take this over
        parameter.requires_grad_(False)
    inputs = Boundaries(limit)
    try:
        with stream.calls_of(per_call):
            hidden = stream.embed(tokens)
            size = stream.windows_per_call(tokens.shape[1])
            for layer in range(layers):
                if layer >= first:
                    inputs[layer] = hidden
                with stream.block(layer) as module:
                    hidden = stream.forward_block(layer, module, hidden)
                step(layer)
        losses, gradient = _through_head(stream, hidden, tokens, loss)
        del hidden
        step(None)
        for layer in reversed(range(first, layers)):
            read = inputs.pop(layer).to(stream.device)
            with stream.block(layer) as module:
                found = _through_block(
                    stream, layer, module, read, gradient, size=size, own=layer in wanted
                )
                if layer in wanted:
                    use(layer, module, found)
                for _ in found:
                    pass
            del read
            step(layer)
        return losses
    finally:
        inputs.close()


def _through_head(
    stream: Stream, hidden: torch.Tensor, tokens: torch.Tensor, loss: Literal["mean", "sum"]
) -> tuple[torch.Tensor, torch.Tensor]:
    """L_s of each window, (windows,), and its gradient by ``hidden``, in the shape of that."""
    losses = torch.zeros(len(tokens), dtype=torch.float64)
    gradient = torch.empty_like(hidden)
    parts = tokens.shape[1] - 1 if loss == "mean" else 1
    with stream.outside(), torch.enable_grad():
        for window in range(len(tokens)):
            own = slice(window, window + 1)
            end = hidden[own].detach().clone().requires_grad_()
            for _, start, logits in stream.head_pieces(end, tokens[own]):
                targets = tokens[window, start + 1 : start + 1 + len(logits)].to(logits.device)
                piece = nn.functional.cross_entropy(
                    logits[: len(targets)], targets, reduction="sum"
                )
                (piece / parts).backward()
                losses[window] += piece.item() / parts
            assert end.grad is not None
            gradient[own] = end.grad
    return losses, gradient


def _through_block(
    stream: Stream,
    layer: int,
    module: nn.Module,
    read: torch.Tensor,
    gradient: torch.Tensor,
    *,
    size: int,
    own: bool,
) -> Iterator[Gradients]:
    """Pass ``gradient`` through a block in place, from behind it to before it.

    Args:
        read: what went into the block, (windows, length, hidden).
        size: windows of one call.
        own: whether the gradients of the parameters are wanted; without, they are not computed.

    Yields:
        those of each call.
    """
    parameters = dict(module.named_parameters()) if own else {}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for batch, behind in zip(read.split(size), gradient.split(size), strict=True):
        before = batch.detach().requires_grad_()
        with torch.enable_grad():
            out = stream.call_block(layer, module, before)
        found = torch.autograd.grad(
            out, [before, *parameters.values()], behind, materialize_grads=True
        )
        del out
        behind.copy_(found[0])
        yield dict(zip(parameters, found[1:], strict=True))

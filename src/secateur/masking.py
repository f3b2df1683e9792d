"""The original block with what a cut removes as zeros: it computes what the cut one does.

Trials, statistics of a cut prefix and the verifier see a plan this way, without writing anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from secateur.plans import BlockCut, Plan, Tensors
from secateur.slicing import mask_block
from secateur.streaming import Stream


def masked_hidden(
    stream: Stream, plan: Plan, tokens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Hidden state behind the last block of the original model with ``plan`` as zeros and scales.

    This is the other way to compute what the written model computes; the two must agree.
    """
    hidden = stream.embed(tokens, dtype)
    for cut in plan.blocks:
        with (
            stream.block(cut.source) as module,
            masked(stream, module, state_of(module), cut, dtype),
        ):
            hidden = stream.forward_block(cut.source, module, hidden)
    return hidden


@contextmanager
def masked(
    stream: Stream, module: torch.nn.Module, state: Tensors, cut: BlockCut, dtype: torch.dtype
) -> Iterator[None]:
    """The block at hand with ``cut`` as zeros, scales and biases in its original shapes."""
    lacking = [name for name in cut.biases if f"{name}.bias" not in state]
    for name in lacking:
        layer = module.get_submodule(name)
        layer.bias = torch.nn.Parameter(torch.empty(len(cut.biases[name])), requires_grad=False)
    weights = mask_block(state, cut, dtype)
    module.load_state_dict({k: v.to(stream.device) for k, v in weights.items()}, assign=True)
    del weights, state  # the block itself is not needed here any more, and may be large
    try:
        yield
    finally:
        for name in lacking:  # the next block in this place has none
            module.get_submodule(name).register_parameter("bias", None)


def state_of(module: torch.nn.Module) -> Tensors:
    """Parameters and persistent buffers of a block by name, on the CPU."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}

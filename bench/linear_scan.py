"""Mamba's scan on a CPU, for training.

Without its GPU kernels, transformers takes the state of each step out of one tensor by indexing,
of which the backward pass fills a whole tensor a step with zeros: its time grows with the square
of the length. Here the recurrence is one function with a gradient of its own, so it grows with the
length. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


class Recurrence(torch.autograd.Function):
    """s_t = a_t s_{t-1} + b_t from s_{-1} = 0, over the first dimension.

    With g_t the gradient of s_t through all that follows, g_t = G_t + a_{t+1} g_{t+1}, that of b_t
    is g_t and that of a_t is g_t s_{t-1}.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        states = b.clone()
        for t in range(1, len(b)):
            states[t].addcmul_(a[t], states[t - 1])
        ctx.save_for_backward(a, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, states = ctx.saved_tensors
        of_b = grads[0].clone()
        for t in range(len(a) - 2, -1, -1):
            of_b[t].addcmul_(a[t + 1], of_b[t + 1])
        of_a = torch.zeros_like(a)
        torch.mul(of_b[1:], states[:-1], out=of_a[1:])
        return of_a, of_b


def scan(
    hidden: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The selective scan (Gu and Dao, arXiv 2312.00752, Algorithm 2), gated.

    Args:
        hidden, dt, z: (windows, channels, length).
        a: (channels, states); b, c: (windows, states, length).
        D, delta_bias: (channels,).

    Returns:
        (windows, channels, length).
    """
    dt = functional.softplus(dt + delta_bias[:, None]).permute(2, 0, 1)
    new = (dt * hidden.permute(2, 0, 1))[..., None] * b.permute(2, 0, 1)[:, :, None]
    states = Recurrence.apply(torch.exp(dt[..., None] * a), new)
    out = torch.einsum("tbcs,bst->bct", states, c)
    return (out + hidden * D[:, None]) * functional.silu(z)


@contextmanager
def in_place_of_the_slow_one() -> Iterator[None]:
    """Let transformers' Mamba use :func:`scan`."""
    from transformers.models.mamba import modeling_mamba

    slow = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = slow

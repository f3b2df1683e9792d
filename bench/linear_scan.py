"""Mamba's scan on a CPU, for training.

Without its GPU kernels, transformers takes the state of each step out of one tensor by indexing,
of which the backward pass fills a whole tensor a step with zeros: its time grows with the square
of the length. Here the steps are taken apart once, so it grows with the length. The numbers are
the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


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
    dt = functional.softplus(dt + delta_bias[:, None]).transpose(1, 2)
    steps = zip(
        torch.exp(dt[..., None] * a).unbind(1),
        ((dt * hidden.transpose(1, 2))[..., None] * b.transpose(1, 2)[:, :, None]).unbind(1),
        c.transpose(1, 2)[..., None].unbind(1),
        strict=True,
    )
    state = torch.zeros_like(hidden[:, :, :1]).expand(-1, -1, a.shape[1])
    out = []
    for decay, new, read in steps:
        state = decay * state + new
        out.append((state @ read)[..., 0])
    return (torch.stack(out, -1) + hidden * D[:, None]) * functional.silu(z)


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

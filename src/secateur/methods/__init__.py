"""Pruning methods. One file each; importing it registers it (see CONTRIBUTING)."""

from __future__ import annotations

from secateur.methods.base import (
    Block,
    Method,
    Quotas,
    Share,
    Shares,
    get_method,
    method_names,
    register,
)

__all__ = [
    "Block",
    "Method",
    "Quotas",
    "Share",
    "Shares",
    "get_method",
    "method_names",
    "register",
]

"""Pruning methods. One file each; importing it registers it (see CONTRIBUTING)."""

from __future__ import annotations

from secateur.methods.base import AnyMethod, Block, Method, Quotas, Share, Shares
from secateur.methods.registry import (
    best_method,
    check_makes_zeros,
    get_method,
    method_class,
    method_names,
    register,
)

__all__ = [
    "AnyMethod",
    "Block",
    "Method",
    "Quotas",
    "Share",
    "Shares",
    "best_method",
    "check_makes_zeros",
    "get_method",
    "method_class",
    "method_names",
    "register",
]

"""Healing: a short training of what pruning has left. Optional, and never part of pruning.

:func:`heal` takes a folder that ``prune`` wrote and writes one of the same layout. It trains LoRA
adapters, or quantises groups of columns and trains adapters that fold into their zero points
(docs/healing.md). Everything else in this package works without gradients or training; results of
this room have tables of their own.
"""

from __future__ import annotations

from secateur.recovery.healing import HealResult, heal
from secateur.recovery.settings import HealSettings, make_settings

__all__ = ["HealResult", "HealSettings", "heal", "make_settings"]

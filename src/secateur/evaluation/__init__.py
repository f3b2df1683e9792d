"""Perplexity, speed and memory of a model, dense or pruned, by one and the same path."""

from __future__ import annotations

from secateur.evaluation.perplexity import Perplexity, evaluate
from secateur.evaluation.speed import Speed, load_whole, measure_speed

__all__ = ["Perplexity", "Speed", "evaluate", "load_whole", "measure_speed"]

"""Quality, speed and memory of a model, dense or pruned, by one and the same path."""

from __future__ import annotations

from secateur.evaluation.perplexity import Perplexity, evaluate
from secateur.evaluation.speed import Speed, load_whole, measure_speed
from secateur.evaluation.zero_shot import (
    TaskScore,
    check_tasks,
    require_harness,
    task_conditions,
    zero_shot,
)

__all__ = [
    "Perplexity",
    "Speed",
    "TaskScore",
    "check_tasks",
    "evaluate",
    "load_whole",
    "measure_speed",
    "require_harness",
    "task_conditions",
    "zero_shot",
]

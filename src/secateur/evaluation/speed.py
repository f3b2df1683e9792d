"""Tokens per second and a text sample: the model as a whole, as a user would run it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from secateur.checkpoint import Checkpoint
from secateur.skeleton import build_skeleton, fill_skeleton


@dataclass(frozen=True)
class Speed:
    """Median tokens per second of greedy generation with a cache, and the text it gave."""

    tokens_per_second: float
    text: str


def load_whole(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model in memory, for generation."""
    model = build_skeleton(checkpoint)
    fill_skeleton(checkpoint, model, dtype)
    return model


def generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy continuation of ``prompt``."""
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    text: str = tokenizer.decode(made[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def measure_speed(
    model: Any, tokenizer: Any, prompt: str, *, new_tokens: int = 32, repeats: int = 5
) -> Speed:
    """Generate ``repeats`` times, greedily, and take the median; nothing is stopped early."""
    inputs = tokenizer(prompt, return_tensors="pt")
    rates, made = [], None
    with torch.no_grad():
        for _ in range(repeats + 1):
            began = time.perf_counter()
            made = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            rates.append(new_tokens / (time.perf_counter() - began))
    assert made is not None
    text = tokenizer.decode(made[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Speed(statistics.median(rates[1:]), text)  # the first run warms up

"""Speed and memory of models side by side, dense against pruned, in one run.

Each model has a process of its own that stays to the end. They are measured in turn, A, B, A, B,
while the others wait, so that a slow minute of the machine hits all of them; a ratio is taken
within each turn, and then the median of the ratios. Started as ``python -m
secateur.evaluation.bench`` this file is such a process, for torch;
:mod:`secateur.outputs.llama_cpp_process` is the one for llama.cpp.

A turn processes a prompt and then generates behind it, one token at a time. The tokens are given
ones, the same for every model, and nothing is sampled: what is timed is the model alone, without
``generate`` around it. On a machine that is busy otherwise the threads of OpenMP are in each
other's way; with ``OMP_WAIT_POLICY=passive`` in the environment the numbers are steadier, and lower
than an idle machine's.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from secateur.errors import RecipeError
from secateur.outputs.llama_cpp import fixed_tokens, open_worker
from secateur.workers import Worker, serve

DTYPES = ("float32", "bfloat16", "float16")
#: Head of what :func:`table` returns.
HEADER = (
    "",
    "weights, MB",
    "parameters",
    "peak memory, MiB",
    "prompt tokens/s",
    "generation tokens/s",
)


@dataclass(frozen=True)
class Spread:
    """The median of some values, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}–{self.high:.{digits}f})"


@dataclass(frozen=True)
class Measured:
    """One model of a run.

    Attributes:
        name: what the user called it, without the folders above if that tells the models apart.
        nbytes: size of the weight files.
        parameters: number of parameters, tied ones once.
        memory: peak resident memory of the process in bytes, from the reading of the weights on;
            pages of mapped files are not in it, weights are.
        prompt_rates: tokens per second of processing the prompt, one for each turn.
        generation_rates: the same of generation.
    """

    name: str
    nbytes: int
    parameters: int
    memory: int
    prompt_rates: tuple[float, ...]
    generation_rates: tuple[float, ...]

    @property
    def prompt(self) -> Spread:
        return Spread.of(self.prompt_rates)

    @property
    def generation(self) -> Spread:
        return Spread.of(self.generation_rates)


def bench_torch(
    sources: Sequence[str | Path],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> list[Measured]:
    """Measure models as torch runs them on the CPU.

    Args:
        sources: folders, GGUF files (dequantized) or hub ids; the first is what the others are
            compared with.
        prompt_tokens: tokens that one forward pass takes; of the last the logits are computed.
        new_tokens: tokens behind them that pass one at a time, with the cache.
        repeats: turns that count, after one that warms up.
        threads: of torch; by default what torch chooses.
        dtype: type to run in, one of :data:`DTYPES`.

    Raises:
        SecateurError: a model cannot be opened or has too few positions, or its process dies.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype is {dtype!r}: allowed are {', '.join(DTYPES)}")
    return _in_turn(
        lambda source: Worker("secateur.evaluation.bench", f"torch, at work on {source},"),
        sources,
        repeats,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )


def bench_llama_cpp(
    files: Sequence[str | Path],
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
) -> list[Measured]:
    """Measure GGUF files as llama.cpp runs them on the CPU, in the types they are stored in.

    Args:
        threads: by default the number of cores.
        files, prompt_tokens, new_tokens, repeats: as for :func:`bench_torch`.

    Raises:
        OutputError: llama.cpp refuses a file or is not installed, or a process dies.
    """
    return _in_turn(
        open_worker,
        files,
        repeats,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
    )


def _in_turn(
    start: Callable[[str | Path], Worker],
    sources: Sequence[str | Path],
    repeats: int,
    **settings: Any,
) -> list[Measured]:
    with ExitStack() as stack:
        workers = [stack.enter_context(start(source)) for source in sources]
        opened = [
            worker.ask("open", source=str(source), **settings)
            for worker, source in zip(workers, sources, strict=True)
        ]
        turns = [[worker.ask("measure") for worker in workers] for _ in range(repeats)]
    short = [Path(source).name for source in sources]
    names = short if len(set(short)) == len(short) else [str(source) for source in sources]
    return [
        Measured(
            names[i],
            about["nbytes"],
            about["parameters"],
            about["memory"],
            tuple(turn[i]["prompt"] for turn in turns),
            tuple(turn[i]["generation"] for turn in turns),
        )
        for i, about in enumerate(opened)
    ]


def ratio(rates: Sequence[float], to: Sequence[float]) -> Spread:
    """How many times as fast: over the turns, in each of which both were measured."""
    return Spread.of([rate / other for rate, other in zip(rates, to, strict=True)])


def table(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """Rows under :data:`HEADER`: each model, then the ratio of each to the first.

    Speeds are medians, with the slowest and the fastest turn in parentheses.
    """
    first, *others = measured
    rows: list[tuple[str, ...]] = [
        (
            one.name,
            f"{one.nbytes / 1e6:.1f}",
            f"{one.parameters:,}",
            f"{one.memory / 2**20:.0f}",
            one.prompt.text(1),
            one.generation.text(1),
        )
        for one in measured
    ]
    rows += [
        (
            "ratio" if len(others) == 1 else f"ratio of {one.name}",
            f"{one.nbytes / first.nbytes:.2f}",
            f"{one.parameters / first.parameters:.2f}",
            f"{one.memory / first.memory:.2f}",
            ratio(one.prompt_rates, first.prompt_rates).text(2),
            ratio(one.generation_rates, first.generation_rates).text(2),
        )
        for one in others
    ]
    return rows


# ---- the process that runs one model with torch ------------------------------------------------


class _Meter:
    """Runs one model over and over; see :func:`bench_torch`."""

    def open(
        self,
        source: str,
        prompt_tokens: int,
        new_tokens: int,
        threads: int | None,
        dtype: str,
        trust_remote_code: bool,
    ) -> dict[str, int]:
        """Load the model and run it once, to warm up."""
        import torch
        from transformers.utils import logging

        from secateur.checkpoint import open_checkpoint
        from secateur.evaluation.speed import load_whole
        from secateur.progress import PeakMemory, give_back_memory

        logging.set_verbosity_error()
        if threads:
            torch.set_num_threads(threads)
        checkpoint = open_checkpoint(source, trust_remote_code=trust_remote_code)
        length = prompt_tokens + new_tokens
        most = getattr(checkpoint.config, "max_position_embeddings", None) or length
        if length > most:
            raise RecipeError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones are too many for "
                f"{source}, which has {most} positions"
            )
        give_back_memory()  # what reading the vocabulary of a GGUF file leaves is not the model's
        with PeakMemory() as memory:
            self._model = load_whole(checkpoint, getattr(torch, dtype))
            tokens = fixed_tokens(length, int(checkpoint.config.vocab_size))
            self._prompt = torch.tensor([tokens[:prompt_tokens]])  # (1, prompt)
            self._new = torch.tensor(tokens[prompt_tokens:])[:, None, None]  # (new, 1, 1)
            self.measure()
        return {
            "nbytes": checkpoint.nbytes,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "memory": memory.peak,
        }

    def measure(self) -> dict[str, float]:
        """Tokens per second of one turn."""
        import torch

        # As generate does it: of a prompt only the last logits are needed.
        takes = inspect.signature(self._model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        with torch.inference_mode():
            began = time.perf_counter()
            cache = self._model(input_ids=self._prompt, use_cache=True, **last).past_key_values
            between = time.perf_counter()
            for token in self._new:
                self._model(input_ids=token, past_key_values=cache, use_cache=True)
            ended = time.perf_counter()
        return {
            "prompt": self._prompt.numel() / (between - began),
            "generation": len(self._new) / (ended - between),
        }


def main() -> None:
    """Answer tasks; see the top of this file."""
    meter = _Meter()
    serve({"open": meter.open, "measure": meter.measure})


if __name__ == "__main__":
    main()

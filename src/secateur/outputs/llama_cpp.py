"""Everything that is asked of llama.cpp, always in a process of its own.

A bad file can abort the process that opens it, and memory can only be told by process. So
``python -m secateur.outputs.llama_cpp_process`` reads tasks from stdin, a line each, and answers
each with one JSON object on stdout; most functions here start it, ask one thing and let it go.
llama.cpp comes with the package cyllama, which is optional: ``pip install 'secateur[llama-cpp]'``.

The model always runs on the CPU. ``exact`` is for comparing values: it keeps the cache of keys and
values in float32 and turns off flash attention, which rounds both to float16 whatever the cache
holds. The logits of a 135M-parameter float32 file then differ from torch's by 1e-4 where they reach
36, instead of by 2e-2. Files of other types stay as inexact as their products are: llama.cpp
rounds the inputs of a float16 matrix to float16, those of a quantized one to 8 bits.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from secateur.errors import OutputError
from secateur.scratch import scratch
from secateur.workers import Worker

if TYPE_CHECKING:
    import torch

PACKAGE = "cyllama"
#: What a command says when it would have asked and cannot.
NOT_RUN = "not run in llama.cpp: pip install 'secateur[llama-cpp]', then secateur verify FILE"
#: Types that :func:`quantize` makes, as numbers of ``llama_ftype`` in llama.h; those that are of no
#: use without an importance matrix are left out.
QUANT_TYPES = {
    "f32": 0,
    "f16": 1,
    "bf16": 32,
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q5_1": 9,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k_l": 13,
    "q3_k_m": 12,
    "q3_k_s": 11,
    "q2_k": 10,
}
#: Tokens whose logits exist at once: 25 MB at a vocabulary of 49,152.
TOKENS_PER_CALL = 128


@dataclass(frozen=True)
class Speed:
    """How fast one file runs, and what it takes.

    Attributes:
        prompt: median tokens per second of processing a prompt.
        generation: median tokens per second of generation, one token at a time.
        memory: peak resident memory of the process, weights included, in bytes.
        nbytes: size of the file.
        parameters: number of parameters, tied ones once.
    """

    prompt: float
    generation: float
    memory: int
    nbytes: int
    parameters: int


def available() -> bool:
    """Whether cyllama is installed; it is not imported."""
    return find_spec(PACKAGE) is not None


def require(what: str) -> None:
    """Refuse ``what``, the words the message begins with, where cyllama is missing.

    Raises:
        OutputError: it is not installed.
    """
    if not available():
        raise OutputError(
            f"{what} runs llama.cpp through the package {PACKAGE}, which is not installed: "
            "pip install 'secateur[llama-cpp]'"
        )


# ---- what can be asked -------------------------------------------------------------------------


def tokenize(file: str | Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by the file's own vocabulary.

    Nothing is put before or behind; special tokens that are spelt out in a text are recognized.

    Raises:
        OutputError: llama.cpp refuses the file, or is not installed.
    """
    made: list[list[int]] = _ask(file, "tokenize", texts=list(texts))
    return made


def logits(file: str | Path, tokens: Sequence[int], *, exact: bool = True) -> torch.Tensor:
    """Logits behind each of ``tokens``, as float32 (length, vocabulary).

    Raises:
        OutputError: llama.cpp refuses the file or a token, or is not installed.
    """
    import numpy as np
    import torch

    with scratch() as folder:
        out = folder / "logits.npy"
        _ask(file, "logits", tokens=list(tokens), exact=exact, out=str(out))
        return torch.from_numpy(np.load(out))


def greedy(
    file: str | Path, prompts: Sequence[Sequence[int]], new_tokens: int, *, exact: bool = True
) -> list[list[int]]:
    """The ``new_tokens`` likeliest next tokens of each prompt, one after the other.

    The prompts are independent, each with at least one token. Nothing stops early: tokens that end
    a text are continued like any other.

    Raises:
        OutputError: llama.cpp refuses the file or a token, or is not installed.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    made: list[list[int]] = _ask(
        file, "greedy", prompts=[list(p) for p in prompts], new_tokens=new_tokens, exact=exact
    )
    return made


def losses(
    file: str | Path, windows: Sequence[Sequence[int]], *, exact: bool = True
) -> list[list[float]]:
    """Negative log likelihoods in nats: of each window's tokens but the first, given those before.

    Windows know nothing of each other. The softmax is taken in float64.

    Raises:
        OutputError: llama.cpp refuses the file or a token, or is not installed.
    """
    made: list[list[float]] = _ask(file, "losses", windows=[list(w) for w in windows], exact=exact)
    return made


def speed(
    file: str | Path,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
) -> Speed:
    """Median speeds over ``repeats`` runs, after one that warms up, with llama.cpp's own settings.

    A run processes a prompt of :func:`fixed_tokens`, for which only the last logits are computed,
    and behind it more of them one at a time. Nothing is sampled, so no Python stands between two
    tokens. The weights are read rather than mapped, so that they count as memory of the process.

    Args:
        threads: by default the number of cores.

    Raises:
        OutputError: llama.cpp refuses the file, or is not installed.
    """
    with open_worker(file) as worker:
        about = worker.ask(
            "open",
            source=str(file),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
        )
        runs = [worker.ask("measure") for _ in range(repeats)]
    return Speed(
        median(run["prompt"] for run in runs), median(run["generation"] for run in runs), **about
    )


def quantize(source: str | Path, target: str | Path, kind: str) -> list[str]:
    """Write ``source``, a GGUF file of floating point weights, to ``target`` in another type.

    Args:
        source: a file of type f32, f16 or bf16; what is quantized already is refused.
        target: the file to write; it appears, or is replaced, only when it is whole.
        kind: one of :data:`QUANT_TYPES`.

    Returns:
        llama.cpp's warnings. Those about tensors that got another type because their rows do not
        divide into its blocks are summed up, one line for each kind of reason.

    Raises:
        OutputError: the type is not known, or llama.cpp refuses the file or is not installed.
    """
    number = QUANT_TYPES.get(kind.lower())
    if number is None:
        raise OutputError(f"type is {kind!r}: llama.cpp writes {', '.join(QUANT_TYPES)}")
    target = Path(target)
    beside = target.with_name(f".{target.name}.tmp")
    try:
        warnings = _ask(source, "quantize", target=str(beside), ftype=number)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return _sum_up(warnings)


_FALLBACK = re.compile(
    r"\S+ - ncols (?P<columns>\d+) not divisible by (?P<block>\d+) \(required for type "
    r"(?P<wanted>\w+)\)( \(WARNING: .*\))? -> falling back to (?P<got>\w+)"
)


def _sum_up(warnings: Sequence[str]) -> list[str]:
    fallbacks: Counter[str] = Counter()
    others = []
    for line in warnings:
        if found := _FALLBACK.fullmatch(line):
            columns, block, wanted, got = found.group("columns", "block", "wanted", "got")
            fallbacks[f"{got} instead of {wanted}: rows of {columns} do not divide by {block}"] += 1
        elif "required fallback quantization" not in line:  # llama.cpp's own sum of the same
            others.append(line)
    return [
        f"{count} {'tensor is' if count == 1 else 'tensors are'} {reason}"
        for reason, count in fallbacks.items()
    ] + others


def fixed_tokens(count: int, vocabulary: int) -> list[int]:
    """The same ``count`` token ids for every model of at least 256 tokens; speed needs no sense."""
    return [(7 + 31 * i) % min(vocabulary, 256) for i in range(count)]


def open_worker(file: str | Path, **environment: str) -> Worker:
    """A process for tasks about one file; ``environment`` as for :class:`Worker`.

    Raises:
        OutputError: no such file, or cyllama is not installed.
    """
    require(f"opening {file}")
    if not Path(file).is_file():
        raise OutputError(f"{file} is no file: give the path of a GGUF file")
    module = "secateur.outputs.llama_cpp_process"
    return Worker(module, f"llama.cpp, at work on {file},", **environment)


def _ask(file: str | Path, task: str, **arguments: Any) -> Any:
    # Threads of OpenMP spin while they wait for each other, and so keep the cores from those they
    # wait for when anything else runs: up to ten times slower on two busy cores. On idle ones
    # generation is twice as fast with spinning, so speed is measured with it.
    with open_worker(file, OMP_WAIT_POLICY="passive") as worker:
        return worker.ask(task, file=str(file), **arguments)

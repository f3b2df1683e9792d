"""How much memory and time a run will take, before it starts."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.anatomy import Anatomy
from secateur.boundaries import IN_MEMORY
from secateur.errors import MemoryLimitError, RecipeError
from secateur.layers import search_work
from secateur.methods import Method
from secateur.methods.base import SurveyBy
from secateur.recipe import BYTE_UNITS, parse_amount
from secateur.replaying import first_passes, second_pass
from secateur.rereading import is_large
from secateur.statistics import are_few
from secateur.streaming import TOKENS_PER_CALL, TOKENS_PER_HEAD_CALL

#: Python, torch and transformers themselves, measured on Linux; mapped library pages left out.
BASE = 320 * 2**20
#: Most of freed memory that stays with the process; larger pieces go back at once.
NOT_GIVEN_BACK = 2**28
#: Parts that only the process has that looks at all blocks.
WHOLE_RUN = ("block boundaries", "the whole model, to write text", "gradients of a block")


@dataclass(frozen=True)
class Estimate:
    """Peak memory in bytes by part, and seconds."""

    parts: dict[str, int]
    seconds: float

    @property
    def memory(self) -> int:
        return sum(self.parts.values())

    @property
    def worker(self) -> int:
        """Bytes of a process that cuts single blocks: it has what goes into one of them alone."""
        return self.memory - sum(self.parts.get(name, 0) for name in WHOLE_RUN)

    def with_workers(self, workers: int) -> int:
        """Bytes of the process that was started, and of so many that cut single blocks for it."""
        return self.memory + workers * self.worker

    def text(self) -> str:
        return (
            f"estimate: {self.memory / 2**20:.0f} MiB of memory ("
            + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in self.parts.items())
            + f"), about {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Work:
    """What a run takes.

    Attributes:
        passes: over all blocks.
        heads: through the head, for losses.
        cuts: of all blocks, each with its factorisations and fits.
    """

    passes: float
    heads: int
    cuts: int


def work_of(
    method: Method,
    anatomy: Anatomy,
    counts: Sequence[int],
    tokens: int,
    survey: SurveyBy | None,
) -> Work:
    """What a run takes, about.

    Args:
        counts: numbers of whole blocks that may be removed (:meth:`Engine.layer_counts`).
        tokens: that statistics are taken from.
        survey: see :meth:`Method.survey_by`.
    """
    if method.ranking == "loss":
        runs, heads = search_work(method, anatomy.layers, counts[0])
        return Work(runs / anatomy.layers, heads, 0)
    reads = bool(method.signals(anatomy))
    cut = first_passes(method, anatomy) + second_pass(method, anatomy, tokens)
    by_gradients = survey == "gradients"
    # Forward twice; backward is worth two more.
    back, heads = (4, 3) if by_gradients else (0, 0)
    if method.ranking is None and by_gradients:
        return Work(cut + back, heads, 1)
    if method.ranking is None:
        looked = survey == "statistics"
        solved = looked and method.survey_needs == "moments"
        return Work(cut + reads * looked, 0, 1 + solved)
    trials = min(3, len(counts)) if len(counts) > 1 else 0
    surveys = 1 + bool(trials)  # one for all trials, since it is of the uncut model
    passes = (1 + cut) * (1 + trials) + back * surveys
    return Work(passes, trials + heads * surveys, 1 + trials)


def estimate(
    anatomy: Anatomy,
    signals: set[str],
    *,
    windows: int,
    length: int,
    hidden: int,
    vocabulary: int,
    passes: float,
    heads: float = 0,
    solving: float = 0,
    solver: int = 0,
    kept: int = 0,
    overhead: int = 0,
    whole: bool = False,
    gradients: int = 0,
    waits: bool = False,
) -> Estimate:
    """Estimate one run from counts of bytes and operations and a short measurement.

    Args:
        signals: signals whose second moments are gathered.
        windows, length: of the calibration.
        passes: forward passes over all blocks, the layer stage and trials included.
        heads: passes through the head besides, for losses.
        solving: operations with which all blocks are cut (:meth:`Method.solving`).
        solver: bytes that solving one layer takes (:meth:`Method.solver_bytes`).
        kept: bytes of activations that a block keeps for a second pass.
        overhead: bytes that the open checkpoint takes.
        whole: whether the model writes windows itself, and is in memory as a whole for that.
        gradients: of a block, how many copies are held while the loss is passed back through the
            model; the work of that is in ``passes``.
        waits: whether a large block is read again instead of kept while it is cut.
    """
    tokens = windows * length
    batch = min(tokens, TOKENS_PER_CALL)
    widths = {d.reads: d.inputs for d in anatomy.denses.values() if d.reads in signals}
    ffn = max(max(d.rows, d.inputs) for d in anatomy.denses.values())
    scan = anatomy.tensors.get(anatomy.family.states or "")
    states = scan.rows * scan.each if scan is not None else 0
    # Read, rounded to the written type, and back in float32: two and a half copies. Without losses
    # the head is never read.
    outside = 10 * (anatomy.outside_parameters if heads else vocabulary * hidden)
    outside += 4 * 3 * vocabulary * min(length, TOKENS_PER_HEAD_CALL) if heads else 0
    # In the module, with what is read into it; and later what is new of it masked, and sliced.
    held, block = 6 * anatomy.block_parameters, 10 * anatomy.block_parameters
    # While layers are solved, instead of the block one weight, its inputs in an order, as read.
    beside = 10 * max(d.rows * d.inputs for d in anatomy.denses.values())
    beside = beside if waits and is_large(anatomy) else held
    moments = sum(4 * w * (tokens if are_few(tokens, w) else 2 * w) for w in widths.values())
    matrices = max(held + moments, beside + moments + solver, block)
    call = 4 * batch * (3 * ffn + 4 * states + 6 * hidden)
    parts = {
        "program": BASE + overhead,
        "a block and its matrices": matrices,
        # Never needed together with those, but not all freed memory is given back.
        "embeddings and logits": max(outside - matrices, min(outside, NOT_GIVEN_BACK)),
        "activations": max(held + moments + call - matrices, min(call, NOT_GIVEN_BACK))
        + 4 * tokens * hidden * 3
        + kept,
        "block boundaries": min(4 * tokens * hidden * (anatomy.layers + 1), IN_MEMORY),
    }
    if whole:
        parts["the whole model, to write text"] = 4 * anatomy.parameters
    if gradients:  # beside the block alone: it is not cut meanwhile
        survey = 4 * (1 + gradients) * anatomy.block_parameters
        parts["gradients of a block"] = max(0, survey - matrices)
    forward = 2 * tokens * (anatomy.decoder_parameters * passes + vocabulary * hidden * heads)
    read = 4 * anatomy.parameters * passes / 1e9
    return Estimate(parts, (forward + solving) / _matrix_rate() + read + 10)


def check_memory(found: Estimate, limit: str | None, *, beside: int = 1) -> None:
    """Refuse to start when the estimate is above ``limit`` (such as ``4GB``).

    Args:
        beside: runs like this one that share the limit.

    Raises:
        MemoryLimitError: it is.
        RecipeError: the limit cannot be read.
    """
    if limit is None:
        return
    allowed = parse_limit(limit)
    if found.memory > allowed:
        largest = max(found.parts, key=lambda name: found.parts[name])
        raise MemoryLimitError(
            f"the run is estimated at {found.memory / 2**20:.0f} MiB, --max-memory allows "
            f"{allowed / 2**20:.0f} MiB; the largest part is {largest} "
            f"({found.parts[largest] / 2**20:.0f} MiB): lower --samples or --length, or raise "
            "--max-memory"
        )
    if beside * found.memory > allowed:
        raise MemoryLimitError(
            f"the run is estimated at {found.memory / 2**20:.0f} MiB, {beside} of them side by "
            f"side at {beside * found.memory / 2**20:.0f} MiB, --max-memory allows "
            f"{allowed / 2**20:.0f} MiB: use --workers {allowed // found.memory}, or raise "
            "--max-memory"
        )


def check_workers(found: Estimate, limit: str | None, workers: int, machines: int = 1) -> None:
    """Refuse to start when a run and its workers are estimated above ``limit``.

    Args:
        workers: on one machine, beside the process that was started.
        machines: that have as many each.

    Raises:
        MemoryLimitError: they are.
    """
    if limit is None or found.with_workers(workers) <= (allowed := parse_limit(limit)):
        return
    fit = max(0, allowed - found.memory) // found.worker
    way = f"use --workers {fit * machines}" if fit * machines > 1 else "leave out --workers"
    raise MemoryLimitError(
        f"the run is estimated at {found.memory / 2**20:.0f} MiB and {found.worker / 2**20:.0f} "
        f"MiB in each of {workers} workers, {found.with_workers(workers) / 2**20:.0f} MiB "
        f"together, --max-memory allows {allowed / 2**20:.0f} MiB, which is enough for {fit}: "
        f"{way}, or raise --max-memory"
    )


def parse_limit(limit: str) -> int:
    """``--max-memory`` in bytes.

    Raises:
        RecipeError: it has no unit, or cannot be read.
    """
    if not re.search(r"[A-Za-z]", limit):
        raise RecipeError(f"max-memory is {limit!r}: write a unit too, such as 4GB or 900MiB")
    return parse_amount(limit, BYTE_UNITS, "max-memory", "4GB")


def _matrix_rate() -> float:
    """Operations per second of a float32 matrix product on this machine, measured briefly."""
    a = torch.ones(512, 512)
    a @ a
    began = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 512**3 / max(time.perf_counter() - began, 1e-6) / 2

"""Seconds of making zeros in one layer, each way as a ratio to SparseGPT in the same run.

    python bench/removal_speed.py [ROWSxINPUTS ...] [--repeats 3]

The layer and its second moment are random, with inputs about as much alike as those of SmolLM2's
layers: apt takes a few more steps of conjugate gradients a block here. Processor time. The plain
way, one dense solve for each row, is measured on a few rows and multiplied.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

from secateur.methods.apt import AptOptions
from secateur.solvers.gram import damped
from secateur.solvers.removal import Removal, Sparse, inverse_factor, relative_error, remove
from secateur.solvers.sparse_fit import best_pull, polish
from secateur.sparsity import parse_sparsity

DEFAULTS = AptOptions()
WAYS = {
    "sparsegpt": Removal("S", "S", 128, 0.01, shrinking=True),
    "apt SM": Removal("S", "M", 128, 0.1),
    "apt MM": Removal("M", "M", 128, 0.1, rounds=DEFAULTS.rounds),
}
PLAIN_ROWS = 4
T = TypeVar("T")


def problem(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    second = torch.zeros(width, width, dtype=torch.float64)
    scale = torch.rand(width, generator=generator) * 2 + 0.1
    for _ in range(8):
        x = torch.randn(width // 2, width, generator=generator) * scale
        x = x + 0.2 * x.roll(1, 1)
        second += x.T @ x
    return torch.randn(rows, width, generator=generator), second / (4 * width)


def timed(work: Callable[..., T], *given: object, repeats: int) -> tuple[T, float]:
    """What it gives, and the median of its seconds."""
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        found = work(*given)
        taken.append(time.process_time() - began)
    return found, median(taken)


def plain(weight: torch.Tensor, second: torch.Tensor, mask: torch.Tensor) -> None:
    matrix = damped(second, 0.01)
    for row, gone in zip(weight[:PLAIN_ROWS], mask, strict=False):
        kept = (~gone).nonzero()[:, 0]
        torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ row.double())


def fit(found: Sparse, weight: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    pull = best_pull(found.weight, found.mask, weight, second, second)
    return polish(found.weight, found.mask, weight, second, pull=pull, steps=DEFAULTS.polish)


def measure(rows: int, width: int, text: str, repeats: int) -> None:
    """Print the lines of one layer and one sparsity."""
    weight, second = problem(rows, width)
    pattern = parse_sparsity(text)
    count = round(pattern.share * weight.numel())
    lines: list[tuple[str, float, float | None]] = []
    for way, how in WAYS.items():
        found, taken = timed(remove, weight, second, pattern, count, how, repeats=repeats)
        lines.append((way, taken, relative_error(weight, found.weight, second)))
    fitted, more = timed(fit, found, weight, second, repeats=repeats)
    lost = relative_error(weight, fitted, second)
    lines.append(("apt MM and the fit", lines[-1][1] + more, lost))
    lines.append(("of each, U of H", timed(inverse_factor, second, 0.1, repeats=1)[1], None))
    if rows * width < 2_000_000:
        each = timed(plain, weight, second, found.mask, repeats=1)[1] / PLAIN_ROWS
        lines.append(("one solve a row", each * rows, None))
    for way, taken, error in lines:
        said = "" if error is None else f"{error:.4f}"
        ratio = taken / lines[0][1]
        print(
            f"| {rows} x {width} | {text} | {way} | {taken:.2f} | {ratio:.1f} | {said} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["1536x576", "576x1536"])
    parser.add_argument("--sparsity", nargs="+", default=["50%", "2:4", "4:8"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("| layer | zeros | way | seconds | x SparseGPT | output error |")
    print("|---|---|---|---|---|---|")
    for shape in args.shapes:
        rows, width = map(int, shape.split("x"))
        for text in args.sparsity:
            measure(rows, width, text, args.repeats)


if __name__ == "__main__":
    main()

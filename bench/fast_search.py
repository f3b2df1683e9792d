"""Time of the fast neuron stage against a literal Algorithm 1 with LSMR, in one run.

    python bench/fast_search.py [--widths 256 512 1024 1536]

One linear layer of each width on synthetic inputs with a decaying spectrum. Both find which inputs
go and their tuned scales at a quarter of the inputs removed, on the same grid of c. The literal
algorithm solves a least-squares problem by LSMR at every c it looks at, and begins at c = 0 again
whenever the threshold rises, as the paper's listing does ("c kept": it does not); the fast one
factorises once. Prints a Markdown table with the ratios; the last line fits the exponents.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from literal_comp import literal_neuron_stage

from secateur.solvers.budget import Curve, LazyValues, threshold_search
from secateur.solvers.gram import damped, gram, importance, ordering
from secateur.solvers.mask_tuning import MaskCurve

NAME = "down"
DAMPING = 0.01
GRID = 64


def problem(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """G of a layer with ``width`` inputs, and the order of its inputs."""
    generator = torch.Generator().manual_seed(width)
    rows = max(64, width * 3 // 8)
    weight = torch.randn(rows, width, generator=generator)
    x = torch.randn(1280, width, generator=generator)
    x = x @ torch.diag(torch.logspace(0, -2, width)) + 0.05 * torch.randn(
        1280, width, generator=generator
    )
    covariance = (x.T @ x).double() / len(x)
    g = gram(weight, covariance)
    return g, importance("energy", g, damping=1e-4, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[256, 512, 1024, 1536])
    parser.add_argument("--no-literal-above", type=int, default=4096)
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, damping {DAMPING}, {GRID} steps of c")
    print(
        "| inputs | literal, s | c kept, s | fast, s | ratio | ratio, c kept | same inputs "
        "| scales off by |"
    )
    print("|---|---|---|---|---|---|---|---|")
    seen: list[tuple[int, float, float]] = []
    for width in args.widths:
        g, scores = problem(width)
        step = max(1, width // GRID)
        counts = [*range(0, width - 1, step), width - 1]
        quota = width // 4

        def removed(found: Mapping[str, int]) -> int:
            return found[NAME]

        times = []
        for _ in range(4 if width <= args.no_literal_above else 1):  # the first warms up
            began = time.perf_counter()
            curve = MaskCurve(ordering(g), scores, DAMPING)
            values = LazyValues(curve.variance, counts)
            stops, _ = threshold_search({NAME: Curve(counts, values)}, removed, quota)
            fast_scales = curve.tuned(stops[NAME])
            fast_kept = curve.kept(stops[NAME])
            times.append(time.perf_counter() - began)
        fast = statistics.median(times[1:] or times)
        if width > args.no_literal_above:
            print(f"| {width} | - | - | {fast:.2f} | - | - | - | - |", flush=True)
            continue
        # What the paper has at hand, A itself, is not timed; nor are digits that nobody needs.
        root = torch.linalg.cholesky(damped(g, 1e-9)).T.contiguous().numpy()
        slow = {}
        for restart in (False, True):
            began = time.perf_counter()
            kept, scales = literal_neuron_stage(
                {NAME: g.numpy()},
                {NAME: torch.argsort(scores, stable=True).numpy()},
                {NAME: counts},
                damping=DAMPING,
                removed=removed,
                quota=quota,
                roots={NAME: root},
                tolerance=1e-6,
                restart=restart,
            )[NAME]
            slow[restart] = time.perf_counter() - began
        same = kept.tolist() == fast_kept.tolist()
        off = float((torch.as_tensor(scales) - fast_scales).abs().max()) if same else math.nan
        seen.append((width, slow[True], fast))
        print(
            f"| {width} | {slow[True]:.2f} | {slow[False]:.2f} | {fast:.3f} | "
            f"{slow[True] / fast:.0f} | {slow[False] / fast:.0f} | {same} | {off:.0e} |",
            flush=True,
        )
    if len(seen) > 1:
        (w0, s0, f0), (w1, s1, f1) = seen[0], seen[-1]
        span = math.log(w1 / w0)
        print(
            f"exponent of the time: literal {math.log(s1 / s0) / span:.2f}, "
            f"fast {math.log(f1 / f0) / span:.2f}"
        )


if __name__ == "__main__":
    main()

"""Draw importance and removed share of every block from a ``secateur.json``.

python bench/picture.py OUT/secateur.json picture.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

INK, ACCENT, FAINT = "#22313f", "#3b7a57", "#c9d3d0"


def main(record_path: str, picture: str) -> None:
    record = json.loads(Path(record_path).read_text())
    blocks = {b["source"]: b["share_removed"] for b in record["plan"]["blocks"]}
    removed = record["plan"]["removed_layers"]
    importances = {int(k): v for k, v in record["layer_stage"]["importances"].items()}
    layers = sorted([*blocks, *removed])
    mpl.rcParams["svg.hashsalt"] = "secateur"
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    shares = [100 * blocks.get(i, 1.0) for i in layers]
    colors = [FAINT if i in removed else ACCENT for i in layers]
    axes.bar(layers, shares, color=colors, width=0.8)
    for i in removed:
        axes.text(i, 50, "removed whole", rotation=90, ha="center", va="center", color=INK)
    axes.set_xlabel("block")
    axes.set_ylabel("share of its parameters removed, %", color=ACCENT)
    axes.set_xlim(-0.7, max(layers) + 0.7)
    axes.spines[["top"]].set_visible(False)
    other = axes.twinx()
    kept = sorted(importances)
    other.plot(kept, [importances[i] for i in kept], "o-", color=INK, markersize=3, linewidth=1)
    other.set_ylabel("importance, 1 - cos(input, output)", color=INK)
    other.set_yscale("log")
    other.spines[["top"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])

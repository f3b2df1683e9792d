"""Which whole blocks go, one after the other: by what each does to the stream, or by the loss.

A method says how (:attr:`~secateur.methods.Method.ranking`); the model is run here, one block's
weights in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from secateur.boundaries import Boundaries
from secateur.errors import SourceError
from secateur.magnitude import growth
from secateur.methods import Method
from secateur.progress import Progress
from secateur.streaming import Stream


@dataclass(frozen=True)
class LayerChoice:
    """Blocks that stay, the importance of each, and blocks in order of removal.

    Importances are those on the shortened model; where they are losses, which are dear, those of
    the last removal.

    ``held_out_loss`` is the mean loss per token on windows kept out of the statistics, where the
    number of removed blocks was chosen by it. ``growths`` are those of the removed blocks
    (:mod:`secateur.magnitude`), where blocks were ranked by what they do to the stream.
    """

    layers: list[int]
    importances: dict[int, float]
    removed: list[int]
    held_out_loss: float | None = None
    growths: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Round:
    """One removal by the loss, as it goes into a journal.

    Attributes:
        removed: the block that went.
        loss: mean loss per token without it, and without those that went before it, in nats.
        rises: by how much the loss rises with the removal of each block that was looked at.
        runs: blocks that were run for this.
    """

    removed: int
    loss: float
    rises: dict[int, float]
    runs: int

    def to_json(self) -> dict[str, Any]:
        """Values that JSON keeps to the last digit."""
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Round:
        """The reverse of :meth:`to_json`; JSON has made texts of the blocks' numbers."""
        return cls(**{**values, "rises": {int(k): v for k, v in values["rises"].items()}})


def by_influence(
    stream: Stream, method: Method, tokens: torch.Tensor, progress: Progress
) -> Iterator[LayerChoice]:
    """With 0, 1, 2, ... blocks removed, each time the least important of what is left.

    After a removal only what lies behind it is run again, since nothing before it changed; and
    nothing at all where the method takes importances once (:attr:`Method.looks_again`).

    Raises:
        SourceError: a block puts out values that are not finite.
    """
    layers = list(range(stream.anatomy.layers))
    removed: list[int] = []
    importances: dict[int, float] = {}
    growths: dict[int, float] = {}
    inputs = Boundaries()
    try:
        hidden = stream.embed(tokens)
        start = 0
        while True:
            if method.looks_again or not removed:
                progress.stage(f"layer stage, {len(removed)} removed", len(layers) - start)
                for layer in layers[start:]:
                    if method.looks_again:
                        inputs[layer] = hidden
                    with stream.block(layer) as module:
                        out = stream.forward_block(layer, module, hidden)
                    importances[layer] = method.layer_importance(hidden, out)
                    _check_finite(importances[layer], f"block {layer} puts out")
                    growths[layer] = growth(hidden, out)
                    hidden = out
                    progress.step(f"block {layer} importance {importances[layer]:.4f}")
                progress.finish()
            gone = {layer: growths[layer] for layer in removed}
            yield LayerChoice(list(layers), dict(importances), list(removed), growths=gone)
            worst = min(method.candidates(layers), key=lambda layer: importances[layer])
            start = layers.index(worst)
            layers.remove(worst)
            del importances[worst]
            removed.append(worst)
            if method.looks_again:
                hidden = inputs[worst].to(stream.device)
    finally:
        inputs.close()


def by_loss(
    stream: Stream,
    method: Method,
    tokens: torch.Tensor,
    count: int,
    progress: Progress,
    *,
    known: Sequence[Round] = (),
    note: Callable[[Round], None] = lambda _: None,
) -> tuple[LayerChoice, list[Round]]:
    """Remove ``count`` blocks, each time the one without which the loss is least.

    Args:
        tokens: (windows, length), on which the loss is taken.
        known: removals of an earlier, killed run, in order.
        note: called with every further one.

    Raises:
        SourceError: no removal leaves a finite loss.
    """
    layers = list(range(stream.anatomy.layers))
    rounds = list(known)
    for earlier in rounds:
        layers.remove(earlier.removed)
    config = stream.checkpoint.config
    head = max(1, round(config.vocab_size * config.hidden_size / stream.anatomy.block_parameters))
    runs, losses = search_work(method, stream.anatomy.layers, count, done=len(rounds))
    progress.stage("choosing blocks by the loss", runs + head * losses)
    while len(rounds) < count:
        rounds.append(_round(stream, method, layers, tokens, rounds, head, progress))
        layers.remove(rounds[-1].removed)
        note(rounds[-1])
    progress.finish()
    last = rounds[-1].rises if rounds else {}
    choice = LayerChoice(
        layers, {i: last[i] for i in layers if i in last}, [each.removed for each in rounds]
    )
    return choice, rounds


def _round(
    stream: Stream,
    method: Method,
    layers: list[int],
    tokens: torch.Tensor,
    before: list[Round],
    head: int,
    progress: Progress,
) -> Round:
    """Look at every block that may go, and choose."""
    may_go = method.candidates(layers)
    said = f"{len(before)} removed"
    whole = before[-1].loss if before else None
    losses = losses_without(
        stream, layers, may_go, tokens, whole=whole is None,
        step=lambda blocks: progress.step(said, blocks), head=head,
    )  # fmt: skip
    base = losses.pop(None) if whole is None else whole
    _check_finite(base, "the model puts out")
    finite = [layer for layer in may_go if math.isfinite(losses[layer])]
    if not finite:
        _check_finite(math.nan, "without any one of its blocks the model puts out")
    worst = min(finite, key=lambda layer: losses[layer])
    runs = block_runs(layers, may_go, whole=whole is None)
    progress.note(f"block {worst} removed: loss {losses[worst]:.4f} ({losses[worst] - base:+.4f})")
    return Round(worst, losses[worst], {i: losses[i] - base for i in finite}, runs)


def losses_without(
    stream: Stream,
    layers: Sequence[int],
    may_go: Sequence[int],
    tokens: torch.Tensor,
    *,
    whole: bool = False,
    step: Callable[[int], None] = lambda _: None,
    head: int = 1,
) -> dict[int | None, float]:
    """Mean loss per token of the model of ``layers`` without each one of ``may_go``.

    All shortened models go through the blocks abreast: each block's weights are read once, not once
    a model. What waits between blocks is one activation a model, which moves to disk when it is
    much.

    Args:
        tokens: (windows, length).
        whole: also with all of ``layers``, under the key None.
        step: called with 1 after every run of a block, with ``head`` after every loss.
    """
    waiting = Boundaries()
    abreast: list[int] = []
    try:
        hidden = stream.embed(tokens)
        last = max(may_go)
        for layer in layers:
            with stream.block(layer) as module:
                for gone in abreast:
                    inputs = waiting[gone].to(stream.device)
                    waiting[gone] = stream.forward_block(layer, module, inputs)
                    step(1)
                if layer in may_go:
                    waiting[layer] = hidden
                    abreast.append(layer)
                if whole or layer < last:
                    hidden = stream.forward_block(layer, module, hidden)
                    step(1)
        ends = (waiting[gone].to(stream.device) for gone in abreast)
        found: dict[int | None, float] = {}
        names: list[int | None] = [*abreast, None] if whole else [*abreast]
        losses = stream.losses_each(itertools.chain(ends, [hidden] if whole else []), tokens)
        for name, loss in zip(names, losses, strict=True):
            found[name] = float(loss.mean())
            step(head)
        return found
    finally:
        waiting.close()


def block_runs(layers: Sequence[int], may_go: Sequence[int], *, whole: bool) -> int:
    """Blocks that :func:`losses_without` runs."""
    places = [place for place, layer in enumerate(layers) if layer in may_go]
    return sum(len(layers) - 1 - p for p in places) + (len(layers) if whole else places[-1])


def search_work(method: Method, layers: int, rounds: int, done: int = 0) -> tuple[int, int]:
    """Block runs and losses of :func:`by_loss`, of ``rounds`` removals of which some are done.

    Which blocks go does not matter for that, only how many are left.
    """
    runs = losses = 0
    for gone in range(done, rounds):
        left = range(layers - gone)
        may_go = method.candidates(left)
        runs += block_runs(left, may_go, whole=not gone)
        losses += len(may_go) + (not gone)
    return runs, losses


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise SourceError(
            f"{what} NaN or infinite values on the calibration text: check the weights, or try "
            "other text with --calibration"
        )

"""The pass over the calibration text: a basis for every stage, from the already sliced network.

The network runs in its own width with its own weights; slicing is the projection of the stream on
the directions that stay. So one block is in memory, nothing is rotated before it is written, and
the hidden states of one place in the model are all that is held of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import SourceError
from secateur.methods.rotating import Rotating
from secateur.plans import BlockCut, Tensors
from secateur.progress import Progress
from secateur.rotation.modules import added
from secateur.rotation.plan import RotationPlan
from secateur.streaming import Stream

#: Name of a block's note: share of the stream's second moment that the kept directions hold.
KEPT = "share_of_second_moment_kept"
#: Takes a finished block: its cut, its original tensors, and the bases around its stages.
RotationSink = Callable[[BlockCut, Tensors, list[torch.Tensor]], None]


def find_bases(
    stream: Stream,
    method: Rotating,
    plan: RotationPlan,
    tokens: torch.Tensor,
    progress: Progress,
    *,
    sink: RotationSink | None = None,
    done: Mapping[int, BlockCut] | None = None,
) -> None:
    """Fill ``plan`` with a cut for every block.

    Args:
        plan: empty, with the widths to cut to; where ``done`` is given, with those blocks' bases.
        tokens: (windows, length), for the statistics.
        sink: called with each block that is finished here.
        done: blocks of an earlier, killed run; those are only run through.

    Raises:
        SourceError: activations are not finite.
    """
    done = done or {}
    layers = stream.anatomy.layers
    stages = plan.run_time()["rotation"]["stages"]
    progress.stage("slicing blocks", layers)
    if len(done) == layers:  # nothing left to find out
        plan.blocks.extend(done[layer] for layer in range(layers))
        progress.finish()
        return
    walk = _Walk(method, plan)
    first = _stored(plan, 0)[0] if 0 in done else None
    walk.turn(stream.embed(tokens), plan.cut.kept, first, "the embedding")
    for layer in range(layers):
        widths = plan.cut.widths(plan.anatomy, plan.stream, layer)
        stored = _stored(plan, layer) if layer in done else None
        # What is kept in front of a block was noted behind the one before.
        bases, held = [walk.basis], [walk.held] if layer == 0 else []
        with stream.block(layer) as block:
            for place, stage in enumerate(stages, 1):
                out = stream.forward_block(layer, _Stage(block, stage), walk.hidden)
                basis = stored[place] if stored is not None else None
                walk.turn(out, widths[place], basis, f"block {layer}")
                bases.append(walk.basis)
                held.append(walk.held)
            cut = done.get(layer) or BlockCut(layer, notes={KEPT: [round(h, 6) for h in held]})
            plan.blocks.append(cut)
            if sink is not None and layer not in done:
                state = {k: v.detach().cpu() for k, v in block.state_dict().items()}
                sink(cut, state, [basis.cpu() for basis in bases])
        progress.step(f"block {layer}")
    progress.finish()


def _stored(plan: RotationPlan, block: int) -> list[torch.Tensor]:
    assert plan.bases is not None
    return plan.bases.of_block(block)


class _Walk:
    """The stream of the sliced network on its way, in full width."""

    hidden: torch.Tensor
    basis: torch.Tensor
    held: float

    def __init__(self, method: Rotating, plan: RotationPlan) -> None:
        self.method = method
        self.centred = plan.stream.centred

    def turn(
        self, hidden: torch.Tensor, width: int, basis: torch.Tensor | None, where: str
    ) -> None:
        """Take what a stage puts out, and project it; on a new basis where none is given."""
        if self.centred:
            hidden = hidden - hidden.mean(-1, keepdim=True)
        self.held = 1.0
        if basis is None:
            try:
                basis, self.held = self.method.basis(hidden, width, centred=self.centred)
            except ArithmeticError as error:
                raise SourceError(
                    f"{where} puts out NaN or infinite values on the calibration text: check the "
                    "weights, or try other text with --calibration"
                ) from error
        self.basis = basis.to(hidden)
        self.hidden = hidden @ self.basis @ self.basis.T


class _Stage(nn.Module):
    """One stage of a block of the original, as if it were a block: x + f(norm(x))."""

    def __init__(self, block: Any, stage: dict[str, Any]) -> None:
        super().__init__()
        self.block = block
        self.stage = stage

    def forward(self, hidden: torch.Tensor, **context: Any) -> torch.Tensor:
        return hidden + added(self.block, self.stage, hidden, context)

"""One block at a time: its statistics, its cut, and what it puts out."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from secateur.masking import masked, state_of
from secateur.methods import Block, Method, Share
from secateur.neurons import Neurons, noted_neurons
from secateur.numerics import cut_by, noting_steps
from secateur.plans import BlockCut, check_cut
from secateur.recording import Enough
from secateur.replaying import Passed
from secateur.statistics import Channels, Moments, gather
from secateur.streaming import Stream


class Inside:
    """The inside of a model's blocks, as one method sees and cuts it.

    Args:
        stream: the model.
        method: the method.
        seed: of everything drawn inside blocks.
        dtype: floating type of the written weights; what follows a cut sees weights rounded to it.
    """

    def __init__(self, stream: Stream, method: Method, *, seed: int, dtype: torch.dtype) -> None:
        self.stream = stream
        self.method = method
        self.seed = seed
        self.dtype = dtype

    def look(
        self,
        layer: int,
        module: torch.nn.Module,
        hidden: torch.Tensor | None,
        share: Share | None = None,
        late: int = 0,
        only: set[str] | None = None,
        passes: bool = True,
    ) -> tuple[Block, torch.Tensor | None]:
        """A block as a method sees it, with statistics, and what it puts out.

        Args:
            share: what the block shall lose; without it, as for a survey, statistics are taken.
            late: windows at the end whose statistics are also kept apart.
            only: signals of which statistics are taken; without it, all that the method wants.
            passes: whether what it puts out is wanted. Else it runs as far as statistics need.
        """
        anatomy, method = self.stream.anatomy, self.method
        signals = self.signals(1 if share is None else share.parameters)
        signals = signals if only is None else signals & only
        readers = {signal: anatomy.by_signal[signal][0] for signal in sorted(signals)}
        behind = {s: place for s in readers if (place := anatomy.behind(s)) is not None}
        apart = None
        if hidden is not None and late and readers:
            windows, length = hidden.shape[:2]
            apart = (windows - late) * length
        moments: dict[str, Moments] = {}
        held_out: dict[str, Moments] = {}
        channels: dict[str, Channels] = {}
        run = self.pass_on if passes else self._run
        hidden = hidden if passes or readers else None
        needs = method.needs if share is not None else method.survey_needs
        neurons: list[Neurons] = []
        if needs == "moments":
            relative = method.relative(anatomy)
            with ExitStack() as stack:
                if readers and share is not None and self._fits_neurons(hidden):
                    weighed = bool(relative)
                    end = 0 if apart is None or hidden is None else late * hidden.shape[1]
                    noted = noted_neurons(module, anatomy, late=end, relative=weighed)
                    neurons = stack.enter_context(noted)
                moments, held_out = stack.enter_context(
                    gather(module, readers, Moments, apart, behind, relative, only=not passes)
                )
                out = run(layer, module, hidden)
        else:
            with gather(module, readers, Channels, behind=behind, only=not passes) as (channels, _):
                out = run(layer, module, hidden)
        own = Share(0) if share is None else share
        block = self.block(
            layer,
            module,
            moments=moments,
            held_out=held_out if apart is not None else {},
            channels=channels,
            lose=own.inputs,
            units=own.units,
            scores=own.scores,
            factor=own.factor,
            neurons=neurons[0] if neurons else None,
        )
        return block, out

    def _fits_neurons(self, hidden: torch.Tensor | None) -> bool:
        if hidden is None:
            return False
        return self.method.fits_neurons(self.stream.anatomy, hidden.shape[:2].numel())

    def block(self, layer: int, module: torch.nn.Module, **seen: Any) -> Block:
        """A block with its weights, and what else is seen of it by the names of :class:`Block`."""
        anatomy = self.stream.anatomy
        own = {name: module.get_submodule(name) for name in anatomy.denses}
        return Block(
            layer,
            anatomy,
            {name: dense.get_parameter("weight").detach() for name, dense in own.items()},
            generator=torch.Generator().manual_seed(self.seed * 100_003 + layer),
            biases={
                n: d.get_parameter("bias").detach()
                for n, d in own.items()
                if anatomy.denses[n].bias
            },
            **{"moments": {}, **seen},
        )

    def signals(self, quota: int) -> set[str]:
        """Signals whose statistics the cut of a block needs."""
        return self.method.signals(self.stream.anatomy) if self._cuts(quota) else set()

    def _cuts(self, quota: int) -> bool:
        """Whether anything is looked for in a block that shall lose so much."""
        return quota > 0 or self.method.cuts_every_block

    def pass_on(
        self, layer: int, module: torch.nn.Module, hidden: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What a block puts out, where anything behind it needs that."""
        return None if hidden is None else self.stream.forward_block(layer, module, hidden)

    def pass_done(
        self, layer: int, module: torch.nn.Module, hidden: torch.Tensor | None, passed: Passed
    ) -> torch.Tensor | None:
        """The first pass of a block that an earlier run has cut."""
        if self.method.identical_inputs:
            return self.pass_on(layer, module, hidden)
        if passed.before_cut:
            with passed.noted(module):
                self._run(layer, module, hidden)
        return None

    @torch.no_grad()
    def _run(self, layer: int, module: torch.nn.Module, hidden: torch.Tensor | None) -> None:
        """Run a block for what is gathered inside, which may end its calls before their end."""
        if hidden is not None:
            for batch in self.stream.batches(hidden):
                with suppress(Enough):
                    self.stream.call_block(layer, module, batch)

    @noting_steps
    def cut(
        self,
        layer: int,
        module: torch.nn.Module,
        hidden: torch.Tensor | None,
        share: Share,
        late: int,
        passed: Passed,
    ) -> tuple[BlockCut, torch.Tensor | None]:
        """The cut of a block; what it puts out, where blocks behind it read that of the whole."""
        anatomy = self.stream.anatomy
        stages = self.method.stages(anatomy) if hidden is not None and share.parameters else []
        passes = self.method.identical_inputs  # else what is left of it is run again
        state = state_of(module) if stages else {}
        cut = BlockCut(layer)
        for number, only in enumerate(stages or [None], 1):
            with ExitStack() as stack:
                if number > 1:
                    stack.enter_context(masked(self.stream, module, state, cut, self.dtype))
                if number >= len(stages):
                    stack.enter_context(passed.noted(module))
                block, out = self.look(layer, module, hidden, share, late, only, passes)
            # What the block puts out is known now; a large one waits while its layers are solved.
            waits = self.stream.large and not stages and self._cuts(share.parameters)
            aside = self.stream.set_aside(layer, module) if waits else nullcontext(block.weights)
            with aside as weights:
                block = replace(block, weights=weights)
                cut = cut.joined(cut_by(self.method, block, share.parameters, self.dtype))
        if stages:
            module.load_state_dict(
                {k: v.to(self.stream.device) for k, v in state.items()}, assign=True
            )
        return self.checked(cut), out

    def checked(self, cut: BlockCut) -> BlockCut:
        """The cut, which is one that a block can have.

        Raises:
            PlanError: it is not; nothing has been written by it.
        """
        check_cut(self.stream.anatomy, cut)
        return cut

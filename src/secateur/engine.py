"""The two passes that a structured method needs: which blocks go, then what goes inside the rest.

The engine drives a :class:`~secateur.streaming.Stream` and a
:class:`~secateur.methods.Method`; it writes nothing. What a finished block turns into is handed to
a sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from secateur.anatomy.residual import reads_normed
from secateur.errors import RecipeError
from secateur.fit_text import FitText
from secateur.inside import Inside
from secateur.layers import LayerChoice, Round, by_influence, by_loss
from secateur.magnitude import factors
from secateur.masking import masked, state_of
from secateur.methods import Method, Shares
from secateur.plans import BlockCut, Plan, Tensors, block_removed
from secateur.progress import Progress
from secateur.replaying import Passed
from secateur.streaming import Stream
from secateur.surveys import by_gradients, by_statistics

#: Takes a finished block: its cut, and its original tensors in float32 on the CPU.
Sink = Callable[[BlockCut, Tensors], None]


class Engine:
    """One run of one method over one model.

    Args:
        stream: the model.
        method: the method.
        to_remove: parameters that must go.
        seed: of everything drawn inside blocks.
        dtype: floating type of the written weights; trials see weights rounded to it.
    """

    def __init__(
        self,
        stream: Stream,
        method: Method,
        *,
        to_remove: int,
        seed: int,
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.stream = stream
        self.method = method
        self.to_remove = to_remove
        self.seed = seed
        self.dtype = dtype
        self.progress = progress
        self.trials: list[dict[str, float]] = []
        self.inside = Inside(stream, method, seed=seed, dtype=dtype)
        self.text = FitText(stream, method, seed=seed, progress=progress)

    # ---- whole blocks ------------------------------------------------------------------------

    def layer_stage(self, tokens: torch.Tensor) -> Iterator[LayerChoice]:
        """See :func:`secateur.layers.by_influence`."""
        return by_influence(self.stream, self.method, tokens, self.progress)

    def layer_counts(self) -> Sequence[int]:
        """Numbers of whole blocks that may be removed, by the method and this model's depth.

        Raises:
            RecipeError: none can be had.
        """
        anatomy = self.stream.anatomy
        counts = self.method.layer_counts(self.to_remove / anatomy.block_parameters)
        depth = range(anatomy.layers)
        most = sum(bool(self.method.candidates(depth[gone:])) for gone in range(anatomy.layers - 1))
        if min(counts) > most:
            raise RecipeError(
                f"{min(counts)} of {anatomy.layers} blocks would go, but method {self.method.name} "
                f"can remove at most {most} here: ask for less"
            )
        return counts

    def choose_layers(
        self,
        tokens: torch.Tensor,
        *,
        known: Sequence[Round] = (),
        note: Callable[[Round], None] = lambda _: None,
    ) -> LayerChoice:
        """The blocks that stay, by the method's wish or by the loss on held-out windows.

        For the choice, the last three tenths of the windows are kept out of the statistics, every
        candidate is pruned to the same total share, and its loss is taken on those. Candidates
        are tried upwards until one is no better than the one before. A few hundred tokens are a
        noisy judge, so removing another block must win by more than the standard error of the
        paired difference per token.

        Args:
            known, note: removals by the loss, of an earlier run and of this one; see
                :func:`secateur.layers.by_loss`.
        """
        counts = self.layer_counts()
        if self.method.ranking is None:
            return LayerChoice(list(range(self.stream.anatomy.layers)), {}, [])
        if self.method.ranking == "loss":
            choice, rounds = by_loss(
                self.stream, self.method, tokens, counts[0], self.progress, known=known, note=note
            )
            self.trials = [
                {"layers": number, "loss": round(each.loss, 6), "block_runs": each.runs}
                for number, each in enumerate(rounds, 1)
            ]
            return choice
        if len(counts) > 1:
            self.text.expect(tokens)  # trials ask for fewer
            count, loss = self._best_count(tokens, counts)
        else:
            count, loss = counts[0], None
        for choice in self.layer_stage(tokens):
            if len(choice.removed) == count:
                return replace(choice, held_out_loss=loss)
        raise AssertionError("the layer stage ends only when nothing is left")

    def _best_count(self, tokens: torch.Tensor, counts: Sequence[int]) -> tuple[int, float]:
        statistics, probe = _held_out(tokens)
        best: tuple[int, torch.Tensor] | None = None
        gradients: dict[int, Any] = {}
        refused: RecipeError | None = None
        for choice in self.layer_stage(statistics):
            count = len(choice.removed)
            try:
                shares = self.shares(choice, statistics, gradients)
            except RecipeError as error:
                refused = refused or error  # the first says most: it had all blocks to take from
            else:
                losses = self._trial_losses(choice, shares, statistics, probe)
                loss = float(losses.mean())
                self.trials.append({"layers": count, "held_out_loss": round(loss, 6)})
                self.progress.note(f"{count} blocks removed: held-out loss {loss:.4f}")
                if best is not None:
                    gain = best[1] - losses
                    if float(gain.mean()) <= float(gain.std()) / math.sqrt(gain.numel()):
                        break
                best = (count, losses)
            if count == counts[-1]:
                break
        if best is None:
            assert refused is not None
            raise refused
        return best[0], float(best[1].mean())

    def held_out_loss(self, choice: LayerChoice, tokens: torch.Tensor) -> float:
        """Mean loss on windows kept out of the statistics, with these blocks left."""
        statistics, probe = _held_out(tokens)
        losses = self._trial_losses(choice, self.shares(choice, statistics), statistics, probe)
        return float(losses.mean())

    def _trial_losses(
        self, choice: LayerChoice, shares: Shares, statistics: torch.Tensor, probe: torch.Tensor
    ) -> torch.Tensor:
        hidden: list[torch.Tensor] = []
        self.neuron_stage(choice.layers, shares, statistics, probe=probe, probe_out=hidden)
        return self.stream.losses(hidden[0], probe)

    def shares(
        self,
        choice: LayerChoice,
        tokens: torch.Tensor,
        gradients: dict[int, Any] | None = None,
    ) -> Shares:
        """What each remaining block shall lose.

        Args:
            tokens: (windows, length), for the statistics of a method that looks ahead.
            gradients: what a survey by gradients on these tokens found with more blocks left; kept
                here for the next call. They are of the uncut model, whichever blocks are left.

        Raises:
            RecipeError: they cannot lose that much.
        """
        anatomy, method = self.stream.anatomy, self.method
        rest = max(0, self.to_remove - len(choice.removed) * anatomy.block_parameters)
        surveys, by = {}, method.survey_by(anatomy, tokens.numel())
        if by == "gradients":
            found = gradients or by_gradients(
                self.stream, method, tokens, choice.layers, self.inside.block, self.progress
            )
            surveys = {layer: found[layer] for layer in method.surveyed(choice.layers)}
            if gradients is not None:
                gradients.update(found)
        elif by == "statistics":
            surveys = by_statistics(
                self.stream, method, tokens, choice.layers, self.inside.look, self.progress
            )
        shares = method.allocate(anatomy, choice.layers, choice.importances, surveys, rest)
        if method.compensates and reads_normed(self.stream.checkpoint.config):
            for layer, factor in factors(choice.layers, choice.growths).items():
                shares[layer] = replace(shares[layer], factor=factor)
        return shares

    # ---- inside the blocks -------------------------------------------------------------------

    def neuron_stage(
        self,
        layers: list[int],
        shares: Shares,
        tokens: torch.Tensor,
        *,
        sink: Sink | None = None,
        done: dict[int, BlockCut] | None = None,
        probe: torch.Tensor | None = None,
        probe_out: list[torch.Tensor] | None = None,
    ) -> Plan:
        """Cut every block in ``layers`` by its share.

        Args:
            tokens: (windows, length), for the statistics.
            sink: called with each block that is cut here.
            done: cuts of an earlier, killed run; those blocks are only run through.
            probe: other windows, which pass through the cut blocks.
            probe_out: gets the hidden state of ``probe`` behind the last block.
        """
        done = done or {}
        plan = Plan(self.stream.anatomy, [])
        probed = self.stream.embed(probe) if probe is not None else None
        open_ = [layer for layer in layers if layer not in done]
        # Behind these, nothing needs what blocks put out, or nothing needs the blocks at all.
        last_read = max((i for i in open_ if self.inside.signals(shares[i].parameters)), default=-1)
        last_cut = max(open_, default=-1)
        windows, late = self.text.windows(tokens) if last_read >= 0 else (None, 0)
        hidden = self.stream.embed(windows) if windows is not None else None
        self.progress.stage("cutting blocks" if probe is None else "trial cut", len(layers))
        missed = 0  # parameters that blocks so far should have lost and have not
        for layer in layers:
            quota = shares[layer].parameters
            quota += missed if quota and self.method.carries else 0
            if layer > last_cut and probe is None:
                plan.blocks.append(done[layer])
                self.progress.step()
                continue
            with self.stream.block(layer) as module:
                if layer > last_read:
                    hidden = None
                again = layer < last_read and not self.method.identical_inputs
                tokens_here = hidden.shape[:2].numel() if again and hidden is not None else 0
                passed = Passed(self.method, plan.anatomy, tokens_here)
                if layer in done:
                    cut, out = done[layer], self.inside.pass_done(layer, module, hidden, passed)
                else:
                    share = replace(shares[layer], parameters=quota)
                    cut, out = self.inside.cut(layer, module, hidden, share, late, passed)
                plan.blocks.append(cut)
                if shares[layer].parameters:
                    missed = quota - block_removed(plan.anatomy, cut)
                state = state_of(module)
                if sink is not None and layer not in done:
                    sink(cut, state)
                if probed is not None or again:
                    with masked(self.stream, module, state, cut, self.dtype):
                        state = {}
                        if probed is not None:
                            probed = self.stream.forward_block(layer, module, probed)
                            # Of a trial nobody asks for new weights, which add up to a model.
                            cut.weights = cut.weights if sink is not None else {}
                        if again:
                            with passed.replayed(module, cut):
                                out = self.inside.pass_on(layer, module, hidden)
                hidden = out
                del state  # else it stays until the next block's takes its place
            self.progress.step(f"block {layer}")
        self.progress.finish()
        if probe_out is not None and probed is not None:
            probe_out.append(probed)
        return plan


def _held_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows for statistics, and the last three tenths for judging."""
    count = max(1, math.ceil(0.3 * len(tokens)))
    return tokens[:-count], tokens[-count:]

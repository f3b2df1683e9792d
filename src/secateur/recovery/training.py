"""The steps of the optimiser, and a state from which they go on as if nothing had happened.

Nothing is drawn while a model trains: there is no dropout, and the windows of a step follow from
its number. So the adapters, the two moments of Adam and the losses so far are all of the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from secateur.errors import RecipeError
from secateur.recovery.text import windows_of_step

#: Tokens that pass the model at once; their logits are what takes memory. The windows of a step
#: that do not fit are taken one after the other, and their gradients summed.
TOKENS_AT_ONCE = 512
#: Share of the steps in which the learning rate rises; then it falls to zero in a straight line.
WARM_UP = 0.05
#: Gradients of all adapters together are shortened to this length.
LONGEST_GRADIENT = 1.0
#: Steps whose mean loss is shown.
SHOWN = 10


class Training:
    """Adam on a few parameters of a model.

    Args:
        model: the whole model; everything else in it is frozen.
        parameters: what is trained, by names that are the same in every run.
        windows: tokens to train on, (windows, length) int64.
        steps, batch, lr, seed: as in :class:`~secateur.recovery.settings.HealSettings`.
    """

    def __init__(
        self,
        model: Any,
        parameters: Mapping[str, nn.Parameter],
        windows: torch.Tensor,
        *,
        steps: int,
        batch: int,
        lr: float,
        seed: int,
    ) -> None:
        self._model, self._parameters, self._windows = model, dict(parameters), windows
        self._steps, self._batch, self._lr, self._seed = steps, batch, lr, seed
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._adam = torch.optim.Adam(self._parameters.values(), lr=lr)
        self.losses: list[float] = []

    def run(self, *, every: int, save: Callable[[], None], shown: Callable[[str], None]) -> None:
        """All steps that are left; ``save`` after every ``every``th and ``shown`` after each.

        Raises:
            RecipeError: the loss is no number any more.
        """
        self._model.eval()  # without dropout, of which a pruned model has no need
        for step in range(len(self.losses), self._steps):
            loss = self._step(step)
            if not math.isfinite(loss):
                raise RecipeError(
                    f"the loss is {loss} at step {step + 1} of {self._steps} with --lr "
                    f"{self._lr:g}: lower --lr"
                )
            self.losses.append(loss)
            last = self.losses[-SHOWN:]
            shown(f"step {step + 1}/{self._steps} loss {sum(last) / len(last):.3f}")
            if (step + 1) % every == 0 and step + 1 < self._steps:
                save()

    def _step(self, step: int) -> float:
        """One step; the mean loss of its windows before it, in nats a token."""
        numbers = windows_of_step(
            step, windows=len(self._windows), batch=self._batch, seed=self._seed
        )
        device = next(iter(self._parameters.values())).device
        at_once = max(1, TOKENS_AT_ONCE // self._windows.shape[1])
        self._adam.zero_grad(set_to_none=True)
        total = 0.0
        for tokens in self._windows[numbers].to(device).split(at_once):
            loss = next_token_loss(self._model, tokens) * (len(tokens) / self._batch)
            loss.backward()
            total += float(loss.detach())
        if step == 0:
            self._check_all_take_part()
        nn.utils.clip_grad_norm_(self._parameters.values(), LONGEST_GRADIENT)
        for group in self._adam.param_groups:
            group["lr"] = self._lr * share_of_lr(step, self._steps)
        self._adam.step()
        return total

    def _check_all_take_part(self) -> None:
        """Whether every adapter has a gradient: a fused kernel would pass it by.

        Raises:
            RecipeError: one has none.
        """
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise RecipeError(
                    f"the adapter of layer {name.rpartition('.')[0]} has no gradient: this model's "
                    "code reads its weights past the layer; please report"
                )

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that :meth:`load` needs, as tensors for a file."""
        found = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self._parameters.items():
            moments = self._adam.state[parameter]
            found[f"value.{name}"] = parameter.detach().cpu()
            found[f"first.{name}"] = moments["exp_avg"].cpu()
            found[f"second.{name}"] = moments["exp_avg_sq"].cpu()
        return found

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from where :meth:`state` was taken."""
        self.losses = state["losses"].tolist()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"value.{name}"])
                self._adam.state[parameter] = {
                    "step": torch.tensor(float(len(self.losses))),
                    "exp_avg": state[f"first.{name}"].to(parameter.device),
                    "exp_avg_sq": state[f"second.{name}"].to(parameter.device),
                }


def next_token_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats; tokens (windows, length)."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def share_of_lr(step: int, steps: int) -> float:
    """Share of the largest learning rate at a step, counted from 0: up, then down to zero."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / (steps - rising + 1)

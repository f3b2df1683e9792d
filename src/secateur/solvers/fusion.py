"""Two scores made one under homoscedastic uncertainty, and how much a score fluctuates.

Kendall, Gal & Cipolla (2018) weigh losses by noise that is learned with them. SAAP (arXiv
2412.15127) does so with a coarse score I_v and a fine one I_e:

    I = I_v / 2 s1^2 + I_e / 2 s2^2 + log s1 s2

Over the units that share s1 and s2 the sum of I is least at s1^2 = mean I_v, s2^2 = mean I_e: each
score is divided by its mean. Where each unit has its own, I = 1 + log(I_v I_e) / 2, and the order
is that of the geometric mean.

That noise says how large a score is, not how sure. Measured noise takes it times the score's
variance over windows by the square of its mean: a score that each window contradicts counts less.
"""

from __future__ import annotations

import torch

#: Below this a score counts as this: a unit that nothing reaches has no logarithm.
TINY = 1e-30
#: Steps of :func:`learned_variances`, and how far one goes in log s^2.
STEPS, RATE = 600, 0.2


def variances(scores: torch.Tensor) -> torch.Tensor:
    """s^2 of each score in closed form.

    Args:
        scores: those of the units that share them, (2, units).

    Returns:
        (2,), float64.
    """
    return scores.double().mean(1).clamp_min(TINY)


def learned_variances(scores: torch.Tensor) -> torch.Tensor:
    """The same by gradient descent (Adam, falling rate) on log s^2, as the paper trains them.

    Begins at the largest score: above the end, where slopes are between 0 and 1/2.
    """
    mean = variances(scores)
    log = scores.double().amax(1).clamp_min(TINY).log().requires_grad_()
    adam = torch.optim.Adam([log], lr=RATE)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.005, STEPS)
    for _ in range(STEPS):
        adam.zero_grad()
        with torch.enable_grad():
            (mean / (2 * log.exp()) + log / 2).sum().backward()
        adam.step()
        falling.step()
    return log.detach().exp()


def fused(scores: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """I of each unit.

    Args:
        scores: I_v and I_e, (2, units).
        variance: s1^2 and s2^2, (2,) for all units or (2, units) of each.

    Returns:
        (units,), float64.
    """
    s2 = variance.double().reshape(2, -1)
    return (scores.double() / (2 * s2) + s2.log() / 2).sum(0)


def fluctuation(scores: torch.Tensor) -> torch.Tensor:
    """Variance over windows by the square of the mean, of each unit; 0 where the mean is 0.

    Args:
        scores: of each window, (windows, units), none below 0.

    Returns:
        (units,), float64.
    """
    values = scores.double()
    mean = values.mean(0)
    spread = (values - mean).square().mean(0)
    return torch.where(mean > 0, spread / mean.square().clamp_min(TINY), 0.0)


def noise(scores: torch.Tensor) -> torch.Tensor:
    """How much each of two scores fluctuates over windows, as the mean over units.

    Args:
        scores: of each window, (2, windows, units), none below 0.

    Returns:
        (2,), float64, without unit; ones where one of them is the same in all windows, as in a
        single one: then nothing is known of it.
    """
    found = torch.stack([fluctuation(one).mean() for one in scores])
    return found if bool((found > 0).all()) else torch.ones_like(found)

"""Structured OBS against dense references: errors of removal, the greedy choice, the refit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.solvers.brain_surgeon import GreedyOrder, best_pull, output_error, refit
from secateur.solvers.gram import damped


def problem(
    seed: int, rows: int = 5, inputs: int = 8, tokens: int = 60
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, inputs) and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, inputs, generator=generator)
    return weight, x.T @ x / tokens


def least_error(weight: torch.Tensor, second: torch.Tensor, kept: list[int]) -> float:
    """Relative error of the best weights on ``kept``, by solving the normal equations densely."""
    w = weight.double()
    inner, cross = second[kept][:, kept], second[:, kept]
    best = torch.linalg.solve(inner, (w @ cross).T).T
    full = torch.zeros_like(w)
    full[:, kept] = best
    difference = full - w
    return float(torch.trace(difference @ second @ difference.T) / torch.trace(w @ second @ w.T))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_errors_of_removal_are_those_of_the_best_refit(seed: int, removed: int) -> None:
    weight, second = problem(seed)
    order = GreedyOrder(weight, second, damping=1e-9)
    kept = order.kept(removed)
    assert sorted(order.order.tolist()) == list(range(8))
    assert order.error(removed) == pytest.approx(
        least_error(weight, damped(second, 1e-9), kept.tolist()), rel=1e-4, abs=1e-9
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_first_to_go_costs_least(seed: int) -> None:
    weight, second = problem(seed)
    costs = [least_error(weight, second, [j for j in range(8) if j != i]) for i in range(8)]
    assert int(GreedyOrder(weight, second, damping=1e-9).order[0]) == costs.index(min(costs))


@pytest.mark.parametrize("seed", range(5))
def test_groups_go_whole_and_cheapest_first(seed: int) -> None:
    weight, second = problem(seed, inputs=12)
    order = GreedyOrder(weight, second, unit=4, damping=1e-9)
    costs = [
        least_error(weight, second, [j for j in range(12) if j // 4 != group]) for group in range(3)
    ]
    assert order.order[:4].tolist() == [4 * costs.index(min(costs)) + i for i in range(4)]
    assert order.error(4) == pytest.approx(min(costs), rel=1e-4)
    for removed in (4, 8):
        groups = (order.kept(removed) // 4).tolist()
        assert all(groups.count(group) == 4 for group in groups)


def test_several_in_one_step_cost_what_they_cost_together() -> None:
    weight, second = problem(3, inputs=16)
    order = GreedyOrder(weight, second, damping=1e-9, steps=4)
    for removed in (4, 8, 12):
        assert order.error(removed) == pytest.approx(
            least_error(weight, damped(second, 1e-9), order.kept(removed).tolist()), rel=1e-4
        )


def test_no_more_than_asked_are_ordered() -> None:
    weight, second = problem(4)
    whole, part = GreedyOrder(weight, second), GreedyOrder(weight, second, most=3)
    assert part.order[:3].tolist() == whole.order[:3].tolist()
    assert sorted(part.order.tolist()) == list(range(8))
    assert torch.equal(part.kept(3), whole.kept(3))


@pytest.mark.parametrize("pull", [1e-6, 0.1, 5.0])
def test_refit_is_the_least_squares_solution(pull: float) -> None:
    weight, second = problem(5)
    kept = torch.tensor([0, 2, 3, 6])
    new = refit(weight, second, kept, pull)
    # The same as one ordinary least-squares problem with the pull as further rows.
    root = torch.linalg.cholesky(second).T  # second = root^T root
    s = pull * second[kept][:, kept].diagonal().mean()
    left = torch.cat([root[:, kept], s.sqrt() * torch.eye(4, dtype=torch.float64)])
    w = weight.double()
    right = torch.cat([root @ w.T, s.sqrt() * w[:, kept].T])
    torch.testing.assert_close(new, torch.linalg.lstsq(left, right).solution.T)


def test_the_ends_of_the_pull() -> None:
    weight, second = problem(6)
    kept = torch.tensor([1, 2, 5, 7])
    free, stiff = refit(weight, second, kept, 1e-12), refit(weight, second, kept, 1e12)
    torch.testing.assert_close(stiff, weight[:, kept].double(), rtol=1e-6, atol=1e-6)
    assert output_error(weight, second, kept, free) == pytest.approx(
        least_error(weight, second, kept.tolist()), rel=1e-6
    )
    everything = torch.arange(8)
    torch.testing.assert_close(refit(weight, second, everything, 0.1), weight.double())


def test_a_fit_that_only_follows_noise_is_not_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 30, generator=generator)
    kept = torch.arange(28)

    def moments(tokens: int) -> torch.Tensor:
        x = torch.randn(tokens, 30, generator=generator, dtype=torch.float64)
        return x.T @ x / tokens

    # Independent inputs: the lost ones cannot be made up for, so any fit is noise.
    assert best_pull(weight, moments(20), moments(20_000), kept, (1e-3, 1e-2)) is None
    correlated = problem(7, inputs=30, tokens=5000)
    halves = [m + 1e-6 * torch.eye(30, dtype=torch.float64) for m in (correlated[1],) * 2]
    assert best_pull(correlated[0], *halves, torch.arange(20)) == 0.003


def test_dead_inputs_and_dead_layers() -> None:
    weight, second = problem(8)
    second[2] = 0
    second[:, 2] = 0
    order = GreedyOrder(weight, second)
    assert int(order.order[0]) == 2
    assert order.error(1) < 1e-2
    nothing = GreedyOrder(weight, torch.zeros(8, 8, dtype=torch.float64))
    assert sorted(nothing.order.tolist()) == list(range(8))
    kept = torch.arange(4)
    torch.testing.assert_close(
        refit(weight, torch.zeros(8, 8, dtype=torch.float64), kept, 0.1), weight[:, :4].double()
    )

"""Structured OBS against dense references: errors of removal, the greedy choice, the refit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.solvers import brain_surgeon
from secateur.solvers.brain_surgeon import GreedyOrder
from secateur.solvers.gram import damped
from secateur.solvers.inverses import InverseOfFew, WholeInverse
from secateur.solvers.refit import (
    OfFew,
    best_pull,
    chosen_pull,
    fitted_weights,
    output_error,
    refit,
    relative_error,
)
from secateur.statistics import Moments


def problem(
    seed: int, rows: int = 5, inputs: int = 8, tokens: int = 60
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (rows, inputs) and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(rows, inputs, generator=generator)
    return weight, x.T @ x / tokens


def greedy(
    weight: torch.Tensor, second: torch.Tensor, damping: float = 0.01, **settings: Any
) -> GreedyOrder:
    return GreedyOrder(weight, WholeInverse(second, damping), **settings)


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
@given(st.integers(0, 10_000), st.integers(2, 9))
def test_scores_take_part_in_the_order(seed: int, tenths: int) -> None:
    """By removals one at a time, each ranked by L^(1 - a) f^a with L from a dense refit."""
    weight, second = problem(seed)
    part = tenths / 10
    scores = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores[seed % 8] = 0  # which goes first, whatever it costs
    order = greedy(weight, second, 1e-9, scores=scores, part=part)
    left, gone = list(range(8)), []
    for _ in range(7):
        before = least_error(weight, second, left) if gone else 0.0

        def rank(j: int, left: list[int] = left, before: float = before) -> float:
            loss = least_error(weight, second, [i for i in left if i != j]) - before
            floor = torch.finfo(torch.float64).tiny
            return float((1 - part) * math.log(loss) + part * math.log(max(scores[j], floor)))

        gone.append(min(left, key=rank))
        left = [i for i in left if i != gone[-1]]
        assert order.kept(len(gone)).tolist() == left
    assert gone[0] == seed % 8
    alone = greedy(weight, second, 1e-9, scores=scores, part=1.0)
    alone.kept(7)
    assert alone.order[:7].tolist() == scores.argsort()[:7].tolist()
    none = greedy(weight, second, 1e-9, scores=scores, part=0.0)
    assert none.kept(4).tolist() == greedy(weight, second, 1e-9).kept(4).tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7))
def test_errors_of_removal_are_those_of_the_best_refit(seed: int, removed: int) -> None:
    weight, second = problem(seed)
    order = greedy(weight, second, 1e-9)
    kept = order.kept(removed)
    assert sorted(order.order.tolist()) == list(range(8))
    assert order.error(removed) == pytest.approx(
        least_error(weight, damped(second, 1e-9), kept.tolist()), rel=1e-4, abs=1e-9
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_first_to_go_costs_least(seed: int) -> None:
    weight, second = problem(seed)
    costs = [least_error(weight, second, [j for j in range(8) if j != i]) for i in range(8)]
    order = greedy(weight, second, 1e-9)
    order.error(1)
    assert int(order.order[0]) == costs.index(min(costs))


@pytest.mark.parametrize("unit", [1, 4])
def test_large_layers_in_float32_lose_the_same(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, second = problem(3, rows=16, inputs=96, tokens=300)
    exact = greedy(weight, second, unit=unit)
    monkeypatch.setattr(brain_surgeon, "LARGE", 0)
    found = greedy(weight, second, unit=unit)
    assert torch.equal(found.kept(64), exact.kept(64))
    for removed in range(4, 68, 4):
        assert found.error(removed) == pytest.approx(exact.error(removed), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_groups_go_whole_and_cheapest_first(seed: int) -> None:
    weight, second = problem(seed, inputs=12)
    order = greedy(weight, second, 1e-9, unit=4)
    costs = [
        least_error(weight, second, [j for j in range(12) if j // 4 != group]) for group in range(3)
    ]
    order.error(4)
    assert order.order[:4].tolist() == [4 * costs.index(min(costs)) + i for i in range(4)]
    assert order.error(4) == pytest.approx(min(costs), rel=1e-4)
    for removed in (4, 8):
        groups = (order.kept(removed) // 4).tolist()
        assert all(groups.count(group) == 4 for group in groups)


def test_several_in_one_step_cost_what_they_cost_together() -> None:
    weight, second = problem(3, inputs=16)
    order = greedy(weight, second, 1e-9, steps=4)
    for removed in (4, 8, 12):
        assert order.error(removed) == pytest.approx(
            least_error(weight, damped(second, 1e-9), order.kept(removed).tolist()), rel=1e-4
        )


def test_no_more_than_asked_are_ordered() -> None:
    weight, second = problem(4)
    whole, part = greedy(weight, second), greedy(weight, second)
    whole.error(7)
    part.error(3)
    assert part.order[:3].tolist() == whole.order[:3].tolist()
    assert part.order[3:].tolist() == sorted(part.order[3:].tolist())
    assert whole.order[3:].tolist() != part.order[3:].tolist()
    assert torch.equal(part.kept(3), whole.kept(3))


@pytest.mark.parametrize("unit", [1, 4])
def test_few_tokens_say_the_same_as_their_second_moment(unit: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 24, generator=generator)
    weight = torch.randn(5, 24, generator=generator)
    few = Moments.empty(24, torch.device("cpu"))
    few.add(x)
    assert few.rows is not None
    second = x.double().T @ x.double() / 9
    one = GreedyOrder(weight, WholeInverse(second, 0.01), unit=unit)
    other = GreedyOrder(weight, InverseOfFew(few, 0.01), unit=unit)
    for removed in (4, 8, 12, 16):
        assert one.error(removed) == pytest.approx(other.error(removed), rel=1e-5)
        assert torch.equal(one.kept(removed), other.kept(removed))
    kept = one.kept(8)
    for pull in (0.01, 1.0):
        wanted = refit(weight, second, kept, pull)
        found = fitted_weights(weight, few, kept, pull)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert relative_error(weight, few, kept, found) == pytest.approx(
            output_error(weight, second, kept, wanted), rel=1e-5
        )


@pytest.mark.parametrize("seed", range(4))
def test_the_pull_of_few_tokens_is_that_of_their_second_moments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(40, 40, generator=generator) / 6
    weight = torch.randn(5, 40, generator=generator)
    parts = []
    for tokens in (15, 8):
        parts.append(Moments.empty(40, torch.device("cpu")))
        parts[-1].add(torch.randn(tokens, 40, generator=generator) @ mix)
    kept = torch.arange(30)
    found = chosen_pull(weight, parts[0], parts[1], kept)
    assert found == best_pull(weight, parts[0].covariance, parts[1].covariance, kept)


def test_no_tokens_of_any_size_fit_to_nothing() -> None:
    fit = OfFew(torch.ones(3, 6), torch.zeros(2, 6), torch.arange(4))
    torch.testing.assert_close(fit.fit(0.1), torch.ones(3, 4, dtype=torch.float64))


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
    order = greedy(weight, second)
    assert order.error(1) < 1e-2
    assert int(order.order[0]) == 2
    nothing = greedy(weight, torch.zeros(8, 8, dtype=torch.float64))
    assert sorted(nothing.order.tolist()) == list(range(8))
    kept = torch.arange(4)
    torch.testing.assert_close(
        refit(weight, torch.zeros(8, 8, dtype=torch.float64), kept, 0.1), weight[:, :4].double()
    )

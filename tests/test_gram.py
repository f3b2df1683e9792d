"""The Gram form, its gradients and its factorisation against loops, autograd and dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.solvers import gram as module
from secateur.solvers.gram import (
    INVERSE_PANEL,
    cholesky,
    damped,
    frobenius_gradient,
    gram,
    importance,
    inverse_of,
    largest_eigenpair,
    literal_gram,
    literal_score,
    spectral_gradient,
)

ORDERS = ("condition", "condition-literal", "energy", "obs", "random")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def positive(size: int, seed: int = 0, rank: int | None = None) -> torch.Tensor:
    """A random positive (semi)definite matrix with a spread spectrum."""
    x = draw(rank or 2 * size, size, seed=seed) * torch.logspace(0, -1, size, dtype=torch.float64)
    return x.T @ x


def identity(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# ---- G ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "inputs", "tokens"), [(3, 5, 40), (7, 4, 9), (1, 6, 3)])
def test_gram_is_the_mean_of_squares_token_by_token(rows: int, inputs: int, tokens: int) -> None:
    w, x = draw(rows, inputs), draw(tokens, inputs, seed=1)
    expected = torch.zeros(inputs, inputs, dtype=torch.float64)
    for token in x:
        a = w @ torch.diag(token)
        expected += a.T @ a / tokens
    torch.testing.assert_close(gram(w, x.T @ x / tokens), expected)


def test_gram_gives_the_squared_error_of_a_masked_layer() -> None:
    w, x, mask = draw(4, 6), draw(50, 6, seed=1), draw(6, seed=2)
    g = gram(w, x.T @ x / len(x))
    error = ((x * mask) @ w.T - x @ w.T).square().sum(1).mean()
    torch.testing.assert_close((mask - 1) @ g @ (mask - 1), error)


def test_literal_gram_is_the_square_of_the_mean_layer() -> None:
    w, x = draw(4, 6), draw(50, 6, seed=1) + torch.linspace(-1, 1, 6)
    mean_layer = torch.zeros(4, 6, dtype=torch.float64)
    for token in x:
        mean_layer += w @ torch.diag(token) / len(x)
    torch.testing.assert_close(literal_gram(w, x.mean(0)), mean_layer.T @ mean_layer)


def test_gram_takes_float32_weights_and_counts_in_float64() -> None:
    w = draw(4, 6).float()
    g = gram(w, identity(6))
    assert g.dtype == torch.float64
    torch.testing.assert_close(g.diagonal(), w.double().square().sum(0))
    assert int((g - torch.diag(g.diagonal())).count_nonzero()) == 0


# ---- damping and factors ---------------------------------------------------------------------


def test_damped_adds_a_share_of_the_mean_and_leaves_its_input_alone() -> None:
    g = positive(5)
    before = g.clone()
    expected = g + 0.3 * g.diagonal().mean() * identity(5)
    torch.testing.assert_close(damped(g, 0.3), expected)
    assert torch.equal(g, before)


def test_damped_turns_a_dead_layer_into_the_identity() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(damped(zero, 0.01), identity(4))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cholesky_of_a_healthy_matrix_takes_the_damping_that_was_asked(scale: float) -> None:
    g = positive(8) * scale
    matrix, factor, share = cholesky(g, 1e-2)
    assert share == 1e-2
    assert relative(factor @ factor.T, matrix) < 1e-12
    assert relative(matrix, g + 1e-2 * g.diagonal().mean() * identity(8)) < 1e-12


def test_cholesky_of_a_rank_deficient_matrix() -> None:
    g = positive(12, rank=2)
    matrix, factor, share = cholesky(g, 1e-6)
    assert share == 1e-6
    assert relative(factor @ factor.T, matrix) < 1e-12


def test_cholesky_climbs_the_ladder_where_the_asked_damping_is_too_small() -> None:
    g = positive(6)
    values, vectors = torch.linalg.eigh(g)
    values[0] = -1e-3 * g.diagonal().mean()  # as rounding may leave it, only larger
    g = vectors @ torch.diag(values) @ vectors.T
    matrix, factor, share = cholesky(g, 1e-4)
    assert share == pytest.approx(1e-2)
    assert relative(factor @ factor.T, matrix) < 1e-12


def test_cholesky_of_zero() -> None:
    matrix, factor, share = cholesky(torch.zeros(5, 5, dtype=torch.float64), 1e-2)
    assert torch.equal(matrix, identity(5))
    assert torch.equal(factor, identity(5))
    assert share == 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["all", "diagonal", "beside"])
def test_cholesky_refuses_what_is_not_finite(value: float, place: str) -> None:
    g = positive(4)
    if place == "all":
        g[:] = value
    elif place == "diagonal":
        g[2, 2] = value
    else:
        g[3, 1] = g[1, 3] = value
    with pytest.raises(ArithmeticError, match="finite"):
        cholesky(g, 1e-2)


def test_cholesky_of_a_matrix_that_is_far_from_positive_is_that_of_the_nearest_one() -> None:
    g = torch.tensor([[1.0, 0.0], [0.0, 1e9]], dtype=torch.float64)
    g[0, 1] = g[1, 0] = 1e14
    matrix, factor, _ = cholesky(g, 1e-9)
    values, vectors = torch.linalg.eigh(g)
    nearest = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T
    assert relative(matrix, nearest) < 1e-9
    assert relative(factor @ factor.T, matrix) < 1e-9


@pytest.mark.parametrize("size", [1, 2, 17, INVERSE_PANEL, 2 * INVERSE_PANEL + 3])
def test_inverse_of(size: int) -> None:
    matrix, factor, _ = cholesky(positive(size), 1e-3)
    torch.testing.assert_close(inverse_of(factor), torch.linalg.inv(matrix))


# ---- orders ----------------------------------------------------------------------------------


def test_energy_is_what_an_input_puts_out_alone() -> None:
    w, x = draw(4, 6), draw(50, 6, seed=1)
    g = gram(w, x.T @ x / len(x))
    alone = [(x[:, j, None] * w[:, j]).square().sum(1).mean() for j in range(6)]
    scores = importance("energy", g, damping=1e-4, generator=rng())
    torch.testing.assert_close(scores, torch.stack(alone))
    scores.zero_()
    assert float(g.diagonal().sum()) > 0  # a copy, not a view


@pytest.mark.parametrize("rank", [None, 3])
def test_obs_is_the_rise_of_the_damped_error_with_the_others_refitted(rank: int | None) -> None:
    g, share = positive(7, rank=rank), 1e-3
    matrix = (g + share * g.diagonal().mean() * identity(7)).numpy()
    expected = []
    for j in range(7):
        kept = [i for i in range(7) if i != j]
        mask = np.zeros(7)
        mask[kept] = np.linalg.solve(matrix[np.ix_(kept, kept)], matrix[kept].sum(1))
        expected.append((mask - 1) @ matrix @ (mask - 1))
    scores = importance("obs", g, damping=share, generator=rng())
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-8)


def test_random_order_follows_its_generator() -> None:
    g = positive(9)
    first, second, other = (
        importance("random", g, damping=1e-4, generator=rng(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_a_finite_score_to_every_input(order: module.Order) -> None:
    for g in (
        positive(6),
        positive(6, rank=1),
        positive(6) * 1e-30,
        positive(6) * 1e30,
        torch.zeros(6, 6, dtype=torch.float64),
        identity(6),
        positive(1),
    ):
        scores = importance(order, g, damping=1e-4, generator=rng())
        assert scores.shape == (len(g),)
        assert scores.dtype == torch.float64
        assert bool(torch.isfinite(scores).all())


@pytest.mark.parametrize("order", ["condition", "obs", "energy"])
def test_order_does_not_depend_on_units(order: module.Order) -> None:
    g = positive(10)
    one, other = (importance(order, g * f, damping=1e-4, generator=rng()) for f in (1.0, 1e-12))
    assert torch.equal(one.argsort(), other.argsort())


# ---- gradients of condition numbers ----------------------------------------------------------


def scaled(g: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None] * g * mask[None, :]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_frobenius_gradient_against_autograd(size: int) -> None:
    matrix, factor, _ = cholesky(positive(size, seed=size), 1e-3)
    mask = torch.ones(size, dtype=torch.float64, requires_grad=True)
    problem = scaled(matrix, mask)
    torch.log(problem.norm() * torch.linalg.inv(problem).norm()).backward()
    found = frobenius_gradient(matrix, inverse_of(factor))
    torch.testing.assert_close(found, mask.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        importance("condition", positive(size, seed=size), damping=1e-3, generator=rng()), found
    )


def test_frobenius_gradient_sums_to_zero() -> None:
    # Scaling all inputs alike leaves a condition number alone.
    matrix, factor, _ = cholesky(positive(20), 1e-3)
    assert abs(float(frobenius_gradient(matrix, inverse_of(factor)).sum())) < 1e-12


def condition_number(g: torch.Tensor, mask: torch.Tensor, eps: float) -> torch.Tensor:
    problem = scaled(g, mask) + eps * torch.eye(len(g), dtype=g.dtype)
    values = torch.linalg.eigvalsh(problem)
    return values[-1] / values[0]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("share", [1e-3, 1e-1])
def test_spectral_gradient_against_autograd_and_differences(size: int, share: float) -> None:
    g = positive(size, seed=size)
    eps = share * float(g.diagonal().mean())
    mask = torch.ones(size, dtype=torch.float64, requires_grad=True)
    condition_number(g, mask, eps).backward()
    found = spectral_gradient(g, share)
    torch.testing.assert_close(found, mask.grad, rtol=1e-6, atol=1e-6)
    step = 1e-5
    differences = []
    for j in range(size):
        up, down = torch.ones(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64)
        up[j] += step
        down[j] -= step
        rise = condition_number(g, up, eps) - condition_number(g, down, eps)
        differences.append(rise / (2 * step))
    torch.testing.assert_close(found, torch.stack(differences), rtol=1e-4, atol=1e-4)


def test_literal_score_is_equation_nine_of_the_spectral_gradient() -> None:
    g = positive(6)
    gradient = spectral_gradient(g, 1e-3)
    expected = torch.tensor([-v + v * v / 2 for v in gradient.tolist()], dtype=torch.float64)
    torch.testing.assert_close(literal_score(gradient), expected)
    scores = importance("condition-literal", g, damping=1e-3, generator=rng())
    torch.testing.assert_close(scores, expected)


# ---- the largest eigenpair -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 30, 300])
def test_largest_eigenpair_against_eigh(size: int) -> None:
    g = positive(size, seed=size)
    value, vector = largest_eigenpair(lambda x: g @ x, g)
    values, vectors = torch.linalg.eigh(g)
    assert float(value) == pytest.approx(float(values[-1]), rel=1e-10)
    assert abs(float(vector @ vectors[:, -1])) == pytest.approx(1, abs=1e-8)
    assert float(vector.norm()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1, 2, 25])
def test_largest_eigenpair_of_rank_one(size: int) -> None:
    x = draw(size)
    value, vector = largest_eigenpair(lambda y: x * (x @ y), x)
    assert float(value) == pytest.approx(float(x @ x), rel=1e-10)
    assert abs(float(vector @ x) / float(x.norm())) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("size", [1, 2, 25])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 3.0, 1e20])
def test_largest_eigenpair_of_a_multiple_of_the_identity(size: int, factor: float) -> None:
    value, vector = largest_eigenpair(lambda x: factor * x, draw(size))
    assert float(value) == pytest.approx(factor)
    assert float(vector.norm()) == pytest.approx(1)


def test_largest_eigenpair_is_the_same_each_time() -> None:
    g = positive(40)
    first, second = (largest_eigenpair(lambda x: g @ x, g)[1] for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
def test_largest_eigenpair_of_any_rank(size: int, rank: int, seed: int) -> None:
    x = draw(rank, size, seed=seed)
    g = x.T @ x
    value, vector = largest_eigenpair(lambda y: g @ y, g)
    top = float(torch.linalg.eigvalsh(g)[-1])
    assert float(value) == pytest.approx(top, rel=1e-8)
    assert float(vector @ g @ vector) == pytest.approx(top, rel=1e-8)

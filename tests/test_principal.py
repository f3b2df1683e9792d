"""Principal directions against numpy, and where the statistics say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.solvers.principal import principal_directions, second_moment


def stream(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Hidden states of which some directions are thousands of times the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(3, -2, width)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (torch.randn(2, tokens // 2, width, generator=generator) * scale) @ turn


@pytest.mark.parametrize("alike", [False, True])
def test_second_moment_is_that_of_numpy(alike: bool) -> None:
    x = stream(9000, 6)  # more than one chunk
    flat = x.reshape(-1, 6).numpy().astype(np.float64)
    if alike:
        flat = flat / np.sqrt((flat**2).mean(1, keepdims=True))
    found = second_moment(x, alike=alike)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), flat.T @ flat, rtol=1e-12)


def test_products_are_not_rounded_to_float32() -> None:
    """One loud direction must not drown the others: float32 products lose 1e-2 beside 1e4."""
    x = torch.tensor([[10000.0, 0.01], [10000.0, -0.01]])
    assert float(second_moment(x)[1, 1]) == pytest.approx(2e-4, rel=1e-6)
    assert float(second_moment(x)[0, 1]) == 0


def test_a_token_of_nothing_counts_nothing() -> None:
    x = torch.stack([torch.zeros(3), torch.ones(3)])
    torch.testing.assert_close(second_moment(x, alike=True), torch.ones(3, 3).double())


def test_directions_are_those_of_numpy_with_fixed_signs() -> None:
    second = second_moment(stream(400, 12))
    values, vectors = principal_directions(second)
    assert bool((values.diff() <= 0).all())
    wanted = np.linalg.eigh(second.numpy())
    np.testing.assert_allclose(values.numpy(), wanted.eigenvalues[::-1], rtol=1e-6, atol=1e-6)
    overlap = np.abs(vectors.numpy().T @ wanted.eigenvectors[:, ::-1])
    np.testing.assert_allclose(overlap, np.eye(12), atol=1e-6)
    largest = vectors.gather(0, vectors.abs().argmax(0)[None])
    assert bool((largest > 0).all())


def test_slicing_keeps_the_most_of_all_projections() -> None:
    x = stream(400, 12)
    _, vectors = principal_directions(second_moment(x))
    best = float((x.double() @ vectors[:, :4]).norm())
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))).Q
        assert float((x @ other).norm()) < best


def test_the_mean_comes_last_even_where_little_is_known() -> None:
    """Three tokens span three directions of twelve; the mean must not be among the nine others."""
    x = stream(4, 12)[:, :2]
    x = x - x.mean(-1, keepdim=True)
    values, vectors = principal_directions(second_moment(x), centred=True)
    torch.testing.assert_close(vectors.sum(0)[:-1].abs(), torch.zeros(11).double())
    assert float(vectors[:, -1].abs().min()) == pytest.approx(12**-0.5)
    assert bool((values >= 0).all())
    gap = vectors.T @ vectors - torch.eye(12).double()
    assert float(gap.abs().max()) < 1e-12


def test_what_is_not_finite_is_refused() -> None:
    second = torch.eye(3).double()
    second[1, 1] = torch.inf
    with pytest.raises(ArithmeticError, match="the second moment of the hidden states is not fin"):
        principal_directions(second)
